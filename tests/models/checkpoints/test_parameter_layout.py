"""Parameters in stored tensors: elements that devices read, and files that are written."""

import contextlib
import itertools
import json
import pathlib
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from flax import traverse_util

import continuous_lm as clm
from continuous_lm.io import safetensors_files
from continuous_lm.models.checkpoints import parameter_layout, trunk
from continuous_lm.models.transformer import parameter_table
from tests.fixtures import many_devices, tiny
from tests.fixtures.params import assert_same_params


def draw(model_type, dtype="float32", **fields):
    """A language model with random parameters."""
    fields = {"model_type": model_type} | tiny.CONFIG_MAKERS[model_type](**fields)
    config = trunk.read_config(fields)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.standard_normal(declaration.shape).astype(np.dtype(dtype))
        for path, declaration in parameter_table(config).items()
    }
    return clm.LanguageModel(
        clm.Transformer(config), traverse_util.unflatten_dict(flat, sep="/")
    )


@contextlib.contextmanager
def counted_reads(folder):
    """Yield {file: counts}, where counts[i] tells how often the element at byte i is read."""
    counts = {
        path.name: np.zeros(path.stat().st_size, np.uint8)
        for path in folder.glob("*.safetensors")
    }
    plain = np.copyto

    def copyto(out, part, **arguments):
        mapped = part
        while not isinstance(mapped, np.memmap):
            mapped = mapped.base
        count = counts[pathlib.Path(mapped.filename).name]
        offset = (
            part.__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
        )
        read = np.ndarray(part.shape, np.uint8, count.data, offset, part.strides)
        read += 1
        plain(out, part, **arguments)

    np.copyto = copyto
    try:
        yield counts
    finally:
        np.copyto = plain


def number_read(counts):
    return sum(int(count.sum()) for count in counts.values())


def number_stored(params):
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("model_type", tiny.CONFIG_MAKERS)
def test_one_device_reads_every_element_once(tmp_path, monkeypatch, model_type):
    # Many threads copy, some of them uneven pieces.
    monkeypatch.setattr(parameter_layout, "BYTES_PER_COPY", 1000)
    lm = draw(model_type)
    clm.save(tmp_path, lm, shard_size=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with counted_reads(tmp_path) as counts:
        loaded = clm.load(tmp_path)
    assert_same_params(loaded.params, lm.params)
    assert max(count.max() for count in counts.values()) == 1
    assert number_read(counts) == number_stored(lm.params)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(family, marks=() if family == "phi3" else pytest.mark.slow)
        for family in ("llama", "phi3", "gpt_neox", "gpt2")
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_allocates_only_the_parameters(
    tmp_path, monkeypatch, model_type, dtype
):
    """NumPy allocates their bytes, and JAX takes them over without a copy."""
    gpt2 = {"n_embd": 512, "vocab_size": 4000}
    other = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4000}
    if model_type == "phi3":
        other |= {"head_dim": 128}
    lm = draw(model_type, "bfloat16", **(gpt2 if model_type == "gpt2" else other))
    clm.save(tmp_path, lm)
    del lm
    clm.load(tmp_path, dtype=dtype)  # imports and traces shapes
    plain, allocated = parameter_layout._aligned_empty, []

    def recorded(*arguments):
        array = plain(*arguments)
        allocated.append(array.ctypes.data)
        return array

    monkeypatch.setattr(parameter_layout, "_aligned_empty", recorded)
    tracemalloc.start()
    try:
        params = clm.load(tmp_path, dtype=dtype).params
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    leaves = jax.tree.leaves(params)
    size = sum(x.nbytes for x in leaves)
    assert size > 10e6
    assert size <= peak <= 1.05 * size
    assert {x.unsafe_buffer_pointer() for x in leaves} == set(allocated)


# --- Saving ----------------------------------------------------------------------------------


def logits(folder, tokens):
    """transformers' logits [T, V]."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())  # no missing, unexpected or misshapen tensor
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].numpy()


# Families whose embeddings are tied by default.
TIED = ("gemma", "gemma2", "gemma3_text", "gpt2")
QUICK = [(name, name in TIED) for name in ("gemma3_text", "phi3", "gpt2")]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(tiny.CONFIG_MAKERS, (True, False))
]


@pytest.mark.parametrize(("model_type", "tied"), CASES)
def test_transformers_loads_saved_files_and_shards(tmp_path, model_type, tied):
    """Transformers computes the same logits from its own files and from ours."""
    pytest.importorskip("torch")
    tiny.save_reference(tmp_path / "theirs", model_type, tie_word_embeddings=tied)
    lm = clm.load(tmp_path / "theirs")
    assert ("head" not in lm.params) == tied
    tokens = np.arange(12)
    expected = logits(tmp_path / "theirs", tokens)
    largest = np.abs(expected).max()
    assert np.abs(lm(tokens) - expected).max() <= 2e-5 * largest
    for name, shard_size in {"single": 10**9, "sharded": 60_000}.items():
        folder = tmp_path / name
        clm.save(folder, lm, shard_size=shard_size)
        assert (folder / safetensors_files.INDEX_FILE).exists() == (name == "sharded")
        assert_same_params(clm.load(folder).params, lm.params)
        actual = logits(folder, tokens)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * largest)


def test_saving_replaces_all_weights_of_an_older_checkpoint(tmp_path):
    """A single file beside an index, or shards beyond the last, would be mistaken for weights."""
    large, small = draw("llama"), draw("llama", num_hidden_layers=1)
    (tmp_path / "notes.safetensors").write_text("mine")
    single = 10**9
    numbers = []
    for lm, size in (
        (large, single),
        (large, 80_000),
        (small, 80_000),
        (small, single),
    ):
        clm.save(tmp_path, lm, shard_size=size)
        others = {"config.json", "notes.safetensors"}
        files = {path.name for path in tmp_path.iterdir()} - others
        if size == single:
            assert files == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / safetensors_files.INDEX_FILE).read_text())
            shards = index["weight_map"].values()
            assert files == {safetensors_files.INDEX_FILE, *shards}
        assert_same_params(clm.load(tmp_path).params, lm.params)
        numbers.append(len(files))
    assert numbers[0] == numbers[3] == 1 < numbers[2] < numbers[1]


def test_failed_saves_leave_the_older_checkpoint(tmp_path, monkeypatch):
    lm = draw("llama")
    clm.save(tmp_path, lm)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_file, paths = safetensors_files.save_file, []

    def fail(path, *arguments):
        if paths:
            raise OSError(28, "No space left on device")
        paths.append(path)
        save_file(path, *arguments)

    monkeypatch.setattr(safetensors_files, "save_file", fail)
    with pytest.raises(clm.InputError, match="No space left"):
        clm.save(tmp_path, draw("gpt2"), shard_size=100_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_allocates_two_tensors_at_most(tmp_path):
    """One tensor is written while the next one is filled."""
    lm = draw("gpt_neox", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    largest = 4 * 2048 * 512
    size = number_stored(lm.params) * 4
    tracemalloc.start()
    try:
        clm.save(tmp_path, lm)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 70e6
    assert peak < 2.5 * largest


# --- Meshes ----------------------------------------------------------------------------------

MESH_PROGRAM = """
import pathlib, sys
import jax, numpy as np
import continuous_lm as clm
from tests.fixtures import tiny
from tests.models.checkpoints.test_parameter_layout import *

