"""Letters of axes in comments, docstrings, declarations and einsums are those of `axes.LETTERS`."""

import ast
import io
import os
import re
import string
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from continuous_lm import axes

ROOT = Path(__file__).parents[2]
FOLDERS = ("continuous_lm", "losses", "quantize", "models", "experiments")

# What may stand between the commas of a shape: `...`, T, num_panels + 1, P or 1, T * C, 2 bins.
_WORD = r"\*?(?:\d+\s+)?[\w-]+"
_SIZE = rf"(?:\.\.\.|{_WORD}(?:\s+(?:[-+*/]|or)\s+{_WORD})*)"
# The lookbehinds leave out subscripts, and lists that are assigned.
_SHAPE = re.compile(
    rf"(?<![\w)\]])(?<!= )\[(?:\(\w+,\)\s+)?({_SIZE}(?:,\s+{_SIZE})*)\]"
)
_LETTER = re.compile(r"(?<![\w-])[A-Z](?![\w-])")
# "N H D", "(N 3 H) D", "Z ... W", "- B T"; words have an underscore, which no prose has.
_AXIS = r"(?:\.\.\.|-|\d+|[A-Z]|[a-z]*_[a-z_]*)"
_AXES = re.compile(rf"\(?{_AXIS}\)?(?: \(?{_AXIS}\)?)*")
_OPERAND = r"[A-Za-z.()]+"
_EINSUM = re.compile(rf"{_OPERAND}(?:, ?{_OPERAND})+ ?-> ?(?:{_OPERAND})?")
_DOCTEST = re.compile(r"^ *>>>.*(?:\n *\.\.\. .*)*", re.MULTILINE)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment; lines of comment below one another are one."""
    first_line, column, texts = 0, 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, token_column = token.start
        if (line, token_column) != (first_line + len(texts), column) and texts:
            yield first_line, "\n".join(texts)
            texts = []
        if not texts:
            first_line, column = line, token_column
        texts.append(token.string.lstrip("#").strip())
    if texts:
        yield first_line, "\n".join(texts)


def strings(nodes: list[ast.AST]) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, is a docstring) of each string; `_` stands for the fields of f-strings."""
    skipped, docstrings = set(), set()
    for node in nodes:  # parents before their children
        match node:
            case ast.Expr():
                docstrings.add(id(node.value))
            case ast.Compare():
                skipped |= {id(node.left), *map(id, node.comparators)}
            case ast.JoinedStr():
                skipped |= set(map(id, node.values))
                parts = (getattr(part, "value", None) for part in node.values)
                text = "".join(part if isinstance(part, str) else "_" for part in parts)
                yield node.lineno, text, False
            case ast.Constant(value=str(text)) if id(node) not in skipped:
                yield node.lineno, text, id(node) in docstrings


def letters_in_shapes(text: str) -> Iterator[tuple[int, str]]:
    """(lines below the first, letter) of the shapes in prose."""
    text = _DOCTEST.sub(lambda match: "\n" * match[0].count("\n"), text)
    for shape in _SHAPE.finditer(text):
        for letter in _LETTER.finditer(shape[1]):
            yield text.count("\n", 0, shape.start(1) + letter.start()), letter[0]


def used_letters(source: str) -> Iterator[tuple[int, str]]:
    """(line, letter) wherever a letter stands for an axis."""
    nodes = list(ast.walk(ast.parse(source)))
    texts = list(strings(nodes))
    for line, text in (*comments(source), *((line, text) for line, text, _ in texts)):
        yield from ((line + below, letter) for below, letter in letters_in_shapes(text))
    einsums = {
        getattr(argument, "value", None)
        for node in nodes
        if isinstance(node, ast.Call)
        if getattr(node.func, "attr", getattr(node.func, "id", "")) == "einsum"
        for argument in node.args[:1]
    }
    for line, text, is_docstring in texts:
        if is_docstring:
            continue
        if text in einsums or _EINSUM.fullmatch(text):
            # A capital is a second axis of the letter's meaning, as in "...wr,...wR->...rR".
            yield from ((line, letter.upper()) for letter in text if letter.isalpha())
        elif _AXES.fullmatch(text):
            yield from ((line, letter) for letter in _LETTER.findall(text))


def unlisted_letters(root: Path, folders: Iterable[str] = FOLDERS) -> list[str]:
    """Return FILE:LINE: LETTER for each letter not in `axes.LETTERS`, without following links."""
    unlisted = set()
    for folder in folders:
        for parent, _, names in os.walk(root / folder):
            for path in (Path(parent, name) for name in names if name.endswith(".py")):
                if not path.is_symlink():
                    letters = used_letters(path.read_text(encoding="utf-8"))
                    unlisted |= {
                        (path, *use) for use in letters if use[1] not in axes.LETTERS
                    }
    return [
        f"{path.relative_to(root)}:{line}: {letter}"
        for path, line, letter in sorted(unlisted)
    ]


