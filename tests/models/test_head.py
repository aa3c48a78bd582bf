"""The base of heads: linear maps from their declarations, and settings by kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.models import head as head_lib
from continuous_lm.models import settings
from continuous_lm.models.head import Head, declare_linear, linear
from continuous_lm.models.parameters import initialize

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class LinearHead(Head):
    kind = "linear"
    parts: int = dataclasses.field(default=2, metadata=settings.integer(1, 4))

    def parameter_table(self, hidden_width):
        sizes = {"X": self.parts, "W": self.width, "D": hidden_width}
        return declare_linear("mean", sizes, "X W", "D", bias=jax.nn.initializers.ones)


REGISTRY = {"linear": LinearHead}


def test_a_linear_map_has_the_shapes_of_its_declaration():
    table = LinearHead(width=3).parameter_table(5)
    assert {path: (d.axes, d.shape) for path, d in table.items()} == {
        "mean": (("X", "W", "D"), (2, 3, 5)),
        "mean_bias": (("X", "W"), (2, 3)),
    }
    params = initialize(KEY, table)
    np.testing.assert_array_equal(params["mean_bias"], 1.0)
    x = np.random.default_rng(0).normal(size=(4, 7, 5)).astype(np.float32)
    expected = np.einsum("abd,xwd->abxw", x, np.asarray(params["mean"])) + 1.0
    actual = linear(params, "mean", jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_kernels_keep_the_variance_of_their_inputs():
    kernel = head_lib.fan_in_normal(KEY, (200, 50), jnp.float32)
    assert float(jnp.std(kernel)) == pytest.approx(50**-0.5, rel=0.02)
    assert float(jnp.abs(kernel).max()) <= 2 / 0.8796 * 50**-0.5
    assert head_lib.fan_in_normal(KEY, (2, 3), jnp.bfloat16).dtype == jnp.bfloat16


def test_there_and_back():
    head = LinearHead(width=3, parts=4)
    assert head.to_dict() == {"kind": "linear", "width": 3, "parts": 4}
    assert head_lib.from_dict(head.to_dict(), REGISTRY) == head
    assert hash(head_lib.from_dict(head.to_dict(), REGISTRY)) == hash(head)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cubic", "width": 3}, "kind of head is 'cubic'; it must be one of"),
        ({"kind": ["linear"], "width": 3}, "kind of head is ['linear']"),
        ({"width": 3}, "kind of head is None"),
        ({"kind": "linear"}, "a linear head needs its width"),
        ({"kind": "linear", "width": 0}, "width is 0; it must be an integer from 1"),
        ({"kind": "linear", "width": 3, "parts": 5}, "parts is 5; it must be"),
        ({"kind": "linear", "width": 3, "kinds": 1}, "a linear head has no setting"),
    ],
)
def test_wrong_arguments_are_refused(fields, message):
    with pytest.raises(clm.InputError) as refused:
        head_lib.from_dict(fields, REGISTRY)
    assert str(refused.value).startswith(message)
