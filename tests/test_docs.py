"""README.md and the pages of docs/: their Python code runs, their links lead somewhere, and the API
reference has every public name. `make docs` builds the site.
"""

import importlib
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from continuous_lm.models import calm
from tests.continuous_lm.test_public_names import MODULES, PACKAGES
from tests.fixtures import tiny
from tests.test_packaging import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md"]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES_WITH_CODE = [page for page in PAGES if CODE.search(page.read_text())]


def page_id(page):
    return page.relative_to(ROOT).as_posix()


# --- Code -------------------------------------------------------------------------------------


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A working folder with the checkpoints that the examples call path/to/..."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "path/to/folder")
    calm.save(tmp_path / "path/to/calm", tiny.next_vector_lm())
    codec = calm.autoencoder_of(tiny.next_vector_lm())
    calm.autoencoder.save(tmp_path / "path/to/its/autoencoder", codec)


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=page_id)
def test_code_of_a_page_runs(page, user_folder, capsys):
    names: dict = {}
    for code in CODE.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), names)
    check = CHECKS.get(page_id(page))
    if check is not None:
        check(names, capsys.readouterr().out.splitlines())


def check_readme(names, lines):
    """The printed answers are right, and the gradient points at the apples."""
    first_line, *token_lines, generated = lines
    assert first_line == "['4', '3', '2', '1']"
    assert len(token_lines) == len(names["tokens"])
    assert generated.startswith("[")
    first, end = names["span"]
    sensitivity = names["sensitivity"]
    others = jnp.delete(sensitivity, jnp.arange(first, end))
    assert sensitivity[first:end].min() > others.max() + 1.0
    assert np.isfinite(sensitivity).all()


def check_quickstart(names, lines):
    """The printed answers are right."""
    assert lines[0] == "['4', '3', '2', '1']"
    assert np.isfinite(names["sensitivity"]).all()


def check_density_heads(names, lines):
    """A log-density for each token but the first; its gradient ends before the last token."""
    tokens, gradient = names["tokens"], names["gradient"]
    assert names["log_prob"].shape == (len(tokens) - 1,)
    assert jnp.isfinite(gradient).all()
    assert (gradient != 0).any()
    assert gradient[-1] == 0
    assert names["new"].tokens.shape == (1, 8)


CHECKS = {
    "README.md": check_readme,
    "docs/index.md": check_quickstart,
    "docs/howto/density_heads.md": check_density_heads,
}


# --- Links ------------------------------------------------------------------------------------


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, and those that it writes down."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.*?)(?: *\{#([\w-]+)\})?$", text, re.MULTILINE)
    slugs = {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())
        for title, _ in headings
    }
    return slugs | {name for _, name in headings if name}


def broken_links(page: pathlib.Path) -> list[str]:
    """Relative links of a page without a file or an anchor."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(f"{page_id(page)}: {target}")
    return broken


def test_links_lead_to_files_and_anchors():
    assert not [link for page in PAGES for link in broken_links(page)]


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One `x`\n[a](page.md#one-x) [b](#two) [c](gone.md) [d](https://a.b)\n"
    )
    assert broken_links(page) == ["page.md: #two", "page.md: gone.md"]


# --- API reference ----------------------------------------------------------------------------


def test_every_public_name_is_in_the_api_reference():
    text = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    documented = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    parents = {module.rpartition(".")[0] for module in documented}
    missing = []
    for name in [
        "continuous_lm",
        *(f"continuous_lm.{module}" for module in (*PACKAGES, *MODULES)),
    ]:
        module = importlib.import_module(name)
        for public in module.__all__:
            value = getattr(module, public)
            # Either the page of this module shows it, or that of the module that defines it.
            homes = {
                name,
                getattr(value, "__module__", None),
                getattr(value, "__name__", None),
            }
            if not homes & (documented | parents):
                missing.append(f"{name}.{public}")
    assert not missing


def test_readme_names_every_program():
    from continuous_lm.experiments import PROGRAMS

    table = README.read_text()
    assert not [name for name in PROGRAMS if f"`{name}`" not in table]


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 180
