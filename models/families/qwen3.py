"""Qwen 3 (Yang et al., arXiv:2505.09388): norms of each head of q and k."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import Fields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import Stored
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.qwen2 import read_sliding, write_sliding
from continuous_lm.models.families.shared_fields import read_shape, require, write_shape


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json."""
    require(fields, "num_key_value_heads", "head_dim")
    shape, bias = read_shape(fields), fields.flag("attention_bias", False)
    return TransformerConfig(
        family="qwen3",
        **shape,
        **read_sliding(fields, shape["num_layers"]),
        rope=read_rope(fields),
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    bias = {"attention_bias": config.qkv_bias}
    return write_shape(config) | write_sliding(config) | bias


QK_NORMS = {
    "layers/attention/q_norm/scale": Stored("model.layers.{layer}.self_attn.q_norm.weight", "H"),
    "layers/attention/k_norm/scale": Stored("model.layers.{layer}.self_attn.k_norm.weight", "H"),
}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | QK_NORMS,
    architecture="Qwen3ForCausalLM",
)
