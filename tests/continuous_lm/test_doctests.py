"""Examples in docstrings: all of them run, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from continuous_lm import losses, quantize

# Packages whose modules hold the public functions, and single modules.
PACKAGES = ("losses", "quantize")
MODULES = ("attention", "durations")
NAMES = [
    *(f"continuous_lm.{name}" for name in MODULES),
    *(
        f"continuous_lm.{package}.{module.name}"
        for package in PACKAGES
        for module in pkgutil.iter_modules(
            importlib.import_module(f"continuous_lm.{package}").__path__
        )
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("package", [losses, quantize], ids=["losses", "quantize"])
def test_every_public_function_has_an_example(package):
    functions = [
        value
        for name in package.__all__
        if inspect.isfunction(value := getattr(package, name))
    ]
    assert len(functions) >= 14
    for function in functions:
        docstring = inspect.getdoc(function)
        assert "\nExamples:\n  >>> " in docstring, function.__name__
        assert "\nArgs:\n" in docstring, function.__name__


@pytest.mark.parametrize("package", [losses, quantize], ids=["losses", "quantize"])
def test_the_package_docstring_lists_every_public_function(package):
    for name in package.__all__:
        if inspect.isfunction(getattr(package, name)):
            assert f"`{name}`" in package.__doc__, name
