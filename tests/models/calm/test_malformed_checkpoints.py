"""Malformed next-vector checkpoints: errors name the wrong tensor or field.

No model is compiled. A folder is written once, and each case writes the one file that it changes.
"""

import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

import continuous_lm as clm

pytest.importorskip(
    "torch", reason="the tensors' names and shapes are those of PyTorch modules"
)
pytest.importorskip(
    "transformers", reason="the reference's trunk is transformers' Llama"
)

from continuous_lm.models import calm
from continuous_lm.models.calm import autoencoder
from tests.fixtures import calm_reference as reference
from tests.fixtures import malformed

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODELS = {
    "calm": (reference.energy_fields, reference.random_energy_model),
    "autoencoder": (reference.autoencoder_fields, reference.random_autoencoder),
}
TENSORS = {
    kind: {
        name: tensor.numpy() for name, tensor in reference.clone_tensors(make()).items()
    }
    for kind, (_, make) in MODELS.items()
}
FIELDS = {kind: fields() for kind, (fields, _) in MODELS.items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for kind in MODELS:
        write_files(folder / kind, FIELDS[kind], TENSORS[kind])
    return folder


def write_files(folder, fields, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(fields))
    (folder / WEIGHTS).write_bytes(malformed.serialize(tensors))


@pytest.fixture
def folder(good, tmp_path):
    """Two folders of links to the valid files; a case replaces a link by its own file."""
    for kind in MODELS:
        (tmp_path / kind).mkdir()
        for name in (CONFIG, WEIGHTS):
            (tmp_path / kind / name).symlink_to(good / kind / name)
    return tmp_path


def put(path: pathlib.Path, content: bytes | str | dict) -> None:
    """Replace a link by a file of this content."""
    path.unlink()
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_tensors(folder: pathlib.Path, kind: str, tensors) -> None:
    put(folder / kind / WEIGHTS, malformed.serialize(tensors))


def load(folder, kind="calm"):
    if kind == "autoencoder":
        return autoencoder.load(folder / "autoencoder")
    return calm.load(folder / "calm", folder / "autoencoder")


def refusal(folder, kind="calm"):
    """Return the message of the error; an autoencoder has the same with and without its model."""
    messages = set()
    for which in {"calm", kind}:
        with pytest.raises(clm.InputError) as refused:
            load(folder, which)
        messages.add(str(refused.value))
    (message,) = messages
    assert message.isprintable()
    assert len(message) < 1000
    return message


def test_valid_folders_load(folder):
    load(folder)
    load(folder, "autoencoder")


# --- Tensors ---------------------------------------------------------------------------------


def deeper(name):
    """Return the name in a layer that does not exist; outside of layers, with a suffix."""
    in_layer_7 = re.sub(r"(layers|blocks)\.\d+", r"\1.7", name)
    return in_layer_7 if in_layer_7 != name else name + ".2"


def is_representative(name):
    """Return whether a tensor is outside of the layers or in the first one."""
    return not re.search(r"(layers|blocks)\.[1-9]", name)


def without(tensors, name):
    return {other: values for other, values in tensors.items() if other != name}


def misshapen(values):
    """Return the transposed matrix if its shape differs, else one row less."""
    is_square = values.ndim != 2 or values.shape[0] == values.shape[1]
    return np.ascontiguousarray(values[:-1] if is_square else values.T)


def assert_names(message, name, folder, kind):
    """Assert that a message has the name as one word, and the path of the folder."""
    assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", message), message
    assert str(folder / kind) in message, message


@pytest.mark.parametrize("kind", MODELS)
def test_missing_unexpected_and_misshapen_tensors_are_named(folder, kind):
    tensors = TENSORS[kind]
    for name in filter(is_representative, tensors):
        values = tensors[name]
        put_tensors(folder, kind, without(tensors, name))
        message = refusal(folder, kind)
        assert_names(message, name, folder, kind)
        assert "missing" in message

        put_tensors(folder, kind, tensors | {deeper(name): values})
        assert_names(refusal(folder, kind), deeper(name), folder, kind)

        wrong = misshapen(values)
        put_tensors(folder, kind, tensors | {name: wrong})
        message = refusal(folder, kind)
        assert_names(message, name, folder, kind)
        assert str(list(wrong.shape)) in message
        if name != "embed_proj.0.weight":  # its first size is not known
            assert str(list(values.shape)) in message


# Tensors that may be stored again: prefix of the second name, folder and prefix of the first one.
ALIASES = {
    "the head": ("generative_head.", "calm", "mlp_generator."),
    "the autoencoder": ("ae_model.", "autoencoder", ""),
}


@pytest.mark.parametrize("case", ALIASES)
def test_second_names_must_have_the_tensors_of_the_first(folder, case):
    """The errors take turns over the names: unexpected, misshapen, other values, missing."""
    prefix, source, old_prefix = ALIASES[case]
    aliases = {
        prefix + name.removeprefix(old_prefix): values
        for name, values in TENSORS[source].items()
        if name.startswith(old_prefix)
    }
    tensors = TENSORS["calm"] | aliases
    put_tensors(folder, "calm", tensors)
    load(folder)
    changes = [
        lambda name, values: (deeper(name), tensors | {deeper(name): values}),
        lambda name, values: (name, tensors | {name: misshapen(values)}),
        lambda name, values: (name, tensors | {name: np.nextafter(values, np.inf)}),
    ]
    if case == "the autoencoder":
        changes.append(lambda name, values: (name, without(tensors, name)))
    names = filter(is_representative, aliases)
    for name, change in zip(names, itertools.cycle(changes), strict=False):
        culprit, wrong_tensors = change(name, aliases[name])
        put_tensors(folder, "calm", wrong_tensors)
        assert_names(refusal(folder), culprit, folder, "calm")


def test_second_name_of_the_embedding_table(folder):
    name = "decoder.lm_head_weight"
    table = TENSORS["autoencoder"]["encoder.embed_tokens.weight"]
    for wrong in (table[:-1], table[:, :-1], table + np.float32(1e-3)):
        tensors = TENSORS["autoencoder"] | {name: np.ascontiguousarray(wrong)}
        put_tensors(folder, "autoencoder", tensors)
        assert_names(refusal(folder, "autoencoder"), name, folder, "autoencoder")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["I8", "I64", "F8_E4M3"])
