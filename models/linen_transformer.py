"""The trunk: a decoder-only transformer over tokens that last any time.

Linen modules name and hold parameters; the mathematics is in `continuous_lm.attention`, `.rotary`
and `.durations`. Layers are stacked on a leading axis L and scanned. Kernels keep the checkpoints'
order, outputs before inputs, so that loading them is one read with no transposition.
"""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm import rotary
from continuous_lm.arguments import as_float, check_integers, check_numbers
from continuous_lm.attention import attend
from continuous_lm.attention.visibility import exact_end_times, visibility_mask
from continuous_lm.durations import check_durations as check_durations
from continuous_lm.durations import durations_from_times, end_times
from continuous_lm.errors import InputError
from continuous_lm.models import kv_cache
from continuous_lm.models.config import ACTIVATIONS, TransformerConfig
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.parameters import Declaration

__all__ = [
    "Attention",
    "ConfigModule",
    "LayerCache",
    "Mlp",
    "Norm",
    "PrefixKeysValues",
    "TokenTiming",
    "Transformer",
    "TransformerLayer",
    "check_inputs",
    "interpolate_positions",
    "layer_norm",
    "project",
    "resolve_times",
    "rms_norm",
    "table_of_boxes",
]

_KERNEL_INIT = nn.initializers.normal(0.02)
_ONES_INIT = nn.initializers.ones
_ZEROS_INIT = nn.initializers.zeros


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in at least float32 (Zhang & Sennrich, 1910.07467)."""
    x_float = as_float(x)
    normalized = x_float * jax.lax.rsqrt(
        jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + eps
    )
    return normalized.astype(x.dtype) * scale


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> jax.Array:
    """(x - mean) / std * scale + bias over the last axis, in at least float32 (1607.06450)."""
    x_float = as_float(x)
    x_float = x_float - jnp.mean(x_float, axis=-1, keepdims=True)
    normalized = x_float * jax.lax.rsqrt(
        jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + eps
    )
    return (normalized * scale + bias).astype(x.dtype)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] by a kernel [*output_shape, D]: [..., *output_shape], in the dtype of both.

    As one product of two matrices: over several axes at once XLA for CPUs would transpose copies.
    """
    *output_shape, input_width = kernel.shape
    y = jnp.einsum("...D,dD->...d", x, kernel.reshape(-1, input_width))
    return y.reshape(*x.shape[:-1], *output_shape)


class TokenTiming(NamedTuple):
    """When the tokens are and how much they weigh, for every layer alike."""

    durations: jax.Array  # [..., S]
    intervals: jax.Array | None  # [..., S] that windows sum; None: the durations
    query_offset: (
        jax.Array | None
    )  # int [], index of the first query's token; None: T = S
    cos_sin: jax.Array | None  # [..., T, rotary_channels], rotary cosines and sines
    local_cos_sin: jax.Array | None  # those of layers with a window, where they differ


class LayerCache(NamedTuple):
    """Keys and values of all layers, of tokens that came before; new ones are written into it."""

    keys: jax.Array  # [L, ..., S, K, H]
    values: jax.Array  # [L, ..., S, K, H]


class PrefixKeysValues(NamedTuple):
    """One layer's keys and values of tokens that came before, which are only read."""

    keys: jax.Array  # [..., S, K, H]
    values: jax.Array  # [..., S, K, H]


class ConfigModule(nn.Module):
    """A module with a config, whose parameters are declared by the letters of their axes."""

    config: TransformerConfig
    param_dtype: jnp.dtype = jnp.float32

    def parameter(self, name: str, axes: str, initializer=_KERNEL_INIT) -> jax.Array:
        """The parameter `name`: its axes say its shape and how it is sharded."""
        letters = axes_lib.split(axes)
        shape = tuple(self.config.sizes[a] for a in letters)
        partitioned_init = nn.with_logical_partitioning(initializer, letters)
        return cast(
            jax.Array, self.param(name, partitioned_init, shape, self.param_dtype)
        )


class Norm(ConfigModule):
    """The config's norm over the last axis, with its learned scale."""

    axis: str = "D"

    @nn.compact
    def __call__(self, x):
        config, eps = self.config, self.config.norm_eps
        match config.norm:
            case "layer":
                scale = self.parameter("scale", self.axis, _ONES_INIT)
                return layer_norm(
                    x, scale, self.parameter("bias", self.axis, _ZEROS_INIT), eps
                )
            case "rms_plus_one":
                one_plus_scale = 1.0 + as_float(
                    self.parameter("scale", self.axis, _ZEROS_INIT)
                )
                return rms_norm(as_float(x), one_plus_scale, eps).astype(x.dtype)
        return rms_norm(x, self.parameter("scale", self.axis, _ONES_INIT), eps)


