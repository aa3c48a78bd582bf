"""Heads: from the trunk's hidden state to what comes next, as a distribution.

A head's `__call__` gives the distribution (see `densities`), and four methods stand on it. Heads
that have none, and can only be sampled, are in `implicit`.

    loss(hidden, target)                [...], nats, lower is better
    log_prob(hidden, target)            [...], nats
    mean(hidden)                        [..., W]
    sample(key, hidden, temperature)    [..., W]

with hidden [..., D] and target [..., W], or int tokens [...] for the token head.
`head.apply({"params": params}, hidden, target, method="loss")` is a pure function.

Standard deviations are `min_scale + softplus(.)`. Without that bound the likelihood of vectors that
lie on a line, or on a few points, has no maximum: training would make the density ever narrower
there. With it no density exceeds (sqrt(2 pi) min_scale)^-W. The unit is the target's own; targets
with standard deviation 1 in each dimension give the bound its meaning.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import as_float
from continuous_lm.errors import InputError
from continuous_lm.models.density.distributions import (
    Categorical,
    FullGaussian,
    Gaussian,
    LowRankGaussian,
    Mixture,
)
from continuous_lm.models.transformer import rms_norm

COVARIANCES = ("diagonal", "low_rank", "full")
_SMALL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros
_ONES = nn.initializers.ones
_EPS = 1e-6


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Kernels whose outputs vary as their inputs, the last axis, do."""
    cut = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / 0.8796  # of deviation 1
    return cut * shape[-1] ** -0.5


class Head(nn.Module):
    """What all heads share: attributes that are checked, and parameters.

    Attributes:
      width: W of the vectors that are predicted, or V, how many tokens there are.
      param_dtype: of the parameters.
    """

    width: int
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        for name, value in self.settings().items():
            default = type(self).__dataclass_fields__[name].default
            if isinstance(default, bool):
                if not isinstance(value, bool):
                    raise InputError(f"{name} is {value!r:.60}; it must be true or false")
                continue
            if isinstance(default, float) and type(value) not in (int, float):
                raise InputError(f"{name} is {value!r:.60}; it must be a number")
            if isinstance(default, float | str) or (value is None and default is None):
                continue
            least, most = (0, 64) if name == "depth" else (1, 2**24)
            if type(value) is not int or not least <= value <= most:
                raise InputError(
                    f"{name} is {value!r:.60}; it must be an integer from {least} to {most}"
                )

    def settings(self) -> dict[str, Any]:
        """The attributes that make the head what it is, by name."""
        names = self.__dataclass_fields__
        return {n: getattr(self, n) for n in names if n not in ("parent", "name", "param_dtype")}

    def weight(self, name: str, shape: tuple[int, ...], axes: str, init: Any) -> jax.Array:
        """A parameter, sharded by the letters of its axes."""
        boxed = nn.with_logical_partitioning(init, axes_lib.split(axes))
        return cast(jax.Array, self.param(name, boxed, shape, self.param_dtype))

    def linear(
        self,
        name: str,
        x: jax.Array,
        axis: str,
        shape: tuple[int, ...],
        axes: str,
        *,
        init: Any = kernel_init,
        bias: Any = _ZEROS,
    ) -> jax.Array:
        """x [..., axis] through a kernel [*shape, axis] and a bias [*shape]: [..., *shape]."""
        kernel = self.weight(name, (*shape, x.shape[-1]), f"{axes} {axis}", init)
        offset = self.weight(f"{name}_bias", shape, axes, bias)
        return jnp.tensordot(x, kernel, axes=(-1, -1)) + offset