def test_tensors_of_another_type_are_named(folder, kind, dtype):
    content, name = malformed.serialize(TENSORS[kind]), next(iter(TENSORS[kind]))
    size = TENSORS[kind][name].size
    put(folder / kind / WEIGHTS, malformed.change_kind(content, name, dtype, size))
    message = refusal(folder, kind)
    assert_names(message, name, folder, kind)
    assert dtype in message


# --- Fields of config.json -------------------------------------------------------------------

REQUIRED_SIZES = {
    "calm": """hidden_size intermediate_size latent_size noise_size num_attention_heads
        num_hidden_layers num_mlp_layers patch_size vocab_size""".split(),
    "autoencoder": """hidden_size intermediate_size latent_size num_decoder_layers
        num_encoder_layers patch_size vocab_size""".split(),
}
WRONG = [0, -1, 1.5, "4", True, [], {}, 10**12]


def change_fields(folder, kind, **fields):
    put(folder / kind / CONFIG, FIELDS[kind] | fields)


@pytest.mark.parametrize("kind", MODELS)
def test_missing_and_wrong_sizes_are_named(folder, kind):
    for name in REQUIRED_SIZES[kind]:
        put(folder / kind / CONFIG, without(FIELDS[kind], name))
        assert_names(refusal(folder, kind), name, folder, kind)
        for wrong in WRONG:
            change_fields(folder, kind, **{name: wrong})
            message = refusal(folder, kind)
            assert_names(message, name, folder, kind)
            assert CONFIG in message


