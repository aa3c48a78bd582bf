"""The trunk: a decoder-only transformer over tokens that last any time, as pure functions.

    output = forward(config, params, trunk_inputs.make_inputs(config, tokens, durations=d))
    output.logits                                                           # [..., T, V]

`parameter_table` declares the parameters, `Transformer` holds them for Flax Linen. Every forward
pass scans `layers.transformer_layer` over layers that are stacked on a leading axis L. That
includes gradient checkpointing, a KV cache and a prefix.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from continuous_lm import rotary
from continuous_lm.arguments import as_float
from continuous_lm.attention.softmax import softcap
from continuous_lm.durations import durations_from_times, end_times
from continuous_lm.errors import InputError
from continuous_lm.inputs import Inputs
from continuous_lm.models import kv_cache, trunk_inputs
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.kv_cache import CachedLayer, KVCache, PrefixLayer
from continuous_lm.models.layers import (
    CAPTURABLE,
    TokenTiming,
    layer_table,
    norm,
    norm_table,
    take_position,
    transformer_layer,
)
from continuous_lm.models.parameters import (
    Declaration,
    ParameterModule,
    Params,
    declare,
    with_prefix,
)

__all__ = [
    "DEFAULT_EXECUTION",
    "Execution",
    "HiddenStates",
    "Output",
    "Transformer",
    "embed",
    "forward",
    "hidden_states",
    "interpolate_positions",
    "parameter_table",
    "prefill",
    "resolve_times",
    "scale_and_place",
    "token_timing",
    "unembed",
]


class Output(NamedTuple):
    """Results of a forward pass."""

    logits: jax.Array  # [..., T, V], or [..., V] with a position; at least float32
    hidden: jax.Array  # [..., T, D] or [..., D]: the states that the unembedding reads
    cache: KVCache | None  # with the new tokens in it, if one was given
    captured: Mapping[str, jax.Array]  # name -> [L, ..., T, D], of the names asked for


class HiddenStates(NamedTuple):
    """`Output` without the logits."""

    hidden: jax.Array
    cache: KVCache | None
    captured: Mapping[str, jax.Array]


class Execution(NamedTuple):
    """Options of a forward pass that change its results only by rounding.

    Attributes:
      implementation: form of attention; see `continuous_lm.attention.attend`.
      remat: gradient checkpointing: store only each layer's input, and recompute the rest in the
        backward pass.
      unroll: number of layers in one step of the compiled loop over layers.
    """

    implementation: str = "auto"
    remat: bool = False
    unroll: int = 1


DEFAULT_EXECUTION = Execution()

# --- The forward pass -------------------------------------------------------------------------


def forward(
    config: TransformerConfig,
    params: Params,
    inputs: Inputs,
    *,
    position: ArrayLike | None = None,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
    capture: tuple[str, ...] = (),
    execution: Execution = DEFAULT_EXECUTION,
) -> Output:
    """Return the logits of the next token at each token, or at one position.

    A pure function: jit it with `config`, `capture` and `execution` static. Values are not checked
    here; `trunk_inputs.make_inputs` does that.

    Args:
      config: config of the model.
      params: parameters, as in `parameter_table(config)`.
      inputs: tokens or embeddings with their durations, from `trunk_inputs.make_inputs`. Leading
        axes broadcast.
      position: index of the only token to return logits for, an int or int [...] (-1: the last).
        Only that position is unembedded.
      cache: KV cache of the tokens before these, from `kv_cache.empty` or an earlier call. If it
        has no room for T more, the last tokens are overwritten.
      prefix: the tokens before these, from `prefill`; only with `position`. Its leading axes
        broadcast, so many continuations share it. The last layer's query and MLP run only at that
        position. Gradients for parameters take O(L) times their memory traffic: use a prefix for
        gradients in the other arguments.
      capture: names of `layers.CAPTURABLE` intermediates to return for every layer; not available
        with a prefix.
      execution: options of the computation.
    """
    states = hidden_states(
        config,
        params,
        inputs,
        position=position,
        cache=cache,
        prefix=prefix,
        capture=capture,
        execution=execution,
    )
    return Output(unembed(config, params, states.hidden), *states)


def hidden_states(
    config: TransformerConfig,
    params: Params,
    inputs: Inputs,
    *,
    position: ArrayLike | None = None,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
    capture: tuple[str, ...] = (),
    execution: Execution = DEFAULT_EXECUTION,
) -> HiddenStates:
    """`forward` without the unembedding."""
    _check_capture(capture, prefix)
    embedded = embed(params, inputs)
    timing, times, cache = token_timing(
        config, embedded, inputs, position, cache, prefix
    )
    x = scale_and_place(config, params, embedded, times)
    full_batch = trunk_inputs.batch_shape(
        inputs, position, prefix if cache is None else cache
    )
    captured: Mapping[str, jax.Array] = {}
    if prefix is None:
        x = jnp.broadcast_to(x, (*full_batch, *x.shape[-2:]))
        x, cache, captured = _run_layers(
            config, params, x, timing, cache, capture, execution
        )
        x = x if position is None else take_position(x, position)[..., 0, :]
    else:
        x = _run_layers_after_prefix(
            config, params, x, timing, prefix, position, full_batch, execution
        )[..., 0, :]
    hidden = norm(config, params["final_norm"], x)
    return HiddenStates(hidden, cache, captured)


def _check_capture(capture: tuple[str, ...], prefix: KVCache | None) -> None:
    """Raise InputError for unknown names, and for a prefix, where layers skip positions."""
    for name in capture:
        if name not in CAPTURABLE:
            raise InputError(
                f"capture has {name!r}; it may have {', '.join(CAPTURABLE)}"
            )
    if capture and prefix is not None:
        raise InputError(
            "nothing can be captured after a prefix; leave one of them out"
        )


def embed(params: Params, inputs: Inputs) -> jax.Array:
    """Rows of the embedding table [..., T, D], or the embeddings that were given."""
    table = params["embedding"]
    if inputs.embeddings is not None:
        return jnp.asarray(inputs.embeddings, table.dtype)
    assert inputs.tokens is not None
    return table[inputs.tokens]


def scale_and_place(
    config: TransformerConfig, params: Params, embedded: jax.Array, times: jax.Array
) -> jax.Array:
    """The residual stream before the first layer, from embeddings [..., T, D] and end times."""
    x = embedded
    if config.scale_embeddings:
        x = x * jnp.sqrt(jnp.float32(config.hidden_size)).astype(x.dtype)
    if config.max_positions is not None:
        x = x + interpolate_positions(params["positions"], times - 1.0)
    return x


def unembed(config: TransformerConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [..., V], at least float32, of normalized hidden states [..., D]."""
    table = params["embedding"] if config.tie_embeddings else params["head"]
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=dtype)
    if config.logits_softcap is not None:
        logits = softcap(logits, config.logits_softcap)
    return logits


