"""Inputs of a next-vector model: chunks of tokens, their durations and times."""

from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from continuous_lm.arguments import (
    as_float,
    as_indices,
    check_integers,
    is_integer,
)
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs, check_timing

__all__ = [
    "ChunkInputs",
    "split_into_chunks",
]


class ChunkInputs(NamedTuple):
    """Chunks, and when they are: what `Inputs` is for tokens. The unit of time is the chunk.

    A pytree, so that it goes through jit, vmap and grad as it is. Leading axes broadcast.
    """

    chunks: jax.Array  # int [..., T, C]
    durations: jax.Array | None = None  # d >= 0 [..., T]; None: all 1
    times: jax.Array | None = None  # [..., T], when each ends; None: from the durations
    start: jax.Array | None = None  # [...]; None: 0, or after the cache

    @classmethod
    def make(
        cls,
        chunks: ArrayLike,
        *,
        vocab_size: int,
        chunk_size: int,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        window: float | None = None,
        follows: bool = False,
    ) -> "ChunkInputs":
        """Make checked inputs from a user's arguments: shapes always, values outside jit.

        Args:
          chunks: tokens int [..., T, C], from 0 to `vocab_size` - 1.
          vocab_size: V.
          chunk_size: C.
          durations: d >= 0 [..., T] of each chunk; 1 if omitted.
          times: when each chunk ends, [..., T], instead of start + cumulative durations.
          start: the time at which the first chunk begins, scalar or [...].
          window: window of the trunk's attention, in chunks; None if it has none.
          follows: whether there are chunks before these, in a cache.

        Raises:
          InputError: which argument is wrong, where, and how.
        """
        shape = np.shape(chunks)
        if len(shape) < 2 or shape[-1] != chunk_size:
            raise InputError(
                f"chunks have shape {list(shape)}; it must be [..., T, {chunk_size}], the"
                " tokens of a chunk last: see calm.split_into_chunks"
            )
        if not shape[-2]:
            raise InputError("there are no chunks; give at least one")
        check_integers("chunks", chunks, 0, vocab_size)
        check_timing(
            shape[:-1],
            durations,
            times,
            start,
            window=window,
            follows=follows,
            name="chunks",
        )
        return cls(
            as_indices(chunks),
            durations=None if durations is None else as_float(durations),
            times=None if times is None else as_float(times),
            start=None if start is None else as_float(start),
        )

    @property
    def num_chunks(self) -> int:
        """T."""
        return self.chunks.shape[-2]

    def leading_axes(self) -> dict[str, tuple[int, ...]]:
        """The leading axes of each array, by its name."""
        durations, times, start = self.durations, self.times, self.start
        return {
            "chunks": self.chunks.shape[:-2],
            "durations": () if durations is None else durations.shape[:-1],
            "times": () if times is None else times.shape[:-1],
            "start": () if start is None else start.shape,
        }

    def first(self, num_chunks: int) -> "ChunkInputs":
        """The first chunks alone; a negative number leaves out so many at the end."""
        durations, times = self.durations, self.times
        return ChunkInputs(
            self.chunks[..., :num_chunks, :],
            durations=None if durations is None else durations[..., :num_chunks],
            times=None if times is None else times[..., :num_chunks],
            start=self.start,
        )

    def with_embeddings(self, embeddings: jax.Array) -> Inputs:
        """The trunk's inputs: vectors [..., T, D] in the place of the chunks."""
        return Inputs(
            tokens=None,
            embeddings=embeddings,
            durations=self.durations,
            times=self.times,
            start=self.start,
        )


def split_into_chunks(
    tokens: ArrayLike, chunk_size: int, pad_token: int | None = None
) -> np.ndarray:
    """Tokens int [..., n] as chunks int32 [..., T, C].

    Args:
      tokens: int [..., n].
      chunk_size: C.
      pad_token: a token that is put in front as often as needed, where C does not divide n; if left
        out, that is refused.
    """
    tokens = np.asarray(tokens)
    holds_integers = np.issubdtype(tokens.dtype, np.integer)
    if not holds_integers or not tokens.ndim or not tokens.shape[-1]:
        raise InputError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be integers [..., n]"
        )
    check_integers("tokens", tokens, 0, np.iinfo(np.int32).max)
    if pad_token is not None and not (is_integer(pad_token) and pad_token >= 0):
        raise InputError(f"pad_token is {pad_token!r:.60}; it must be one token")
    num_padding = -tokens.shape[-1] % chunk_size
    if num_padding and pad_token is None:
        raise InputError(
            f"{tokens.shape[-1]} tokens are no multiple of a chunk of {chunk_size}; cut them, or"
            " give pad_token, a token to put in front"
        )
    if num_padding:
        padding = np.full((*tokens.shape[:-1], num_padding), pad_token)
        tokens = np.concatenate([padding, tokens], axis=-1)
    return tokens.reshape(*tokens.shape[:-1], -1, chunk_size).astype(np.int32)
