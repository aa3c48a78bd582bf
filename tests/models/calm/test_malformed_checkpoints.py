"""Malformed next-vector checkpoints: every tensor and field that is wrong is named.

Nothing is compiled, as all of it is refused before the model runs. A folder is written once, and
each case writes the one file that it changes.
"""

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
from tests.models.checkpoints import test_malformed_checkpoints

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
EVERY = [(kind, name) for kind, tensors in TENSORS.items() for name in tensors]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for kind in MODELS:
        files_of(folder / kind, FIELDS[kind], TENSORS[kind])
    return folder


def files_of(folder, fields, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(fields))
    (folder / WEIGHTS).write_bytes(test_malformed_checkpoints.written(tensors))


@pytest.fixture
def folder(good, tmp_path):
    """Links to the two good folders' files; a case puts its own file in a link's place."""
    for kind in MODELS:
        (tmp_path / kind).mkdir()
        for name in (CONFIG, WEIGHTS):
            (tmp_path / kind / name).symlink_to(good / kind / name)
    return tmp_path


def put(path: pathlib.Path, content: bytes | str | dict) -> None:
    """A file of this content in the link's place."""
    path.unlink()
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def load(folder, kind="calm"):
    if kind == "autoencoder":
        return autoencoder.load(folder / "autoencoder")
    return calm.load(folder / "calm", folder / "autoencoder")


def refusal(folder, kind="calm"):
    """The line with which it is refused; for an autoencoder alone and beside its model alike."""
    messages = []
    for which in dict.fromkeys(("calm", kind)):
        with pytest.raises(clm.InputError) as refused:
            load(folder, which)
        messages.append(str(refused.value))
        assert messages[-1].isprintable()
        assert len(messages[-1]) < 1000
    assert len(set(messages)) == 1
    return messages[0]


def test_the_good_ones_load(folder):
    load(folder)
    load(folder, "autoencoder")


# --- Tensors ---------------------------------------------------------------------------------


def deeper(name):
    """The same of a layer that is not there, for tensors of layers; one with a suffix else."""
    return (
        re.sub(r"(layers|blocks)\.\d+", r"\1.7", name) if layered(name) else name + ".2"
    )


def layered(name):
    return re.search(r"(layers|blocks)\.\d+", name)


def turned(values):
    """Turned round where that shows, else a row short."""
    return (
        values.T
        if values.ndim == 2 and values.shape[0] != values.shape[1]
        else values[:-1]
    )


def assert_names(message, name, folder, kind):
    """As a whole word, with the folder it lies in."""
    assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", message), message
    assert str(folder / kind) in message, message


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_tensor(folder, kind, name):
    """Missing; one too many; turned round or a row short."""
    tensors = TENSORS[kind]
    values, path = tensors[name], folder / kind / WEIGHTS
    rest = {other: tensor for other, tensor in tensors.items() if other != name}

    put(path, test_malformed_checkpoints.written(rest))
    message = refusal(folder, kind)
    assert_names(message, name, folder, kind)
    assert "missing" in message

    put(path, test_malformed_checkpoints.written(tensors | {deeper(name): values}))
    message = refusal(folder, kind)
    assert_names(message, deeper(name), folder, kind)

    wrong = np.ascontiguousarray(turned(values))
    put(path, test_malformed_checkpoints.written(rest | {name: wrong}))
    message = refusal(folder, kind)
    assert_names(message, name, folder, kind)
    assert str(list(wrong.shape)) in message
    if name != "embed_proj.0.weight":  # of which only the second size is known
        assert str(list(values.shape)) in message


ALIASES = {  # names that may be there beside the others: the folder, the alias and what it repeats
    "the head": ("calm", "generative_head.", "calm", "mlp_generator."),
    "the autoencoder": ("calm", "ae_model.", "autoencoder", ""),
}


def copies(case):
    """Alias -> values, for all that it repeats."""
    _, new, source, old = ALIASES[case]
    return {
        new + name.removeprefix(old): values
        for name, values in TENSORS[source].items()
        if name.startswith(old)
    }


@pytest.mark.parametrize("case", ALIASES)
def test_alias(folder, case):
    """Missing, too many, misshapen or of other values, for each of its names."""
    path, copy = folder / "calm" / WEIGHTS, copies(case)
    put(path, test_malformed_checkpoints.written(TENSORS["calm"] | copy))
    load(folder)
    for name, values in copy.items():
        if re.search(r"(layers|blocks)\.[1-9]", name):
            continue  # the first layer stands for all
        rest = {other: tensor for other, tensor in copy.items() if other != name}
        if (
            case == "the autoencoder"
        ):  # a head may be there in part: each tensor has two names
            put(path, test_malformed_checkpoints.written(TENSORS["calm"] | rest))
            assert_names(refusal(folder), name, folder, "calm")
        put(
            path,
            test_malformed_checkpoints.written(
                TENSORS["calm"] | copy | {deeper(name): values}
            ),
        )
        assert_names(refusal(folder), deeper(name), folder, "calm")
        for wrong in (
            np.ascontiguousarray(turned(values)),
            np.nextafter(values, np.inf),
        ):
            put(
                path,
                test_malformed_checkpoints.written(
                    TENSORS["calm"] | rest | {name: wrong}
                ),
            )
            assert_names(refusal(folder), name, folder, "calm")


