"""`__all__` of a public module has every public name that it defines, and no imported one."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from tests.test_packaging import ROOT, module_name

# These promise what their modules define, which are no users' business.
PACKAGES = ("attention", "losses", "models.calm.autoencoder", "quantize")
# Elsewhere each module promises what stands in it.
FOLDERS = (
    "continuous_lm",
    "continuous_lm/analysis",
    "continuous_lm/io",
    "continuous_lm/parallel",
    "models",
    "models/calm",
    "models/checkpoints",
    "models/density",
)
MODULES = [
    module_name(path.relative_to(ROOT)).removeprefix("continuous_lm.")
    for folder in FOLDERS
    for path in sorted(Path(ROOT, folder).glob("[a-z]*.py"))
    if path != ROOT / "models/calm/autoencoder.py"  # hands on names of three modules
]


def defined_names(source: str) -> set[str]:
    """Functions, classes and assignments at the top of a module, but for those with a `_`."""
    names = set()
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                if "TypeVar" not in ast.dump(node.value):
                    names.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("name", MODULES)
def test_all_lists_every_public_name_of_a_module(name):
    module = importlib.import_module(f"continuous_lm.{name}")
    assert set(module.__all__) == defined_names(inspect.getsource(module))


@pytest.mark.parametrize("name", [*PACKAGES, *MODULES])
def test_all_lists_are_sorted_without_repetition(name):
    module = importlib.import_module(f"continuous_lm.{name}")
    assert all(hasattr(module, promised) for promised in module.__all__)
    capitals_first = sorted(
        module.__all__, key=lambda word: (not word.isupper(), word.islower(), word)
    )
    assert list(module.__all__) == capitals_first


def test_every_public_name_has_a_docstring():
    for name in (*PACKAGES, *MODULES):
        module = importlib.import_module(f"continuous_lm.{name}")
        for promised in module.__all__:
            value = getattr(module, promised)
            is_constant = promised.isupper()
            if not is_constant and (
                inspect.isfunction(value) or inspect.isclass(value)
            ):
                assert inspect.getdoc(value), f"{name}.{promised}"


def test_finds_names():
    source = "import os\nA = 1\n_b = 2\nc: int = 3\nT = TypeVar('T')\ndef f(): g = 1\n"
    assert defined_names(source + "class D: pass\ndef _e(): pass\n") == {
        "A",
        "c",
        "f",
        "D",
    }
