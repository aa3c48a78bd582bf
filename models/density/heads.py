"""Heads: from the trunk's hidden state to what comes next, as a distribution.

A head's `__call__` gives the distribution (see `distributions`), and four methods stand on it.
Heads that have none, and can only be sampled, are in `calm.implicit_heads`.

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
from continuous_lm.models.layers import rms_norm

COVARIANCES = ("diagonal", "low_rank", "full")
_SMALL_INIT = nn.initializers.normal(0.02)
_ZEROS_INIT = nn.initializers.zeros
_ONES_INIT = nn.initializers.ones
_NORM_EPS = 1e-6


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Kernels whose outputs vary as their inputs, the last axis, do."""
    truncated = (
        jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) / 0.8796
    )  # of deviation 1
    return truncated * shape[-1] ** -0.5


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
                    raise InputError(
                        f"{name} is {value!r:.60}; it must be true or false"
                    )
                continue
            if isinstance(default, float) and type(value) not in (int, float):
                raise InputError(f"{name} is {value!r:.60}; it must be a number")
            if isinstance(default, float | str) or (value is None and default is None):
                continue
            minimum, maximum = (0, 64) if name == "depth" else (1, 2**24)
            if type(value) is not int or not minimum <= value <= maximum:
                raise InputError(
                    f"{name} is {value!r:.60}; it must be an integer from {minimum} to {maximum}"
                )

    def settings(self) -> dict[str, Any]:
        """The attributes that make the head what it is, by name."""
        names = self.__dataclass_fields__
        return {
            name: getattr(self, name)
            for name in names
            if name not in ("parent", "name", "param_dtype")
        }

    def parameter(
        self, name: str, shape: tuple[int, ...], axes: str, initializer: Any
    ) -> jax.Array:
        """A parameter, sharded by the letters of its axes."""
        partitioned_init = nn.with_logical_partitioning(
            initializer, axes_lib.split(axes)
        )
        return cast(
            jax.Array, self.param(name, partitioned_init, shape, self.param_dtype)
        )

    def linear(
        self,
        name: str,
        x: jax.Array,
        input_axis: str,
        output_shape: tuple[int, ...],
        output_axes: str,
        *,
        kernel_initializer: Any = kernel_init,
        bias_initializer: Any = _ZEROS_INIT,
    ) -> jax.Array:
        """x [..., axis] through a kernel [*shape, axis] and a bias [*shape]: [..., *shape]."""
        kernel = self.parameter(
            name,
            (*output_shape, x.shape[-1]),
            f"{output_axes} {input_axis}",
            kernel_initializer,
        )
        bias_values = self.parameter(
            f"{name}_bias", output_shape, output_axes, bias_initializer
        )
        return jnp.tensordot(x, kernel, axes=(-1, -1)) + bias_values


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

    def sample(
        self, key: jax.Array, hidden: jax.Array, temperature: ArrayLike = 1.0
    ) -> jax.Array:
        return cast(jax.Array, self(hidden).sample(key, temperature))

    def features(self, x: jax.Array) -> jax.Array:
        """The hidden state [..., D] after the head's own MLP blocks, gated and pre-normed."""
        width, inner_size = x.shape[-1], self.mlp_size or 4 * x.shape[-1]
        for i in range(
            self.depth
        ):  # one or two, and not of a trunk's size: not worth a scan
            normalized = rms_norm(
                x, self.parameter(f"norm_{i}", (width,), "D", _ONES_INIT), _NORM_EPS
            )
            gate = jax.nn.silu(
                self.linear(f"gate_{i}", normalized, "D", (inner_size,), "F")
            )
            gated = gate * self.linear(f"up_{i}", normalized, "D", (inner_size,), "F")
            x = x + self.linear(
                f"down_{i}", gated, "F", (width,), "D", kernel_initializer=_ZEROS_INIT
            )
        return x

    def bounded_scale(self, raw: jax.Array) -> jax.Array:
        """Standard deviations from any reals; 1 at 0, never below `min_scale`."""
        min_scale: float = self.min_scale  # type: ignore[attr-defined]
        return min_scale + jax.nn.softplus(
            as_float(raw) + math.log(math.expm1(1.0 - min_scale))
        )


