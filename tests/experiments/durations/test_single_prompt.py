"""The programs of one prompt on the bundled model: their results equal the model's.

Bad input goes through the command line, in this process; see `programs.call_program`.
"""

import json

import jax
import matplotlib.image
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.durations import (
    boolean,
    events,
    interpolation,
    shifting,
    sums,
)
from tests.fixtures import tiny
from tests.fixtures.programs import call_program

POINTS = 5
MIDDLE = POINTS // 2  # the point that is checked by hand


@pytest.fixture(scope="module")
def lm():
    return clm.load("apples", dtype="float32")


@pytest.fixture
def run(tmp_path):
    """Function (module, ** of its Config): the stored result and the summary, files looked at."""

    def run(module, **values):
        name = module.__name__.rpartition(".")[2]
        folder = tmp_path / name
        config = module.Config(points=POINTS, output_dir=folder, **values)
        summary = module.run(config).summary()
        assert_whole(folder, name)
        return json.loads((folder / f"{name}.json").read_text()), summary

    return run


def assert_whole(folder, name):
    """A result, a picture that is one, and a PDF."""
    assert {p.name for p in folder.iterdir()} == {
        f"{name}.json",
        f"{name}.png",
        f"{name}.pdf",
    }
    picture = matplotlib.image.imread(folder / f"{name}.png")
    assert min(picture.shape[:2]) > 100
    assert np.ptp(picture) > 0.5
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF-")


def ids_of(lm, tokens):
    """The numbers of tokens by their names; one without a name is "token 63"."""
    named = {f"token {i}": i for i in range(lm.config.vocab_size)}
    return np.array([(named | lm.tokenizer.get_vocab())[token] for token in tokens])


def assert_says(lm, curves, tracked, **arguments):
    """Assert that the middle of the curves equals one call of the model."""
    p = np.asarray(jax.nn.softmax(lm(position=-1, **arguments)), np.float64)
    assert list(curves["probabilities"]) == list(tracked)
    for answer, tokens in tracked.items():
        expected = sum(p[i] for i in ids_of(lm, tokens))
        assert curves["probabilities"][answer][MIDDLE] == pytest.approx(
            expected, abs=1e-5
        )
    others = 1 - sum(row[MIDDLE] for row in curves["probabilities"].values())
    assert curves["other"][MIDDLE] == pytest.approx(others, abs=1e-6)


def assert_shrinks(lm, result, shrunk):
    """Assert that the span is `shrunk`, and that its duration at the middle point is right."""
    tokens = result["tokens"]
    first, end = result["span"]
    assert " ".join(tokens[first:end]) == shrunk
    durations = np.ones(len(tokens), np.float32)
    durations[first:end] = result["curves"]["points"][MIDDLE]
    ids = ids_of(lm, tokens)
    assert_says(
        lm, result["curves"], result["tracked"], tokens=ids, durations=durations
    )


def row_of(lm, word):
    return np.asarray(lm.params["embedding"], np.float32)[
        lm.tokenizer.token_to_id(word)
    ]


# --- Runs -------------------------------------------------------------------------------------

EVENTS = {
    "shop": "She buys a carton of milk . She buys an apple . She buys a potato ."
    " She buys a loaf of bread .",
    "zoo": "They saw a lion . They saw an elephant . They saw a giraffe . They saw a penguin .",
    "beach": "She found a seashell . She found a starfish . She found a smooth stone ."
    " She found a piece of seaweed .",
}


@pytest.mark.slow
@pytest.mark.parametrize("scene", EVENTS)
def test_events(run, lm, scene):
    result, _ = run(events, scene=scene)
    assert_shrinks(lm, result, EVENTS[scene])
    assert list(result["tracked"]) == list("0123456789")
    assert result["curves"]["points"] == pytest.approx(np.linspace(0.1, 1, POINTS))
    assert result["curves"]["ranges"][-1]["answer"] == "4"