def test_sources_use_letters_that_are_listed():
    assert unlisted_letters(ROOT) == []


def test_sources_use_every_letter_that_is_listed():
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    unused = set(axes.LETTERS)
    for path in paths:
        unused -= {
            letter for _, letter in used_letters(path.read_text(encoding="utf-8"))
        }
        if not unused:
            break
    assert not unused


def test_the_list_is_in_order():
    assert list(axes.LETTERS) == sorted(axes.LETTERS)
    assert set(axes.LETTERS) <= set(string.ascii_uppercase)
    assert set(axes.SHARDING_RULES) <= set(axes.LETTERS)
    assert len(set(axes.LETTERS.values())) == len(axes.LETTERS)


def found_in(source: str) -> list[tuple[int, str]]:
    return sorted({use for use in used_letters(source) if use[1] not in axes.LETTERS})


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""Draws [Y, B]."""', 1),
        ('def f(x):\n    """Of x [..., T,\n    Y].\n    """', 3),
        (
            'def f(x):\n    """Of x.\n\n    Args:\n      x: float32 [P or 1, Y].\n    """',
            5,
        ),
        ("x = 1  # int [Y], of each row", 1),
        ("x = 1\n# A long comment on [B, T,\n# Y], the draws.\ny = 2", 3),
        ("x: int  # [Y + 1]", 1),
        ("x: int  # [B, T * Y]", 1),
        ("x: int  # [(num_targets,) ..., Y]", 1),
        ("x: int  # [2 Y, T]", 1),
        ('raise ValueError("they must be [..., T, Y]")', 1),
        ('raise ValueError(f"{name} must be [{size}, Y]")', 1),
        ('f("N Y D")', 1),
        ('f("(N Y) D")', 1),
        ('f("... Z Y")', 1),
        ('f("num_targets ... Y")', 1),
        ('f(f"{letter} Y")', 1),
        ('f("x", "Y")', 1),
        ('AXES = {"Y": "data"}', 1),
        ('x = jnp.einsum("...d,yd->...y", a, b)', 1),
        ('x = np.einsum("bw,yw", a, b)', 1),
        ('assert np.abs(np.einsum("yy", a)) < 1', 1),
        ('multiply(\n    "yt,ts -> ys", a, b)', 2),
        ('np.vectorize(f, signature="(y,y),(y)->(y)")', 1),
        ('x = jnp.einsum("...w,wY->...Y", a, b)', 1),
    ],
)
def test_finds_unlisted(source, line):
    assert found_in(source) == [(line, "Y")]


@pytest.mark.parametrize(
    "source",
    [
        "# [num_panels + 1], [num_targets, ...], [..., rotary_channels], [(num_targets,) ..., W]",
        "# [..., T, N, H], [B, T], [P or 1, A], [T + 1], [B, T * C], [T / queries, S / keys]",
        "# probabilities in [0, 1], times in [0.5, 1e6]",
        "# LeCun [Y. LeCun, 2015], [Young and Yu, 1999], [Y1], [Y-axis]",
        "# [default: Y], [Y/n], [--option=Y], and [whether Y is meant]",
        "# P(x)^n, X - Y, a vector Y",
        "# columns = [X, Y], table[Y], f(x)[Y], dict[K, Y]",
        '"""\n>>> print([Y, Y], x[Y])\n[1 2]\n>>> print(\n...     [Y]\n... )\n[1]\n"""',
        "x = [Y, Y][Y]",
        'f(["x", "y"], "[O-Y]", "<Y", "Y numbers", "to Y", "Y is", "YES")',
        'if x == "Y":\n    pass',
        'f("N H D", "(N 3 H) D", "- B T", "num_targets ... W", "Z ... W")',
        'jnp.einsum("...cD,dcD->...d", a, b)',
        'f("x->y, or y->x?", "a yes->no")',
    ],
)
def test_valid_sources_have_no_unlisted_letters(source):
    assert found_in(source) == []


def test_names_files_and_follows_no_links(tmp_path):
    folder = tmp_path / "models" / "calm"
    folder.mkdir(parents=True)
    (folder / "planted.py").write_text('"""One.\n\nTwo: [B, Y].\n"""\nz = 1  # [O]\n')
    (folder / "link.py").symlink_to(folder / "planted.py")
    (tmp_path / "continuous_lm").mkdir()
    (tmp_path / "continuous_lm" / "models").symlink_to(tmp_path / "models")
    expected = ["models/calm/planted.py:3: Y", "models/calm/planted.py:5: O"]
    assert unlisted_letters(tmp_path) == expected
