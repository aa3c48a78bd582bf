"""Inputs of a model: tokens or vectors, their durations and times, checked once.

Every public function makes one `Inputs` with `Inputs.make` and passes it to the layers. Values are
not checked again inside.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import (
    as_float,
    as_indices,
    check_integers,
    check_numbers,
)
from continuous_lm.attention.visibility import exact_end_times, visibility_mask
from continuous_lm.durations import check_durations, durations_from_times
from continuous_lm.errors import InputError

__all__ = [
    "MIN_DURATION",
    "Array",
    "Inputs",
    "check_timing",
]

# A duration below the least normal number is nothing in float32.
MIN_DURATION = float(jnp.finfo(jnp.float32).tiny)


# Of JAX as `Inputs.make` returns it, or of NumPy, as where batches are cut from many points.
Array = jax.Array | np.ndarray


class Inputs(NamedTuple):
    """Tokens or vectors, and when they are. Leading axes broadcast; None was not given.

    A pytree, so that it goes through jit, vmap and grad as it is.

    Attributes:
      tokens: int [..., T], or
      embeddings: [..., T, D] instead of tokens.
      durations: d >= 0 [..., T]; None: all 1.
      times: [..., T], when each token ends; None: from the durations.
      start: [...], when the first token begins; None: 0, or after the cache.
    """

    tokens: Array | None = None
    embeddings: Array | None = None
    durations: Array | None = None
    times: Array | None = None
    start: Array | None = None

    @classmethod
    def make(
        cls,
        tokens: ArrayLike | None = None,
        *,
        vocab_size: int,
        width: int,
        embeddings: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        window: float | None = None,
        follows: bool = False,
        vectors_name: str = "embeddings",
    ) -> "Inputs":
        """Make checked inputs from a user's arguments: shapes always, values outside jit.

        Args:
          tokens: int [..., T], from 0 to `vocab_size` - 1; or give `embeddings`.
          vocab_size: number of tokens, V.
          width: width of the embeddings, D.
          embeddings: [..., T, D] instead of tokens.
          durations: duration d >= 0 of each token, [..., T]; 1 if omitted.
          times: end time of each token, [..., T], instead of start + cumulative durations.
          start: start time of the first token, scalar or [...].
          window: window of the model's attention, in tokens; None if it has none.
          follows: whether tokens precede these, in a cache or a prefix.
          vectors_name: name of the embeddings in errors.

        Raises:
          InputError: naming the argument, the position and the problem.
        """
        token_shape = _check_tokens(tokens, vocab_size, embeddings, width, vectors_name)
        check_timing(
            token_shape, durations, times, start, window=window, follows=follows
        )
        return cls(
            tokens=_as_optional(as_indices, tokens),
            embeddings=_as_optional(jnp.asarray, embeddings),
            durations=_as_optional(as_float, durations),
            times=_as_optional(as_float, times),
            start=_as_optional(as_float, start),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        if self.tokens is not None:
            return self.tokens.shape[-1]
        assert self.embeddings is not None
        return self.embeddings.shape[-2]

    def leading_axes(self) -> Mapping[str, tuple[int, ...]]:
        """The leading axes of each array, by its name."""
        shapes = {"tokens": () if self.tokens is None else self.tokens.shape[:-1]}
        if self.embeddings is not None:
            shapes["tokens"] = self.embeddings.shape[:-2]
        shapes["durations"] = (
            () if self.durations is None else self.durations.shape[:-1]
        )
        shapes["times"] = () if self.times is None else self.times.shape[:-1]
        shapes["start"] = () if self.start is None else self.start.shape
        return shapes

    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes of all of them together."""
        return axes_lib.broadcast_leading_axes(self.leading_axes())

    def first(self, num_tokens: int) -> "Inputs":
        """The first tokens alone; a negative number leaves out so many at the end."""
        return Inputs(
            tokens=None if self.tokens is None else self.tokens[..., :num_tokens],
            embeddings=None
            if self.embeddings is None
            else self.embeddings[..., :num_tokens, :],
            durations=None
            if self.durations is None
            else self.durations[..., :num_tokens],
            times=None if self.times is None else self.times[..., :num_tokens],
            start=self.start,
        )