TWO_DIGITS = {"numbers": ("24", "13"), "spaced": True}
SUMS = {
    "default": ({}, "The sum of 4 and 3 is", "3"),
    "first": (
        {"shrink": "1", "numbers": ("8", "5")},
        "The sum of 8 and 5 is",
        "8",
    ),
    "two digits": ({"numbers": ("18", "13")}, "The sum of 18 and 13 is", "13"),
    "spaced": (TWO_DIGITS, "The sum of 2 4 and 1 3 is", "1 3"),
    "spaced first": (TWO_DIGITS | {"shrink": "1"}, "The sum of 2 4 and 1 3 is", "2 4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMS)
def test_sums(run, lm, name):
    arguments, prompt, shrunk = SUMS[name]
    result, _ = run(sums, **arguments)
    assert result["prompt"].strip() == prompt
    assert_shrinks(lm, result, shrunk)
    assert list(result["tracked"]) == [str(i) for i in range(19)]


INTERPOLATIONS = {
    "question": {},
    "arc": {"path": "spherical"},
    "answers": {"answers": ("yes", "no", "red"), "words": ("apples", "cabbages")},
    "usage": {"template": "We bought two [] at the", "threshold": 0.1},
    "lengths": {"words": ("red apples", "bananas")},
}


@pytest.mark.parametrize(
    "name",
    [
        n if n == "arc" else pytest.param(n, marks=pytest.mark.slow)
        for n in INTERPOLATIONS
    ],
)
def test_interpolation(run, lm, name):
    result, _ = run(interpolation, **INTERPOLATIONS[name])
    assert result["curves"]["points"] == pytest.approx(np.linspace(0, 1, POINTS))
    assert_says(lm, result["curves"], result["tracked"], **halfway(lm, result, name))
    curves = result["curves"]["probabilities"]
    if name == "answers":
        assert list(curves) == ["yes", "no", "red"]
    elif name == "usage":
        assert all(max(row) >= 0.1 for row in curves.values())
        assert max(result["curves"]["other"]) < 0.9
    else:
        assert list(curves) == ["Yes", "No"]


def halfway(lm, result, name):
    """The model's arguments in the middle of an interpolation, by hand."""
    first, end = result["span"]
    names = [token.partition("|")[::2] for token in result["tokens"][first:end]]
    mixed = [(row_of(lm, a) + row_of(lm, b)) / 2 for a, b in names]
    if name == "arc":  # the middle of an arc: in the direction of the sum of a and b
        ((a, b),) = ((row_of(lm, a), row_of(lm, b)) for a, b in names)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        mixed = [(a + b) / (2 * np.cos(np.arccos(cosine) / 2))]
    before, after = (
        [row_of(lm, token) for token in part]
        for part in (result["tokens"][:first], result["tokens"][end:])
    )
    rows = np.array([*before, *mixed, *after])
    durations, times = np.ones(len(rows)), np.arange(1.0, len(rows) + 1)
    if (
        name == "lengths"
    ):  # of two tokens and one: 1.5, of which the first half weighs 1/2
        assert names == [("red", "bananas"), ("apples", "bananas")]
        durations[first] = 0.5
        times = np.cumsum(durations)
        times[first] = first + 0.75
    return {"embeddings": rows, "durations": durations, "times": times}


@pytest.mark.slow
def test_boolean(run, lm):
    result, printed = run(boolean)
    cells = result["sweeps"]
    assert len({(cell["pair"], cell["inputs"]) for cell in cells}) == len(cells) == 40
    cell = next(c for c in cells if (c["pair"], c["inputs"]) == ("OR to XOR", "1, 1"))
    prompt = boolean.TEMPLATE.format(a=1, b=1)
    for point, operator in ((0, "OR"), (-1, "XOR")):
        ids = clm.tokenization.encode(lm.tokenizer, prompt.replace("[]", operator)).ids
        p = jax.nn.softmax(lm(np.array(ids), position=-1))
        for answer in "01":
            actual = cell["curves"]["probabilities"][answer][point]
            assert actual == pytest.approx(
                float(p[lm.tokenizer.token_to_id(answer)]), abs=1e-5
            )
    for text in ("OR to XOR", "AND to NAND", "0 > 1"):
        assert text in printed
    tracked = {"0": ["0"], "1": ["1"]}
    assert_says(lm, cell["curves"], tracked, **halfway(lm, cell, "line"))


@pytest.mark.slow
def test_translation_changes_nothing_in_a_rotary_model(run, lm):
    result, printed = run(shifting)
    assert result["curves"]["points"] == pytest.approx(np.linspace(0, 10, POINTS))
    for row in result["curves"]["probabilities"].values():
        assert np.ptp(row) <= 1e-5
    ids = ids_of(lm, result["tokens"])
    assert_says(lm, result["curves"], result["tracked"], tokens=ids)
    assert "largest change" in printed


@pytest.mark.slow
def test_scaling_changes_the_answer(run, lm):
    result, _ = run(shifting, transform="scaling")
    tokens, points = ids_of(lm, result["tokens"]), result["curves"]["points"]
    assert points == pytest.approx(np.linspace(0.01, 1.5, POINTS))
    durations = np.full(len(tokens), points[MIDDLE])
    assert_says(
        lm, result["curves"], result["tracked"], tokens=tokens, durations=durations
    )
    assert max(np.ptp(row) for row in result["curves"]["probabilities"].values()) > 1e-2


@pytest.mark.slow
def test_translation_changes_the_answer_with_learned_positions(run, tmp_path):
    pytest.importorskip("torch")
    folder = tmp_path / "gpt2"
    tiny.save_reference(folder, "gpt2")
    tiny.word_tokenizer(tiny.COUNTING_TEXT).save(str(folder / "tokenizer.json"))
    prompt = "how many times is apple"
    result, _ = run(shifting, model=folder, prompt=prompt, threshold=0.02)
    assert max(np.ptp(row) for row in result["curves"]["probabilities"].values()) > 1e-2
    # The model has more tokens than the tokenizer; they can be likely too.
    assert [a for a in result["tracked"] if a.startswith("token ")]
    lm, start = clm.load(folder), result["curves"]["points"][MIDDLE]
    ids = ids_of(lm, result["tokens"])
    assert_says(lm, result["curves"], result["tracked"], tokens=ids, start=start)


# --- Bad input --------------------------------------------------------------------------------

REFUSED = {  # program and flags -> parts of the message
    ("sums", "--numbers=1"): ["--numbers", "two whole numbers"],
    ("sums", "--numbers=a,b"): ["--numbers", "a,b"],
    ("sums", "--numbers=1,-2"): ["--numbers", "1,-2"],
    ("sums", "--numbers=24,13"): ["cannot spell", "'24'"],
    ("events", "--prompts=x", "--scene=zoo"): ["prompts"],
    ("events", "--scene=moon"): ["scene", "moon"],
    ("events", "--points=1"): ["points"],
    ("interpolation", "--words=apples"): ["--words", "apples"],
    ("interpolation", "--words=apples,"): ["'apples' and ''", "empty"],
    ("interpolation", "--words=apples,kumquats"): ["cannot spell", "'kumquats'"],
    ("interpolation", "--answers=yes,kumquat"): ["no single token spells", "'kumquat'"],
    ("interpolation", "--template=Are they red? (yes/no)"): ["template", "[]"],
    ("interpolation", "--template=We bought two [] at the", "--threshold=1"): [
        "--threshold"
    ],
    ("interpolation", "--path=cubic"): ["path", "cubic"],
    ("shifting", "--prompt=Where is the kumquat"): ["cannot spell", "'kumquat'"],
    ("shifting", "--transform=rotation"): ["transform", "rotation"],
    ("boolean", "--batch_size=0"): ["batch_size"],
    ("boolean", "--min_factor=0.5"): ["Unknown command line flag 'min_factor'"],
    ("events", "--prompt=x"): ["Unknown command line flag 'prompt'"],
}


def refused():
    """Each case; one that runs a sweep is slow."""
    for case in REFUSED:
        fast = "--threshold=1" not in case
        yield pytest.param(
            case, marks=[] if fast else pytest.mark.slow, id=" ".join(case)
        )


@pytest.mark.parametrize("arguments", list(refused()))
def test_bad_input_is_refused_in_one_line(tmp_path, arguments):
    status, printed, stderr = call_program(tmp_path, *arguments)
    assert status == 1
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for culprit in REFUSED[arguments]:
        assert culprit in stderr
    assert printed == ""
    assert not list(tmp_path.iterdir())
