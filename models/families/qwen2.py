"""Qwen 2 and 2.5 (Yang et al., arXiv:2407.10671): Llama with biases of q, k and v."""

import dataclasses
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import Fields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.shared_fields import (
    read_shape,
    read_windows,
    require,
    write_shape,
    write_windows,
)


def read_sliding(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Windows: of the layers from max_window_layers on, if use_sliding_window says so."""
    fields.must_be("use_mrope", False)
    slides, first = fields.flag("use_sliding_window", False), fields.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int):
        raise InputError(f"field max_window_layers is {first!r:.60}; it must be an integer")
    if slides:
        require(fields, "sliding_window")
    windows = read_windows(fields, num_layers, lambda layer: slides and layer >= first)
    if not slides and any(windows.get("window_pattern", ())):
        raise InputError("field layer_types has windows, but use_sliding_window is false")
    return windows if slides else {}


def write_sliding(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_sliding`."""
    return write_windows(config) | {"use_sliding_window": config.window is not None}


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json."""
    require(fields, "num_key_value_heads")
    shape = read_shape(fields)
    return TransformerConfig(
        family="qwen2",
        **shape,
        **read_sliding(fields, shape["num_layers"]),
        rope=read_rope(fields),
        qkv_bias=True,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_shape(config) | write_sliding(config)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    architecture="Qwen2ForCausalLM",
)
