"""The README's example is run as it stands."""

import pathlib
import re

import jax.numpy as jnp

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_does_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "['4', '3', '2', '1']"
    assert len(rest) == len(names["tokens"])
    first, end = names["span"]
    sensitivity = names["sensitivity"]
    others = jnp.delete(sensitivity, jnp.arange(first, end))
    assert sensitivity[first:end].min() > others.max() + 1.0  # the apples, and nothing else
