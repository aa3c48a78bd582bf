"""Heads without a likelihood: from noise and the hidden state to the next vector.

What such a head knows of the distribution is a map from noise to a sample, so that it can be drawn
from, and never be asked for a probability:

    loss(hidden, target, key)            [...], in expectation least at the data's distribution
    sample(key, hidden, temperature)     [..., W]
    noise(key, shape)                    [*shape, U]
    transform(noise, hidden)             [..., W], the map itself

with hidden [..., D] and target [..., W]. Where a target was drawn several times (from the posterior
of an autoencoder, say), target is [num_targets, ..., W]: one axis more than hidden has. Leading
axes of noise and hidden broadcast, so that noise [Z, ..., U] gives Z samples of each hidden state.
`__call__` is the sample of noise that is 0, and what parameters are made with.

    energy      one step, trained by the energy score (the generative head of CALM)
    flow        the solution of an ordinary differential equation, trained by flow matching
    diffusion   steps of denoising, trained to predict the noise

Flow and diffusion begin at a standard normal density: they ask for targets of mean 0 and deviation
1 in each dimension, or near to it.

`temperature` multiplies the noise. It makes samples more or less alike, but it is no tempered
density, p^(1/temperature) normalised: of two modes of which one is rarer, a low temperature keeps
both, or what lies between them.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import losses
from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError
from continuous_lm.models.calm.flow_solvers import (
    _check_solver,
    denoise,
    integrate,
    signal_variance,
)
from continuous_lm.models.calm.noise_network import (
    _NUM_TIME_FREQUENCIES,
    Weights,
    _apply_linear,
    condition,
    run_noise_network,
    time_features,
)
from continuous_lm.models.density.heads import Head, kernel_init

_ZEROS_INIT = nn.initializers.zeros
_ONES_INIT = nn.initializers.ones


class ImplicitHead(Head):
    """What all of them share: gated residual MLP blocks over noise and the hidden state.

    With LN a layer norm, x = LN(noise's embedding) and y = LN(hidden state's embedding), a block is

        h = outer(silu(middle(silu(inner([LN(x), y])))))
        x + down(silu(gate) * up),     gate, up = the halves of h

    and the end last(silu(last_inner(LN(x)))), as in CALM (Shao et al., arXiv:2510.27688). All
    linear maps have a bias; all but those to and from the blocks keep or double the width D.

    The last map begins at 0. All samples coincide then, and the loss cannot tell apart what noise
    they come from; but the map's gradient can, as it is an outer product with features of that
    noise, and after one step no two samples are equal.

    Attributes:
      hidden_size: D of the blocks; the hidden state's width if left out.
      depth: J, how many blocks.
      num_samples: Z, how often a loss draws noise for each hidden state.
    """

    hidden_size: int | None = None
    depth: int = 4
    num_samples: int = 8

    @property
    def noise_width(self) -> int:
        """U."""
        return self.width

    @property
    def num_evaluations(self) -> int:
        """How often a sample goes through the blocks."""
        return 1

    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = as_float(hidden)
        zeros = jnp.zeros((*hidden.shape[:-1], self.noise_width), hidden.dtype)
        return self.transform(zeros, hidden)

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """[...], of hidden [..., D] and target [(num_targets,) ..., W]; noise is drawn by `key`."""
        raise NotImplementedError

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        """Samples [..., W] from noise [..., U] and hidden [..., D]: a deterministic map."""
        raise NotImplementedError

    def noise(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Noise [*shape, U] that `transform` turns into samples; of a standard normal density."""
        return jax.random.normal(key, (*shape, self.noise_width), dtype)

    def sample(
        self, key: jax.Array, hidden: jax.Array, temperature: ArrayLike = 1.0
    ) -> jax.Array:
        """Samples [..., W] from the noise of `key`, times `temperature`: see the module."""
        hidden = as_float(hidden)
        noise = self.noise(key, hidden.shape[:-1], hidden.dtype)
        return self.transform(jnp.asarray(temperature, noise.dtype) * noise, hidden)

    def log_prob(self, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        raise InputError(
            "this head can only be sampled: it has no density and so no log_prob; use its loss, or"
            " scores that take samples (losses.energy_score, losses.brier_n)"
        )

    def mean(self, hidden: jax.Array) -> jax.Array:
        raise InputError(
            "this head can only be sampled: its mean has no closed form; take the mean of samples"
        )

    @nn.compact
    def weights(
        self, hidden_width: int, input_width: int, time_width: int = 0
    ) -> Weights:
        """All parameters by name, at least float32.

        Kernels are [out, in]; those of the blocks have an axis J before.

        Args:
          hidden_width: width of the hidden states.
          input_width: of what the blocks turn into a sample, noise or a noisy vector.
          time_width: features of a time, if the blocks are given one.
        """
        block_width, depth = self.hidden_size or hidden_width, self.depth
        # Name, outputs and inputs with their letters, axis of the blocks. F is the one that a mesh
        # divides: what a block computes between its first map and its last.
        kernels = [
            ("noise", (block_width, "D"), (input_width, "U"), False),
            ("hidden", (block_width, "-"), (hidden_width, "D"), False),
            ("blocks_inner", (block_width, "F"), (2 * block_width, "D"), True),
            ("blocks_middle", (block_width, "D"), (block_width, "F"), True),
            ("blocks_outer", (2 * block_width, "F"), (block_width, "D"), True),
            ("blocks_down", (block_width, "D"), (block_width, "F"), True),
            ("last_inner", (block_width, "F"), (block_width, "D"), False),
            ("last", (self.width, "W"), (block_width, "F"), False),
        ]
        if time_width:
            kernels.append(("time", (block_width, "D"), (time_width, "-"), False))
        norms = [
            ("noise_norm", False),
            ("hidden_norm", False),
            ("blocks_norm", True),
            ("last_norm", False),
        ]
        params = {}
        for name, (output_size, output_axis), (
            input_size,
            input_axis,
        ), is_stacked in kernels:
            stack_shape, axis_letters = ((depth,), "J ") if is_stacked else ((), "")
            initializer = _ZEROS_INIT if name == "last" else kernel_init
            params[name] = self.parameter(
                name,
                (*stack_shape, output_size, input_size),
                f"{axis_letters}{output_axis} {input_axis}",
                initializer,
            )
            bias_name = f"{name}_bias"
            params[bias_name] = self.parameter(
                bias_name,
                (*stack_shape, output_size),
                f"{axis_letters}{output_axis}",
                _ZEROS_INIT,
            )
        for name, is_stacked in norms:
            stack_shape, axis_letters = ((depth,), "J D") if is_stacked else ((), "D")
            for param_name, initializer in (
                (name, _ONES_INIT),
                (f"{name}_bias", _ZEROS_INIT),
            ):
                params[param_name] = self.parameter(
                    param_name, (*stack_shape, block_width), axis_letters, initializer
                )
        return {name: as_float(array) for name, array in params.items()}

    def as_target_draws(self, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        """The target as draws [num_targets, ..., W], at least float32.

        Raises:
          InputError: if it is neither [..., W] nor [num_targets, ..., W], for hidden [..., D].
        """
        target_draws = as_float(target)
        batch_shape = hidden.shape[:-1]
        if (
            target_draws.ndim not in (hidden.ndim, hidden.ndim + 1)
            or target_draws.shape[-1] != self.width
            or 0 in target_draws.shape
        ):
            raise InputError(
                f"target has shape {list(target_draws.shape)}; for hidden {list(hidden.shape)}"
                " it must be"
                f" {[*batch_shape, self.width]}, or that with an axis of draws before"
            )
        target_draws = (
            target_draws if target_draws.ndim > hidden.ndim else target_draws[None]
        )
        try:
            jnp.broadcast_shapes(batch_shape, target_draws.shape[1:-1])
        except ValueError:
            raise InputError(
                f"target has shape {list(target_draws.shape[1:])} a draw; its leading axes must"
                " fit those of"
                f" hidden, {list(hidden.shape)}"
            ) from None
        return target_draws


class EnergyHead(ImplicitHead):
    """One pass from uniform noise, trained by the energy score (Shao et al., arXiv:2510.27688).

    The noise is uniform in [-0.5, 0.5). The loss is the energy score of `num_samples` samples, of
    which there must be 2, against all draws of the target: see `losses.energy_score`.

    Attributes:
      noise_size: U.
      beta: exponent of the distances in the score, above 0 and below 2.
    """

    noise_size: int = 64
    beta: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 2:
            raise InputError(
                f"num_samples is {self.num_samples}; an energy score needs at least 2 samples"
            )
        if not 0.0 < self.beta < 2.0:
            raise InputError(
                f"beta is {self.beta!r}; the score is strictly proper above 0 and below 2 only"
            )

    @property
    def noise_width(self) -> int:
        return self.noise_size

    def noise(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> jax.Array:
        """Noise [*shape, U], uniform in [-0.5, 0.5)."""
        return jax.random.uniform(key, (*shape, self.noise_width), dtype, -0.5, 0.5)

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """The energy score [...] of hidden [..., D] and target [(num_targets,) ..., W]."""
        hidden = as_float(hidden)
        targets = self.as_target_draws(hidden, target)
        noise = self.noise(key, (self.num_samples, *hidden.shape[:-1]), hidden.dtype)
        return losses.energy_score(
            self.transform(noise, hidden), targets, beta=self.beta
        )

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        noise, hidden = _broadcast_inputs(noise, hidden, self.noise_width)
        weights = self.weights(hidden.shape[-1], self.noise_size)
        return run_noise_network(
            weights, noise, condition(weights, _apply_linear(weights, "hidden", hidden))
        )


class TimeConditionedHead(ImplicitHead):
    """A head whose blocks are given a time from 0 to 1 and predict a vector for its noisy one.

    The loss is the mean squared error over the W dimensions, averaged over `num_samples` pairs of
    noise and a time: one in each of so many equal parts of [0, 1], which makes it vary less. The
    draws of the target are taken in turn, so that more than `num_samples` are not read.

    Attributes:
      steps: of which a sample is made.
    """

    steps: int = 16

    def make_predictor(
        self, hidden: jax.Array
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """x [..., W], time [...] -> [..., W]: the blocks, for hidden states [..., D]."""
        weights = self.weights(hidden.shape[-1], self.width, 2 * _NUM_TIME_FREQUENCIES)
        hidden_embedding = _apply_linear(weights, "hidden", hidden)

        def predict(x: jax.Array, time: jax.Array) -> jax.Array:
            embedding = hidden_embedding + _apply_linear(
                weights, "time", time_features(time)
            )
            return run_noise_network(weights, x, condition(weights, embedding))

        return predict

    def noised_targets(
        self, hidden: jax.Array, target: ArrayLike, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Targets [Z, ..., W], noise of the same shape, and times [Z, ...]."""
        targets = self.as_target_draws(hidden, target)
        num_samples, dtype = self.num_samples, jnp.result_type(hidden, targets)
        targets = targets[jnp.arange(num_samples) % len(targets)].astype(dtype)
        batch_shape = jnp.broadcast_shapes(hidden.shape[:-1], targets.shape[1:-1])
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(
            noise_key, (num_samples, *batch_shape, self.width), dtype
        )
        interval_index = jnp.arange(num_samples, dtype=dtype).reshape(
            -1, *(1,) * len(batch_shape)
        )
        times = (
            interval_index
            + jax.random.uniform(time_key, (num_samples, *batch_shape), dtype)
        ) / num_samples
        return targets, noise, times


class FlowHead(TimeConditionedHead):
    """A velocity field that carries normal noise to the target along straight lines.

    Conditional flow matching (Lipman et al., arXiv:2210.02747; the straight paths with no noise
    left at their ends): from z at time 0 to the target y at time 1 goes (1 - t) z + t y, and the
    blocks predict y - z there. A sample is the solution of dx/dt = velocity(x, t) from noise.

    Attributes:
      solver: "euler", of first order, or "midpoint", of second order with two evaluations a step.
    """

    solver: str = "midpoint"

    def __post_init__(self):
        super().__post_init__()
        _check_solver(self.solver)

    @property
    def num_evaluations(self) -> int:
        return self.steps * (1 if self.solver == "euler" else 2)

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """Squared error [...] of the velocity; hidden [..., D], target [(num_targets,) ..., W]."""
        hidden = as_float(hidden)
        targets, noise, times = self.noised_targets(hidden, target, key)
        time = times[..., None]
        predicted_velocity = self.make_predictor(hidden)(
            (1 - time) * noise + time * targets, times
        )
        return jnp.mean(
            jnp.square(predicted_velocity - (targets - noise)), axis=(0, -1)
        )

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        noise, hidden = _broadcast_inputs(noise, hidden, self.noise_width)
        return integrate(
            self.make_predictor(hidden), noise, steps=self.steps, solver=self.solver
        )


class DiffusionHead(TimeConditionedHead):
    """Denoising in steps (Ho et al., arXiv:2006.11239), by a network that predicts the noise.

    The part of the target's variance that is left at time t falls along the cosine schedule
    (Nichol and Dhariwal, arXiv:2102.09672), down to `MIN_SIGNAL_VARIANCE`: see `signal_variance`.
    With ancestral steps new noise comes in at each of them, so that U is steps times W, and without
    (Song et al., arXiv:2010.02502) only at the first.

    Attributes:
      ancestral: whether steps draw from the posterior of the step before, or follow its mean path.
    """

    ancestral: bool = False

    @property
    def noise_width(self) -> int:
        return self.width * (self.steps if self.ancestral else 1)

    @property
    def num_evaluations(self) -> int:
        return self.steps

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """Squared error [...] of the noise; hidden [..., D], target [(num_targets,) ..., W]."""
        hidden = as_float(hidden)
        targets, noise, times = self.noised_targets(hidden, target, key)
        variance = signal_variance(times)[..., None]
        predicted_noise = self.make_predictor(hidden)(
            jnp.sqrt(variance) * targets + jnp.sqrt(1 - variance) * noise, times
        )
        return jnp.mean(jnp.square(predicted_noise - noise), axis=(0, -1))

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        noise, hidden = _broadcast_inputs(noise, hidden, self.noise_width)
        initial_noise, step_noise = noise[..., : self.width], None
        if self.ancestral:
            step_noise = jnp.roll(
                noise, -self.width, axis=-1
            )  # the last step's is not read
            step_noise = jnp.moveaxis(
                step_noise.reshape(*initial_noise.shape[:-1], self.steps, self.width),
                -2,
                0,
            )
        return denoise(
            self.make_predictor(hidden), initial_noise, step_noise, steps=self.steps
        )


IMPLICIT_HEADS: dict[str, type[ImplicitHead]] = {
    "energy": EnergyHead,
    "flow": FlowHead,
    "diffusion": DiffusionHead,
}


def _broadcast_inputs(
    noise: ArrayLike, hidden: ArrayLike, width: int
) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype, noise with all the leading axes that samples have."""
    noise_float, hidden_float = as_float(noise), as_float(hidden)
    message = f"noise has shape {list(noise_float.shape)}; it must be [..., {width}]"
    if noise_float.ndim < 1 or noise_float.shape[-1] != width:
        raise InputError(message)
    try:
        batch_shape = jnp.broadcast_shapes(
            noise_float.shape[:-1], hidden_float.shape[:-1]
        )
    except ValueError:
        raise InputError(
            f"{message} with leading axes that fit those of hidden, {list(hidden_float.shape)}"
        ) from None
    dtype = jnp.result_type(noise_float, hidden_float)
    return jnp.broadcast_to(noise_float, (*batch_shape, width)).astype(
        dtype
    ), hidden_float.astype(dtype)
