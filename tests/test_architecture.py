"""The walk of `durations` in docs/architecture.md, held against the calls that are made."""

import sys

import jax
import jax.numpy as jnp

import continuous_lm as clm

VALUES = {
    "durations",
    "inputs",
    "timing",
    "key_weights",
    "problem",
}  # names, and what holds it
# Modules that return a result to the caller; the value does not move on from them.
LEAVES = {"models.trunk_inputs", "inputs", "durations", "attention.problem"}


def calls_with_durations(call):
    """(module, function, names) of every call of ours that gets durations, in order."""
    visited = []

    def profile(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        if event != "call" or not module.startswith("continuous_lm."):
            return
        code = frame.f_code
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if names := VALUES & set(arguments):
            visited.append((module.removeprefix("continuous_lm."), code.co_name, names))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return visited


def test_durations_go_one_way_and_are_checked_once():
    jax.clear_caches()  # compiled functions would not be traced again
    lm = clm.load("apples")
    tokens = jnp.arange(1, 6)
    visited = calls_with_durations(
        lambda: lm(tokens, durations=jnp.linspace(0.5, 1.0, 5))
    )
    functions = [function for _, function, _ in visited]
    assert functions.count("check_durations") == 1
    names = {name for _, _, actual in visited for name in actual}
    assert names - {"inputs", "timing", "problem"} == {"durations", "key_weights"}
    way = []
    for module, _, _ in visited:
        if module not in LEAVES and way[-1:] != [module]:
            way.append(module)
    assert way == [
        "models.language_model",
        "models.transformer",
        "models.layers",
        "attention",
        "attention.dense",
        "attention.softmax",
    ]
