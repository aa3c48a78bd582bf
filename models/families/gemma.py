"""Gemma (Mesnard et al., arXiv:2403.08295): norms by 1 + w, embeddings by sqrt(D)."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import Fields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.shared_fields import (
    read_activation,
    read_shape,
    require,
    write_shape,
)


def read_gemma(fields: Fields) -> dict[str, Any]:
    """What all Gemmas share, as arguments of `TransformerConfig`."""
    require(fields, "head_dim", "num_key_value_heads")
    fields.must_be("attention_bias", False)
    fields.must_be("use_bidirectional_attention", None, False)
    shape = read_shape(fields, tied=True)
    # The first releases' "gelu" meant the tanh approximation; a later field overrules it.
    given = "hidden_activation" if fields.get("hidden_activation", None) else "hidden_act"
    activation = read_activation(fields, given, "gelu_pytorch_tanh")
    if given == "hidden_act" and activation == "gelu":
        activation = "gelu_tanh"
    return shape | {"activation": activation} | {"norm": "rms_plus_one", "scale_embeddings": True}


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json."""
    return TransformerConfig(family="gemma", **read_gemma(fields), rope=read_rope(fields))


FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_shape,
    architecture="GemmaForCausalLM",
)
