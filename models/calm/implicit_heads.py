"""Heads without a likelihood: from noise and the hidden state to the next vector.

What such a head knows of the distribution is a map from noise to a sample, so that it can be drawn
from, and never be asked for a probability:

    loss(hidden, target, key)            [...], in expectation least at the data's distribution
    sample(key, hidden, temperature)     [..., W]
    noise(key, shape)                    [*shape, U]
    transform(noise, hidden)             [..., W], the map itself

with hidden [..., D] and target [..., W]. Where a target was drawn several times (from the posterior
of an autoencoder, say), target is [Y, ..., W]: one axis more than hidden has. Leading axes of noise
and hidden broadcast, so that noise [Z, ..., U] gives Z samples of each hidden state. `__call__` is
the sample of noise that is 0, and what parameters are made with.

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
from continuous_lm.models.calm.flow_solvers import _check_solver, denoise, integrate, signal
from continuous_lm.models.calm.noise_network import (
    _TIMES,
    Weights,
    _embedded,
    conditioned,
    network,
    waves,
)
from continuous_lm.models.density.heads import Head, kernel_init

_ZEROS = nn.initializers.zeros
_ONES = nn.initializers.ones


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
    def evaluations(self) -> int:
        """How often a sample goes through the blocks."""
        return 1

    def __call__(self, hidden: jax.Array) -> jax.Array:
        hidden = as_float(hidden)
        zeros = jnp.zeros((*hidden.shape[:-1], self.noise_width), hidden.dtype)
        return self.transform(zeros, hidden)

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """[...], of hidden [..., D] and target [..., W] or [Y, ..., W]; noise is drawn by `key`."""
        raise NotImplementedError

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        """Samples [..., W] from noise [..., U] and hidden [..., D]: a deterministic map."""
        raise NotImplementedError

    def noise(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """Noise [*shape, U] that `transform` turns into samples; of a standard normal density."""
        return jax.random.normal(key, (*shape, self.noise_width), dtype)

    def sample(self, key: jax.Array, hidden: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
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
    def weights(self, features: int, reads: int, times: int = 0) -> Weights:
        """All parameters by name, at least float32.

        Kernels are [out, in]; those of the blocks have an axis J before.

        Args:
          features: width of the hidden states.
          reads: of what the blocks turn into a sample, noise or a noisy vector.
          times: features of a time, if the blocks are told one.
        """
        size, depth = self.hidden_size or features, self.depth
        # Name, outputs and inputs with their letters, axis of the blocks. F is the one that a mesh
        # divides: what a block computes between its first map and its last.
        kernels = [
            ("noise", (size, "D"), (reads, "U"), False),
            ("hidden", (size, "-"), (features, "D"), False),
            ("blocks_inner", (size, "F"), (2 * size, "D"), True),
            ("blocks_middle", (size, "D"), (size, "F"), True),
            ("blocks_outer", (2 * size, "F"), (size, "D"), True),
            ("blocks_down", (size, "D"), (size, "F"), True),
            ("last_inner", (size, "F"), (size, "D"), False),
            ("last", (self.width, "W"), (size, "F"), False),
        ]
        if times:
            kernels.append(("time", (size, "D"), (times, "-"), False))
        norms = [
            ("noise_norm", False),
            ("hidden_norm", False),
            ("blocks_norm", True),
            ("last_norm", False),
        ]
        made = {}
        for name, (outputs, out), (inputs, into), stacked in kernels:
            lead, letters = ((depth,), "J ") if stacked else ((), "")
            init = _ZEROS if name == "last" else kernel_init
            made[name] = self.weight(name, (*lead, outputs, inputs), f"{letters}{out} {into}", init)
            bias = f"{name}_bias"
            made[bias] = self.weight(bias, (*lead, outputs), f"{letters}{out}", _ZEROS)
        for name, stacked in norms:
            lead, letters = ((depth,), "J D") if stacked else ((), "D")
            for full, init in ((name, _ONES), (f"{name}_bias", _ZEROS)):
                made[full] = self.weight(full, (*lead, size), letters, init)
        return {name: as_float(array) for name, array in made.items()}

    def draws(self, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        """The target as draws [Y, ..., W], at least float32.

        Raises:
          InputError: if it is neither [..., W] nor [Y, ..., W], for hidden [..., D].
        """
        y = as_float(target)
        lead = hidden.shape[:-1]
        if (
            y.ndim not in (hidden.ndim, hidden.ndim + 1)
            or y.shape[-1] != self.width
            or 0 in y.shape
        ):
            raise InputError(
                f"target has shape {list(y.shape)}; for hidden {list(hidden.shape)} it must be"
                f" {[*lead, self.width]}, or that with an axis of draws before"
            )
        y = y if y.ndim > hidden.ndim else y[None]
        try:
            jnp.broadcast_shapes(lead, y.shape[1:-1])
        except ValueError:
            raise InputError(
                f"target has shape {list(y.shape[1:])} a draw; its leading axes must fit those of"
                f" hidden, {list(hidden.shape)}"
            ) from None
        return y


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

    def noise(self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        """Noise [*shape, U], uniform in [-0.5, 0.5)."""
        return jax.random.uniform(key, (*shape, self.noise_width), dtype, -0.5, 0.5)

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """The energy score [...] of hidden [..., D] and target [..., W] or draws [Y, ..., W]."""
        hidden = as_float(hidden)
        targets = self.draws(hidden, target)
        noise = self.noise(key, (self.num_samples, *hidden.shape[:-1]), hidden.dtype)
        return losses.energy_score(self.transform(noise, hidden), targets, beta=self.beta)

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        noise, hidden = _inputs(noise, hidden, self.noise_width)
        weights = self.weights(hidden.shape[-1], self.noise_size)
        return network(weights, noise, conditioned(weights, _embedded(weights, "hidden", hidden)))


class TimedHead(ImplicitHead):
    """A head whose blocks are told a time from 0 to 1 and predict a vector for its noisy one.

    The loss is the mean squared error over the W dimensions, averaged over `num_samples` pairs of
    noise and a time: one in each of so many equal parts of [0, 1], which makes it vary less. The
    draws of the target are taken in turn, so that more than `num_samples` are not read.

    Attributes:
      steps: of which a sample is made.
    """

    steps: int = 16

    def predictions(self, hidden: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """x [..., W], time [...] -> [..., W]: the blocks, for hidden states [..., D]."""
        weights = self.weights(hidden.shape[-1], self.width, 2 * _TIMES)
        embedded = _embedded(weights, "hidden", hidden)

        def predict(x: jax.Array, time: jax.Array) -> jax.Array:
            told = embedded + _embedded(weights, "time", waves(time))
            return network(weights, x, conditioned(weights, told))

        return predict

    def pairs(
        self, hidden: jax.Array, target: ArrayLike, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Targets [Z, ..., W], noise of the same shape, and times [Z, ...]."""
        targets = self.draws(hidden, target)
        count, dtype = self.num_samples, jnp.result_type(hidden, targets)
        targets = targets[jnp.arange(count) % len(targets)].astype(dtype)
        lead = jnp.broadcast_shapes(hidden.shape[:-1], targets.shape[1:-1])
        for_noise, for_times = jax.random.split(key)
        noise = jax.random.normal(for_noise, (count, *lead, self.width), dtype)
        part = jnp.arange(count, dtype=dtype).reshape(-1, *(1,) * len(lead))
        times = (part + jax.random.uniform(for_times, (count, *lead), dtype)) / count
        return targets, noise, times


