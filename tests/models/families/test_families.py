"""Fields of config.json that the parity of logits does not test."""

import jax.numpy as jnp
import pytest

import continuous_lm as clm
from continuous_lm.models.checkpoints.trunk import read_config
from continuous_lm.models.families.registry import FAMILIES
from continuous_lm.models.transformer import parameter_table
from continuous_lm.rotary import LongRope
from tests.fixtures import tiny


def read(family, *without, **changes):
    fields = tiny.CONFIG_MAKERS[family](**changes) | {"model_type": family}
    return read_config({k: v for k, v in fields.items() if k not in without})


@pytest.mark.parametrize("family", FAMILIES)
def test_written_tensors_are_read_back(family):
    config = read(family)
    written = FAMILIES[family].write_config(config) | {"model_type": family}
    assert read_config(written) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_the_table(family):
    config = read(family)
    assert set(parameter_table(config)) <= set(FAMILIES[family].tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", ["x", 0, -1, 1e99, [], {}, True, [[1]]], ids=str)
def test_every_field_is_read_or_refused(family, value):
    """Whatever stands in a field: a config or an InputError, never another exception."""
    for name in tiny.CONFIG_MAKERS[family]():
        try:
            read(family, **{name: value})
        except clm.InputError:
            continue


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_fields_of_config_are_refused(family):
    with pytest.raises(clm.InputError, match="made_up"):
        read(family, made_up=1)


def test_gelu_of_early_gemma_is_the_tanh_approximation():
    assert read("gemma", hidden_act="gelu").activation == "gelu_tanh"
    assert (
        read("gemma", hidden_act="gelu", hidden_activation="gelu").activation == "gelu"
    )
    with pytest.raises(clm.InputError, match="hidden_activation"):
        read("llama", hidden_activation="gelu")


@pytest.mark.parametrize(
    ("extra", "amplitude"),
    [({}, 1.44305), ({"factor": 2.0}, 1.10967), ({"attention_factor": 1.5}, 1.5)],
)
def test_longrope_amplitude(extra, amplitude):
    """sqrt(1 + log(s) / log(20)), s = 512 / 20 or the factor; or as given."""
    lengths = {"original_max_position_embeddings": 20, "max_position_embeddings": 512}
    scaling = read(
        "phi3", rope_parameters=tiny.longrope_scaling(**extra), **lengths
    ).rope.scaling
    assert isinstance(scaling, LongRope)
    assert scaling.attention_factor == pytest.approx(amplitude, abs=1e-4)


def test_longrope_factors_must_fit_the_heads():
    with pytest.raises(clm.InputError, match="lists of 6"):
        read(
            "phi3",
            rope_parameters=tiny.longrope_scaling(long_factor=[1.0]),
            original_max_position_embeddings=20,
        )


def test_longrope_switches_by_the_number_of_tokens_alone():
    rope = read(
        "phi3",
        rope_parameters=tiny.longrope_scaling(),
        original_max_position_embeddings=20,
    ).rope
    short = clm.rotary.angles(jnp.linspace(0.0, 900.0, 20), rope, 12)
    long = clm.rotary.angles(jnp.linspace(0.0, 900.0, 21), rope, 12)
    assert float(short[-1, -1]) > 3 * float(long[-1, -1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": 7},
            "layer_types",
        ),
        ({"layer_types": [["x"]] * 3}, "layer_types"),
        ({"max_window_layers": "x"}, "max_window_layers"),
        ({"use_mrope": True}, "use_mrope"),
    ],
)
def test_windows_of_qwen_that_make_no_sense_are_named(changes, message):
    with pytest.raises(clm.InputError, match=message):
        read("qwen2", **changes)


def test_qwen_requires_a_window_if_it_uses_windows():
    with pytest.raises(clm.InputError, match="sliding_window is missing"):
        read("qwen2", "sliding_window", use_sliding_window=True)


def test_float64_needs_x64(tmp_path):
    tiny.save(tmp_path)
    with pytest.raises(clm.InputError, match="jax_enable_x64"):
        clm.load(tmp_path, dtype="float64")
