"""Heads without a likelihood: from noise and the hidden state to the next vector.

Such a head is a map from noise to a sample. It can be sampled, but it has no probabilities:

    loss(params, hidden, target, key)            [...], least in expectation at the data's law
    sample(params, key, hidden, temperature)     [..., W]
    noise(key, shape)                            [*shape, U]
    transform(params, noise, hidden)             [..., W], the map itself

with hidden [..., D] and target [..., W], and params of `parameter_table(D)`. A target with several
draws (from the posterior of an autoencoder, for example) is [num_targets, ..., W], with one axis
more than hidden. Leading axes of noise and hidden broadcast: noise [Z, ..., U] gives Z samples of
each hidden state.

    energy      one step, trained by the energy score (the generative head of CALM)
    flow        the solution of an ordinary differential equation, trained by flow matching
    diffusion   steps of denoising, trained to predict the noise

Flow and diffusion start from a standard normal density. Targets should have a mean near 0 and a
standard deviation near 1 in each dimension.

`temperature` multiplies the noise. It makes samples more or less alike. It does not give the
tempered density p^(1/temperature) normalised: of two modes of which one is rarer, a low temperature
keeps both, or what lies between them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from continuous_lm import losses
from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError
from continuous_lm.models import settings
from continuous_lm.models.calm.flow_solvers import (
    SOLVERS,
    denoise,
    integrate,
    signal_variance,
)
from continuous_lm.models.calm.noise_network import (
    NUM_TIME_FREQUENCIES,
    NetworkParams,
    NetworkSizes,
    condition,
    parameter_table,
    run_noise_network,
    time_features,
)
from continuous_lm.models.head import Head, linear
from continuous_lm.models.parameters import ParameterTable, Params

__all__ = [
    "IMPLICIT_HEADS",
    "DiffusionHead",
    "EnergyHead",
    "FlowHead",
    "ImplicitHead",
    "NoisedTargets",
    "Predictor",
    "TimeConditionedHead",
]

MAX_DEPTH, MAX_STEPS = 64, settings.MAX_SIZE
Predictor = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class ImplicitHead(Head):
    """Base class of the heads without a likelihood: the network of `noise_network`.

    Attributes:
      hidden_size: width D of the blocks; the hidden state's width if omitted.
      depth: number of blocks, J.
      num_samples: number of noise draws a loss takes for each hidden state, Z.
    """

    hidden_size: int | None = dataclasses.field(
        default=None,
        metadata=settings.integer(1, settings.MAX_SIZE, is_optional=True),
    )
    depth: int = dataclasses.field(default=4, metadata=settings.integer(0, MAX_DEPTH))
    num_samples: int = dataclasses.field(
        default=8, metadata=settings.integer(1, settings.MAX_SIZE)
    )

    @property
    def noise_width(self) -> int:
        """U."""
        return self.width

    @property
    def num_evaluations(self) -> int:
        """Number of passes through the blocks for one sample."""
        return 1

    def network_sizes(self, hidden_width: int) -> NetworkSizes:
        """The sizes of the network, for hidden states [..., hidden_width]."""
        return NetworkSizes(
            block_width=self.hidden_size or hidden_width,
            depth=self.depth,
            input_width=self.noise_width,
            hidden_width=hidden_width,
            output_width=self.width,
        )

    def parameter_table(self, hidden_width: int) -> ParameterTable:
        return parameter_table(self.network_sizes(hidden_width))

    def loss(
        self, params: Params, hidden: jax.Array, target: ArrayLike, key: jax.Array
    ) -> jax.Array:
        """Return the loss [...] of hidden [..., D] and target [(num_targets,) ..., W]."""
        raise NotImplementedError

    def transform(
        self, params: Params, noise: ArrayLike, hidden: ArrayLike
    ) -> jax.Array:
        """Samples [..., W] from noise [..., U] and hidden [..., D]: a deterministic map."""
        raise NotImplementedError

    def noise(
        self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """Noise [*shape, U] that `transform` turns into samples; of a standard normal density."""
        return jax.random.normal(key, (*shape, self.noise_width), dtype)

    def sample(
        self,
        params: Params,
        key: jax.Array,
        hidden: jax.Array,
        temperature: ArrayLike = 1.0,
    ) -> jax.Array:
        """Samples [..., W] from the noise of `key`, times `temperature`: see the module."""
        hidden = as_float(hidden)
        noise = self.noise(key, hidden.shape[:-1], hidden.dtype)
        scaled_noise = jnp.asarray(temperature, noise.dtype) * noise
        return self.transform(params, scaled_noise, hidden)

    def log_prob(
        self, params: Params, hidden: jax.Array, target: ArrayLike
    ) -> jax.Array:
        """Refused: there is no density."""
        raise InputError(
            "this head can only be sampled: it has no density and so no log_prob; use its loss, or"
            " scores that take samples (losses.energy_score, losses.brier_n)"
        )

    def mean(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Refused: there is no closed form."""
        raise InputError(
            "this head can only be sampled: its mean has no closed form; take the mean of samples"
        )

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
                f" it must be {[*batch_shape, self.width]}, or that with an axis of draws before"
            )
        if target_draws.ndim == hidden.ndim:
            target_draws = target_draws[None]
        try:
            jnp.broadcast_shapes(batch_shape, target_draws.shape[1:-1])
        except ValueError:
            raise InputError(
                f"target has shape {list(target_draws.shape[1:])} a draw; its leading axes must"
                f" fit those of hidden, {list(hidden.shape)}"
            ) from None
        return target_draws


