"""Heads on one target with two modes, which a single Gaussian cannot say.

The condition is an angle; the hidden state holds its sines and cosines. With probability 0.7 the
target lies around sqrt(2) times the unit vector at that angle, else around the opposite point, with
deviation 0.15 in each dimension. Over all angles its mean is 0 and its deviation in each dimension
about 1.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from continuous_lm.experiments.audio import audio_models
from continuous_lm.experiments.common import plots, tables
from continuous_lm.models.calm import implicit_heads
from continuous_lm.models.density import heads

WIDTH, RADIUS, SPREAD, SHARE = 2, math.sqrt(2.0), 0.15, 0.7
HARMONICS = 4  # sines and cosines of so many multiples of the angle
NEAR = 3.0  # deviations from a mode; exp(-NEAR^2 / 2) of the data lie farther away
BATCH = 4096  # samples at once where time is taken
REPEATS = 5

Sampler = Callable[[jax.Array, jax.Array], jax.Array]


@jax.jit
def hidden_of(angles: jax.Array) -> jax.Array:
    """Hidden states [..., 2 HARMONICS] of angles [...]."""
    multiples = angles[..., None] * jnp.arange(1, HARMONICS + 1)
    return jnp.concatenate([jnp.cos(multiples), jnp.sin(multiples)], axis=-1)


def mode_of(hidden: jax.Array) -> jax.Array:
    """The likelier mode [..., 2] of a hidden state; the other is opposite."""
    return RADIUS * hidden[..., ::HARMONICS]


@jax.jit
def draw(key: jax.Array, hidden: jax.Array) -> jax.Array:
    """Targets [..., 2] of hidden states."""
    which, around = jax.random.split(key)
    lead = hidden.shape[:-1]
    sign = jnp.where(jax.random.bernoulli(which, SHARE, lead), 1.0, -1.0)[..., None]
    return sign * mode_of(hidden) + SPREAD * jax.random.normal(around, (*lead, WIDTH))


@jax.jit
def draw_gaussian(key: jax.Array, hidden: jax.Array) -> jax.Array:
    """Draws [..., 2] of the Gaussian that has the target's mean and covariance, the best there is.

    It maximises the expected log-likelihood among all Gaussians.
    """
    along, around = jax.random.split(key)
    mode = mode_of(hidden)
    lead = hidden.shape[:-1]
    between = 2.0 * math.sqrt(SHARE * (1.0 - SHARE)) * jax.random.normal(along, (*lead, 1))
    noise = SPREAD * jax.random.normal(around, (*lead, WIDTH))
    return ((2.0 * SHARE - 1.0) + between) * mode + noise


def candidates(hidden_size: int, depth: int, num_samples: int) -> dict[str, heads.Head]:
    """The heads that are compared, by name."""
    plain: dict[str, Any] = {"width": WIDTH, "depth": depth, "mlp_size": 8 * hidden_size}
    shared: dict[str, Any] = {"width": WIDTH, "hidden_size": hidden_size, "depth": depth}
    shared |= {"num_samples": num_samples}
    return {
        "Gaussian": heads.GaussianHead(covariance="full", **plain),
        "mixture of 4": heads.MixtureHead(components=4, **plain),
        "energy": implicit_heads.EnergyHead(noise_size=16, **shared),
        "flow, Euler": implicit_heads.FlowHead(solver="euler", **shared),
        "flow, midpoint": implicit_heads.FlowHead(solver="midpoint", **shared),
        "diffusion": implicit_heads.DiffusionHead(**shared),
        "diffusion, ancestral": implicit_heads.DiffusionHead(ancestral=True, **shared),
    }


def training_of(head: heads.Head) -> heads.Head:
    """The head with the settings that only sampling reads at their defaults.

    Heads of which these are equal have the same parameters after the same training.
    """
    match head:
        case implicit_heads.FlowHead():
            return head.clone(solver="midpoint", steps=16)
        case implicit_heads.DiffusionHead():
            return head.clone(ancestral=False, steps=16)
    return head


@functools.partial(jax.jit, static_argnums=0, static_argnames=("steps", "batch_size"))
def fit(
    head: heads.Head, key: jax.Array, *, steps: int, batch_size: int, learning_rate: float
) -> tuple[Any, jax.Array]:
    """Adam on fresh data in each step, its rate going down to 0: parameters and losses [steps]."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    params = nn.unbox(head.init(key, hidden_of(jnp.zeros(1)))["params"])

    def step(carry, key):
        params, state = carry
        angles, targets, noise = jax.random.split(key, 3)
        hidden = hidden_of(jax.random.uniform(angles, (batch_size,), maxval=2 * math.pi))
        target = draw(targets, hidden)
        extra = (noise,) if isinstance(head, implicit_heads.ImplicitHead) else ()

        def loss(params):
            values = head.apply({"params": params}, hidden, target, *extra, method="loss")
            return jnp.mean(cast(jax.Array, values))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, values


