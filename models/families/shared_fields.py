"""Config fields that many families share: sizes, activation, windows."""

from collections.abc import Callable
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import MOST_LAYERS, Fields
from continuous_lm.models.checkpoints.rope_fields import write_rope
from continuous_lm.models.config import TransformerConfig

_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def read_activation(fields: Fields, name: str = "hidden_act", default: str = "silu") -> str:
    """The activation's name here."""
    value = fields.text(name, default)
    if value not in _ACTIVATION_NAMES:
        raise InputError(
            f"field {name} is {value!r:.60}, which is not handled;"
            f" only {', '.join(_ACTIVATION_NAMES)}"
        )
    return _ACTIVATION_NAMES[value]


def read_shape(fields: Fields, *, tied: bool = False, eps: float = 1e-6) -> dict[str, Any]:
    """The fields that most families share, as arguments of `TransformerConfig`.

    Args:
      fields: of config.json.
      tied: tie_word_embeddings if it is not given.
      eps: rms_norm_eps if it is not given.
    """
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "mlp_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers", most=MOST_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", num_heads),
        "head_dim": fields.integer("head_dim", None)
        or head_width(hidden_size, num_heads, "hidden_size", "num_attention_heads"),
        "norm_eps": float(fields.number("rms_norm_eps", eps)),
        "activation": read_activation(fields),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
    }


def head_width(hidden_size: int, num_heads: int, *names: str) -> int:
    """The width of a head where nothing else says it; `names` are those of the two fields."""
    if hidden_size % num_heads:
        size, heads = names
        raise InputError(f"field {heads} ({num_heads}) does not divide {size} ({hidden_size})")
    return hidden_size // num_heads


def write_shape(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_shape`, and the rotary fields."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config.rope),
    }


def require(fields: Fields, *names: str) -> None:
    """Refuses a config.json without these fields, whose defaults differ from reader to reader."""
    for name in names:
        if name not in fields:
            raise InputError(f"field {name} is missing; write it down, null for none")


def read_windows(fields: Fields, num_layers: int, sliding: Callable[[int], bool]) -> dict[str, Any]:
    """sliding_window and layer_types, as arguments of `TransformerConfig`.

    Args:
      fields: of config.json.
      num_layers: L.
      sliding: whether layer i has the window, if layer_types does not say so.
    """
    window = fields.number("sliding_window", None)
    kinds = fields.get("layer_types", None)
    if kinds is None:
        pattern = tuple(map(sliding, range(num_layers)))
    else:
        names = {"sliding_attention": True, "full_attention": False}
        listed = isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
        if not listed or len(kinds) != num_layers or set(kinds) - set(names):
            raise InputError(
                f"field layer_types must be a list of {num_layers}, each one of {', '.join(names)}"
            )
        pattern = tuple(names[kind] for kind in kinds)
        if window is None and any(pattern):
            raise InputError("field layer_types has windows, but sliding_window says none")
    return {} if window is None else {"window": float(window), "window_pattern": pattern}


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    names = {True: "sliding_attention", False: "full_attention"}
    return {
        "sliding_window": None if config.window is None else int(config.window),
        "layer_types": [names[has] for has in config.windowed],
    }


def write_activation(name: str) -> str:
    """The inverse of `read_activation`."""
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name
