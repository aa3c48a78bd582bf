"""Converted parameters that are kept: used when they are good, made again when they are not."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import logging

import continuous_lm as clm
from continuous_lm.experiments.common import pretrained, program
from continuous_lm.experiments.durations import counting
from continuous_lm.io import safetensors_files
from continuous_lm.models.checkpoints import parameter_cache
from tests.fixtures import tiny
from tests.fixtures.programs import ENVIRONMENT


@pytest.fixture
def source(tmp_path):
    return tiny.save(tmp_path / "source", dtype="bfloat16")


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
    plain, folders = safetensors_files.open_tensors, []

    def recorded(folder):
        folders.append(folder)
        return plain(folder)

    monkeypatch.setattr(safetensors_files, "open_tensors", recorded)
    return folders


def assert_same(params, others):
    for (path, x), (other, y) in zip(
        jax.tree.leaves_with_path(params),
        jax.tree.leaves_with_path(others),
        strict=True,
    ):
        assert path == other
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_what_is_kept_is_what_was_loaded(tmp_path, source, opened, warnings, dtype):
    wanted = clm.load(source, dtype=dtype)
    first = clm.load(source, dtype=dtype, cache_dir=tmp_path / "deep" / "cache")
    again = clm.load(source, dtype=dtype, cache_dir=str(tmp_path / "deep" / "cache"))
    assert len(opened) == 2  # and not for the third
    assert_same(first.params, wanted.params)
    assert_same(again.params, wanted.params)
    assert again.config == wanted.config
    for x, y in zip(*map(jax.tree.leaves, (again.params, wanted.params)), strict=True):
        assert x.sharding == y.sharding
        assert x.committed == y.committed
    (kept,) = (tmp_path / "deep" / "cache").iterdir()  # nothing else is left there
    assert kept.name.startswith("source-")
    assert not warnings


def test_each_source_and_dtype_has_its_own(tmp_path, source, opened):
    other = tiny.save(tmp_path / "other" / "source", seed=1, dtype="bfloat16")
    cases = [(source, None), (source, "float32"), (other, None)]
    for _ in range(2):
        for folder, dtype in cases:
            cached = clm.load(folder, dtype=dtype, cache_dir=tmp_path / "cache")
            assert_same(cached.params, clm.load(folder, dtype=dtype).params)
    assert len(opened) == 2 * len(cases) + len(cases)
    assert len(list((tmp_path / "cache").iterdir())) == len(cases)


@pytest.mark.parametrize(
    "change", ["weights", "time", "config", "sharded", "format", "shape"]
)
def test_changed_source_is_converted_again(
    tmp_path, monkeypatch, source, opened, warnings, change
):
    clm.load(source, cache_dir=tmp_path / "cache")
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
        case "shape":  # that this version of the library gives to a parameter
            (kept,) = (tmp_path / "cache").iterdir()
            values = json.loads((kept / parameter_cache.FINGERPRINT_FILE).read_text())
            values["origin"]["parameters"]["embedding"] = [48, 64]
            (kept / parameter_cache.FINGERPRINT_FILE).write_text(json.dumps(values))
    before = len(opened)
    wanted = clm.load(source).params
    for _ in range(2):
        assert_same(clm.load(source, cache_dir=tmp_path / "cache").params, wanted)
    assert len(opened) == before + 2  # for what is wanted, and once for the cache
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not warnings


READ = [
    parameter_cache.FINGERPRINT_FILE,
    "params/_METADATA",
    "params/manifest.ocdbt",
]  # Orbax checks them


def damages(folder):
    """Every way to damage each file of a cache, and all at once."""
    for path in files(folder):
        content = path.read_bytes()
        yield path, None
        if content:
            yield path, content[:-2]  # more than a line's end
        if path.relative_to(folder).as_posix() in READ:
            yield path, bytes(len(content))  # as long as before


def test_torn_cache_is_made_again(tmp_path, source, opened, warnings):
    wanted = clm.load(source, cache_dir=tmp_path / "cache").params
    (kept,) = (tmp_path / "cache").iterdir()
    done = 0  # how many files there are may change each time
    while done < len(ways := list(damages(kept))):
        path, content = ways[done]
        done += 1
        path.unlink() if content is None else path.write_bytes(content)
        opened.clear(), warnings.clear()
        assert_same(clm.load(source, cache_dir=tmp_path / "cache").params, wanted)
        assert len(opened) == 1, path
        assert len(warnings) == 1, path
        assert f"{kept} cannot be used and is made again" in warnings[0]
        assert "\n" not in warnings[0]
        assert list((tmp_path / "cache").iterdir()) == [kept]
    assert done > 10
    clm.load(source, cache_dir=tmp_path / "cache")
    assert len(opened) == 1


def test_empty_folder_in_the_place_of_a_cache(tmp_path, source, warnings):
    clm.load(source, cache_dir=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    for path in files(kept):
        path.unlink()
    assert_same(
        clm.load(source, cache_dir=tmp_path / "cache").params, clm.load(source).params
    )
    assert len(warnings) == 1


def test_file_of_another_length_is_not_read(tmp_path, source, warnings, monkeypatch):
    """Orbax would fill what is missing with zeros, so it is not asked."""
    clm.load(source, cache_dir=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    largest = max(files(kept), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    monkeypatch.setattr(
        parameter_cache,
        "_restore_params",
        lambda *_: pytest.fail("a torn cache was read"),
    )
    clm.load(source, cache_dir=tmp_path / "cache")
    assert "not of their size" in warnings[0]


# --- Writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "file/cache", "x" * 300])
def test_folder_that_cannot_be_written(tmp_path, source, opened, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(clm.InputError, match="cannot write to") as refused:
        clm.load(source, cache_dir=tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)
    assert not opened  # it is known before the work is done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED:\nfull")],
)
def test_failure_to_write_leaves_nothing(tmp_path, source, monkeypatch, error):
    import orbax.checkpoint

    def fail(self, folder, *arguments, **more):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise error

    monkeypatch.setattr(orbax.checkpoint.Checkpointer, "save", fail)
    with pytest.raises(
        clm.InputError, match=r"cannot write to .*(No space left|RESOURCE)"
    ) as full:
        clm.load(source, cache_dir=tmp_path / "cache")
    assert "\n" not in str(full.value)
    assert not list((tmp_path / "cache").iterdir())


def python(program, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


RACE_PROGRAM = """
import sys
import orbax.checkpoint
import continuous_lm as clm
from tests.models.checkpoints.test_parameter_cache import assert_same