def sampler(head: heads.Head, params: Any) -> Sampler:
    """(key, hidden) -> samples; BATCH at a time, so that it is compiled once for all shapes."""

    @jax.jit
    def batch(key, hidden):
        return head.apply({"params": params}, key, hidden, method="sample")

    def draws(key, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        padded = jnp.pad(flat, ((0, -len(flat) % BATCH), (0, 0)))
        parts = padded.reshape(-1, BATCH, padded.shape[-1])
        keys = jax.random.split(key, len(parts))
        drawn = [batch(k, part) for k, part in zip(keys, parts, strict=True)]
        return jnp.concatenate(drawn)[: len(flat)].reshape(*hidden.shape[:-1], WIDTH)

    return draws


def energy_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, 0 where both are of one distribution.

    Unbiased, so that it can fall below 0.

    Args:
      x: independent draws [N, Z, W] for each of N conditions.
      y: others, [N, Z, W].

    Returns:
      [N].
    """

    def mean(a, b, pairs):
        return np.linalg.norm(a[:, :, None] - b[:, None], axis=-1).sum(axis=(1, 2)) / pairs

    z = x.shape[1]
    within = z * (z - 1)
    return 2 * mean(x, y, z * z) - mean(x, x, within) - mean(y, y, within)


class Judged(NamedTuple):
    """Of one way to draw.

    Attributes:
      distance: energy distance to fresh data, the mean over conditions.
      interval: 95 % of it, over conditions.
      in_modes: share of samples within NEAR deviations of a mode.
      likelier: share of these at the mode that the data prefers.
      per_second: samples, many at once; None for what is no head.
    """

    distance: float
    interval: list[float]
    in_modes: float
    likelier: float
    per_second: float | None = None


def judge(draws: Sampler, key: jax.Array, *, conditions: int, samples: int) -> Judged:
    """Against fresh data: the same conditions and data for the same key."""
    angles, data, own = jax.random.split(key, 3)
    hidden = hidden_of(jax.random.uniform(angles, (conditions, 1), maxval=2 * math.pi))
    hidden = jnp.broadcast_to(hidden, (conditions, samples, hidden.shape[-1]))
    x, y = np.asarray(draws(own, hidden)), np.asarray(draw(data, hidden))
    mode = np.asarray(mode_of(hidden))
    near = [np.linalg.norm(x - m, axis=-1) < NEAR * SPREAD for m in (mode, -mode)]
    found = energy_distances(x, y)
    return Judged(
        distance=float(found.mean()),
        interval=audio_models.interval(found),
        in_modes=float(np.mean(near[0] | near[1])),
        likelier=float(near[0].sum() / max(1, near[0].sum() + near[1].sum())),
    )


def speed(draws: Sampler, key: jax.Array) -> float:
    """Samples a second, BATCH at once; the median of REPEATS."""
    hidden = hidden_of(jnp.linspace(0.0, 2 * math.pi, BATCH))
    jax.block_until_ready(draws(key, hidden))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(draws(key, hidden))
        seconds.append(time.perf_counter() - began)
    return BATCH / float(np.median(seconds))


def compare(
    chosen: Mapping[str, heads.Head],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    conditions: int,
    samples: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, Sampler]]:
    """Numbers and samplers by name: fresh data, the best single Gaussian, and the heads, fitted."""
    key, judging = jax.random.split(jax.random.key(seed))
    judged = functools.partial(judge, key=judging, conditions=conditions, samples=samples)
    draws: dict[str, Sampler] = {"data": draw, "best Gaussian": draw_gaussian}
    numbers = {
        name: {"parameters": None, "evaluations": None, **judged(way)._asdict()}
        for name, way in draws.items()
    }
    fitted: dict[heads.Head, tuple[Any, float]] = {}
    for name, head in chosen.items():
        trained = training_of(head)
        if trained not in fitted:
            began = time.perf_counter()
            params, _ = jax.block_until_ready(
                fit(trained, key, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
            )
            fitted[trained] = params, time.perf_counter() - began
        params, seconds = fitted[trained]
        draws[name] = sampler(head, params)
        numbers[name] = {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "evaluations": head.evaluations if isinstance(head, implicit_heads.ImplicitHead) else 1,
            **judged(draws[name])._asdict(),
            "per_second": speed(draws[name], key),
            "seconds_of_training": seconds,
        }
    return numbers, draws


def table_of(numbers: Mapping[str, Mapping[str, Any]]) -> tables.Table:
    """The table of `compare`."""
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
            found["parameters"],
            found["distance"],
            *found["interval"],
            found["in_modes"],
            found["likelier"],
            found["evaluations"],
            found["per_second"],
        ]
        for name, found in numbers.items()
    ]
    return tables.Table(
        "compare_heads",
        "Heads on a target of two modes: energy distance to fresh data, its interval over"
        f" conditions, samples within {NEAR:g} deviations of a mode and, of these, at the likelier"
        f" one ({SHARE:.0%} of the data), evaluations of the network a sample",
        columns,
        rows,
    )


def panels(
    draws: Mapping[str, Sampler], numbers: Mapping[str, Mapping[str, Any]], key: jax.Array
) -> Figure:
    """Samples of each way for three angles, in a panel each, with rings around the modes."""
    angles = jnp.array([0.4, 0.4 + math.pi / 3, 0.4 + 2 * math.pi / 3])
    count = 300
    hidden = hidden_of(jnp.broadcast_to(angles[:, None], (len(angles), count)))
    columns = -(-len(draws) // 2)
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(
            2,
            columns,
            figsize=(1.75 * columns, 4.1),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for ax in axes.flat[len(draws) :]:
            ax.axis("off")
        for ax, (name, way) in zip(axes.flat, draws.items(), strict=False):
            x = np.asarray(way(key, hidden))
            modes = np.asarray(mode_of(hidden[:, 0]))
            for i, colour in enumerate(np.array(plots.COLOURS)[[3, 4, 2]]):
                ax.plot(*x[i].T, ".", ms=1.6, mew=0, alpha=0.7, color=colour, rasterized=True)
                for mode in (modes[i], -modes[i]):
                    ring = Circle(tuple(mode), NEAR * SPREAD, fill=False, lw=0.5, color="0.6")
                    ax.add_patch(ring)
            ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", xticks=[-2, 0, 2])
            ax.set_yticks([-2, 0, 2])
            ax.set_title(f"{name}\n{numbers[name]['in_modes']:.1%} in the modes", fontsize=8)
    return figure
