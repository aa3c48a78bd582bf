"""Malformed checkpoints of every family, made from a good one by rules.

Each is refused by an `InputError` whose single line names the field, the tensor or the file.
Loading allocates little memory and leaves no file behind. Some random changes are no errors: then
only the values that they set may differ.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.transformer import parameter_table
from tests.fixtures import tiny
from tests.fixtures.malformed import (
    BYTES_BY_KIND,
    FILES,
    NO_FILE,
    PLACES,
    change_kind,
    file_states,
    parse,
    serialize,
    tensors_in,
)
from tests.fixtures.params import assert_same_params

FAMILIES = list(tiny.CONFIG_MAKERS)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXTRA_BYTES = 8_000_000  # allowed beside the file's own, for shapes and messages

CONFIG_FIELDS = {field.name for field in dataclasses.fields(clm.TransformerConfig)}


# --- Valid checkpoints -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Good:
    """A valid checkpoint and its contents."""

    folder: pathlib.Path
    fields: Mapping[str, Any]  # of config.json
    tensors: Mapping[str, np.ndarray]
    content: bytes  # of the file with the weights
    lm: clm.LanguageModel


def make(family: str, folder: pathlib.Path) -> Good:
    """Save random weights for the tiny config by `clm.save`, without transformers."""
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
    """A valid checkpoint of a family."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


every_family = pytest.mark.parametrize("good", FAMILIES, indirect=True, ids=str)
# For rules that do not depend on the family, the quick run has the three that differ most.
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
llama_only = pytest.mark.parametrize("good", ["llama"], indirect=True)


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good.folder, tmp_path / "model")


@pytest.fixture
def copy(good, tmp_path):
    """A function that returns a new copy to damage."""
    numbers = itertools.count()
    return lambda: shutil.copytree(good.folder, tmp_path / str(next(numbers)) / "model")


