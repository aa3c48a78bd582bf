"""Parameters in stored tensors: what is read for which device, and what is written."""

import contextlib
import itertools
import json
import pathlib
import socket
import subprocess
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
from tests.fixtures import tiny
from tests.fixtures.programs import ENVIRONMENT


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


def assert_same(params, others):
    for (path, x), (other, y) in zip(
        jax.tree.leaves_with_path(params),
        jax.tree.leaves_with_path(others),
        strict=True,
    ):
        assert path == other
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@contextlib.contextmanager
def counted_reads(folder):
    """Gives, by file, an array that says how often the element that begins at each byte is read."""
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
    monkeypatch.setattr(
        parameter_layout, "BYTES_PER_COPY", 1000
    )  # many threads copy, some of them uneven pieces
    lm = draw(model_type)
    clm.save(tmp_path, lm, shard_size=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with counted_reads(tmp_path) as counts:
        again = clm.load(tmp_path)
    assert_same(again.params, lm.params)
    assert max(count.max() for count in counts.values()) == 1
    assert number_read(counts) == number_stored(lm.params)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_is_that_of_the_parameters(tmp_path, monkeypatch, model_type, dtype):
    """Counted, not sampled: what NumPy allocates, and that JAX takes it over without a copy."""
    gpt2 = {"n_embd": 512, "vocab_size": 4000}
    other = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4000}
    if model_type == "phi3":
        other |= {"head_dim": 128}
    lm = draw(model_type, "bfloat16", **(gpt2 if model_type == "gpt2" else other))
    clm.save(tmp_path, lm)
    del lm
    clm.load(tmp_path, dtype=dtype)  # traces and imports
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
    assert not any(info.values())  # nothing missing, left over or misshapen
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].numpy()


TIED = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
)  # what is tied unless it says otherwise
QUICK = [
    (name, name in TIED)
    for name in ("llama", "gemma3_text", "phi3", "gpt_neox", "gpt2")
]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(tiny.CONFIG_MAKERS, (True, False))
]


@pytest.mark.parametrize(("model_type", "tied"), CASES)
def test_saved_in_one_file_or_in_shards(tmp_path, model_type, tied):
    """From transformers' files to ours and back to transformers, which computes the same."""
    pytest.importorskip("torch")
    tiny.save_reference(tmp_path / "theirs", model_type, tie_word_embeddings=tied)
    lm = clm.load(tmp_path / "theirs")
    assert ("head" not in lm.params) == tied
    tokens = np.arange(12)
    wanted = logits(tmp_path / "theirs", tokens)
    assert np.abs(lm(tokens) - wanted).max() <= 2e-5 * np.abs(wanted).max()
    for name, shard_size in {"single": 10**9, "sharded": 60_000}.items():
        folder = tmp_path / name
        clm.save(folder, lm, shard_size=shard_size)
        assert (folder / safetensors_files.INDEX_FILE).exists() == (name == "sharded")
        assert_same(clm.load(folder).params, lm.params)
        np.testing.assert_allclose(
            logits(folder, tokens), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max()
        )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_no_weights_of_an_older_checkpoint_remain(tmp_path):
    """A single file left beside an index, or shards beyond the last, would be mistaken."""
    large, small = draw("llama"), draw("llama", num_hidden_layers=1)
    (tmp_path / "notes.safetensors").write_text("mine")
    numbers = []
    for lm, shard_size in [
        (large, 10**9),
        (large, 80_000),
        (small, 80_000),
        (small, 10**9),
    ]:
        clm.save(tmp_path, lm, shard_size=shard_size)
        files = {path.name for path in tmp_path.iterdir()} - {
            "config.json",
            "notes.safetensors",
        }
        if shard_size == 10**9:
            assert files == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / safetensors_files.INDEX_FILE).read_text())
            assert files == {
                safetensors_files.INDEX_FILE,
                *index["weight_map"].values(),
            }
        assert_same(clm.load(tmp_path).params, lm.params)
        numbers.append(len(files))
    assert numbers[0] == numbers[3] == 1 < numbers[2] < numbers[1]