class Attention(ConfigModule):
    """Projections around `attend`."""

    implementation: str = "auto"

    @nn.compact
    def __call__(self, x, layer_cache, timing, layer_index, is_windowed, position=None):
        config = self.config
        query_inputs = x if position is None else _take_position(x, position)
        q = project(query_inputs, self.parameter("q", "N H D"))
        k = project(x, self.parameter("k", "K H D"))
        v = project(x, self.parameter("v", "K H D"))
        if config.qkv_bias:
            q = q + self.parameter("q_bias", "N H", _ZEROS_INIT)
            k = k + self.parameter("k_bias", "K H", _ZEROS_INIT)
            v = v + self.parameter("v_bias", "K H", _ZEROS_INIT)
        if config.qk_norm:
            q = Norm(config, self.param_dtype, axis="H", name="q_norm")(q)
            k = Norm(config, self.param_dtype, axis="H", name="k_norm")(k)
        if config.rope is not None:
            cos_sin = timing.cos_sin
            if timing.local_cos_sin is not None:
                cos_sin = jnp.where(is_windowed, timing.local_cos_sin, cos_sin)
            q = rotary.apply_rotary(
                q, cos_sin if position is None else _take_position(cos_sin, position)
            )
            k = rotary.apply_rotary(k, cos_sin)
        if isinstance(layer_cache, PrefixKeysValues):
            k, v = (
                _append_to_prefix(layer_cache.keys, k),
                _append_to_prefix(layer_cache.values, v),
            )
        elif layer_cache is not None:
            cached_keys, k = kv_cache.update_layer(
                layer_cache.keys, k, layer_index, timing.query_offset
            )
            cached_values, v = kv_cache.update_layer(
                layer_cache.values, v, layer_index, timing.query_offset
            )
            layer_cache = LayerCache(cached_keys, cached_values)
        window: ArrayLike | None = config.window
        if window is not None and not all(config.windowed_layers):
            window = jnp.where(is_windowed, window, jnp.inf)
        y = attend(
            q,
            k,
            v,
            timing.durations,
            scale=(config.query_width or config.head_dim) ** -0.5,
            softcap=config.attention_softcap,
            window=window,
            intervals=timing.intervals,
            query_offset=timing.query_offset,
            implementation=self.implementation,
        )
        output_kernel = self.parameter("o", "D N H")
        heads_width = config.num_heads * config.head_dim
        y = project(
            y.reshape(*y.shape[:-2], heads_width),
            output_kernel.reshape(-1, heads_width),
        )
        y = y + self.parameter("o_bias", "D", _ZEROS_INIT) if config.output_bias else y
        return y, layer_cache


class Mlp(ConfigModule):
    """Two layers, the first gated (Shazeer, arXiv:2002.05202) or not."""

    @nn.compact
    def __call__(self, x):
        config, activation = self.config, ACTIVATIONS[self.config.activation]
        y = project(x, self.parameter("up", "F D"))
        y = y + self.parameter("up_bias", "F", _ZEROS_INIT) if config.mlp_bias else y
        if config.gated:
            gate = project(x, self.parameter("gate", "F D"))
            gate = (
                gate + self.parameter("gate_bias", "F", _ZEROS_INIT)
                if config.mlp_bias
                else gate
            )
            y = activation(gate) * y
        else:
            y = activation(y)
        y = project(y, self.parameter("down", "D F"))
        return (
            y + self.parameter("down_bias", "D", _ZEROS_INIT) if config.mlp_bias else y
        )


class TransformerLayer(ConfigModule):
    """One layer of the trunk, in the shape that `nn.scan` wants: carry in, carry out."""

    implementation: str = "auto"

    @nn.compact
    def __call__(self, carry, timing, layer_index, is_windowed, position=None):
        config, dtype = self.config, self.param_dtype
        x, layer_cache = carry

        def post_norm(name, y):
            return Norm(config, dtype, name=name)(y) if config.post_norms else y

        y = Norm(config, dtype, name="attention_norm")(x)
        attention = Attention(config, dtype, self.implementation, name="attention")
        y, layer_cache = attention(
            y, layer_cache, timing, layer_index, is_windowed, position
        )
        y = post_norm("attention_post_norm", y)
        x = x if position is None else _take_position(x, position)
        z = Norm(config, dtype, name="mlp_norm")(x if config.parallel else x + y)
        z = post_norm("mlp_post_norm", Mlp(config, dtype, name="mlp")(z))
        return (x + y + z, layer_cache), None


