"""The cache of converted parameters: used while it is valid, written again otherwise."""

import json
import os

import jax
import pytest
from absl import logging

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import counting
from continuous_lm.io import safetensors_files
from continuous_lm.models.checkpoints import parameter_cache
from tests.fixtures import many_devices, tiny
from tests.fixtures.params import assert_same_params


@pytest.fixture
def source(tmp_path):
    """A checkpoint to convert."""
    return tiny.save(tmp_path / "source", dtype="bfloat16")


@pytest.fixture
def cache(tmp_path):
    """The folder of the cache, which does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def warnings(monkeypatch):
    """The lines that are logged as warnings."""
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: lines.append(text % values)
    )
    return lines


@pytest.fixture
def opened(monkeypatch):
    """The folders whose tensors are read."""
    open_tensors, folders = safetensors_files.open_tensors, []

    def recorded(folder):
        folders.append(folder)
        return open_tensors(folder)

    monkeypatch.setattr(safetensors_files, "open_tensors", recorded)
    return folders


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_cached_parameters_equal_converted_ones(
    tmp_path, source, opened, warnings, dtype
):
    folder = tmp_path / "deep" / "cache"
    expected = clm.load(source, dtype=dtype)
    written = clm.load(source, dtype=dtype, cache_dir=folder)
    read = clm.load(source, dtype=dtype, cache_dir=str(folder))
    assert len(opened) == 2  # the third one reads the cache
    assert_same_params(written.params, expected.params)
    assert_same_params(read.params, expected.params)
    assert read.config == expected.config
    for x, y in zip(*map(jax.tree.leaves, (read.params, expected.params)), strict=True):
        assert x.sharding == y.sharding
        assert x.committed == y.committed
    (entry,) = folder.iterdir()
    assert entry.name.startswith("source-")
    assert not warnings


def test_each_source_and_dtype_has_its_own_entry(tmp_path, cache, source, opened):
    other = tiny.save(tmp_path / "other" / "source", seed=1, dtype="bfloat16")
    cases = [(source, None), (source, "float32"), (other, None)]
    for _ in range(2):
        for folder, dtype in cases:
            cached = clm.load(folder, dtype=dtype, cache_dir=cache)
            assert_same_params(cached.params, clm.load(folder, dtype=dtype).params)
    assert len(opened) == 2 * len(cases) + len(cases)
    assert len(list(cache.iterdir())) == len(cases)


@pytest.mark.parametrize(
    "change", ["weights", "time", "config", "sharded", "format", "shape"]
)
def test_changed_sources_are_converted_again(
    cache, monkeypatch, source, opened, warnings, change
):
    clm.load(source, cache_dir=cache)
    weights, config = source / safetensors_files.WEIGHTS_FILE, source / "config.json"
    match change:
        case "weights":  # as many bytes as before
            tiny.save(source, seed=1, dtype="bfloat16")
        case "time":
            os.utime(weights, ns=(0, 0))
        case "config":  # a file that was copied with its time
            stat, text = config.stat(), config.read_text()
            config.write_text(
                text.replace('"initializer_range": 0.15', '"initializer_range": 0.16')
            )
            assert config.read_text() != text
            os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "sharded":
            clm.save(source, clm.load(source), shard_size=50_000)
        case "format":
            monkeypatch.setattr(parameter_cache, "_FORMAT_VERSION", 2)
        case "shape":  # another version of the library gives a parameter another shape
            (entry,) = cache.iterdir()
            values = json.loads((entry / parameter_cache.FINGERPRINT_FILE).read_text())
            values["origin"]["parameters"]["embedding"] = [48, 64]
            (entry / parameter_cache.FINGERPRINT_FILE).write_text(json.dumps(values))
    before = len(opened)
    expected = clm.load(source).params
    for _ in range(2):
        assert_same_params(clm.load(source, cache_dir=cache).params, expected)
    assert len(opened) == before + 2  # for `expected`, and once for the cache
    assert len(list(cache.iterdir())) == 1
    assert not warnings


# Orbax checks the contents of these files.
CHECKED_FILES = [
    parameter_cache.FINGERPRINT_FILE,
    "params/_METADATA",
    "params/manifest.ocdbt",
]


def damages(folder):
    """Yield a file of a cache and its damaged content (None: no file), for every damage."""
    for path in files(folder):
        content = path.read_bytes()
        yield path, None
        if content:
            yield path, content[:-2]  # more than a line's end
        if path.relative_to(folder).as_posix() in CHECKED_FILES:
            yield path, bytes(len(content))


def test_torn_caches_are_written_again(cache, source, opened, warnings):
    expected = clm.load(source, cache_dir=cache).params
    (entry,) = cache.iterdir()
    count = 0  # the number of files may change each time
    while count < len(cases := list(damages(entry))):
        path, content = cases[count]
        count += 1
        path.unlink() if content is None else path.write_bytes(content)
        opened.clear(), warnings.clear()
        assert_same_params(clm.load(source, cache_dir=cache).params, expected)
        assert len(opened) == 1, path
        assert len(warnings) == 1, path
        assert f"{entry} cannot be used and is made again" in warnings[0]
        assert "\n" not in warnings[0]
        assert list(cache.iterdir()) == [entry]
    assert count > 10
    clm.load(source, cache_dir=cache)
    assert len(opened) == 1


def test_empty_cache_folders_are_written_again(cache, source, warnings):
    clm.load(source, cache_dir=cache)
    (entry,) = cache.iterdir()
    for path in files(entry):
        path.unlink()
    assert_same_params(
        clm.load(source, cache_dir=cache).params, clm.load(source).params
    )
    assert len(warnings) == 1


def test_files_of_another_length_are_not_read(cache, source, warnings, monkeypatch):
    """Orbax would replace missing values by zeros."""
    clm.load(source, cache_dir=cache)
    (entry,) = cache.iterdir()
    largest = max(files(entry), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    monkeypatch.setattr(
        parameter_cache,
        "_restore_params",
        lambda *_: pytest.fail("a torn cache was read"),
    )
    clm.load(source, cache_dir=cache)
    assert "not of their size" in warnings[0]


# --- Writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "file/cache", "x" * 300])
def test_folders_that_cannot_be_written_are_refused(tmp_path, source, opened, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(clm.InputError, match="cannot write to") as refused:
        clm.load(source, cache_dir=tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)
    assert not opened  # the folder is tried before tensors are read
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED:\nfull")],
)
def test_failed_writes_leave_no_file(cache, source, monkeypatch, error):
    import orbax.checkpoint

    def fail(self, folder, *arguments, **more):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise error

    monkeypatch.setattr(orbax.checkpoint.Checkpointer, "save", fail)
    with pytest.raises(
        clm.InputError, match=r"cannot write to .*(No space left|RESOURCE)"
    ) as full:
        clm.load(source, cache_dir=cache)
    assert "\n" not in str(full.value)
    assert not list(cache.iterdir())


RACE_PROGRAM = """
import sys
import orbax.checkpoint
import continuous_lm as clm
from tests.fixtures.params import assert_same_params

