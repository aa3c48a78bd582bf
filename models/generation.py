"""Text from a model: prompts in, new tokens out, each of any duration, in one compiled loop.

Prompts of different lengths share a batch by padding on the left with tokens of duration 0, which
continuous attention does not see and which take no time. So every row's new tokens stand at the
same index, and there are no masks or positions to keep.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm.arguments import (
    check_count,
    check_integers,
    check_numbers,
)
from continuous_lm.errors import InputError, about
from continuous_lm.models import kv_cache, linen_transformer
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.language_model import LanguageModel, trunk_model
from continuous_lm.models.samplers import check_sampling, sample_token

__all__ = [
    "LENGTH_MULTIPLE",
    "DecodeSpec",
    "GeneratedTokens",
    "decode_batch",
    "generate",
    "split_prompts",
    "stop_tokens",
]

LENGTH_MULTIPLE = (
    64  # lengths are rounded up to multiples of it, so that few programs are compiled
)


class GeneratedTokens(NamedTuple):
    """New tokens of B prompts."""

    tokens: np.ndarray  # int32 [B, T]; 0 after a row's stop token
    lengths: np.ndarray  # int32 [B], the stop token included

    def token_lists(self) -> list[list[int]]:
        """The new tokens of each prompt, up to and with its stop token."""
        tokens_and_lengths = zip(self.tokens, self.lengths, strict=True)
        return [row[:length].tolist() for row, length in tokens_and_lengths]


class DecodeSpec(NamedTuple):
    """What the compiled loop depends on, apart from shapes."""

    # Takes prompts, durations, cache and position; gives outputs and the cache.
    model: Any
    prompt_argument: str  # the name under which the model takes the prompts
    next_argument: str  # and the items that the sampler makes
    sampler: Callable[..., jax.Array]  # hashable; see `decode_batch`
    config: TransformerConfig  # of the trunk
    prefill_length: int
    mesh: Mesh | None


def generate(
    lm: LanguageModel[Any],
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
    max_prefill_length: int = 1024,
) -> GeneratedTokens:
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
      max_prefill_length: prompts go through the model in pieces of at most so many tokens, so that
        memory for their activations is bounded.

    LongRoPE's factors are chosen once for all rows, by the number of tokens of the longest prompt
    with the new ones.

    Returns:
      The new tokens, on the host.

    Raises:
      InputError: for arguments that do not fit.
    """
    for name, value in {
        "max_new_tokens": max_new_tokens,
        "max_prefill_length": max_prefill_length,
        "top_k": top_k,
    }.items():
        if value is not None or name == "max_new_tokens":
            check_count(name, value)
    check_sampling(temperature, top_p, key)
    if (tokens is None) == (embeddings is None):
        raise InputError("give either tokens or embeddings")
    prompt_argument, prompts = (
        ("tokens", tokens) if embeddings is None else ("embeddings", embeddings)
    )
    trunk = trunk_model(lm)
    param_dtype = lm.params["embedding"].dtype
    prompt_dtype = np.dtype(np.int32) if prompt_argument == "tokens" else param_dtype
    prompt_list, duration_list = split_prompts(
        linen_transformer.Transformer(lm.config),
        prompt_argument,
        prompts,
        durations,
        prompt_dtype,
    )
    spec = DecodeSpec(
        linen_transformer.Transformer(lm.config, implementation=trunk.implementation),
        prompt_argument,
        "tokens",
        _TokenSampler(greedy=temperature == 0, top_k=top_k, top_p=top_p is not None),
        lm.config,
        max_prefill_length,
        axes_lib.mesh_of(lm.params["embedding"]),
    )
    options = {
        "temperature": np.float32(temperature),
        "top_p": np.float32(1.0 if top_p is None else top_p),
    }
    new_tokens, lengths = decode_batch(
        spec,
        lm.params,
        prompt_list,
        duration_list,
        max_new_items=max_new_tokens,
        start=start,
        new_durations=new_durations,
        options=options,
        stop=stop_tokens(stop, lm.hf_fields, lm.config.vocab_size),
        key=jax.random.key(0) if key is None or temperature == 0 else key,
        dtype=param_dtype,
    )
    return GeneratedTokens(new_tokens, lengths)


@dataclasses.dataclass(frozen=True)
class _TokenSampler:
    """Tokens from logits."""

    greedy: bool
    top_k: int | None
    top_p: bool

    def __call__(self, params, options, key, logits, is_done):
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        top_p = options["top_p"] if self.top_p else None
        temperature = options["temperature"]
        return sample_token(
            key, logits, temperature=temperature, top_k=self.top_k, top_p=top_p
        )


