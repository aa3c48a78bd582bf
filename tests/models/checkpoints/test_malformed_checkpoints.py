"""Malformed checkpoints of every family, made from a good one by rules.

Each ends in one `InputError` whose single line names the field, the tensor or the file; nothing
much is allocated, and no file is left behind. Where a change may succeed, the test says what it
then has to mean.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.transformer import parameter_table
from tests.fixtures import tiny

FAMILIES = list(tiny.CONFIG_MAKERS)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SLACK = 8_000_000  # bytes beside the file's own, for tracing shapes and for messages

fields_of_config = {field.name for field in dataclasses.fields(clm.TransformerConfig)}


# --- Good ones -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Good:
    """A whole checkpoint, in memory too."""

    folder: pathlib.Path
    fields: Mapping[str, Any]  # of config.json
    tensors: Mapping[str, np.ndarray]
    content: bytes  # of the weights' file
    lm: clm.LanguageModel


def parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and its data, read without the library."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def compose(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file, whatever the header says; its length too, if it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


KINDS = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


def tensors_in(content: bytes) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, read without the library."""
    header, data = parse(content)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(data[begin:end], KINDS[entry["dtype"]])
        found[name] = values.reshape(entry["shape"])
    return found


def written(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The tensors as a safetensors file, written without the library."""
    names = {np.dtype(dtype): kind for kind, dtype in {**KINDS, "I8": np.int8}.items()}
    header, data = {}, b""
    for name, values in tensors.items():
        offsets = [len(data), len(data) + values.nbytes]
        kind = names[values.dtype]
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": offsets}
        data += values.tobytes()
    return compose(header, data)


def make(family: str, folder: pathlib.Path) -> Good:
    """Random weights for the tiny config, saved by `clm.save`, which needs no transformers."""
    fields = {
        "model_type": family,
        "torch_dtype": "float32",
        **tiny.CONFIG_MAKERS[family](),
    }
    config = trunk.read_config(fields)
    rng = np.random.default_rng(0)
    params = {
        path: rng.standard_normal(declaration.shape, np.float32)
        for path, declaration in parameter_table(config).items()
    }
    lm = clm.LanguageModel(
        clm.Transformer(config), traverse_util.unflatten_dict(params, sep="/")
    )
    clm.save(folder, lm)
    (folder / "config.json").write_text(json.dumps(fields))
    content = (folder / WEIGHTS).read_bytes()
    return Good(folder, fields, tensors_in(content), content, clm.load(folder))


@pytest.fixture(scope="module")
def good(request, tmp_path_factory):
    """The good checkpoint of a family."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


every_family = pytest.mark.parametrize("good", FAMILIES, indirect=True, ids=str)
# For rules that know nothing of families, three that differ most stand for all in the quick run.
each_in_time = pytest.mark.parametrize(
    "good",
    [
        family
        if family in ("llama", "phi3", "gpt2")
        else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ],
    indirect=True,
    ids=FAMILIES,
)


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good.folder, tmp_path / "model")


# --- What must hold --------------------------------------------------------------------------


def tree(folder: pathlib.Path) -> dict[pathlib.Path, tuple[int, int]]:
    """Every path below, with what would show that it was written, were it a file."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[path] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found


@contextlib.contextmanager
def little_memory(most: float) -> Iterator[None]:
    """Fails where the body allocates more than `most` bytes; in no case can it take the machine."""
    old = None
    if sys.platform == "linux":
        import resource

        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        old = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + 300_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, old[1]))
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        if old is not None:
            resource.setrlimit(resource.RLIMIT_AS, old)
    assert peak <= most, f"{peak} bytes were allocated"


def attempt(folder: pathlib.Path, call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `call` gives and None, or None and the one line with which it refuses.

    Any other exception goes through. Nothing below `folder` may change.
    """
    before = tree(folder)
    found, message = None, None
    with little_memory(sum(size for size, _ in before.values()) + SLACK):
        try:
            found = call()
        except clm.InputError as error:
            message = str(error)
    assert tree(folder) == before
    if message is not None:
        assert message.isprintable(), message  # one line, and no terminal's escapes
        assert len(message) < 1000
    return found, message


def refusal(folder: pathlib.Path, call: Callable[[], Any] | None = None) -> str:
    found, message = attempt(folder.parent, call or (lambda: clm.load(folder)))
    assert message is not None, f"it was accepted: {type(found)}"
    return message


def assert_same_tree(found, wanted):
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(wanted), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


# --- Tensors ---------------------------------------------------------------------------------

# Rule -> (name, values) -> other tensors that take the place of this one, and what the message says
# of it; {name} is the tensor's, {shape} and {wrong} are shapes.
TENSOR_RULES: dict[
    str, tuple[Callable[[str, np.ndarray], dict[str, np.ndarray]], str]
] = {
    "dropped": (lambda n, t: {}, r"tensor {name} \[.*\] is missing"),
    "renamed": (lambda n, t: {n + "_": t}, r"tensor {name} \[.*\] is missing"),
    "upper case": (lambda n, t: {n.upper(): t}, r"tensor {name} \[.*\] is missing"),
    "twice": (lambda n, t: {n: t, n + ".2": t}, r"tensor {name}\.2 .*left over"),
    "of a layer too many": (
        lambda n, t: {n: t, deeper(n): t},
        r"tensor {deeper} .*(left over|no place)",
    ),
    "a row short": (
        lambda n, t: {n: t[:-1]},
        "tensor {name} .*shape {wrong}.*asks for {shape}",
    ),
    "a row long": (
        lambda n, t: {n: np.resize(t, longer(t))},
        "tensor {name} .*shape {wrong}",
    ),
    "of one axis more": (lambda n, t: {n: t[None]}, "tensor {name} .*shape {wrong}"),
    "flat": (lambda n, t: {n: t.reshape(t.size, 1)}, "tensor {name} .*shape {wrong}"),
    "a scalar": (lambda n, t: {n: t.reshape(-1)[0]}, "tensor {name} .*shape {wrong}"),
    "empty": (lambda n, t: {n: t[:0]}, "tensor {name} .*shape {wrong}"),
    "of 8 bits": (lambda n, t: {n: t.astype(np.int8)}, "tensor {name} is stored as I8"),
}