def prefill(
    config: TransformerConfig,
    params: Params,
    inputs: Inputs,
    execution: Execution = DEFAULT_EXECUTION,
) -> KVCache:
    """Keys and values of these tokens: the `prefix` of a later call.

    Tokens of duration 0 may fill them up at the end, since nothing sees those. LongRoPE chooses by
    the tokens of one call: make its choice for the whole sequence first, by a config `at_length` of
    it.
    """
    dtype = params["embedding"].dtype
    empty_cache = kv_cache.empty(config, inputs.num_tokens, inputs.batch_shape(), dtype)
    output = hidden_states(
        config, params, inputs, position=-1, cache=empty_cache, execution=execution
    )
    assert output.cache is not None
    return output.cache


# --- Time -------------------------------------------------------------------------------------


def token_timing(
    config: TransformerConfig,
    embedded: jax.Array,
    inputs: Inputs,
    position: ArrayLike | None,
    cache: KVCache | None,
    prefix: KVCache | None,
) -> tuple[TokenTiming, jax.Array, KVCache | None]:
    """The timing of all keys, the end times [..., T] of the new tokens, and the cache with both."""
    past = prefix if cache is None else cache
    durations, times, intervals = resolve_times(embedded, inputs, past)
    num_tokens = embedded.shape[-2]
    query_offset = None
    if cache is not None:
        query_offset = cache.num_tokens
        cache = _append_timing(cache, durations, times, intervals)
        durations, intervals = cache.durations, cache.intervals
        num_tokens = durations.shape[-1]
    elif prefix is not None:
        assert position is not None
        durations, intervals = _timing_after_prefix(
            prefix, durations, times, intervals, position
        )
        num_tokens = durations.shape[-1]
    timing = TokenTiming(
        durations,
        intervals,
        query_offset,
        _cos_sin(config, config.rope, times, num_tokens),
        _cos_sin(config, config.local_rope, times, num_tokens),
    )
    return timing, times, cache


