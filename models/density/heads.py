"""Heads of density models: from the trunk's hidden state to a distribution of the next item.

A head is a frozen dataclass without parameters (see `models.head`). `params` is the tree that its
`parameter_table` declares. `distribution` returns one of `distributions`; four functions use it:

    distribution(params, hidden)
    loss(params, hidden, target)                [...], nats, lower is better
    log_prob(params, hidden, target)            [...], nats
    mean(params, hidden)                        [..., W]
    sample(params, key, hidden, temperature)    [..., W]

with hidden [..., D] and target [..., W], or int tokens [...] for the token head. Heads that have no
distribution, and can only be sampled, are in `calm.implicit_heads`.

Standard deviations are `min_scale + softplus(.)`. Without that bound the likelihood of vectors on a
line, or on a few points, has no maximum: training would make the density ever narrower there. With
it no density exceeds (sqrt(2 pi) min_scale)^-W. `min_scale` is in units of the target; it is meant
for targets with standard deviation 1 in each dimension.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError
from continuous_lm.models import head as head_lib
from continuous_lm.models.density.distributions import (
    Categorical,
    Density,
    FullGaussian,
    Gaussian,
    LowRankGaussian,
    Mixture,
)
from continuous_lm.models.head import Head, declare_linear, linear
from continuous_lm.models.layers import rms_norm
from continuous_lm.models.parameters import (
    ONES,
    SMALL_NORMAL,
    ZEROS,
    Declaration,
    Initializer,
    ParameterTable,
    Params,
    declare,
)
from continuous_lm.models.settings import MAX_SIZE, boolean, choice, integer, number

__all__ = [
    "COVARIANCES",
    "DISTRIBUTION_HEADS",
    "DensityHead",
    "DistributionHead",
    "ExpertsHead",
    "GaussianHead",
    "MixtureHead",
    "Route",
    "TokenHead",
    "from_dict",
]

COVARIANCES = ("diagonal", "low_rank", "full")
_SPREAD: Initializer = nn.initializers.normal(0.5)  # or all components learn the same
_NORM_EPS = 1e-6
_OPTIONAL_SIZE = integer(1, MAX_SIZE, is_optional=True)


@dataclasses.dataclass(frozen=True)
class DistributionHead(Head):
    """A head with a distribution.

    Attributes:
      depth: residual MLP blocks between the hidden state and the output. A head on a trunk that is
        not trained with it needs one or two.
      mlp_size: F of these blocks; four times the hidden state's width if omitted.
    """

    depth: int = field(default=0, metadata=integer(0, 64))
    mlp_size: int | None = field(default=None, metadata=_OPTIONAL_SIZE)

    def distribution(self, params: Params, hidden: jax.Array) -> Density | Categorical:
        """Return the distribution of the next item, with the leading axes of hidden [..., D]."""
        raise NotImplementedError

    def loss(self, params: Params, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        """Return the training loss: the negative log-likelihood, [...] in nats."""
        return -self.log_prob(params, hidden, target)

    def log_prob(
        self, params: Params, hidden: jax.Array, target: ArrayLike
    ) -> jax.Array:
        """Log-density of vectors [..., W], or log-probability of tokens [...], in nats: [...]."""
        return self.distribution(params, hidden).log_prob(target)

    def sample(
        self,
        params: Params,
        key: jax.Array,
        hidden: jax.Array,
        temperature: ArrayLike = 1.0,
    ) -> jax.Array:
        """Vectors [..., W], or tokens int32 [...]."""
        return self.distribution(params, hidden).sample(key, temperature)

    def _declare_blocks(self, hidden_width: int) -> dict[str, Declaration]:
        """The parameters of `_run_blocks`."""
        sizes = {"D": hidden_width, "F": self.mlp_size or 4 * hidden_width}
        table: dict[str, Declaration] = {}
        for i in range(self.depth):
            table[f"norm_{i}"] = declare(sizes, "D", ONES)
            table |= declare_linear(f"gate_{i}", sizes, "F", "D")
            table |= declare_linear(f"up_{i}", sizes, "F", "D")
            table |= declare_linear(f"down_{i}", sizes, "D", "F", kernel=ZEROS)
        return table

    def _run_blocks(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The hidden state [..., D] after the head's own MLP blocks, gated and pre-normed."""
        for i in range(self.depth):  # one or two, not of a trunk's size: no scan
            normalized = rms_norm(hidden, params[f"norm_{i}"], _NORM_EPS)
            gate = jax.nn.silu(linear(params, f"gate_{i}", normalized))
            gated = gate * linear(params, f"up_{i}", normalized)
            hidden = hidden + linear(params, f"down_{i}", gated)
        return hidden