def deeper(name: str) -> str:
    """The same of layer 3, of which there is none; something made up where there are no layers."""
    return (
        re.sub(r"\.\d+\.", ".3.", name) if re.search(r"\.\d+\.", name) else name + ".3"
    )


def longer(values: np.ndarray) -> tuple[int, ...]:
    return (values.shape[0] + 1, *values.shape[1:])


def names_once(tensors: Mapping[str, Any]) -> list[str]:
    """Every tensor, those of the middle layer instead of all."""
    return [n for n in tensors if not re.search(r"\.\d+\.", n) or ".1." in n]


@every_family
@pytest.mark.parametrize("rule", TENSOR_RULES)
def test_tensor(good, folder, rule):
    change, culprit = TENSOR_RULES[rule]
    for name in names_once(good.tensors):
        values = good.tensors[name]
        changed = {n: t for n, t in good.tensors.items() if n != name} | change(
            name, values
        )
        (folder / WEIGHTS).write_bytes(written(changed))
        wrong = changed[name].shape if name in changed else ()
        wanted = culprit.format(
            name=re.escape(name),
            deeper=re.escape(deeper(name)),
            shape=re.escape(str(list(values.shape))),
            wrong=re.escape(str(list(wrong))),
        )
        assert re.search(wanted, refusal(folder)), (name, refusal(folder))


SIZES = {
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U32": 4,
    "I64": 8,
}


@every_family
@pytest.mark.parametrize("kind", SIZES)
def test_tensor_of_another_type(good, folder, kind):
    for name in names_once(good.tensors):
        header, data = parse(good.content)
        begin, end = header[name]["data_offsets"]
        header[name]["dtype"] = kind
        shift = SIZES[kind] * good.tensors[name].size - (end - begin)
        for other, entry in header.items():
            if other != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [
                    offset + shift for offset in entry["data_offsets"]
                ]
        header[name]["data_offsets"] = [begin, end + shift]
        data = data[:begin] + bytes(end + shift - begin) + data[end:]
        (folder / WEIGHTS).write_bytes(compose(header, data))
        assert f"tensor {name} is stored as {kind}" in refusal(folder)


UNPRINTABLE = ["x\ny", "x\x1b[31m", "x\u2028y", "model.\u202e"]


@every_family
@pytest.mark.parametrize("name", ["x" * 300, "", *UNPRINTABLE])
def test_name_that_is_no_name(good, folder, name):
    """A tensor or a field of such a name is refused in one line all the same."""
    (folder / WEIGHTS).write_bytes(
        written({**good.tensors, name: np.zeros(1, np.float32)})
    )
    assert re.search(r"tensor .*left over", refusal(folder))
    shutil.copy(good.folder / WEIGHTS, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({**good.fields, name: 1}))
    assert re.search(r"config\.json: field .*not handled", refusal(folder))


# --- Headers and files -----------------------------------------------------------------------


def edited(
    change: Callable[[dict[str, Any], str], Any],
) -> Callable[[bytes, str], bytes]:
    """The file with its header changed, in place or by what `change` returns."""

    def damage(content: bytes, name: str) -> bytes:
        header, data = parse(content)
        return compose(change(header, name) or header, data)

    return damage


def entry(**changes: Any) -> Callable[[bytes, str], bytes]:
    return edited(lambda header, name: header[name].update(changes))


def offsets(begin: int = 0, end: int = 0) -> Callable[[bytes, str], bytes]:
    def change(header, name):
        old = header[name]["data_offsets"]
        header[name]["data_offsets"] = [old[0] + begin, old[1] + end]

    return edited(change)


def without(field: str) -> Callable[[bytes, str], bytes]:
    return edited(lambda header, name: header[name].pop(field) and None)


def length(value: int) -> Callable[[bytes, str], bytes]:
    return lambda content, name: struct.pack("<Q", value) + content[8:]


def text(value: bytes) -> Callable[[bytes, str], bytes]:
    return lambda content, name: compose(value, parse(content)[1])


def cut(keep: float, less: int = 0) -> Callable[[bytes, str], bytes]:
    return lambda content, name: content[: int(len(content) * keep) - less]


def twice(content: bytes, name: str) -> bytes:
    """A name that is there twice, first with the place of another tensor."""
    header, data = parse(content)
    other = next(n for n in header if n not in (name, "__metadata__"))
    first = json.dumps({name: header[other]})[:-1] + ", "
    return compose((first + json.dumps(header)[1:]).encode(), data)


def zipped(content: bytes, name: str) -> bytes:
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(), protocol=2))
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