class DistributionHead(Head):
    """A head whose `__call__` gives a distribution.

    Attributes:
      depth: residual MLP blocks between the hidden state and the output. A head on a trunk that is
        not trained with it needs one or two.
      mlp_size: F of these blocks; four times the hidden state's width if left out.
    """

    depth: int = 0
    mlp_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        min_scale = getattr(self, "min_scale", None)
        if min_scale is not None and not 0.0 < min_scale < 1.0:
            raise InputError(
                f"min_scale is {min_scale!r}; it must be above 0 and below 1, where training begins"
            )
        covariance = getattr(self, "covariance", "diagonal")
        if covariance not in COVARIANCES:
            raise InputError(
                f"covariance is {covariance!r}; it must be one of {', '.join(COVARIANCES)}"
            )

    def loss(self, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        return -self.log_prob(hidden, target)

    def log_prob(self, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        return cast(jax.Array, self(hidden).log_prob(target))

    def mean(self, hidden: jax.Array) -> jax.Array:
        return cast(jax.Array, self(hidden).mean)

    def sample(self, key: jax.Array, hidden: jax.Array, temperature: ArrayLike = 1.0) -> jax.Array:
        return cast(jax.Array, self(hidden).sample(key, temperature))

    def features(self, x: jax.Array) -> jax.Array:
        """The hidden state [..., D] after the head's own MLP blocks, gated and pre-normed."""
        width, inner = x.shape[-1], self.mlp_size or 4 * x.shape[-1]
        for i in range(self.depth):  # one or two, and not of a trunk's size: not worth a scan
            normed = rms_norm(x, self.weight(f"norm_{i}", (width,), "D", _ONES), _EPS)
            gate = jax.nn.silu(self.linear(f"gate_{i}", normed, "D", (inner,), "F"))
            y = gate * self.linear(f"up_{i}", normed, "D", (inner,), "F")
            x = x + self.linear(f"down_{i}", y, "F", (width,), "D", init=_ZEROS)
        return x

    def scale_of(self, raw: jax.Array) -> jax.Array:
        """Standard deviations from any reals; 1 at 0, never below `min_scale`."""
        bound: float = self.min_scale  # type: ignore[attr-defined]
        return bound + jax.nn.softplus(as_float(raw) + math.log(math.expm1(1.0 - bound)))


class TokenHead(DistributionHead):
    """Softmax over tokens: the baseline. `width` is V.

    Attributes:
      tied: whether the kernel is the trunk's embedding table, which `DensityModel` hands to the
        head as `table` [V, D], and not one of its own.
    """

    tied: bool = False

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array | None = None) -> Categorical:
        if self.tied != (table is not None):
            raise InputError("a token head needs a table if it is tied, and only then")
        hidden = self.features(hidden)
        if table is None:
            logits = self.linear("logits", hidden, "D", (self.width,), "V", init=_SMALL)
        else:
            logits = jnp.einsum("...d,vd->...v", hidden, table)
        return Categorical(as_float(logits))

    def mean(self, hidden: jax.Array) -> jax.Array:
        raise InputError("tokens have no mean")


class GaussianHead(DistributionHead):
    """One normal density.

    Attributes:
      covariance: "diagonal", "low_rank" (plus diagonal) or "full" (by its Cholesky factor).
      rank: R of the low-rank part.
      min_scale: the least standard deviation, or entry of the Cholesky factor's diagonal.
    """

    covariance: str = "diagonal"
    rank: int = 8
    min_scale: float = 0.05

    @nn.compact
    def __call__(self, hidden: jax.Array) -> Gaussian | LowRankGaussian | FullGaussian:
        hidden, size = self.features(hidden), self.width
        mean = as_float(self.linear("mean", hidden, "D", (size,), "W"))
        scale = self.scale_of(self.linear("scale", hidden, "D", (size,), "W", init=_ZEROS))
        match self.covariance:
            case "low_rank":
                factor = self.linear("factor", hidden, "D", (size, self.rank), "W R", init=_SMALL)
                return LowRankGaussian(mean, scale, as_float(factor))
            case "full":
                below = self.linear(
                    "below", hidden, "D", (size * (size - 1) // 2,), "-", init=_ZEROS
                )
                rows, columns = jnp.tril_indices(size, -1)
                lower = jnp.zeros((*mean.shape, size), mean.dtype)
                lower = lower.at[..., rows, columns].set(as_float(below))
                return FullGaussian(
                    mean, lower + scale[..., None] * jnp.eye(size, dtype=scale.dtype)
                )
        return Gaussian(mean, scale)


class MixtureHead(DistributionHead):
    """A mixture of normal densities with diagonal covariance.

    Attributes:
      components: X.
      min_scale: the least standard deviation.
    """

    components: int = 8
    min_scale: float = 0.05

    @nn.compact
    def __call__(self, hidden: jax.Array) -> Mixture:
        hidden, shape = self.features(hidden), (self.components, self.width)
        logits = self.linear("logits", hidden, "D", shape[:1], "X", init=_ZEROS)
        # Different from the start, or all components would learn the same.
        apart = nn.initializers.normal(0.5)
        means = self.linear("mean", hidden, "D", shape, "X W", bias=apart)
        scales = self.scale_of(self.linear("scale", hidden, "D", shape, "X W", init=_ZEROS))
        return Mixture(as_float(logits), as_float(means), scales)


class ExpertsHead(DistributionHead):
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
      expert_size: F of each expert's MLP; the hidden state's width if left out.
      min_scale: the least standard deviation.
      balance: weight of the balancing term, against the nats of one of the W dimensions.
    """

    experts: int = 8
    top_k: int = 2
    expert_size: int | None = None
    min_scale: float = 0.05
    balance: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if self.top_k > self.experts:
            raise InputError(f"top_k is {self.top_k}, but there are {self.experts} experts")
        if not 0.0 <= self.balance < math.inf:
            raise InputError(f"balance is {self.balance!r}; it must be at least 0, and finite")

    def loss(self, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        routes, chosen, density = self.routed(hidden)
        probabilities = jax.nn.softmax(routes, axis=-1).reshape(-1, self.experts)
        used = jax.nn.one_hot(chosen, self.experts, dtype=routes.dtype)
        share = jnp.mean(used.reshape(-1, self.experts), axis=0)
        balance = self.experts * jnp.sum(share * jnp.mean(probabilities, axis=0))
        return -density.log_prob(target) + self.balance * self.width * balance

    def __call__(self, hidden: jax.Array) -> Mixture:
        return self.routed(hidden)[-1]

    @nn.compact
    def routed(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array, Mixture]:
        """The router's logits [..., X], the experts chosen int [..., top_k], and their mixture."""
        hidden, inner = self.features(hidden), self.expert_size or hidden.shape[-1]
        routes = as_float(self.linear("router", hidden, "D", (self.experts,), "X", init=_SMALL))
        logits, chosen = jax.lax.top_k(routes, self.top_k)
        # All experts, of whom the chosen ones' answers are kept: at these sizes one product over
        # all is faster than many gathered ones.
        y = jax.nn.gelu(self.linear("inner", hidden, "D", (self.experts, inner), "X F"))

        def answers(name, init, bias):
            kernel = self.weight(name, (self.experts, self.width, inner), "X W F", init)
            offset = self.weight(f"{name}_bias", (self.experts, self.width), "X W", bias)
            every = jnp.einsum("...xf,xwf->...xw", y, kernel) + offset
            return as_float(jnp.take_along_axis(every, chosen[..., None], axis=-2))

        means = answers("mean", kernel_init, nn.initializers.normal(0.5))
        scales = self.scale_of(answers("scale", _ZEROS, _ZEROS))
        return routes, chosen, Mixture(logits, means, scales)


HEADS: dict[str, type[DistributionHead]] = {
    "token": TokenHead,
    "gaussian": GaussianHead,
    "mixture": MixtureHead,
    "experts": ExpertsHead,
}


def to_dict(head: Head, *, kinds: Mapping[str, type[Head]] = HEADS) -> dict[str, Any]:
    """What `from_dict` makes the head from, with the same `kinds`."""
    kind = next(name for name, cls in kinds.items() if type(head) is cls)
    return {"kind": kind, **head.settings()}


def from_dict(settings: dict[str, Any], *, kinds: Mapping[str, type[Head]] = HEADS) -> Head:
    """A head from its kind and its settings.

    Args:
      settings: "kind", "width" and whatever else is not as by default.
      kinds: the heads that there are, by name.

    Raises:
      InputError: for a kind that is not known, or a setting that it does not have.
    """
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"kind of head is {kind!r:.60}; it must be one of {', '.join(kinds)}")
    known = kinds[kind](width=1).settings()
    if "width" not in settings:
        raise InputError(f"a {kind} head needs its width")
    for name, value in settings.items():
        if name not in known:
            raise InputError(
                f"a {kind} head has no setting {name!r:.60}; it has {', '.join(known)}"
            )
        wanted = known[name]
        types: tuple[type, ...] = (int, type(None)) if wanted is None else (type(wanted),)
        types = (int, float) if types == (float,) else types
        if not isinstance(value, types) or (isinstance(value, bool) and types != (bool,)):
            names = " or ".join(k.__name__ for k in types)
            raise InputError(
                f"setting {name} of a {kind} head is {value!r:.60}; it must be {names}"
            )
    return kinds[kind](**settings)
