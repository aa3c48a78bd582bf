"""Examples in docstrings are right, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from continuous_lm import quantize

MODULES = [
    importlib.import_module(f"{quantize.__name__}.{module.name}")
    for module in pkgutil.iter_modules(quantize.__path__)
]


@pytest.mark.parametrize(
    "module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_function_has_an_example():
    functions = [
        f
        for name in quantize.__all__
        if inspect.isfunction(f := getattr(quantize, name))
    ]
    assert len(functions) > 20
    for function in functions:
        assert ">>> " in inspect.getdoc(function), function.__name__
