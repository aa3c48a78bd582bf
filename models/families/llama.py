"""Llama 2, 3, 3.1, 3.2 (Touvron et al., arXiv:2307.09288; Grattafiori et al., arXiv:2407.21783)."""

from typing import Any

from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families.family import Family
from continuous_lm.models.families.shared_fields import (
    read_common_fields,
    write_common_fields,
)


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json, in either of its styles."""
    attention_bias = fields.flag("attention_bias", False)
    return TransformerConfig(
        family="llama",
        **read_common_fields(fields),
        rope=read_rope(fields),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    bias_fields = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_common_fields(config) | bias_fields


_LAYER_PREFIX = "model.layers.{layer}."

TENSORS = {
    "embedding": StoredTensor("model.embed_tokens.weight", "V D"),
    "layers/attention_norm/scale": StoredTensor(
        _LAYER_PREFIX + "input_layernorm.weight", "D"
    ),
    "layers/attention/q": StoredTensor(
        _LAYER_PREFIX + "self_attn.q_proj.weight", "(N H) D"
    ),
    "layers/attention/k": StoredTensor(
        _LAYER_PREFIX + "self_attn.k_proj.weight", "(K H) D"
    ),
    "layers/attention/v": StoredTensor(
        _LAYER_PREFIX + "self_attn.v_proj.weight", "(K H) D"
    ),
    "layers/attention/o": StoredTensor(
        _LAYER_PREFIX + "self_attn.o_proj.weight", "D (N H)"
    ),
    "layers/attention/q_bias": StoredTensor(
        _LAYER_PREFIX + "self_attn.q_proj.bias", "(N H)"
    ),
    "layers/attention/k_bias": StoredTensor(
        _LAYER_PREFIX + "self_attn.k_proj.bias", "(K H)"
    ),
    "layers/attention/v_bias": StoredTensor(
        _LAYER_PREFIX + "self_attn.v_proj.bias", "(K H)"
    ),
    "layers/attention/o_bias": StoredTensor(
        _LAYER_PREFIX + "self_attn.o_proj.bias", "D"
    ),
    "layers/mlp_norm/scale": StoredTensor(
        _LAYER_PREFIX + "post_attention_layernorm.weight", "D"
    ),
    "layers/mlp/gate": StoredTensor(_LAYER_PREFIX + "mlp.gate_proj.weight", "F D"),
    "layers/mlp/up": StoredTensor(_LAYER_PREFIX + "mlp.up_proj.weight", "F D"),
    "layers/mlp/down": StoredTensor(_LAYER_PREFIX + "mlp.down_proj.weight", "D F"),
    "layers/mlp/gate_bias": StoredTensor(_LAYER_PREFIX + "mlp.gate_proj.bias", "F"),
    "layers/mlp/up_bias": StoredTensor(_LAYER_PREFIX + "mlp.up_proj.bias", "F"),
    "layers/mlp/down_bias": StoredTensor(_LAYER_PREFIX + "mlp.down_proj.bias", "D"),
    "final_norm/scale": StoredTensor("model.norm.weight", "D"),
    "head": StoredTensor("lm_head.weight", "V D"),
}

FAMILY = Family(
    read_config,
    write_config,
    TENSORS,
    architecture="LlamaForCausalLM",
    ignored_tensors=(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"model\.rotary_emb\.inv_freq",
    ),
)
