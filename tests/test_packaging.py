"""A build has every module once, under its installed name, and imports point downward."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "losses",
    "quantize",
    "models",
    "experiments",
)  # installed as continuous_lm.FOLDER
PACKED = {".jinja", ".json", ".py", ".safetensors", ".typed"}


def installed_name(path: Path) -> Path:
    """models/config.py -> continuous_lm/models/config.py."""
    return Path("continuous_lm", path) if path.parts[0] in FOLDERS else path


def sources(root: Path) -> Iterator[Path]:
    """The packages' files, relative to `root`; the links to the folders are not followed."""
    for folder in ("continuous_lm", *FOLDERS):
        for parent, folders, names in os.walk(root / folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            yield from ((Path(parent) / name).relative_to(root) for name in names)


# --- The wheel ---


def build_wheel(root: Path, out: Path) -> Path:
    """Builds the wheel of `root` in this environment, without a network."""
    program = (
        "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, out], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, without earlier builds."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("continuous_lm", *FOLDERS):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def packed(wheel: Path) -> Counter[Path]:
    """The files in the wheel but its metadata, with how often each is in it."""
    names = Counter(map(Path, zipfile.ZipFile(wheel).namelist()))
    return Counter(
        {p: n for p, n in names.items() if not p.parts[0].endswith(".dist-info")}
    )


def test_the_wheel_has_one_top_level_name(wheel: Path):
    assert {path.parts[0] for path in packed(wheel)} == {"continuous_lm"}


def test_every_file_is_in_the_wheel_once(wheel: Path):
    expected = Counter(
        installed_name(path) for path in sources(ROOT) if path.suffix in PACKED
    )
    assert packed(wheel) == expected
    assert Path("continuous_lm/py.typed") in expected


def test_bundled_models_are_packed(tree: Path, tmp_path: Path):
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, symlinks=True)
    folder = Path("models/bundled/one")
    (copy / folder).mkdir(parents=True)
    names = ("config.json", "model.safetensors", "tokenizer.json")
    for name in names:
        (copy / folder / name).touch()
    actual = packed(build_wheel(copy, tmp_path / "wheel"))
    assert {installed_name(folder / name) for name in names} <= set(actual)


def test_the_wheel_imports(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    modules = ["continuous_lm", *(f"continuous_lm.{folder}" for folder in FOLDERS)]
    program = f"import {', '.join(modules)}; print(continuous_lm.models.__file__)"
    run = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(tmp_path)


@pytest.mark.skipif(
    os.name == "nt", reason="git makes no links on Windows unless told to"
)
@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str):
    assert os.readlink(ROOT / "continuous_lm" / folder) == f"../{folder}"


def test_the_command_line_is_installed(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "continuous-lm = continuous_lm.__main__:main" in archive.read(name).decode()


# --- The folders ---

MOST_FILES = 13  # of a folder: more of one kind want sub-folders


def test_no_folder_is_crowded():
    modules = [path for path in sources(ROOT) if path.suffix == ".py"]
    counts = Counter(path.parent for path in modules if path.name != "__init__.py")
    crowded = {str(folder): n for folder, n in counts.items() if n > MOST_FILES}
    assert not crowded


# --- The layers ---

# The packages that each layer may import beside its own. The ground is all of continuous_lm but
# analysis, which stands above the models, and the face: __init__.py, which hands on names from
# above, and __main__.py, the command line.
GROUND, ANALYSIS, FACE = "continuous_lm", "analysis", "the face"
BELOW = {
    GROUND: set(),
    "losses": {GROUND},
    "quantize": {GROUND, "losses"},  # the terms of a vector quantizer's loss
    "models": {GROUND, "losses", "quantize"},
    ANALYSIS: {GROUND, "losses", "quantize", "models"},
    "experiments": {GROUND, "losses", "quantize", "models", ANALYSIS, FACE},
    FACE: {GROUND, ANALYSIS, *FOLDERS},
}
FACE_FILES = ("continuous_lm/__init__.py", "continuous_lm/__main__.py")


def imports(source: str, *, everywhere: bool = True) -> Iterator[str]:
    """Every module imported in `source`, with the names taken from it.

    Args:
      source: source text of a module.
      everywhere: also inside functions and under TYPE_CHECKING.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(name: str, ground: set[str]) -> str | None:
    """The layer that an import of `name` reaches; None outside the project."""
    top, _, others = name.partition(".")
    first = others.partition(".")[0]
    if top != "continuous_lm":
        return None
    if first in FOLDERS or first == ANALYSIS:
        return first
    return GROUND if first in ground else FACE


def own_layer(path: Path) -> str:
    """The layer of the module at `path`."""
    if path.as_posix() in FACE_FILES:
        return FACE
    return ANALYSIS if path.parts[:2] == ("continuous_lm", ANALYSIS) else path.parts[0]


def faults(path: Path, source: str, ground: set[str]) -> list[str]:
    """The imports of the module at `path` that break the rule."""
    single = own_layer(path)
    actual = []
    for name in imports(source):
        reached = layer(name, ground)
        if name.startswith(".") or name.partition(".")[0] in FOLDERS:
            actual.append(
                f"{path}: import {name} by its installed name, continuous_lm. ..."
            )
        elif reached not in {None, single, *BELOW[single]}:
            actual.append(f"{path}: {single} may not import {name}, of {reached}")
    return actual


def python_files() -> list[Path]:
    return [path for path in sources(ROOT) if path.suffix == ".py"]


def test_imports_point_downward():
    modules = python_files()
    ground = {
        path.parts[1].removesuffix(".py") for path in modules if path.parts[0] == GROUND
    }
    ground -= {ANALYSIS, "__init__", "__main__"}
    actual = [
        f for path in modules for f in faults(path, (ROOT / path).read_text(), ground)
    ]
    assert not actual, "\n".join(actual)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("continuous_lm/attention/dense.py", "import continuous_lm.models.config"),
        ("continuous_lm/attention/dense.py", "from continuous_lm import losses"),
        (
            "continuous_lm/attention/dense.py",
            "def f():\n    from continuous_lm import load",
        ),
        ("continuous_lm/parallel/pmap.py", "from continuous_lm.analysis import sweep"),
        ("continuous_lm/analysis/sweep.py", "from continuous_lm import load"),
        (
            "continuous_lm/analysis/sweep.py",
            "from continuous_lm.experiments import report",
        ),
        ("losses/energy.py", "from continuous_lm.models import config"),
        ("losses/energy.py", "from continuous_lm.quantize import nearest"),
        (
            "quantize/vq.py",
            "from continuous_lm.experiments.durations.counting import main",
        ),
        (
            "models/config.py",
            "from continuous_lm.experiments.durations import counting",
        ),
        ("models/config.py", "from continuous_lm.analysis import sweep"),
        ("models/config.py", "import continuous_lm as clm"),
        ("models/config.py", "from models import transformer"),
        ("models/config.py", "from . import transformer"),
        ("models/config.py", "from ..losses import energy"),
        ("experiments/durations/counting.py", "import losses.energy"),
    ],
)
def test_a_fault_is_found(path: str, source: str):
    assert len(faults(Path(path), source, ground={"attention"})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "continuous_lm/__init__.py",
            "from continuous_lm.models.loading import load",
        ),
        ("continuous_lm/__main__.py", "from continuous_lm.experiments import PROGRAMS"),
        ("continuous_lm/attention/dense.py", "from continuous_lm import attention"),
        (
            "continuous_lm/analysis/sweep.py",
            "from continuous_lm.models import transformer",
        ),
        (
            "losses/energy.py",
            "import jax, modelsets\nfrom continuous_lm.attention import attend",
        ),
        (
            "models/config.py",
            "from continuous_lm.quantize import vq\nimport continuous_lm.losses",
        ),
        (
            "experiments/durations/counting.py",
            "import continuous_lm as clm\nfrom continuous_lm import load",
        ),
    ],
)
def test_what_is_allowed_is_no_fault(path: str, source: str):
    assert not faults(Path(path), source, ground={"attention"})


def module_name(path: Path) -> str:
    """models/config.py -> continuous_lm.models.config."""
    parts = installed_name(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(files: Mapping[str, str], packages: set[str]) -> dict[str, set[str]]:
    """The modules that each module imports when it is imported itself.

    Args:
      files: module -> source.
      packages: the modules that are packages. A package imports its own modules, and they do not
        count as importing it: Python enters a package before its modules anyway.
    """
    graph = {}
    for name, source in files.items():
        reached = set()
        for full in imports(source, everywhere=False):
            target = full if full in files else full.rpartition(".")[0]
            if target in files and not (
                target in packages and name.startswith(f"{target}.")
            ):
                reached.add(target)
        graph[name] = reached - {name}
    return graph


def a_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none if there is no circle."""
    remaining = set(graph)
    while True:
        reached = {target for name in remaining for target in graph[name]}
        inner = {name for name in remaining & reached if graph[name] & remaining}
        if inner == remaining:
            return sorted(remaining)
        remaining = inner


def test_imports_form_no_circle():
    modules = {module_name(path): (ROOT / path).read_text() for path in python_files()}
    packages = {module_name(p) for p in python_files() if p.name == "__init__.py"}
    assert not a_circle(import_graph(modules, packages))


def test_a_circle_is_found():
    files = {
        "a": "from a import b",
        "a.b": "import a.c",
        "a.c": "from a.b import x",
        "a.d": "",
    }
    assert a_circle(import_graph(files, {"a"})) == ["a.b", "a.c"]
    assert not a_circle(
        import_graph(files | {"a.c": "def f():\n    import a.b"}, {"a"})
    )
