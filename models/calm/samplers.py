"""Text from next-vector models: O tokens a step, at any temperature, without a likelihood.

A temperature of 1 takes one draw of the head a step. Below that, P(x)^(1/T) / Z has to be drawn
from, where P is only known by its draws (CALM, Shao et al., arXiv:2510.27688; see `temperature`):

    batch     decodes `candidates` draws and prefers chunks that repeat: one step, a bias that
              falls with their number, T = 1/n
    exact     rejects until the draws agree: no bias, any T <= 1, and as long as it takes

At 0 the chunk that comes most often among the candidates is taken.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import check_count, check_integers
from continuous_lm.errors import InputError, about
from continuous_lm.models.calm import repeated_draws
from continuous_lm.models.calm.checkpoint import NextVectorLM, NextVectorModel, chunked
from continuous_lm.models.generation import Generated, Program, prompt_rows, run, stop_tokens
from continuous_lm.models.samplers import check_sampling

METHODS = ("batch", "exact")


def sample(
    lm: NextVectorLM,
    tokens: ArrayLike | Sequence[ArrayLike],
    *,
    max_new_tokens: int,
    durations: ArrayLike | Sequence[ArrayLike] | None = None,
    start: ArrayLike = 0.0,
    new_durations: ArrayLike = 1.0,
    temperature: float = 1.0,
    method: str = "batch",
    candidates: int = 128,
    max_rounds: int = 10_000,
    fill: int | None = None,
    key: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
    chunk: int = 1024,
) -> Generated:
    """Continues prompts chunk by chunk, in the compiled loop of `generate`.

    Args:
      lm: the model.
      tokens: the prompts: int [B, n], or a list of B of different lengths; [n] is one prompt.
      max_new_tokens: how many tokens each prompt gets, at most.
      durations: of the prompts' chunks, [B, T], or a list of B; 1 if left out.
      start: the time at which each prompt begins, a scalar or [B].
      new_durations: d >= 0 of new chunks: a scalar, [T] or [B, T], T = ceil(max_new_tokens / O).
      temperature: from 0 to 1.
      method: "batch", for 1, 1/2, 1/3 ... and 0, or "exact", for all above 0.
      candidates: N of "batch".
      max_rounds: draws in "exact" for one chunk, at most.
      fill: a token that is put in front of prompts whose length O does not divide; eos_token_id of
        the model's notes if left out: the end of the text before.
      key: PRNG key; at temperature 0 one is made if it is left out.
      stop: tokens that end a row, wherever in a chunk they are; the notes' eos_token_id if left
        out, () for none.
      chunk: prompts go through the model in pieces of at most so many chunks.

    Returns:
      The new tokens, on the host.

    Raises:
      InputError: for arguments that do not fit, or if "exact" has accepted no draw for a chunk in
        max_rounds.
    """
    counts = {"max_new_tokens": max_new_tokens, "chunk": chunk, "candidates": candidates}
    for name, count in (counts | {"max_rounds": max_rounds}).items():
        check_count(name, count)
    check_sampling(temperature, None, key)
    if method not in METHODS:
        raise InputError(f"method is {method!r:.60}; it must be one of {', '.join(METHODS)}")
    if method == "exact" and not 0 < temperature <= 1:
        raise InputError(f"temperature is {temperature}; exact needs one above 0, and at most 1")
    order = 0
    if method == "batch":
        order = candidates if temperature == 0 else repeated_draws.order(temperature)
        if order > candidates:
            raise InputError(
                f"temperature 1/{order} needs at least {order} candidates, not {candidates}"
            )
    stops = stop_tokens(stop, lm.notes, lm.config.vocab_size)
    size = lm.chunk_size
    given: Any = list(cast(Any, tokens)) if np.iterable(tokens) else []
    if not given:
        raise InputError("tokens must be one prompt's [n], or a list of prompts; give at least one")
    rows = []
    for i, row in enumerate([tokens] if np.ndim(given[0]) == 0 else given):
        with about(f"prompt {i}"):
            check_integers("tokens", row, 0, lm.config.vocab_size)
            rows.append(chunked(cast(Any, row), size, _fill(lm, fill)))
    chunks, d = prompt_rows(lm.model, "chunks", rows, durations, np.dtype(np.int32))
    steps = -(-max_new_tokens // size)
    trunk = lm.params["trunk"]
    how = Program(
        lm.model,
        "chunks",
        "chunks",
        _DrawChunk(
            lm.model,
            method,
            order,
            candidates if order > 1 else 1,
            max_rounds if method == "exact" else 1,
        ),
        lm.config,
        chunk,
        axes_lib.mesh_of(trunk["embedding"]),
    )
    new, lengths = run(
        how,
        lm.params,
        chunks,
        d,
        max_new=steps,
        start=start,
        new_durations=new_durations,
        options={"temperature": np.float32(temperature)},
        stop=stops,
        key=jax.random.key(0) if key is None else key,
        dtype=trunk["embedding"].dtype,
    )
    for i, row in enumerate(new):
        if (row[: lengths[i]] < 0).any():
            raise InputError(
                f"prompt {i}: no draw was accepted in {max_rounds} rounds at new chunk"
                f" {lengths[i] - 1}; raise max_rounds or the temperature, or take method='batch'"
            )
    return _cut(new.reshape(len(new), -1), lengths * size, stops, max_new_tokens)


@dataclasses.dataclass(frozen=True)
class _DrawChunk:
    """The next chunks [B, O] from hidden states [B, D]; -1 where none was accepted."""

    model: NextVectorModel
    method: str
    order: int  # n of T = 1/n
    candidates: int
    max_rounds: int

    def __call__(self, params, options, key, hidden, done):
        def draws(key, count):
            variables: Any = {"params": params}
            return self.model.apply(variables, key, hidden, count, method="draws")

        if self.method == "exact":
            found = repeated_draws.exact(
                key,
                lambda key: draws(key, 1)[0],
                temperature=options["temperature"],
                max_rounds=self.max_rounds,
                done=done,
            )
            return jnp.where(found.accepted[:, None], found.items, -1)
        if self.order == 1:
            return draws(key, 1)[0]
        of_draws, of_choice = jax.random.split(key)
        return repeated_draws.batch(of_choice, draws(of_draws, self.candidates), n=self.order)


def _fill(lm: NextVectorLM, fill: int | None) -> int | None:
    """The token to put in front of prompts: that given, or the end of a text, or none."""
    if fill is None:
        told = lm.notes.get("eos_token_id")
        known = np.ravel([] if told is None else told)
        return int(known[0]) if len(known) else None
    if np.ndim(fill):
        raise InputError(f"fill is {fill!r:.60}; it must be one token")
    check_integers("fill", fill, 0, lm.config.vocab_size)
    return fill


def _cut(tokens: np.ndarray, lengths: np.ndarray, stop: np.ndarray, limit: int) -> Generated:
    """Rows of tokens up to and with their first stop token, wherever in a chunk it is."""
    tokens = tokens[:, :limit].copy()
    lengths = np.minimum(lengths, limit)
    ends = np.isin(tokens, stop)
    first = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, limit)
    lengths = np.minimum(lengths, first).astype(np.int32)
    tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return Generated(tokens, lengths)
