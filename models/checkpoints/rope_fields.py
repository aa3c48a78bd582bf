"""Rotary embedding in config.json: rope_theta, rope_scaling, rope_parameters."""

import math
from collections.abc import Callable
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import REQUIRED, Fields
from continuous_lm.rotary import LinearScaling, Llama3Scaling, LongRope, Rope


def read_rope(fields: Fields, theta: float = 10_000.0, fraction: float | None = None) -> Rope:
    """Base and scaling, from rope_theta and rope_scaling or from rope_parameters.

    Args:
      fields: of config.json.
      theta: the base if none is given.
      fraction: the share of channels that turn if none is given; None if the family knows no other
        than all.
    """
    top = fields.number("rope_theta", None)
    if fraction is None:
        fields.must_be("partial_rotary_factor", 1.0)
    else:
        fraction = fields.number("partial_rotary_factor", fraction)
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if scaling is not None and parameters is not None:
        raise InputError("fields rope_scaling and rope_parameters are both given; keep one")
    inner = parameters or scaling or Fields({})
    name = "partial_rotary_factor"
    inner.agree(name, inner.get(name, None), name, fields.get(name, None))
    return read_rope_parameters(inner, fields, top, theta, fraction)


def read_rope_parameters(
    inner: Fields,
    fields: Fields,
    top: float | None,
    theta: float,
    fraction: float | None = None,
) -> Rope:
    """The Rope of one rope_scaling or rope_parameters object, `inner`."""
    own = inner.number("rope_theta", top or theta)
    if top is not None and own != top:
        raise InputError(f"fields rope_theta ({top}) and rope_parameters.rope_theta ({own}) differ")
    if fraction is None:
        inner.must_be("partial_rotary_factor", 1.0)
    else:
        fraction = inner.number("partial_rotary_factor", fraction)
    kinds = [inner.text(name, None) for name in ("rope_type", "type")]
    readers = [_scaling_reader(kind) for kind in kinds if kind is not None]
    if len(set(readers)) > 1:
        inner.agree("type", kinds[1], "rope_type", kinds[0])
    scaling = readers[0](inner, fields) if readers else None
    inner.finish()
    return Rope(theta=float(own), scaling=scaling, fraction=float(fraction or 1.0))


def _scaling_reader(kind: str) -> "Callable[[Fields, Fields], Any]":
    if kind not in _SCALINGS:
        raise InputError(f"rope scaling {kind!r:.60} is not handled; only {', '.join(_SCALINGS)}")
    return _SCALINGS[kind]


def _read_llama3(inner: Fields, fields: Fields) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=float(inner.number("factor")),
        low_freq_factor=float(inner.number("low_freq_factor")),
        high_freq_factor=float(inner.number("high_freq_factor")),
        original_length=float(inner.number("original_max_position_embeddings")),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise InputError("the rope scaling's high_freq_factor must be above its low_freq_factor")
    return scaling


def _read_longrope(inner: Fields, fields: Fields) -> LongRope:
    """Phi-3's; the amplitude is sqrt(1 + log(length / original) / log(original))."""
    name = "original_max_position_embeddings"
    told = fields.integer(name, None)
    original = inner.integer(name, REQUIRED if told is None else told)
    inner.agree(name, original, name, told)
    if original == 1:
        raise InputError(f"field {name} is 1; it must be more, its logarithm is divided by")
    length = fields.integer("max_position_embeddings", original)
    longer = inner.number("factor", length / original)
    stretch = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    return LongRope(
        short=inner.numbers("short_factor"),
        long=inner.numbers("long_factor"),
        original_length=original,
        amplitude=float(inner.number("attention_factor", stretch)),
    )


_SCALINGS: dict[str, Callable[[Fields, Fields], Any]] = {
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
        case Llama3Scaling() as s:
            parameters |= {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": int(s.original_length),
            }
        case LinearScaling() as s:
            parameters |= {"rope_type": "linear", "factor": s.factor}
        case LongRope() as s:
            parameters |= {
                "rope_type": "longrope",
                "short_factor": list(s.short),
                "long_factor": list(s.long),
                "attention_factor": s.amplitude,
            }
    return {"rope_parameters": parameters}