def decode_batch(
    spec: DecodeSpec,
    params: Any,
    prompts: Sequence[np.ndarray],
    durations: Sequence[np.ndarray],
    *,
    max_new_items: int,
    start: ArrayLike,
    new_durations: ArrayLike,
    options: Any,
    stop: np.ndarray,
    key: jax.Array,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Continues B prompts, whatever they are made of, in one compiled loop.

    At each step `spec.sampler(params, options, key, outputs, is_done)` makes the next items, [B]
    tokens, [B, C] chunks of them or [B, W] vectors, from the model's outputs at the last ones,
    [B, ...]. A token of -1 ends its row. What it makes for rows that are done, bool [B], is
    dropped.

    Args:
      spec: the program. Its `prefill_length` is an upper bound here.
      params: of the model.
      prompts: the prompts.
      durations: their durations.
      max_new_items: how many new items are wanted of each, at most.
      start: as of `generate`.
      new_durations: as of `generate`.
      options: tree of arrays that the sampler gets.
      stop: tokens that end a row.
      key: PRNG key, from which each step's is folded.
      dtype: of the cache.

    Returns:
      the new items [B, max_new_items, ...], and how many each row has [B].
    """
    check_numbers("start", start)
    check_numbers("new_durations", new_durations, 0.0)
    max_length = max(map(len, prompts))
    padded_length, prefill_length = _prefill_lengths(max_length, spec.prefill_length)
    config = spec.config.at_length(max_length + max_new_items)
    spec = spec._replace(
        model=spec.model.clone(config=config),
        config=config,
        prefill_length=prefill_length,
    )
    new_shape, capacity = (
        (len(prompts), max_new_items),
        _round_up(max_new_items, LENGTH_MULTIPLE),
    )
    batch = {
        "prompts": _pad_left(prompts, padded_length),
        "durations": _pad_left(durations, padded_length),
        "new_durations": _broadcast_and_pad(
            "new_durations", new_durations, new_shape, capacity
        ),
        "start": _broadcast_and_pad("start", start, new_shape[:1]),
    }
    new_items, lengths = _decode_loop(
        spec, dtype, params, options, batch, stop, np.int32(max_new_items), key
    )
    return np.asarray(new_items)[:, :max_new_items], np.asarray(lengths)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_loop(
    spec: DecodeSpec,
    dtype: np.dtype,
    params: Any,
    options: Any,
    batch: dict[str, jax.Array],
    stop: jax.Array,
    max_new_items: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """New items [B, capacity, ...], at most `max_new_items`, and the number of each row [B]."""
    (num_rows, capacity), padded_length = (
        batch["new_durations"].shape,
        batch["prompts"].shape[1],
    )
    place = functools.partial(axes_lib.place, spec.mesh)
    letters = {
        "prompts": "B T D",
        "durations": "B T",
        "new_durations": "B T",
        "start": "B",
    }
    batch = {
        entry: place(array, letters[entry][: 2 * array.ndim - 1])
        for entry, array in batch.items()
    }
    cache = kv_cache.empty(spec.config, padded_length + capacity, (num_rows,), dtype)
    cache = kv_cache.place(spec.mesh, cache._replace(end_time=batch["start"]))

    def slice_piece(name, i, size):
        return lax.dynamic_slice_in_dim(batch[name], i * size, size, axis=1)

    def apply_model(cache, durations, **inputs):
        variables: Any = {"params": params}
        return spec.model.apply(
            variables, durations=durations, cache=cache, position=-1, **inputs
        )

    def prefill_piece(i, carry):
        """The i-th piece of the prompts."""
        cache, _ = carry
        inputs = {spec.prompt_argument: slice_piece("prompts", i, spec.prefill_length)}
        outputs, cache = apply_model(
            cache, slice_piece("durations", i, spec.prefill_length), **inputs
        )
        return cache, outputs

    def append(i, outputs, cache, new, lengths, done):
        """The i-th new item."""
        item = spec.sampler(params, options, jax.random.fold_in(key, i), outputs, done)
        item = jnp.where(done.reshape(-1, *[1] * (item.ndim - 1)), 0, item)
        new = lax.dynamic_update_slice_in_dim(
            new, item[:, None].astype(new.dtype), i, axis=1
        )
        is_ending: jax.Array | bool = False
        if jnp.issubdtype(item.dtype, jnp.integer):  # a token, or any of a chunk's
            is_stop = jnp.isin(item, stop) | (item < 0)
            is_ending = jnp.any(is_stop.reshape(len(item), -1), axis=-1)
        return i + 1, cache, new, lengths + ~done, done | is_ending

    def unfinished(state):
        i, *_, is_done = state
        return (i < max_new_items) & ~jnp.all(is_done)

    def decode_step(state):
        i, cache, new_items, lengths, is_done = state
        last_item = lax.dynamic_slice_in_dim(new_items, i - 1, 1, axis=1)
        outputs, cache = apply_model(
            cache,
            slice_piece("new_durations", i - 1, 1),
            **{spec.next_argument: last_item},
        )
        return append(i, outputs, cache, new_items, lengths, is_done)

    _, no_outputs = jax.eval_shape(prefill_piece, 0, (cache, None))
    no_outputs = jnp.zeros(no_outputs.shape, no_outputs.dtype)
    cache, outputs = lax.fori_loop(
        0, padded_length // spec.prefill_length, prefill_piece, (cache, no_outputs)
    )
    none_done = jnp.zeros(num_rows, bool)
    item = jax.eval_shape(spec.sampler, params, options, key, outputs, none_done)
    state = append(
        jnp.int32(0),
        outputs,
        cache,
        jnp.zeros((num_rows, capacity, *item.shape[1:]), item.dtype),
        jnp.zeros(num_rows, jnp.int32),
        none_done,
    )
    _, _, new_items, lengths, _ = lax.while_loop(unfinished, decode_step, state)
    return place(new_items, "- - -"[: 2 * new_items.ndim - 1]), place(
        lengths, "-"
    )  # all, on every host


def split_prompts(
    model: Any, prompt_argument: str, prompts: Any, durations: Any, dtype: np.dtype
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts of a kind one by one, checked by the model, and the durations of each.

    One dtype whatever was given, so that one program serves them all.
    """
    prompt_list = _split_rows(
        prompt_argument, prompts, "T" if prompt_argument == "tokens" else "T D"
    )
    duration_list = [np.ones(len(row)) for row in prompt_list]
    if durations is not None:
        duration_list = _split_rows("durations", durations, "T")
    if len(duration_list) != len(prompt_list):
        raise InputError(
            f"durations are given for {len(duration_list)} prompts, and there are"
            f" {len(prompt_list)} prompts"
        )
    for i, (row, row_durations) in enumerate(
        zip(prompt_list, duration_list, strict=True)
    ):
        with about(f"prompt {i}"):
            model.check(**{prompt_argument: row}, durations=row_durations)
    return [row.astype(dtype) for row in prompt_list], [
        row.astype(np.float32) for row in duration_list
    ]


def _split_rows(name: str, values: Any, axes: str) -> list[np.ndarray]:
    """The arrays with these axes one by one, from one, from an array of them, or from a list."""
    rank = len(axes_lib.split(axes))
    try:
        values = np.asarray(values) if hasattr(values, "ndim") else values
        rows = [np.asarray(row) for row in values]
        rows = [np.asarray(values)] if rows and rows[0].ndim == rank - 1 else rows
    except (TypeError, ValueError):
        raise InputError(
            f"{name} must be one prompt's [{axes}], or a list of them"
        ) from None
    if not rows:
        raise InputError(f"{name} are empty; give at least one prompt")
    for i, row in enumerate(rows):
        if row.dtype.kind in "US":
            raise InputError(
                f"{name} are text; lm.tokenizer.encode(text).ids are its tokens"
            )
        if row.ndim != rank:
            raise InputError(
                f"prompt {i}: {name} have shape {list(row.shape)}; it must be [{axes}]"
            )
    return rows


def _prefill_lengths(length: int, max_prefill_length: int) -> tuple[int, int]:
    """To what length prompts are padded, and in pieces of how many tokens they are read.

    Pieces are as even as they can be, so that little padding is read.
    """
    padded_length = _round_up(length, LENGTH_MULTIPLE)
    num_pieces = -(-padded_length // max_prefill_length)
    max_prefill_length = -(-padded_length // num_pieces)
    return num_pieces * max_prefill_length, max_prefill_length


def _pad_left(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """[B, length, ...]: the rows, with zeros in front."""
    return np.stack(
        [
            np.pad(row, [(length - len(row), 0)] + [(0, 0)] * (row.ndim - 1))
            for row in rows
        ]
    )


def _broadcast_and_pad(
    name: str, values: ArrayLike, shape: tuple[int, ...], capacity: int = 0
) -> np.ndarray:
    """Values broadcast to `shape`, with ones behind up to `capacity` where that is given."""
    try:
        values = np.broadcast_to(np.asarray(values, np.float32), shape)
    except ValueError:
        raise InputError(
            f"{name} has shape {list(np.shape(values))}; it must broadcast to {list(shape)}"
        ) from None
    return (
        np.pad(values, [(0, 0), (0, capacity - shape[-1])], constant_values=1.0)
        if capacity
        else values
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def stop_tokens(
    stop: int | Sequence[int] | None, hf_fields: Mapping[str, Any], vocab_size: int
) -> np.ndarray:
    """The tokens that end a row, int [any number]; -1, which no token is, fills it up.

    Args:
      stop: the tokens, or none; if left out, those that
      hf_fields: name as eos_token_id.
      vocab_size: V.
    """
    name = "stop"
    if stop is None:
        name, stop = "field eos_token_id of config.json", hf_fields.get("eos_token_id")
    tokens = np.asarray(() if stop is None else stop)
    if tokens.size:
        check_integers(name, tokens, 0, vocab_size)
    num_padding = (
        _round_up(max(tokens.size, 1), 8) - tokens.size
    )  # one program for most numbers of them
    return np.append(tokens.ravel(), [-1] * num_padding).astype(np.int32)
