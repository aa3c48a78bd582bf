"""Phi-3 (Abdin et al., arXiv:2404.14219): fused projections, and LongRoPE in its long versions."""

import dataclasses
from typing import Any

from continuous_lm.models.checkpoints.config_fields import Fields
from continuous_lm.models.checkpoints.rope_fields import read_rope
from continuous_lm.models.checkpoints.tensor_table import Stored
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.families import llama
from continuous_lm.models.families.shared_fields import read_shape, require, write_shape
from continuous_lm.rotary import LongRope


def read_config(fields: Fields) -> TransformerConfig:
    """From the fields of config.json."""
    require(fields, "sliding_window")
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.must_be(name, False)
    fields.integer("original_max_position_embeddings", None)  # LongRoPE's, if there is one
    window = fields.number("sliding_window", None)
    return TransformerConfig(
        family="phi3",
        **read_shape(fields, eps=1e-5),
        rope=read_rope(fields, fraction=1.0),
        window=None if window is None else float(window),
    )


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    written = write_shape(config)
    written["sliding_window"] = None if config.window is None else int(config.window)
    if config.rope is not None and isinstance(config.rope.scaling, LongRope):
        length = config.rope.scaling.original_length
        written["original_max_position_embeddings"] = length
    return written


_LAYER = "model.layers.{layer}."
_QKV = (_LAYER + "self_attn.qkv_proj.weight", ("N H", "K H", "K H"))
_GATE_UP = _LAYER + "mlp.gate_up_proj.weight"

FUSED = {
    "layers/attention/q": Stored(_QKV[0], "(N H) D", 0, _QKV[1]),
    "layers/attention/k": Stored(_QKV[0], "(K H) D", 1, _QKV[1]),
    "layers/attention/v": Stored(_QKV[0], "(K H) D", 2, _QKV[1]),
    "layers/mlp/gate": Stored(_GATE_UP, "(2 F) D", 0),
    "layers/mlp/up": Stored(_GATE_UP, "(2 F) D", 1),
}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    read_config=read_config,
    write_config=write_config,
    tensors=llama.TENSORS | FUSED,
    architecture="Phi3ForCausalLM",
)
