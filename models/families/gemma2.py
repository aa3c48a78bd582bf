"""Gemma 2 (Riviere et al., arXiv:2408.00118): four norms a layer, soft-caps, windows in turns."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.gemma import read_gemma_fields
from continuous_lm.models.families.shared_fields import (
    read_windows,
    require_fields,
    write_activation,
    write_common_fields,
    write_windows,
)


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json; every other layer has the window, the first one too."""
    common_fields = read_gemma_fields(fields)
    fields.must_be(
        "sliding_window_size", None, fields.get("sliding_window", None)
    )  # its old name
    return TransformerConfig(
        family="gemma2",
        **common_fields,
        **read_scale_and_softcaps(fields),
        **read_windows(
            fields, common_fields["num_layers"], lambda layer: layer % 2 == 0
        ),
        rope=read_rope(fields),
        post_norms=True,
    )


def read_scale_and_softcaps(fields: ConfigFields) -> dict[str, Any]:
    """The scale of the scores, and the bounds of scores and logits."""
    names = (
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    )
    require_fields(fields, "sliding_window", *names)
    query_width, attention_softcap, logits_softcap = (
        fields.number(name, None) for name in names
    )
    return {
        "query_width": query_width,
        "attention_softcap": attention_softcap,
        "logits_softcap": logits_softcap,
    }


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return (
        write_common_fields(config)
        | write_windows(config)
        | {
            "hidden_activation": write_activation(config.activation),
            "query_pre_attn_scalar": config.query_width,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logits_softcap,
        }
    )


_LAYER_PREFIX = "model.layers.{layer}."

NORM_TENSORS = {
    "layers/attention_post_norm/scale": StoredTensor(
        _LAYER_PREFIX + "post_attention_layernorm.weight", "D"
    ),
    "layers/mlp_norm/scale": StoredTensor(
        _LAYER_PREFIX + "pre_feedforward_layernorm.weight", "D"
    ),
    "layers/mlp_post_norm/scale": StoredTensor(
        _LAYER_PREFIX + "post_feedforward_layernorm.weight", "D"
    ),
}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | NORM_TENSORS,
    architecture="Gemma2ForCausalLM",
)
