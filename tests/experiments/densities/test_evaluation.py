"""The numbers of density models, against plain numpy on tiny models."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from continuous_lm.experiments.densities import density_training, evaluation
from continuous_lm.models import density
from continuous_lm.models.density import heads

V, LENGTH = 13, 6
KINDS = {
    "token": heads.TokenHead(width=V, tied=True),
    "gaussian": heads.GaussianHead(width=8, min_scale=0.9),
    "mixture": heads.MixtureHead(width=8, components=3),
    "experts": heads.ExpertsHead(width=8, experts=3, expert_size=4),
}


def created(kind):
    config = density_training.trunk_config(
        vocab_size=V, hidden_size=8, num_layers=1, num_heads=2, mlp_size=8
    )
    return density.create(jax.random.key(1), config, KINDS[kind])


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    return rng.integers(0, V - 3, 16 * LENGTH + 1), rng.integers(0, V - 3, 500)


def windows(held_out, seed=0):
    """Windows in the order of `evaluate_density`."""
    full = held_out[np.arange(16)[:, None] * LENGTH + np.arange(LENGTH + 1)]
    return np.random.default_rng(seed).permutation(full)


@pytest.mark.parametrize("kind", ["token", "mixture"])
def test_perplexities_are_those_of_the_logits(kind, text):
    held_out, train = text
    lm, rows = created(kind), windows(held_out)
    actual = evaluation.evaluate_density(lm, held_out, train, length=LENGTH)
    logits = np.asarray(density.token_logits(lm, rows), np.float64)
    targets = rows[:, 1:]

    def perplexity(logits):
        logs = np.take_along_axis(
            log_softmax(logits, axis=-1), targets[..., None], axis=-1
        )
        return np.exp(-logs.mean())

    assert actual["tokens"] == targets.size
    assert actual["perplexity"]["value"] == pytest.approx(perplexity(logits), rel=1e-4)
    other = logits.reshape(2, 8, *logits.shape[1:])  # judged in eights
    other = np.roll(other, 1, axis=1).reshape(logits.shape)
    assert actual["shuffled"]["value"] == pytest.approx(perplexity(other), rel=1e-4)
    counts = np.bincount(train, minlength=V) + 1.0
    unigram = np.exp(-np.log(counts / counts.sum())[targets].mean())
    assert actual["unigram"]["value"] == pytest.approx(unigram, rel=1e-6)
    for name in ("perplexity", "shuffled", "unigram"):
        assert actual[name]["low"] < actual[name]["value"] < actual[name]["high"]


@pytest.mark.slow
def test_vectors_are_those_of_the_table(text):
    held_out, train = text
    lm, rows = created("gaussian"), windows(held_out)
    actual = evaluation.evaluate_density(lm, held_out, train, length=LENGTH)
    assert actual["nll"]["value"] == pytest.approx(
        -float(np.mean(density.log_prob(lm, rows))), rel=1e-4
    )
    assert actual["at_bound"]["value"] == pytest.approx(
        np.mean(np.asarray(distribution(lm, rows).scale) < 0.99), abs=1e-6
    )
    table = np.asarray(density.token_table(lm))
    mean = np.asarray(distribution(lm, rows).mean)
    nearest = ((mean[..., None, :] - table) ** 2).sum(-1).argmin(-1)
    assert actual["accuracy_mean"]["value"] == pytest.approx(
        np.mean(nearest == rows[:, 1:])
    )
    np.testing.assert_allclose(table.std(axis=0), 1.0, rtol=1e-5)
    assert actual["least_variance"] == pytest.approx(1.0, rel=1e-5)
    assert 1 < actual["effective_rank"] <= 8


def distribution(lm, rows):
    hidden = lm.model.context_states(lm.params, lm.model.make_inputs(rows))
    return lm.model.distribution(lm.params, hidden)


@pytest.mark.parametrize(
    "kind", ["mixture", pytest.param("experts", marks=pytest.mark.slow)]
)
def test_use_is_the_perplexity_of_the_mean_weights(kind, text):
    held_out, train = text
    lm, rows = created(kind), windows(held_out)
    actual = evaluation.evaluate_density(lm, held_out, train, length=LENGTH)["use"]
    weights = np.asarray(distribution(lm, rows).weights)
    if kind == "experts":
        hidden = lm.model.context_states(lm.params, lm.model.make_inputs(rows))
        route = lm.model.head.route(lm.params["head"], hidden)
        selected = np.asarray(route.expert_indices)
        full = np.zeros((*weights.shape[:-1], 3))
        np.put_along_axis(full, selected, weights, axis=-1)
        weights = full
    mean = weights.reshape(-1, weights.shape[-1]).mean(axis=0)
    assert actual == pytest.approx(np.exp(-(mean * np.log(mean)).sum()), rel=1e-3)


def test_tables_hold_the_numbers_and_say_where_there_are_none():
    interval = {"value": 12.25, "low": 11.0, "high": 13.5}
    token = dict.fromkeys(
        ("perplexity", "shuffled", "unigram", "accuracy_mean", "nats"), interval
    ) | {"parameters": 1234, "bits_per_byte": 2.5}
    vast = {"value": None, "low": None, "high": None}
    vector = token | {
        "perplexity": vast,
        "width": 4,
        "nll": {"value": 8.0},
        "accuracy_draw": {"value": 0.5},
        "noise": {"value": 2.0},
        "margin": {"value": 1.0},
        "at_bound": {"value": 0.25},
        "effective_rank": 3.0,
    }
    perplexity, vectors = evaluation.make_tables(
        {"baseline": token, "gaussian": vector}
    )
    assert perplexity.cells[1][:4] == ["baseline", "1,234", "12.25", "11 to 13.5"]
    assert perplexity.cells[2][2:4] == ["", ""]
    assert vectors.cells[1][:4] == ["gaussian", "4", "2.0000", "50.0"]
    assert vectors.cells[1][-1] == ""
    assert len(evaluation.make_tables({"baseline": token})) == 1
