"""Config fields that many families share: sizes, activation, windows."""

from collections.abc import Callable
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.models.checkpoints.config_fields import MAX_LAYERS, ConfigFields
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


def read_activation(
    fields: ConfigFields, name: str = "hidden_act", default: str = "silu"
) -> str:
    """The activation's name here."""
    value = fields.text(name, default)
    if value not in _ACTIVATION_NAMES:
        raise InputError(
            f"field {name} is {value!r:.60}, which is not handled;"
            f" only {', '.join(_ACTIVATION_NAMES)}"
        )
    return _ACTIVATION_NAMES[value]


def read_common_fields(
    fields: ConfigFields, *, default_tied: bool = False, default_eps: float = 1e-6
) -> dict[str, Any]:
    """The fields that most families share, as arguments of `TransformerConfig`.

    Args:
      fields: fields of config.json.
      default_tied: tie_word_embeddings if it is not given.
      default_eps: rms_norm_eps if it is not given.
    """
    hidden_size, num_heads = (
        fields.integer("hidden_size"),
        fields.integer("num_attention_heads"),
    )
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "mlp_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", num_heads),
        "head_dim": fields.integer("head_dim", None)
        or default_head_dim(
            hidden_size, num_heads, "hidden_size", "num_attention_heads"
        ),
        "norm_eps": float(fields.number("rms_norm_eps", default_eps)),
        "activation": read_activation(fields),
        "tie_embeddings": fields.flag("tie_word_embeddings", default_tied),
    }


def default_head_dim(hidden_size: int, num_heads: int, *field_names: str) -> int:
    """Return hidden_size / num_heads, the default width of a head; `field_names` are for errors."""
    if hidden_size % num_heads:
        size_name, heads_name = field_names
        raise InputError(
            f"field {heads_name} ({num_heads}) does not divide {size_name} ({hidden_size})"
        )
    return hidden_size // num_heads


def write_common_fields(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_common_fields`, and the rotary fields."""
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


def require_fields(fields: ConfigFields, *names: str) -> None:
    """Raise InputError if config.json lacks these fields, whose defaults differ between readers."""
    for name in names:
        if name not in fields:
            raise InputError(f"field {name} is missing; write it down, null for none")


def read_windows(
    fields: ConfigFields, num_layers: int, is_windowed: Callable[[int], bool]
) -> dict[str, Any]:
    """sliding_window and layer_types, as arguments of `TransformerConfig`.

    Args:
      fields: fields of config.json.
      num_layers: L.
      is_windowed: whether layer i has the window, if layer_types is absent.
    """
    window = fields.number("sliding_window", None)
    layer_types = fields.get("layer_types", None)
    if layer_types is None:
        pattern = tuple(map(is_windowed, range(num_layers)))
    else:
        pattern = _window_pattern(layer_types, num_layers)
        if window is None and any(pattern):
            raise InputError(
                "field layer_types has windows, but sliding_window says none"
            )
    if window is None:
        return {}
    return {"window": float(window), "window_pattern": pattern}


def _window_pattern(layer_types: object, num_layers: int) -> tuple[bool, ...]:
    """Return whether each layer has the window, from config.json's layer_types."""
    window_by_type = {"sliding_attention": True, "full_attention": False}
    names = layer_types if isinstance(layer_types, list) else []
    is_known = [isinstance(name, str) and name in window_by_type for name in names]
    if len(names) != num_layers or not all(is_known):
        raise InputError(
            f"field layer_types must be a list of {num_layers}, each one of"
            f" {', '.join(window_by_type)}"
        )
    return tuple(window_by_type[name] for name in names)


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    type_by_window = {True: "sliding_attention", False: "full_attention"}
    return {
        "sliding_window": None if config.window is None else int(config.window),
        "layer_types": [
            type_by_window[has_window] for has_window in config.windowed_layers
        ],
    }


def write_activation(name: str) -> str:
    """The inverse of `read_activation`."""
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else name
