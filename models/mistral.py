"""Mistral (Jiang et al., arXiv:2310.06825): Llama's tensors, and a sliding window in early ones."""

import dataclasses
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models import llama
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.family import Fields


def read_config(fields: Fields) -> TransformerConfig:
    """As Llama's; sliding_window is a distance in tokens, null for none."""
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    for name in ("sliding_window", "num_key_value_heads"):
        if (
            name not in fields
        ):  # the defaults that readers fill in differ from Llama's; do not guess
            raise InputError(f"field {name} is missing; write it down, null for none")
    window = fields.number("sliding_window", None)
    return dataclasses.replace(
        llama.read_config(fields),
        family="mistral",
        window=None if window is None else float(window),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    fields = llama.write_config(config)
    del fields["attention_bias"], fields["mlp_bias"]
    return {**fields, "sliding_window": None if config.window is None else int(config.window)}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    architecture="MistralForCausalLM",
)
