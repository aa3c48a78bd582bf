"""Heads on one target with two modes, which a single Gaussian cannot fit.

The condition is an angle; the hidden state holds its sines and cosines. With probability 0.7 the
target lies around sqrt(2) times the unit vector at that angle, else around the opposite point, with
deviation 0.15 in each dimension. Over all angles its mean is 0 and its deviation in each dimension
about 1.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from continuous_lm.experiments.common import plots, tables
from continuous_lm.experiments.common.statistics import bootstrap_interval
from continuous_lm.models.calm import implicit_heads
from continuous_lm.models.density import heads
from continuous_lm.models.parameters import Params, initialize

TARGET_WIDTH = 2
MODE_RADIUS = math.sqrt(2.0)
MODE_DEVIATION = 0.15
LIKELIER_MODE_SHARE = 0.7
NUM_HARMONICS = 4  # sines and cosines of so many multiples of the angle
# Deviations from a mode, m, up to which samples are in it; exp(-m^2 / 2) of the data are farther.
MAX_MODE_DEVIATIONS = 3.0
SAMPLES_PER_CALL = 4096  # samples at once where time is taken
NUM_REPEATS = 5
NUM_RESAMPLES = 2000  # of the bootstrap interval

Sampler = Callable[[jax.Array, jax.Array], jax.Array]
ComparedHead = heads.DensityHead | implicit_heads.ImplicitHead


@jax.jit
def hidden_states(angles: jax.Array) -> jax.Array:
    """Hidden states [..., 2 NUM_HARMONICS] of angles [...]."""
    multiples = angles[..., None] * jnp.arange(1, NUM_HARMONICS + 1)
    return jnp.concatenate([jnp.cos(multiples), jnp.sin(multiples)], axis=-1)


def likelier_mode(hidden: jax.Array) -> jax.Array:
    """The likelier mode [..., 2] of a hidden state; the other is opposite."""
    return MODE_RADIUS * hidden[..., ::NUM_HARMONICS]


@jax.jit
def draw_target(key: jax.Array, hidden: jax.Array) -> jax.Array:
    """Targets [..., 2] of hidden states."""
    mode_key, noise_key = jax.random.split(key)
    leading_shape = hidden.shape[:-1]
    sign = jnp.where(
        jax.random.bernoulli(mode_key, LIKELIER_MODE_SHARE, leading_shape), 1.0, -1.0
    )[..., None]
    return sign * likelier_mode(hidden) + MODE_DEVIATION * jax.random.normal(
        noise_key, (*leading_shape, TARGET_WIDTH)
    )


@jax.jit
def draw_best_gaussian(key: jax.Array, hidden: jax.Array) -> jax.Array:
    """Draw [..., 2] of the Gaussian that has the target's mean and covariance, the best there is.

    It maximises the expected log-likelihood among all Gaussians.
    """
    mode_key, noise_key = jax.random.split(key)
    mode = likelier_mode(hidden)
    leading_shape = hidden.shape[:-1]
    along_mode = (
        2.0
        * math.sqrt(LIKELIER_MODE_SHARE * (1.0 - LIKELIER_MODE_SHARE))
        * jax.random.normal(mode_key, (*leading_shape, 1))
    )
    noise = MODE_DEVIATION * jax.random.normal(
        noise_key, (*leading_shape, TARGET_WIDTH)
    )
    return ((2.0 * LIKELIER_MODE_SHARE - 1.0) + along_mode) * mode + noise


def make_heads(
    hidden_size: int, depth: int, num_samples: int
) -> dict[str, ComparedHead]:
    """The heads that are compared, by name."""
    density_settings: dict[str, Any] = {
        "width": TARGET_WIDTH,
        "depth": depth,
        "mlp_size": 8 * hidden_size,
    }
    implicit_settings: dict[str, Any] = {
        "width": TARGET_WIDTH,
        "hidden_size": hidden_size,
        "depth": depth,
    }
    implicit_settings |= {"num_samples": num_samples}
    return {
        "Gaussian": heads.GaussianHead(covariance="full", **density_settings),
        "mixture of 4": heads.MixtureHead(components=4, **density_settings),
        "energy": implicit_heads.EnergyHead(noise_size=16, **implicit_settings),
        "flow, Euler": implicit_heads.FlowHead(solver="euler", **implicit_settings),
        "flow, midpoint": implicit_heads.FlowHead(
            solver="midpoint", **implicit_settings
        ),
        "diffusion": implicit_heads.DiffusionHead(**implicit_settings),
        "diffusion, ancestral": implicit_heads.DiffusionHead(
            ancestral=True, **implicit_settings
        ),
    }


def with_default_sampling(head: ComparedHead) -> ComparedHead:
    """The head with the settings that only sampling reads at their defaults.

    Heads of which these are equal have the same parameters after the same training.
    """
    match head:
        case implicit_heads.FlowHead():
            return dataclasses.replace(head, solver="midpoint", steps=16)
        case implicit_heads.DiffusionHead():
            return dataclasses.replace(head, ancestral=False, steps=16)
    return head


def head_losses(
    head: ComparedHead,
    params: Params,
    hidden: jax.Array,
    target: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The head's losses [...]; the key is for noise, if the head draws any."""
    if isinstance(head, implicit_heads.ImplicitHead):
        return head.loss(params, hidden, target, key)
    return head.loss(params, hidden, target)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("steps", "batch_size"))
