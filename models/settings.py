"""Settings: fields of a frozen dataclass with a declaration of their valid values.

    @dataclasses.dataclass(frozen=True)
    class MixtureHead:
        components: int = field(default=8, metadata=integer(1, MAX_SIZE))

        def __post_init__(self) -> None:
            check(self)

The declaration is in the field's metadata. `check` raises InputError for other values. `parse`
reads the text form ("components=4") by the same declarations. A field without one is not a setting.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from continuous_lm.errors import InputError

__all__ = [
    "MAX_SIZE",
    "Declaration",
    "Metadata",
    "Value",
    "boolean",
    "check",
    "check_names",
    "choice",
    "declarations",
    "integer",
    "number",
    "parse",
    "values",
]

Value = bool | int | float | str | None
Metadata = Mapping[str, "Declaration"]  # of `dataclasses.field`

MAX_SIZE = 2**24  # largest plausible size of an axis
_KEY = "setting"


class Declaration(Protocol):
    """The valid values of a setting."""

    def accepts(self, value: object) -> bool:
        """Return whether the value is valid."""

    def requirement(self) -> str:
        """The condition on values, in the words of errors."""

    def parse(self, text: str) -> Value:
        """The value of a text; the text itself where it is none."""


@dataclasses.dataclass(frozen=True)
class _Boolean:
    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)

    def requirement(self) -> str:
        return "true or false"

    def parse(self, text: str) -> Value:
        return {"true": True, "false": False}.get(text.lower(), text)


@dataclasses.dataclass(frozen=True)
class _Integer:
    minimum: int
    maximum: int
    is_optional: bool

    def accepts(self, value: object) -> bool:
        if value is None:
            return self.is_optional
        return type(value) is int and self.minimum <= value <= self.maximum

    def requirement(self) -> str:
        return f"an integer from {self.minimum} to {self.maximum}"

    def parse(self, text: str) -> Value:
        if self.is_optional and text in ("null", "none", "None"):
            return None
        try:
            return int(text)
        except ValueError:
            return text


@dataclasses.dataclass(frozen=True)
class _Number:
    minimum: float
    above: float
    below: float
    reason: str

    def accepts(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.minimum <= value < self.below and self.above < value

    def requirement(self) -> str:
        lower_bound = f"at least {self.minimum:g}"
        if self.minimum < self.above:
            lower_bound = f"above {self.above:g}"
        is_bounded = math.isfinite(self.below)
        upper_bound = f"below {self.below:g}" if is_bounded else "finite"
        reason = f", {self.reason}" if self.reason else ""
        return f"a number {lower_bound} and {upper_bound}{reason}"

    def parse(self, text: str) -> Value:
        try:
            return float(text)
        except ValueError:
            return text


@dataclasses.dataclass(frozen=True)
class _Choice:
    names: tuple[str, ...]

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self.names

    def requirement(self) -> str:
        return f"one of {', '.join(self.names)}"

    def parse(self, text: str) -> Value:
        return text


def boolean() -> Metadata:
    """True or false."""
    return {_KEY: _Boolean()}


def integer(minimum: int, maximum: int, *, is_optional: bool = False) -> Metadata:
    """An integer from `minimum` to `maximum`; None as well, if it is optional."""
    return {_KEY: _Integer(minimum, maximum, is_optional)}


def number(
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    reason: str = "",
) -> Metadata:
    """A finite number >= `minimum`, > `above` and < `below`; errors end with the reason."""
    return {_KEY: _Number(minimum, above, below, reason)}


def choice(names: Sequence[str]) -> Metadata:
    """One of some words."""
    return {_KEY: _Choice(tuple(names))}


def declarations(settings_class: type) -> dict[str, Declaration]:
    """Name -> declaration of the settings of a dataclass."""
    fields = dataclasses.fields(settings_class)
    return {
        field.name: field.metadata[_KEY] for field in fields if _KEY in field.metadata
    }


def values(instance: object) -> dict[str, Value]:
    """Name -> value of the settings of a dataclass's instance."""
    return {name: getattr(instance, name) for name in declarations(type(instance))}


def check(instance: object) -> None:
    """Check all settings of an instance.

    Raises:
      InputError: naming the setting, its value and the condition on it.
    """
    for name, declaration in declarations(type(instance)).items():
        value = getattr(instance, name)
        if not declaration.accepts(value):
            raise InputError(
                f"{name} is {value!r:.60}; it must be {declaration.requirement()}"
            )


def check_names(subject: str, settings_class: type, names: Sequence[str]) -> None:
    """Raise InputError for names that are not settings; errors call the dataclass `subject`."""
    known_names = declarations(settings_class)
    for name in names:
        if name not in known_names:
            raise InputError(
                f"{subject} has no setting {name!r:.60}; it has {', '.join(known_names)}"
            )


def parse(
    subject: str, settings_class: type, assignments: Sequence[str]
) -> dict[str, Value]:
    """Parse settings of a dataclass from their text form.

    A value that cannot be parsed stays text, for which `check` raises InputError.

    Args:
      subject: name of the dataclass in errors, as in "a mixture head".
      settings_class: the dataclass.
      assignments: "name=value", ...

    Raises:
      InputError: for text that is not an assignment, or an unknown setting.
    """
    texts: dict[str, str] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise InputError(f"{assignment!r} is not name=value")
        texts[name.strip()] = text.strip()
    check_names(subject, settings_class, list(texts))
    known_settings = declarations(settings_class)
    return {name: known_settings[name].parse(text) for name, text in texts.items()}
