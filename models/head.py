"""Base of all heads: settings, table of parameters, linear maps.

A head is a frozen dataclass of checked settings (see `settings`) and holds no parameters. Its
`parameter_table(hidden_width)` declares them, and pure methods compute with their tree:

    params = initialize(key, head.parameter_table(hidden_width=64))
    head.sample(params, sample_key, hidden)                         # hidden [..., 64]

Shapes stand in the table alone: what computes takes them from the arrays.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from continuous_lm.errors import InputError
from continuous_lm.models import settings
from continuous_lm.models.parameters import (
    ZEROS,
    Declaration,
    Initializer,
    ParameterTable,
    Params,
    declare,
)

__all__ = [
    "Head",
    "declare_linear",
    "fan_in_normal",
    "from_dict",
    "linear",
    "parse_settings",
]

HeadType = TypeVar("HeadType", bound="Head")


@dataclasses.dataclass(frozen=True)
class Head:
    """Base class of heads.

    Attributes:
      width: width W of the predicted vectors, or number of tokens V.
      kind: name of the class in folders and flags.
    """

    kind: ClassVar[str]
    width: int = dataclasses.field(metadata=settings.integer(1, settings.MAX_SIZE))

    def __post_init__(self) -> None:
        settings.check(self)

    def parameter_table(self, hidden_width: int) -> ParameterTable:
        """Path -> declaration of every parameter, for hidden states [..., hidden_width]."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, settings.Value]:
        """Kind and settings; `from_dict` is the inverse."""
        return {"kind": self.kind, **settings.values(self)}


def from_dict(
    fields: Mapping[str, object], registry: Mapping[str, type[HeadType]]
) -> HeadType:
    """Make a head from its kind and its settings.

    Args:
      fields: "kind", "width" and the settings that differ from their defaults.
      registry: kind -> class.

    Raises:
      InputError: for an unknown kind or setting, or an invalid value.
    """
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in registry:
        raise InputError(
            f"kind of head is {kind!r:.60}; it must be one of {', '.join(registry)}"
        )
    if "width" not in fields:
        raise InputError(f"a {kind} head needs its width")
    head_settings = {name: value for name, value in fields.items() if name != "kind"}
    settings.check_names(f"a {kind} head", registry[kind], list(head_settings))
    return registry[kind](**head_settings)  # type: ignore[arg-type]


def parse_settings(
    kind: str, assignments: Sequence[str], registry: Mapping[str, type["Head"]]
) -> dict[str, settings.Value]:
    """Parse settings of a kind of head from their text form, "name=value", ...

    Raises:
      InputError: for text that is not an assignment, or an unknown setting.
    """
    return settings.parse(f"a {kind} head", registry[kind], assignments)


def fan_in_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """Kernels [..., in] with which outputs vary as inputs do: normal, cut at 2 deviations."""
    truncated = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
    unit_variance = truncated / 0.8796  # the deviation that is left by the cut
    return unit_variance * shape[-1] ** -0.5


def declare_linear(
    name: str,
    sizes: Mapping[str, int],
    output_axes: str,
    input_axis: str,
    *,
    kernel: Initializer = fan_in_normal,
    bias: Initializer = ZEROS,
) -> dict[str, Declaration]:
    """Kernel `name` [*output_axes, input_axis] and bias `name_bias` [*output_axes] of `linear`.

    Args:
      name: name of the linear map.
      sizes: the size of each axis.
      output_axes: letters, as in "X W".
      input_axis: a letter.
      kernel: how the kernel begins.
      bias: how the bias begins.
    """
    return {
        name: declare(sizes, f"{output_axes} {input_axis}", kernel),
        f"{name}_bias": declare(sizes, output_axes, bias),
    }


def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    """x [..., in] through the kernel [*out, in] and the bias [*out] of that name: [..., *out]."""
    product = jnp.tensordot(x, params[name], axes=(-1, -1))
    return product + params[f"{name}_bias"]