def test_alias_of_the_table(folder):
    path, name = folder / "autoencoder" / WEIGHTS, "decoder.lm_head_weight"
    table = TENSORS["autoencoder"]["encoder.embed_tokens.weight"]
    for wrong in (table[:-1], table[:, :-1], table + np.float32(1e-3)):
        put(
            path,
            test_malformed_checkpoints.written(
                TENSORS["autoencoder"] | {name: np.ascontiguousarray(wrong)}
            ),
        )
        assert_names(refusal(folder, "autoencoder"), name, folder, "autoencoder")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["I8", "I64", "F8_E4M3"])
def test_tensor_of_another_type(folder, kind, dtype):
    """The first of the file, so that the others' places need no change but a shift."""
    content = test_malformed_checkpoints.written(TENSORS[kind])
    header, data = test_malformed_checkpoints.parse(content)
    name = next(iter(header))
    end, size = (
        header[name]["data_offsets"][1],
        test_malformed_checkpoints.SIZES[dtype] * TENSORS[kind][name].size,
    )
    for entry in header.values():
        entry["data_offsets"] = [
            offset + size - end for offset in entry["data_offsets"]
        ]
    header[name] |= {"dtype": dtype, "data_offsets": [0, size]}
    put(
        folder / kind / WEIGHTS,
        test_malformed_checkpoints.compose(header, bytes(size) + data[end:]),
    )
    message = refusal(folder, kind)
    assert_names(message, name, folder, kind)
    assert dtype in message


# --- Fields of config.json -------------------------------------------------------------------

SIZES = {  # without these nobody knows what to build
    "calm": """hidden_size intermediate_size latent_size noise_size num_attention_heads
        num_hidden_layers num_mlp_layers patch_size vocab_size""".split(),
    "autoencoder": """hidden_size intermediate_size latent_size num_decoder_layers
        num_encoder_layers patch_size vocab_size""".split(),
}
WRONG = [0, -1, 1.5, "4", True, [], {}, 10**12]
EVERY_SIZE = [(kind, name) for kind, names in SIZES.items() for name in names]


def with_fields(folder, kind, *drop, **fields):
    kept = {name: value for name, value in FIELDS[kind].items() if name not in drop}
    put(folder / kind / CONFIG, kept | fields)


@pytest.mark.parametrize(("kind", "name"), EVERY_SIZE)
def test_size_is_missing_or_no_number(folder, kind, name):
    with_fields(folder, kind, name)
    assert_names(refusal(folder, kind), name, folder, kind)
    for wrong in WRONG:
        with_fields(folder, kind, **{name: wrong})
        message = refusal(folder, kind)
        assert_names(message, name, folder, kind)
        assert CONFIG in message


OTHERS = {  # of another type, or a value that would change what is computed
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
SAID = {  # of the trunk's fields in the words of its own checks
    "torch_dtype": "dtype",
    "rope_scaling": "rope.(type|scaling)",
    "num_key_value_heads": "num_key_value_heads|num_kv_heads 3",
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, fields in OTHERS.items() for name in fields],
)
def test_field_of_another_type_or_value(folder, kind, name):
    for wrong in OTHERS[kind][name]:
        with_fields(folder, kind, **{name: wrong})
        message = refusal(folder, kind)
        assert re.search(SAID.get(name, name), message), (wrong, message)
        assert str(folder / kind) in message, (wrong, message)


@pytest.mark.parametrize("wrong", ["int8", 3])
def test_dtype_of_an_autoencoder_alone(folder, wrong):
    """Beside a model it is read as the model's own."""
    with_fields(folder, "autoencoder", torch_dtype=wrong)
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
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_field(folder, kind, name):
    with_fields(folder, kind, **{name: UNKNOWN[name]})
    message = refusal(folder, kind)
    assert ascii(name)[1:-1] in message
    assert str(folder / kind / CONFIG) in message


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_tells_what_it_is(folder, kind):
    """Neither architectures nor the fields that only such a model has."""
    put(folder / kind / CONFIG, {"model_type": "", "hidden_size": 24, "vocab_size": 40})
    message = refusal(folder, kind)
    assert "architectures" in message
    assert str(folder / kind / CONFIG) in message


@pytest.mark.parametrize("name", ["num_encoder_layers", "num_decoder_layers"])
@pytest.mark.parametrize("number", [1, 3])
def test_layers_that_cannot_be_halved(folder, name, number):
    with_fields(folder, "autoencoder", **{name: number})
    message = refusal(folder, "autoencoder")
    assert_names(message, name, folder, "autoencoder")
    assert "even" in message


