"""The program on a random model: its results equal the model's, point by point."""

import itertools
import json

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import scipy.special

import continuous_lm as clm
from continuous_lm.experiments.durations import counting
from continuous_lm.models.checkpoints import hf_folder
from tests.fixtures import tiny
from tests.fixtures.programs import run_program

PROGRAM = "counting"
DIGITS = "0123456789"
POINTS = 12
# Digits, words that contain digits, and the words of the prompt.
WORDS = tiny.COUNTING_TEXT + " 10 42 x7 dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # With a window shorter than the prompt, so that times matter in every way that they can.
    return tiny.save(
        tmp_path_factory.mktemp("model"),
        "mistral",
        tokenizer=tiny.word_tokenizer(WORDS),
        sliding_window=20,
    )


@pytest.fixture(scope="module")
def lm(model):
    return clm.load(model)


RUNS = {
    "both": {},
    "again": {},
    "mass": {"change": "mass"},
    "times": {"change": "times"},
    "paper": {"answer_tokens": "paper"},
    "dogs": {
        "word": "dog",
        "category": "animal",
        "repetitions": 3,
        "min_factor": 0.4,
        "batch_size": 5,
    },
    "own": {
        "prompt": "how many apple , apple is a apple ?",
        "span": "apple , apple",
    },
}


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Name -> results folder and table of a run, each made when it is first asked for."""
    created = {}

    def get(name):
        if name not in created:
            folder = tmp_path_factory.mktemp("runs") / "deep" / name
            config = counting.Config(
                model=model, output_dir=folder, points=POINTS, **RUNS[name]
            )
            created[name] = folder, counting.run(config).summary()
        return created[name]

    return get


def read(runs, name):
    return json.loads((runs(name)[0] / "counting.json").read_text())


def probabilities(result):
    curves = result["curves"]["probabilities"]
    assert list(curves) == list(DIGITS)
    return np.array([curves[digit] for digit in DIGITS]).T


def direct(lm, result, name, groups):
    """The same numbers from single calls of the model, one point at a time, in plain NumPy."""
    tokens = np.array([lm.tokenizer.token_to_id(t) for t in result["tokens"]])
    first, end = result["span"]
    rows = []
    for factor in result["curves"]["points"]:
        shrunk = np.ones(len(tokens))
        shrunk[first:end] = factor
        durations = np.ones(len(tokens)) if name == "times" else shrunk
        times = np.cumsum(np.ones(len(tokens)) if name == "mass" else shrunk)
        logits = np.asarray(
            lm(tokens, durations=durations, times=times)[-1], np.float64
        )
        p = scipy.special.softmax(logits)
        rows.append(
            [sum(p[lm.tokenizer.token_to_id(t)] for t in group) for group in groups]
        )
    return np.array(rows)


EXACT = [[digit] for digit in DIGITS]
PAPER = [[d, *{"0": ["10"], "2": ["42"], "7": ["x7"]}.get(d, [])] for d in DIGITS]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "again"])
def test_results_are_what_the_model_says_point_by_point(runs, lm, name):
    result = read(runs, name)
    groups = PAPER if name == "paper" else EXACT
    assert [sorted(result["tracked"][d]) for d in DIGITS] == [sorted(g) for g in groups]
    actual = probabilities(result)
    np.testing.assert_allclose(
        actual, direct(lm, result, name, groups), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        result["curves"]["other"], 1 - actual.sum(axis=1), atol=1e-6
    )
    assert np.ptp(actual, axis=0).max() > 1e-3  # the sweep changes something


def test_what_varies_makes_the_difference(runs):
    both, mass, times = (
        probabilities(read(runs, name)) for name in ("both", "mass", "times")
    )
    for one, other in ((both, mass), (both, times), (mass, times)):
        assert np.abs(one - other)[0].max() > 1e-3
        np.testing.assert_allclose(
            one[-1], other[-1], atol=1e-6
        )  # factor 1 is factor 1


def test_the_paper_s_tracking_counts_more_tokens(runs):
    more = probabilities(read(runs, "paper")) - probabilities(read(runs, "both"))
    changed = [DIGITS[i] for i in np.flatnonzero(more.max(axis=0) > 1e-5)]
    assert changed == ["0", "2", "7"]
    assert more.min() > -1e-6


def test_prompt_and_span_are_the_paper_s(runs):
    result = read(runs, "both")
    assert result["prompt"] == (
        'Question: In the sentence "apple apple apple apple", how many times is a fruit mentioned?'
        " Reply with a single-digit number\nAnswer: "
    )
    first, end = result["span"]
    assert result["tokens"][first:end] == ["apple"] * 4
    assert result["tokens"][0] == "<bos>"
    np.testing.assert_allclose(result["curves"]["points"], np.linspace(0.1, 1, POINTS))


def test_other_words(runs):
    result = read(runs, "dogs")
    first, end = result["span"]
    assert result["tokens"][first:end] == ["dog"] * 3
    assert "how many times is an animal mentioned" in result["prompt"]
    assert result["curves"]["points"][0] == 0.4


def test_own_prompt_and_span(runs):
    result = read(runs, "own")
    first, end = result["span"]
    assert result["prompt"] == "how many apple , apple is a apple ?"
    assert result["tokens"][first:end] == ["apple", ",", "apple"]


def test_json_has_the_flags_and_the_versions(runs, model):
    run = read(runs, "dogs")["run"]
    expected = {
        "model": str(model),
        "word": "dog",
        "category": "animal",
        "repetitions": 3,
        "points": POINTS,
        "batch_size": 5,
        "min_factor": 0.4,
        "change": "both",
        "answer_tokens": "exact",
        "prompt": None,
        "span": None,
        "dtype": "auto",
        "ignore_config_fields": [],
        "output_dir": str(runs("dogs")[0]),
    }
    assert {name: run["flags"][name] for name in expected} == expected
    assert run["versions"]["continuous_lm"] == clm.__version__
    assert {"python", "jax", "jaxlib", "flax", "numpy", "tokenizers"} <= run[
        "versions"
    ].keys()
    assert run["date"].startswith("20")


def test_ranges_are_the_most_probable_answers(runs):
    result = read(runs, "both")
    points, actual = result["curves"]["points"], probabilities(result)
    covered = []
    for r in result["curves"]["ranges"]:
        inside = [i for i, x in enumerate(points) if r["first"] <= x <= r["last"]]
        assert {DIGITS[actual[i].argmax()] for i in inside} == {r["answer"]}
        assert r["peak"] == actual[inside].max()
        covered += inside
        assert f"{r['first']:.3f} - {r['last']:.3f}   {r['answer']}" in runs("both")[1]
    assert covered == list(range(POINTS))


def test_files_are_there_and_real(runs):
    folder, _ = runs("both")
    names = ["counting.json", "counting.pdf", "counting.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    image = matplotlib.image.imread(folder / "counting.png")
    assert min(image.shape[:2]) > 400
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50
    pdf = (folder / "counting.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")


def test_the_same_run_gives_the_same_files_but_for_its_date(runs):
    one, other = (read(runs, name) for name in ("both", "again"))
    for result in (one, other):
        del result["run"]["date"], result["run"]["flags"]["output_dir"]
    assert one == other
    for file in ("counting.png", "counting.pdf"):
        a, b = ((runs(name)[0] / file).read_bytes() for name in ("both", "again"))
        assert a == b


def test_a_model_that_never_answers_says_so(runs):
    assert "this model answers otherwise" in runs("both")[1]


def test_the_embedded_model_counts(tmp_path):
    """The finding: as four apples shrink, it answers 4, 3, 2, 1."""
    status, table, stderr = run_program(tmp_path, PROGRAM)  # no flag at all
    assert status == 0, stderr
    result = json.loads(
        (tmp_path / "results" / "counting" / "counting.json").read_text()
    )
    assert result["run"]["flags"]["model"] == "apples"
    assert len(result["curves"]["points"]) == 100
    ranges = result["curves"]["ranges"]
    assert [r["answer"] for r in ranges] == ["1", "2", "3", "4"]
    assert all(r["peak"] > 0.5 for r in ranges)
    for k, (left, right) in enumerate(itertools.pairwise(ranges), start=1):
        transition = (left["last"] + right["first"]) / 2
        assert abs(transition - (k + 0.5) / 4) <= 0.08
    assert "no number" not in table


def test_bundled_models_are_found_by_name():
    lm = clm.load("apples")
    assert lm.tokenizer is not None
    assert lm.params["embedding"].dtype == jnp.bfloat16
    weights = hf_folder.BUNDLED_FOLDER / "apples" / "model.safetensors"
    assert weights.stat().st_size < 1_000_000