wanted = clm.load(sys.argv[1]).params
print("ready", flush=True)
for line in sys.stdin:
    assert_same(clm.load(sys.argv[1], cache_dir=sys.argv[2]).params, wanted)
    print("done", flush=True)
"""


def test_processes_that_write_at_once_do_not_break_one_another(tmp_path, source):
    processes = [python(RACE_PROGRAM, source, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for i in range(3):
        os.utime(
            source / "model.safetensors", ns=(i, i)
        )  # so that what is there is stale
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout.readline() == "done\n"
        assert len(list((tmp_path / "cache").iterdir())) == 1
    for process in processes:
        process.communicate()
        assert process.returncode == 0


# --- Devices ---------------------------------------------------------------------------------

MESH_PROGRAM = """
import pathlib, sys
import jax
import continuous_lm as clm
from continuous_lm.io import safetensors_files
from tests.models.checkpoints.test_parameter_cache import assert_same

mesh = jax.make_mesh((2, 4), ("data", "model"))
source, folder = sys.argv[1:]
one, many = clm.load(source), clm.load(source, mesh=mesh)
for i, (first, second) in enumerate([(None, mesh), (mesh, None), (mesh, mesh)]):
    clm.load(source, mesh=first, cache_dir=f"{folder}/{i}")
    plain = safetensors_files.open_tensors
    del safetensors_files.open_tensors  # nothing may be read from the source
    found = clm.load(source, mesh=second, cache_dir=f"{folder}/{i}")
    safetensors_files.open_tensors = plain
    assert_same(found.params, one.params)
    wanted = one if second is None else many
    for x, y in zip(*map(jax.tree.leaves, (found.params, wanted.params)), strict=True):
        assert x.sharding == y.sharding, (x.sharding, y.sharding)
        assert x.committed == y.committed
"""


def test_written_and_read_on_other_devices(tmp_path, source):
    flag = "--xla_force_host_platform_device_count=8"
    process = python(MESH_PROGRAM, source, tmp_path / "cache", XLA_FLAGS=flag)
    process.communicate()
    assert process.returncode == 0


def test_orbax_is_imported_only_for_a_cache():
    program = "import sys; import continuous_lm as clm; clm.load('apples'); print(*sys.modules)"
    out, _ = python(program).communicate()
    assert "continuous_lm" in out.split()
    assert not [name for name in out.split() if name.startswith("orbax")]


def test_programs_take_the_flag(tmp_path):
    arguments = [f"--cache_dir={tmp_path / 'cache'}"]
    lm, _ = pretrained.load(program.parse(counting.Config, "counting", arguments))
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("apples-")
    assert_same(lm.params, clm.load("apples", dtype="float32").params)