HUGE = 2**63 - 1
FILES: dict[
    str, Callable[[bytes, str], bytes]
] = {  # each is called with a tensor's name too
    "empty": lambda content, name: b"",
    "one byte": lambda content, name: content[:1],
    "no header": lambda content, name: content[:8],
    "header alone": lambda content, name: content[: -len(parse(content)[1])],
    "cut in the header": cut(0, -100),
    "cut in the middle": cut(0.5),
    "cut by one byte": cut(1.0, 1),
    "longer by one byte": lambda content, name: content + b"\0",
    "length 0": length(0),
    "length of one less": lambda content, name: length(len(content) - 1)(content, name),
    "length to the end": lambda content, name: length(len(content) - 8)(content, name),
    "length beyond the end": lambda content, name: length(len(content))(content, name),
    "length huge": length(HUGE),
    "length negative": length(2**64 - 1),
    "length of 100 MB": length(100_000_001),
    "header not JSON": text(b"{'a': 1}"),
    "header a list": text(b"[]"),
    "header a number": text(b"3"),
    "header null": text(b"null"),
    "header of no text": text(b"\xff\xfe{}"),
    "header nested": text(b"[" * 5000),
    "header nested in an entry": text(b'{"a":' * 5000),
    "header without an end": text(b'{"a": {"dtype": "F32"'),
    "header empty": text(b"{}"),
    "header of spaces": text(b" " * 100),
    "name twice": twice,
    "entry a number": edited(lambda header, name: header.update({name: 1})),
    "entry null": edited(lambda header, name: header.update({name: None})),
    "entry a list": edited(lambda header, name: header.update({name: [1]})),
    "entry empty": edited(lambda header, name: header.update({name: {}})),
    "no dtype": without("dtype"),
    "no shape": without("shape"),
    "no offsets": without("data_offsets"),
    "dtype made up": entry(dtype="F32X"),
    "dtype a number": entry(dtype=32),
    "dtype null": entry(dtype=None),
    "dtype twice as wide": entry(dtype="F64"),
    "dtype half as wide": entry(dtype="F16"),
    "shape negative": entry(shape=[-1, -48]),
    "shape huge": entry(shape=[HUGE]),
    "shape that overflows": entry(shape=[2**32, 2**32]),
    "shape that overflows to its size": entry(shape=[2**62, 4, 48]),
    "shape beyond 64 bits": entry(shape=[10**30]),
    "shape of fractions": entry(shape=[1.5]),
    "shape of strings": entry(shape=["48"]),
    "shape a number": entry(shape=48),
    "shape null": entry(shape=None),
    "shape of many axes": entry(shape=[1] * 5000),
    "offsets that overlap": offsets(begin=-4),
    "offsets with a hole": offsets(begin=4),
    "offsets one byte on": offsets(begin=1, end=1),
    "offsets in turn": edited(
        lambda header, name: header[name]["data_offsets"].reverse()
    ),
    "offsets huge": entry(data_offsets=[0, HUGE]),
    "offsets beyond the end": entry(data_offsets=[HUGE - 4, HUGE]),
    "offsets negative": entry(data_offsets=[-4, 0]),
    "offsets beyond 64 bits": entry(data_offsets=[0, 10**30]),
    "offsets of one": entry(data_offsets=[0]),
    "offsets of three": entry(data_offsets=[0, 4, 8]),
    "offsets null": entry(data_offsets=None),
    "metadata a list": edited(lambda header, name: header.update(__metadata__=[])),
    "metadata of numbers": edited(
        lambda header, name: header.update(__metadata__={"a": 1})
    ),
    "pickle": lambda content, name: pickle.dumps(Bomb(), protocol=2),
    "new pickle": lambda content, name: pickle.dumps(Bomb(), protocol=5),
    "zip": zipped,
    "text": lambda content, name: (
        b"version https://git-lfs.github.com/spec/v1\nsize 9\n"
    ),
    "zeros": lambda content, name: bytes(len(content)),
    "other bytes": lambda content, name: bytes(range(256)) * 40,
    "big-endian": lambda content, name: content[7::-1] + content[8:],
}


@each_in_time
@pytest.mark.parametrize("case", FILES)
def test_file(good, folder, case):
    name = names_once(good.tensors)[-1]
    (folder / WEIGHTS).write_bytes(FILES[case](good.content, name))
    message = refusal(folder)
    assert WEIGHTS in message or f"tensor {name}" in message, message
    assert str(folder) in message, message


# --- Folders ---------------------------------------------------------------------------------


def replaced(
    name: str, by: Callable[[pathlib.Path], Any]
) -> Callable[[pathlib.Path], None]:
    def damage(folder: pathlib.Path) -> None:
        (folder / name).unlink()
        by(folder / name)

    return damage


def sharded(name: str, place: Any) -> Callable[[pathlib.Path], None]:
    """Two shards, and an index that puts the first tensor elsewhere."""

    def damage(folder: pathlib.Path) -> None:
        tensors = tensors_in((folder / WEIGHTS).read_bytes())
        shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
        tiny.write_shards(folder, tensors, 2)
        (folder / "folder.safetensors").mkdir()
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        (folder / "leads.safetensors").symlink_to("nowhere")
        (folder / "text.safetensors").write_text("nothing")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name or sorted(tensors)[0]] = place
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def index(value: str) -> Callable[[pathlib.Path], None]:
    return replaced(WEIGHTS, lambda path: (path.parent / INDEX).write_text(value))