class TokenHead(DistributionHead):
    """Softmax over tokens: the baseline. `width` is V.

    Attributes:
      tied: whether the kernel is the trunk's embedding table, which `DensityModel` hands to the
        head as `table` [V, D], and not one of its own.
    """

    tied: bool = False

    @nn.compact
    def __call__(
        self, hidden: jax.Array, table: jax.Array | None = None
    ) -> Categorical:
        if self.tied != (table is not None):
            raise InputError("a token head needs a table if it is tied, and only then")
        hidden = self.features(hidden)
        if table is None:
            logits = self.linear(
                "logits",
                hidden,
                "D",
                (self.width,),
                "V",
                kernel_initializer=_SMALL_INIT,
            )
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
        hidden, width = self.features(hidden), self.width
        mean = as_float(self.linear("mean", hidden, "D", (width,), "W"))
        scale = self.bounded_scale(
            self.linear(
                "scale", hidden, "D", (width,), "W", kernel_initializer=_ZEROS_INIT
            )
        )
        match self.covariance:
            case "low_rank":
                factor = self.linear(
                    "factor",
                    hidden,
                    "D",
                    (width, self.rank),
                    "W R",
                    kernel_initializer=_SMALL_INIT,
                )
                return LowRankGaussian(mean, scale, as_float(factor))
            case "full":
                lower_entries = self.linear(
                    "below",
                    hidden,
                    "D",
                    (width * (width - 1) // 2,),
                    "-",
                    kernel_initializer=_ZEROS_INIT,
                )
                rows, columns = jnp.tril_indices(width, -1)
                lower_triangle = jnp.zeros((*mean.shape, width), mean.dtype)
                lower_triangle = lower_triangle.at[..., rows, columns].set(
                    as_float(lower_entries)
                )
                return FullGaussian(
                    mean,
                    lower_triangle
                    + scale[..., None] * jnp.eye(width, dtype=scale.dtype),
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
        hidden, means_shape = self.features(hidden), (self.components, self.width)
        logits = self.linear(
            "logits", hidden, "D", means_shape[:1], "X", kernel_initializer=_ZEROS_INIT
        )
        # Different from the start, or all components would learn the same.
        spread_init = nn.initializers.normal(0.5)
        means = self.linear(
            "mean", hidden, "D", means_shape, "X W", bias_initializer=spread_init
        )
        scales = self.bounded_scale(
            self.linear(
                "scale", hidden, "D", means_shape, "X W", kernel_initializer=_ZEROS_INIT
            )
        )
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
            raise InputError(
                f"top_k is {self.top_k}, but there are {self.experts} experts"
            )
        if not 0.0 <= self.balance < math.inf:
            raise InputError(
                f"balance is {self.balance!r}; it must be at least 0, and finite"
            )

    def loss(self, hidden: jax.Array, target: ArrayLike) -> jax.Array:
        router_logits, expert_indices, density = self.route(hidden)
        probabilities = jax.nn.softmax(router_logits, axis=-1).reshape(-1, self.experts)
        is_selected = jax.nn.one_hot(
            expert_indices, self.experts, dtype=router_logits.dtype
        )
        expert_shares = jnp.mean(is_selected.reshape(-1, self.experts), axis=0)
        balance_loss = self.experts * jnp.sum(
            expert_shares * jnp.mean(probabilities, axis=0)
        )
        return -density.log_prob(target) + self.balance * self.width * balance_loss

    def __call__(self, hidden: jax.Array) -> Mixture:
        return self.route(hidden)[-1]

    @nn.compact
    def route(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array, Mixture]:
        """The router's logits [..., X], the experts chosen int [..., top_k], and their mixture."""
        hidden, inner_size = self.features(hidden), self.expert_size or hidden.shape[-1]
        router_logits = as_float(
            self.linear(
                "router",
                hidden,
                "D",
                (self.experts,),
                "X",
                kernel_initializer=_SMALL_INIT,
            )
        )
        selected_logits, expert_indices = jax.lax.top_k(router_logits, self.top_k)
        # All experts, of whom the chosen ones' answers are kept: at these sizes one product over
        # all is faster than many gathered ones.
        activations = jax.nn.gelu(
            self.linear("inner", hidden, "D", (self.experts, inner_size), "X F")
        )

        def expert_outputs(name, init, bias):
            kernel = self.parameter(
                name, (self.experts, self.width, inner_size), "X W F", init
            )
            bias_values = self.parameter(
                f"{name}_bias", (self.experts, self.width), "X W", bias
            )
            all_outputs = (
                jnp.einsum("...xf,xwf->...xw", activations, kernel) + bias_values
            )
            return as_float(
                jnp.take_along_axis(all_outputs, expert_indices[..., None], axis=-2)
            )

        means = expert_outputs("mean", kernel_init, nn.initializers.normal(0.5))
        scales = self.bounded_scale(expert_outputs("scale", _ZEROS_INIT, _ZEROS_INIT))
        return router_logits, expert_indices, Mixture(selected_logits, means, scales)


DISTRIBUTION_HEADS: dict[str, type[DistributionHead]] = {
    "token": TokenHead,
    "gaussian": GaussianHead,
    "mixture": MixtureHead,
    "experts": ExpertsHead,
}


def to_dict(
    head: Head, *, registry: Mapping[str, type[Head]] = DISTRIBUTION_HEADS
) -> dict[str, Any]:
    """What `from_dict` makes the head from, with the same `registry`."""
    kind = next(name for name, cls in registry.items() if type(head) is cls)
    return {"kind": kind, **head.settings()}


def from_dict(
    settings: dict[str, Any], *, registry: Mapping[str, type[Head]] = DISTRIBUTION_HEADS
) -> Head:
    """A head from its kind and its settings.

    Args:
      settings: "kind", "width" and whatever else is not as by default.
      registry: the heads that there are, by name.

    Raises:
      InputError: for a kind that is not known, or a setting that it does not have.
    """
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in registry:
        raise InputError(
            f"kind of head is {kind!r:.60}; it must be one of {', '.join(registry)}"
        )
    default_settings = registry[kind](width=1).settings()
    if "width" not in settings:
        raise InputError(f"a {kind} head needs its width")
    for name, value in settings.items():
        if name not in default_settings:
            raise InputError(
                f"a {kind} head has no setting {name!r:.60}; it has {', '.join(default_settings)}"
            )
        default = default_settings[name]
        allowed_types: tuple[type, ...] = (
            (int, type(None)) if default is None else (type(default),)
        )
        allowed_types = (int, float) if allowed_types == (float,) else allowed_types
        if not isinstance(value, allowed_types) or (
            isinstance(value, bool) and allowed_types != (bool,)
        ):
            type_names = " or ".join(
                allowed_type.__name__ for allowed_type in allowed_types
            )
            raise InputError(
                f"setting {name} of a {kind} head is {value!r:.60}; it must be {type_names}"
            )
    return registry[kind](**settings)
