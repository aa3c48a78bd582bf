"""The programs of text models, end to end on a small text, and their errors."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import (
    code_comparison,
    density_training,
    sample_density,
    train_density,
    train_head,
    train_lm,
)
from continuous_lm.experiments.text_models import compare_quantizers, evaluate
from continuous_lm.experiments.training import run_folder
from continuous_lm.models import density
from continuous_lm.models.checkpoints.hf_folder import BUNDLED_FOLDER
from continuous_lm.models.density import heads
from tests.fixtures.programs import ENVIRONMENT, run_program
from tests.fixtures.text_programs import (
    NEW_VOCABULARY,
    SMALL_RUN,
    SMALL_TRUNK,
    assert_refused,
    write_text,
)

SMALL = {**SMALL_TRUNK, **SMALL_RUN, "length": 16}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text, a baseline and a mixture on its rows."""
    folder = tmp_path_factory.mktemp("densities")
    data = (write_text(folder),)
    train_lm.run(
        train_lm.Config(
            **SMALL, **NEW_VOCABULARY, data=data, output_dir=folder / "baseline"
        )
    )
    train_density.run(
        train_density.Config(
            **SMALL,
            data=data,
            head="mixture",
            table_from=folder / "baseline",
            output_dir=folder / "mixture",
        )
    )
    return folder


