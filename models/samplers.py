"""Samplers: from the logits of the next token to a token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from continuous_lm.arguments import as_float, check_count, check_numbers
from continuous_lm.errors import InputError

__all__ = [
    "check_sampling",
    "sample_token",
    "temper_logits",
]


def sample_token(
    key: jax.Array,
    logits: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
) -> jax.Array:
    """Draws tokens from softmax(logits / temperature), cut to the likeliest ones.

    Args:
      key: PRNG key.
      logits: [..., V].
      temperature: >= 0, a scalar or [...]; at 0 the likeliest token is drawn.
      top_k: draw from the k likeliest tokens only, and those that tie with the last of them.
      top_p: then draw from the fewest tokens only whose probability adds up to p (Holtzman et al.,
        arXiv:1904.09751); a scalar or [...].

    Returns:
      tokens int32 [...].
    """
    if top_k is not None:
        check_count("top_k", top_k)
    top_logits = _mask_unlikely(temper_logits(logits, temperature), top_k, top_p)
    return jax.random.categorical(key, top_logits).astype(jnp.int32)


def _mask_unlikely(
    logits: jax.Array, top_k: int | None, top_p: ArrayLike | None
) -> jax.Array:
    """The logits [..., V], with -inf in place of those that `sample_token` does not draw from."""
    if top_k is not None and top_k < logits.shape[-1]:
        min_logit = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= min_logit, logits, -jnp.inf)
    if top_p is not None:
        top_p = jnp.asarray(top_p, logits.dtype)[..., None]
        ranking = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, ranking, axis=-1))
        # At 1 all are kept: the rounded sums before the least likely ones can be 1 already.
        is_kept = (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p) | (
            top_p >= 1
        )
        is_kept = jnp.take_along_axis(
            is_kept.at[..., 0].set(True), jnp.argsort(ranking, axis=-1), axis=-1
        )
        logits = jnp.where(is_kept, logits, -jnp.inf)
    return logits


def check_sampling(temperature: Any, top_p: Any, key: Any) -> None:
    """Refuses what tokens cannot be drawn with."""
    for name, value in {"temperature": temperature, "top_p": top_p}.items():
        if value is not None or name == "temperature":
            check_numbers(name, value, 0.0)
            if np.ndim(value):
                raise InputError(
                    f"{name} has shape {list(np.shape(value))}; it must be a scalar"
                )
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p is {top_p}; it must be above 0, and at most 1")
    if temperature > 0 and key is None:
        raise InputError(
            "sampling at a temperature above 0 needs a key, such as jax.random.key(0)"
        )
    if temperature > 0 and not _is_key(key):
        raise InputError("key is not a single PRNG key, such as jax.random.key(0)")


def _is_key(key: Any) -> bool:
    """Whether it is one key, of the typed kind or of the older one of raw numbers."""
    if not isinstance(key, jax.Array):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.dtype == jnp.uint32 and key.ndim == 1


def temper_logits(logits: jax.Array, temperature: ArrayLike) -> jax.Array:
    """logits / temperature [..., V], the largest of which is 0; at temperature 0 it stands alone.

    In at least float32. So nothing overflows, however small the temperature is.
    """
    logits_float = as_float(logits)
    logits_float = logits_float - jnp.max(logits_float, axis=-1, keepdims=True)
    temperature = jnp.asarray(temperature, logits_float.dtype)[..., None]
    return logits_float / jnp.maximum(temperature, jnp.finfo(logits_float.dtype).tiny)
