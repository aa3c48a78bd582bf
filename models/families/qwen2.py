"""Qwen 2 and 2.5 (Yang et al., arXiv:2407.10671): Llama with biases of q, k and v."""

import dataclasses
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.shared_fields import (
    read_common_fields,
    read_windows,
    require_fields,
    write_common_fields,
    write_windows,
)


def read_qwen_windows(fields: ConfigFields, num_layers: int) -> dict[str, Any]:
    """Read the window of the layers from max_window_layers on, if use_sliding_window is true."""
    fields.must_be("use_mrope", False)
    has_windows, first_windowed = (
        fields.flag("use_sliding_window", False),
        fields.get("max_window_layers", 28),
    )
    if isinstance(first_windowed, bool) or not isinstance(first_windowed, int):
        raise InputError(
            f"field max_window_layers is {first_windowed!r:.60}; it must be an integer"
        )
    if has_windows:
        require_fields(fields, "sliding_window")
    windows = read_windows(
        fields, num_layers, lambda layer: has_windows and layer >= first_windowed
    )
    if not has_windows and any(windows.get("window_pattern", ())):
        raise InputError(
            "field layer_types has windows, but use_sliding_window is false"
        )
    return windows if has_windows else {}


def write_qwen_windows(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_qwen_windows`."""
    return write_windows(config) | {"use_sliding_window": config.window is not None}


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json."""
    require_fields(fields, "num_key_value_heads")
    common_fields = read_common_fields(fields)
    return TransformerConfig(
        family="qwen2",
        **common_fields,
        **read_qwen_windows(fields, common_fields["num_layers"]),
        rope=read_rope(fields),
        qkv_bias=True,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_common_fields(config) | write_qwen_windows(config)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    architecture="Qwen2ForCausalLM",
)
