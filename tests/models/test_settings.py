"""Settings: which values a field takes, what errors say, the text form."""

import dataclasses
import math
from dataclasses import field

import pytest

import continuous_lm as clm
from continuous_lm.models import settings


@dataclasses.dataclass(frozen=True)
class Example:
    size: int = field(metadata=settings.integer(1, 8))
    depth: int | None = field(
        default=None, metadata=settings.integer(0, 3, is_optional=True)
    )
    scale: float = field(default=0.5, metadata=settings.number(above=0.0, below=1.0))
    weight: float = field(default=0.0, metadata=settings.number(minimum=0.0))
    shape: str = field(default="round", metadata=settings.choice(["round", "flat"]))
    tied: bool = field(default=False, metadata=settings.boolean())
    note: object = "no setting"

    def __post_init__(self):
        settings.check(self)


GOOD = {
    "size": [1, 8],
    "depth": [None, 0, 3],
    "scale": [0.001, 0.5, 0.999],
    "weight": [0, 0.0, 3, 1e30],
    "shape": ["round", "flat"],
    "tied": [True, False],
}
BAD = {
    "size": [0, 9, -1, None, True, 2.0, "2", math.nan, 10**400, [1]],
    "depth": [-1, 4, False, 1.0, "none"],
    "scale": [0.0, 1, 1.0, -0.5, math.nan, math.inf, 10**400, True, None, "0.5"],
    "weight": [-1e-9, math.inf, -math.inf, math.nan, False, None, "0", [0.0]],
    "shape": ["square", "", None, 3, ("round",), ["round"]],
    "tied": [0, 1, None, "true"],
}
REQUIREMENTS = {
    "size": "an integer from 1 to 8",
    "depth": "an integer from 0 to 3",
    "scale": "a number above 0 and below 1",
    "weight": "a number at least 0 and finite",
    "shape": "one of round, flat",
    "tied": "true or false",
}


@pytest.mark.parametrize("name", GOOD)
def test_valid_values_of_fields(name):
    for value in GOOD[name]:
        example = Example(**{"size": 2, name: value})
        assert settings.values(example)[name] == value


@pytest.mark.parametrize("name", BAD)
def test_wrong_values_of_fields_are_refused(name):
    for value in BAD[name]:
        with pytest.raises(clm.InputError) as refused:
            Example(**{"size": 2, name: value})
        message = f"{name} is {value!r:.60}; it must be {REQUIREMENTS[name]}"
        assert str(refused.value) == message


def test_values_have_only_the_settings():
    assert list(settings.values(Example(4))) == list(GOOD)
    assert "note" not in settings.declarations(Example)


def test_a_reason_ends_the_message():
    declaration = settings.number(above=0.0, reason="as it divides")["setting"]
    assert declaration.requirement() == "a number above 0 and finite, as it divides"


def test_text_is_parsed_by_the_declarations():
    assignments = ["size=4", " depth = none", "scale=.25", "weight=2", "shape=flat"]
    parsed = settings.parse("an example", Example, [*assignments, "tied=true"])
    expected = {"size": 4, "depth": None, "scale": 0.25, "weight": 2.0}
    assert parsed == expected | {"shape": "flat", "tied": True}
    assert type(parsed["weight"]) is float
    assert Example(**parsed) == Example(4, None, 0.25, 2.0, "flat", True)
    assert settings.parse("an example", Example, ["depth=2"]) == {"depth": 2}
    # Text of another type stays text, which the check refuses.
    for assignment in ("size=two", "size=2.5", "scale=half", "tied=1", "depth=1.5"):
        name, _, text = assignment.partition("=")
        parsed = settings.parse("an example", Example, [assignment])
        assert parsed == {name: text}
        with pytest.raises(clm.InputError, match=f"{name} is '{text}'; it must be"):
            Example(**{"size": 2} | parsed)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("size", "'size' is not name=value"),
        ("", "'' is not name=value"),
        ("colour=3", "an example has no setting 'colour'; it has size, depth, scale"),
        ("note=3", "an example has no setting 'note'"),
    ],
)
def test_wrong_texts_are_refused(assignment, message):
    with pytest.raises(clm.InputError) as refused:
        settings.parse("an example", Example, [assignment])
    assert str(refused.value).startswith(message)
