"""Text from a model: prompts in, new tokens out, each of any duration, in one compiled loop.

Prompts of different lengths share a batch by padding on the left with tokens of duration 0, which
continuous attention does not see and which take no time. So every row's new tokens stand at the
same index, and there are no masks or positions to keep.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import check_count, check_integers, check_numbers
from continuous_lm.errors import InputError, about
from continuous_lm.models import kv_cache
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.samplers import check_sampling, sample_token

BUCKET = 64  # lengths are rounded up to multiples of it, so that few programs are compiled


class Generated(NamedTuple):
    """New tokens of B prompts."""

    tokens: np.ndarray  # int32 [B, T]; 0 after a row's stop token
    lengths: np.ndarray  # int32 [B], the stop token included

    def rows(self) -> list[list[int]]:
        """The new tokens of each prompt, up to and with its stop token."""
        pairs = zip(self.tokens, self.lengths, strict=True)
        return [row[:length].tolist() for row, length in pairs]


class Program(NamedTuple):
    """What the compiled loop depends on, apart from shapes."""

    model: nn.Module  # takes prompts, durations, cache and at; gives outputs and the cache
    reads: str  # the name under which it takes the prompts
    goes_on: str  # and what is drawn
    draw: Callable[..., jax.Array]  # hashable; see `run`
    config: TransformerConfig  # of the trunk
    chunk: int
    mesh: Mesh | None


def generate(
    lm: LanguageModel,
    tokens: ArrayLike | Sequence[ArrayLike] | None = None,
    *,
    max_new_tokens: int,
    embeddings: ArrayLike | Sequence[ArrayLike] | None = None,
    durations: ArrayLike | Sequence[ArrayLike] | None = None,
    start: ArrayLike = 0.0,
    new_durations: ArrayLike = 1.0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
    chunk: int = 1024,
) -> Generated:
    """Continues prompts token by token.

    The program is compiled for a batch size and for lengths in steps of 64; other prompts of
    similar lengths, temperatures, durations and numbers of new tokens run it again.

    Args:
      lm: the language model. If its parameters lie on a mesh, so does the computation.
      tokens: the prompts: int [B, T], or a list of B of different lengths; [T] is one prompt.
      max_new_tokens: how many tokens each prompt gets, at most.
      embeddings: [B, T, D], or a list of B [T, D], instead of tokens; [T, D] is one prompt.
      durations: of the prompts' tokens, shaped as these; 1 if left out.
      start: the time at which each prompt begins, a scalar or [B].
      new_durations: d >= 0 of the new tokens: a scalar, [max_new_tokens] or [B, max_new_tokens].
      temperature: the logits are divided by it; at 0 the likeliest token is taken each time.
      top_k: draw from the k likeliest tokens only.
      top_p: draw from the fewest tokens only whose probability adds up to p.
      key: PRNG key; needed unless the temperature is 0.
      stop: tokens that end a row, or () for none; config.json's eos_token_id if left out.
      chunk: prompts go through the model in pieces of at most so many tokens, so that memory for
        their activations is bounded.

    LongRoPE's factors are chosen once for all rows, by the number of tokens of the longest prompt
    with the new ones.

    Returns:
      The new tokens, on the host.

    Raises:
      InputError: for arguments that do not fit.
    """
    for name, count in {"max_new_tokens": max_new_tokens, "chunk": chunk, "top_k": top_k}.items():
        if count is not None or name == "max_new_tokens":
            check_count(name, count)
    check_sampling(temperature, top_p, key)
    if (tokens is None) == (embeddings is None):
        raise InputError("give either tokens or embeddings")
    kind, given = ("tokens", tokens) if embeddings is None else ("embeddings", embeddings)
    wide = lm.params["embedding"].dtype
    item = np.dtype(np.int32) if kind == "tokens" else wide
    rows, d = prompt_rows(lm.model, kind, given, durations, item)
    how = Program(
        lm.model,
        kind,
        "tokens",
        _DrawToken(greedy=temperature == 0, top_k=top_k, top_p=top_p is not None),
        lm.config,
        chunk,
        axes_lib.mesh_of(lm.params["embedding"]),
    )
    options = {
        "temperature": np.float32(temperature),
        "top_p": np.float32(1.0 if top_p is None else top_p),
    }
    new, lengths = run(
        how,
        lm.params,
        rows,
        d,
        max_new=max_new_tokens,
        start=start,
        new_durations=new_durations,
        options=options,
        stop=stop_tokens(stop, lm.notes, lm.config.vocab_size),
        key=jax.random.key(0) if key is None or temperature == 0 else key,
        dtype=wide,
    )
    return Generated(new, lengths)


@dataclasses.dataclass(frozen=True)
class _DrawToken:
    """Tokens from logits."""

    greedy: bool
    top_k: int | None
    top_p: bool

    def __call__(self, params, options, key, logits, done):
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        p = options["top_p"] if self.top_p else None
        temperature = options["temperature"]
        return sample_token(key, logits, temperature=temperature, top_k=self.top_k, top_p=p)


def run(
    how: Program,
    params: Any,
    rows: Sequence[np.ndarray],
    d: Sequence[np.ndarray],
    *,
    max_new: int,
    start: ArrayLike,
    new_durations: ArrayLike,
    options: Any,
    stop: np.ndarray,
    key: jax.Array,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Continues B prompts, whatever they are made of, in one compiled loop.

    At each step `how.draw(params, options, key, outputs, done)` makes the next items, [B] tokens,
    [B, O] chunks of them or [B, W] vectors, from the model's outputs at the last ones, [B, ...]. A
    token of -1 ends its row. What it makes for rows that are done, bool [B], is dropped.

    Args:
      how: the program. Its `chunk` is an upper bound here.
      params: of the model.
      rows: the prompts.
      d: their durations.
      max_new: how many new items are wanted of each, at most.
      start: as of `generate`.
      new_durations: as of `generate`.
      options: tree of arrays that `draw` gets.
      stop: tokens that end a row.
      key: PRNG key, from which each step's is folded.
      dtype: of the cache.

    Returns:
      the new items [B, max_new, ...], and how many each row has [B].
    """
    check_numbers("start", start)
    check_numbers("new_durations", new_durations, 0.0)
    longest = max(map(len, rows))
    width, chunk = _pieces(longest, how.chunk)
    config = how.config.at_length(longest + max_new)
    how = how._replace(model=how.model.clone(config=config), config=config, chunk=chunk)
    shape, room = (len(rows), max_new), _rounded(max_new, BUCKET)
    batch = {
        "prompts": _padded(rows, width),
        "durations": _padded(d, width),
        "new_durations": _fitted("new_durations", new_durations, shape, room),
        "start": _fitted("start", start, shape[:1]),
    }
    new, lengths = _run(how, dtype, params, options, batch, stop, np.int32(max_new), key)
    return np.asarray(new)[:, :max_new], np.asarray(lengths)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    how: Program,
    dtype: np.dtype,
    params: Any,
    options: Any,
    batch: dict[str, jax.Array],
    stop: jax.Array,
    limit: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Items [B, room, ...], of which `limit` are made, and how many are each row's own [B]."""
    (num_rows, room), width = batch["new_durations"].shape, batch["prompts"].shape[1]
    place = functools.partial(axes_lib.placed, how.mesh)
    letters = {"prompts": "B T D", "durations": "B T", "new_durations": "B T", "start": "B"}
    batch = {k: place(v, letters[k][: 2 * v.ndim - 1]) for k, v in batch.items()}
    cache = kv_cache.empty(how.config, width + room, (num_rows,), dtype)
    cache = jax.tree.map(place, cache._replace(end=batch["start"]), kv_cache.AXES)

    def piece(name, i, size):
        return lax.dynamic_slice_in_dim(batch[name], i * size, size, axis=1)

    def step(cache, durations, **inputs):
        variables: Any = {"params": params}
        return how.model.apply(variables, durations=durations, cache=cache, at=-1, **inputs)

    def read(i, carry):
        """The i-th piece of the prompts."""
        cache, _ = carry
        inputs = {how.reads: piece("prompts", i, how.chunk)}
        outputs, cache = step(cache, piece("durations", i, how.chunk), **inputs)
        return cache, outputs

    def write(i, outputs, cache, new, lengths, done):
        """The i-th new item."""
        item = how.draw(params, options, jax.random.fold_in(key, i), outputs, done)
        item = jnp.where(done.reshape(-1, *[1] * (item.ndim - 1)), 0, item)
        new = lax.dynamic_update_slice_in_dim(new, item[:, None].astype(new.dtype), i, axis=1)
        ends: jax.Array | bool = False
        if jnp.issubdtype(item.dtype, jnp.integer):  # a token, or any of a chunk's
            ending = jnp.isin(item, stop) | (item < 0)
            ends = jnp.any(ending.reshape(len(item), -1), axis=-1)
        return i + 1, cache, new, lengths + ~done, done | ends

    def going_on(state):
        i, *_, done = state
        return (i < limit) & ~jnp.all(done)

    def read_and_write(state):
        i, cache, new, lengths, done = state
        last = lax.dynamic_slice_in_dim(new, i - 1, 1, axis=1)
        outputs, cache = step(cache, piece("new_durations", i - 1, 1), **{how.goes_on: last})
        return write(i, outputs, cache, new, lengths, done)

    _, nothing = jax.eval_shape(read, 0, (cache, None))
    nothing = jnp.zeros(nothing.shape, nothing.dtype)
    cache, outputs = lax.fori_loop(0, width // how.chunk, read, (cache, nothing))
    nobody = jnp.zeros(num_rows, bool)
    item = jax.eval_shape(how.draw, params, options, key, outputs, nobody)
    state = write(
        jnp.int32(0),
        outputs,
        cache,
        jnp.zeros((num_rows, room, *item.shape[1:]), item.dtype),
        jnp.zeros(num_rows, jnp.int32),
        nobody,
    )
    _, _, new, lengths, _ = lax.while_loop(going_on, read_and_write, state)
    return place(new, "- - -"[: 2 * new.ndim - 1]), place(lengths, "-")  # all, on every host


def prompt_rows(
    model: Any, kind: str, given: Any, durations: Any, dtype: np.dtype
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts of a kind one by one, checked by the model, and the durations of each.

    One dtype whatever was given, so that one program serves them all.
    """
    found = _rows(kind, given, "T" if kind == "tokens" else "T D")
    d = [np.ones(len(row)) for row in found]
    if durations is not None:
        d = _rows("durations", durations, "T")
    if len(d) != len(found):
        raise InputError(
            f"durations are given for {len(d)} prompts, and there are {len(found)} prompts"
        )
    for i, (row, d_row) in enumerate(zip(found, d, strict=True)):
        with about(f"prompt {i}"):
            model.check(**{kind: row}, durations=d_row)
    return [row.astype(dtype) for row in found], [row.astype(np.float32) for row in d]


def _rows(name: str, given: Any, axes: str) -> list[np.ndarray]:
    """The arrays with these axes one by one, from one, from an array of them, or from a list."""
    rank = len(axes_lib.split(axes))
    try:
        given = np.asarray(given) if hasattr(given, "ndim") else given
        rows = [np.asarray(row) for row in given]
        rows = [np.asarray(given)] if rows and rows[0].ndim == rank - 1 else rows
    except (TypeError, ValueError):
        raise InputError(f"{name} must be one prompt's [{axes}], or a list of them") from None
    if not rows:
        raise InputError(f"{name} are empty; give at least one prompt")
    for i, row in enumerate(rows):
        if row.dtype.kind in "US":
            raise InputError(f"{name} are text; lm.tokenizer.encode(text).ids are its tokens")
        if row.ndim != rank:
            raise InputError(
                f"prompt {i}: {name} have shape {list(row.shape)}; it must be [{axes}]"
            )
    return rows


def _pieces(length: int, chunk: int) -> tuple[int, int]:
    """To what length prompts are padded, and in pieces of how many tokens they are read.

    Pieces are as even as they can be, so that little padding is read.
    """
    width = _rounded(length, BUCKET)
    number = -(-width // chunk)
    chunk = -(-width // number)
    return number * chunk, chunk


def _padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """[B, width, ...]: the rows, with zeros in front."""
    return np.stack(
        [np.pad(row, [(width - len(row), 0)] + [(0, 0)] * (row.ndim - 1)) for row in rows]
    )


def _fitted(name: str, values: ArrayLike, shape: tuple[int, ...], room: int = 0) -> np.ndarray:
    """Values broadcast to `shape`, with ones behind up to `room` where that is given."""
    try:
        values = np.broadcast_to(np.asarray(values, np.float32), shape)
    except ValueError:
        raise InputError(
            f"{name} has shape {list(np.shape(values))}; it must broadcast to {list(shape)}"
        ) from None
    return np.pad(values, [(0, 0), (0, room - shape[-1])], constant_values=1.0) if room else values


def _rounded(length: int, step: int) -> int:
    return -(-length // step) * step


def stop_tokens(
    stop: int | Sequence[int] | None, notes: Mapping[str, Any], vocab_size: int
) -> np.ndarray:
    """The tokens that end a row, int [any number]; -1, which no token is, fills it up.

    Args:
      stop: the tokens, or none; if left out, those that
      notes: name as eos_token_id.
      vocab_size: V.
    """
    name = "stop"
    if stop is None:
        name, stop = "field eos_token_id of config.json", notes.get("eos_token_id")
    tokens = np.asarray(() if stop is None else stop)
    if tokens.size:
        check_integers(name, tokens, 0, vocab_size)
    padding = _rounded(max(tokens.size, 1), 8) - tokens.size  # one program for most numbers of them
    return np.append(tokens.ravel(), [-1] * padding).astype(np.int32)
