"""Gemma 3, text (Kamath et al., arXiv:2503.19786): q and k normed, two rotary bases."""

import dataclasses
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import Fields
from continuous_lm.models.checkpoints.rope_fields import read_rope, read_rope_parameters, write_rope
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import gemma2, llama, qwen3
from continuous_lm.models.families.gemma import read_gemma
from continuous_lm.models.families.shared_fields import read_windows
from continuous_lm.rotary import Rope


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json."""
    shape = read_gemma(fields)
    everywhere, local = _read_ropes(fields)
    return TransformerConfig(
        family="gemma3_text",
        **shape,
        **gemma2.read_caps(fields),
        **_read_windows(fields, shape["num_layers"]),
        rope=everywhere,
        local_rope=local,
        post_norms=True,
        qk_norm=True,
    )


def _read_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Windows in all layers but every sixth, or as given; layer_types go first.

    Writers put a pattern of 6 next to any layer_types.
    """
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    given = [fields.integer(name, None) for name in names]
    fields.agree(names[0], given[0], names[1], given[1])
    every = given[0] or given[1] or 6
    regular = tuple((layer + 1) % every != 0 for layer in range(num_layers))
    return read_windows(fields, num_layers, regular.__getitem__)


def _read_ropes(fields: Fields) -> tuple[Rope, Rope]:
    """Of layers without a window, and of those with one."""
    parameters = fields.nested("rope_parameters")
    if parameters is None:
        local = Rope(theta=float(fields.number("rope_local_base_freq", 10_000.0)))
        return read_rope(fields, theta=1e6), local
    inner = [parameters.nested(name) for name in ("full_attention", "sliding_attention")]
    parameters.finish()
    ropes = [
        read_rope_parameters(one, fields, None, theta)
        for one, theta in zip(inner, (1e6, 1e4), strict=True)
        if one is not None
    ]
    if len(ropes) != 2:
        raise InputError("field rope_parameters needs full_attention and sliding_attention")
    return ropes[0], ropes[1]


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    ropes = {"full_attention": config.rope, "sliding_attention": config.local_rope}
    inner = {name: write_rope(rope)["rope_parameters"] for name, rope in ropes.items()}
    return gemma2.write_config(config) | {"rope_parameters": inner}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | gemma2.NORMS | qwen3.QK_NORMS,
    architecture="Gemma3ForCausalLM",
)