expected = clm.load(sys.argv[1]).params
print("ready", flush=True)
for line in sys.stdin:
    assert_same_params(clm.load(sys.argv[1], cache_dir=sys.argv[2]).params, expected)
    print("done", flush=True)
"""


@pytest.mark.slow
def test_simultaneous_writers_leave_one_valid_entry(cache, source):
    processes = [many_devices.start(RACE_PROGRAM, source, cache) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for i in range(3):
        os.utime(source / "model.safetensors", ns=(i, i))  # the entry is stale
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout.readline() == "done\n"
        assert len(list(cache.iterdir())) == 1
    for process in processes:
        process.communicate()
        assert process.returncode == 0


# --- Devices ---------------------------------------------------------------------------------

MESH_PROGRAM = """
import pathlib, sys
import jax
import continuous_lm as clm
from continuous_lm.io import safetensors_files
from tests.fixtures.params import assert_same_params

mesh = jax.make_mesh((2, 4), ("data", "model"))
source, folder = sys.argv[1:]
one, many = clm.load(source), clm.load(source, mesh=mesh)
for i, (first, second) in enumerate([(None, mesh), (mesh, None), (mesh, mesh)]):
    clm.load(source, mesh=first, cache_dir=f"{folder}/{i}")
    open_tensors = safetensors_files.open_tensors
    del safetensors_files.open_tensors  # the source may not be read
    cached = clm.load(source, mesh=second, cache_dir=f"{folder}/{i}")
    safetensors_files.open_tensors = open_tensors
    assert_same_params(cached.params, one.params)
    expected = one if second is None else many
    for x, y in zip(*map(jax.tree.leaves, (cached.params, expected.params)), strict=True):
        assert x.sharding == y.sharding, (x.sharding, y.sharding)
        assert x.committed == y.committed
"""


@pytest.mark.slow
def test_caches_written_and_read_on_different_devices(cache, source):
    many_devices.run_on_devices(MESH_PROGRAM, 8, str(source), str(cache))


def test_orbax_is_imported_only_for_a_cache():
    program = "import sys; import continuous_lm as clm; clm.load('apples'); print(*sys.modules)"
    modules = many_devices.run_on_devices(program, 1).split()
    assert "continuous_lm" in modules
    assert not [name for name in modules if name.startswith("orbax")]


def test_flag_cache_dir_of_programs(cache):
    arguments = [f"--cache_dir={cache}"]
    lm, _ = pretrained.load(program.parse(counting.Config, "counting", arguments))
    (entry,) = cache.iterdir()
    assert entry.name.startswith("apples-")
    assert_same_params(lm.params, clm.load("apples", dtype="float32").params)
