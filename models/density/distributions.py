"""Densities over vectors as trees of arrays, the results of density heads.

Each is a NamedTuple of arrays with any leading axes `...`, and has

    mean                       [..., W]
    log_prob(x)                [...], nats, of vectors x [..., W]
    log_probs(table)           [..., V], nats, of every row of a table [V, W]
    sample(key, temperature)   [..., W]
    shifted(by)                the density moved by a vector [..., W]

`Categorical` has the same methods over tokens. At temperature 0 a sample is the likeliest
component's mean (the token of the largest logit). At other temperatures a Gaussian's standard
deviations are multiplied by the root of the temperature, which gives p^(1/temperature), normalised.
The power of a mixture has no closed form, so its weights and its components are tempered
separately.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike

from continuous_lm import losses
from continuous_lm.arguments import as_float
from continuous_lm.losses.gaussian import cholesky_of_gram
from continuous_lm.models.samplers import sample_token

__all__ = [
    "Categorical",
    "Density",
    "FullGaussian",
    "Gaussian",
    "LowRankGaussian",
    "Mixture",
]

_HIGHEST_PRECISION = jax.lax.Precision.HIGHEST  # a square that is expanded cancels


class Categorical(NamedTuple):
    """A distribution over tokens."""

    logits: jax.Array  # [..., V]

    @property
    def probabilities(self) -> jax.Array:
        """[..., V]."""
        return jax.nn.softmax(self.logits, axis=-1)

    def log_prob(self, tokens: ArrayLike) -> jax.Array:
        """Log-probability of int tokens [...], in nats."""
        tokens, vocab_size = jnp.asarray(tokens), self.logits.shape[-1]
        shape = jnp.broadcast_shapes(self.logits.shape[:-1], tokens.shape)
        logits = jnp.broadcast_to(self.logits, (*shape, vocab_size))
        return -losses.cross_entropy(logits, jnp.broadcast_to(tokens, shape))

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Tokens int32 [...]."""
        drawn_tokens = sample_token(key, self.logits, temperature=temperature)
        # The first among equals, whatever the key.
        greedy_tokens = jnp.argmax(self.logits, axis=-1).astype(jnp.int32)
        is_random = jnp.asarray(temperature) > 0
        return jnp.where(is_random, drawn_tokens, greedy_tokens)


class Gaussian(NamedTuple):
    """A normal density whose dimensions are independent."""

    mean: jax.Array  # [..., W]
    scale: jax.Array  # [..., W], standard deviations

    def log_prob(self, x: ArrayLike) -> jax.Array:
        """Log-density of vectors [..., W], in nats: [...]."""
        return -losses.gaussian_nll(x, self.mean, self.scale)

    def log_probs(self, table: ArrayLike) -> jax.Array:
        """Log-density of every row of a table [V, W], in nats: [..., V]; as two matrix products."""
        rows = as_float(table)
        center = jnp.mean(rows, axis=0)  # the nearer to 0, the less cancels
        rows, mean = rows - center, self.mean - center
        precision = self.scale**-2
        squared_terms = jnp.einsum(
            "...w,vw->...v", precision, rows**2, precision=_HIGHEST_PRECISION
        )
        cross_terms = jnp.einsum(
            "...w,vw->...v", precision * mean, rows, precision=_HIGHEST_PRECISION
        )
        log_prob_at_center = -losses.gaussian_nll(
            jnp.zeros_like(mean), mean, self.scale
        )
        return log_prob_at_center[..., None] + cross_terms - 0.5 * squared_terms

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        return self.mean + _sqrt_temperature(
            temperature, self.mean
        ) * self.scale * _standard_normal(key, self.mean)

    def shifted(self, offset: ArrayLike) -> "Gaussian":
        """The density moved by a vector [..., W]."""
        return self._replace(mean=self.mean + offset)


class LowRankGaussian(NamedTuple):
    """A normal density of covariance factor factor^T + diag(scale^2)."""

    mean: jax.Array  # [..., W]
    scale: jax.Array  # [..., W]
    factor: jax.Array  # [..., W, R]

    def log_prob(self, x: ArrayLike) -> jax.Array:
        """Log-density of vectors [..., W], in nats: [...]."""
        return -losses.low_rank_gaussian_nll(x, self.mean, self.scale, self.factor)

    def log_probs(self, table: ArrayLike) -> jax.Array:
        """Log-density of every row of a table [V, W], in nats: [..., V]."""
        # |x - m|^2 in the metric of the covariance is that of the diagonal less that of R
        # directions (Woodbury); the determinants differ by that of the R x R capacitance.
        scaled_factor = self.factor / self.scale[..., None]
        capacitance_cholesky = cholesky_of_gram(scaled_factor)
        projection = scaled_factor / self.scale[..., None]
        rows = as_float(table)
        coordinates = jnp.einsum(
            "...wr,vw->...rv", projection, rows, precision=_HIGHEST_PRECISION
        )
        coordinates -= jnp.einsum(
            "...wr,...w->...r", projection, self.mean, precision=_HIGHEST_PRECISION
        )[..., None]
        coordinates = solve_triangular(capacitance_cholesky, coordinates, lower=True)
        log_determinant = jnp.sum(
            jnp.log(jnp.diagonal(capacitance_cholesky, axis1=-2, axis2=-1)), axis=-1
        )
        diagonal_log_probs = Gaussian(self.mean, self.scale).log_probs(rows)
        return (
            diagonal_log_probs
            + 0.5 * jnp.sum(coordinates**2, axis=-2)
            - log_determinant[..., None]
        )

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        factor_key, diagonal_key = jax.random.split(key)
        factor_noise = _standard_normal(factor_key, self.factor[..., 0, :])
        deviation = jnp.einsum("...wr,...r->...w", self.factor, factor_noise)
        deviation = deviation + self.scale * _standard_normal(diagonal_key, self.mean)
        return self.mean + _sqrt_temperature(temperature, self.mean) * deviation

    def shifted(self, offset: ArrayLike) -> "LowRankGaussian":
        """The density moved by a vector [..., W]."""
        return self._replace(mean=self.mean + offset)


