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
from continuous_lm.rotary import Llama3Scaling, Rope

REQUIRED: Any = object()

# Fields that do not change what a causal model computes at inference, so that they may be there.
_INERT = frozenset(
    """
    _name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward
    dtype embd_pdrop eos_token_id hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder label2id max_position_embeddings model_type output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type resid_pdrop return_dict
    torch_dtype transformers_version unk_token_id use_cache
    """.split()
)

_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
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

    def integer(self, name: str, default: Any = REQUIRED) -> int:
        return self._typed(
            name, default, int, "an integer from 1 to 2^31 - 1", lambda v: 0 < v < 2**31
        )

    def number(self, name: str, default: Any = REQUIRED) -> float:
        return self._typed(
            name,
            default,
            (int, float),
            "a positive number",
            lambda v: 0 < v <= float(np.finfo(np.float32).max),
        )

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        return self._typed(name, default, bool, "true or false")

    def text(self, name: str, default: Any = REQUIRED) -> str:
        return self._typed(name, default, str, "a string")

    def nested(self, name: str) -> "Fields | None":
        """The fields of an object inside, or None if there is none."""
        value = self._typed(name, None, dict, "an object")
        return None if value is None else Fields(value, f"{self._prefix}{name}.")

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuses a field whose value would change the maths in a way that is not handled."""
        if self.get(name, allowed[0]) not in allowed:
            raise InputError(
                f"field {self._prefix}{name} is {self._values[name]!r}, which is not handled;"
                f" only {', '.join(map(repr, allowed))}"
            )

    def finish(self, ignore: tuple[str, ...] = ()) -> None:
        """Refuses the first field that nobody has read and that may change what is computed."""
        for name, value in self._values.items():
            if name not in self._read | _INERT | set(ignore) and value is not None:
                raise InputError(
                    f"field {self._prefix}{name} ({value!r:.60}) is not handled and may change"
                    " what the model computes; if it does not, name it in ignore_fields"
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


def read_activation(fields: Fields, name: str = "hidden_act") -> str:
    """The activation's name here."""
    value = fields.text(name, "silu")
    if value not in _ACTIVATION_NAMES:
        raise InputError(
            f"field {name} is {value!r}, which is not handled; only {', '.join(_ACTIVATION_NAMES)}"
        )
    return _ACTIVATION_NAMES[value]


def read_rope(fields: Fields, default_theta: float = 10_000.0) -> Rope:
    """Base and scaling, from rope_theta and rope_scaling or from rope_parameters."""
    top_theta = fields.number("rope_theta", None)
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if scaling is not None and parameters is not None:
        raise InputError("fields rope_scaling and rope_parameters are both given; keep one")
    inner = parameters or scaling
    if inner is None:
        return Rope(theta=float(top_theta or default_theta))
    theta = inner.number("rope_theta", top_theta or default_theta)
    if top_theta is not None and theta != top_theta:
        raise InputError(
            f"fields rope_theta ({top_theta}) and rope_parameters.rope_theta ({theta}) differ"
        )
    kind = inner.text("rope_type", inner.text("type", "default"))
    inner.must_be("partial_rotary_factor", 1.0)
    if kind == "default":
        rope = Rope(theta=float(theta))
    elif kind == "llama3":
        stretch = Llama3Scaling(
            factor=float(inner.number("factor")),
            low_freq_factor=float(inner.number("low_freq_factor")),
            high_freq_factor=float(inner.number("high_freq_factor")),
            original_length=float(inner.number("original_max_position_embeddings")),
        )
        if stretch.high_freq_factor <= stretch.low_freq_factor:
            raise InputError(
                "the rope scaling's high_freq_factor must be above its low_freq_factor"
            )
        rope = Rope(theta=float(theta), scaling=stretch)
    else:
        raise InputError(f"rope scaling {kind!r} is not handled; only 'default' and 'llama3'")
    inner.finish()
    return rope


def write_rope(rope: Rope) -> dict[str, Any]:
    """The inverse of `read_rope`, as the fields rope_theta and rope_scaling."""
    if rope.scaling is None:
        return {"rope_theta": rope.theta}
    s = rope.scaling
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": int(s.original_length),
        },
    }


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a parameter lies in a checkpoint.

    Attributes:
      name: the tensor's name, with {layer} for the layer's number.
      axes: its axes in letters; "(N H) D" is two axes, the first of size N H.
    """

    name: str
    axes: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.axes)
        return tuple(
            math.prod(sizes[a] for a in axes_lib.split(many or one)) for many, one in groups
        )

    def unpack(
        self, tensor: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        """The stored tensor as the parameter with `axes`; a view."""
        letters = self._letters()
        split = tensor.reshape([sizes[a] for a in letters])
        return split.transpose([letters.index(a) for a in axes])

    def pack(
        self, parameter: np.ndarray, axes: tuple[str, ...], sizes: Mapping[str, int]
    ) -> np.ndarray:
        """The inverse of `unpack`, contiguous."""
        moved = parameter.transpose([axes.index(a) for a in self._letters()])
        return np.ascontiguousarray(moved).reshape(self.shape(sizes))

    def _letters(self) -> tuple[str, ...]:
        return axes_lib.split(self.axes.replace("(", "").replace(")", ""))


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
      read_config: from the fields of its config.json.
      write_config: to the fields of its config.json, model_type and dtype aside.
      tensors: parameter path ("layers/attention/q") -> where it is stored.
      architecture: the name that Hugging Face gives to its causal model.
      ignored: regular expressions of tensors that hold nothing to load.
    """

    read_config: Callable[[Fields], TransformerConfig]
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    tensors: Mapping[str, Stored]
    architecture: str
    ignored: tuple[str, ...] = ()