@dataclasses.dataclass(frozen=True)
class EnergyHead(ImplicitHead):
    """One pass from uniform noise, trained by the energy score (Shao et al., arXiv:2510.27688).

    The noise is uniform in [-0.5, 0.5). The loss is the energy score of `num_samples` samples, of
    which there must be 2, against all draws of the target: see `losses.energy_score`.

    Attributes:
      noise_size: U.
      beta: exponent of the distances in the score, above 0 and below 2.
    """

    kind: ClassVar[str] = "energy"
    noise_size: int = dataclasses.field(
        default=64, metadata=settings.integer(1, settings.MAX_SIZE)
    )
    beta: float = dataclasses.field(
        default=1.0,
        metadata=settings.number(
            above=0.0, below=2.0, reason="where the score is strictly proper"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 2:
            raise InputError(
                f"num_samples is {self.num_samples}; an energy score needs at least 2 samples"
            )

    @property
    def noise_width(self) -> int:
        """U."""
        return self.noise_size

    def noise(
        self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """Noise [*shape, U], uniform in [-0.5, 0.5)."""
        return jax.random.uniform(key, (*shape, self.noise_width), dtype, -0.5, 0.5)

    def loss(
        self, params: Params, hidden: jax.Array, target: ArrayLike, key: jax.Array
    ) -> jax.Array:
        """The energy score [...] of hidden [..., D] and target [(num_targets,) ..., W]."""
        hidden = as_float(hidden)
        targets = self.as_target_draws(hidden, target)
        noise = self.noise(key, (self.num_samples, *hidden.shape[:-1]), hidden.dtype)
        samples = self.transform(params, noise, hidden)
        return losses.energy_score(samples, targets, beta=self.beta)

    def transform(
        self, params: Params, noise: ArrayLike, hidden: ArrayLike
    ) -> jax.Array:
        noise, hidden = _broadcast_inputs(noise, hidden, self.noise_width)
        network_params = _as_floats(params)
        embedding = linear(network_params, "hidden", hidden)
        return run_noise_network(
            network_params, noise, condition(network_params, embedding)
        )


class NoisedTargets(NamedTuple):
    """Targets, and noise and times that go with them, Z for each hidden state."""

    targets: jax.Array  # [Z, ..., W]
    noise: jax.Array  # [Z, ..., W]
    times: jax.Array  # [Z, ...]


@dataclasses.dataclass(frozen=True)
class TimeConditionedHead(ImplicitHead):
    """A head whose blocks are given a time from 0 to 1 and predict a vector for its noisy one.

    The loss is the mean squared error over the W dimensions, averaged over `num_samples` pairs of
    noise and a time: one in each of so many equal parts of [0, 1], which makes it vary less. The
    draws of the target are taken in turn, so that more than `num_samples` are not read.

    Attributes:
      steps: number of steps of one sample.
    """

    steps: int = dataclasses.field(default=16, metadata=settings.integer(1, MAX_STEPS))

    def network_sizes(self, hidden_width: int) -> NetworkSizes:
        sizes = super().network_sizes(hidden_width)
        return sizes._replace(
            input_width=self.width, time_width=2 * NUM_TIME_FREQUENCIES
        )

    def make_predictor(self, params: Params, hidden: jax.Array) -> Predictor:
        """x [..., W], time [...] -> [..., W]: the blocks, for hidden states [..., D]."""
        network_params = _as_floats(params)
        hidden_embedding = linear(network_params, "hidden", hidden)

        def predict(x: jax.Array, time: jax.Array) -> jax.Array:
            time_embedding = linear(network_params, "time", time_features(time))
            conditions = condition(network_params, hidden_embedding + time_embedding)
            return run_noise_network(network_params, x, conditions)

        return predict

    def noised_targets(
        self, hidden: jax.Array, target: ArrayLike, key: jax.Array
    ) -> NoisedTargets:
        """Targets in turn, normal noise, and a time in each of Z equal parts of [0, 1]."""
        targets = self.as_target_draws(hidden, target)
        num_samples = self.num_samples
        dtype = jnp.result_type(hidden, targets)
        targets = targets[jnp.arange(num_samples) % len(targets)].astype(dtype)
        batch_shape = jnp.broadcast_shapes(hidden.shape[:-1], targets.shape[1:-1])
        noise_key, time_key = jax.random.split(key)
        noise_shape = (num_samples, *batch_shape, self.width)
        noise = jax.random.normal(noise_key, noise_shape, dtype)
        part_shape = (num_samples, *(1 for _ in batch_shape))
        part_index = jnp.arange(num_samples, dtype=dtype).reshape(part_shape)
        offset = jax.random.uniform(time_key, (num_samples, *batch_shape), dtype)
        return NoisedTargets(targets, noise, (part_index + offset) / num_samples)


@dataclasses.dataclass(frozen=True)
class FlowHead(TimeConditionedHead):
    """A velocity field that carries normal noise to the target along straight lines.

    Conditional flow matching (Lipman et al., arXiv:2210.02747), on straight paths without noise at
    their ends. The path from z at time 0 to the target y at time 1 is (1 - t) z + t y, and the
    blocks predict its velocity y - z. A sample is the solution of dx/dt = velocity(x, t) from
    noise.

    Attributes:
      solver: "euler", of first order, or "midpoint", of second order with two evaluations a step.
    """

    kind: ClassVar[str] = "flow"
    solver: str = dataclasses.field(
        default="midpoint", metadata=settings.choice(SOLVERS)
    )

    @property
    def num_evaluations(self) -> int:
        """Number of passes through the blocks for one sample."""
        return self.steps * (1 if self.solver == "euler" else 2)

    def loss(
        self, params: Params, hidden: jax.Array, target: ArrayLike, key: jax.Array
    ) -> jax.Array:
        """Squared error [...] of the velocity; hidden [..., D], target [(num_targets,) ..., W]."""
        hidden = as_float(hidden)
        targets, noise, times = self.noised_targets(hidden, target, key)
        time = times[..., None]
        x = (1 - time) * noise + time * targets
        velocity = self.make_predictor(params, hidden)(x, times)
        return jnp.mean(jnp.square(velocity - (targets - noise)), axis=(0, -1))

    def transform(
        self, params: Params, noise: ArrayLike, hidden: ArrayLike
    ) -> jax.Array:
        noise, hidden = _broadcast_inputs(noise, hidden, self.noise_width)
        velocity = self.make_predictor(params, hidden)
        return integrate(velocity, noise, steps=self.steps, solver=self.solver)


@dataclasses.dataclass(frozen=True)
class DiffusionHead(TimeConditionedHead):
    """Denoising in steps (Ho et al., arXiv:2006.11239), by a network that predicts the noise.

    The part of the target's variance that is left at time t falls along the cosine schedule
    (Nichol and Dhariwal, arXiv:2102.09672), down to `MIN_SIGNAL_VARIANCE`: see `signal_variance`.
    With ancestral steps new noise comes in at each of them, so that U is steps times W, and without
    (Song et al., arXiv:2010.02502) only at the first.

    Attributes:
      ancestral: whether steps draw from the posterior of the step before, or follow its mean path.
    """

    kind: ClassVar[str] = "diffusion"
    ancestral: bool = dataclasses.field(default=False, metadata=settings.boolean())

    @property
    def noise_width(self) -> int:
        """U."""
        return self.width * self.steps if self.ancestral else self.width

    @property
    def num_evaluations(self) -> int:
        """Number of passes through the blocks for one sample."""
        return self.steps

    def loss(
        self, params: Params, hidden: jax.Array, target: ArrayLike, key: jax.Array
    ) -> jax.Array:
        """Squared error [...] of the noise; hidden [..., D], target [(num_targets,) ..., W]."""
        hidden = as_float(hidden)
        targets, noise, times = self.noised_targets(hidden, target, key)
        variance = signal_variance(times)[..., None]
        x = jnp.sqrt(variance) * targets + jnp.sqrt(1 - variance) * noise
        predicted_noise = self.make_predictor(params, hidden)(x, times)
        return jnp.mean(jnp.square(predicted_noise - noise), axis=(0, -1))

    def transform(
        self, params: Params, noise: ArrayLike, hidden: ArrayLike
    ) -> jax.Array:
        noise, hidden = _broadcast_inputs(noise, hidden, self.noise_width)
        predict_noise = self.make_predictor(params, hidden)
        initial_noise = noise[..., : self.width]
        step_noise = self._split_into_steps(noise) if self.ancestral else None
        return denoise(predict_noise, initial_noise, step_noise, steps=self.steps)

    def _split_into_steps(self, noise: jax.Array) -> jax.Array:
        """Split noise [..., steps * W] into the noise of each step, [steps, ..., W].

        The first W are the initial noise; they stand in for the last step's, which is not read.
        """
        later_noise = jnp.roll(noise, -self.width, axis=-1)
        by_step = later_noise.reshape(*noise.shape[:-1], self.steps, self.width)
        return jnp.moveaxis(by_step, -2, 0)


IMPLICIT_HEADS: Mapping[str, type[ImplicitHead]] = {
    head_class.kind: head_class for head_class in (EnergyHead, FlowHead, DiffusionHead)
}


def _as_floats(params: Params) -> NetworkParams:
    """The parameters of a head, at least float32."""
    return {name: as_float(array) for name, array in params.items()}


def _broadcast_inputs(
    noise: ArrayLike, hidden: ArrayLike, width: int
) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype, noise with all the leading axes that samples have."""
    noise = as_float(noise)
    hidden = as_float(hidden)
    message = f"noise has shape {list(noise.shape)}; it must be [..., {width}]"
    if noise.ndim < 1 or noise.shape[-1] != width:
        raise InputError(message)
    try:
        batch_shape = jnp.broadcast_shapes(noise.shape[:-1], hidden.shape[:-1])
    except ValueError:
        raise InputError(
            f"{message} with leading axes that fit those of hidden, {list(hidden.shape)}"
        ) from None
    dtype = jnp.result_type(noise, hidden)
    noise = jnp.broadcast_to(noise, (*batch_shape, width))
    return noise.astype(dtype), hidden.astype(dtype)