class Transformer(ConfigModule):
    """A pretrained-compatible causal transformer over continuous time.

    `Transformer(config).apply({"params": params}, tokens, durations=d)` is a pure function of its
    arrays: jit, vmap, grad and shard it. `param_dtype` is that of `init` alone; `apply` computes in
    the dtype of the parameters that it gets (norms, angles, attention and logits in at least
    float32).

    Attributes:
      implementation: of attention; see `continuous_lm.attention.attend`.
      remat: keeps each layer's input alone for the backward pass, and computes the rest anew.
    """

    implementation: str = "auto"
    remat: bool = False

    def check(self, tokens: ArrayLike | None = None, **arguments) -> None:
        """Refuses arguments that do not fit; see `check_inputs`."""
        check_inputs(self.config, tokens, **arguments)

    @nn.compact
    def __call__(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        start: ArrayLike | None = None,
        times: ArrayLike | None = None,
        position: ArrayLike | None = None,
        cache: KVCache | None = None,
        prefix: KVCache | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Logits of the next token.

        Leading axes of the arguments are free and broadcast: tokens [T] with durations [P, T] give
        logits [P, T, V].

        Args:
          tokens: int [..., T].
          embeddings: [..., T, D] instead of tokens: rows of the embedding table, or any others.
          durations: d >= 0 of each token, [..., T]; 1 if left out. They weight the keys and, unless
            `times` is given, say when each token ends.
          start: the time at which the first token begins, scalar or [...]; 0 if left out, or the
            end of the cache's last token.
          times: when each token ends, [..., T], instead of start + cumulative durations. Windows
            then are differences of these times.
          position: index of the token whose logits are wanted, an int or int [...] (-1: the last);
            only that position goes through the head.
          cache: of the tokens before these, as from `kv_cache.empty` or an earlier call. A cache
            too full for T more is refused outside of jit; inside, its last tokens are overwritten.
          prefix: the tokens before these, as `prefill` returns them; only with `position`. Its
            leading axes broadcast too, so that many continuations share it. The last layer's query
            and MLP then see that one position. Gradients for parameters take O(L) times their
            memory traffic: differentiate for the other arguments.
          return_hidden: return what the head reads instead of what it says.

        Returns:
          logits [..., T, V], or [..., V] with `position`; at least float32. With `return_hidden`:
          the normed states [..., T, D] or [..., D] in the parameters' dtype. With a cache: these,
          and the cache with these tokens in it.

        Raises:
          InputError: for arguments that do not fit and, outside of jit, for values out of range. A
            token that sees no duration at all, such as a first one of duration 0, is refused: its
            attention would be 0 / 0 (inside jit it attends to nothing).
        """
        self.check(
            tokens,
            embeddings=embeddings,
            durations=durations,
            start=start,
            times=times,
            position=position,
            cache=cache,
            prefix=prefix,
        )
        embedding_table = self.parameter("embedding", "V D")
        x = (
            embedding_table[jnp.asarray(tokens)]
            if embeddings is None
            else jnp.asarray(embeddings, embedding_table.dtype)
        )
        num_tokens = x.shape[-2]
        past_cache = prefix if cache is None else cache
        if past_cache is not None and start is None:
            start = past_cache.end_time
        d, times, intervals = resolve_times(x, durations, start, times)
        position_shape = () if position is None else jnp.shape(position)
        past_shape = () if past_cache is None else past_cache.end_time.shape
        batch_shape = jnp.broadcast_shapes(
            x.shape[:-2], d.shape[:-1], times.shape[:-1], position_shape, past_shape
        )
        if prefix is None:
            x = jnp.broadcast_to(x, (*batch_shape, *x.shape[-2:]))
        query_offset, layer_cache = None, None
        if cache is not None:
            query_offset, layer_cache = (
                cache.num_tokens,
                LayerCache(cache.keys, cache.values),
            )
            num_tokens = cache.durations.shape[-1]
            if intervals is not None:
                times = jnp.broadcast_to(times, (*past_shape, times.shape[-1]))
            intervals = (
                d if intervals is None else durations_from_times(times, cache.end_time)
            )
            cache = cache._replace(
                durations=kv_cache.append(cache.durations, d, query_offset),
                intervals=kv_cache.append(cache.intervals, intervals, query_offset),
                end_time=jnp.broadcast_to(times[..., -1], cache.end_time.shape),
                num_tokens=query_offset + x.shape[-2],
            )
            d, intervals = cache.durations, cache.intervals
        if prefix is not None:
            num_tokens = prefix.durations.shape[-1] + num_tokens
            intervals = (
                d if intervals is None else durations_from_times(times, prefix.end_time)
            )
            is_up_to_position = (
                jnp.arange(x.shape[-2])
                <= (jnp.asarray(position) % x.shape[-2])[..., None]
            )
            # What comes later weighs nothing: the position asked for is then as good as the last.
            d, intervals = (
                kv_cache.concatenate(
                    past, jnp.where(is_up_to_position, new, 0.0), axis=-1
                )
                for past, new in ((prefix.durations, d), (prefix.intervals, intervals))
            )

        config, dtype = self.config, self.param_dtype
        if config.scale_embeddings:
            x = x * jnp.sqrt(jnp.float32(config.hidden_size)).astype(x.dtype)
        if config.max_positions is not None:
            x = x + interpolate_positions(
                self.parameter("positions", "M D"), times - 1.0
            )
        cos_sin_by_rope = [
            None
            if rope is None
            else rotary.cos_sin(
                rotary.angles(times, rope, config.head_dim, num_tokens),
                rope.attention_factor,
            )
            for rope in (config.rope, config.local_rope)
        ]
        timing, layer_indices = (
            TokenTiming(d, intervals, query_offset, *cos_sin_by_rope),
            jnp.arange(config.num_layers),
        )
        scanned_layer = nn.scan(
            nn.remat(TransformerLayer, prevent_cse=False)
            if self.remat
            else TransformerLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "L"},
        )
        if prefix is None:
            layer_stack: Any = scanned_layer(
                config, dtype, self.implementation, name="layers"
            )
            (x, layer_cache), _ = layer_stack(
                (x, layer_cache),
                timing,
                layer_indices,
                jnp.array(config.windowed_layers),
            )
            x = x if position is None else _take_position(x, position)[..., 0, :]
        else:
            x = self._run_layers_after_prefix(x, batch_shape, prefix, timing, position)[
                ..., 0, :
            ]
        x = Norm(config, dtype, name="final_norm")(x)
        if not return_hidden:
            unembedding = (
                embedding_table
                if config.tie_embeddings
                else self.parameter("head", "V D")
            )
            logits_dtype = jnp.promote_types(x.dtype, jnp.float32)
            x = jnp.einsum(
                "...d,vd->...v", x, unembedding, preferred_element_type=logits_dtype
            )
            if config.logits_softcap is not None:
                x = config.logits_softcap * jnp.tanh(x / config.logits_softcap)
        if cache is None or layer_cache is None:
            return x
        return x, cache._replace(keys=layer_cache.keys, values=layer_cache.values)

    def prefill(self, tokens: ArrayLike | None = None, **arguments: Any) -> KVCache:
        """What a call with `prefix` needs of these tokens; arguments as of `__call__`.

        Tokens of duration 0 may fill them up at the end, since nothing sees those.
        LongRoPE chooses by the tokens of one call: make its choice for the whole sequence first, by
        a config `at_length` of it.
        """
        token_axes = tokens if tokens is not None else arguments["embeddings"][..., 0]
        leading_shapes = [
            np.shape(token_axes)[:-1],
            np.shape(arguments.get("start", 0.0)),
        ]
        leading_shapes += [
            np.shape(arguments[name])[:-1]
            for name in ("durations", "times")
            if name in arguments
        ]
        dtype = self.variables["params"]["embedding"].dtype
        empty_cache = kv_cache.empty(
            self.config,
            np.shape(token_axes)[-1],
            np.broadcast_shapes(*leading_shapes),
            dtype,
        )
        return self(
            tokens, cache=empty_cache, position=-1, return_hidden=True, **arguments
        )[1]

    def _run_layers_after_prefix(
        self,
        x: jax.Array,
        batch_shape: tuple[int, ...],
        prefix: KVCache,
        timing: TokenTiming,
        position: Any,
    ) -> jax.Array:
        """The states [*batch, 1, D] at `position` after all layers, of which the last does no more.

        While all of the batch have the same x, as before the first attention, its projections in
        the first layer are made once.
        """
        config = self.config
        layer_module = TransformerLayer(
            config, self.param_dtype, self.implementation, parent=None
        )
        layer_stacks = (
            nn.meta.unbox(self.variables["params"]["layers"]),
            prefix.keys,
            prefix.values,
        )

        def run_layer(x, i, position=None):
            # An index into the whole stacks: slices of them as operands of a loop would be copies.
            params, keys, values = jax.tree.map(lambda stack: stack[i], layer_stacks)
            is_windowed = jnp.array(config.windowed_layers)[i]
            carry = x, PrefixKeysValues(keys, values)
            carry, _ = layer_module.apply(
                {"params": params}, carry, timing, i, is_windowed, position
            )
            return carry[0], None

        if self.remat:
            run_layer = jax.checkpoint(run_layer, prevent_cse=False)
        last_index, full_shape, num_done = (
            config.num_layers - 1,
            (*batch_shape, *x.shape[-2:]),
            0,
        )
        if last_index and x.shape != full_shape:
            x, num_done = run_layer(x, 0)[0], 1
        x = jnp.broadcast_to(x, full_shape)
        if num_done < last_index:
            x, _ = jax.lax.scan(run_layer, x, np.arange(num_done, last_index))
        return run_layer(x, last_index, position)[0]


def interpolate_positions(table: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of `table` [M, D] at real `positions` [..., T], linear in between, clamped to its ends.

    Returns:
      [..., T, D] in the table's dtype.
    """
    last_row = (
        table.shape[0] - 1.0
    )  # not clip: it would halve the derivative at 0, where sentences begin
    positions = jnp.where(
        positions < 0, 0.0, jnp.where(positions > last_row, last_row, positions)
    )
    row_below = jnp.clip(positions.astype(jnp.int32), 0, max(table.shape[0] - 2, 0))
    fraction = (positions - row_below)[..., None]
    interpolated = (1.0 - fraction) * table[row_below] + fraction * table[row_below + 1]
    return interpolated.astype(table.dtype)


def check_inputs(
    config: TransformerConfig,
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    start: ArrayLike | None = None,
    times: ArrayLike | None = None,
    position: ArrayLike | None = None,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
) -> None:
    """Refuses arguments of `Transformer` that do not fit; values only where they are known.

    Raises:
      InputError: which argument is wrong, where, and how.
    """
    if tokens is not None and embeddings is None:
        token_shape = list(np.shape(tokens))
        if token_shape and token_shape[-1]:
            check_integers("tokens", tokens, 0, config.vocab_size)
    elif embeddings is not None and tokens is None:
        *token_shape, embedding_width = np.shape(embeddings) or (0,)
        if embedding_width != config.hidden_size:
            raise InputError(
                f"embeddings are {embedding_width} wide; they must be [..., T,"
                f" {config.hidden_size}]"
            )
        check_numbers("embeddings", embeddings)
    else:
        raise InputError("give either tokens or embeddings")
    if not token_shape or not token_shape[-1]:
        raise InputError(
            "there are no tokens; tokens are [..., T] and embeddings [..., T, D], T >= 1"
        )
    num_tokens = token_shape[-1]
    if durations is not None:
        check_durations(durations, num_tokens)
        min_duration = float(jnp.finfo(jnp.float32).tiny)  # less is nothing in float32
        if (
            cache is None
            and prefix is None
            and _is_concrete(durations)
            and not (np.asarray(durations)[..., 0] >= min_duration).all()
        ):
            raise InputError(
                "durations: the first token has duration 0, so that nothing is there to attend to;"
                " give it a positive one, or leave it out"
            )
    if times is not None:
        if start is not None:
            raise InputError(
                "times already say where the first token begins; leave out start"
            )
        check_durations(times, num_tokens, "times", minimum=-np.inf)
    if start is not None:
        check_numbers("start", start)
    if position is not None:
        check_integers("position", position, -num_tokens, num_tokens)
    leading_shapes = {
        "tokens": token_shape[:-1],
        "durations": () if durations is None else jnp.shape(durations)[:-1],
        "times": () if times is None else jnp.shape(times)[:-1],
        "start": () if start is None else jnp.shape(start),
        "position": () if position is None else jnp.shape(position),
        "the cache": () if cache is None else cache.end_time.shape,
        "the prefix": () if prefix is None else prefix.end_time.shape,
    }
    axes_lib.broadcast_leading_axes(leading_shapes)
    if prefix is not None:
        if cache is not None or position is None:
            raise InputError(
                "a prefix needs `position`, the one position that is asked for, and no cache"
            )
        _check_cache_shape(config, prefix, "prefix")
    elif cache is not None:
        _check_cache(config, cache, num_tokens, leading_shapes)
    elif durations is not None and times is not None and config.window is not None:
        _check_visible_keys(durations, times, config.window)


def _check_cache(
    config: TransformerConfig, cache: KVCache, num_new: int, leading_shapes
) -> None:
    """Refuses a cache of another model, for other sequences, or without room for n more tokens."""
    capacity = cache.durations.shape[-1]
    _check_cache_shape(config, cache, "cache")
    if (
        np.broadcast_shapes(*map(tuple, leading_shapes.values()))
        != cache.end_time.shape
    ):
        raise InputError(
            f"the cache is for leading axes {list(cache.end_time.shape)}, and those of the"
            " arguments do"
            " not fit into them"
        )
    if _is_concrete(cache.num_tokens) and int(cache.num_tokens) + num_new > capacity:
        raise InputError(
            f"the cache holds {int(cache.num_tokens)} tokens and has room for {capacity}:"
            f" {num_new} more do not"
            " fit; make it longer"
        )


def _check_cache_shape(
    config: TransformerConfig, cache: KVCache, cache_name: str
) -> None:
    """Refuses a cache or prefix of another model."""
    capacity = cache.durations.shape[-1]
    expected_shape = (
        config.num_layers,
        *cache.end_time.shape,
        capacity,
        config.num_kv_heads,
        config.head_dim,
    )
    if cache.keys.shape != expected_shape:
        raise InputError(
            f"the {cache_name}'s keys have shape {list(cache.keys.shape)}; this model's are"
            f" {list(expected_shape)}"
        )


def _check_visible_keys(durations: ArrayLike, times: ArrayLike, window: float) -> None:
    """Refuses tokens that see nothing: all that lies in their window has duration 0."""
    if (
        not (_is_concrete(durations) and _is_concrete(times))
        or (np.asarray(durations) > 0).all()
    ):
        return  # every token sees itself
    times, d = as_float(times), as_float(durations)
    intervals = durations_from_times(times, times[..., 0])
    token_indices = np.arange(d.shape[-1])
    is_visible = (
        visibility_mask(
            token_indices, token_indices, exact_end_times(intervals), window
        )
        & (d > 0)[..., None, :]
    )
    blind_queries = np.argwhere(~np.asarray(is_visible.any(axis=-1)))
    if len(blind_queries):
        raise InputError(
            f"durations: token {blind_queries[0][-1]} has nothing to attend to, since all"
            " tokens within its"
            f" window of {window:g} have duration 0; give one of them a positive one"
        )


def _is_concrete(values: ArrayLike) -> bool:
    """Whether values can be looked at, as they can outside of jit."""
    return not isinstance(values, jax.core.Tracer)


def resolve_times(
    x, durations, start, times
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Durations and times [..., T], and the steps that windows sum (None: the durations)."""
    float_dtype = jnp.promote_types(x.dtype, jnp.float32)
    d = jnp.ones(x.shape[-2], float_dtype) if durations is None else as_float(durations)
    if times is None:
        return d, end_times(d, 0.0 if start is None else start), None
    times = as_float(times)
    return d, times, durations_from_times(times, times[..., 0])


def _take_position(x: jax.Array, position: ArrayLike) -> jax.Array:
    """x [..., T, D] at index `position` (int or int [...]): [..., 1, D]; leading axes broadcast."""
    position = jnp.asarray(position) % x.shape[-2]
    batch_shape = jnp.broadcast_shapes(x.shape[:-2], position.shape)
    x = jnp.broadcast_to(x, (*batch_shape, *x.shape[-2:]))
    return jnp.take_along_axis(
        x, jnp.broadcast_to(position, batch_shape)[..., None, None], axis=-2
    )


def _append_to_prefix(prefix_part: jax.Array, new_part: jax.Array) -> jax.Array:
    """Keys or values [..., S, K, H] of a prefix and then new ones."""
    return kv_cache.concatenate(prefix_part.astype(new_part.dtype), new_part, axis=-3)


def table_of_boxes(tree: Any) -> dict[str, Declaration]:
    """The parameter table of a tree that `jax.eval_shape(module.init, ...)` gives."""
    boxes = traverse_util.flatten_dict(
        tree, sep="/", is_leaf=lambda _, x: isinstance(x, nn.LogicallyPartitioned)
    )
    return {
        path: Declaration(cast(Any, box.names), box.value.shape, _KERNEL_INIT)
        for path, box in boxes.items()
    }