NAMES = ("data", "model")
assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), NAMES)

for model_type in sys.argv[2:]:
    folder = pathlib.Path(sys.argv[1], model_type)
    lm = draw(model_type, "bfloat16")
    clm.save(folder, lm, shard_size=50_000)
    one = clm.load(folder, dtype="float32")
    with counted_reads(folder) as counts:
        many = clm.load(folder, dtype="float32", mesh=mesh)
    assert_same_params(many.params, one.params)
    for x in jax.tree.leaves(many.params):
        assert len(x.sharding.device_set) == 8
    # Two rows of four devices: what both hold is read once, and so is what all hold.
    assert max(count.max() for count in counts.values()) == 1, model_type
    assert number_read(counts) == number_stored(lm.params), model_type

    # From the mesh back to files, piece by piece.
    clm.save(folder / "again", many)
    assert_same_params(clm.load(folder / "again").params, many.params)

    # As on a host that has one of the eight devices.
    plain, device = jax.make_array_from_callback, jax.devices()[6]
    shards = []

    def alone(shape, sharding, callback, dtype):
        shards.append(callback(sharding.devices_indices_map(shape)[device]))
        return plain(shape, sharding, lambda index: np.zeros(shape, dtype)[index], dtype=dtype)

    jax.make_array_from_callback = alone
    with counted_reads(folder) as counts:
        clm.load(folder, mesh=mesh)
    jax.make_array_from_callback = plain
    assert number_read(counts) == sum(shard.size for shard in shards)
    share = number_read(counts) / number_stored(lm.params)
    print(model_type, share)
"""


@pytest.mark.parametrize(
    "families",
    [
        ["llama", "gpt_neox"],
        pytest.param([*tiny.CONFIG_MAKERS], marks=pytest.mark.slow),
    ],
    ids=["two families", "all families"],
)
def test_mesh_loads_the_same_parameters_and_reads_only_its_shards(tmp_path, families):
    output = many_devices.run_on_devices(MESH_PROGRAM, 8, str(tmp_path), *families)
    shares = {name: float(share) for name, share in map(str.split, output.splitlines())}
    assert [*shares] == families
    # Every device holds all norms.
    assert all(0.25 < share < 0.36 for share in shares.values()), shares
    # The families without grouped heads split all but norms, some biases and positions in four.
    assert shares["gpt_neox"] < 0.27


HOSTS_PROGRAM = """
import pathlib, sys
import jax, numpy as np
import continuous_lm as clm
from continuous_lm.models.transformer import parameter_table
from continuous_lm.models.checkpoints import trunk
from tests.models.checkpoints.test_parameter_layout import *

folder, port, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
assert jax.device_count() == 8 and jax.local_device_count() == 4
# The axis "model" goes over both processes: each holds half of it.
mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (2, 2, 2)).transpose(1, 0, 2).reshape(2, 4),
                         ("data", "model"))
with counted_reads(folder) as counts:
    lm = clm.load(folder, mesh=mesh)
flat = traverse_util.flatten_dict(lm.params, sep="/")
print(number_read(counts) / number_stored(lm.params), flush=True)
with np.load(sys.argv[4]) as arrays:
    for path, x in flat.items():
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, arrays[path][shard.index])
try:
    clm.save(folder.parent / "out", lm)
except clm.InputError as error:
    print(error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs JAX's collectives for CPUs")
def test_two_hosts_read_the_shards_of_their_devices(tmp_path):
    lm, folder, arrays = draw("gpt_neox"), tmp_path / "x", tmp_path / "params.npz"
    clm.save(folder, lm)
    np.savez(arrays, **traverse_util.flatten_dict(lm.params, sep="/"))
    port = many_devices.find_free_port()
    processes = [
        many_devices.start(HOSTS_PROGRAM, folder, port, rank, arrays, num_devices=4)
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        share, message = output.splitlines()
        assert 0.5 < float(share) < 0.52
        assert "lies in part on devices of other processes" in message
