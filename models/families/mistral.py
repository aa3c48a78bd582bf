"""Mistral (Jiang et al., arXiv:2310.06825): Llama's tensors, and a sliding window in early ones."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.shared_fields import (
    read_common_fields,
    require_fields,
    write_common_fields,
)


def read_config(fields: ConfigFields) -> TransformerConfig:
    """Read a Mistral config: Llama's fields, and sliding_window in tokens, null for none."""
    require_fields(fields, "sliding_window", "num_key_value_heads")
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    window = fields.number("sliding_window", None)
    return TransformerConfig(
        family="mistral",
        **read_common_fields(fields),
        rope=read_rope(fields),
        window=None if window is None else float(window),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    window = None if config.window is None else int(config.window)
    return write_common_fields(config) | {"sliding_window": window}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    architecture="MistralForCausalLM",
)