class FlowHead(TimedHead):
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
    def evaluations(self) -> int:
        return self.steps * (1 if self.solver == "euler" else 2)

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """Mean squared error [...] of the velocity; hidden [..., D], target [(Y,) ..., W]."""
        hidden = as_float(hidden)
        y, noise, times = self.pairs(hidden, target, key)
        time = times[..., None]
        found = self.predictions(hidden)((1 - time) * noise + time * y, times)
        return jnp.mean(jnp.square(found - (y - noise)), axis=(0, -1))

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        noise, hidden = _inputs(noise, hidden, self.noise_width)
        return integrate(self.predictions(hidden), noise, steps=self.steps, solver=self.solver)


class DiffusionHead(TimedHead):
    """Denoising in steps (Ho et al., arXiv:2006.11239), by a network that predicts the noise.

    The part of the target's variance that is left at time t falls along the cosine schedule
    (Nichol and Dhariwal, arXiv:2102.09672), down to `LEAST_SIGNAL`: see `signal`. With ancestral
    steps new noise comes in at each of them, so that U is steps times W, and without (Song et al.,
    arXiv:2010.02502) only at the first.

    Attributes:
      ancestral: whether steps draw from the posterior of the step before, or follow its mean path.
    """

    ancestral: bool = False

    @property
    def noise_width(self) -> int:
        return self.width * (self.steps if self.ancestral else 1)

    @property
    def evaluations(self) -> int:
        return self.steps

    def loss(self, hidden: jax.Array, target: ArrayLike, key: jax.Array) -> jax.Array:
        """Mean squared error [...] of the noise; hidden [..., D], target [(Y,) ..., W]."""
        hidden = as_float(hidden)
        y, noise, times = self.pairs(hidden, target, key)
        left = signal(times)[..., None]
        found = self.predictions(hidden)(jnp.sqrt(left) * y + jnp.sqrt(1 - left) * noise, times)
        return jnp.mean(jnp.square(found - noise), axis=(0, -1))

    def transform(self, noise: ArrayLike, hidden: jax.Array) -> jax.Array:
        noise, hidden = _inputs(noise, hidden, self.noise_width)
        first, later = noise[..., : self.width], None
        if self.ancestral:
            later = jnp.roll(noise, -self.width, axis=-1)  # the last step's is not read
            later = jnp.moveaxis(later.reshape(*first.shape[:-1], self.steps, self.width), -2, 0)
        return denoise(self.predictions(hidden), first, later, steps=self.steps)


IMPLICIT: dict[str, type[ImplicitHead]] = {
    "energy": EnergyHead,
    "flow": FlowHead,
    "diffusion": DiffusionHead,
}


# --- Solvers ---------------------------------------------------------------------------------


# --- The blocks ------------------------------------------------------------------------------


def _inputs(noise: ArrayLike, hidden: ArrayLike, width: int) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype, noise with all the leading axes that samples have."""
    z, h = as_float(noise), as_float(hidden)
    wanted = f"noise has shape {list(z.shape)}; it must be [..., {width}]"
    if z.ndim < 1 or z.shape[-1] != width:
        raise InputError(wanted)
    try:
        lead = jnp.broadcast_shapes(z.shape[:-1], h.shape[:-1])
    except ValueError:
        raise InputError(
            f"{wanted} with leading axes that fit those of hidden, {list(h.shape)}"
        ) from None
    dtype = jnp.result_type(z, h)
    return jnp.broadcast_to(z, (*lead, width)).astype(dtype), h.astype(dtype)
