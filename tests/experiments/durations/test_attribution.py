"""The programs on durations' gradients: attribution, inverse, pruning, on the embedded model."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.durations import attribution, inverse, pruning
from tests.fixtures.programs import call_program

SUM = "What is the sum of 6 and 0?\nAnswer: "
CONFIGS = {
    "attribution": attribution.Config(prompt=SUM, nodes=32),
    "inverse": inverse.Config(answer="3", span="apple apple", steps=20),
    "pruning": pruning.Config(prompt=SUM, steps=40, tolerance=0.2),
}
MODULES = {"attribution": attribution, "inverse": inverse, "pruning": pruning}


SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("attribution", "inverse")
]


@pytest.fixture(scope="module", params=["pruning", *SLOW])
def ran(request, tmp_path_factory):
    """The program's name, its results and its printed text."""
    name, folder = request.param, tmp_path_factory.mktemp("run") / "out"
    config = dataclasses.replace(CONFIGS[name], output_dir=str(folder))
    summary = MODULES[name].run(config).summary()
    return name, json.loads((folder / f"{name}.json").read_text()), summary, folder


def check_attribution(result, table, folder):
    assert result["answer"] == "6"
    assert result["group"] == ["6"]
    assert result["relative_residual"] < 0.05
    full, alone = (result["log_probability"][k] for k in ("whole", "first token alone"))
    methods = result["methods"]
    exact = methods["integrated gradients"]
    assert sum(exact["tokens"]) == pytest.approx(
        full - alone + exact["residual"], abs=1e-6
    )
    for name, method in methods.items():
        assert len(method["tokens"]) == len(result["pieces"])
        assert method["deletion"]["values"][0] == pytest.approx(full, abs=1e-4)
        assert method["deletion"]["values"][-1] == pytest.approx(alone, abs=1e-4)
        assert f"{name:<22} {sum(method['tokens']):8.3f}" in table
    page = (folder / "attribution.html").read_text()
    assert page.count("<p>") == 4
    assert ">sum</span>" in page
    assert "http" not in page


def check_inverse(result, table, folder):
    actual = result["found"]["gradients"]
    first, end = result["span"]
    assert result["pieces"][first:end] == ["apple"] * 4
    d = np.array(actual["durations"])
    assert (np.delete(d, range(first, end)) == 1).all()
    assert actual["says"] == "3"
    assert actual["holds"]
    assert actual["lead"] >= 0.1
    assert actual["total_change"] == pytest.approx(np.abs(d - 1).sum(), abs=1e-5)
    assert actual["total_change"] < 0.7
    assert actual["evaluations"] == result["found"]["random search"]["evaluations"]


def check_pruning(result, table, folder):
    d = np.array(result["durations"])
    assert result["answer"] == result["says"] == "6"
    assert result["kept"] == np.flatnonzero(d).tolist()
    assert result["total"]["after"] == pytest.approx(d[1:].sum(), abs=1e-5)
    assert result["total"]["after"] < 0.7 * result["total"]["before"]
    lm = clm.load("apples", dtype="float32")
    tokens = clm.tokenization.encode(lm.tokenizer, SUM).ids
    logits = np.asarray(
        lm(np.array(tokens), durations=d.astype(np.float32), position=-1), np.float64
    )
    after = logits[lm.tokenizer.token_to_id("6")] - np.log(np.exp(logits).sum())
    assert after == pytest.approx(result["log_probability"]["after"], abs=1e-4)
    assert after >= result["log_probability"]["before"] - 0.2 - 1e-4


def test_results(ran):
    name, result, table, folder = ran
    assert result["run"]["flags"]["model"] == "apples"
    for path in folder.glob("*.png"):
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 200
        assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20
    files = {p.name for p in folder.iterdir()}
    assert {f"{name}.json", f"{name}.png", f"{name}.pdf"} <= files
    {
        "attribution": check_attribution,
        "inverse": check_inverse,
        "pruning": check_pruning,
    }[name](result, table, folder)


BAD = {
    "attribution": {
        "'zebra'": ["--answer=zebra"],
        "'1 2'": ["--answer=1 2"],
        "prompt '' is empty": ["--prompt="],
        "'xyzzy'": ["--prompt=What is xyzzy?"],
        "--nodes is 6": ["--nodes=6"],
        "cannot write": ["--output_dir=/proc/none"],
    },
    "inverse": {
        "'zebra'": ["--answer=zebra"],
        "'  ' is empty": ["--prompt=  "],
        "'cat' is not in the prompt": ["--span=cat"],
    },
    "pruning": {"''": ["--answer="], "'zebra'": ["--answer=zebra"]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line(name, tmp_path):
    for culprit, arguments in BAD[name].items():
        status, stdout, stderr = call_program(
            tmp_path, name, "--output_dir=out", *arguments
        )
        assert status == 1
        assert stdout == ""
        assert stderr.splitlines()[-1].startswith("error: "), stderr
        assert culprit in stderr
        assert not list(tmp_path.iterdir())