# Values of another type, or that would change the results.
OTHERS = {
    "calm": {
        "beta": [0, -1, 2, 2.5, "1", True, []],
        "num_samples": [0, 1.5, "8", True],
        "rms_norm_eps": [0, -1e-5, "1e-5", True],
        "rope_theta": [0, -1, "x"],
        "num_key_value_heads": [0, 3, "2"],
        "hidden_act": ["made up", 3],
        "attention_bias": ["yes", 1],
        "mlp_bias": ["yes", 1],
        "architectures": [["LlamaForCausalLM"], ["Autoencoder"]],
        "torch_dtype": ["int8", 3],
        "rope_scaling": [{"rope_type": "made up", "factor": 2.0}],
    },
    "autoencoder": {
        "rms_norm_eps": [0, -1e-5, "1e-5", True],
        "hidden_act": ["made up", 3],
        "mlp_bias": ["yes", 1],
        "architectures": [["LlamaForCausalLM"], ["EnergyTransformer"]],
        "ae_dropout": [-0.1, 1.0, 1.5, "0.1", True],
        "kl_weight": [-1, "1", True],
        "kl_clamp": [-1, "1", True],
    },
}
# Fields of the trunk, which its own checks name otherwise.
NAMES_IN_MESSAGES = {
    "torch_dtype": "dtype",
    "rope_scaling": "rope.(type|scaling)",
    "num_key_value_heads": "num_key_value_heads|num_kv_heads 3",
}


@pytest.mark.parametrize("kind", MODELS)
def test_wrong_values_of_fields_are_named(folder, kind):
    for name, values in OTHERS[kind].items():
        for wrong in values:
            change_fields(folder, kind, **{name: wrong})
            message = refusal(folder, kind)
            pattern = NAMES_IN_MESSAGES.get(name, name)
            assert re.search(pattern, message), (wrong, message)
            assert str(folder / kind) in message, (wrong, message)


@pytest.mark.parametrize("wrong", ["int8", 3])
def test_wrong_dtypes_of_an_autoencoder_are_named(folder, wrong):
    """Without a model: with one, the dtype is the model's."""
    change_fields(folder, "autoencoder", torch_dtype=wrong)
    with pytest.raises(clm.InputError, match=r"config\.json: field dtype"):
        load(folder, "autoencoder")


UNKNOWN = {
    "made_up": 1,
    "sliding_window": 8,
    "num_clusters": 3,
    "temperature_of_training": {"a": 1},
    "x\ny": 1,
}


@pytest.mark.parametrize("kind", MODELS)
def test_unknown_fields_are_named(folder, kind):
    for name, value in UNKNOWN.items():
        change_fields(folder, kind, **{name: value})
        message = refusal(folder, kind)
        assert ascii(name)[1:-1] in message
        assert str(folder / kind / CONFIG) in message


@pytest.mark.parametrize("kind", MODELS)
def test_configs_of_no_known_model_are_refused(folder, kind):
    """The config has neither architectures nor a field of these models only."""
    put(folder / kind / CONFIG, {"model_type": "", "hidden_size": 24, "vocab_size": 40})
    message = refusal(folder, kind)
    assert "architectures" in message
    assert str(folder / kind / CONFIG) in message


@pytest.mark.parametrize("name", ["num_encoder_layers", "num_decoder_layers"])
@pytest.mark.parametrize("number", [1, 3])
def test_odd_numbers_of_layers_are_refused(folder, name, number):
    change_fields(folder, "autoencoder", **{name: number})
    message = refusal(folder, "autoencoder")
    assert_names(message, name, folder, "autoencoder")
    assert "even" in message


@pytest.mark.parametrize(
    "name", ["num_encoder_layers", "num_decoder_layers", "num_hidden_layers"]
)
def test_wrong_numbers_of_layers_name_the_first_tensor(folder, name):
    """The first tensor is named that is missing or unexpected."""
    kind = "calm" if name == "num_hidden_layers" else "autoencoder"
    number = FIELDS[kind][name]
    layer = {
        "num_encoder_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
    }
    for other, culprit in ((number + 2, number), (number - 2, number - 2)):
        if other < 1:
            continue
        change_fields(folder, kind, **{name: other})
        assert f"{layer.get(name, 'layers')}.{culprit}." in refusal(folder, kind)


# --- Two folders that do not belong together --------------------------------------------------


def rewrite(folder, kind, **fields):
    """Replace a folder by another valid one with these fields."""
    for name in (CONFIG, WEIGHTS):
        (folder / kind / name).unlink()
    make = MODELS[kind][1]
    tensors = {
        name: tensor.numpy()
        for name, tensor in reference.clone_tensors(make(**fields)).items()
    }
    write_files(folder / kind, FIELDS[kind] | fields, tensors)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "other"), [("patch_size", 2), ("latent_size", 6)])