def resolve_times(
    embedded: jax.Array, inputs: Inputs, past: KVCache | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Durations and end times [..., T], and the intervals of windows (None: the durations)."""
    durations = inputs.durations
    if durations is None:
        float_dtype = jnp.promote_types(embedded.dtype, jnp.float32)
        durations = jnp.ones(embedded.shape[-2], float_dtype)
    durations = as_float(durations)
    start = inputs.start
    if start is None and past is not None:
        start = past.end_time
    if inputs.times is None:
        return durations, end_times(durations, 0.0 if start is None else start), None
    times = as_float(inputs.times)
    before_first = times[..., 0] if past is None else past.end_time
    if past is not None:
        batch_shape = jnp.broadcast_shapes(times.shape[:-1], past.end_time.shape)
        times = jnp.broadcast_to(times, (*batch_shape, times.shape[-1]))
    return durations, times, durations_from_times(times, before_first)


def _append_timing(
    cache: KVCache,
    durations: jax.Array,
    times: jax.Array,
    intervals: jax.Array | None,
) -> KVCache:
    """The cache with the timing of new tokens; their keys and values come layer by layer."""
    intervals = durations if intervals is None else intervals
    offset = cache.num_tokens
    return cache._replace(
        durations=kv_cache.append(cache.durations, durations, offset),
        intervals=kv_cache.append(cache.intervals, intervals, offset),
        end_time=jnp.broadcast_to(times[..., -1], cache.end_time.shape),
        num_tokens=offset + times.shape[-1],
    )


def _timing_after_prefix(
    prefix: KVCache,
    durations: jax.Array,
    times: jax.Array,
    intervals: jax.Array | None,
    position: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Durations and intervals [..., S] of the prefix and the tokens up to `position`.

    The durations after `position` become 0, so that the last token is the requested one.
    """
    num_new = times.shape[-1]
    intervals = durations if intervals is None else intervals
    last_index = (jnp.asarray(position) % num_new)[..., None]
    is_up_to_position = jnp.arange(num_new) <= last_index
    durations = jnp.where(is_up_to_position, durations, 0.0)
    intervals = jnp.where(is_up_to_position, intervals, 0.0)
    durations = kv_cache.concatenate(prefix.durations, durations, axis=-1)
    return durations, kv_cache.concatenate(prefix.intervals, intervals, axis=-1)


def _cos_sin(
    config: TransformerConfig,
    rope: rotary.Rope | None,
    times: jax.Array,
    num_tokens: int,
) -> jax.Array | None:
    """Cosines and sines at `times`, if the config has this rope."""
    if rope is None:
        return None
    angles = rotary.angles(times, rope, config.head_dim, num_tokens)
    return rotary.cos_sin(angles, rope.attention_factor)


def interpolate_positions(table: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of `table` [M, D] at real `positions` [..., T], linear in between, clamped to its ends.

    Returns:
      [..., T, D] in the table's dtype.
    """
    # Not clip: it would halve the derivative at 0, where sentences begin.
    last_row = table.shape[0] - 1.0
    positions = jnp.where(positions > last_row, last_row, positions)
    positions = jnp.where(positions < 0, 0.0, positions)
    row_below = jnp.clip(positions.astype(jnp.int32), 0, max(table.shape[0] - 2, 0))
    fraction = (positions - row_below)[..., None]
    interpolated = (1.0 - fraction) * table[row_below] + fraction * table[row_below + 1]
    return interpolated.astype(table.dtype)


# --- Loops over layers ------------------------------------------------------------------------


def _run_layers(
    config: TransformerConfig,
    params: Params,
    x: jax.Array,
    timing: TokenTiming,
    cache: KVCache | None,
    capture: tuple[str, ...],
    execution: Execution,
) -> tuple[jax.Array, KVCache | None, Mapping[str, jax.Array]]:
    """x [..., T, D] through all layers, whose new keys and values go into the cache."""

    def run_layer(carry, scanned):
        x, keys_and_values = carry
        layer_params, layer_index, is_windowed = scanned
        past: kv_cache.Past = None
        if keys_and_values is not None:
            keys, values = keys_and_values
            past = CachedLayer(keys, values, layer_index)
        x, past, intermediates = transformer_layer(
            config,
            layer_params,
            x,
            timing,
            past,
            is_windowed,
            implementation=execution.implementation,
        )
        if isinstance(past, CachedLayer):
            keys_and_values = past.keys, past.values
        return (x, keys_and_values), {name: intermediates[name] for name in capture}

    if execution.remat:
        run_layer = jax.checkpoint(run_layer, prevent_cse=False)
    keys_and_values = None if cache is None else (cache.keys, cache.values)
    scanned = (
        params["layers"],
        jnp.arange(config.num_layers),
        jnp.array(config.windowed_layers),
    )
    (x, keys_and_values), captured = jax.lax.scan(
        run_layer, (x, keys_and_values), scanned, unroll=execution.unroll
    )
    if cache is not None and keys_and_values is not None:
        keys, values = keys_and_values
        cache = cache._replace(keys=keys, values=values)
    return x, cache, captured


def _run_layers_after_prefix(
    config: TransformerConfig,
    params: Params,
    x: jax.Array,
    timing: TokenTiming,
    prefix: KVCache,
    position: ArrayLike | None,
    batch_shape: tuple[int, ...],
    execution: Execution,
) -> jax.Array:
    """The states [*batch, 1, D] at `position`; the last layer computes that position alone.

    While all of the batch have the same x, as before the first attention, its projections in the
    first layer are made once.
    """
    stacks = params["layers"], PrefixLayer(prefix.keys, prefix.values)

    def run_layer(x, layer_index, position=None):
        # An index into the whole stacks: slices of them as operands of a loop would be copies.
        layer_params, past = jax.tree.map(lambda stack: stack[layer_index], stacks)
        is_windowed = jnp.array(config.windowed_layers)[layer_index]
        x, _, _ = transformer_layer(
            config,
            layer_params,
            x,
            timing,
            past,
            is_windowed,
            position=position,
            implementation=execution.implementation,
        )
        return x, None

    if execution.remat:
        run_layer = jax.checkpoint(run_layer, prevent_cse=False)
    last_layer = config.num_layers - 1
    full_shape = (*batch_shape, *x.shape[-2:])
    num_done = 0
    if last_layer and x.shape != full_shape:
        x, _ = run_layer(x, 0)
        num_done = 1
    x = jnp.broadcast_to(x, full_shape)
    if num_done < last_layer:
        layer_indices = np.arange(num_done, last_layer)
        x, _ = jax.lax.scan(run_layer, x, layer_indices, unroll=execution.unroll)
    return run_layer(x, last_layer, position)[0]


# --- Linen ------------------------------------------------------------------------------------


def parameter_table(config: TransformerConfig) -> dict[str, Declaration]:
    """Path -> axes, shape and initializer of every parameter, layers stacked on axis L."""
    table = {"embedding": declare(config.sizes, "V D")}
    if config.max_positions is not None:
        table["positions"] = declare(config.sizes, "M D")
    table |= with_prefix("layers", layer_table(config))
    table |= with_prefix("final_norm", norm_table(config, "D"))
    if not config.tie_embeddings:
        table["head"] = declare(config.sizes, "V D")
    return table


class Transformer(ParameterModule):
    """A causal transformer over continuous time, compatible with pretrained weights.

    `Transformer(config).apply({"params": params}, tokens, durations=d)` is a pure function of its
    arrays: jit, vmap, grad and shard it. `param_dtype` is used by `init` only. `apply` computes in
    the dtype of its parameters (norms, angles, attention and logits in at least float32). With a
    cache or a prefix, call `forward`.

    Attributes:
      config: sizes and constants of the model.
      param_dtype: dtype of the parameters that `init` makes.
      implementation: form of attention; see `Execution`.
      remat: gradient checkpointing; see `Execution`.
    """

    config: TransformerConfig
    param_dtype: DTypeLike = jnp.float32
    implementation: str = "auto"
    remat: bool = False

    @property
    def execution(self) -> Execution:
        """Options of the computation."""
        return Execution(self.implementation, self.remat)

    @property
    def input_kind(self) -> str:
        """Kind of the items; this and the next properties implement `GenerativeModel`."""
        return "tokens"

    @property
    def tokens_per_item(self) -> int:
        return 1

    def parameter_table(self) -> dict[str, Declaration]:
        return parameter_table(self.config)

    def trunk_params(self, params: Params) -> Params:
        """All of them."""
        return params

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] from hidden states [..., D]."""
        return unembed(self.config, params, hidden)

    def check_prompt(self, items: ArrayLike, durations: ArrayLike) -> None:
        """Raise InputError unless tokens [T] or embeddings [T, D] and durations [T] fit."""
        self._item_inputs(items, durations, None)

    def read_items(
        self,
        params: Params,
        items: jax.Array,
        durations: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """The hidden states [B, D] at the last of these items, and the cache with all of them.

        Args:
          params: parameters, as in `parameter_table`.
          items: int tokens [B, T] or embeddings [B, T, D].
          durations: d >= 0 [B, T].
          cache: KV cache of the earlier items.
        """
        states = hidden_states(
            self.config,
            params,
            self._item_inputs(items, durations, cache),
            position=-1,
            cache=cache,
            execution=self.execution,
        )
        assert states.cache is not None
        return states.hidden, states.cache

    def _item_inputs(
        self, items: ArrayLike, durations: ArrayLike, cache: KVCache | None
    ) -> Inputs:
        are_tokens = jnp.issubdtype(jnp.result_type(items), jnp.integer)
        return trunk_inputs.make_inputs(
            self.config,
            items if are_tokens else None,
            embeddings=None if are_tokens else items,
            durations=durations,
            cache=cache,
        )

    @nn.compact
    def __call__(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        times: ArrayLike | None = None,
        start: ArrayLike | None = None,
        position: ArrayLike | None = None,
    ) -> jax.Array:
        """Return the logits of the next token.

        Leading axes of the arguments are free and broadcast: tokens [T] with durations [P, T] give
        logits [P, T, V].

        Args:
          tokens: int [..., T].
          embeddings: [..., T, D] instead of tokens: rows of the embedding table, or any others.
          durations: d >= 0 of each token, [..., T]; 1 if omitted. They weight the keys. Without
            `times`, their cumulative sums are the tokens' end times.
          times: end time of each token, [..., T], instead of start + cumulative durations. Windows
            then compare these times.
          start: start time of the first token, scalar or [...]; 0 if omitted.
          position: index of the only token to return logits for, an int or int [...] (-1: the
            last). Only that position is unembedded.

        Returns:
          logits [..., T, V], or [..., V] with `position`; at least float32.

        Raises:
          InputError: for arguments that do not fit and, outside jit, for values out of range. That
            includes a token whose visible durations are all 0, such as a first token of duration 0:
            its attention would be 0 / 0. Inside jit its attention is 0.
        """
        inputs = trunk_inputs.make_inputs(
            self.config,
            tokens,
            embeddings=embeddings,
            durations=durations,
            times=times,
            start=start,
            position=position,
        )
        params = self.parameters(self.param_dtype)
        output = hidden_states(
            self.config, params, inputs, position=position, execution=self.execution
        )
        return unembed(self.config, params, output.hidden)
