"""Gemma (Mesnard et al., arXiv:2403.08295): norms by 1 + w, embeddings by sqrt(D)."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.shared_fields import (
    read_activation,
    read_common_fields,
    require_fields,
    write_common_fields,
)


def read_gemma_fields(fields: ConfigFields) -> dict[str, Any]:
    """Return the settings that all Gemmas share, as arguments of `TransformerConfig`."""
    require_fields(fields, "head_dim", "num_key_value_heads")
    fields.must_be("attention_bias", False)
    fields.must_be("use_bidirectional_attention", None, False)
    common_fields = read_common_fields(fields, default_tied=True)
    # The first releases' "gelu" meant the tanh approximation; a later field overrules it.
    activation_field = (
        "hidden_activation" if fields.get("hidden_activation", None) else "hidden_act"
    )
    activation = read_activation(fields, activation_field, "gelu_pytorch_tanh")
    if activation_field == "hidden_act" and activation == "gelu":
        activation = "gelu_tanh"
    return (
        common_fields
        | {"activation": activation}
        | {"norm": "rms_plus_one", "scale_embeddings": True}
    )


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json."""
    return TransformerConfig(
        family="gemma", **read_gemma_fields(fields), rope=read_rope(fields)
    )


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_common_fields,
    architecture="GemmaForCausalLM",
)