@slow
def test_what_is_trained_is_whole(trained):
    baseline, mixture = (
        density.load(trained / name) for name in ("baseline", "mixture")
    )
    tokens = np.array([5, 9, 7, 30])
    lm = clm.load(trained / "baseline")  # an ordinary language model too
    np.testing.assert_allclose(
        lm(tokens[:-1]), density.token_logits(baseline, tokens), rtol=1e-5, atol=1e-5
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
    assert stored["run"]["flags"]["head"] == "mixture"


@slow
def test_a_head_on_a_pretrained_trunk_leaves_it_as_it_is(trained):
    flags = {**SMALL_RUN, "length": 16, "data": (trained / "text.txt",)}
    result = train_head.run(
        train_head.Config(
            **flags, trunk=trained / "baseline", output_dir=trained / "on_trunk"
        )
    )
    trunk_lm = density.trunk_of(clm.load(trained / "baseline"))
    trunk = run_folder.leaves_by_path(trunk_lm.params)
    for path, leaf in run_folder.leaves_by_path(result.lm.params["trunk"]).items():
        np.testing.assert_array_equal(leaf, trunk[path], err_msg=path)
    loaded = density.load(trained / "on_trunk").params["head"]
    for path, leaf in run_folder.leaves_by_path(loaded).items():
        trained_leaf = run_folder.leaves_by_path(result.lm.params["head"])[path]
        np.testing.assert_array_equal(leaf, trained_leaf, err_msg=path)


@slow
def test_evaluation(trained):
    config = evaluate.Config(
        data=(trained / "text.txt",),
        length=16,
        models=(trained / "baseline", trained / "mixture"),
        output_dir=trained / "eval",
    )
    result = evaluate.run(config)
    models = json.loads((trained / "eval" / "evaluate.json").read_text())["models"]
    assert models == result.models
    assert f"{models['mixture']['perplexity']['value']:.1f}" in result.summary()
    assert models["baseline"]["bits_per_byte"] > 0


@slow
def test_samples_that_are_steered_go_towards_the_list(trained):
    config = sample_density.Config(
        model=trained / "mixture",
        quantize="euclidean",
        near_k=1,
        towards=("file",),
        strengths=(0.0, 50.0),
        samples=3,
        max_new_tokens=8,
        output_dir=trained / "sample",
    )
    result = sample_density.run(config)
    samples = json.loads((trained / "sample" / "sample.json").read_text())["samples"]
    assert samples[1]["share"]["value"] > 0.9  # far along, the words are the list
    assert samples[0]["share"]["value"] < samples[1]["share"]["value"]
    assert [record["texts"] for record in samples] == result.texts
    for text in samples[1]["texts"]:
        assert text in result.summary()
    assert (trained / "sample" / "steering.png").exists()
    assert (trained / "sample" / "steering.csv").exists()


@slow
def test_the_ablation_compares_all_ways(trained):
    config = compare_quantizers.Config(
        data=(trained / "text.txt",),
        model=(trained / "mixture",),
        length=16,
        codes=32,
        stages=2,
        windows=4,
        output_dir=trained / "ablation",
    )
    result = compare_quantizers.run(config)
    ways = json.loads((trained / "ablation" / "compare_quantizers.json").read_text())[
        "ways"
    ]
    assert ways == result.ways
    assert [way["way"] for way in ways][:3] == ["nearest", "cosine", "re-ranked"]
    by_name = {way["way"]: way for way in ways}
    assert by_name["nearest"]["noise"] <= min(
        by_name[n]["noise"] for n in ("cosine", "re-ranked")
    )
    for way in ways:
        assert way["way"] in result.summary()


@slow
def test_a_run_that_was_stopped_goes_on_and_others_are_told_apart(tmp_path):
    flags = {
        **SMALL,
        **NEW_VOCABULARY,
        "data": (write_text(tmp_path),),
        "output_dir": tmp_path / "out",
    }
    config = train_density.Config(**flags)
    train_density.run(config)
    full = density.load(tmp_path / "out").params
    steps = [step for step, _ in run_folder.list_checkpoints(tmp_path / "out" / "run")]
    assert steps == [10, 12]
    shutil.rmtree(
        tmp_path / "out" / "run" / "checkpoints" / "00000012"
    )  # as if killed before
    train_density.run(config)
    again = density.load(tmp_path / "out").params
    for path, leaf in run_folder.leaves_by_path(full).items():
        np.testing.assert_array_equal(leaf, run_folder.leaves_by_path(again)[path])
    assert_refused(
        train_density, ["batch_size = 4, not 8"], **(flags | {"batch_size": 8})
    )
    changes = {"learning_rate": 1e30, "output_dir": tmp_path / "nan"}
    culprits = ["in step", "Lower the learning rate"]
    assert_refused(train_density, culprits, **(flags | changes))
    assert not (tmp_path / "nan" / "density.json").exists()


# --- Refused input --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder)
    (folder / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("Too short for anything.\n")
    return folder


APPLES = {"table_from": "apples"}
REFUSED = {
    "no text": ({"data": "none.txt"}, "none.txt is missing"),
    "a folder": ({"data": ""}, "is a folder"),
    "not UTF-8": ({"data": "latin.txt"}, "latin.txt is not UTF-8"),
    "empty": ({"data": "empty.txt"}, "empty.txt is empty"),
    "too short": ({"data": "short.txt"}, "too short"),
    "head": ({"head_settings": ("depth",)}, "'depth' is not name=value"),
    "setting": ({"head_settings": ("bound=0.1",)}, "no setting 'bound'"),
    "value": ({"head_settings": ("min_scale=2",)}, "min_scale is 2"),
    "another head": ({"head": "token"}, "--head is 'token'", "gaussian, mixture"),
    "channels": ({"num_heads": 3}, "3 heads do not share 16 channels"),
    "rows of nothing": ({"table_from": "nowhere"}, "nowhere"),
    "rows of another width": (APPLES, "--table_from", "[300, 96]", "16"),
    "a vocabulary": (APPLES | NEW_VOCABULARY, "--vocab_size", "its own tokenizer"),
    "a tokenizer": (APPLES | {"tokenizer": "apples"}, "--tokenizer", "its own"),
    "a tokenizer's folder": ({"tokenizer": "nowhere"}, "nowhere"),
    "no folder": ({"output_dir": None}, "--output_dir is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_to_the_training_of_densities(texts, tmp_path, case):
    changes, *culprits = REFUSED[case]
    flags = SMALL | {"data": "text.txt", "output_dir": tmp_path / "out"} | changes
    flags["data"] = (texts / flags["data"],)
    if "table_from" not in flags and "tokenizer" not in flags:
        flags |= NEW_VOCABULARY
    assert_refused(train_density, culprits, **flags)
    assert not list(tmp_path.glob("out/*.json"))


def test_bad_input_to_the_training_of_heads(texts, tmp_path):
    flags = SMALL_RUN | {"data": (texts / "text.txt",), "output_dir": tmp_path / "out"}
    weight = {"trunk": "apples", "head": "token", "token_loss_weight": 1.0}
    for changes, *culprits in (
        ({}, "--trunk is missing"),
        ({"trunk": "nowhere"}, "nowhere"),
        (weight, "--token_loss_weight", "have no rows"),
        ({"trunk": "apples", "head": "energy"}, "--head is 'energy'"),
    ):
        assert_refused(train_head, culprits, **flags, **changes)


# Flags that have no meaning for a program: it does not have them.
ABSENT_FLAGS = {
    train_lm: "head table_from token_loss_weight trunk codec chunk_size latent_size",
    train_density: "trunk codec chunk_size latent_size codec_settings",
    train_head: "table_from hidden_size num_layers num_heads tokenizer vocab_size codec",
    evaluate: "tokenizer vocab_size",
    compare_quantizers: "tokenizer vocab_size",
    sample_density: "codec method max_rounds between",
}


@pytest.mark.parametrize("module", ABSENT_FLAGS, ids=lambda m: m.__name__)
def test_programs_have_the_flags_that_they_read(module):
    for name in ABSENT_FLAGS[module].split():
        with pytest.raises(clm.InputError, match=f"'{name}'"):
            program.parse(module.Config, "program", [f"--{name}=1"])
    assert len(dataclasses.fields(module.Config)) > 10


@pytest.mark.slow
def test_an_error_ends_a_program_with_one_line(tmp_path):
    for arguments, culprit in (
        (["train_density", "--trunk=apples"], "'trunk'"),
        (["train_lm", "--data=none.txt"], "none.txt is missing"),
        (["evaluate", "--models=nowhere"], "nowhere is not a folder"),
    ):
        status, _, stderr = run_program(tmp_path, *arguments)
        assert status == 1
        (line,) = stderr.splitlines()
        assert line.startswith("error: ")
        assert culprit in line


def test_models_that_are_missing_or_of_another_kind():
    for module, flag in (
        (evaluate, "models"),
        (compare_quantizers, "model"),
        (sample_density, "model"),
    ):
        assert_refused(module, [f"--{flag} is missing"])
    culprits = ["density.json is missing"]
    assert_refused(evaluate, culprits, models=(BUNDLED_FOLDER / "apples",))


@pytest.mark.parametrize(
    ("flags", "culprits"),
    [
        ({"strengths": (0.0, 1.0)}, ["need --towards"]),
        ({"towards": ("file",), "strengths": (float("nan"),)}, ["--strengths"]),
    ],
)
def test_bad_strengths(flags, culprits):
    assert_refused(sample_density, culprits, model="mixture", **flags)
    with pytest.raises(clm.InputError, match="--strengths"):
        program.parse(sample_density.Config, "sample_density", ["--strengths=much"])


@slow
def test_bad_input_to_the_others(trained):
    for name, flags, *culprits in (
        (
            "mixture",
            {"towards": ("supercalifragilistic",)},
            "--towards",
            "supercalifragilistic",
        ),
        ("baseline", {"towards": ("file",)}, "steered"),
    ):
        assert_refused(sample_density, culprits, model=trained / name, **flags)
    flags = {"data": (trained / "text.txt",), "length": 16}
    for name, changes, culprit in (
        ("mixture", {"codes": 10_000}, "--codes=10000"),
        ("baseline", {}, "draws tokens"),
    ):
        model = {"model": (trained / name,)}
        assert_refused(compare_quantizers, [culprit], **flags, **model, **changes)


@slow
def test_a_full_disk_ends_training_and_the_last_checkpoint_is_kept(texts, tmp_path):
    flags = (
        SMALL | NEW_VOCABULARY | {"data": "text.txt", "output_dir": tmp_path / "out"}
    )
    command = [sys.executable, "-m", "continuous_lm", "train_density"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    limited = f"ulimit -f 40; exec {' '.join(command)}"  # files of at most 20 or 40 kB
    ended = subprocess.run(
        ["bash", "-c", limited],
        cwd=texts,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: "), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "cannot write to" in last
    assert "checkpoint" in last
    assert not (tmp_path / "out" / "density.json").exists()


# --- Parts ----------------------------------------------------------------------------------------


def test_values_of_settings_are_json_or_words():
    options = ["depth=2", "min_scale=0.1", "covariance=full", "expert_size=null"]
    assert density_training.parse_settings(options, "codec_settings") == {
        "depth": 2,
        "min_scale": 0.1,
        "covariance": "full",
        "expert_size": None,
    }


def test_values_of_head_settings_have_the_declared_types():
    options = ("depth=2", "min_scale=0.1", "expert_size=null", "balance=1")
    config = density_training.HeadFlags(head_settings=options)
    parsed = config.parsed_head_settings("experts", heads.DISTRIBUTION_HEADS)
    expected = {"depth": 2, "min_scale": 0.1, "expert_size": None, "balance": 1.0}
    assert parsed == expected
    with pytest.raises(clm.InputError) as refused:
        config.parsed_head_settings("mixture", heads.DISTRIBUTION_HEADS)
    message = "--head_settings: a mixture head has no setting 'expert_size'; it has"
    assert str(refused.value).startswith(message)


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