NO_FILE = {  # what stands in a file's place; the message names the file
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a folder": lambda path: path.symlink_to("."),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "a list": lambda path: path.write_text("[1]"),
    "a string": lambda path: path.write_text('"llama"'),
    "null": lambda path: path.write_text("null"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "nested objects": lambda path: path.write_text('{"a":' * 100_000),
    "with a BOM": lambda path: path.write_bytes(b"\xef\xbb\xbf{}"),
    "in UTF-16": lambda path: path.write_text("{}", encoding="utf-16"),
    "with NaN": lambda path: path.write_text('{"a": NaN}'),
    "with infinity": lambda path: path.write_text('{"a": -Infinity}'),
    "with a number of 10000 digits": lambda path: path.write_text(
        '{"a": 1' + "0" * 10_000 + "}"
    ),
    "with a rest": lambda path: path.write_text("{} {}"),
    "an object without anything": lambda path: path.write_text("{}"),
}
FOLDERS: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    **{
        f"{name} {case}": (
            replaced(name, by),
            re.escape(name) if case != "missing" else "",
        )
        for name in ("config.json", WEIGHTS)
        for case, by in NO_FILE.items()
    },
    **{
        f"index {case}": (
            replaced(WEIGHTS, lambda path, by=by: by(path.with_name(INDEX))),
            re.escape(WEIGHTS),
        )
        for case, by in NO_FILE.items()
    },
    "index that is empty": (index('{"weight_map": {}}'), "weight_map"),
    "index of a list": (index('{"weight_map": []}'), "weight_map"),
    "index of null": (index('{"weight_map": null}'), "weight_map"),
    "index of lists": (sharded("", ["a"]), r"\['a'\]"),
    "shard of null": (sharded("", None), "None"),
    "shard of a number": (sharded("", 3), "3"),
    "shard outside": (sharded("", "../outside.safetensors"), "outside.safetensors"),
    "shard at the root": (sharded("", "/etc/passwd"), "/etc/passwd"),
    "shard of the folder": (sharded("", "."), r"'\.'"),
    "shard missing": (sharded("", "none.safetensors"), r"none\.safetensors is missing"),
    "shard a folder": (
        sharded("", "folder.safetensors"),
        r"folder\.safetensors cannot be read",
    ),
    "shard a loop": (
        sharded("", "loop.safetensors"),
        r"loop\.safetensors cannot be read",
    ),
    "shard nowhere": (
        sharded("", "leads.safetensors"),
        r"leads\.safetensors is missing",
    ),
    "shard of text": (
        sharded("", "text.safetensors"),
        r"text\.safetensors is not a whole",
    ),
    "shard with a zero byte": (sharded("", "a\0b"), "puts tensor .*a.*b"),
    "shard of two lines": (sharded("", "a\nb"), "a.*b"),
    "shard without an end": (sharded("", "x" * 300), "xxx"),
    "tensor that is nowhere": (
        sharded("x", "model-00001-of-00002.safetensors"),
        "tensor x",
    ),
    "tensor in the wrong shard": (
        sharded("", "model-00002-of-00002.safetensors"),
        "tensor .*00002",
    ),
}


@each_in_time
@pytest.mark.parametrize("case", FOLDERS)
def test_folder(good, folder, case):
    damage, culprit = FOLDERS[case]
    damage(folder)
    message = refusal(folder)
    assert re.search(culprit, message), message
    assert str(folder) in message, message


# --- Tokenizers ------------------------------------------------------------------------------

TOKENIZERS: dict[str, Callable[[pathlib.Path], Any]] = {
    **{case: by for case, by in NO_FILE.items() if case != "missing"},
    "cut": lambda path: path.write_text(tokenizer().to_str()[:-20]),
    "of another version": lambda path: change_tokenizer(path, version="9.0"),
    "without a model": lambda path: change_tokenizer(path, model=None),
    "of a model made up": lambda path: change_tokenizer(
        path, model={"type": "Made", "vocab": {}}
    ),
    "of a vocabulary that is a list": lambda path: change_vocab(path, ["a"]),
    "of negative tokens": lambda path: change_vocab(path, {"<unk>": 0, "a": -1}),
    "of fractional tokens": lambda path: change_vocab(path, {"<unk>": 0, "a": 0.5}),
    "of tokens beyond 32 bits": lambda path: change_vocab(
        path, {"<unk>": 0, "a": 2**40}
    ),
    "of a token beyond the vocabulary": lambda path: change_vocab(
        path, {"<unk>": 0, "a": 64}
    ),
    "of a token far beyond": lambda path: change_vocab(
        path, {"<unk>": 0, "a": 2**32 - 1}
    ),
    "larger than the model": lambda path: change_vocab(
        path, {f"t{i}": i for i in range(65)}
    ),
    "of added tokens that are none": lambda path: change_tokenizer(
        path, added_tokens=[1]
    ),
    "with a pre-tokenizer made up": lambda path: change_tokenizer(
        path, pre_tokenizer={"type": 1}
    ),
    "with a broken expression": lambda path: change_tokenizer(
        path, normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
}


def tokenizer():
    return tiny.word_tokenizer("an apple a day")


def change_tokenizer(path: pathlib.Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(tokenizer().to_str()) | changes))


def change_vocab(path: pathlib.Path, vocab: Any) -> None:
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    change_tokenizer(path, model=model, added_tokens=[], post_processor=None)


@each_in_time
@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(good, folder, case):
    TOKENIZERS[case](folder / "tokenizer.json")
    message = refusal(folder)
    assert "tokenizer.json" in message, message
    assert str(folder) in message, message


@every_family
def test_tokenizer_that_is_whole(good, folder):
    """Or the cases above would be refused for another reason than theirs."""
    tokenizer().save(str(folder / "tokenizer.json"))
    assert clm.load(folder).tokenizer.get_vocab_size() == 6


# --- Fields ----------------------------------------------------------------------------------

