"""Folders that are whole, and every way in which one that came from elsewhere can be wrong."""

import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.io import safetensors_files
from tests.fixtures import tiny

WEIGHTS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array([1.5], np.float16),
    "d": np.array([[2.5]], np.float64),
}


@pytest.fixture
def folder(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / safetensors_files.WEIGHTS_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    tiny.write_shards(tmp_path, WEIGHTS, num_shards=2)
    return tmp_path


def read_all(folder):
    tensors = safetensors_files.open_tensors(folder)
    for name in tensors.names:
        assert tensors.shape(name) == tensors[name].shape
        assert tensors.path(name).parent == folder
        assert name in safetensors.numpy.load_file(tensors.path(name))
    return {name: tensors[name] for name in tensors.names}


def refusal(folder):
    """The one line with which the folder is refused."""
    with pytest.raises(clm.InputError) as refused:
        read_all(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def set_index(folder, **places):
    path = folder / safetensors_files.INDEX_FILE
    index = json.loads(path.read_text())
    index["weight_map"] |= places
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_tensors_are_read_as_they_were_stored(layout, request):
    tensors = read_all(request.getfixturevalue(layout))
    assert set(tensors) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        assert tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(tensors[name], value)


def test_tensors_are_memory_maps_of_the_file(folder):
    tensors = safetensors_files.open_tensors(folder)
    first, second = tensors["a"], tensors["a"]
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    del tensors, second
    (folder / safetensors_files.WEIGHTS_FILE).unlink()
    np.testing.assert_array_equal(first, WEIGHTS["a"])  # it outlives the file


@pytest.mark.parametrize("shift", range(8))
def test_tensors_need_not_be_aligned(tmp_path, shift):
    """Older writers left the header's length as it was."""
    entry = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
    header = json.dumps({"b": entry, "__metadata__": {"format": "pt"}}).encode()
    header += b" " * shift
    content = struct.pack("<Q", len(header)) + header + WEIGHTS["b"].tobytes()
    (tmp_path / safetensors_files.WEIGHTS_FILE).write_bytes(content)
    tensor = read_all(tmp_path)["b"]
    wide = np.empty((2, 2), np.float32)
    np.copyto(wide, tensor.T, casting="unsafe")
    np.testing.assert_array_equal(wide, [[0, 2], [1, 3]])


def test_file_without_tensors(tmp_path):
    safetensors.numpy.save_file({}, tmp_path / safetensors_files.WEIGHTS_FILE)
    assert read_all(tmp_path) == {}


# --- Written files ---------------------------------------------------------------------------

MANY = {
    f"t{i}": np.full((i + 1, 3), i, np.float32) for i in range(4)
}  # 12, 24, 36, 48 bytes
MANY["scalar"] = np.array(7, np.float32)


def save(folder, tensors, **arguments):
    """Write tensors of one dtype; return their names in the order of the calls."""
    names = []

    def tensor(name):
        names.append(name)
        return tensors[name]

    shapes = {name: value.shape for name, value in tensors.items()}
    (dtype,) = {value.dtype for value in tensors.values()}
    safetensors_files.save_tensors(folder, shapes, dtype, tensor, **arguments)
    return names


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
)
def test_written_files_are_read_by_safetensors(tmp_path, dtype):
    tensors = {name: value.T.astype(dtype) for name, value in MANY.items()}
    assert save(tmp_path, tensors) == list(tensors)
    path = tmp_path / safetensors_files.WEIGHTS_FILE
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {
            "format": "pt"
        }  # transformers refuses a file without it
    for loaded in (safetensors.numpy.load_file(path), read_all(tmp_path)):
        assert loaded.keys() == tensors.keys()
        for name, value in tensors.items():
            assert loaded[name].dtype == dtype
            np.testing.assert_array_equal(loaded[name], value)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0  # so that the tensors are aligned


@pytest.mark.parametrize(
    ("shard_size", "shards"),
    [
        (124, ["t0 t1 t2 t3 scalar"]),
        (123, ["t0 t1 t2 t3", "scalar"]),
        (72, ["t0 t1 t2", "t3 scalar"]),
        (71, ["t0 t1", "t2", "t3 scalar"]),
        (1, ["t0", "t1", "t2", "t3", "scalar"]),
    ],
)
def test_shards_are_no_larger_than_they_may(tmp_path, shard_size, shards):
    assert save(tmp_path, MANY, shard_size=shard_size) == list(MANY)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    held = [set(safetensors.numpy.load_file(tmp_path / file)) for file in files]
    assert held == [set(names.split()) for names in shards]
    loaded = read_all(tmp_path)
    assert loaded.keys() == MANY.keys()
    for name, value in MANY.items():
        np.testing.assert_array_equal(loaded[name], value)
    if len(shards) == 1:
        assert files == ["model.safetensors"]
        assert not (tmp_path / safetensors_files.INDEX_FILE).exists()
        return
    n = len(shards)
    assert files == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    index = json.loads((tmp_path / safetensors_files.INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 124}
    assert index["weight_map"] == {
        name: file
        for file, names in zip(files, shards, strict=True)
        for name in names.split()
    }


@pytest.mark.parametrize("shard_size", [0, -1, 2.5, "5GB", True, None])
def test_shard_size_that_is_no_number_of_bytes(tmp_path, shard_size):
    with pytest.raises(clm.InputError, match=r"shard_size is .* number of bytes"):
        save(tmp_path, MANY, shard_size=shard_size)
    assert not list(tmp_path.iterdir())


def test_dtypes_that_no_file_has_are_refused(tmp_path):
    with pytest.raises(clm.InputError, match="complex64"):
        save(tmp_path, {"a": np.ones(2, np.complex64)})


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00003.safetensors", True),
        ("model.safetensors.index.json", True),
        ("mymodel.safetensors", False),
        ("model.safetensors.bak", False),
        ("model-of-mine.safetensors", False),
        ("tokenizer.json", False),
    ],
)
def test_files_that_a_new_checkpoint_replaces(name, ours):
    assert bool(safetensors_files.CHECKPOINT_FILES.fullmatch(name)) == ours


