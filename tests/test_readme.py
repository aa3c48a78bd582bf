"""The README's examples are run as they stand, but those that need a folder of one's own."""

import pathlib
import re

import jax.numpy as jnp
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_examples_do_what_they_say(capsys):
    codes = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    for code in codes:
        if "path/to" not in code:
            exec(compile(code, "README.md", "exec"), names)
    first, *rest, generated = capsys.readouterr().out.splitlines()
    assert first == "['4', '3', '2', '1']"
    assert len(rest) == len(names["tokens"])
    assert generated.startswith("[")
    assert names["lm"].model.remat
    first, end = names["span"]
    sensitivity = names["sensitivity"]
    others = jnp.delete(sensitivity, jnp.arange(first, end))
    assert (
        sensitivity[first:end].min() > others.max() + 1.0
    )  # the apples, and nothing else
    tokens = names["tokens"]
    assert names["log_prob"].shape == (len(tokens) - 1,)
    gradient = names["gradient"]
    assert jnp.isfinite(gradient).all()
    assert (gradient != 0).any()
    assert gradient[-1] == 0  # nothing comes after the last token
    assert names["new"].tokens.shape == (1, 8)