INERT = {"max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id"}
INERT |= {"eos_token_id"}
# What a field sets, where any positive number is a model.
NUMBERS = {
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "query_pre_attn_scalar": "query_width",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logits_softcap",
    "sliding_window": "window",
    "rope_theta": "rope",
}
# What a field sets, where there is no other way to see that it is wrong.
CHOICES = {
    **{name: {attribute} for name, attribute in NUMBERS.items()},
    "sliding_window": {"window", "window_pattern"},
    "rope_theta": {"rope"},
    "rope_local_base_freq": {"local_rope"},
    "partial_rotary_factor": {"rope"},
    "rotary_pct": {"rope"},
    "rotary_emb_base": {"rope"},
    "rope_scaling": {"rope"},
    "rope_parameters": {"rope", "local_rope"},
    "hidden_act": {"activation"},
    "hidden_activation": {"activation"},
    "activation_function": {"activation"},
    "use_parallel_residual": {"parallel"},
    "use_sliding_window": {"window", "window_pattern"},
    "max_window_layers": {"window", "window_pattern"},
    "layer_types": {"window", "window_pattern"},
    "sliding_window_pattern": {"window", "window_pattern"},
    "_sliding_window_pattern": {"window", "window_pattern"},
    "n_head": {"num_heads", "num_kv_heads", "head_dim"},
    "num_attention_heads": {"num_heads", "num_kv_heads", "head_dim"},
}
SYNONYMS = {
    "num_key_value_heads": "num_kv_heads",
    "torch_dtype": "dtype",
    "num_hidden_layers": "layer_types",  # which lists them
    "sliding_window": "layer_types",
}
# Fields that decide on tensors: it is a tensor that then does not fit.
SIZES_OF = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *(
        "attention_bias",
        "mlp_bias",
        "n_embd",
        "n_layer",
        "n_head",
        "n_positions",
        "n_inner",
    ),
}
WRONG: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        "x",
        "1",
        "NaN",
        "a\nb",
        "x" * 10_000,
        [],
        [1],
        [None],
        {},
        {"a": 1},
    ),
    *(0, -1, 1, 5, 65, 2**31 - 1, 2**31, 10**12, 2**64, 10**400, -(10**400)),
    *(-0.0, -2.5, 0.5, 48.0, 1e-300, 1e39, -1e300),
]


def named_in(message: str, field: str) -> bool:
    known = {field, SYNONYMS.get(field, field)}
    return any(re.search(rf"\b{re.escape(n)}\b", message) for n in known) or (
        field in SIZES_OF
        and re.search(r"tensor \S+ |head|embedding table", message) is not None
    )


def assert_refused_or_meant(
    good: Good, folder: pathlib.Path, changes: Mapping[str, Any]
) -> bool:
    """Loads with changed fields: refused, or only what these fields set has changed.

    Returns:
      whether it was refused.
    """
    (folder / "config.json").write_text(json.dumps({**good.fields, **changes}))
    lm, message = attempt(folder, lambda: clm.load(folder))
    if message is not None:
        assert str(folder) in message, message
        assert any(named_in(message, field) for field in changes), (changes, message)
        return True
    differ = {
        n
        for n in fields_of_config
        if getattr(lm.config, n) != getattr(good.lm.config, n)
    }
    allowed = set().union(*(CHOICES.get(field, set()) for field in changes))
    assert differ <= allowed, (changes, differ)
    if "num_heads" not in differ:  # which cuts fused tensors elsewhere
        assert_same_tree(lm.params, good.lm.params)
    for field, value in changes.items():
        if field in NUMBERS and differ and len(changes) == 1 and value is not None:
            found = getattr(lm.config, NUMBERS[field])
            assert getattr(found, "theta", found) == value, (field, value)
    return False


EXTRA = [
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "head_dim",
]


def all_fields(good: Good) -> list[str]:
    return sorted({*good.fields, *EXTRA} - INERT)


@each_in_time
def test_field(good, folder):
    """Every field with every wrong value; most of them are refused, for every field."""
    for field in all_fields(good):
        refused = [
            assert_refused_or_meant(good, folder, {field: value}) for value in WRONG
        ]
        assert sum(refused) > len(WRONG) // 2, field


TO_BE_HUGE = """vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads
    head_dim n_embd n_head n_positions""".split()


@every_family
@pytest.mark.parametrize("most", [2**31 - 1, 2**16])
def test_huge_sizes(good, folder, most):
    """All sizes at once: more elements than 64 bits count, and no memory."""
    huge = dict.fromkeys(TO_BE_HUGE, most) | {"head_dim": 2**16}
    huge |= {"num_hidden_layers": 1000, "n_layer": 1000}
    changes = {name: value for name, value in huge.items() if name in good.fields}
    (folder / "config.json").write_text(json.dumps({**good.fields, **changes}))
    assert re.search("tensor |divide|head|layer_types", refusal(folder))


@every_family
def test_field_taken_away(good, folder):
    for field in sorted(set(good.fields) - INERT):
        fields = {name: value for name, value in good.fields.items() if name != field}
        (folder / "config.json").write_text(json.dumps(fields))
        lm, message = attempt(folder, lambda: clm.load(folder))
        if message is not None:
            assert named_in(message, field), (field, message)
        else:
            assert_same_tree(lm.params, good.lm.params)


SCALINGS: dict[str, tuple[Any, str]] = {
    "dynamic": ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
    "dynamic, newer": ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, "'yarn'"),
    "ntk": ({"type": "ntk", "factor": 4.0}, "'ntk'"),
    "mrope": ({"type": "mrope", "mrope_section": [2, 2, 2]}, "'mrope'"),
    "proportional": ({"rope_type": "proportional"}, "'proportional'"),
    "of no type": ({"rope_type": 3}, "rope_type"),
    "of a long type": ({"rope_type": "y" * 10_000}, "yyy"),
    "of two types": (
        {"rope_type": "linear", "type": "llama3", "factor": 2.0},
        "rope_type",
    ),
    "linear without a factor": ({"type": "linear"}, "factor is missing"),
    "linear by zero": ({"type": "linear", "factor": 0}, "factor is 0"),
    "linear backwards": ({"type": "linear", "factor": -2.0}, "factor is -2"),
    "linear by text": ({"type": "linear", "factor": "2"}, "factor is '2'"),
    "linear by far": ({"type": "linear", "factor": 10**400}, "factor is 1000"),
    "linear and more": (
        {"type": "linear", "factor": 2.0, "beta_fast": 32},
        "beta_fast",
    ),
    "llama3 alone": ({"rope_type": "llama3"}, "factor is missing"),
    "llama3 crossed": (tiny.llama3_scaling(low_freq_factor=8.0), "high_freq_factor"),
    "llama3 of no length": (
        tiny.llama3_scaling(original_max_position_embeddings=0),
        "original",
    ),
    "longrope alone": (
        {"rope_type": "longrope"},
        "original_max_position_embeddings|factor",
    ),
    "longrope of one": (
        tiny.longrope_scaling(original_max_position_embeddings=1),
        "original_max_position_embeddings is 1",
    ),
    "longrope of text": (
        tiny.longrope_scaling(
            original_max_position_embeddings=20, short_factor=["1"] * 6
        ),
        "short_factor",
    ),
    "longrope of zeros": (
        tiny.longrope_scaling(original_max_position_embeddings=20, long_factor=[0] * 6),
        "long_factor",
    ),
    "longrope beyond floats": (
        tiny.longrope_scaling(
            original_max_position_embeddings=20, long_factor=[10**400] * 6
        ),
        "long_factor",
    ),
    "longrope of the wrong number": (
        tiny.longrope_scaling(
            original_max_position_embeddings=20, long_factor=[1.0] * 7
        ),
        "long_factor",
    ),
    "longrope, narrowed": (
        tiny.longrope_scaling(original_max_position_embeddings=20, attention_factor=0),
        "attention_factor",
    ),
    "a list": ([1], "is \\[1\\]"),
    "text": ("linear", "'linear'"),
    "flag": (True, "True"),
}


