"""Modules that `import continuous_lm` imports, and names that the package exports."""

import re
import subprocess
import sys

import pytest

import continuous_lm as clm
from tests.fixtures.programs import ENVIRONMENT

LATE = "optax tokenizers grain orbax matplotlib scipy torch transformers faiss".split()
LATE += ["huggingface_hub"]
EARLY = "load generate sweep durations attention tokenization rotary axes".split()

FACE = {
    "Models": "load save bundled_models LanguageModel Transformer TransformerConfig Inputs Output"
    " KVCache density calm",
    "Generation": "generate Generated Greedy Temperature Sampler sample_token tokenization",
    "Time": "durations signals attention rotary",
    "Analysis": "sweep attribution deletion duration_search pruning",
    "Losses and codes": "losses quantize",
    "Ground": "axes InputError",
}


def imported_by(program: str, *names: str) -> list[str]:
    """Return the modules among `names` that a program imports after jax and flax."""
    program = (
        f"import sys, jax, flax; before = set(sys.modules); {program};"
        f" print(*({set(names)} & (set(sys.modules) - before)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def test_heavy_packages_are_imported_lazily():
    uses = "; ".join(f"continuous_lm.{name}" for name in EARLY)
    assert imported_by(f"import continuous_lm; {uses}", *LATE) == []
    assert imported_by("import continuous_lm; continuous_lm.pruning", *LATE) == [
        "optax"
    ]  # or the check would find nothing ever


def test_importing_the_package_imports_neither_jax_nor_numpy():
    program = "import sys, continuous_lm; print(*({'jax', 'numpy'} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert process.stdout.split() == [], process.stderr


def test_dir_is_the_table_of_contents():
    names = " ".join(FACE.values()).split()
    assert sorted(dir(clm)) == sorted(names) == sorted(clm.__all__)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", " ".join(FACE.values()).split())
def test_each_name_is_there(name):
    value = getattr(clm, name)
    assert value.__doc__
    assert value.__name__.rpartition(".")[-1] == name
    assert getattr(clm, name) is value


def test_the_docstring_lists_each_name_under_its_theme():
    themes = {}
    for line in clm.__doc__.splitlines():
        if match := re.fullmatch(r"(\w[\w ]*):", line):
            theme = themes.setdefault(match[1], [])
        elif match := re.fullmatch(r"  (\w+) {2,}\S.*", line):
            theme.append(match[1])
    assert {theme: " ".join(names) for theme, names in themes.items()} == FACE


def test_unknown_attributes_are_refused():
    with pytest.raises(AttributeError, match="'continuous_lm' has no attribute 'lode'"):
        clm.lode  # noqa: B018
    assert not hasattr(clm.density, "lode")
