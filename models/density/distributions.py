"""Densities over vectors as trees of arrays: what the density heads return.

Each is a NamedTuple of arrays with any leading axes `...`, and has

    mean                       [..., W]
    log_prob(x)                [...], nats, of vectors x [..., W]
    log_probs(table)           [..., E], nats, of every row of a table [E, W]
    sample(key, temperature)   [..., W]
    shifted(by)                the density moved by a vector [..., W]

`Categorical` has the same face over tokens. At temperature 0 a sample is the likeliest component's
mean (the token of the largest logit). In between, a Gaussian's standard deviations are multiplied
by the root of the temperature, which is p^(1/temperature) normalised; for a mixture, weights and
components are tempered one by one, since its own power has no closed form.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike

from continuous_lm import losses
from continuous_lm.arguments import as_float
from continuous_lm.losses.gaussian import cholesky_of_gram
from continuous_lm.models.samplers import tempered

_EXACT = jax.lax.Precision.HIGHEST  # a square that is expanded cancels


class Categorical(NamedTuple):
    """A distribution over tokens."""

    logits: jax.Array  # [..., V]

    @property
    def probabilities(self) -> jax.Array:
        """[..., V]."""
        return jax.nn.softmax(self.logits, axis=-1)

    def log_prob(self, tokens: ArrayLike) -> jax.Array:
        """Log-probability of int tokens [...], in nats."""
        tokens, size = jnp.asarray(tokens), self.logits.shape[-1]
        shape = jnp.broadcast_shapes(self.logits.shape[:-1], tokens.shape)
        logits = jnp.broadcast_to(self.logits, (*shape, size))
        return -losses.cross_entropy(logits, jnp.broadcast_to(tokens, shape))

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Tokens int32 [...]."""
        drawn = jax.random.categorical(key, tempered(self.logits, temperature))
        likeliest = jnp.argmax(self.logits, axis=-1)  # the first among equals, whatever the key
        return jnp.where(jnp.asarray(temperature) > 0, drawn, likeliest).astype(jnp.int32)


class Gaussian(NamedTuple):
    """A normal density whose dimensions are independent."""

    mean: jax.Array  # [..., W]
    scale: jax.Array  # [..., W], standard deviations

    def log_prob(self, x: ArrayLike) -> jax.Array:
        """Log-density of vectors [..., W], in nats: [...]."""
        return -losses.gaussian_nll(x, self.mean, self.scale)

    def log_probs(self, table: ArrayLike) -> jax.Array:
        """Log-density of every row of a table [E, W], in nats: [..., E]; as two matrix products."""
        rows = as_float(table)
        middle = jnp.mean(rows, axis=0)  # the nearer to 0, the less cancels
        rows, mean = rows - middle, self.mean - middle
        precision = self.scale**-2
        squares = jnp.einsum("...w,ew->...e", precision, rows**2, precision=_EXACT)
        cross = jnp.einsum("...w,ew->...e", precision * mean, rows, precision=_EXACT)
        constant = -losses.gaussian_nll(jnp.zeros_like(mean), mean, self.scale)
        return constant[..., None] + cross - 0.5 * squares

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        return self.mean + _root(temperature, self.mean) * self.scale * _noise(key, self.mean)

    def shifted(self, by: ArrayLike) -> "Gaussian":
        """The density moved by a vector [..., W]."""
        return self._replace(mean=self.mean + by)


class LowRankGaussian(NamedTuple):
    """A normal density of covariance factor factor^T + diag(scale^2)."""

    mean: jax.Array  # [..., W]
    scale: jax.Array  # [..., W]
    factor: jax.Array  # [..., W, R]

    def log_prob(self, x: ArrayLike) -> jax.Array:
        """Log-density of vectors [..., W], in nats: [...]."""
        return -losses.low_rank_gaussian_nll(x, self.mean, self.scale, self.factor)

    def log_probs(self, table: ArrayLike) -> jax.Array:
        """Log-density of every row of a table [E, W], in nats: [..., E]."""
        # |x - m|^2 in the metric of the covariance is that of the diagonal less that of R
        # directions (Woodbury); the determinants differ by that of the R x R capacitance.
        factor = self.factor / self.scale[..., None]
        root = cholesky_of_gram(factor)
        weights = factor / self.scale[..., None]
        rows = as_float(table)
        along = jnp.einsum("...wr,ew->...re", weights, rows, precision=_EXACT)
        along -= jnp.einsum("...wr,...w->...r", weights, self.mean, precision=_EXACT)[..., None]
        along = solve_triangular(root, along, lower=True)
        logdet = jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
        diagonal = Gaussian(self.mean, self.scale).log_probs(rows)
        return diagonal + 0.5 * jnp.sum(along**2, axis=-2) - logdet[..., None]

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        first, second = jax.random.split(key)
        noise = _noise(first, self.factor[..., 0, :])
        spread = jnp.einsum("...wr,...r->...w", self.factor, noise)
        spread = spread + self.scale * _noise(second, self.mean)
        return self.mean + _root(temperature, self.mean) * spread

    def shifted(self, by: ArrayLike) -> "LowRankGaussian":
        """The density moved by a vector [..., W]."""
        return self._replace(mean=self.mean + by)