@pytest.mark.parametrize(
    "name", ["num_encoder_layers", "num_decoder_layers", "num_hidden_layers"]
)
def test_another_number_of_layers(folder, name):
    """Then the first tensor too many or too few is named, not an array in the middle of it."""
    kind = "calm" if name == "num_hidden_layers" else "autoencoder"
    number = FIELDS[kind][name]
    layer = {
        "num_encoder_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
    }
    for other, culprit in ((number + 2, number), (number - 2, number - 2)):
        if other < 1:
            continue
        with_fields(folder, kind, **{name: other})
        assert f"{layer.get(name, 'layers')}.{culprit}." in refusal(folder, kind)


# --- Two folders that do not belong together --------------------------------------------------


def remade(folder, kind, **fields):
    """A folder of these fields, whole in itself."""
    for name in (CONFIG, WEIGHTS):
        (folder / kind / name).unlink()
    make = MODELS[kind][1]
    tensors = {
        name: tensor.numpy()
        for name, tensor in reference.clone_tensors(make(**fields)).items()
    }
    files_of(folder / kind, FIELDS[kind] | fields, tensors)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "other"), [("patch_size", 2), ("latent_size", 6)])
def test_two_that_differ(folder, kind, name, other):
    """Each is whole, but the field says something else in the other folder."""
    remade(folder, kind, **{name: other})
    if kind == "autoencoder":
        load(folder, "autoencoder")
    message = refusal(folder)
    assert name in message
    assert str(other) in message
    assert str(FIELDS[kind][name]) in message
    assert "autoencoder" in message


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("other", [39, 48])
def test_two_vocabularies(folder, kind, other):
    remade(folder, kind, vocab_size=other)
    message = refusal(folder)
    assert "vocab_size" in message
    assert {"40", str(other)} <= set(re.findall(r"\d+", message))


@pytest.mark.parametrize("patch", [1, 2, 3, 5, 8])
def test_tensors_that_tell_another_patch(folder, patch):
    """config.json says 4, the matrix over a chunk's embeddings is of another number."""
    tensors = dict(TENSORS["calm"])
    tensors["embed_proj.0.weight"] = np.ones((64, patch * 32), np.float32)
    put(folder / "calm" / WEIGHTS, test_malformed_checkpoints.written(tensors))
    message = refusal(folder)
    assert_names(message, "embed_proj.0.weight", folder, "calm")
    assert str([64, patch * 32]) in message


@pytest.mark.parametrize("patch", [1, 3, 8])
def test_fields_that_tell_another_patch(folder, patch):
    """Both config.json agree on it, and the tensors do not."""
    for kind in MODELS:
        with_fields(folder, kind, patch_size=patch)
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
@pytest.mark.parametrize("case", TORN)
def test_file(folder, kind, case):
    name = list(TENSORS[kind])[-1]
    put(
        folder / kind / WEIGHTS,
        test_malformed_checkpoints.FILES[case](
            test_malformed_checkpoints.written(TENSORS[kind]), name
        ),
    )
    message = refusal(folder, kind)
    assert WEIGHTS in message or f"tensor {name}" in message, message
    assert str(folder / kind) in message, message


@pytest.mark.parametrize("kind", MODELS)
def test_pickle_beside_nothing(folder, kind):
    """A folder that has its weights as a pickle only: it is never opened."""
    (folder / kind / WEIGHTS).unlink()
    (folder / kind / "pytorch_model.bin").write_bytes(
        test_malformed_checkpoints.FILES["pickle"](b"", "")
    )
    assert "pytorch_model.bin is a pickle" in refusal(folder, kind)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "case", ["missing", "empty", "a list", "null", "with NaN", "not UTF-8"]
)
def test_config(folder, kind, case):
    path = folder / kind / CONFIG
    path.unlink()
    test_malformed_checkpoints.NO_FILE[case](path)
    message = refusal(folder, kind)
    assert str(folder / kind) in message
    assert CONFIG in message


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "case", ["a file", "nowhere", "empty", "no name", "with a zero byte"]
)
def test_place(folder, kind, case, monkeypatch):
    (folder / kind / "empty").mkdir()
    monkeypatch.chdir(folder / kind / "empty")
    place = test_malformed_checkpoints.PLACES[case](folder / kind)
    given = (
        (place, folder / "autoencoder") if kind == "calm" else (folder / "calm", place)
    )
    with pytest.raises(clm.InputError) as refused:
        calm.load(*given)
    assert str(refused.value).isprintable()


def test_nothing_is_written(folder):
    """Of a refusal nothing stays behind."""
    shutil.copy(folder / "calm" / WEIGHTS, folder / "copy")
    put(folder / "calm" / WEIGHTS, (folder / "copy").read_bytes()[:-1])
    before = test_malformed_checkpoints.tree(folder)
    refusal(folder)
    assert test_malformed_checkpoints.tree(folder) == before