def fit_head(
    head: ComparedHead,
    key: jax.Array,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[Any, jax.Array]:
    """Adam on fresh data in each step, its rate going down to 0: parameters and losses [steps]."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    params: Params = initialize(key, head.parameter_table(2 * NUM_HARMONICS))

    def step(carry, key):
        params, optimizer_state = carry
        angle_key, target_key, noise_key = jax.random.split(key, 3)
        hidden = hidden_states(
            jax.random.uniform(angle_key, (batch_size,), maxval=2 * math.pi)
        )
        target = draw_target(target_key, hidden)

        def loss(params):
            return jnp.mean(head_losses(head, params, hidden, target, noise_key))

        mean_loss, gradient = jax.value_and_grad(loss)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), mean_loss

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, losses


def make_sampler(head: ComparedHead, params: Params) -> Sampler:
    """(key, hidden) -> samples, SAMPLES_PER_CALL at a time: compiled once for all shapes."""

    @jax.jit
    def draw_batch(key, hidden):
        return head.sample(params, key, hidden)

    def draw_samples(key, hidden):
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])
        padded = jnp.pad(
            flat_hidden, ((0, -len(flat_hidden) % SAMPLES_PER_CALL), (0, 0))
        )
        hidden_batches = padded.reshape(-1, SAMPLES_PER_CALL, padded.shape[-1])
        keys = jax.random.split(key, len(hidden_batches))
        sample_batches = [
            draw_batch(batch_key, hidden_batch)
            for batch_key, hidden_batch in zip(keys, hidden_batches, strict=True)
        ]
        return jnp.concatenate(sample_batches)[: len(flat_hidden)].reshape(
            *hidden.shape[:-1], TARGET_WIDTH
        )

    return draw_samples


def energy_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, 0 where both are of one distribution.

    Unbiased, so that it can fall below 0.

    Args:
      x: independent draws [num_conditions, Z, W] of each condition.
      y: others, [num_conditions, Z, W].

    Returns:
      [num_conditions].
    """

    def mean_distance(a, b, pairs):
        return (
            np.linalg.norm(a[:, :, None] - b[:, None], axis=-1).sum(axis=(1, 2)) / pairs
        )

    num_samples = x.shape[1]
    num_distinct_pairs = num_samples * (num_samples - 1)
    return (
        2 * mean_distance(x, y, num_samples * num_samples)
        - mean_distance(x, x, num_distinct_pairs)
        - mean_distance(y, y, num_distinct_pairs)
    )


class SampleScores(NamedTuple):
    """Scores of one sampler.

    Attributes:
      distance: energy distance to new data, mean over conditions.
      interval: 95 % interval of the distance over conditions.
      in_modes: share of samples within MAX_MODE_DEVIATIONS of a mode.
      likelier: share of these at the more frequent mode of the data.
      per_second: samples a second in large batches; None for samplers without a head.
    """

    distance: float
    interval: tuple[float, float]
    in_modes: float
    likelier: float
    per_second: float | None = None


def evaluate_samples(
    draw_samples: Sampler, key: jax.Array, *, conditions: int, samples: int
) -> SampleScores:
    """Against fresh data: the same conditions and data for the same key."""
    angle_key, data_key, sample_key = jax.random.split(key, 3)
    hidden = hidden_states(
        jax.random.uniform(angle_key, (conditions, 1), maxval=2 * math.pi)
    )
    hidden = jnp.broadcast_to(hidden, (conditions, samples, hidden.shape[-1]))
    x = np.asarray(draw_samples(sample_key, hidden))
    y = np.asarray(draw_target(data_key, hidden))
    modes = np.asarray(likelier_mode(hidden))
    max_distance = MAX_MODE_DEVIATIONS * MODE_DEVIATION
    is_near_likelier = np.linalg.norm(x - modes, axis=-1) < max_distance
    is_near_other = np.linalg.norm(x + modes, axis=-1) < max_distance
    num_near_both = is_near_likelier.sum() + is_near_other.sum()
    distances = energy_distances(x, y)
    return SampleScores(
        distance=float(distances.mean()),
        interval=bootstrap_interval(distances, seed=0, num_resamples=NUM_RESAMPLES),
        in_modes=float(np.mean(is_near_likelier | is_near_other)),
        likelier=float(is_near_likelier.sum() / max(1, num_near_both)),
    )


def samples_per_second(draw_samples: Sampler, key: jax.Array) -> float:
    """Samples a second, SAMPLES_PER_CALL at once; the median of NUM_REPEATS."""
    hidden = hidden_states(jnp.linspace(0.0, 2 * math.pi, SAMPLES_PER_CALL))
    jax.block_until_ready(draw_samples(key, hidden))
    seconds = []
    for _ in range(NUM_REPEATS):
        start_time = time.perf_counter()
        jax.block_until_ready(draw_samples(key, hidden))
        seconds.append(time.perf_counter() - start_time)
    return SAMPLES_PER_CALL / float(np.median(seconds))


class ComparisonSettings(NamedTuple):
    """Settings of the comparison of heads.

    Attributes:
      seed: seed of data, parameters and samples.
      steps: optimiser steps of each head.
      batch_size: targets in a step.
      learning_rate: peak learning rate.
      conditions: number of angles at which samples are compared.
      samples: number of samples at each angle.
    """

    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    conditions: int
    samples: int


class FittedHead(NamedTuple):
    """Parameters of a head, and the seconds of their training."""

    params: Any
    seconds: float


def compare_heads(
    head_by_name: Mapping[str, ComparedHead], settings: ComparisonSettings
) -> tuple[dict[str, dict[str, Any]], dict[str, Sampler]]:
    """Numbers and samplers by name: fresh data, the best single Gaussian, and the heads, fitted."""
    key, evaluation_key = jax.random.split(jax.random.key(settings.seed))
    evaluate = functools.partial(
        evaluate_samples,
        key=evaluation_key,
        conditions=settings.conditions,
        samples=settings.samples,
    )
    samplers: dict[str, Sampler] = {
        "data": draw_target,
        "best Gaussian": draw_best_gaussian,
    }
    metrics: dict[str, dict[str, Any]] = {
        name: {
            "parameters": None,
            "evaluations": None,
            **evaluate(draw_samples)._asdict(),
        }
        for name, draw_samples in samplers.items()
    }
    fitted_heads: dict[ComparedHead, FittedHead] = {}
    for name, head in head_by_name.items():
        training_head = with_default_sampling(head)
        if training_head not in fitted_heads:
            fitted_heads[training_head] = _fit_with_time(training_head, key, settings)
        fitted_head = fitted_heads[training_head]
        sampler = make_sampler(head, fitted_head.params)
        samplers[name] = sampler
        metrics[name] = {
            "parameters": sum(
                leaf.size for leaf in jax.tree.leaves(fitted_head.params)
            ),
            "evaluations": head.num_evaluations
            if isinstance(head, implicit_heads.ImplicitHead)
            else 1,
            **evaluate(sampler)._asdict(),
            "per_second": samples_per_second(sampler, key),
            "seconds_of_training": fitted_head.seconds,
        }
    return metrics, samplers


def _fit_with_time(
    head: ComparedHead, key: jax.Array, settings: ComparisonSettings
) -> FittedHead:
    """The fitted head, and how long that took, compilation included."""
    start_time = time.perf_counter()
    params, _ = fit_head(
        head,
        key,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
    )
    jax.block_until_ready(params)
    return FittedHead(params, time.perf_counter() - start_time)


def make_table(metrics: Mapping[str, Mapping[str, Any]]) -> tables.Table:
    """The table of `compare_heads`."""
    columns = [
        tables.Column("head"),
        tables.Column("parameters", format=",d"),
        tables.Column("energy distance", format=".4f"),
        tables.Column("95 % from", format=".4f"),
        tables.Column("to", format=".4f"),
        tables.Column("in modes", format=".1%"),
        tables.Column("likelier", format=".1%"),
        tables.Column("evaluations", format="d"),
        tables.Column("samples/s", format=",.0f"),
    ]
    rows = [
        [
            name,
            head_metrics["parameters"],
            head_metrics["distance"],
            *head_metrics["interval"],
            head_metrics["in_modes"],
            head_metrics["likelier"],
            head_metrics["evaluations"],
            head_metrics["per_second"],
        ]
        for name, head_metrics in metrics.items()
    ]
    return tables.Table(
        "compare_heads",
        "Heads on a target of two modes: energy distance to fresh data, its interval over"
        f" conditions, samples within {MAX_MODE_DEVIATIONS:g} deviations of a mode and, of"
        " these, at the likelier"
        f" one ({LIKELIER_MODE_SHARE:.0%} of the data), evaluations of the network a sample",
        columns,
        rows,
    )


def plot_samples(
    samplers: Mapping[str, Sampler],
    metrics: Mapping[str, Mapping[str, Any]],
    key: jax.Array,
) -> Figure:
    """Samples of each way for three angles, in a panel each, with rings around the modes."""
    angles = jnp.array([0.4, 0.4 + math.pi / 3, 0.4 + 2 * math.pi / 3])
    num_samples = 300
    hidden = hidden_states(
        jnp.broadcast_to(angles[:, None], (len(angles), num_samples))
    )
    num_columns = -(-len(samplers) // 2)
    with plt.rc_context(plots.MATPLOTLIB_STYLE):
        figure, axes = plt.subplots(
            2,
            num_columns,
            figsize=(1.75 * num_columns, 4.1),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for ax in axes.flat[len(samplers) :]:
            ax.axis("off")
        for ax, (name, draw_samples) in zip(axes.flat, samplers.items(), strict=False):
            x = np.asarray(draw_samples(key, hidden))
            modes = np.asarray(likelier_mode(hidden[:, 0]))
            for i, color in enumerate(np.array(plots.COLOURS)[[3, 4, 2]]):
                ax.plot(
                    *x[i].T, ".", ms=1.6, mew=0, alpha=0.7, color=color, rasterized=True
                )
                for mode in (modes[i], -modes[i]):
                    ring = Circle(
                        tuple(mode),
                        MAX_MODE_DEVIATIONS * MODE_DEVIATION,
                        fill=False,
                        lw=0.5,
                        color="0.6",
                    )
                    ax.add_patch(ring)
            ax.set(
                xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", xticks=[-2, 0, 2]
            )
            ax.set_yticks([-2, 0, 2])
            ax.set_title(
                f"{name}\n{metrics[name]['in_modes']:.1%} in the modes", fontsize=8
            )
    return figure