class FullGaussian(NamedTuple):
    """A normal density of covariance cholesky cholesky^T."""

    mean: jax.Array  # [..., W]
    cholesky: jax.Array  # [..., W, W], lower triangle

    def log_prob(self, x: ArrayLike) -> jax.Array:
        """Log-density of vectors [..., W], in nats: [...]."""
        return -losses.full_gaussian_nll(x, self.mean, self.cholesky)

    def log_probs(self, table: ArrayLike) -> jax.Array:
        """Log-density of every row of a table [E, W], in nats: [..., E]."""
        rows = as_float(table)
        middle = jnp.mean(rows, axis=0)
        rows, mean = rows - middle, self.mean - middle
        eye = jnp.broadcast_to(jnp.eye(mean.shape[-1], dtype=mean.dtype), self.cholesky.shape)
        precision = cho_solve((self.cholesky, True), eye)
        scaled = jnp.einsum("...wu,ew->...eu", precision, rows, precision=_EXACT)
        squares = jnp.einsum("...eu,eu->...e", scaled, rows, precision=_EXACT)
        cross = jnp.einsum("...eu,...u->...e", scaled, mean, precision=_EXACT)
        constant = -losses.full_gaussian_nll(jnp.zeros_like(mean), mean, self.cholesky)
        return constant[..., None] + cross - 0.5 * squares

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        lower = jnp.tril(self.cholesky)
        spread = jnp.einsum("...wu,...u->...w", lower, _noise(key, self.mean))
        return self.mean + _root(temperature, self.mean) * spread

    def shifted(self, by: ArrayLike) -> "FullGaussian":
        """The density moved by a vector [..., W]."""
        return self._replace(mean=self.mean + by)


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
        """Log-density of every row of a table [E, W], in nats: [..., E].

        Component by component, so that memory does not grow with X.
        """
        rows = as_float(table)
        logits = jax.nn.log_softmax(self.logits, axis=-1)
        # A component without weight is not at -inf, where logaddexp has no gradient.
        logits = jnp.maximum(logits, jnp.finfo(logits.dtype).min / 2)

        def add(total, component):
            weight, mean, scale = component
            new = weight[..., None] + Gaussian(mean, scale).log_probs(rows)
            return jnp.logaddexp(total, new), None

        components = (
            jnp.moveaxis(logits, -1, 0),
            jnp.moveaxis(self.means, -2, 0),
            jnp.moveaxis(self.scales, -2, 0),
        )
        shape = (*self.logits.shape[:-1], rows.shape[0])
        total = jnp.full(shape, -jnp.inf, jnp.result_type(*self, rows))
        return jax.lax.scan(add, total, components)[0]

    def sample(self, key: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        """Vectors [..., W]."""
        first, second = jax.random.split(key)
        chosen = Categorical(self.logits).sample(first, temperature)[..., None, None]
        mean = jnp.take_along_axis(self.means, chosen, axis=-2)[..., 0, :]
        scale = jnp.take_along_axis(self.scales, chosen, axis=-2)[..., 0, :]
        return Gaussian(mean, scale).sample(second, temperature)

    def shifted(self, by: ArrayLike) -> "Mixture":
        """The density moved by a vector [..., W]."""
        means = self.means + jnp.asarray(by)[..., None, :]
        logits = jnp.broadcast_to(self.logits, means.shape[:-1])
        return Mixture(logits, means, jnp.broadcast_to(self.scales, means.shape))


Density = Gaussian | LowRankGaussian | FullGaussian | Mixture


def _root(temperature: ArrayLike, like: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.asarray(temperature, like.dtype))[..., None]


def _noise(key: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.normal(key, like.shape, like.dtype)
