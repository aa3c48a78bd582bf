"""The examples in the docstrings run, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from continuous_lm import losses

MODULES = [
    f"{losses.__name__}.{module.name}"
    for module in pkgutil.iter_modules(losses.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_every_function_has_an_example_and_a_line_in_the_table():
    functions = [f for f in vars(losses).values() if inspect.isfunction(f)]
    assert len(functions) >= 14
    for function in functions:
        assert doctest.DocTestFinder(recurse=False).find(function)[0].examples, function
        assert function.__name__ in losses.__all__
        assert function.__name__ in losses.__doc__
