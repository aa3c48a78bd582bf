"""Gemma 2 (Riviere et al., arXiv:2408.00118): four norms a layer, soft-caps, windows in turns."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import Fields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import Stored
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.gemma import read_gemma
from continuous_lm.models.families.shared_fields import (
    read_windows,
    require,
    write_activation,
    write_shape,
    write_windows,
)


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json; every other layer has the window, the first one too."""
    shape = read_gemma(fields)
    fields.must_be("sliding_window_size", None, fields.get("sliding_window", None))  # its old name
    return TransformerConfig(
        family="gemma2",
        **shape,
        **read_caps(fields),
        **read_windows(fields, shape["num_layers"], lambda layer: layer % 2 == 0),
        rope=read_rope(fields),
        post_norms=True,
    )


def read_caps(fields: Fields) -> dict[str, Any]:
    """The scale of the scores, and the bounds of scores and logits."""
    names = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    require(fields, "sliding_window", *names)
    width, scores, logits = (fields.number(name, None) for name in names)
    return {
        "query_width": width,
        "attention_softcap": scores,
        "logits_softcap": logits,
    }


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return (
        write_shape(config)
        | write_windows(config)
        | {
            "hidden_activation": write_activation(config.activation),
            "query_pre_attn_scalar": config.query_width,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logits_softcap,
        }
    )


_LAYER = "model.layers.{layer}."

NORMS = {
    "layers/attention_post_norm/scale": Stored(_LAYER + "post_attention_layernorm.weight", "D"),
    "layers/mlp_norm/scale": Stored(_LAYER + "pre_feedforward_layernorm.weight", "D"),
    "layers/mlp_post_norm/scale": Stored(_LAYER + "post_feedforward_layernorm.weight", "D"),
}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | NORMS,
    architecture="Gemma2ForCausalLM",
)