class FullGaussian(NamedTuple):
    """A normal density of covariance cholesky cholesky^T."""

    mean: jax.Array  # [..., W]
    cholesky: jax.Array  # [..., W, W], lower triangle

    def log_prob(self, x: ArrayLike) -> jax.Array:
        """Log-density of vectors [..., W], in nats: [...]."""
        return -losses.full_gaussian_nll(x, self.mean, self.cholesky)

    def log_probs(self, table: ArrayLike) -> jax.Array:
        """Log-density of every row of a table [V, W], in nats: [..., V]."""
        rows = as_float(table)
        center = jnp.mean(rows, axis=0)
        rows, mean = rows - center, self.mean - center
        identity = jnp.broadcast_to(
            jnp.eye(mean.shape[-1], dtype=mean.dtype), self.cholesky.shape
        )
        precision = cho_solve((self.cholesky, True), identity)
        rows_times_precision = jnp.einsum(
            "...wW,vw->...vW", precision, rows, precision=_HIGHEST_PRECISION
        )
        squared_terms = jnp.einsum(
            "...vW,vW->...v", rows_times_precision, rows, precision=_HIGHEST_PRECISION
        )
        cross_terms = jnp.einsum(
            "...vW,...W->...v", rows_times_precision, mean, precision=_HIGHEST_PRECISION
        )
        log_prob_at_center = -losses.full_gaussian_nll(
            jnp.zeros_like(mean), mean, self.cholesky
        )
        return log_prob_at_center[..., None] + cross_terms - 0.5 * squared_terms

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        lower_triangle = jnp.tril(self.cholesky)
        deviation = jnp.einsum(
            "...wW,...W->...w", lower_triangle, _standard_normal(key, self.mean)
        )
        return self.mean + _sqrt_temperature(temperature, self.mean) * deviation

    def shifted(self, offset: ArrayLike) -> "FullGaussian":
        """The density moved by a vector [..., W]."""
        return self._replace(mean=self.mean + offset)


class Mixture(NamedTuple):
    """A weighted sum of X normal densities whose dimensions are independent."""

    logits: jax.Array  # [..., X] of the weights
    means: jax.Array  # [..., X, W]
    scales: jax.Array  # [..., X, W]

    @property
    def weights(self) -> jax.Array:
        """[..., X]; they sum to 1."""
        return jax.nn.softmax(self.logits, axis=-1)

    @property
    def mean(self) -> jax.Array:
        """[..., W]."""
        return jnp.einsum("...x,...xw->...w", self.weights, self.means)

    def log_prob(self, x: ArrayLike) -> jax.Array:
        """Log-density of vectors [..., W], in nats: [...]."""
        return -losses.gaussian_mixture_nll(x, self.logits, self.means, self.scales)

    def log_probs(self, table: ArrayLike) -> jax.Array:
        """Log-density of every row of a table [V, W], in nats: [..., V].

        Component by component, so that memory does not grow with X.
        """
        rows = as_float(table)
        log_weights = jax.nn.log_softmax(self.logits, axis=-1)
        # A component without weight is not at -inf, where logaddexp has no gradient.
        log_weights = jnp.maximum(log_weights, jnp.finfo(log_weights.dtype).min / 2)

        def add_component(total, component):
            log_weight, mean, scale = component
            component_log_probs = log_weight[..., None] + Gaussian(
                mean, scale
            ).log_probs(rows)
            return jnp.logaddexp(total, component_log_probs), None

        components = (
            jnp.moveaxis(log_weights, -1, 0),
            jnp.moveaxis(self.means, -2, 0),
            jnp.moveaxis(self.scales, -2, 0),
        )
        result_shape = (*self.logits.shape[:-1], rows.shape[0])
        log_sum = jnp.full(result_shape, -jnp.inf, jnp.result_type(*self, rows))
        return jax.lax.scan(add_component, log_sum, components)[0]

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        component_key, vector_key = jax.random.split(key)
        component_index = Categorical(self.logits).sample(component_key, temperature)[
            ..., None, None
        ]
        mean = jnp.take_along_axis(self.means, component_index, axis=-2)[..., 0, :]
        scale = jnp.take_along_axis(self.scales, component_index, axis=-2)[..., 0, :]
        return Gaussian(mean, scale).sample(vector_key, temperature)

    def shifted(self, offset: ArrayLike) -> "Mixture":
        """The density moved by a vector [..., W]."""
        means = self.means + jnp.asarray(offset)[..., None, :]
        logits = jnp.broadcast_to(self.logits, means.shape[:-1])
        return Mixture(logits, means, jnp.broadcast_to(self.scales, means.shape))


Density = Gaussian | LowRankGaussian | FullGaussian | Mixture


def _sqrt_temperature(temperature: ArrayLike, like: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.asarray(temperature, like.dtype))[..., None]


def _standard_normal(key: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.normal(key, like.shape, like.dtype)
