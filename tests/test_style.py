"""How the code is written, measured: hidden signatures, lost types, density.

The numbers in RATCHETS may only get better; store better ones there.
"""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("continuous_lm", "losses", "quantize", "models", "experiments")
MAX_CASTS = 5
# A contract of arrays by their names needs keywords; each is an (array, axes) of its own.
ALLOWED_KWARGS = {"continuous_lm/arguments.py: check"}


class Density(NamedTuple):
    """How much a reader has to take in."""

    nodes_per_line: float  # of the syntax tree; docstrings and comments are no lines
    mean_name_length: float  # of names that are assigned, in letters


# Folder -> at most so many nodes a line, at least so many letters a name.
RATCHETS = {
    "continuous_lm": Density(5.5, 7.3),
    "losses": Density(5.4, 9.3),
    "quantize": Density(5.4, 7.3),
    "models": Density(5.1, 7.8),
    "experiments": Density(5.25, 7.75),
}


def sources(folder: str) -> dict[str, str]:
    """Path from the root -> text, of a folder's Python files; links are not followed."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in sorted(ROOT.joinpath(folder).rglob("*.py"))
        if not any(part.is_symlink() for part in [path, *path.parents])
    }


SOURCES = {path: text for folder in FOLDERS for path, text in sources(folder).items()}


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of a module and methods of its classes, with their names from the module's."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and _is_public(method.name):
                    yield f"{node.name}.{method.name}", method


def _is_public(method: str) -> bool:
    return not method.startswith("_") or method == "__call__"


def with_kwargs(path: str, source: str) -> list[str]:
    """Public functions that take any keywords."""
    functions = public_functions(ast.parse(source))
    names = [f"{path}: {name}" for name, function in functions if function.args.kwarg]
    return [name for name in names if name not in ALLOWED_KWARGS]


def with_any_result(path: str, source: str) -> list[str]:
    """Public functions whose result has no type: -> Any."""
    return [
        f"{path}: {name}"
        for name, function in public_functions(ast.parse(source))
        if function.returns is not None and ast.unparse(function.returns) == "Any"
    ]


def with_method_names(path: str, source: str) -> list[str]:
    """Calls of a Linen module's method by its name: model.apply(..., method="loss")."""
    return [
        f"{path}:{node.lineno}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("apply", "init", "init_with_output")
        and any(keyword.arg == "method" for keyword in node.keywords)
    ]


def casts(path: str, source: str) -> list[str]:
    """Calls of typing.cast."""
    return [
        f"{path}:{node.lineno}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("cast", "typing.cast")
    ]


def density(texts: list[str]) -> Density:
    """Of these sources together."""
    num_nodes = 0
    num_lines = 0
    name_lengths = []
    for text in texts:
        tree = ast.parse(text)
        docstring_lines: set[int] = set()
        for node in ast.walk(tree):
            num_nodes += not isinstance(node, ast.Load | ast.Store | ast.Del)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name_lengths.append(len(node.id))
            if _has_docstring(node):
                first = node.body[0]
                docstring_lines |= set(range(first.lineno, first.end_lineno + 1))
        for number, line in enumerate(text.splitlines(), 1):
            is_code = line.strip() and not line.strip().startswith("#")
            num_lines += bool(is_code and number not in docstring_lines)
    return Density(num_nodes / num_lines, statistics.mean(name_lengths))


def _has_docstring(node: ast.AST) -> bool:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node) is not None


@pytest.mark.parametrize("find", [with_kwargs, with_any_result, with_method_names])
def test_signatures_say_what_they_take_and_give(find):
    faults = [fault for path, text in SOURCES.items() for fault in find(path, text)]
    assert not faults, f"{find.__doc__}\n" + "\n".join(faults)


def test_casts_are_few():
    found = [line for path, text in SOURCES.items() for line in casts(path, text)]
    assert len(found) <= MAX_CASTS, "\n".join(found)


@pytest.mark.parametrize("folder", FOLDERS)
def test_density_does_not_grow(folder):
    measured = density(list(sources(folder).values()))
    limit = RATCHETS[folder]
    assert measured.nodes_per_line <= limit.nodes_per_line, measured
    assert measured.mean_name_length >= limit.mean_name_length, measured


BAD = """
class Model:
    def loss(self, x, **options): "a"
    def _loss(self, **options): "b"
    def __call__(self) -> Any: "c"
def apply(model, **options):
    def inner(**options): "d"
    return cast(int, model.apply({}, 1, method="loss"))
"""


def test_faults_are_found():
    assert with_kwargs("a.py", BAD) == ["a.py: Model.loss", "a.py: apply"]
    assert with_any_result("a.py", BAD) == ["a.py: Model.__call__"]
    assert with_method_names("a.py", BAD) == ["a.py:8"]
    assert casts("a.py", BAD) == ["a.py:8"]
    two_lines = '"""Says."""\n# a\nlonger = 1\nx = f(2)\n'
    assert density([two_lines]) == Density(11 / 2, 3.5)
