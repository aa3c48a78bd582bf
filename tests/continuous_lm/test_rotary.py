import jax
import numpy as np
import pytest

from continuous_lm import rotary
from continuous_lm.rotary import Rope


@jax.jit
def rotate(x, times):
    """x [T, N, H] rotated by the angles of `times` [T]."""
    angles = rotary.angles(times, Rope(), x.shape[-1])
    return rotary.apply_rotary(x, rotary.cos_sin(angles))


def test_scores_depend_only_on_differences_of_times():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 16)).astype(np.float32)

    def score(t_q, t_k):
        rotated_q = rotate(q, np.array([t_q], np.float32))
        rotated_k = rotate(k, np.array([t_k], np.float32))
        return float(np.vdot(rotated_q, rotated_k))

    assert score(3.25, 1.5) == pytest.approx(score(1.75, 0.0), abs=1e-5)
    assert abs(score(3.25, 1.5) - score(3.25, 2.5)) > 1e-2


def test_rotated_pairs_are_channel_i_of_each_half():
    x = np.array([[[1.0, 0.0, 0.0, 0.0]]], np.float32)
    rotated = np.asarray(rotate(x, np.array([0.5], np.float32)))[0, 0]
    np.testing.assert_allclose(rotated, [np.cos(0.5), 0, np.sin(0.5), 0], atol=1e-6)