def test_empty_folders_are_refused(tmp_path):
    assert "neither model.safetensors nor" in refusal(tmp_path)


# --- Malformed files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"]
)
def test_pickles_are_named_and_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    message = refusal(tmp_path)
    assert f"{tmp_path / name} is a pickle" in message
    assert "convert the checkpoint to safetensors" in message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_under_another_name(tmp_path, protocol):
    (tmp_path / safetensors_files.WEIGHTS_FILE).write_bytes(
        pickle.dumps(Bomb(), protocol=protocol)
    )
    assert "model.safetensors is a pickle" in refusal(tmp_path)


@pytest.mark.parametrize("length", [0x280, 0x480, 0x580])
def test_header_whose_length_looks_like_the_start_of_a_pickle(tmp_path, length):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    content = struct.pack("<Q", length) + header.ljust(length).encode() + bytes(8)
    assert content[:1] == b"\x80"
    (tmp_path / safetensors_files.WEIGHTS_FILE).write_bytes(content)
    np.testing.assert_array_equal(read_all(tmp_path)["a"], [0, 0])


def test_torch_archive_under_another_name(tmp_path):
    with zipfile.ZipFile(
        tmp_path / safetensors_files.WEIGHTS_FILE, "w"
    ) as archive:  # as torch.save writes
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(), protocol=2))
    assert "model.safetensors is a pickle" in refusal(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_file_cut_anywhere(folder, data):
    path = folder / safetensors_files.WEIGHTS_FILE
    content = safetensors.numpy.save(WEIGHTS)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert "model.safetensors is not a whole safetensors file" in refusal(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64))
def test_file_of_any_bytes(tmp_path, noise):
    (tmp_path / safetensors_files.WEIGHTS_FILE).write_bytes(noise)
    assert "model.safetensors is" in refusal(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}},
        {"a": {"dtype": "WHAT", "shape": [2], "data_offsets": [0, 8]}},
        {"a": 1},
        [],
    ],
)
def test_headers_that_contradict_the_data_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(8)
    (tmp_path / safetensors_files.WEIGHTS_FILE).write_bytes(content)
    assert "model.safetensors is not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.int64, np.uint8, np.bool_, ml_dtypes.float8_e4m3fn]
)
def test_quantized_tensor(tmp_path, dtype):
    safetensors.numpy.save_file(
        {"a": np.ones(2, dtype)}, tmp_path / safetensors_files.WEIGHTS_FILE
    )
    message = refusal(tmp_path)
    assert "tensor a is stored as" in message
    assert "BF16" in message


def test_weights_that_are_a_folder(tmp_path):
    (tmp_path / safetensors_files.WEIGHTS_FILE).mkdir()
    assert "model.safetensors cannot be read: Is a directory" in refusal(tmp_path)


# --- Shards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x",
        ".",
        "..",
        "",
        None,
        3,
        [],
    ],
)
def test_shard_outside_of_the_folder(sharded, place):
    (sharded / "sub").mkdir()
    for outside in (
        sharded.parent / "x.safetensors",
        sharded / "sub" / "x.safetensors",
    ):
        safetensors.numpy.save_file(WEIGHTS, outside)
    set_index(sharded, a=place)
    assert f"puts tensor a into {place!r}, not a file of this folder" in refusal(
        sharded
    )


@pytest.mark.parametrize(
    "place", ["nothing.safetensors", "x" * 300, "nul\0byte", "\ud800"]
)
def test_shard_that_is_not_there(sharded, place):
    set_index(sharded, a=place)
    message = refusal(sharded)
    assert place[:2] in message or ascii(place)[1:4] in message


def test_shard_that_is_a_pickle(sharded):
    (sharded / "pytorch_model-00001.bin").write_bytes(pickle.dumps(Bomb()))
    set_index(sharded, a="pytorch_model-00001.bin")
    assert "pytorch_model-00001.bin is a pickle" in refusal(sharded)


def test_shard_that_is_cut(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model-00002-of-00002.safetensors is not a whole" in refusal(sharded)


def test_missing_tensors_of_the_index_are_named(sharded):
    set_index(sharded, e="model-00001-of-00002.safetensors")
    assert "tensor e is in model-00001-of-00002.safetensors, but it is not" in refusal(
        sharded
    )


def test_tensor_in_two_shards(sharded):
    safetensors.numpy.save_file(WEIGHTS, sharded / "model-00002-of-00002.safetensors")
    message = refusal(sharded)
    assert "is both in" in message
    assert "model-00001-of-00002.safetensors" in message
    assert "model-00002-of-00002.safetensors" in message


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}']
)
def test_index_without_a_map(tmp_path, text):
    (tmp_path / safetensors_files.INDEX_FILE).write_text(text)
    assert safetensors_files.INDEX_FILE in refusal(tmp_path)


def test_a_single_file_takes_precedence_over_an_index(folder):
    (folder / safetensors_files.INDEX_FILE).write_text("of an older export")
    assert set(read_all(folder)) == set(WEIGHTS)
