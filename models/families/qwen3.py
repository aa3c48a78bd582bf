"""Qwen 3 (Yang et al., arXiv:2505.09388): norms of each head of q and k."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.qwen2 import read_qwen_windows, write_qwen_windows
from continuous_lm.models.families.shared_fields import (
    read_common_fields,
    require_fields,
    write_common_fields,
)


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json."""
    require_fields(fields, "num_key_value_heads", "head_dim")
    common_fields, attention_bias = (
        read_common_fields(fields),
        fields.flag("attention_bias", False),
    )
    return TransformerConfig(
        family="qwen3",
        **common_fields,
        **read_qwen_windows(fields, common_fields["num_layers"]),
        rope=read_rope(fields),
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    bias_fields = {"attention_bias": config.qkv_bias}
    return write_common_fields(config) | write_qwen_windows(config) | bias_fields


QK_NORM_TENSORS = {
    "layers/attention/q_norm/scale": StoredTensor(
        "model.layers.{layer}.self_attn.q_norm.weight", "H"
    ),
    "layers/attention/k_norm/scale": StoredTensor(
        "model.layers.{layer}.self_attn.k_norm.weight", "H"
    ),
}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | QK_NORM_TENSORS,
    architecture="Qwen3ForCausalLM",
)
