"""Models of the Hugging Face hub, without a network: its cache on disk, and its errors."""

import os
import shutil
import subprocess
import sys
import types

import pytest

import continuous_lm as clm
from continuous_lm.models.checkpoints import hub
from tests.fixtures import tiny
from tests.fixtures.programs import ENVIRONMENT

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import sys
import jax, numpy as np
import continuous_lm as clm

for name in sys.argv[2:]:
    try:
        found = clm.load(name).params
        same = jax.tree.map(np.array_equal, found, clm.load(sys.argv[1]).params)
        print(all(jax.tree.leaves(same)))
    except clm.InputError as error:
        print(error)
"""


def cached(home, repo, folder, revision="main"):
    """Lays `folder` out as the hub's cache does."""
    place = home / "hub" / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / revision).write_text(COMMIT)


def offline(home, *arguments):
    """The line that each of the names gives, in a process that has no network."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_models_in_the_cache_of_the_hub_load_offline(tmp_path):
    folder = tiny.save(tmp_path / "x")
    home = tmp_path / "home"
    cached(home, "some-org/some.model", folder)
    cached(home, "org/other", folder, "v1.0")
    cached(home, "org/pickles", folder)
    weights = (
        home
        / "hub"
        / "models--org--pickles"
        / "snapshots"
        / COMMIT
        / "model.safetensors"
    )
    weights.rename(weights.with_name("pytorch_model.bin"))
    names = {
        "some-org/some.model": "True",
        "org/other@v1.0": "True",
        f"org/other@{COMMIT}": "True",
        "org/other": "go online once",  # it has no such branch
        "org/missing": "go online once",
        "org/pickles": "convert the checkpoint to safetensors",
        "../missing": "neither a folder nor a bundled model",
        "org/a--b": "neither a folder nor a name",
    }
    for line, part in zip(offline(home, folder, *names), names.values(), strict=True):
        assert part in line


def answered(kind, status):
    answer = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return lambda: kind("Client Error.\n\nSee the page", response=answer)


ERRORS = {
    "gated": (
        answered(errors.GatedRepoError, 403),
        "org/name is gated: accept its licence .* `hf auth login`",
    ),
    "missing": (
        answered(errors.RepositoryNotFoundError, 404),
        "'org/name' is neither a folder here nor a model .* check the name",
    ),
    "revision": (
        answered(errors.RevisionNotFoundError, 404),
        "org/name has no revision 'v1'",
    ),
    "offline": (
        lambda: errors.LocalEntryNotFoundError("not here\nsee there"),
        "org/name@v1 is neither a folder nor complete .* go online once",
    ),
    "server": (
        answered(errors.HfHubHTTPError, 500),
        "org/name@v1 cannot be downloaded, try again: Client Error. See the page",
    ),
    "line": (
        lambda: errors.HfHubHTTPError.__base__("timed\nout"),
        "org/name@v1 cannot be downloaded, try again: timed out",
    ),
    "disk": (lambda: OSError(28, "No space left on device"), "No space left"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_hub_name_a_remedy(monkeypatch, tmp_path, case):
    make, message = ERRORS[case]

    def fail(*_, **arguments):
        assert arguments["revision"] == "v1"
        raise make()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(clm.InputError, match=message) as refused:
        clm.load("org/name@v1")
    assert "\n" not in str(refused.value)


def test_a_missing_huggingface_hub_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(clm.InputError, match=r'pip install "continuous-lm\[hub\]"'):
        clm.load("org/name")


def test_only_needed_files_are_downloaded(monkeypatch, tmp_path):
    """Never a pickle, nor the same weights in another format."""
    from huggingface_hub.utils import filter_repo_objects

    there = """
        config.json tokenizer.json model.safetensors model-00001-of-00002.safetensors
        model.safetensors.index.json
    """.split()
    excluded = """
        pytorch_model.bin pytorch_model.bin.index.json pytorch_model.safetensors.bin model.pth
        consolidated.safetensors original/model.safetensors original/config.json onnx/model.onnx
        tf_model.h5 README.md tokenizer.model modeling.py training_args.bin
    """.split()
    folder = tiny.save(tmp_path / "x")

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        assert (repo, revision) == ("org/name", None)
        matching = filter_repo_objects(
            [*there, *excluded],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        )
        assert list(matching) == there
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert clm.load("org/name").config == clm.load(folder).config


def test_folders_take_precedence_over_the_hub(monkeypatch, tmp_path):
    tiny.save(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda name: pytest.fail("the hub was asked"))
    clm.load(os.path.join("org", "name"))


@pytest.mark.parametrize(
    "name",
    [
        "name",
        "a/b/c",
        "/org/name",
        "./name",
        "org/",
        "/name",
        "org/na me",
        "org/name@",
        "~/x",
    ],
)
def test_names_that_the_hub_does_not_allow(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda name: pytest.fail("the hub was asked"))
    with pytest.raises(clm.InputError, match="neither a folder nor a bundled model"):
        clm.load(name)