def test_failure_on_the_way_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    lm = draw("llama")
    clm.save(tmp_path, lm)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    plain, written = safetensors_files.save_file, []

    def fail(path, *arguments):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        plain(path, *arguments)

    monkeypatch.setattr(safetensors_files, "save_file", fail)
    with pytest.raises(clm.InputError, match="No space left"):
        clm.save(tmp_path, draw("gpt2"), shard_size=100_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_holds_one_tensor(tmp_path):
    lm = draw("gpt_neox", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    clm.save(tmp_path, lm)
    largest = 4 * 2048 * 512
    size = number_stored(lm.params) * 4
    tracemalloc.start()
    try:
        clm.save(tmp_path, lm)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 70e6
    assert (
        peak < 2.5 * largest
    )  # the tensor being written, and the next one while it is filled


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

for model_type in tiny.CONFIG_MAKERS:
    folder = pathlib.Path(sys.argv[1], model_type)
    lm = draw(model_type, "bfloat16")
    clm.save(folder, lm, shard_size=50_000)
    one = clm.load(folder, dtype="float32")
    with counted_reads(folder) as counts:
        many = clm.load(folder, dtype="float32", mesh=mesh)
    assert_same(many.params, one.params)
    for x in jax.tree.leaves(many.params):
        assert len(x.sharding.device_set) == 8
    # Two rows of four devices: what both hold is read once, and so is what all hold.
    assert max(count.max() for count in counts.values()) == 1, model_type
    assert number_read(counts) == number_stored(lm.params), model_type

    # From the mesh back to files, piece by piece.
    clm.save(folder / "again", many)
    assert_same(clm.load(folder / "again").params, many.params)

    # As on a host that has one of the eight devices.
    plain, device = jax.make_array_from_callback, jax.devices()[6]
    held = []

    def alone(shape, sharding, callback, dtype):
        held.append(callback(sharding.devices_indices_map(shape)[device]))
        return plain(shape, sharding, lambda index: np.zeros(shape, dtype)[index], dtype=dtype)

    jax.make_array_from_callback = alone
    with counted_reads(folder) as counts:
        clm.load(folder, mesh=mesh)
    jax.make_array_from_callback = plain
    assert number_read(counts) == sum(part.size for part in held)
    share = number_read(counts) / number_stored(lm.params)
    print(model_type, share)
"""


def python(program, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_mesh_holds_the_same_and_reads_no_more_than_it_holds(tmp_path):
    flag = "--xla_force_host_platform_device_count=8"
    process = python(MESH_PROGRAM, tmp_path, XLA_FLAGS=flag)
    out, _ = process.communicate()
    assert process.returncode == 0
    shares = {name: float(share) for name, share in map(str.split, out.splitlines())}
    assert shares.keys() == tiny.CONFIG_MAKERS.keys()
    assert all(0.25 < share < 0.36 for share in shares.values()), (
        shares
    )  # norms are on all
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
with np.load(sys.argv[4]) as whole:
    for path, x in flat.items():
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[path][shard.index])
try:
    clm.save(folder.parent / "out", lm)
except clm.InputError as error:
    print(error, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs JAX's collectives for CPUs")
def test_two_hosts_read_what_their_devices_hold(tmp_path):
    lm = draw("gpt_neox")
    clm.save(tmp_path / "x", lm)
    np.savez(tmp_path / "whole.npz", **traverse_util.flatten_dict(lm.params, sep="/"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flag = "--xla_force_host_platform_device_count=4"
    processes = [
        python(
            HOSTS_PROGRAM,
            tmp_path / "x",
            port,
            rank,
            tmp_path / "whole.npz",
            XLA_FLAGS=flag,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        share, refused = out.splitlines()
        assert 0.5 < float(share) < 0.52
        assert "lies in part on devices of other processes" in refused
