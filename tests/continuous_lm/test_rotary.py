import jax.numpy as jnp
import numpy as np
import pytest

from continuous_lm import rotary
from continuous_lm.rotary import Llama3Scaling, Rope


def rotate(x, angles):
    return rotary.apply_rotary(x, rotary.cos_sin(angles))


def test_rotation_depends_on_differences_of_times_alone():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 16)), jnp.float32)

    def score(t_q, t_k):
        turned = [
            rotate(x, rotary.angles(jnp.array([t], jnp.float32), Rope(), 16))
            for x, t in ((q, t_q), (k, t_k))
        ]
        return float(jnp.vdot(*turned))

    assert score(3.25, 1.5) == pytest.approx(score(1.75, 0.0), abs=1e-5)
    assert abs(score(3.25, 1.5) - score(3.25, 2.5)) > 1e-2


def test_pairs_are_two_halves():
    x = jnp.zeros((1, 1, 4)).at[0, 0, 0].set(1.0)
    angle = rotary.angles(jnp.array([0.5]), Rope(), 4)
    np.testing.assert_allclose(
        rotate(x, angle)[0, 0], [np.cos(0.5), 0, np.sin(0.5), 0], atol=1e-6
    )


def test_llama3_frequencies_equal_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "original_max_position_embeddings": 8192,
            **fields,
        }
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = rotary.frequencies(
        Rope(theta=5e5, scaling=Llama3Scaling(original_length=8192, **fields)), 128
    )
    plain = rotary.frequencies(Rope(theta=5e5), 128)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert (ours < plain * 0.99).any()
    assert (ours == plain).any()
