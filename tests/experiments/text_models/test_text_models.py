"""The programs of text models, end to end on a small text, and what they refuse."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.densities import code_comparison, density_training
from continuous_lm.experiments.training import run_folder
from continuous_lm.models import density
from tests.fixtures.programs import ENVIRONMENT, forked_runner

SMALL = (
    "--data=text.txt",
    "--hidden_size=16",
    "--num_layers=1",
    "--num_heads=2",
    "--length=16",
    "--batch_size=4",
    "--steps=12",
    "--save_every=10",
)
NEW = "--vocab_size=280"  # of the tokenizer, where no model brings one
slow = pytest.mark.slow


def write_text(folder, sentences=600):
    """English-like and repetitive, so that a few steps learn something."""
    rng = np.random.default_rng(0)
    names, verbs, things = (
        "Ann Bob Eve".split(),
        "reads opens".split(),
        "the file|a path".split("|"),
    )
    drawn = (
        f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}."
        for _ in range(sentences)
    )
    (folder / "text.txt").write_text("\n".join(drawn) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text, a baseline and a mixture on its rows."""
    folder = tmp_path_factory.mktemp("calm")
    write_text(folder)
    with forked_runner("train") as train:
        for arguments in (
            (NEW, "--head=token", "--output_dir=baseline"),
            ("--head=mixture", "--table_from=baseline", "--output_dir=mixture"),
        ):
            status, _, stderr = train(folder, *SMALL, *arguments)
            assert status == 0, stderr
    return folder


def run(folder, name, *arguments):
    with forked_runner(name) as program:
        return program(folder, *arguments)


def assert_refused(outcome, *culprits):
    status, _, stderr = outcome
    last = stderr.splitlines()[-1]
    assert status != 0
    assert last.startswith("error: "), stderr
    assert "Traceback" not in stderr
    for culprit in culprits:
        assert culprit in last