@every_family
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_scaling(good, folder, field):
    for case, (value, culprit) in SCALINGS.items():
        fields = {k: v for k, v in good.fields.items() if k != "rope_parameters"} | {
            field: value
        }
        (folder / "config.json").write_text(json.dumps(fields))
        message = refusal(folder)
        assert re.search(f"{culprit}|{field}", message), (case, message)
        assert "config.json" in message


ROTARY = [f for f in FAMILIES if f != "gpt2"]
# Which families, fields that contradict each other, and the names of both.
CONTRADICTIONS: dict[str, tuple[list[str], dict[str, Any], tuple[str, ...]]] = {
    "two bases": (
        [f for f in ROTARY if f != "gemma3_text"],
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}},
        ("rope_theta", "rope_parameters.rope_theta"),
    ),
    "two scalings": (
        [f for f in ROTARY if f != "gemma3_text"],
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {}},
        ("rope_scaling", "rope_parameters"),
    ),
    "two shares": (
        ["phi3", "gpt_neox"],
        {
            "partial_rotary_factor": 0.5,
            "rope_parameters": {"partial_rotary_factor": 1.0},
        },
        ("partial_rotary_factor",),
    ),
    "share by two names": (
        ["gpt_neox"],
        {"rotary_pct": 0.25, "partial_rotary_factor": 1.0},
        ("rotary_pct", "partial_rotary_factor"),
    ),
    "base by two names": (
        ["gpt_neox"],
        {"rotary_emb_base": 10000, "rope_theta": 20000},
        ("rotary_emb_base", "rope_theta"),
    ),
    "two lengths": (
        ["phi3"],
        {
            "original_max_position_embeddings": 20,
            "rope_scaling": tiny.longrope_scaling(original_max_position_embeddings=30),
        },
        ("original_max_position_embeddings",),
    ),
    "windows without leave": (
        ["qwen2", "qwen3"],
        {
            "use_sliding_window": False,
            "sliding_window": 3,
            "layer_types": ["sliding_attention"] * 3,
        },
        ("use_sliding_window", "layer_types"),
    ),
    "windows of no size": (
        ["gemma2", "gemma3_text", "qwen2", "qwen3"],
        {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
        ("sliding_window", "layer_types"),
    ),
    "leave without windows": (
        ["qwen2", "qwen3"],
        {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
        ("layer_types",),
    ),
    "patterns by two names": (
        ["gemma3_text"],
        {
            "sliding_window_pattern": 2,
            "_sliding_window_pattern": 3,
            "layer_types": None,
        },
        ("_sliding_window_pattern", "sliding_window_pattern"),
    ),
    "two windows": (["gemma2"], {"sliding_window_size": 4}, ("sliding_window_size",)),
    "heads that do not divide": (
        ["gpt_neox"],
        {"num_attention_heads": 7},
        ("num_attention_heads", "hidden_size"),
    ),
    "heads that do not divide, by other names": (
        ["gpt2"],
        {"n_head": 7},
        ("n_head", "n_embd"),
    ),
    "more heads than channels": (["gpt2"], {"n_head": 100}, ("n_head", "n_embd")),
    "heads that do not divide, without a width": (
        ["llama", "mistral", "phi3", "qwen2"],
        {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None},
        ("num_attention_heads", "hidden_size"),
    ),
    "groups that do not divide": (
        [f for f in FAMILIES if not f.startswith("gpt")],
        {"num_key_value_heads": 3},
        ("num_kv_heads 3",),
    ),
    "another family": (
        [
            f for f in FAMILIES if f not in ("llama", "mistral", "gemma")
        ],  # those could be Llamas
        {"model_type": "llama"},
        (),
    ),
    "quantized": (
        FAMILIES,
        {"quantization_config": {"bits": 4}},
        ("quantization_config",),
    ),
}


@every_family
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradiction(good, folder, case):
    families, changes, culprits = CONTRADICTIONS[case]
    if good.fields["model_type"] not in families:
        return
    (folder / "config.json").write_text(json.dumps({**good.fields, **changes}))
    message = refusal(folder)
    for culprit in culprits:
        assert culprit in message, message


# --- Random changes --------------------------------------------------------------------------

random_changes = settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbers = (
    st.integers()
    | st.integers(0, 100)
    | st.floats(allow_nan=False, allow_infinity=False)
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5) | st.sampled_from(WRONG),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@every_family
@random_changes
@given(data=st.data())
def test_random_fields(good, folder, data):
    """Up to three fields hold anything; huge sizes in several of them at once, too."""
    huge = st.sampled_from([2**31 - 1, 2**16, 10**9, 10_000])
    fields = st.sampled_from(all_fields(good))
    changes = data.draw(st.dictionaries(fields, values | huge, min_size=1, max_size=3))
    assert_refused_or_meant(good, folder, changes)


@every_family
@random_changes
@given(data=st.data())
def test_random_bytes_of_the_header(good, folder, data):
    """Refused, or the header still says the same of every tensor, and that is what is loaded."""
    size = len(good.content) - len(parse(good.content)[1])
    content = bytearray(good.content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, size - 1))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "digit"])):
            case "replace":
                content[place] = data.draw(st.integers(0, 255))
            case "insert":
                content.insert(place, data.draw(st.integers(0, 255)))
            case "delete":
                del content[place]
            case "digit":
                digits = [i for i in range(8, size) if chr(content[i]).isdigit()]
                content[data.draw(st.sampled_from(digits))] = data.draw(
                    st.integers(48, 57)
                )
    (folder / WEIGHTS).write_bytes(content)
    lm, message = attempt(folder, lambda: clm.load(folder))
    if message is not None:
        assert str(folder) in message
        assert WEIGHTS in message or "tensor " in message, message
        return
    found = tensors_in(bytes(content))
    assert found.keys() == good.tensors.keys()
    for name, values in good.tensors.items():
        assert found[name].shape == values.shape
        assert found[name].tobytes() == values.tobytes()
    assert_same_tree(lm.params, good.lm.params)


