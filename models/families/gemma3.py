"""Gemma 3, text (Kamath et al., arXiv:2503.19786): q and k normed, two rotary bases."""

import dataclasses
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import (
    read_rope,
    read_rope_parameters,
    write_rope,
)
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import gemma2, llama, qwen3
from continuous_lm.models.families.gemma import read_gemma_fields
from continuous_lm.models.families.shared_fields import read_windows
from continuous_lm.rotary import Rope


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json."""
    common_fields = read_gemma_fields(fields)
    global_rope, local_rope = _read_ropes(fields)
    return TransformerConfig(
        family="gemma3_text",
        **common_fields,
        **gemma2.read_scale_and_softcaps(fields),
        **_read_windows(fields, common_fields["num_layers"]),
        rope=global_rope,
        local_rope=local_rope,
        post_norms=True,
        qk_norm=True,
    )


def _read_windows(fields: ConfigFields, num_layers: int) -> dict[str, Any]:
    """Windows in all layers but every sixth, or as given; layer_types go first.

    Writers put a pattern of 6 next to any layer_types.
    """
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    periods = [fields.integer(name, None) for name in names]
    fields.check_equal(names[0], periods[0], names[1], periods[1])
    period = periods[0] or periods[1] or 6
    is_windowed = tuple((layer + 1) % period != 0 for layer in range(num_layers))
    return read_windows(fields, num_layers, is_windowed.__getitem__)


def _read_ropes(fields: ConfigFields) -> tuple[Rope, Rope]:
    """Return the ropes of layers without a window and of layers with one."""
    parameters = fields.nested("rope_parameters")
    if parameters is None:
        local_rope = Rope(theta=float(fields.number("rope_local_base_freq", 10_000.0)))
        return read_rope(fields, default_theta=1e6), local_rope
    rope_objects = [
        parameters.nested(name) for name in ("full_attention", "sliding_attention")
    ]
    parameters.check_all_read()
    ropes = [
        read_rope_parameters(rope_fields, fields, None, theta)
        for rope_fields, theta in zip(rope_objects, (1e6, 1e4), strict=True)
        if rope_fields is not None
    ]
    if len(ropes) != 2:
        raise InputError(
            "field rope_parameters needs full_attention and sliding_attention"
        )
    return ropes[0], ropes[1]


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    ropes = {"full_attention": config.rope, "sliding_attention": config.local_rope}
    rope_parameters = {
        name: write_rope(rope)["rope_parameters"] for name, rope in ropes.items()
    }
    return gemma2.write_config(config) | {"rope_parameters": rope_parameters}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | gemma2.NORM_TENSORS | qwen3.QK_NORM_TENSORS,
    architecture="Gemma3ForCausalLM",
)