@slow
def test_what_is_trained_is_whole(trained):
    baseline, mixture = (
        density.load(trained / name) for name in ("baseline", "mixture")
    )
    tokens = np.array([5, 9, 7, 30])
    lm = clm.load(trained / "baseline")  # an ordinary language model too
    np.testing.assert_allclose(
        lm(tokens[:-1]), baseline.token_logits(tokens), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        mixture.params["table"],
        density.standardize_table(lm.params["embedding"]),
        rtol=1e-5,
        atol=1e-6,
    )
    lines = (trained / "mixture" / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    stored = json.loads((trained / "mixture" / "train.json").read_text())
    assert stored["data"]["bytes"] == (trained / "text.txt").stat().st_size


@slow
def test_evaluation_samples_and_ablation(trained):
    data = SMALL[0]
    status, stdout, stderr = run(
        trained,
        "evaluate",
        data,
        "--length=16",
        "--models=baseline,mixture",
        "--output_dir=eval",
    )
    assert status == 0, stderr
    models = json.loads((trained / "eval" / "evaluate.json").read_text())["models"]
    assert f"{models['mixture']['perplexity']['value']:.1f}" in stdout
    assert models["baseline"]["bits_per_byte"] > 0

    steering = (
        "--towards=file",
        "--strengths=0,50",
        "--samples=3",
        "--max_new_tokens=8",
    )
    common = (
        "--model=mixture",
        "--quantize=euclidean",
        "--near_k=1",
        "--output_dir=sample",
    )
    status, stdout, stderr = run(trained, "sample", *common, *steering)
    assert status == 0, stderr
    samples = json.loads((trained / "sample" / "sample.json").read_text())["samples"]
    assert samples[1]["share"]["value"] > 0.9  # far along, the words are the list
    assert samples[0]["share"]["value"] < samples[1]["share"]["value"]
    assert (trained / "sample" / "steering.png").exists()

    options = (
        "--length=16",
        "--codes=32",
        "--stages=2",
        "--windows=4",
        "--output_dir=ablation",
    )
    status, stdout, stderr = run(
        trained, "compare_quantizers", data, "--model=mixture", *options
    )
    assert status == 0, stderr
    ways = json.loads((trained / "ablation" / "compare_quantizers.json").read_text())[
        "ways"
    ]
    assert [way["way"] for way in ways][:3] == ["nearest", "cosine", "re-ranked"]
    by_name = {way["way"]: way for way in ways}
    assert by_name["nearest"]["noise"] <= min(
        by_name[n]["noise"] for n in ("cosine", "re-ranked")
    )
    for way in ways:
        assert way["way"] in stdout


@slow
def test_a_run_that_was_stopped_goes_on_and_others_are_told_apart(trained, tmp_path):
    write_text(tmp_path)
    arguments = (*SMALL, NEW, "--head=gaussian", "--output_dir=out")
    with forked_runner("train") as train:
        assert train(tmp_path, *arguments)[0] == 0
        whole = density.load(tmp_path / "out").params
        steps = [
            step for step, _ in run_folder.list_checkpoints(tmp_path / "out" / "run")
        ]
        assert steps == [10, 12]
        shutil.rmtree(
            tmp_path / "out" / "run" / "checkpoints" / "00000012"
        )  # as if killed before
        assert train(tmp_path, *arguments)[0] == 0
        again = density.load(tmp_path / "out").params
        for path, leaf in run_folder.leaves_by_path(whole).items():
            np.testing.assert_array_equal(leaf, run_folder.leaves_by_path(again)[path])
        outcome = train(tmp_path, *arguments, "--batch_size=8")
        assert_refused(outcome, "batch_size = 4, not 8")
        outcome = train(
            tmp_path, *arguments, "--learning_rate=1e30", "--output_dir=nan"
        )
        assert_refused(outcome, "in step", "Lower the learning rate")
        assert not (tmp_path / "nan" / "density.json").exists()


REFUSED = {
    "no text": (["--data=none.txt"], "none.txt is missing"),
    "a folder": (["--data=."], "is a folder"),
    "not UTF-8": (["--data=latin.txt"], "latin.txt is not UTF-8"),
    "empty": (["--data=empty.txt"], "empty.txt is empty"),
    "too short": (["--data=short.txt"], "too short"),
    "head": (["--head_settings=depth"], "'depth' is not name=value"),
    "setting": (["--head_settings=bound=0.1"], "no setting 'bound'"),
    "value": (["--head_settings=min_scale=2"], "min_scale is 2"),
    "channels": (["--num_heads=3"], "3 heads do not share 16 channels"),
    "rows of nothing": (["--table_from=nowhere"], "nowhere"),
    "rows of another width": (
        ["--table_from=apples"],
        "--table_from",
        "[300, 96]",
        "16",
    ),
    "a trunk and rows": (["--trunk=apples", "--table_from=apples"], "--table_from"),
    "a trunk's size": (["--trunk=apples"], "--hidden_size", "has its own"),
    "a token's rows": (
        ["--head=token", "--table_from=apples"],
        "--table_from",
        "have no rows",
    ),
    "a token's contrast": (
        ["--head=token", "--token_loss_weight=1"],
        "--token_loss_weight",
        "have no rows",
    ),
    "a vocabulary": (["--table_from=apples", NEW], "--vocab_size", "its own tokenizer"),
    "a tokenizer's folder": (["--tokenizer=nowhere"], "nowhere"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder)
    (folder / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("Too short for anything.\n")
    return folder


@pytest.fixture(scope="module")
def train():
    with forked_runner("train") as train:
        yield train


@slow
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_to_training(texts, train, tmp_path, case):
    arguments, *culprits = REFUSED[case]
    brought = any(
        argument.startswith(("--table_from", "--trunk")) for argument in arguments
    )
    new = () if brought else (NEW,)
    outcome = train(texts, *SMALL, *new, *arguments, f"--output_dir={tmp_path / 'out'}")
    assert_refused(outcome, *culprits)
    assert not (tmp_path / "out").exists() or not list(
        (tmp_path / "out").glob("*.json")
    )


@slow
def test_bad_input_to_the_others(trained, texts):
    assert_refused(
        run(texts, "evaluate", "--models=nowhere"), "nowhere is not a folder"
    )
    apples = os.path.dirname(importlib.util.find_spec("continuous_lm").origin)
    folder = os.path.join(apples, "models", "bundled", "apples")
    assert_refused(
        run(texts, "evaluate", f"--models={folder}"), "density.json is missing"
    )
    with forked_runner("sample") as sample:
        for arguments, *culprits in (
            (["--strengths=0,1"], "need --towards"),
            (["--towards=file", "--strengths=much"], "--strengths"),
            (["--towards=supercalifragilistic"], "--towards", "supercalifragilistic"),
            (["--model=baseline", "--towards=file"], "steered"),
        ):
            assert_refused(sample(trained, "--model=mixture", *arguments), *culprits)
    ablation = ("--model=mixture", SMALL[0], "--length=16")
    with forked_runner("compare_quantizers") as ablate:
        assert_refused(ablate(trained, *ablation, "--codes=10000"), "--codes=10000")
        assert_refused(ablate(trained, *ablation, "--model=baseline"), "draws tokens")


@slow
def test_a_full_disk_ends_training_and_the_last_checkpoint_is_kept(texts, tmp_path):
    command = [
        sys.executable,
        "-m",
        "continuous_lm",
        "train",
        *SMALL,
        NEW,
        f"--output_dir={tmp_path}/out",
    ]
    limited = f"ulimit -f 40; exec {' '.join(command)}"  # files of at most 20 or 40 kB
    ended = subprocess.run(
        ["bash", "-c", limited],
        cwd=texts,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert_refused(
        (ended.returncode, ended.stdout, ended.stderr), "cannot write to", "checkpoint"
    )
    assert not (tmp_path / "out" / "density.json").exists()


def test_values_of_head_settings_are_json_or_words():
    given = ["depth=2", "min_scale=0.1", "covariance=full", "expert_size=null"]
    assert density_training.parse_settings(given, "head_settings") == {
        "depth": 2,
        "min_scale": 0.1,
        "covariance": "full",
        "expert_size": None,
    }


def test_the_ablations_table_has_a_row_a_way():
    results = [
        {
            "way": "nearest",
            "accuracy": 0.5,
            "noise": 1.0,
            "kept": None,
            "microseconds": 2.0,
        },
        {
            "way": "VQ, 8",
            "accuracy": 0.25,
            "noise": 1.5,
            "kept": 0.75,
            "microseconds": 3.0,
        },
    ]
    cells = code_comparison.make_table(results).cells
    assert cells[1] == ["nearest", "50.00", "1.0000", "", "2.00"]
    assert cells[2] == ["VQ, 8", "25.00", "1.5000", "75.0", "3.00"]
