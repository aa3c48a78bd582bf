"""GPT-2 (Radford et al., 2019): learned positions, sampled between their rows at real times."""

from typing import Any

from continuous_lm.models.checkpoints.config_fields import MAX_LAYERS, ConfigFields
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families.family import Family
from continuous_lm.models.families.shared_fields import (
    default_head_dim,
    read_activation,
    write_activation,
)


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json."""
    for name, required in _REQUIRED_VALUES.items():
        fields.must_be(name, required)
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    return TransformerConfig(
        family="gpt2",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        mlp_size=fields.integer("n_inner", 4 * hidden_size),
        num_layers=fields.integer("n_layer", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=default_head_dim(hidden_size, num_heads, "n_embd", "n_head"),
        norm="layer",
        norm_eps=float(fields.number("layer_norm_epsilon", 1e-5)),
        activation=read_activation(fields, "activation_function", "gelu_new"),
        gated=False,
        rope=None,
        max_positions=fields.integer("n_positions"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


_REQUIRED_VALUES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.mlp_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": write_activation(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
    }


_LAYER_PREFIX = "transformer.h.{layer}."

TENSORS = {
    "embedding": StoredTensor("transformer.wte.weight", "V D"),
    "positions": StoredTensor("transformer.wpe.weight", "M D"),
    "layers/attention_norm/scale": StoredTensor(_LAYER_PREFIX + "ln_1.weight", "D"),
    "layers/attention_norm/bias": StoredTensor(_LAYER_PREFIX + "ln_1.bias", "D"),
    "layers/attention/q": StoredTensor(
        _LAYER_PREFIX + "attn.c_attn.weight", "D (3 N H)", 0
    ),
    "layers/attention/k": StoredTensor(
        _LAYER_PREFIX + "attn.c_attn.weight", "D (3 K H)", 1
    ),
    "layers/attention/v": StoredTensor(
        _LAYER_PREFIX + "attn.c_attn.weight", "D (3 K H)", 2
    ),
    "layers/attention/q_bias": StoredTensor(
        _LAYER_PREFIX + "attn.c_attn.bias", "(3 N H)", 0
    ),
    "layers/attention/k_bias": StoredTensor(
        _LAYER_PREFIX + "attn.c_attn.bias", "(3 K H)", 1
    ),
    "layers/attention/v_bias": StoredTensor(
        _LAYER_PREFIX + "attn.c_attn.bias", "(3 K H)", 2
    ),
    "layers/attention/o": StoredTensor(_LAYER_PREFIX + "attn.c_proj.weight", "(N H) D"),
    "layers/attention/o_bias": StoredTensor(_LAYER_PREFIX + "attn.c_proj.bias", "D"),
    "layers/mlp_norm/scale": StoredTensor(_LAYER_PREFIX + "ln_2.weight", "D"),
    "layers/mlp_norm/bias": StoredTensor(_LAYER_PREFIX + "ln_2.bias", "D"),
    "layers/mlp/up": StoredTensor(_LAYER_PREFIX + "mlp.c_fc.weight", "D F"),
    "layers/mlp/up_bias": StoredTensor(_LAYER_PREFIX + "mlp.c_fc.bias", "F"),
    "layers/mlp/down": StoredTensor(_LAYER_PREFIX + "mlp.c_proj.weight", "F D"),
    "layers/mlp/down_bias": StoredTensor(_LAYER_PREFIX + "mlp.c_proj.bias", "D"),
    "final_norm/scale": StoredTensor("transformer.ln_f.weight", "D"),
    "final_norm/bias": StoredTensor("transformer.ln_f.bias", "D"),
    "head": StoredTensor("lm_head.weight", "V D"),
}

FAMILY = Family(
    read_config,
    write_config,
    TENSORS,
    architecture="GPT2LMHeadModel",
    tensor_prefix="transformer.",
    ignored_tensors=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
