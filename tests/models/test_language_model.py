"""Checkpoint folders to models and back: whole ones in every layout, and ones that are wrong."""

import json
import math
import os
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.io import safetensors_files
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder_network import AutoencoderConfig
from continuous_lm.models.checkpoints import trunk
from tests.fixtures import many_devices, tiny
from tests.fixtures.params import assert_same_params
from tests.fixtures.programs import REPOSITORY_ROOT

TOKENS = np.array([1, 5, 9, 2, 60, 33, 7])
DURATIONS = np.array([1, 0.5, 0.25, 2, 1, 0.1, 1], np.float32)
LLAMA3 = tiny.llama3_scaling()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole folder that tests copy before they damage it."""
    return tiny.save(tmp_path_factory.mktemp("llama"))


def parts(folder):
    """The fields and the tensors of a folder."""
    import safetensors.numpy

    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text()), weights


def changed(tmp_path, folder, *drop, weights=(), **fields):
    """A copy of `folder` with other fields, without those in `drop`, with other tensors."""
    old_fields, old_weights = parts(folder)
    new_fields = {
        name: value for name, value in old_fields.items() if name not in drop
    } | fields
    new_weights = {
        name: w for name, w in (old_weights | dict(weights)).items() if w is not None
    }
    tiny.write_checkpoint(tmp_path / "changed", new_fields, new_weights)
    return tmp_path / "changed"


def names_once(weights):
    """The tensors, those of one layer instead of all."""
    return [name for name in weights if ".layers." not in name or ".layers.1." in name]


def refusal(folder, **arguments):
    """The one line with which the folder is refused."""
    with pytest.raises(clm.InputError) as refused:
        clm.load(folder, **arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- Layouts that hold the same model --------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("number", [1, 3])
def test_shards_hold_what_a_single_file_holds(tmp_path, model_type, number):
    single = tiny.save(tmp_path / "single", model_type)
    sharded = tiny.save(tmp_path / "sharded", model_type)
    tiny.write_shards(sharded, parts(single)[1], number)
    assert_same_params(clm.load(single).params, clm.load(sharded).params)


def test_each_tensor_is_loaded_to_its_parameter(folder):
    """Layer 1 of the stack is layer 1 of the file, and so on for every tensor."""
    _, weights = parts(folder)
    lm = clm.load(folder)
    params, layers = lm.params, lm.params["layers"]
    np.testing.assert_array_equal(
        params["embedding"], weights["model.embed_tokens.weight"]
    )
    np.testing.assert_array_equal(params["head"], weights["lm_head.weight"])
    np.testing.assert_array_equal(
        params["final_norm"]["scale"], weights["model.norm.weight"]
    )
    for i in range(lm.config.num_layers):
        for path, name in {
            "attention_norm/scale": "input_layernorm",
            "attention/q": "self_attn.q_proj",
            "attention/k": "self_attn.k_proj",
            "attention/v": "self_attn.v_proj",
            "attention/o": "self_attn.o_proj",
            "mlp_norm/scale": "post_attention_layernorm",
            "mlp/gate": "mlp.gate_proj",
            "mlp/up": "mlp.up_proj",
            "mlp/down": "mlp.down_proj",
        }.items():
            module, leaf = path.split("/")
            stored = weights[f"model.layers.{i}.{name}.weight"]
            parameter = np.asarray(layers[module][leaf][i])
            np.testing.assert_array_equal(
                parameter.reshape(stored.shape), stored, err_msg=name
            )


STYLES = {  # the same model, as older and newer exporters write it
    "theta": [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {
            "rope_theta": 5e5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        {"rope_theta": 500_000, "rope_scaling": {"type": "default"}},
    ],
    "llama3": [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
    "plain": [
        {},
        {"rope_theta": 10_000.0},
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "default"}},
    ],
}


@pytest.mark.parametrize("style", STYLES)
def test_both_styles_of_config(tmp_path, folder, style):
    first, *others = [
        clm.load(changed(tmp_path, folder, **fields)).config for fields in STYLES[style]
    ]
    assert first.rope.theta == (1e4 if style == "plain" else 5e5)
    assert (first.rope.scaling is not None) == (style == "llama3")
    assert others == [first] * len(others)


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}])
def test_both_styles_of_dtype(tmp_path, folder, fields):
    lm = clm.load(changed(tmp_path, folder, "torch_dtype", **fields))
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("fields", [{"num_key_value_heads": None}, {"head_dim": None}])
def test_null_is_the_same_as_absent(tmp_path, fields):
    sizes = {"num_key_value_heads": 4}
    folder = tiny.save(tmp_path / "plain", **sizes)
    (name,) = fields
    absent = clm.load(changed(tmp_path, folder, name))
    null = clm.load(changed(tmp_path, folder, **fields))
    assert absent.config == null.config == clm.load(folder).config


# --- Heads -----------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path):
    return tiny.save(tmp_path / "tied", tie_word_embeddings=True)


def test_tied_head_is_the_embedding_table(tmp_path, tied):
    lm = clm.load(tied)
    assert "head" not in lm.params
    table = parts(tied)[1]["model.embed_tokens.weight"]
    untied = changed(
        tmp_path, tied, weights={"lm_head.weight": table}, tie_word_embeddings=False
    )
    other = clm.load(untied)
    assert "head" in other.params
    np.testing.assert_allclose(lm(TOKENS), other(TOKENS), rtol=0, atol=1e-6)


def test_tied_heads_may_be_stored_twice(tmp_path, tied):
    table = parts(tied)[1]["model.embed_tokens.weight"]
    twice = clm.load(changed(tmp_path, tied, weights={"lm_head.weight": table}))
    assert_same_params(twice.params, clm.load(tied).params)


@pytest.mark.parametrize("change", ["value", "shape"])
def test_tied_heads_that_differ_are_refused(tmp_path, tied, change):
    table = parts(tied)[1]["model.embed_tokens.weight"].copy()
    table[-1, -1] += 1e-3
    head = table if change == "value" else table[:-1]
    message = refusal(changed(tmp_path, tied, weights={"lm_head.weight": head}))
    assert "lm_head.weight is not the embedding table" in message
    assert "tie_word_embeddings" in message


def test_missing_untied_heads_are_named(tmp_path, tied):
    message = refusal(changed(tmp_path, tied, tie_word_embeddings=False))
    assert re.search(r"tensor lm_head\.weight \[64, 48\] is missing", message)


# --- Precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", jnp.float16])
def test_dtype_is_the_stored_one_by_default(tmp_path, stored, dtype):
    folder = tiny.save(tmp_path / "x", dtype=stored)
    lm = clm.load(folder, dtype=dtype)
    expected = jnp.dtype(dtype or stored)
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {expected}
    table = parts(folder)[1]["model.embed_tokens.weight"]
    np.testing.assert_array_equal(lm.params["embedding"], table.astype(expected))
    assert lm(TOKENS).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["int8", "x", bool, "complex64"])
def test_unsupported_dtypes_are_refused(folder, dtype):
    assert "dtype" in refusal(folder, dtype=dtype)


# --- Saving ----------------------------------------------------------------------------------

SHAPES = {
    "grouped": dict(),
    "tied": dict(tie_word_embeddings=True),
    "biased": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=20, num_key_value_heads=4),
    "llama3": dict(rope_scaling=LLAMA3, rope_theta=5e5),
    "bfloat16": dict(dtype="bfloat16"),
    "gelu": dict(hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-3),
    "window": dict(model_type="mistral", sliding_window=3),
    "no window": dict(model_type="mistral", num_key_value_heads=1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_and_loaded_bit_for_bit(tmp_path, shape):
    words = tiny.word_tokenizer("an apple a day")
    lm = clm.load(tiny.save(tmp_path / "a", tokenizer=words, **SHAPES[shape]))
    clm.save(tmp_path / "b", lm)
    again = clm.load(tmp_path / "b")
    assert again.config == lm.config
    assert_same_params(again.params, lm.params)
    assert again.tokenizer.to_str() == lm.tokenizer.to_str()
    assert parts(tmp_path / "b")[1].keys() == parts(tmp_path / "a")[1].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "bfloat16"])
def test_transformers_loads_saved_models(tmp_path, shape):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = clm.load(tiny.save(tmp_path / "a", **SHAPES[shape]))
    clm.save(tmp_path / "b", lm)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())  # nothing missing, left over or misshapen
    assert parts(tmp_path / "b")[0]["architectures"] == [type(model).__name__]
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)[None]).logits[0].numpy()
    np.testing.assert_allclose(
        lm(TOKENS), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )


def test_bfloat16_checkpoints_round_trip_through_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    clm.save(tmp_path / "b", clm.load(tiny.save(tmp_path / "a", dtype="bfloat16")))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "c")
    assert_same_params(clm.load(tmp_path / "c").params, clm.load(tmp_path / "a").params)


def test_save_replaces_a_model_and_leaves_other_files(tmp_path, folder):
    old = tiny.save(tmp_path / "a", seed=7)
    (old / "notes.txt").write_text("mine")
    clm.save(old, clm.load(folder))
    assert_same_params(clm.load(old).params, clm.load(folder).params)
    names = ["config.json", "model.safetensors", "notes.txt"]
    assert sorted(p.name for p in old.iterdir()) == names


def test_saving_over_the_source_folder(tmp_path):
    folder = tiny.save(tmp_path / "a")
    lm = clm.load(folder)
    before = jax.tree.map(np.array, lm.params)
    clm.save(folder, lm)
    assert_same_params(clm.load(folder).params, before)
    assert_same_params(lm.params, before)


@pytest.mark.parametrize("wrong", ["missing", "left over", "shape"])
def test_save_refuses_a_tree_that_is_not_the_model_s(tmp_path, folder, wrong):
    lm = clm.load(folder)
    params = dict(lm.params)
    match wrong:
        case "missing":
            del params["head"]
        case "left over":
            params["extra"] = jnp.ones(1)
        case "shape":
            params["head"] = params["head"][1:]
    name = "extra" if wrong == "left over" else "head"
    with pytest.raises(clm.InputError, match=f"parameter {name} .*{wrong}"):
        clm.save(tmp_path / "b", clm.LanguageModel(clm.Transformer(lm.config), params))
    assert not list(tmp_path.iterdir())


def test_save_refuses_what_config_json_cannot_express(tmp_path):
    lm = clm.load(tiny.save(tmp_path / "a", "mistral", sliding_window=3))
    half = clm.TransformerConfig(**{**vars(lm.config), "window": 2.5})
    with pytest.raises(clm.InputError, match="mistral cannot express"):
        clm.save(tmp_path / "b", clm.LanguageModel(clm.Transformer(half), lm.params))
    assert not (tmp_path / "b").exists()


def test_save_to_a_folder_that_cannot_be_written(tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(clm.InputError, match="file/model"):
        clm.save(tmp_path / "file" / "model", clm.load(folder))


# --- What may be there, and what may not -----------------------------------------------------


def test_folder_without_a_tokenizer(folder):
    assert clm.load(folder).tokenizer is None


def test_tokenizer_that_is_larger_than_the_model(tmp_path):
    words = tiny.word_tokenizer("an apple a day")
    message = refusal(tiny.save(tmp_path / "x", tokenizer=words, vocab_size=3))
    assert "tokenizer.json has 6 tokens" in message
    assert "vocab_size is 3" in message


@pytest.mark.parametrize("name", ["layers.0.self_attn.rotary_emb", "rotary_emb"])
def test_stored_rotary_frequencies_are_ignored(tmp_path, folder, name):
    extra = {f"model.{name}.inv_freq": np.zeros(6, np.float32)}
    assert_same_params(
        clm.load(changed(tmp_path, folder, weights=extra)).params,
        clm.load(folder).params,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lm_head.bias", 64),
        ("model.layers.3.mlp.up_proj.weight", (80, 48)),  # one layer too many
        (
            "model.layers.0.self_attn.q_proj.bias",
            48,
        ),  # attention_bias says there is none
        ("model.layers.0.self_attn.q_norm.weight", 12),
        ("model.layers.0.mlp.up_proj.weight_scale", 1),
        ("x.inv_freq", 6),
    ],
)
def test_tensor_left_over(tmp_path, folder, name, value):
    message = refusal(
        changed(tmp_path, folder, weights={name: np.ones(value, np.float32)})
    )
    assert f"tensor {name} in model.safetensors is left over" in message


UNHANDLED = [
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "yarn"),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "dynamic"),
    ("rope_scaling", {"rope_type": "default", "mscale": 2.0}, "rope_scaling.mscale"),
    (
        "rope_scaling",
        {"partial_rotary_factor": 0.5},
        "rope_scaling.partial_rotary_factor",
    ),
    (
        "rope_scaling",
        {k: v for k, v in LLAMA3.items() if k != "factor"},
        "rope_scaling.factor",
    ),
    ("rope_scaling", LLAMA3 | {"factor": "8"}, "rope_scaling.factor"),
    ("rope_scaling", LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
    (
        "rope_parameters",
        {"full_attention": {"rope_theta": 1e4}},
        "rope_parameters.full_attention",
    ),
    ("rope_scaling", "yarn", "rope_scaling"),
    ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
    ("attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
    ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("sliding_window", 4, "sliding_window"),  # of Mistral, not of Llama
    ("layer_types", ["sliding_attention"] * 3, "layer_types"),
    ("use_qk_norm", True, "use_qk_norm"),
    ("made_up", 0, "made_up"),
    ("hidden_act", "tanh", "hidden_act"),
    ("model_type", "mamba", "model_type"),
    ("torch_dtype", "int8", "dtype"),
]


@pytest.mark.parametrize(("field", "value", "named"), UNHANDLED)
def test_field_that_is_not_handled(tmp_path, folder, field, value, named):
    wrong = changed(tmp_path, folder, **{field: value})
    message = refusal(wrong)
    assert named in message
    assert str(wrong / "config.json") in message


@pytest.mark.parametrize("field", ["sliding_window", "num_key_value_heads"])
def test_mistral_defaults_are_not_guessed(tmp_path, field):
    folder = tiny.save(tmp_path / "x", "mistral")
    assert f"field {field} is missing" in refusal(changed(tmp_path, folder, field))


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_mistral_has_no_biases(tmp_path, field):
    folder = tiny.save(tmp_path / "x", "mistral")
    assert f"field {field} is True" in refusal(
        changed(tmp_path, folder, **{field: True})
    )


def test_ignored_fields_are_the_listed_ones(tmp_path, folder):
    extra = changed(tmp_path, folder, made_up=3, other=4)
    assert "field made_up (3) is not handled" in refusal(extra)
    assert "field other (4) is not handled" in refusal(extra, ignore_fields=["made_up"])
    lm = clm.load(extra, ignore_fields=["made_up", "other"])
    assert_same_params(lm.params, clm.load(folder).params)


def test_two_thetas_must_agree(tmp_path, folder):
    twice = changed(
        tmp_path, folder, rope_theta=1e4, rope_parameters={"rope_theta": 5e5}
    )
    assert "rope_theta (10000.0) and rope_parameters.rope_theta (500000.0)" in refusal(
        twice
    )
    both = changed(
        tmp_path, folder, rope_scaling=LLAMA3, rope_parameters={"rope_theta": 1e4}
    )
    assert "rope_scaling and rope_parameters" in refusal(both)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-model", "'no-such-model' is neither a folder nor a bundled model"),
        ("../bundled", "neither"),
        ("x" * 300, "neither"),
        (str(REPOSITORY_ROOT / "pyproject.toml"), "pyproject.toml is a file"),
    ],
)
def test_unknown_model_names_are_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(name)


def test_folder_without_a_config(tmp_path):
    assert f"{tmp_path / 'config.json'} is missing" in refusal(tmp_path)


# --- Random fields ---------------------------------------------------------------------------

INERT = ("initializer_range", "max_position_embeddings")
FIELDS = sorted(
    {*tiny.llama_config(), "rope_theta", "model_type", "torch_dtype"} - {*INERT}
)


@pytest.mark.parametrize("field", INERT)
@pytest.mark.parametrize("value", [0, "x"])
def test_fields_without_effect_may_have_any_value(tmp_path, folder, field, value):
    assert (
        clm.load(changed(tmp_path, folder, **{field: value})).config
        == clm.load(folder).config
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=0, max_value=64)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(list(LLAMA3)), inner, max_size=4
        )
    ),
    max_leaves=6,
)
ANY_FIELD = [*FIELDS, "dtype", "rope_scaling", "rope_parameters", "sliding_window", "x"]


@given(
    st.sampled_from(["llama", "mistral"]),
    st.dictionaries(st.sampled_from(ANY_FIELD), json_values, max_size=3),
    st.dictionaries(st.sampled_from(list(LLAMA3)), json_values, max_size=2),
)
def test_config_of_any_json_is_read_or_refused(model_type, fields, scaling):
    base = {
        "model_type": model_type,
        **tiny.CONFIG_MAKERS[model_type](rope_scaling=LLAMA3 | scaling),
    }
    try:
        config = trunk.read_config(base | fields)
    except clm.InputError:
        return
    assert isinstance(config, clm.TransformerConfig)
    assert math.isfinite(config.rope.theta)
    assert math.isfinite(config.norm_eps)
    assert hash(config) is not None  # a static argument of jit


# --- Devices and memory ----------------------------------------------------------------------

MESH_PROGRAM = """
import sys
import jax, numpy as np
import continuous_lm as clm

