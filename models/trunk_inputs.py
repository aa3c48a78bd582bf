"""The inputs of one call of a trunk, checked once at the door: `make_inputs`."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import check_integers
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs
from continuous_lm.models import kv_cache
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.kv_cache import KVCache

__all__ = ["batch_shape", "check_position", "make_inputs"]


def make_inputs(
    config: TransformerConfig,
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    times: ArrayLike | None = None,
    start: ArrayLike | None = None,
    position: ArrayLike | None = None,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
) -> Inputs:
    """Make the checked inputs of one call of this model: shapes always, values outside jit.

    Arguments are as in `Transformer.__call__` and `forward`.

    Raises:
      InputError: which argument is wrong, where, and how.
    """
    past = prefix if cache is None else cache
    inputs = Inputs.make(
        tokens,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        embeddings=embeddings,
        durations=durations,
        times=times,
        start=start,
        window=config.window,
        follows=past is not None,
    )
    check_position(inputs, position, cache, prefix)
    if prefix is not None:
        if position is None or cache is not None:
            raise InputError(
                "a prefix needs `position`, the only position to compute, and no cache"
            )
        kv_cache.check_shape(config, prefix, "prefix")
    elif cache is not None:
        kv_cache.check_shape(config, cache, "cache")
        kv_cache.check_room(cache, inputs.num_tokens)
        if batch_shape(inputs, position, cache) != cache.end_time.shape:
            raise InputError(
                f"the cache is for leading axes {list(cache.end_time.shape)}, and those of the"
                " arguments do not fit into them"
            )
    return inputs


def check_position(
    inputs: Inputs,
    position: ArrayLike | None,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
) -> None:
    """Raise InputError for a position outside the tokens, or axes that do not broadcast."""
    if position is not None:
        check_integers("position", position, -inputs.num_tokens, inputs.num_tokens)
    leading_axes = dict(inputs.leading_axes())
    leading_axes["position"] = () if position is None else np.shape(position)
    leading_axes["the cache"] = () if cache is None else cache.end_time.shape
    leading_axes["the prefix"] = () if prefix is None else prefix.end_time.shape
    axes_lib.broadcast_leading_axes(leading_axes)


def batch_shape(
    inputs: Inputs, position: ArrayLike | None, past: KVCache | None
) -> tuple[int, ...]:
    """The leading axes of everything that a call gets."""
    position_shape = () if position is None else np.shape(position)
    past_shape = () if past is None else past.end_time.shape
    return jnp.broadcast_shapes(inputs.batch_shape(), position_shape, past_shape)