@dataclasses.dataclass(frozen=True)
class TokenHead(DistributionHead):
    """Softmax over tokens: the baseline. `width` is V.

    Attributes:
      tied: whether the kernel is the trunk's embedding table, which `distribution` is given, and
        not one of its own.
    """

    kind: ClassVar[str] = "token"
    tied: bool = field(default=False, metadata=boolean())

    @property
    def is_tied_without_blocks(self) -> bool:
        """Return whether the head is only a product with the embedding table."""
        return self.tied and not self.depth

    def parameter_table(self, hidden_width: int) -> ParameterTable:
        blocks = self._declare_blocks(hidden_width)
        if self.tied:
            return blocks
        sizes = {"V": self.width, "D": hidden_width}
        return blocks | declare_linear("logits", sizes, "V", "D", kernel=SMALL_NORMAL)

    def distribution(
        self, params: Params, hidden: jax.Array, table: jax.Array | None = None
    ) -> Categorical:
        """Over tokens, for hidden states [..., D]; a tied head needs the table [V, D]."""
        if self.tied != (table is not None):
            raise InputError("a token head needs a table if it is tied, and only then")
        hidden = self._run_blocks(params, hidden)
        if table is None:
            return Categorical(as_float(linear(params, "logits", hidden)))
        return Categorical(as_float(jnp.einsum("...d,vd->...v", hidden, table)))

    def mean(self, params: Params, hidden: jax.Array) -> NoReturn:
        """Refused.

        Raises:
          InputError: always.
        """
        raise InputError("tokens have no mean")