@every_family
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_bytes_of_the_weights(good, folder, tmp_path, data):
    """They are values like any other: what is loaded is, byte for byte, what the file holds."""
    size = len(good.content) - len(parse(good.content)[1])
    content = bytearray(good.content)
    for _ in range(3):
        place = data.draw(st.integers(size, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content)
    clm.save(tmp_path / "again", clm.load(folder))
    found = tensors_in((tmp_path / "again" / WEIGHTS).read_bytes())
    wanted = tensors_in(bytes(content))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name


@each_in_time
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@example(data=None)
def test_random_bytes_of_the_tokenizer(good, folder, data):
    """Refused, or a tokenizer none of whose tokens is beyond the model's."""
    content = bytearray(tokenizer().to_str().encode())
    if data is not None:
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
    (folder / "tokenizer.json").write_bytes(content)
    lm, message = attempt(folder, lambda: clm.load(folder))
    if message is not None:
        assert "tokenizer.json" in message
    else:
        special = lm.tokenizer.get_added_tokens_decoder()
        ids = set(lm.tokenizer.get_vocab().values()) - set(special)
        assert all(i < lm.config.vocab_size for i in ids)


# --- Arguments -------------------------------------------------------------------------------

DTYPES = [
    "int8",
    "int32",
    "bool",
    "x",
    "",
    "float8_e4m3fn",
    "complex64",
    "float64",
    3,
    [],
    {},
    "O",
]


@each_in_time
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(good, folder, dtype):
    assert "dtype" in refusal(folder, lambda: clm.load(folder, dtype=dtype))


PLACES: dict[str, Callable[[pathlib.Path], Any]] = {
    "a file": lambda folder: folder / "config.json",
    "below a file": lambda folder: folder / "config.json" / "model",
    "nowhere": lambda folder: folder / "nowhere",
    "empty": lambda folder: folder / "empty",
    "with a zero byte": lambda folder: "a\0b",
    "of two lines": lambda folder: "a\nb",
    "without an end": lambda folder: "x" * 300,
    "a surrogate": lambda folder: "\ud800",
    "no name": lambda folder: "",
}


@pytest.mark.parametrize("good", ["llama"], indirect=True)
@pytest.mark.parametrize("case", PLACES)
def test_place(good, folder, case, monkeypatch):
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    assert refusal(folder, lambda: clm.load(PLACES[case](folder)))


SAVES: dict[str, Callable[[pathlib.Path, clm.LanguageModel], Any]] = {
    "into a file": lambda folder, lm: clm.save(folder / "config.json", lm),
    "below a file": lambda folder, lm: clm.save(folder / "config.json" / "a" / "b", lm),
    "with a zero byte": lambda folder, lm: clm.save(folder / "a\0b", lm),
    "over a folder of the file's name": lambda folder, lm: clm.save(
        folder / "taken", lm
    ),
    "without an end": lambda folder, lm: clm.save(folder / ("x" * 300), lm),
    "without parameters": lambda folder, lm: clm.save(folder / "b", altered(lm, {})),
    "of other shapes": lambda folder, lm: clm.save(
        folder / "b",
        altered(lm, jax.tree.map(lambda x: np.asarray(x)[..., :1], lm.params)),
    ),
    "of integers": lambda folder, lm: clm.save(
        folder / "b",
        altered(lm, jax.tree.map(lambda x: np.asarray(x, np.int8), lm.params)),
    ),
}


def altered(lm: clm.LanguageModel, params: Any) -> clm.LanguageModel:
    return clm.LanguageModel(clm.Transformer(lm.config), params)


@each_in_time
@pytest.mark.parametrize("case", SAVES)
def test_save(good, folder, case):
    (folder / "taken" / WEIGHTS).mkdir(parents=True)
    assert refusal(folder, lambda: SAVES[case](folder, good.lm))


LONG = 10**6
ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": []}, "token"),
    "token beyond": ({"tokens": [1, 64]}, r"tokens\[1\] is 64"),
    "token below": ({"tokens": [-1]}, r"tokens\[0\] is -1"),
    "fractional tokens": ({"tokens": [0.5]}, "tokens has dtype"),
    "one token": ({"tokens": 1}, "token"),
    "narrow embeddings": (
        {"tokens": None, "embeddings": np.ones((3, 2))},
        "embeddings are 2 wide",
    ),
    "tokens and embeddings": (
        {"embeddings": np.ones((3, 48))},
        "either tokens or embeddings",
    ),
    "durations too few": ({"durations": [1.0]}, r"durations has shape \[1\]"),
    "durations too many": ({"durations": [1.0] * 4}, r"durations has shape \[4\]"),
    "duration that is NaN": (
        {"durations": [1.0, np.nan, 1.0]},
        r"durations\[1\] is nan",
    ),
    "duration below 0": ({"durations": [1.0, 1.0, -1.0]}, r"durations\[2\] is -1"),
    "first of no duration": ({"durations": [0.0, 1.0, 1.0]}, "durations"),
    "start that is NaN": ({"start": np.nan}, "start is nan"),
    "times and start": ({"times": [1.0, 2.0, 3.0], "start": 0.0}, "start"),
    "index beyond": ({"position": 3}, "position is 3"),
    "index below": ({"position": -4}, "position is -4"),
    "axes that do not fit": (
        {"tokens": np.ones((2, 3), int), "durations": np.ones((5, 3))},
        "do not broadcast",
    ),
}


