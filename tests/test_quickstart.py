"""The notebook for Colab is valid and short, and its cells run in order."""

import json
import pathlib
import re

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def sources(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells]


def test_it_is_a_notebook_of_format_4_without_outputs(notebook):
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert cell["execution_count"] is None
            assert cell["outputs"] == []
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == keys
        assert all(isinstance(line, str) for line in cell["source"])


def test_nothing_is_installed_where_the_package_is(notebook):
    first, *others = sources(notebook)
    assert re.search(
        r'if importlib.util.find_spec\("continuous_lm"\) is None:.*\n +%pip', first
    )
    assert "%" not in "".join(
        line for code in others for line in re.findall("^ *%", code, re.M)
    )


@pytest.fixture(scope="module")
def names(notebook):
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    actual: dict = {}
    try:
        for i, code in enumerate(sources(notebook)):
            code = re.sub(
                r"^( *)%.*$", r"\1raise AssertionError", code, flags=re.MULTILINE
            )
            exec(compile(code, f"{NOTEBOOK.name}[{i}]", "exec"), actual)
    finally:
        actual["plt"].close("all")
        matplotlib.use(backend)
    return actual


@pytest.mark.slow
def test_the_answer_falls_from_four_to_one(names):
    leading = names["probabilities"].argmax(axis=1)
    assert [int(x) for x in leading[np.r_[True, np.diff(leading) != 0]]] == [0, 1, 2, 3]
    factor = np.asarray(names["factors"])[np.flatnonzero(np.diff(leading)) + 1]
    np.testing.assert_allclose(factor, [0.375, 0.625, 0.875], atol=0.1)


@pytest.mark.slow
def test_the_apples_argue_for_four(names):
    first, end = names["span"]
    assert jnp.isfinite(names["sensitivity"]).all()
    others = jnp.delete(names["sensitivity"], jnp.arange(first, end))
    assert names["sensitivity"][first:end].min() > others.max()


@pytest.mark.slow
def test_shares_sum_to_the_change(names):
    assert names["shares"].relative_residual() < 0.02


@pytest.mark.slow
def test_the_density_is_of_every_next_vector(names):
    assert names["log_prob"].shape == (len(names["tokens"]) - 1,)
    assert jnp.isfinite(names["log_prob"]).all()


@pytest.mark.slow
def test_the_path_leads_from_word_to_word(names):
    ids = [names["lm"].tokenizer.id_to_token(int(i)) for i in names["found"].indices]
    assert (ids[0], ids[-1]) == ("apple", "banana")
    middle = np.asarray(names["path"][2])
    table = np.asarray(names["table"], np.float32)
    nearest = np.argmin(np.square(table - middle).sum(axis=1))
    assert int(names["found"].indices[2]) == nearest
