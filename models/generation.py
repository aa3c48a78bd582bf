"""Generation: continue prompts with tokens or vectors of any kind of model, in one compiled loop.

Prompts of different lengths share a batch by padding on the left with items of duration 0, which
continuous attention does not see and which take no time. So the new items of all rows have the same
index, and masks and positions are not needed.

    prefill        compute keys and values of the prompts, piece by piece
    append_item    sample the next item of each row
    decode_step    run the model on the last items, and append the next ones
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from continuous_lm.models.generative_model import GenerativeModel, generative_model
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params
from continuous_lm.models.samplers import Draw, Greedy, Sampler, check_key

__all__ = [
    "GREEDY",
    "LENGTH_MULTIPLE",
    "PROMPT_AXES",
    "RESULT_AXES",
    "STOP_MULTIPLE",
    "DecodeSpec",
    "DecodeState",
    "Generated",
    "Prompts",
    "Request",
    "append_item",
    "decode_step",
    "generate",
    "initial_state",
    "is_unfinished",
    "make_spec",
    "place_request",
    "prefill",
    "read_prompts",
    "slice_items",
    "stop_tokens",
]

# Lengths are rounded up to multiples of these, so that few programs are compiled.
LENGTH_MULTIPLE = 64
STOP_MULTIPLE = 8
GREEDY = Greedy()

# One prompt, or several: an array of them, or a list of different lengths.
Prompts = ArrayLike | Sequence[ArrayLike] | Sequence[Sequence[ArrayLike]]


class Generated(NamedTuple):
    """New tokens or vectors of B prompts, as NumPy arrays."""

    items: (
        np.ndarray
    )  # tokens int32 [B, T], 0 after a row's stop token; or vectors [B, T, W]
    lengths: np.ndarray  # int32 [B], the stop token included

    @property
    def tokens(self) -> np.ndarray:
        """The new tokens int32 [B, T].

        Raises:
          InputError: if they are vectors.
        """
        if self.items.ndim != 2:
            raise InputError("this model makes vectors; take `vectors`")
        return self.items

    @property
    def vectors(self) -> np.ndarray:
        """The new vectors, float [B, T, W].

        Raises:
          InputError: if they are tokens.
        """
        if self.items.ndim != 3:
            raise InputError("this model makes tokens; take `tokens`")
        return self.items

    def token_lists(self) -> list[list[int]]:
        """The new tokens of each prompt, up to and with its stop token."""
        tokens_and_lengths = zip(self.tokens, self.lengths, strict=True)
        return [row[:length].tolist() for row, length in tokens_and_lengths]


def generate(
    lm: LanguageModel[Any],
    prompts: Prompts,
    *,
    sampler: Sampler[Any] = GREEDY,
    max_new_tokens: int,
    durations: Prompts | None = None,
    start: ArrayLike = 0.0,
    new_durations: ArrayLike = 1.0,
    key: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
    max_prefill_length: int = 1024,
) -> Generated:
    """Continue prompts item by item: a token, a vector, or a chunk of C tokens at a time.

    The program is compiled for a batch size and for lengths rounded up to multiples of 64. Prompts
    of similar lengths and other temperatures and durations reuse it.

    Args:
      lm: a trunk, a density model or a next-vector model. If its parameters lie on a mesh, so does
        the computation.
      prompts: int tokens [B, T], or a list of B arrays [T] of different lengths. A trunk also takes
        embeddings, and a density model of vectors takes vectors: floats [B, T, W], or a list of B
        arrays [T, W]. Without the axis B they are one prompt.
      sampler: the sampler of items: `Greedy`, `Temperature`, or one of `models.density` and
        `models.calm`.
      max_new_tokens: largest number of new tokens, or vectors, of each prompt.
      durations: durations of the prompts' tokens, vectors or chunks: [B, T], or a list of B; 1 if
        omitted.
      start: the time at which each prompt begins, a scalar or [B].
      new_durations: d >= 0 of the new items: a scalar, [T] or [B, T], where T is `max_new_tokens`
        (over C, rounded up).
      key: PRNG key; needed unless the sampler is deterministic.
      stop: tokens that end a row, or () for none; config.json's eos_token_id if omitted.
      max_prefill_length: prompts go through the model in pieces of at most so many items, so that
        memory for their activations is bounded.

    LongRoPE's factors are chosen once for all rows, by the number of items of the longest prompt
    with the new ones.

    Raises:
      InputError: for arguments that do not fit, or if the sampler could not draw an item.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("max_prefill_length", max_prefill_length)
    model = generative_model(lm)
    loop_sampler = sampler.resolve(lm)
    key = _resolve_key(loop_sampler, key)
    rows, row_durations = read_prompts(lm, sampler, prompts, durations)
    max_length = max(map(len, rows))
    max_new_items = -(-max_new_tokens // model.tokens_per_item)
    padded_length, prefill_length = _prefill_lengths(max_length, max_prefill_length)
    spec = make_spec(lm, max_length + max_new_items, prefill_length)
    new_shape = (len(rows), max_new_items)
    request = Request(
        prompts=_pad_left(rows, padded_length),
        durations=_pad_left(row_durations, padded_length),
        start=_broadcast_start(start, len(rows)),
        new_durations=_pad_new_durations(new_durations, new_shape),
        stop=stop_tokens(lm, stop),
        max_new_items=np.int32(max_new_items),
        key=key,
    )
    new_items, lengths = _decode_loop(spec, lm.params, loop_sampler, request)
    items = np.asarray(new_items)[:, :max_new_items]
    if model.input_kind == "vectors":
        return Generated(items, np.asarray(lengths))
    _check_drawn(items, np.asarray(lengths), sampler)
    tokens = items.reshape(len(rows), -1)
    token_lengths = np.asarray(lengths) * model.tokens_per_item
    return _cut_after_stop(tokens, token_lengths, request.stop, max_new_tokens)


# --- The compiled loop ------------------------------------------------------------------------


class DecodeSpec(NamedTuple):
    """Static arguments of the compiled decoding loop, besides its sampler."""

    model: GenerativeModel
    prefill_length: int  # of the pieces in which prompts are read
    mesh: Mesh | None


def make_spec(
    lm: LanguageModel[Any], num_items: int, prefill_length: int
) -> DecodeSpec:
    """The spec for sequences of so many items, as the model would read all of them at once."""
    model = generative_model(lm)
    config = model.config.at_length(num_items)
    embedding = model.trunk_params(lm.params)["embedding"]
    mesh = axes_lib.mesh_of(embedding)
    return DecodeSpec(model.clone(config=config, remat=False), prefill_length, mesh)


class Request(NamedTuple):
    """The arrays of one call: B prompts and the limits of their new items."""

    prompts: ArrayLike  # [B, T] tokens, [B, T, W] vectors or [B, T, C] chunks; padded on the left
    durations: ArrayLike  # [B, T], 0 where there is padding
    start: ArrayLike  # [B]
    new_durations: ArrayLike  # [B, capacity]
    stop: ArrayLike  # int [...], tokens that end a row
    max_new_items: ArrayLike  # int []
    key: jax.Array


class DecodeState(NamedTuple):
    """State of the decoding loop for B rows."""

    num_items: jax.Array  # int [], new items of unfinished rows
    cache: KVCache  # of the prompts and all new items but the last
    new_items: jax.Array  # [B, capacity, ...]
    lengths: jax.Array  # int32 [B]
    is_done: jax.Array  # bool [B]


# The letters of the axes of prompts by their number: of tokens, and of vectors or chunks.
PROMPT_AXES = {2: "B T", 3: "B T D"}
# Results are whole on every device.
RESULT_AXES = {1: "-", 2: "- -", 3: "- - -"}


@functools.partial(jax.jit, static_argnums=0)
def _decode_loop(
    spec: DecodeSpec, params: Params, sampler: Sampler[Any], request: Request
) -> tuple[jax.Array, jax.Array]:
    """New items [B, capacity, ...], at most `max_new_items`, and the number of each row [B]."""
    request = place_request(spec.mesh, request)
    draw = sampler.draw_function(spec.model, params)
    hidden, cache = prefill(spec, params, request)
    state = initial_state(request, draw, hidden, cache)
    state = append_item(request, draw, hidden, state)
    has_more = functools.partial(is_unfinished, request)
    step = functools.partial(decode_step, spec, params, request, draw)
    state = lax.while_loop(has_more, step, state)
    item_axes = RESULT_AXES[state.new_items.ndim]
    new_items = axes_lib.place(spec.mesh, state.new_items, item_axes)
    return new_items, axes_lib.place(spec.mesh, state.lengths, RESULT_AXES[1])


def place_request(mesh: Mesh | None, request: Request) -> Request:
    """The request with its rows where the letters of their axes say."""
    place = functools.partial(axes_lib.place, mesh)
    return request._replace(
        prompts=place(request.prompts, PROMPT_AXES[np.ndim(request.prompts)]),
        durations=place(request.durations, "B T"),
        start=place(request.start, "B"),
        new_durations=place(request.new_durations, "B T"),
    )


def prefill(
    spec: DecodeSpec, params: Params, request: Request
) -> tuple[jax.Array, KVCache]:
    """The hidden states [B, D] at the prompts' last items, and the cache with room for new ones."""
    num_rows, capacity = np.shape(request.new_durations)
    padded_length = np.shape(request.durations)[1]
    config = spec.model.config
    dtype = spec.model.trunk_params(params)["embedding"].dtype
    cache = kv_cache.empty(config, padded_length + capacity, (num_rows,), dtype)
    cache = cache._replace(end_time=jnp.asarray(request.start))
    cache = kv_cache.place(spec.mesh, cache)

    def read_piece(
        i: jax.Array, carry: tuple[jax.Array | None, KVCache]
    ) -> tuple[jax.Array, KVCache]:
        _, cache = carry
        length = spec.prefill_length
        items = slice_items(request.prompts, i * length, length)
        durations = slice_items(request.durations, i * length, length)
        return spec.model.read_items(params, items, durations, cache)

    hidden, _ = jax.eval_shape(read_piece, jnp.int32(0), (None, cache))
    no_hidden = jnp.zeros(hidden.shape, hidden.dtype)
    num_pieces = padded_length // spec.prefill_length
    return lax.fori_loop(0, num_pieces, read_piece, (no_hidden, cache))


def initial_state(
    request: Request, draw: Draw, hidden: jax.Array, cache: KVCache
) -> DecodeState:
    """Return the state before the first item."""
    num_rows, capacity = np.shape(request.new_durations)
    none_done = jnp.zeros(num_rows, bool)
    item = jax.eval_shape(draw, request.key, hidden, none_done)
    return DecodeState(
        num_items=jnp.int32(0),
        cache=cache,
        new_items=jnp.zeros((num_rows, capacity, *item.shape[1:]), item.dtype),
        lengths=jnp.zeros(num_rows, jnp.int32),
        is_done=none_done,
    )


def append_item(
    request: Request, draw: Draw, hidden: jax.Array, state: DecodeState
) -> DecodeState:
    """Append the items that the sampler draws from hidden states [B, D]."""
    index, is_done = state.num_items, state.is_done
    item = draw(jax.random.fold_in(request.key, index), hidden, is_done)
    is_dropped = is_done.reshape(-1, *[1] * (item.ndim - 1))
    item = jnp.where(is_dropped, 0, item)
    new_items = lax.dynamic_update_slice_in_dim(
        state.new_items, item[:, None], index, axis=1
    )
    if jnp.issubdtype(item.dtype, jnp.integer):  # a token, or any of a chunk's
        is_end = jnp.isin(item, request.stop) | (item < 0)
        is_done = is_done | jnp.any(is_end.reshape(len(item), -1), axis=-1)
    return DecodeState(
        num_items=index + 1,
        cache=state.cache,
        new_items=new_items,
        lengths=state.lengths + ~state.is_done,
        is_done=is_done,
    )


def is_unfinished(request: Request, state: DecodeState) -> jax.Array:
    """Return whether any row is unfinished."""
    return (state.num_items < request.max_new_items) & ~jnp.all(state.is_done)


def decode_step(
    spec: DecodeSpec, params: Params, request: Request, draw: Draw, state: DecodeState
) -> DecodeState:
    """Run the model on the last items, and append the next ones."""
    index = state.num_items - 1
    last_items = slice_items(state.new_items, index, 1)
    durations = slice_items(request.new_durations, index, 1)
    hidden, cache = spec.model.read_items(params, last_items, durations, state.cache)
    return append_item(request, draw, hidden, state._replace(cache=cache))


def slice_items(rows: ArrayLike, start: jax.Array, length: int) -> jax.Array:
    """[B, length, ...]: of rows [B, T, ...], from index `start` on."""
    return lax.dynamic_slice_in_dim(jnp.asarray(rows), start, length, axis=1)


# --- Prompts ----------------------------------------------------------------------------------


def read_prompts(
    lm: LanguageModel[Any],
    sampler: Sampler[Any],
    prompts: Prompts,
    durations: Prompts | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the checked items [T, ...] of each prompt, and their durations [T].

    One dtype whatever was given, so that one program serves them all.
    """
    model = generative_model(lm)
    param_dtype = model.trunk_params(lm.params)["embedding"].dtype
    float_dtype = jnp.promote_types(param_dtype, jnp.float32)
    prompt_rows = _split_prompts(prompts)
    duration_rows: list[np.ndarray] | None = None
    if durations is not None:
        duration_rows = _split_rows("durations", durations, 1)
        if len(duration_rows) != len(prompt_rows):
            raise InputError(
                f"durations are given for {len(duration_rows)} prompts, and there are"
                f" {len(prompt_rows)} prompts"
            )
    item_rows = []
    item_durations = []
    for i, prompt in enumerate(prompt_rows):
        with about(f"prompt {i}"):
            items = sampler.prompt_items(lm, prompt)
            row_durations = np.ones(len(items))
            if duration_rows is not None:
                row_durations = duration_rows[i]
            model.check_prompt(items, row_durations)
        is_float = jnp.issubdtype(items.dtype, jnp.floating)
        item_rows.append(items.astype(float_dtype if is_float else np.int32))
        item_durations.append(row_durations.astype(np.float32))
    return item_rows, item_durations


def _split_prompts(prompts: Prompts) -> list[np.ndarray]:
    """Split prompts into arrays: int [T], or float [T, W], of each."""
    rows = _as_rows("prompts", prompts)
    is_float = jnp.issubdtype(rows[0].dtype, jnp.floating)
    required_kind = jnp.floating if is_float else jnp.integer
    for i, row in enumerate(rows):
        if row.dtype.kind in "US":
            raise InputError(
                "prompts are text; lm.tokenizer.encode(text).ids are its tokens"
            )
        if not row.size:
            raise InputError(f"prompt {i}: there are no tokens; give at least one")
        if not jnp.issubdtype(row.dtype, required_kind):
            raise InputError(
                f"prompts hold {row.dtype}; all must be integers, which are tokens, or all real"
                " numbers, which are vectors"
            )
    return _split_rows("prompts", prompts, 2 if is_float else 1)


def _as_rows(name: str, values: Prompts) -> list[np.ndarray]:
    """The entries of the first axis."""
    try:
        array_or_rows: Any = values
        if isinstance(values, jax.Array | np.ndarray | np.generic):
            array_or_rows = np.asarray(values)
        rows = [np.asarray(row) for row in array_or_rows]
    except (TypeError, ValueError):
        raise InputError(f"{name} must be one prompt's, or a list of them") from None
    if not rows:
        raise InputError(f"{name} are empty; give at least one prompt")
    return rows


def _split_rows(name: str, values: Prompts, rank: int) -> list[np.ndarray]:
    """The arrays of `rank` axes one by one, from one, from an array of them, or from a list."""
    rows = _as_rows(name, values)
    axes = "T" if rank == 1 else "T, W"
    if rows[0].ndim == rank - 1:
        try:
            rows = [np.asarray(values)]
        except ValueError:
            raise InputError(
                f"{name} must be one prompt's [{axes}], or a list of them"
            ) from None
    for i, row in enumerate(rows):
        if row.ndim != rank:
            raise InputError(
                f"prompt {i}: {name} have shape {list(row.shape)}; it must be [{axes}]"
            )
    return rows


def _prefill_lengths(length: int, max_prefill_length: int) -> tuple[int, int]:
    """Return the padded length of the prompts, and the length of a prefill piece.

    Pieces are as equal as possible, so that padding is short.
    """
    padded_length = _round_up(length, LENGTH_MULTIPLE)
    num_pieces = -(-padded_length // max_prefill_length)
    piece_length = -(-padded_length // num_pieces)
    return num_pieces * piece_length, piece_length


def _pad_left(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """[B, length, ...]: the rows, with zeros in front."""
    padded = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, length - len(row) :] = row
    return padded


# --- The other arguments ----------------------------------------------------------------------


def _broadcast_start(start: ArrayLike, num_rows: int) -> np.ndarray:
    """The time at which each row begins, float32 [B]."""
    check_numbers("start", start)
    return _broadcast("start", start, (num_rows,))


def _pad_new_durations(new_durations: ArrayLike, shape: tuple[int, int]) -> np.ndarray:
    """Return durations of new items float32 [B, capacity], broadcast to `shape` and padded."""
    check_numbers("new_durations", new_durations, 0.0)
    durations = _broadcast("new_durations", new_durations, shape)
    num_padding = -shape[1] % LENGTH_MULTIPLE
    return np.pad(durations, [(0, 0), (0, num_padding)], constant_values=1.0)


def _broadcast(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(values, np.float32), shape)
    except ValueError:
        raise InputError(
            f"{name} has shape {list(np.shape(values))}; it must broadcast to {list(shape)}"
        ) from None


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _resolve_key(sampler: Sampler[Any], key: jax.Array | None) -> jax.Array:
    """The key, checked; any one for a sampler that needs none."""
    if key is not None:
        return check_key(key)
    if sampler.is_random:
        raise InputError(
            "sampling at a temperature above 0 needs a key, such as jax.random.key(0)"
        )
    return jax.random.key(0)


def stop_tokens(lm: LanguageModel[Any], stop: int | Sequence[int] | None) -> np.ndarray:
    """The tokens that end a row, int [any number]; -1, which no token is, fills it up.

    Args:
      lm: the model, whose hf_fields name them in eos_token_id if
      stop: is None.
    """
    model = generative_model(lm)
    name = "stop"
    if model.input_kind == "vectors" and stop is not None:
        raise InputError("no vector ends a row; leave out stop")
    if stop is None and model.input_kind != "vectors":
        name = "field eos_token_id of config.json"
        stop = lm.hf_fields.get("eos_token_id")
    tokens = np.asarray(() if stop is None else stop)
    if tokens.size:
        check_integers(name, tokens, 0, model.config.vocab_size)
    # One program for most numbers of them.
    num_entries = _round_up(max(tokens.size, 1), STOP_MULTIPLE)
    padding = [-1] * (num_entries - tokens.size)
    return np.append(tokens.ravel(), padding).astype(np.int32)


# --- Results ----------------------------------------------------------------------------------


def _check_drawn(items: np.ndarray, lengths: np.ndarray, sampler: Sampler[Any]) -> None:
    """Raise InputError for rows whose last item the sampler could not draw."""
    for i, row in enumerate(items):
        if (row[: lengths[i]] < 0).any():
            raise InputError(
                f"prompt {i}: at new item {lengths[i] - 1}, {sampler.describe_failure()}"
            )


def _cut_after_stop(
    tokens: np.ndarray, lengths: np.ndarray, stop: ArrayLike, max_length: int
) -> Generated:
    """Rows of tokens up to and with their first stop token, wherever in a chunk it is."""
    tokens = tokens[:, :max_length].copy()
    lengths = np.minimum(lengths, max_length)
    is_stop = np.isin(tokens, stop)
    stop_lengths = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, max_length)
    lengths = np.minimum(lengths, stop_lengths).astype(np.int32)
    tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return Generated(tokens, lengths)
