"""GPT-2 (Radford et al., 2019): learned positions, sampled between their rows at real times."""

from typing import Any

from continuous_lm.models.checkpoints.config_fields import MOST_LAYERS, Fields
from continuous_lm.models.checkpoints.tensor_table import Stored
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families.family import Family
from continuous_lm.models.families.shared_fields import (
    head_width,
    read_activation,
    write_activation,
)


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json."""
    for name, needed in _NEEDED.items():
        fields.must_be(name, needed)
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    return TransformerConfig(
        family="gpt2",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        mlp_size=fields.integer("n_inner", 4 * hidden_size),
        num_layers=fields.integer("n_layer", most=MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_width(hidden_size, num_heads, "n_embd", "n_head"),
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


_NEEDED = {
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


_LAYER = "transformer.h.{layer}."

TENSORS = {
    "embedding": Stored("transformer.wte.weight", "V D"),
    "positions": Stored("transformer.wpe.weight", "M D"),
    "layers/attention_norm/scale": Stored(_LAYER + "ln_1.weight", "D"),
    "layers/attention_norm/bias": Stored(_LAYER + "ln_1.bias", "D"),
    "layers/attention/q": Stored(_LAYER + "attn.c_attn.weight", "D (3 N H)", 0),
    "layers/attention/k": Stored(_LAYER + "attn.c_attn.weight", "D (3 K H)", 1),
    "layers/attention/v": Stored(_LAYER + "attn.c_attn.weight", "D (3 K H)", 2),
    "layers/attention/q_bias": Stored(_LAYER + "attn.c_attn.bias", "(3 N H)", 0),
    "layers/attention/k_bias": Stored(_LAYER + "attn.c_attn.bias", "(3 K H)", 1),
    "layers/attention/v_bias": Stored(_LAYER + "attn.c_attn.bias", "(3 K H)", 2),
    "layers/attention/o": Stored(_LAYER + "attn.c_proj.weight", "(N H) D"),
    "layers/attention/o_bias": Stored(_LAYER + "attn.c_proj.bias", "D"),
    "layers/mlp_norm/scale": Stored(_LAYER + "ln_2.weight", "D"),
    "layers/mlp_norm/bias": Stored(_LAYER + "ln_2.bias", "D"),
    "layers/mlp/up": Stored(_LAYER + "mlp.c_fc.weight", "D F"),
    "layers/mlp/up_bias": Stored(_LAYER + "mlp.c_fc.bias", "F"),
    "layers/mlp/down": Stored(_LAYER + "mlp.c_proj.weight", "F D"),
    "layers/mlp/down_bias": Stored(_LAYER + "mlp.c_proj.bias", "D"),
    "final_norm/scale": Stored("transformer.ln_f.weight", "D"),
    "final_norm/bias": Stored("transformer.ln_f.bias", "D"),
    "head": Stored("lm_head.weight", "V D"),
}

FAMILY = Family(
    read_config,
    write_config,
    TENSORS,
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
