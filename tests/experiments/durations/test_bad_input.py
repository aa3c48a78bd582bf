"""Bad input ends the program with one line that names the culprit, and leaves nothing behind.

The program runs as the command line runs it, in this process; see `programs.call_program`.
"""

import json
import pathlib
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import continuous_lm as clm
from continuous_lm.experiments.durations import counting
from tests.fixtures import tiny
from tests.fixtures.programs import call_program, run_program

PROGRAM = "counting"


def run(cwd, *arguments):
    return call_program(cwd, PROGRAM, *arguments)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    words = tiny.word_tokenizer(tiny.COUNTING_TEXT)
    return tiny.save(tmp_path_factory.mktemp("good"), tokenizer=words)


@pytest.fixture
def folder(tmp_path, good):
    """A whole model in the working folder, to be damaged."""
    return shutil.copytree(good, tmp_path / "model")


def tree(folder):
    """Every path below, hidden ones too, with its content."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def assert_refused(outcome, *culprits):
    status, stdout, stderr = outcome
    *before, last = stderr.splitlines()
    assert status != 0
    assert last.startswith("error: "), stderr
    assert "Traceback" not in stderr
    assert not [line for line in before if line.startswith("error")]
    assert stdout == ""
    for culprit in culprits:
        assert culprit in last


def fields(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def weights(**changes):
    """Replaces tensors; those that are None are taken away."""

    def damage(folder):
        path = folder / "model.safetensors"
        held = safetensors.numpy.load_file(path) | changes
        safetensors.numpy.save_file(
            {k: v for k, v in held.items() if v is not None}, path
        )

    return damage


def shards(place):
    def damage(folder):
        path = folder / "model.safetensors"
        held = safetensors.numpy.load_file(path)
        shutil.copy(path, folder.parent / "outside.safetensors")
        tiny.write_shards(folder, held, 2)
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        values["weight_map"]["model.norm.weight"] = place
        index.write_text(json.dumps(values))

    return damage


class Bomb:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("a-pickle-was-opened"),))


def pickled(name):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        with zipfile.ZipFile(folder / name, "w") as archive:  # as torch.save writes
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(), protocol=2))

    return damage


def cut(name, keep=0.5):
    def damage(folder):
        full = (folder / name).read_bytes()
        (folder / name).write_bytes(full[: int(len(full) * keep)])

    return damage


def without(name):
    return lambda folder: (folder / name).unlink()


NORM = "model.norm.weight"
FOLDERS = {
    "unknown model_type": (fields(model_type="mamba"), "model_type is 'mamba'"),
    "no model_type": (fields(model_type=None), "model_type"),
    "model_type of another type": (fields(model_type=["llama"]), "model_type"),
    "rope scaling": (
        fields(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "'yarn'",
    ),
    "quantization": (fields(quantization_config={"bits": 4}), "quantization_config"),
    "soft cap": (fields(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    "made-up field": (fields(made_up=3), "made_up"),
    "head that does not divide": (fields(num_key_value_heads=3), "num_kv_heads 3"),
    "layers without end": (fields(num_hidden_layers=10**9), "num_hidden_layers"),
    "config cut": (cut("config.json"), "config.json is not valid JSON"),
    "config missing": (without("config.json"), "config.json is missing"),
    "tensor missing": (weights(**{NORM: None}), f"tensor {NORM} [48] is missing"),
    "tensor left over": (weights(extra=np.ones(1, np.float32)), "tensor extra"),
    "tensor misshapen": (
        weights(**{NORM: np.ones(47, np.float32)}),
        f"tensor {NORM} in",
    ),
    "tensor of integers": (
        weights(**{NORM: np.ones(48, np.int8)}),
        f"tensor {NORM} is stored",
    ),
    "weights missing": (without("model.safetensors"), "model.safetensors"),
    "weights cut": (cut("model.safetensors"), "model.safetensors is not a whole"),
    "weights cut at the end": (
        cut("model.safetensors", 0.9999),
        "model.safetensors is not",
    ),
    "weights empty": (
        cut("model.safetensors", 0.0),
        "model.safetensors is not a whole",
    ),
    "shard above": (shards("../outside.safetensors"), "'../outside.safetensors'"),
    "shard elsewhere": (shards("/etc/passwd"), "'/etc/passwd'"),
    "shard missing": (shards("none.safetensors"), "none.safetensors is missing"),
    "pickle": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "pickle renamed": (pickled("model.safetensors"), "model.safetensors is a pickle"),
    "tokenizer missing": (without("tokenizer.json"), "no tokenizer.json"),
    "tokenizer cut": (cut("tokenizer.json"), "tokenizer.json is not a tokenizer"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder(tmp_path, folder, case):
    damage, culprit = FOLDERS[case]
    damage(folder)
    before = tree(tmp_path)
    assert_refused(run(tmp_path, "--model=model", "--output_dir=out"), culprit, "model")
    assert tree(tmp_path) == before


TEXT = "how many apple apple times"
FLAGS = {
    "no such model": (["--model=nowhere"], ["'nowhere'"]),
    "model that is a file": (
        ["--model=model/config.json"],
        ["model/config.json is a file"],
    ),
    "model of a long name": (["--model=" + "x" * 300], ["xxx"]),
    "unknown words": (["--prompt=how zebra apple pear zebra"], ["'zebra', 'pear'"]),
    "unknown word": (["--word=pear", "--category=fruit"], ["'pear'"]),
    "word without a category": (["--word=pear"], ["'pear'", "--category"]),
    "span that is not there": ([f"--prompt={TEXT}", "--span=cat"], ["'cat'", TEXT]),
    "word that is not there": ([f"--prompt={TEXT}", "--word=cat"], ["'cat'", TEXT]),
    "empty span": ([f"--prompt={TEXT}", "--span="], ["''", TEXT]),
    "empty prompt": (["--prompt="], ["'apple'", "''"]),
    "span without a prompt": (["--span=apple"], ["--span", "--prompt"]),
    "stray argument": (["results"], ["'results'"]),
    "durations that are NaN": (["--min_factor=nan"], ["nan"]),
    "duration of the first": (
        ["--prompt=apple many", "--span=apple", "--min_factor=nan"],
        ["nan"],
    ),
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(tmp_path, folder, case):
    arguments, culprits = FLAGS[case]
    before = tree(tmp_path)
    outcome = run(tmp_path, "--model=model", "--output_dir=out", *arguments)
    assert_refused(outcome, *culprits)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "argument",
    "points=1 min_factor=-0.1 min_factor=1.5 min_factor=x repetitions=0 repetitions=10 change=mas"
    " answer_tokens=none dtype=int8 batch_size=0 modle=x".split(),
)
def test_flags_out_of_bounds(tmp_path, argument):
    outcome = run(tmp_path, "--model=model", f"--{argument}")
    assert outcome[0] == 1
    assert_refused(outcome, argument.split("=")[0])
    assert outcome[2].count("\n") == 1
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"points": 1}, "--points is 1; it must be at least 2"),
        ({"points": 2.5}, "--points is 2.5; it must be an integer"),
        ({"points": True}, "--points is True; it must be an integer"),
        ({"min_factor": float("nan")}, "--min_factor is nan"),
        ({"min_factor": 1.5}, "--min_factor is 1.5; it must be at most 1"),
        ({"change": "mas"}, "--change is 'mas'; it must be of both, mass, times"),
        ({"answer_tokens": "none"}, "--answer_tokens is 'none'"),
        ({"word": None}, "--word is None; it must be text"),
        ({"ignore_config_fields": "abc"}, "--ignore_config_fields is 'abc'"),
        ({"pmap": True, "mesh": "data=1"}, "two ways to the same"),
    ],
)
def test_values_of_a_config_out_of_bounds(values, culprit):
    with pytest.raises(clm.InputError, match=re.escape(culprit)):
        counting.Config(**values)


UNWRITABLE = {
    "below a file": "file/out",
    "a file": "file",
    "/proc": "/proc/out",
    "a long name": "x" * 300,
    "a link that leads nowhere": "link",
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_output_folder_that_cannot_be_written(tmp_path, folder, case):
    if case == "/proc" and not pathlib.Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = tree(tmp_path)
    outcome = run(tmp_path, "--model=model", f"--output_dir={UNWRITABLE[case]}")
    assert_refused(outcome, "cannot write to", UNWRITABLE[case])
    assert "batch" not in outcome[2]  # known before any work is done
    assert tree(tmp_path) == before


def test_results_of_an_earlier_run_survive_a_bad_one(tmp_path, folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "counting.json").write_text("earlier")
    before = tree(tmp_path)
    assert_refused(
        run(tmp_path, "--model=model", "--output_dir=out", "--min_factor=nan"), "nan"
    )
    assert tree(tmp_path) == before


def test_results_that_cannot_be_replaced(tmp_path, folder):
    (tmp_path / "out" / "counting.png").mkdir(parents=True)
    (tmp_path / "out" / "counting.json").write_text("earlier")
    before = tree(tmp_path)
    outcome = run(tmp_path, "--model=model", "--output_dir=out", "--points=2")
    assert_refused(outcome, "cannot write to", "out")
    assert tree(tmp_path) == before


def test_the_same_call_can_succeed(tmp_path, folder):
    """Or the cases above would be refused for another reason than theirs."""
    status, stdout, stderr = run(
        tmp_path, "--model=model", "--output_dir=out", "--points=2"
    )
    assert status == 0, stderr
    assert "error" not in stderr
    assert "Results: out" in stdout


def test_as_a_user_types_it(tmp_path, folder):
    outcome = run_program(tmp_path, PROGRAM, "--model=nowhere", "--output_dir=out")
    assert outcome[0] == 1
    assert_refused(outcome, "'nowhere'")
    assert outcome[2].count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"durations": [1, float("nan"), 1]}, r"durations\[1\] is nan"),
        ({"durations": [1, 1, float("inf")]}, r"durations\[2\] is inf"),
        ({"durations": [1, -0.5, 1]}, r"durations\[1\] is -0.5"),
        ({"durations": [0, 1, 1]}, "the first token has duration 0"),
        (
            {"durations": [1, 1]},
            r"durations has shape \[2\]; .* with T = 3, as in tokens",
        ),
        ({"start": float("nan")}, "start is nan"),
        ({"times": [1, 2, float("nan")]}, r"times\[2\] is nan"),
        ({"times": [1, 2, 3], "start": 1.0}, "leave out start"),
        ({"position": 3}, "position is 3"),
        ({"tokens": [0, 1, 10**6]}, r"tokens\[2\] is 1000000"),
        ({"tokens": [0.0, 1.0, 2.0]}, "tokens has dtype float32"),
        ({"tokens": []}, "no tokens|dtype"),
        ({"embeddings": np.ones((3, 48))}, "either tokens or embeddings"),
        ({"tokens": None}, "either tokens or embeddings"),
        ({"tokens": None, "embeddings": np.ones((3, 47))}, "47 wide"),
    ],
)
def test_bad_arguments_of_a_model(good, arguments, message):
    lm = clm.load(good)
    with pytest.raises(clm.InputError, match=message):
        lm(**{"tokens": [1, 2, 3]} | arguments)
