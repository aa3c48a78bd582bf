"""Rotary embedding in config.json: rope_theta, rope_scaling, rope_parameters."""

import math
from collections.abc import Callable
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import REQUIRED, ConfigFields
from continuous_lm.rotary import LinearScaling, Llama3Scaling, LongRope, Rope

__all__ = [
    "read_rope",
    "read_rope_parameters",
    "write_rope",
]


def read_rope(
    fields: ConfigFields, default_theta: float = 10_000.0, fraction: float | None = None
) -> Rope:
    """Base and scaling, from rope_theta and rope_scaling or from rope_parameters.

    Args:
      fields: fields of config.json.
      default_theta: the base if none is given.
      fraction: the share of channels that turn if none is given; None if the family knows no other
        than all.
    """
    outer_theta = fields.number("rope_theta", None)
    if fraction is None:
        fields.must_be("partial_rotary_factor", 1.0)
    else:
        fraction = fields.number("partial_rotary_factor", fraction)
    scaling, parameters = (
        fields.nested("rope_scaling"),
        fields.nested("rope_parameters"),
    )
    if scaling is not None and parameters is not None:
        raise InputError(
            "fields rope_scaling and rope_parameters are both given; keep one"
        )
    rope_fields = parameters or scaling or ConfigFields({})
    name = "partial_rotary_factor"
    rope_fields.check_equal(
        name, rope_fields.get(name, None), name, fields.get(name, None)
    )
    return read_rope_parameters(
        rope_fields, fields, outer_theta, default_theta, fraction
    )


def read_rope_parameters(
    rope_fields: ConfigFields,
    fields: ConfigFields,
    outer_theta: float | None,
    default_theta: float,
    fraction: float | None = None,
) -> Rope:
    """The Rope of one rope_scaling or rope_parameters object, `rope_fields`."""
    rope_theta = rope_fields.number("rope_theta", outer_theta or default_theta)
    if outer_theta is not None and rope_theta != outer_theta:
        raise InputError(
            f"fields rope_theta ({outer_theta}) and rope_parameters.rope_theta ({rope_theta})"
            " differ"
        )
    if fraction is None:
        rope_fields.must_be("partial_rotary_factor", 1.0)
    else:
        fraction = rope_fields.number("partial_rotary_factor", fraction)
    rope_types = [rope_fields.text(name, None) for name in ("rope_type", "type")]
    scaling_readers = [
        _get_scaling_reader(rope_type)
        for rope_type in rope_types
        if rope_type is not None
    ]
    if len(set(scaling_readers)) > 1:
        rope_fields.check_equal("type", rope_types[1], "rope_type", rope_types[0])
    scaling = scaling_readers[0](rope_fields, fields) if scaling_readers else None
    rope_fields.check_all_read()
    return Rope(
        theta=float(rope_theta), scaling=scaling, fraction=float(fraction or 1.0)
    )


def _get_scaling_reader(
    rope_type: str,
) -> "Callable[[ConfigFields, ConfigFields], Any]":
    if rope_type not in _SCALING_READERS:
        raise InputError(
            f"rope scaling {rope_type!r:.60} is not handled; only {', '.join(_SCALING_READERS)}"
        )
    return _SCALING_READERS[rope_type]


def _read_llama3(rope_fields: ConfigFields, fields: ConfigFields) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=float(rope_fields.number("factor")),
        low_freq_factor=float(rope_fields.number("low_freq_factor")),
        high_freq_factor=float(rope_fields.number("high_freq_factor")),
        original_length=float(rope_fields.number("original_max_position_embeddings")),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError(
            "the rope scaling's high_freq_factor must be above its low_freq_factor"
        )
    return scaling


def _read_longrope(rope_fields: ConfigFields, fields: ConfigFields) -> LongRope:
    """Phi-3's; the attention factor is sqrt(1 + log(length / original) / log(original))."""
    name = "original_max_position_embeddings"
    outer_length = fields.integer(name, None)
    original_length = rope_fields.integer(
        name, REQUIRED if outer_length is None else outer_length
    )
    rope_fields.check_equal(name, original_length, name, outer_length)
    if original_length == 1:
        raise InputError(
            f"field {name} is 1; it must be more, its logarithm is divided by"
        )
    max_length = fields.integer("max_position_embeddings", original_length)
    length_ratio = rope_fields.number("factor", max_length / original_length)
    default_factor = (
        math.sqrt(1 + math.log(length_ratio) / math.log(original_length))
        if length_ratio > 1
        else 1.0
    )
    return LongRope(
        short=rope_fields.numbers("short_factor"),
        long=rope_fields.numbers("long_factor"),
        original_length=original_length,
        attention_factor=float(rope_fields.number("attention_factor", default_factor)),
    )


_SCALING_READERS: dict[str, Callable[[ConfigFields, ConfigFields], Any]] = {
    "default": lambda inner, fields: None,
    "linear": lambda inner, fields: LinearScaling(factor=float(inner.number("factor"))),
    "llama3": _read_llama3,
    "longrope": _read_longrope,
    "su": _read_longrope,  # its first name
}


def write_rope(rope: Rope | None) -> dict[str, Any]:
    """The inverse of `read_rope`, as the field rope_parameters."""
    if rope is None:
        return {}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        parameters["partial_rotary_factor"] = rope.fraction
    match rope.scaling:
        case Llama3Scaling() as scaling:
            parameters |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": int(scaling.original_length),
            }
        case LinearScaling() as scaling:
            parameters |= {"rope_type": "linear", "factor": scaling.factor}
        case LongRope() as scaling:
            parameters |= {
                "rope_type": "longrope",
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                "attention_factor": scaling.attention_factor,
            }
    return {"rope_parameters": parameters}
