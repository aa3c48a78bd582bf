"""What a family of checkpoints has to say: how its config.json is read, and its tensors' names."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError
from continuous_lm.models.config import TransformerConfig
from continuous_lm.rotary import LinearScaling, Llama3Scaling, LongRope, Rope

REQUIRED: Any = object()
MOST_LAYERS = 1_000  # more is a mistake, and would cost time and memory before it shows

# Fields that do not change what a causal model computes at inference, so that they may be there.
INERT = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_dropout
    attention_probs_dropout_prob attn_pdrop auto_map bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range
    is_decoder is_encoder_decoder label2id max_position_embeddings model_type n_ctx n_special
    output_attentions output_hidden_states output_past pad_token_id predict_special_tokens
    pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop return_dict
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params torch_dtype transformers_version unk_token_id
    use_cache
    _commit_hash decoder_start_token_id do_sample finetuning_task max_length min_length num_beams
    repetition_penalty sep_token_id temperature tokenizer_class top_k top_p
    """.split()
)

_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class Fields:
    """The fields of a config.json: each is read with its type checked, and none is passed over."""

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values, self._prefix, self._read = dict(values), prefix, set[str]()

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value; the default if it is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise InputError(f"field {self._prefix}{name} is missing")
        return default

    def __contains__(self, name: str) -> bool:
        """Whether it is written down, even as null."""
        return name in self._values

    def integer(self, name: str, default: Any = REQUIRED, most: int = 2**31 - 1) -> int:
        return self._typed(
            name, default, int, f"an integer from 1 to {most}", lambda v: 0 < v <= most
        )

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        return self._typed(
            name,
            default,
            (int, float),
            "a positive number",
            _positive,
        )

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        return self._typed(name, default, bool, "true or false")

    def text(self, name: str, default: Any = REQUIRED) -> str:
        return self._typed(name, default, str, "a string")

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        values = self._typed(name, REQUIRED, list, "a list of positive numbers", _all_positive)
        return tuple(map(float, values))

    def nested(self, name: str) -> "Fields | None":
        """The fields of an object inside, or None if there is none."""
        value = self._typed(name, None, dict, "an object")
        return None if value is None else Fields(value, f"{self._prefix}{name}.")

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuses a field whose value would change the maths in a way that is not handled."""
        value = self.get(name, allowed[0])
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise InputError(
                f"field {self._prefix}{name} is {value!r:.60}, which is not handled;"
                f" only {', '.join(map(repr, allowed))}"
            )

    def agree(self, name: str, value: Any, other: str, told: Any) -> None:
        """Refuses two fields that say the same thing and differ; None says nothing."""
        if value is not None and told is not None and value != told:
            raise InputError(
                f"fields {other} ({told!r:.60}) and {self._prefix}{name} ({value!r:.60}) differ"
            )

    def finish(self, ignore: tuple[str, ...] = ()) -> None:
        """Refuses the first field that nobody has read and that may change what is computed."""
        for name, value in self._values.items():
            if name not in self._read | INERT | set(ignore) and value is not None:
                raise InputError(
                    f"field {self._prefix}{_shown(name)} ({value!r:.60}) is not handled and may"
                    " change what the model computes; if it does not, name it in ignore_fields"
                )

    def _typed(self, name, default, types, what, holds=lambda v: True):
        value = self.get(name, default)
        if value is default:
            return value
        if (
            not isinstance(value, types)
            or (isinstance(value, bool) and types is not bool)
            or not holds(value)
        ):
            raise InputError(f"field {self._prefix}{name} is {value!r:.60}; it must be {what}")
        return value


def _positive(value: int | float) -> bool:
    """Whether it is a positive number in float32 too, neither 0 nor infinite there."""
    limits = np.finfo(np.float32)
    return float(limits.tiny) <= value <= float(limits.max)


def _all_positive(values: list) -> bool:
    return all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and _positive(v) for v in values
    )


def _shown(name: str) -> str:
    """A field's name as it can stand in one line."""
    return name if name.isprintable() and len(name) <= 60 else f"{name!a:.60}"


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


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a parameter lies in a checkpoint.

    Attributes:
      name: the tensor's name, with {layer} for the layer's number.
      axes: the tensor's axes in letters; "(N H) D" is two axes, the first of size N H. A number is
        an axis that the parameter does not have: "(N 3 H) D" holds three parameters.
      pick: which of those this is.
      rows: if the first axis is several groups one after the other, the axes of each group; `axes`
        then describes this one, the `pick`-th.
    """

    name: str
    axes: str
    pick: int = 0
    rows: tuple[str, ...] = ()

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.axes)
        shape = [_size(many or one, sizes) for many, one in groups]
        if self.rows:
            shape[0] = sum(_size(group, sizes) for group in self.rows)
        return tuple(shape)

    def view(
        self, tensor: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        """The part of the stored tensor that is the parameter with `axes`: to read or to write."""
        if self.rows:
            before = sum(_size(group, sizes) for group in self.rows[: self.pick])
            tensor = tensor[before : before + _size(self.rows[self.pick], sizes)]
        letters = axes_lib.split(self.axes.replace("(", "").replace(")", ""))
        tensor = tensor.reshape([_size(a, sizes) for a in letters])
        tensor = tensor[tuple(self.pick if a.isdigit() else slice(None) for a in letters)]
        left = [a for a in letters if not a.isdigit()]
        order = []
        for a in axes:  # a letter that stands twice keeps its order
            order.append(left.index(a))
            left[order[-1]] = ""
        return tensor.transpose(order)


def _size(axes: str, sizes: Mapping[str, int]) -> int:
    return math.prod(int(a) if a.isdigit() else sizes[a] for a in axes_lib.split(axes))


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
      read_config: from the fields of its config.json.
      write_config: to the fields of its config.json, model_type and dtype aside.
      tensors: parameter path ("layers/attention/q") -> where it is stored.
      architecture: the name that Hugging Face gives to its causal model.
      prefix: of the tensors' names, which checkpoints saved without a head leave out.
      ignored: regular expressions of tensors that hold nothing to load.
    """

    read_config: Callable[[Fields], TransformerConfig]
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    tensors: Mapping[str, Stored]
    architecture: str
    prefix: str = "model."
    ignored: tuple[str, ...] = ()
