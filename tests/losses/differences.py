"""Gradients against finite differences, in float64 and by one compiled program."""

import jax
import jax.numpy as jnp
import numpy as np


def check_gradient(function, *args, step=1e-5, rtol=1e-7):
    """The sum of `function` along random directions of each argument: central differences."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(a, jnp.float64) for a in args]
    directions = [jnp.asarray(rng.normal(size=a.shape)) for a in args]
    both = jax.jit(
        jax.value_and_grad(lambda *a: function(*a).sum(), argnums=tuple(range(len(args))))
    )
    gradients = both(*args)[1]
    for i, (direction, gradient) in enumerate(zip(directions, gradients, strict=True)):
        values = [
            both(*args[:i], args[i] + sign * step * direction, *args[i + 1 :])[0]
            for sign in (1, -1)
        ]
        slope = jnp.sum(direction * gradient)
        np.testing.assert_allclose(
            (values[0] - values[1]) / (2 * step), slope, rtol=rtol, atol=rtol
        )
        assert abs(slope) > 1e-3  # or it would hold of anything
