"""GPT-NeoX and Pythia (Black et al., arXiv:2204.06745): parallel residual, partial rotary."""

from typing import Any

from continuous_lm.models.checkpoints.config_fields import MAX_LAYERS, ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope, write_rope
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
    hidden_size, num_heads = (
        fields.integer("hidden_size"),
        fields.integer("num_attention_heads"),
    )
    attention_bias = fields.flag("attention_bias", True)
    head_dim = default_head_dim(
        hidden_size, num_heads, "hidden_size", "num_attention_heads"
    )
    legacy_theta, legacy_fraction = (
        fields.number("rotary_emb_base", None),
        fields.number("rotary_pct", None),
    )
    rope = read_rope(
        fields, default_theta=legacy_theta or 10_000.0, fraction=legacy_fraction or 0.25
    )
    fields.check_equal("rope_theta", rope.theta, "rotary_emb_base", legacy_theta)
    fields.check_equal(
        "partial_rotary_factor", rope.fraction, "rotary_pct", legacy_fraction
    )
    return TransformerConfig(
        family="gpt_neox",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        mlp_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        norm="layer",
        norm_eps=float(fields.number("layer_norm_eps", 1e-5)),
        parallel=fields.flag("use_parallel_residual", True),
        activation=read_activation(fields, default="gelu"),
        gated=False,
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=True,
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "hidden_act": write_activation(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        **write_rope(config.rope),
    }


_LAYER_PREFIX = "gpt_neox.layers.{layer}."
_QKV_PREFIX = _LAYER_PREFIX + "attention.query_key_value."

TENSORS = {
    "embedding": StoredTensor("gpt_neox.embed_in.weight", "V D"),
    "layers/attention_norm/scale": StoredTensor(
        _LAYER_PREFIX + "input_layernorm.weight", "D"
    ),
    "layers/attention_norm/bias": StoredTensor(
        _LAYER_PREFIX + "input_layernorm.bias", "D"
    ),
    "layers/attention/q": StoredTensor(_QKV_PREFIX + "weight", "(N 3 H) D", 0),
    "layers/attention/k": StoredTensor(_QKV_PREFIX + "weight", "(K 3 H) D", 1),
    "layers/attention/v": StoredTensor(_QKV_PREFIX + "weight", "(K 3 H) D", 2),
    "layers/attention/q_bias": StoredTensor(_QKV_PREFIX + "bias", "(N 3 H)", 0),
    "layers/attention/k_bias": StoredTensor(_QKV_PREFIX + "bias", "(K 3 H)", 1),
    "layers/attention/v_bias": StoredTensor(_QKV_PREFIX + "bias", "(K 3 H)", 2),
    "layers/attention/o": StoredTensor(
        _LAYER_PREFIX + "attention.dense.weight", "D (N H)"
    ),
    "layers/attention/o_bias": StoredTensor(
        _LAYER_PREFIX + "attention.dense.bias", "D"
    ),
    "layers/mlp_norm/scale": StoredTensor(
        _LAYER_PREFIX + "post_attention_layernorm.weight", "D"
    ),
    "layers/mlp_norm/bias": StoredTensor(
        _LAYER_PREFIX + "post_attention_layernorm.bias", "D"
    ),
    "layers/mlp/up": StoredTensor(_LAYER_PREFIX + "mlp.dense_h_to_4h.weight", "F D"),
    "layers/mlp/up_bias": StoredTensor(_LAYER_PREFIX + "mlp.dense_h_to_4h.bias", "F"),
    "layers/mlp/down": StoredTensor(_LAYER_PREFIX + "mlp.dense_4h_to_h.weight", "D F"),
    "layers/mlp/down_bias": StoredTensor(_LAYER_PREFIX + "mlp.dense_4h_to_h.bias", "D"),
    "final_norm/scale": StoredTensor("gpt_neox.final_layer_norm.weight", "D"),
    "final_norm/bias": StoredTensor("gpt_neox.final_layer_norm.bias", "D"),
    "head": StoredTensor("embed_out.weight", "V D"),
}

FAMILY = Family(
    read_config,
    write_config,
    TENSORS,
    architecture="GPTNeoXForCausalLM",
    tensor_prefix="gpt_neox.",
    ignored_tensors=(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
)
