"""Llama 2, 3, 3.1, 3.2 (Touvron et al., arXiv:2307.09288; Grattafiori et al., arXiv:2407.21783)."""

from typing import Any

from continuous_lm.models.checkpoints.config_fields import Fields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import Stored
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families.family import Family
from continuous_lm.models.families.shared_fields import read_shape, write_shape


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json, in either of its styles."""
    attention_bias = fields.flag("attention_bias", False)
    return TransformerConfig(
        family="llama",
        **read_shape(fields),
        rope=read_rope(fields),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_shape(config) | biases


_LAYER = "model.layers.{layer}."

TENSORS = {
    "embedding": Stored("model.embed_tokens.weight", "V D"),
    "layers/attention_norm/scale": Stored(_LAYER + "input_layernorm.weight", "D"),
    "layers/attention/q": Stored(_LAYER + "self_attn.q_proj.weight", "(N H) D"),
    "layers/attention/k": Stored(_LAYER + "self_attn.k_proj.weight", "(K H) D"),
    "layers/attention/v": Stored(_LAYER + "self_attn.v_proj.weight", "(K H) D"),
    "layers/attention/o": Stored(_LAYER + "self_attn.o_proj.weight", "D (N H)"),
    "layers/attention/q_bias": Stored(_LAYER + "self_attn.q_proj.bias", "(N H)"),
    "layers/attention/k_bias": Stored(_LAYER + "self_attn.k_proj.bias", "(K H)"),
    "layers/attention/v_bias": Stored(_LAYER + "self_attn.v_proj.bias", "(K H)"),
    "layers/attention/o_bias": Stored(_LAYER + "self_attn.o_proj.bias", "D"),
    "layers/mlp_norm/scale": Stored(_LAYER + "post_attention_layernorm.weight", "D"),
    "layers/mlp/gate": Stored(_LAYER + "mlp.gate_proj.weight", "F D"),
    "layers/mlp/up": Stored(_LAYER + "mlp.up_proj.weight", "F D"),
    "layers/mlp/down": Stored(_LAYER + "mlp.down_proj.weight", "D F"),
    "layers/mlp/gate_bias": Stored(_LAYER + "mlp.gate_proj.bias", "F"),
    "layers/mlp/up_bias": Stored(_LAYER + "mlp.up_proj.bias", "F"),
    "layers/mlp/down_bias": Stored(_LAYER + "mlp.down_proj.bias", "D"),
    "final_norm/scale": Stored("model.norm.weight", "D"),
    "head": Stored("lm_head.weight", "V D"),
}

FAMILY = Family(
    read_config,
    write_config,
    TENSORS,
    architecture="LlamaForCausalLM",
    ignored=(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"model\.rotary_emb\.inv_freq",
    ),
)
