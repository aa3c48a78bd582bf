"""The page of implicit heads: its target, its measures, the program."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from continuous_lm.experiments.calm import compare_heads, two_mode_target

KEY = jax.random.key(3)


def test_the_target_and_its_best_gaussian():
    """Moments in closed form; the same for both, and another share in the modes."""
    angle = 0.7
    hidden = jnp.broadcast_to(
        two_mode_target.hidden_states(jnp.array(angle)), (40_000, 8)
    )
    direction = np.array([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(
        two_mode_target.likelier_mode(hidden[0]), np.sqrt(2) * direction, rtol=1e-6
    )
    mean = 0.4 * np.sqrt(2) * direction
    covariance = 2 * 0.84 * np.outer(direction, direction) + 0.15**2 * np.eye(2)
    for draw in (two_mode_target.draw_target, two_mode_target.draw_best_gaussian):
        x = np.asarray(draw(KEY, hidden))
        np.testing.assert_allclose(x.mean(axis=0), mean, atol=0.03)
        np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.03)


def test_energy_distances_are_sums_over_pairs():
    distance = pytest.importorskip(
        "scipy.spatial.distance", reason="scipy has the distances"
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6, 2)), 1.0 + rng.normal(size=(2, 6, 2))
    for i, actual in enumerate(two_mode_target.energy_distances(x, y)):
        within = [distance.pdist(a).mean() for a in (x[i], y[i])]
        assert actual == pytest.approx(
            2 * distance.cdist(x[i], y[i]).mean() - sum(within)
        )


@pytest.mark.slow
def test_data_is_at_no_distance_from_data_and_the_gaussian_is():
    sizes = {"conditions": 40, "samples": 60}
    data = two_mode_target.evaluate_samples(two_mode_target.draw_target, KEY, **sizes)
    assert data.interval[0] < 0 < data.interval[1]
    assert data.in_modes == pytest.approx(1 - np.exp(-4.5), abs=0.01)
    assert data.likelier == pytest.approx(0.7, abs=0.05)
    best = two_mode_target.evaluate_samples(
        two_mode_target.draw_best_gaussian, KEY, **sizes
    )
    assert best.interval[0] > 0.1
    assert best.in_modes < 0.4


def test_heads_that_differ_in_sampling_alone_are_fitted_once():
    heads = two_mode_target.make_heads(8, 1, 2)
    trained = {
        name: two_mode_target.with_default_sampling(head)
        for name, head in heads.items()
    }
    assert trained["flow, Euler"] == trained["flow, midpoint"]
    assert trained["diffusion"] == trained["diffusion, ancestral"]
    assert len(set(trained.values())) == 5
    shapes = {
        name: {path: d.shape for path, d in head.parameter_table(8).items()}
        for name, head in heads.items()
    }
    assert shapes["diffusion"] == shapes["diffusion, ancestral"]


@pytest.mark.slow
def test_the_program_writes_what_it_says(tmp_path):
    config = compare_heads.Config(
        steps=3,
        hidden_size=8,
        conditions=3,
        samples=4,
        batch_size=4,
        output_dir=tmp_path / "out",
    )
    result = compare_heads.run(config)
    values = json.loads((tmp_path / "out" / "compare_heads.json").read_text())
    assert values["run"]["flags"]["steps"] == 3
    assert list(values["heads"]) == [
        "data",
        "best Gaussian",
        *two_mode_target.make_heads(8, 1, 2),
    ]
    for actual in values["heads"].values():
        assert actual["interval"][0] <= actual["distance"] <= actual["interval"][1]
        assert f"{actual['distance']:.4f}" in result.summary()
    for ending, least in {
        "png": 20_000,
        "pdf": 5000,
        "csv": 100,
        "md": 100,
        "tex": 100,
    }.items():
        assert (tmp_path / "out" / f"compare_heads.{ending}").stat().st_size > least