NAMES = ("data", "model")
MESHES = {
    "make_mesh": lambda: jax.make_mesh((2, 4), NAMES),
    "Mesh": lambda: jax.sharding.Mesh(np.reshape(jax.devices(), (2, 4)), NAMES),
}
SHARDED = {  # what one device of the eight holds, of the axes that are split
    "embedding": "V D",
    "head": "V D",
    "final_norm/scale": "D",
    "layers/attention/q": "L N H D",
    "layers/attention/k": "L K H D",
    "layers/attention/o": "L D N H",
    "layers/mlp/gate": "L F D",
    "layers/mlp/down": "L D F",
    "layers/mlp_norm/scale": "L D",
}
SIZES = {"V": 64 // 4, "D": 48, "L": 3, "N": 4 // 4, "K": 1,  # one of four, or the only one
         "H": 12, "F": 80 // 4}

assert jax.device_count() == 8
lm = clm.load(sys.argv[1], mesh=MESHES[sys.argv[2]]())
for path, axes in SHARDED.items():
    leaf = lm.params
    for key in path.split("/"):
        leaf = leaf[key]
    held = [shard.data.shape for shard in leaf.addressable_shards]
    assert held == [tuple(SIZES[a] for a in axes.split())] * 8, (path, held)

tokens, durations = np.arange(24).reshape(2, 12), np.linspace(0.1, 2, 12)
a = np.asarray(clm.load(sys.argv[1])(tokens, durations=durations))
b = lm(tokens, durations=durations)
assert len(b.sharding.device_set) == 8
print(np.abs(a).max(), np.abs(a - np.asarray(b)).max())
"""


@pytest.mark.parametrize(
    ("mesh", "num_kv_heads"),
    [("make_mesh", 1), pytest.param("Mesh", 4, marks=pytest.mark.slow)],
)
def test_sharded_over_eight_devices(tmp_path, mesh, num_kv_heads):
    folder = tiny.save(tmp_path / "x", num_key_value_heads=num_kv_heads)
    output = many_devices.run_on_devices(MESH_PROGRAM, 8, str(folder), mesh)
    largest, difference = map(float, output.split())
    assert largest > 1
    assert difference <= 1e-5


MEMORY_PROGRAM = """
import pathlib, sys
import jax, numpy as np
from continuous_lm.models.transformer import parameter_table
from continuous_lm.models.checkpoints import trunk
import continuous_lm as clm

dtype = sys.argv[1]
for folder in sys.argv[2:]:  # the first is tiny: everything is imported and warm after it
    print("ready", flush=True)
    sys.stdin.readline()
    lm = clm.load(folder, dtype=dtype)
    jax.block_until_ready(lm.params)
    print(sum(x.nbytes for x in jax.tree.leaves(lm.params)), flush=True)
    sys.stdin.readline()
"""


def quickly(folder, model_type, dtype, **fields):
    """Saves a large checkpoint in shards; its tensors are made of one block of random numbers."""
    fields = {"model_type": model_type, "dtype": dtype} | tiny.CONFIG_MAKERS[
        model_type
    ](**fields)
    config, dtype = trunk.read_config(fields), np.dtype(dtype)
    block = np.random.default_rng(0).standard_normal(100_003).astype(dtype)
    shapes = trunk.parameter_layout(config).tensor_shapes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors_files.save_tensors(
        folder,
        shapes,
        dtype,
        lambda name: np.resize(block, shapes[name]),
        shard_size=500_000_000,
    )
    return folder


LARGE = {
    "llama": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, vocab_size=32000,
        head_dim=64, num_attention_heads=32, num_key_value_heads=4,
    ),
    "phi3": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, vocab_size=16000,
        head_dim=64, num_attention_heads=16, num_key_value_heads=4,
    ),
    "gpt_neox": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, vocab_size=16000,
        num_attention_heads=16,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("model_type", "dtype", "least"),
    [
        ("llama", "bfloat16", 2e9),
        ("phi3", "bfloat16", 3e8),
        ("phi3", "float32", 6e8),
        ("gpt_neox", "float32", 6e8),
    ],
)
def test_loading_holds_no_second_copy(tmp_path, model_type, dtype, least):
    """Anonymous memory (pages not of a file) peaks at 1.05 times the weights, cast or not."""
    large = quickly(tmp_path / "large", model_type, "bfloat16", **LARGE[model_type])
    process = many_devices.start(
        MEMORY_PROGRAM, dtype, tiny.save(tmp_path / "small"), large
    )
    status = pathlib.Path(f"/proc/{process.pid}/status")

    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024

    def go():
        process.stdin.write("\n")
        process.stdin.flush()

    with process:
        assert process.stdout.readline() == "ready\n"
        go(), process.stdout.readline(), go()
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous()
        os.set_blocking(process.stdout.fileno(), False)
        go()
        while not (line := process.stdout.readline()):
            assert process.poll() is None
            peak = max(peak, anonymous())
            time.sleep(0.001)
        peak = max(peak, anonymous())
        go()
    weights, ratio = int(line), (peak - before) / int(line)
    print(
        f"{model_type} to {dtype}: {weights / 1e9:.2f} GB of weights, peak {ratio:.3f} times that"
    )
    assert weights > least
    assert 1 <= ratio <= 1.05


def test_with_execution_changes_only_how_a_model_is_computed():
    lm = clm.load("apples", dtype="float32")
    other = lm.with_execution(implementation="blocked", remat=True)
    assert (other.model.implementation, other.model.remat) == ("blocked", True)
    assert lm.model.remat is False
    assert other.params is lm.params
    tokens = np.arange(1, 9)
    durations = np.linspace(0.3, 1.5, 8)
    expected = lm(tokens, durations=durations)
    logits = other(tokens, durations=durations)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    config = AutoencoderConfig(
        vocab_size=8,
        hidden_size=8,
        mlp_size=8,
        encoder_layers=2,
        decoder_layers=2,
        latent_size=4,
        chunk_size=2,
    )
    autoencoder_lm = clm.LanguageModel(autoencoder.Autoencoder(config), {})
    with pytest.raises(clm.InputError, match="remat is not a setting of Autoencoder"):
        autoencoder_lm.with_execution(remat=True)


def test_parameters_of_init_are_unboxed(tmp_path):
    config = clm.TransformerConfig(
        vocab_size=11,
        hidden_size=8,
        mlp_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    model = clm.Transformer(config)
    variables = jax.jit(model.init)(jax.random.key(0), np.arange(3))
    lm = clm.LanguageModel(model, variables["params"])
    logits = jax.jit(model.apply)(variables, np.arange(3))
    np.testing.assert_allclose(lm(np.arange(3)), logits, atol=1e-6)
    clm.save(tmp_path, lm)
    np.testing.assert_allclose(clm.load(tmp_path)(np.arange(3)), logits, atol=1e-6)
    tokens = clm.generate(lm, [1, 2], max_new_tokens=1).tokens
    assert tokens[0, 0] == np.argmax(lm([1, 2])[-1])


def test_captured_names_may_be_a_list():
    lm = clm.load("apples")
    captured = lm.forward([1, 2], capture=["mlp_input"]).captured
    assert set(captured) == {"mlp_input"}
    with pytest.raises(clm.InputError, match="capture is 'mlp_input'; it must be a"):
        lm.forward([1, 2], capture="mlp_input")


def test_models_without_a_tokenizer_have_none(tmp_path):
    lm = clm.load("apples")
    clm.save(tmp_path, lm)
    assert clm.load(tmp_path).tokenizer is not None
    clm.save(tmp_path, clm.LanguageModel(lm.model, lm.params))
    assert clm.load(tmp_path).tokenizer is None