def test_valid_folders_of_different_sizes_are_refused(folder, kind, name, other):
    rewrite(folder, kind, **{name: other})
    if kind == "autoencoder":
        load(folder, "autoencoder")
    message = refusal(folder)
    assert name in message
    assert str(other) in message
    assert str(FIELDS[kind][name]) in message
    assert "autoencoder" in message


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("other", [39, 48])
def test_valid_folders_of_different_vocabularies_are_refused(folder, kind, other):
    rewrite(folder, kind, vocab_size=other)
    message = refusal(folder)
    assert "vocab_size" in message
    assert {"40", str(other)} <= set(re.findall(r"\d+", message))


@pytest.mark.parametrize("patch", [1, 2, 3, 5, 8])
def test_projections_of_another_patch_size_are_refused(folder, patch):
    """The matrix of a chunk's embeddings contradicts config.json, whose patch size is 4."""
    weight = np.ones((64, patch * 32), np.float32)
    put_tensors(folder, "calm", TENSORS["calm"] | {"embed_proj.0.weight": weight})
    message = refusal(folder)
    assert_names(message, "embed_proj.0.weight", folder, "calm")
    assert str([64, patch * 32]) in message


@pytest.mark.parametrize("patch", [1, 3, 8])
def test_patch_sizes_that_no_tensor_has_are_refused(folder, patch):
    """The two config.json agree."""
    for kind in MODELS:
        change_fields(folder, kind, patch_size=patch)
    message = refusal(folder)
    names = (
        "encoder.squeeze_layer.weight",
        "decoder.expand_layer",
        "embed_proj.0.weight",
    )
    assert any(name in message for name in names), message


# --- Files -----------------------------------------------------------------------------------

TORN = """
    empty|cut in the middle|cut by one byte|longer by one byte|length huge|header not JSON
    entry empty|no dtype|shape negative|shape that overflows|offsets that overlap|offsets huge
    pickle|new pickle|zip|text|zeros|name twice
""".replace("\n", "|").split("|")
TORN = [case.strip() for case in TORN if case.strip()]


@pytest.mark.parametrize("kind", MODELS)
def test_damaged_files_are_named(folder, kind):
    content, name = malformed.serialize(TENSORS[kind]), list(TENSORS[kind])[-1]
    for case in TORN:
        put(folder / kind / WEIGHTS, malformed.FILES[case](content, name))
        message = refusal(folder, kind)
        assert WEIGHTS in message or f"tensor {name}" in message, (case, message)
        assert str(folder / kind) in message, (case, message)


@pytest.mark.parametrize("kind", MODELS)
def test_pickles_are_not_opened(folder, kind):
    (folder / kind / WEIGHTS).unlink()
    (folder / kind / "pytorch_model.bin").write_bytes(
        malformed.FILES["pickle"](b"", "")
    )
    assert "pytorch_model.bin is a pickle" in refusal(folder, kind)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "case", ["missing", "empty", "a list", "null", "with NaN", "not UTF-8"]
)
def test_damaged_configs_are_named(folder, kind, case):
    path = folder / kind / CONFIG
    path.unlink()
    malformed.NO_FILE[case](path)
    message = refusal(folder, kind)
    assert str(folder / kind) in message
    assert CONFIG in message


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "case", ["a file", "nowhere", "empty", "no name", "with a zero byte"]
)
def test_paths_of_no_checkpoint_are_refused(folder, kind, case, monkeypatch):
    (folder / kind / "empty").mkdir()
    monkeypatch.chdir(folder / kind / "empty")
    place = malformed.PLACES[case](folder / kind)
    paths = {"calm": folder / "calm", "autoencoder": folder / "autoencoder"}
    paths[kind] = place
    with pytest.raises(clm.InputError) as refused:
        calm.load(*paths.values())
    assert str(refused.value).isprintable()


def test_refused_loads_write_no_file(folder):
    shutil.copy(folder / "calm" / WEIGHTS, folder / "copy")
    put(folder / "calm" / WEIGHTS, (folder / "copy").read_bytes()[:-1])
    before = malformed.file_states(folder)
    refusal(folder)
    assert malformed.file_states(folder) == before