def write_config(folder: pathlib.Path, fields: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


# --- Checks of every refusal -----------------------------------------------------------------


@contextlib.contextmanager
def little_memory(limit: float) -> Iterator[None]:
    """Fail if the body allocates more than `limit` bytes. The process itself has a limit too."""
    old = None
    if sys.platform == "linux":
        import resource

        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        old = resource.getrlimit(resource.RLIMIT_AS)
        address_space = pages * resource.getpagesize() + 300_000_000
        resource.setrlimit(resource.RLIMIT_AS, (address_space, old[1]))
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        if old is not None:
            resource.setrlimit(resource.RLIMIT_AS, old)
    assert peak <= limit, f"{peak} bytes were allocated"


def attempt(folder: pathlib.Path, call: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the value of `call` and None, or None and the message of its `InputError`.

    Other exceptions are raised. Nothing below `folder` may change.
    """
    before = file_states(folder)
    value, message = None, None
    with little_memory(sum(size for size, _ in before.values()) + EXTRA_BYTES):
        try:
            value = call()
        except clm.InputError as error:
            message = str(error)
    assert file_states(folder) == before
    if message is not None:
        assert message.isprintable(), message  # one line, without escape sequences
        assert len(message) < 1000
    return value, message


def refusal(
    folder: pathlib.Path, call: Callable[[], Any] | None = None, case: object = ""
) -> str:
    """Return the message with which a folder, or a call, is refused."""
    value, message = attempt(folder.parent, call or (lambda: clm.load(folder)))
    assert message is not None, f"{case}: accepted as {type(value)}"
    return message


# --- Tensors ---------------------------------------------------------------------------------

# Rule -> (name, values) -> tensors in the place of this one, and a pattern of the message: {name}
# is the tensor's name, {shape} and {wrong} are shapes.
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
    """Return the name in layer 3, which does not exist; outside of layers, with a suffix."""
    has_layer = re.search(r"\.\d+\.", name)
    return re.sub(r"\.\d+\.", ".3.", name) if has_layer else name + ".3"


def longer(values: np.ndarray) -> tuple[int, ...]:
    return (values.shape[0] + 1, *values.shape[1:])


def names_once(tensors: Mapping[str, Any]) -> list[str]:
    """Return every tensor's name; of the layers, only those of the middle one."""
    return [n for n in tensors if not re.search(r"\.\d+\.", n) or ".1." in n]


@each_in_time
@pytest.mark.parametrize("rule", TENSOR_RULES)
def test_wrong_tensors_are_named(good, folder, rule):
    change, pattern = TENSOR_RULES[rule]
    for name in names_once(good.tensors):
        values = good.tensors[name]
        others = {n: t for n, t in good.tensors.items() if n != name}
        tensors = others | change(name, values)
        (folder / WEIGHTS).write_bytes(serialize(tensors))
        wrong = tensors[name].shape if name in tensors else ()
        expected = pattern.format(
            name=re.escape(name),
            deeper=re.escape(deeper(name)),
            shape=re.escape(str(list(values.shape))),
            wrong=re.escape(str(list(wrong))),
        )
        message = refusal(folder, case=name)
        assert re.search(expected, message), (name, message)


@each_in_time
def test_tensors_of_another_type_are_named(good, folder):
    """The kinds take turns over the names: each name and each kind is there."""
    names = names_once(good.tensors)
    assert len(names) >= len(BYTES_BY_KIND)
    for name, kind in zip(names, itertools.cycle(BYTES_BY_KIND), strict=False):
        content = change_kind(good.content, name, kind, good.tensors[name].size)
        (folder / WEIGHTS).write_bytes(content)
        assert f"tensor {name} is stored as {kind}" in refusal(folder)


UNPRINTABLE = ["x\ny", "x\x1b[31m", "x\u2028y", "model.\u202e"]


@each_in_time
def test_unprintable_and_long_names_are_refused_in_one_line(good, folder):
    for name in ("x" * 300, "", *UNPRINTABLE):
        tensors = {**good.tensors, name: np.zeros(1, np.float32)}
        (folder / WEIGHTS).write_bytes(serialize(tensors))
        assert re.search(r"tensor .*left over", refusal(folder))
        shutil.copy(good.folder / WEIGHTS, folder / WEIGHTS)
        write_config(folder, {**good.fields, name: 1})
        assert re.search(r"config\.json: field .*not handled", refusal(folder))
        write_config(folder, good.fields)


# --- Files -----------------------------------------------------------------------------------


@each_in_time
def test_damaged_files_are_named(good, folder):
    name = names_once(good.tensors)[-1]
    for case, damage in FILES.items():
        (folder / WEIGHTS).write_bytes(damage(good.content, name))
        message = refusal(folder, case=case)
        assert WEIGHTS in message or f"tensor {name}" in message, (case, message)
        assert str(folder) in message, (case, message)


# --- Folders ---------------------------------------------------------------------------------


def replaced(
    name: str, by: Callable[[pathlib.Path], Any]
) -> Callable[[pathlib.Path], None]:
    def damage(folder: pathlib.Path) -> None:
        (folder / name).unlink()
        by(folder / name)

    return damage


def sharded(name: str, place: Any) -> Callable[[pathlib.Path], None]:
    """Return a damage: two shards whose index puts tensor `name`, or the first, at `place`."""

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
def test_damaged_folders_are_refused(good, copy):
    for case, (damage, culprit) in FOLDERS.items():
        folder = copy()
        damage(folder)
        message = refusal(folder, case=case)
        assert re.search(culprit, message), (case, message)
        assert str(folder) in message, (case, message)


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
def test_malformed_tokenizers_are_refused(good, copy):
    folder = copy()
    tokenizer().save(str(folder / "tokenizer.json"))
    assert clm.load(folder).tokenizer.get_vocab_size() == 6
    for case, write in TOKENIZERS.items():
        folder = copy()
        write(folder / "tokenizer.json")
        message = refusal(folder, case=case)
        assert "tokenizer.json" in message, (case, message)
        assert str(folder) in message, (case, message)


# --- Fields ----------------------------------------------------------------------------------

# Fields that no part of the model depends on.
INERT = {"max_position_embeddings", "initializer_range", "pad_token_id", "bos_token_id"}
INERT |= {"eos_token_id"}
# Field of config.json -> attribute that any positive number may set.
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
# Field of config.json -> attributes that it sets, and no tensor contradicts.
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
# Fields that set shapes of tensors: the message may name a tensor.
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
    names = {field, SYNONYMS.get(field, field)}
    return any(re.search(rf"\b{re.escape(n)}\b", message) for n in names) or (
        field in SIZES_OF
        and re.search(r"tensor \S+ |head|embedding table", message) is not None
    )


def is_refused(good: Good, folder: pathlib.Path, changes: Mapping[str, Any]) -> bool:
    """Return whether changed fields are refused; if not, only their attributes may differ."""
    write_config(folder, {**good.fields, **changes})
    lm, message = attempt(folder, lambda: clm.load(folder))
    if message is not None:
        assert str(folder) in message, message
        assert any(named_in(message, field) for field in changes), (changes, message)
        return True
    differ = {
        n for n in CONFIG_FIELDS if getattr(lm.config, n) != getattr(good.lm.config, n)
    }
    allowed = set().union(*(CHOICES.get(field, set()) for field in changes))
    assert differ <= allowed, (changes, differ)
    if "num_heads" not in differ:  # it splits fused tensors at other places
        assert_same_params(lm.params, good.lm.params)
    for field, value in changes.items():
        if field in NUMBERS and differ and len(changes) == 1 and value is not None:
            attribute = getattr(lm.config, NUMBERS[field])
            assert getattr(attribute, "theta", attribute) == value, (field, value)
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
def test_wrong_values_of_every_field(good, folder):
    """Most of the values are refused, for every field."""
    for field in all_fields(good):
        refused = [is_refused(good, folder, {field: value}) for value in WRONG]
        assert sum(refused) > len(WRONG) // 2, field


SIZE_FIELDS = """vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads
    head_dim n_embd n_head n_positions""".split()


@each_in_time
@pytest.mark.parametrize("size", [2**31 - 1, 2**16])
def test_huge_sizes_are_refused_without_memory(good, folder, size):
    """All sizes are huge: 64 bits cannot count the elements."""
    huge = dict.fromkeys(SIZE_FIELDS, size) | {"head_dim": 2**16}
    huge |= {"num_hidden_layers": 1000, "n_layer": 1000}
    changes = {name: value for name, value in huge.items() if name in good.fields}
    write_config(folder, {**good.fields, **changes})
    assert re.search("tensor |divide|head|layer_types", refusal(folder))


@every_family
def test_missing_fields_are_named_or_have_a_default(good, folder):
    for field in sorted(set(good.fields) - INERT):
        fields = {name: value for name, value in good.fields.items() if name != field}
        write_config(folder, fields)
        lm, message = attempt(folder, lambda: clm.load(folder))
        if message is not None:
            assert named_in(message, field), (field, message)
        else:
            assert_same_params(lm.params, good.lm.params)


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
def test_malformed_rope_scalings_are_refused(good, folder, field):
    others = {k: v for k, v in good.fields.items() if k != "rope_parameters"}
    for case, (value, culprit) in SCALINGS.items():
        write_config(folder, others | {field: value})
        message = refusal(folder, case=case)
        assert re.search(f"{culprit}|{field}", message), (case, message)
        assert "config.json" in message


ROTARY = [f for f in FAMILIES if f != "gpt2"]
# Case -> families, fields that contradict each other, and the names of both.
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
def test_contradictory_fields_are_named(good, folder):
    for case, (families, changes, culprits) in CONTRADICTIONS.items():
        if good.fields["model_type"] in families:
            write_config(folder, {**good.fields, **changes})
            message = refusal(folder, case=case)
            for culprit in culprits:
                assert culprit in message, (case, message)


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


@each_in_time
@random_changes
@given(data=st.data())
def test_random_values_of_up_to_three_fields(good, folder, data):
    huge = st.sampled_from([2**31 - 1, 2**16, 10**9, 10_000])
    fields = st.sampled_from(all_fields(good))
    changes = data.draw(st.dictionaries(fields, values | huge, min_size=1, max_size=3))
    is_refused(good, folder, changes)


@each_in_time
@random_changes
@given(data=st.data())
def test_random_bytes_of_the_header(good, folder, data):
    """The file is refused, or its header still describes the same tensors, and they are loaded."""
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
    tensors = tensors_in(bytes(content))
    assert tensors.keys() == good.tensors.keys()
    for name, values in good.tensors.items():
        assert tensors[name].shape == values.shape
        assert tensors[name].tobytes() == values.tobytes()
    assert_same_params(lm.params, good.lm.params)


@each_in_time
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_bytes_of_the_weights_are_loaded_as_they_are(
    good, folder, tmp_path, data
):
    size = len(good.content) - len(parse(good.content)[1])
    content = bytearray(good.content)
    for _ in range(3):
        place = data.draw(st.integers(size, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content)
    clm.save(tmp_path / "saved", clm.load(folder))
    saved = tensors_in((tmp_path / "saved" / WEIGHTS).read_bytes())
    expected = tensors_in(bytes(content))
    assert saved.keys() == expected.keys()
    for name, values in expected.items():
        assert saved[name].tobytes() == values.tobytes(), name


@each_in_time
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@example(data=None)
def test_random_bytes_of_the_tokenizer(good, folder, data):
    """The tokenizer is refused, or none of its tokens is outside of the model's vocabulary."""
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


@llama_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unknown_dtypes_are_refused(good, folder, dtype):
    assert "dtype" in refusal(folder, lambda: clm.load(folder, dtype=dtype))


@llama_only
@pytest.mark.parametrize("case", PLACES)
def test_paths_of_no_checkpoint_are_refused(good, folder, case, monkeypatch):
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
def test_impossible_saves_are_refused(good, folder):
    (folder / "taken" / WEIGHTS).mkdir(parents=True)
    for case, save in SAVES.items():
        assert refusal(folder, lambda save=save: save(folder, good.lm), case)


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


@llama_only
@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_of_a_call_are_named(good, folder, case):
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


@llama_only
@pytest.mark.parametrize("case", SWEEPS)
def test_wrong_arguments_of_a_sweep_are_named(good, folder, case):
    changes, culprit = SWEEPS[case]
    arguments = {"groups": [[1]], "tokens": [1, 2], **changes}
    message = refusal(folder, lambda: clm.sweep.probabilities(good.lm, **arguments))
    assert re.search(culprit, message), message


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


@llama_only
@pytest.mark.parametrize("case", OTHERS)
def test_arguments_of_another_type_are_refused(good, folder, case):
    assert refusal(folder, lambda: OTHERS[case](folder, good.lm))


@llama_only
@pytest.mark.parametrize("case", TEXTS)
def test_fields_that_occur_twice_are_refused(good, folder, case):
    path = folder / "config.json"
    path.write_text(path.read_text()[:-1] + TEXTS[case] + "}")
    with pytest.raises(clm.InputError):
        clm.load(folder)


def test_unknown_changes_of_durations_are_refused():
    with pytest.raises(clm.InputError, match="change is 'x'"):
        clm.sweep.change_durations(np.ones((2, 3)), "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
@llama_only
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_named_pipes_are_refused(good, folder, name):
    """Reading a pipe would wait for ever."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    message = refusal(folder)
    if name == "tokenizer.json":
        assert name in message
    else:
        assert f"{name} cannot be read: Not a file" in message