def check_timing(
    token_shape: tuple[int, ...],
    durations: ArrayLike | None,
    times: ArrayLike | None,
    start: ArrayLike | None,
    *,
    window: float | None,
    follows: bool,
    name: str = "tokens",
) -> None:
    """Check the durations and times of tokens or chunks: shapes always, values outside jit.

    Args:
      token_shape: shape [..., T] of the tokens or chunks.
      durations: durations d >= 0, [..., T].
      times: end time of each token, [..., T].
      start: start time of the first token.
      window: window of the model's attention, in tokens; None if it has none.
      follows: whether tokens precede these.
      name: name of the items in errors.
    """
    num_tokens = token_shape[-1]
    if durations is not None:
        check_durations(durations, num_tokens)
        if not follows:
            _check_first_duration(durations)
    if times is not None:
        if start is not None:
            raise InputError(
                "times already say where the first token begins; leave out start"
            )
        check_durations(times, num_tokens, "times", minimum=-np.inf)
    if start is not None:
        check_numbers("start", start)
    axes_lib.broadcast_leading_axes(
        {
            name: token_shape[:-1],
            "durations": () if durations is None else np.shape(durations)[:-1],
            "times": () if times is None else np.shape(times)[:-1],
            "start": () if start is None else np.shape(start),
        }
    )
    if window is not None and not follows:
        _check_visible_keys(durations, times, window)


def _as_optional(
    convert: Callable[[ArrayLike], jax.Array], values: ArrayLike | None
) -> jax.Array | None:
    return None if values is None else convert(values)


def _is_text(values: object) -> bool:
    return isinstance(values, str)


def _check_tokens(
    tokens: ArrayLike | None,
    vocab_size: int,
    embeddings: ArrayLike | None,
    width: int,
    vectors_name: str,
) -> tuple[int, ...]:
    """The shape [..., T] of tokens or vectors, of which there must be one kind and at least one."""
    if tokens is not None and embeddings is None:
        if _is_text(tokens):
            raise InputError(
                "tokens are text; lm.tokenizer.encode(text).ids are its tokens"
            )
        token_shape = np.shape(tokens)
        if token_shape and token_shape[-1]:
            check_integers("tokens", tokens, 0, vocab_size)
    elif embeddings is not None and tokens is None:
        *leading_shape, vector_width = np.shape(embeddings) or (0,)
        token_shape = tuple(leading_shape)
        if vector_width != width:
            raise InputError(
                f"{vectors_name} are {vector_width} wide; they must be [..., T, {width}]"
            )
        check_numbers(vectors_name, embeddings)
    else:
        raise InputError(f"give either tokens or {vectors_name}")
    if not token_shape or not token_shape[-1]:
        raise InputError(
            f"there are no tokens; tokens are [..., T] and {vectors_name} [..., T, D], T >= 1"
        )
    return token_shape


def _check_first_duration(durations: ArrayLike) -> None:
    """Raise InputError if the first token has no visible duration, its own included."""
    if isinstance(durations, jax.core.Tracer):
        return
    if not (np.asarray(durations)[..., 0] >= MIN_DURATION).all():
        raise InputError(
            "durations: the first token has duration 0, so that nothing is there to attend to;"
            " give it a positive one, or leave it out"
        )


def _check_visible_keys(
    durations: ArrayLike | None, times: ArrayLike | None, window: float
) -> None:
    """Raise InputError for a token whose whole window has duration 0."""
    if durations is None or times is None:
        return  # windows are in the time of the durations: every token sees itself or the last
    if isinstance(durations, jax.core.Tracer) or isinstance(times, jax.core.Tracer):
        return
    if (np.asarray(durations) > 0).all():
        return
    key_weights = as_float(durations)
    end_times = as_float(times)
    intervals = durations_from_times(end_times, end_times[..., 0])
    indices = np.arange(key_weights.shape[-1])
    is_in_window = visibility_mask(indices, indices, exact_end_times(intervals), window)
    is_visible = is_in_window & (key_weights > 0)[..., None, :]
    blind_queries = np.argwhere(~np.asarray(is_visible.any(axis=-1)))
    if len(blind_queries):
        raise InputError(
            f"durations: token {blind_queries[0][-1]} has nothing to attend to, since all"
            f" tokens within its window of {window:g} have duration 0; give one of them a"
            " positive one"
        )