@dataclasses.dataclass(frozen=True)
class DensityHead(DistributionHead):
    """A head whose distribution is a density over vectors.

    Attributes:
      min_scale: the least standard deviation.
    """

    min_scale: float = field(
        default=0.05,
        metadata=number(above=0.0, below=1.0, reason="where training begins"),
    )

    def distribution(self, params: Params, hidden: jax.Array) -> Density:
        """The density of the next vector, with the leading axes of hidden [..., D]."""
        raise NotImplementedError

    def mean(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The density's mean, [..., W]."""
        return self.distribution(params, hidden).mean

    def _bounded_scale(self, raw: jax.Array) -> jax.Array:
        """Standard deviations from any reals; 1 at 0, never below `min_scale`."""
        offset = math.log(math.expm1(1.0 - self.min_scale))
        return self.min_scale + jax.nn.softplus(as_float(raw) + offset)


@dataclasses.dataclass(frozen=True)
class GaussianHead(DensityHead):
    """One normal density; `min_scale` bounds the Cholesky factor's diagonal where it is full.

    Attributes:
      covariance: "diagonal", "low_rank" (plus diagonal) or "full" (by its Cholesky factor).
      rank: R of the low-rank part.
    """

    kind: ClassVar[str] = "gaussian"
    covariance: str = field(default="diagonal", metadata=choice(COVARIANCES))
    rank: int = field(default=8, metadata=integer(1, MAX_SIZE))

    def parameter_table(self, hidden_width: int) -> ParameterTable:
        sizes = {"D": hidden_width, "W": self.width, "R": self.rank}
        table = self._declare_blocks(hidden_width)
        table |= declare_linear("mean", sizes, "W", "D")
        table |= declare_linear("scale", sizes, "W", "D", kernel=ZEROS)
        if self.covariance == "low_rank":
            table |= declare_linear("factor", sizes, "W R", "D", kernel=SMALL_NORMAL)
        if self.covariance == "full":
            sizes["-"] = self.width * (self.width - 1) // 2  # entries below a diagonal
            table |= declare_linear("below", sizes, "-", "D", kernel=ZEROS)
        return table

    def distribution(
        self, params: Params, hidden: jax.Array
    ) -> Gaussian | LowRankGaussian | FullGaussian:
        """The density of the next vector, with the leading axes of hidden [..., D]."""
        hidden = self._run_blocks(params, hidden)
        mean = as_float(linear(params, "mean", hidden))
        scale = self._bounded_scale(linear(params, "scale", hidden))
        if self.covariance == "low_rank":
            return LowRankGaussian(
                mean, scale, as_float(linear(params, "factor", hidden))
            )
        if self.covariance == "full":
            below = as_float(linear(params, "below", hidden))
            return FullGaussian(mean, _cholesky(scale, below))
        return Gaussian(mean, scale)


def _cholesky(diagonal: jax.Array, below: jax.Array) -> jax.Array:
    """Lower triangles [..., W, W] of their diagonals [..., W] and the entries below them."""
    width = diagonal.shape[-1]
    rows, columns = jnp.tril_indices(width, -1)
    triangle = jnp.zeros((*diagonal.shape, width), diagonal.dtype)
    triangle = triangle.at[..., rows, columns].set(below)
    return triangle + diagonal[..., None] * jnp.eye(width, dtype=diagonal.dtype)


@dataclasses.dataclass(frozen=True)
class MixtureHead(DensityHead):
    """A mixture of normal densities with diagonal covariance.

    Attributes:
      components: X.
    """

    kind: ClassVar[str] = "mixture"
    components: int = field(default=8, metadata=integer(1, MAX_SIZE))

    def parameter_table(self, hidden_width: int) -> ParameterTable:
        sizes = {"D": hidden_width, "W": self.width, "X": self.components}
        return {
            **self._declare_blocks(hidden_width),
            **declare_linear("logits", sizes, "X", "D", kernel=ZEROS),
            **declare_linear("mean", sizes, "X W", "D", bias=_SPREAD),
            **declare_linear("scale", sizes, "X W", "D", kernel=ZEROS),
        }

    def distribution(self, params: Params, hidden: jax.Array) -> Mixture:
        """The density of the next vector, with the leading axes of hidden [..., D]."""
        hidden = self._run_blocks(params, hidden)
        logits = as_float(linear(params, "logits", hidden))
        means = as_float(linear(params, "mean", hidden))
        return Mixture(
            logits, means, self._bounded_scale(linear(params, "scale", hidden))
        )


class Route(NamedTuple):
    """Selected experts of `ExpertsHead` and their outputs."""

    router_logits: jax.Array  # [..., X]
    expert_indices: jax.Array  # int [..., top_k], the experts chosen
    mixture: Mixture  # of the chosen experts


@dataclasses.dataclass(frozen=True)
class ExpertsHead(DensityHead):
    """A mixture of normal experts, of which a router picks a few for each hidden state.

    Each expert is an MLP of its own (Shazeer et al., arXiv:1701.06538): the mixture's weights are
    the softmax of the router's `top_k` largest logits. The loss holds, besides the likelihood,
    `balance` W times X sum_x share_x p_x, which is least where all are used alike (Fedus et al.,
    arXiv:2101.03961, eq. 4): share_x of the states that are sent to expert x, over all leading
    axes, and p_x its mean probability.

    Attributes:
      experts: X.
      top_k: how many of them make the mixture. With one alone the router learns from `balance`
        only, as the weight is 1 whatever its logit is.
      expert_size: F of each expert's MLP; the hidden state's width if omitted.
      balance: weight of the balancing term, against the nats of one of the W dimensions.
    """

    kind: ClassVar[str] = "experts"
    experts: int = field(default=8, metadata=integer(1, MAX_SIZE))
    top_k: int = field(default=2, metadata=integer(1, MAX_SIZE))
    expert_size: int | None = field(default=None, metadata=_OPTIONAL_SIZE)
    balance: float = field(default=0.01, metadata=number(minimum=0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.experts:
            raise InputError(
                f"top_k is {self.top_k}, but there are {self.experts} experts"
            )

    def parameter_table(self, hidden_width: int) -> ParameterTable:
        expert_size = self.expert_size or hidden_width
        sizes = {"D": hidden_width, "W": self.width, "X": self.experts}
        sizes["F"] = expert_size
        return {
            **self._declare_blocks(hidden_width),
            **declare_linear("router", sizes, "X", "D", kernel=SMALL_NORMAL),
            **declare_linear("inner", sizes, "X F", "D"),
            **declare_linear("mean", sizes, "X W", "F", bias=_SPREAD),
            **declare_linear("scale", sizes, "X W", "F", kernel=ZEROS),
        }

    def loss(self, params: Params, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        """The negative log-likelihood and the balancing term, [...] in nats."""
        router_logits, expert_indices, mixture = self.route(params, hidden)
        probabilities = jax.nn.softmax(router_logits, axis=-1).reshape(-1, self.experts)
        is_selected = jax.nn.one_hot(
            expert_indices, self.experts, dtype=router_logits.dtype
        )
        expert_shares = jnp.mean(is_selected.reshape(-1, self.experts), axis=0)
        balance_loss = self.experts * jnp.sum(
            expert_shares * jnp.mean(probabilities, axis=0)
        )
        return -mixture.log_prob(target) + self.balance * self.width * balance_loss

    def distribution(self, params: Params, hidden: jax.Array) -> Mixture:
        """The density of the next vector, with the leading axes of hidden [..., D]."""
        return self.route(params, hidden).mixture

    def route(self, params: Params, hidden: jax.Array) -> Route:
        """The experts of each hidden state [..., D], and their mixture."""
        hidden = self._run_blocks(params, hidden)
        router_logits = as_float(linear(params, "router", hidden))
        selected_logits, expert_indices = jax.lax.top_k(router_logits, self.top_k)
        # Compute all experts, then gather the selected ones: one dense product is faster than many
        # gathers at these sizes.
        activations = jax.nn.gelu(linear(params, "inner", hidden))

        def expert_outputs(name: str) -> jax.Array:  # [..., top_k, W]
            products = jnp.einsum("...xf,xwf->...xw", activations, params[name])
            all_outputs = products + params[f"{name}_bias"]
            indices = expert_indices[..., None]
            return as_float(jnp.take_along_axis(all_outputs, indices, axis=-2))

        means = expert_outputs("mean")
        scales = self._bounded_scale(expert_outputs("scale"))
        return Route(
            router_logits, expert_indices, Mixture(selected_logits, means, scales)
        )


DISTRIBUTION_HEADS: Mapping[str, type[DistributionHead]] = {
    head_class.kind: head_class
    for head_class in (TokenHead, GaussianHead, MixtureHead, ExpertsHead)
}


def from_dict(fields: Mapping[str, object]) -> DistributionHead:
    """A head with a distribution from its "kind", its "width" and other settings.

    Raises:
      InputError: for a kind that is not known, and a setting that it does not have or take.
    """
    return head_lib.from_dict(fields, DISTRIBUTION_HEADS)
