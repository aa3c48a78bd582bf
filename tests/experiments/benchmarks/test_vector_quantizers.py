"""Quantizers beside vector-quantize-pytorch's: the data, the comparison, and a run of both."""

import json
import math

import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import baselines, vector_quantizers
from continuous_lm.experiments.benchmarks.vector_quantizers import Config, Score

TINY = {"width": 4, "components": 3, "codes": 8, "stages": 2, "levels": (3, 3)}
TINY |= {"batch_size": 16, "steps": 3, "num_seeds": 2, "kmeans_steps": 2}


def test_data_are_of_the_seed_and_of_unit_variance():
    config = Config(**TINY)
    data = vector_quantizers.draw_data(config, seed=1)
    assert data.batches.shape == (3, 16, 4)
    assert data.unseen.shape == (64, 4)
    every = np.concatenate([data.batches.reshape(-1, 4), data.unseen])
    assert every.std() == pytest.approx(1.0, abs=1e-5)
    again = vector_quantizers.draw_data(config, seed=1)
    np.testing.assert_array_equal(data.unseen, again.unseen)
    other = vector_quantizers.draw_data(config, seed=2)
    assert np.abs(data.unseen - other.unseen).max() > 0.1


def test_a_score_is_the_share_of_the_variance_and_the_use_of_codes():
    x = np.array([[0.0], [2.0], [4.0], [6.0]], np.float32)
    vectors = np.array([[1.0], [1.0], [5.0], [5.0]], np.float32)
    score = vector_quantizers.score_codes(x, vectors, np.array([0, 0, 1, 1]), 4)
    assert score.error == pytest.approx(1.0 / 5.0)
    assert score.perplexity == pytest.approx(2.0)


def test_the_table_has_means_deviations_and_the_difference():
    scores = {
        "VQ": {
            "ours": [Score(0.1, 20.0), Score(0.3, 30.0)],
            "theirs": [Score(0.1, 22.0), Score(0.2, 26.0)],
        }
    }
    _, error, perplexity = vector_quantizers.Result(scores).table().cells
    assert error == [
        "VQ",
        "error",
        f"0.2000 ± {0.1 * math.sqrt(2):.4f}",
        f"0.1500 ± {0.05 * math.sqrt(2):.4f}",
        "0.0500 ± 0.0500",
    ]
    assert perplexity[1:3] == ["perplexity", f"25.0 ± {5 * math.sqrt(2):.1f}"]
    assert perplexity[4] == "1.0000 ± 3.0000"


def test_absent_peers_end_it(monkeypatch):
    monkeypatch.setattr(baselines, "why_missing", lambda *names: f"no {names[0]}")
    with pytest.raises(clm.InputError, match="no torch"):
        vector_quantizers.run(Config(**TINY))


@pytest.mark.slow
def test_both_sides_run(tmp_path):
    pytest.importorskip("torch", reason="a peer")
    pytest.importorskip("vector_quantize_pytorch", reason="a peer")
    result = vector_quantizers.run(Config(**TINY, output_dir=str(tmp_path)))
    written = json.loads((tmp_path / "vector_quantizers.json").read_text())
    assert list(written["quantizers"]) == ["VQ 8", "residual VQ 2 x 8", "FSQ 3 3"]
    for name, sides in written["quantizers"].items():
        assert list(sides) == ["ours", "theirs"]
        for side, scores in sides.items():
            assert scores == [score._asdict() for score in result.scores[name][side]]
            assert all(0.0 < score["error"] < 2.0 for score in scores)
            assert all(1.0 <= score["perplexity"] <= 9.0 for score in scores)
    fsq = result.scores["FSQ 3 3"]  # the same first weights, and the same steps
    for ours, theirs in zip(fsq["ours"], fsq["theirs"], strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)
    assert "residual VQ 2 x 8" in (tmp_path / "vector_quantizers.md").read_text()
