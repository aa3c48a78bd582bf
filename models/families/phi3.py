"""Phi-3 (Abdin et al., arXiv:2404.14219): fused projections, and LongRoPE in its long versions."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.shared_fields import (
    read_common_fields,
    require_fields,
    write_common_fields,
)
from continuous_lm.rotary import LongRope


def read_config(fields: ConfigFields) -> TransformerConfig:
    """From the fields of config.json."""
    require_fields(fields, "sliding_window")
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.must_be(name, False)
    fields.integer(
        "original_max_position_embeddings", None
    )  # LongRoPE's, if there is one
    window = fields.number("sliding_window", None)
    return TransformerConfig(
        family="phi3",
        **read_common_fields(fields, default_eps=1e-5),
        rope=read_rope(fields, fraction=1.0),
        window=None if window is None else float(window),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    fields = write_common_fields(config)
    fields["sliding_window"] = None if config.window is None else int(config.window)
    if config.rope is not None and isinstance(config.rope.scaling, LongRope):
        original_length = config.rope.scaling.original_length
        fields["original_max_position_embeddings"] = original_length
    return fields


_LAYER_PREFIX = "model.layers.{layer}."
_QKV_TENSOR = (_LAYER_PREFIX + "self_attn.qkv_proj.weight", ("N H", "K H", "K H"))
_GATE_UP_NAME = _LAYER_PREFIX + "mlp.gate_up_proj.weight"

FUSED_TENSORS = {
    "layers/attention/q": StoredTensor(_QKV_TENSOR[0], "(N H) D", 0, _QKV_TENSOR[1]),
    "layers/attention/k": StoredTensor(_QKV_TENSOR[0], "(K H) D", 1, _QKV_TENSOR[1]),
    "layers/attention/v": StoredTensor(_QKV_TENSOR[0], "(K H) D", 2, _QKV_TENSOR[1]),
    "layers/mlp/gate": StoredTensor(_GATE_UP_NAME, "(2 F) D", 0),
    "layers/mlp/up": StoredTensor(_GATE_UP_NAME, "(2 F) D", 1),
}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | FUSED_TENSORS,
    architecture="Phi3ForCausalLM",
)