@each_in_time
@pytest.mark.parametrize("case", ARGUMENTS)
def test_argument(good, folder, case):
    changes, culprit = ARGUMENTS[case]
    message = refusal(folder, lambda: good.lm(**{"tokens": [1, 2, 3], **changes}))
    assert re.search(culprit, message), message


SWEEPS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing varies": ({"durations": [1.0, 1.0]}, "number of points"),
    "no points": ({"durations": np.ones((0, 2))}, "number of points"),
    "two numbers of points": (
        {"durations": np.ones((3, 2)), "start": np.ones(4)},
        "3, 4",
    ),
    "axis too many": ({"durations": np.ones((1, 3, 2))}, "durations has shape"),
    "no batches": ({"durations": np.ones((3, 2)), "batch_size": 0}, "batch_size is 0"),
    "index beyond": ({"durations": np.ones((3, 2)), "position": 2}, "position is 2"),
    "token beyond": ({"durations": np.ones((3, 2)), "tokens": [1, LONG]}, "tokens"),
    "group beyond": (
        {"durations": np.ones((3, 2)), "groups": [[1], [LONG]]},
        "group 1",
    ),
    "group of fractions": (
        {"durations": np.ones((3, 2)), "groups": [[0.5]]},
        "group 0",
    ),
    "duration below 0": ({"durations": -np.ones((3, 2))}, "durations"),
}


@each_in_time
@pytest.mark.parametrize("case", SWEEPS)
def test_sweep(good, folder, case):
    changes, culprit = SWEEPS[case]
    arguments = {"groups": [[1]], "tokens": [1, 2], **changes}
    message = refusal(folder, lambda: clm.sweep.probabilities(good.lm, **arguments))
    assert re.search(culprit, message), message


def with_text(folder: pathlib.Path, more: str) -> clm.LanguageModel:
    """Loads with `more` at the end of config.json's object."""
    path = folder / "config.json"
    path.write_text(path.read_text()[:-1] + more + "}")
    return clm.load(folder)


OTHERS: dict[str, Callable[[pathlib.Path, clm.LanguageModel], Any]] = {
    "mesh of text": lambda folder, lm: clm.load(folder, mesh="x"),
    "mesh of devices": lambda folder, lm: clm.load(folder, mesh=jax.devices()),
    "folder of none": lambda folder, lm: clm.load(None),
    "folder of a number": lambda folder, lm: clm.load(3),
    "saved to none": lambda folder, lm: clm.save(None, lm),
    "saved to a surrogate": lambda folder, lm: clm.save(folder / "\ud800", lm),
    "saved text": lambda folder, lm: clm.save(folder / "b", "lm"),
    "saved list": lambda folder, lm: clm.save(folder / "b", altered(lm, [1])),
    "saved family made up": lambda folder, lm: clm.save(
        folder / "b",
        clm.LanguageModel(
            clm.Transformer(dataclasses.replace(lm.config, family="x")), lm.params
        ),
    ),
    "saved notes of NaN": lambda folder, lm: clm.save(
        folder / "b",
        clm.LanguageModel(
            clm.Transformer(lm.config), lm.params, hf_fields={"pad_token_id": np.nan}
        ),
    ),
}
TEXTS = {
    "field twice": ', "rms_norm_eps": 0.5',
    "two dtypes": ', "dtype": "bfloat16"',
}


@pytest.mark.parametrize("good", ["llama"], indirect=True)
@pytest.mark.parametrize("case", OTHERS)
def test_argument_of_another_type(good, folder, case):
    assert refusal(folder, lambda: OTHERS[case](folder, good.lm))


@pytest.mark.parametrize("good", ["llama"], indirect=True)
@pytest.mark.parametrize("case", TEXTS)
def test_said_twice(good, folder, case):
    with pytest.raises(clm.InputError):
        with_text(folder, TEXTS[case])


def test_what_a_sweep_varies():
    with pytest.raises(clm.InputError, match="change is 'x'"):
        clm.sweep.change_durations(np.ones((2, 3)), "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_tokenizer_that_is_a_pipe(tmp_path):
    """It would be waited for without an end."""
    made = make("llama", tmp_path / "model")
    os.mkfifo(made.folder / "tokenizer.json")
    assert "tokenizer.json" in refusal(made.folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_file_that_is_a_pipe(tmp_path, name):
    made = make("llama", tmp_path / "model")
    (made.folder / name).unlink()
    os.mkfifo(made.folder / name)
    assert f"{name} cannot be read: Not a file" in refusal(made.folder)
