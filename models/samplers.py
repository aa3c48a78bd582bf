"""Samplers of the next token from a model's logits.

`Greedy` and `Temperature` are for all models with logits of the next token. `models.density` has
those that draw vectors of a density, `models.calm` those of next-vector models.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float, check_count, check_numbers
from continuous_lm.errors import InputError
from continuous_lm.models.generative_model import TokenModel, generative_model
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params

__all__ = [
    "STATIC",
    "Draw",
    "Greedy",
    "Sampler",
    "Temperature",
    "check_has_logits",
    "check_key",
    "check_scalar",
    "float_array",
    "sample_token",
    "temper_logits",
]

STATIC = {"static": True}  # metadata of a field that is part of the compiled program
ModelT = TypeVar("ModelT", contravariant=True)
# From a key, hidden states [B, D] and bool [B], rows that have ended and whose items are dropped,
# to items: int tokens [B], chunks of them [B, C], or vectors [B, W]. -1 is an item that failed.
Draw = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Sampler(Protocol[ModelT]):
    """Protocol of the samplers of `generate`: a frozen dataclass that is a pytree.

    Its arrays are inputs of the compiled program, so other values do not recompile it. Fields with
    the metadata `STATIC` are static arguments.
    """

    def resolve(self, lm: LanguageModel[Any]) -> "Sampler[ModelT]":
        """The sampler that the compiled loop takes: checked, with arrays in float32.

        Raises:
          InputError: for values that do not fit, or a model of another kind.
        """
        ...

    @property
    def is_random(self) -> bool:
        """Return whether the draws need a key."""
        return True

    def prompt_items(self, lm: LanguageModel[Any], prompt: np.ndarray) -> np.ndarray:
        """The items [T, ...] that the model reads, of one prompt."""
        return prompt

    def draw_function(self, model: ModelT, params: Params) -> Draw:
        """The function that draws items; what all steps share is computed here, once.

        Called inside jit, on the sampler that `resolve` returned.
        """
        ...

    def describe_failure(self) -> str:
        """Reason why an item failed, and the remedy."""
        return "nothing was drawn"


def float_array(values: ArrayLike) -> np.ndarray:
    """The array in float32, whatever was given: one program serves them all."""
    return np.asarray(values, np.float32)


# --- Tokens -----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy(Sampler[TokenModel]):
    """Sampler of the most probable token; the first one among ties.

    For models with logits: trunks, and densities that read tokens (a token head's logits, or the
    density at each row of the table).
    """

    def resolve(self, lm: LanguageModel[Any]) -> Self:
        check_has_logits(self, lm)
        return self

    @property
    def is_random(self) -> bool:
        return False

    def draw_function(self, model: TokenModel, params: Params) -> Draw:
        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            return jnp.argmax(model.logits(params, hidden), axis=-1).astype(jnp.int32)

        return draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature(Sampler[TokenModel]):
    """Sample tokens from softmax(logits / temperature), limited by top_k and top_p.

    For the same models as `Greedy`.

    Attributes:
      temperature: >= 0, a scalar; at 0 this is `Greedy`, and no key is needed.
      top_k: draw from the k likeliest tokens only; part of the compiled program.
      top_p: draw from the fewest tokens only whose probability adds up to p, 0 < p <= 1; a scalar.
    """

    temperature: ArrayLike = 1.0
    top_k: int | None = dataclasses.field(default=None, metadata=STATIC)
    top_p: ArrayLike | None = None

    def resolve(self, lm: LanguageModel[Any]) -> Sampler[TokenModel]:
        check_has_logits(self, lm)
        check_scalar("temperature", self.temperature, 0.0)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None:
            check_scalar("top_p", self.top_p)
            _check_top_p(self.top_p)
        if not self.is_random:
            return Greedy()
        top_p = None if self.top_p is None else float_array(self.top_p)
        temperature = float_array(self.temperature)
        return dataclasses.replace(self, temperature=temperature, top_p=top_p)

    @property
    def is_random(self) -> bool:
        return bool(np.asarray(self.temperature) > 0)

    def draw_function(self, model: TokenModel, params: Params) -> Draw:
        def draw(key: jax.Array, hidden: jax.Array, is_done: jax.Array) -> jax.Array:
            return sample_token(
                key,
                model.logits(params, hidden),
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            )

        return draw


def sample_token(
    key: jax.Array,
    logits: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
) -> jax.Array:
    """Sample tokens from softmax(logits / temperature), limited by top_k and top_p.

    Args:
      key: PRNG key.
      logits: [..., V].
      temperature: >= 0, a scalar or [...]; at 0 the likeliest token is drawn.
      top_k: draw from the k likeliest tokens only, and those that tie with the last of them.
      top_p: then draw from the fewest tokens only whose probability adds up to p (Holtzman et al.,
        arXiv:1904.09751); a scalar or [...].

    Returns:
      tokens int32 [...].

    Raises:
      InputError: if top_k is no positive integer, or a value is out of range; traced ones pass.
    """
    check_numbers("temperature", temperature, 0.0)
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None:
        _check_top_p(top_p)
    top_logits = _mask_unlikely(temper_logits(logits, temperature), top_k, top_p)
    return jax.random.categorical(key, top_logits).astype(jnp.int32)


def _mask_unlikely(
    logits: jax.Array, top_k: int | None, top_p: ArrayLike | None
) -> jax.Array:
    """The logits [..., V], with -inf in place of those that `sample_token` does not draw from."""
    if top_k is not None and top_k < logits.shape[-1]:
        top_logits, _ = lax.top_k(logits, top_k)
        logits = jnp.where(logits >= top_logits[..., -1:], logits, -jnp.inf)
    if top_p is None:
        return logits
    top_p = jnp.asarray(top_p, logits.dtype)[..., None]
    ranking = jnp.argsort(logits, axis=-1, descending=True)
    ranked_logits = jnp.take_along_axis(logits, ranking, axis=-1)
    probabilities = jax.nn.softmax(ranked_logits)
    probability_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # At 1 all are kept: the rounded sums before the least likely ones can be 1 already.
    is_kept = (probability_before < top_p) | (top_p >= 1)
    is_kept = is_kept.at[..., 0].set(True)
    rank = jnp.argsort(ranking, axis=-1)
    is_kept = jnp.take_along_axis(is_kept, rank, axis=-1)
    return jnp.where(is_kept, logits, -jnp.inf)


def temper_logits(logits: jax.Array, temperature: ArrayLike) -> jax.Array:
    """logits / temperature [..., V], the largest of which is 0; at temperature 0 it stands alone.

    In at least float32. So nothing overflows, however small the temperature is.
    """
    logits_float = as_float(logits)
    logits_float = logits_float - jnp.max(logits_float, axis=-1, keepdims=True)
    temperature = jnp.asarray(temperature, logits_float.dtype)[..., None]
    return logits_float / jnp.maximum(temperature, jnp.finfo(logits_float.dtype).tiny)


# --- Checks -----------------------------------------------------------------------------------


def check_has_logits(sampler: Sampler[TokenModel], lm: LanguageModel[Any]) -> None:
    """Raise InputError for models without logits of the next token."""
    model = generative_model(lm)
    if model.input_kind != "tokens":
        package = "calm" if model.input_kind == "chunks" else "density"
        raise InputError(
            f"{type(sampler).__name__} draws from logits of tokens, and this model predicts"
            f" vectors; give a sampler of models.{package}"
        )


def check_scalar(name: str, value: ArrayLike, minimum: float = -np.inf) -> None:
    """Raise InputError unless `value` is one finite number of at least `minimum`."""
    check_numbers(name, value, minimum)
    if np.ndim(value):
        raise InputError(
            f"{name} has shape {list(np.shape(value))}; it must be a scalar"
        )


def _check_top_p(top_p: ArrayLike) -> None:
    """Raise InputError unless the values are above 0 and at most 1; traced ones pass."""
    check_numbers("top_p", top_p)
    if isinstance(top_p, jax.core.Tracer):
        return
    values = np.asarray(top_p)
    if ((values <= 0) | (values > 1)).any():
        raise InputError(f"top_p is {top_p}; it must be above 0, and at most 1")


def check_key(key: object) -> jax.Array:
    """One PRNG key, of the typed kind or of the older one of raw numbers."""
    if isinstance(key, jax.Array):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        is_raw = key.dtype == jnp.uint32
        if (is_typed and key.ndim == 0) or (is_raw and key.ndim == 1):
            return key
    raise InputError("key is not a single PRNG key, such as jax.random.key(0)")
