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
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm import rotary
from continuous_lm.arguments import as_float, check_integers, check_numbers
from continuous_lm.attention import attend
from continuous_lm.attention.visibility import visible, window_times
from continuous_lm.durations import check as check_durations
from continuous_lm.durations import end_times, from_times
from continuous_lm.errors import InputError
from continuous_lm.models import kv_cache
from continuous_lm.models.config import ACTIVATIONS, TransformerConfig
from continuous_lm.models.kv_cache import KVCache

_KERNEL = nn.initializers.normal(0.02)
_ONES = nn.initializers.ones
_ZEROS = nn.initializers.zeros


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in at least float32 (Zhang & Sennrich, 1910.07467)."""
    wide = as_float(x)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / std * scale + bias over the last axis, in at least float32 (1607.06450)."""
    wide = as_float(x)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale + bias).astype(x.dtype)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] by a kernel [*out, D]: [..., *out], in the dtype of both.

    As one product of two matrices: over several axes at once XLA for CPUs would transpose copies.
    """
    *out, width = kernel.shape
    y = jnp.einsum("...d,ed->...e", x, kernel.reshape(-1, width))
    return y.reshape(*x.shape[:-1], *out)


class Clock(NamedTuple):
    """When the tokens are and how much they weigh, for every layer alike."""

    durations: jax.Array  # [..., S]
    steps: jax.Array | None  # [..., S] that windows sum; None: the durations
    first: jax.Array | None  # int [], index of the first query's token; None: T = S
    turns: jax.Array | None  # [..., T, R], rotary cosines and sines
    local_turns: jax.Array | None  # those of layers with a window, where they differ


class Memory(NamedTuple):
    """Keys and values of all layers, of tokens that came before; new ones are written into it."""

    keys: jax.Array  # [L, ..., S, K, H]
    values: jax.Array  # [L, ..., S, K, H]


class Prefix(NamedTuple):
    """One layer's keys and values of tokens that came before, which are only read."""

    keys: jax.Array  # [..., S, K, H]
    values: jax.Array  # [..., S, K, H]


class Layer(nn.Module):
    """A module with a config, whose parameters are declared by the letters of their axes."""

    config: TransformerConfig
    param_dtype: jnp.dtype = jnp.float32

    def weight(self, name: str, axes: str, init=_KERNEL) -> jax.Array:
        """The parameter `name`: its axes say its shape and how it is sharded."""
        letters = axes_lib.split(axes)
        shape = tuple(self.config.sizes[a] for a in letters)
        boxed = nn.with_logical_partitioning(init, letters)
        return cast(jax.Array, self.param(name, boxed, shape, self.param_dtype))


class Norm(Layer):
    """The config's norm over the last axis, with its learned scale."""

    axis: str = "D"

    @nn.compact
    def __call__(self, x):
        config, eps = self.config, self.config.norm_eps
        match config.norm:
            case "layer":
                scale = self.weight("scale", self.axis, _ONES)
                return layer_norm(x, scale, self.weight("bias", self.axis, _ZEROS), eps)
            case "rms_plus_one":
                wide = 1.0 + as_float(self.weight("scale", self.axis, _ZEROS))
                return rms_norm(as_float(x), wide, eps).astype(x.dtype)
        return rms_norm(x, self.weight("scale", self.axis, _ONES), eps)


class Attention(Layer):
    """Projections around `attend`."""

    implementation: str = "auto"

    @nn.compact
    def __call__(self, x, memory, clock, layer, local, at=None):
        config = self.config
        x_q = x if at is None else _pick(x, at)
        q = project(x_q, self.weight("q", "N H D"))
        k = project(x, self.weight("k", "K H D"))
        v = project(x, self.weight("v", "K H D"))
        if config.qkv_bias:
            q = q + self.weight("q_bias", "N H", _ZEROS)
            k = k + self.weight("k_bias", "K H", _ZEROS)
            v = v + self.weight("v_bias", "K H", _ZEROS)
        if config.qk_norm:
            q = Norm(config, self.param_dtype, axis="H", name="q_norm")(q)
            k = Norm(config, self.param_dtype, axis="H", name="k_norm")(k)
        if config.rope is not None:
            turns = clock.turns
            if clock.local_turns is not None:
                turns = jnp.where(local, clock.local_turns, turns)
            q = rotary.turn(q, turns if at is None else _pick(turns, at))
            k = rotary.turn(k, turns)
        if isinstance(memory, Prefix):
            k, v = _after(memory.keys, k), _after(memory.values, v)
        elif memory is not None:
            keys, k = kv_cache.remember(memory.keys, k, layer, clock.first)
            values, v = kv_cache.remember(memory.values, v, layer, clock.first)
            memory = Memory(keys, values)
        window: ArrayLike | None = config.window
        if window is not None and not all(config.windowed):
            window = jnp.where(local, window, jnp.inf)
        y = attend(
            q,
            k,
            v,
            clock.durations,
            scale=(config.query_width or config.head_dim) ** -0.5,
            softcap=config.attention_softcap,
            window=window,
            steps=clock.steps,
            first=clock.first,
            implementation=self.implementation,
        )
        o = self.weight("o", "D N H")
        heads = config.num_heads * config.head_dim
        y = project(y.reshape(*y.shape[:-2], heads), o.reshape(-1, heads))
        y = y + self.weight("o_bias", "D", _ZEROS) if config.output_bias else y
        return y, memory


class Mlp(Layer):
    """Two layers, the first gated (Shazeer, arXiv:2002.05202) or not."""

    @nn.compact
    def __call__(self, x):
        config, activation = self.config, ACTIVATIONS[self.config.activation]
        y = project(x, self.weight("up", "F D"))
        y = y + self.weight("up_bias", "F", _ZEROS) if config.mlp_bias else y
        if config.gated:
            gate = project(x, self.weight("gate", "F D"))
            gate = gate + self.weight("gate_bias", "F", _ZEROS) if config.mlp_bias else gate
            y = activation(gate) * y
        else:
            y = activation(y)
        y = project(y, self.weight("down", "D F"))
        return y + self.weight("down_bias", "D", _ZEROS) if config.mlp_bias else y


class Block(Layer):
    """One layer of the trunk, in the shape that `nn.scan` wants: carry in, carry out."""

    implementation: str = "auto"

    @nn.compact
    def __call__(self, carry, clock, layer, local, at=None):
        config, dtype = self.config, self.param_dtype
        x, memory = carry

        def after(name, y):
            return Norm(config, dtype, name=name)(y) if config.post_norms else y

        y = Norm(config, dtype, name="attention_norm")(x)
        attention = Attention(config, dtype, self.implementation, name="attention")
        y, memory = attention(y, memory, clock, layer, local, at)
        y = after("attention_post_norm", y)
        x = x if at is None else _pick(x, at)
        z = Norm(config, dtype, name="mlp_norm")(x if config.parallel else x + y)
        z = after("mlp_post_norm", Mlp(config, dtype, name="mlp")(z))
        return (x + y + z, memory), None


class Transformer(Layer):
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
        """Refuses arguments that do not fit; see `check`."""
        check(self.config, tokens, **arguments)

    @nn.compact
    def __call__(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: ArrayLike | None = None,
        durations: ArrayLike | None = None,
        start: ArrayLike | None = None,
        times: ArrayLike | None = None,
        at: ArrayLike | None = None,
        cache: KVCache | None = None,
        prefix: KVCache | None = None,
        hidden: bool = False,
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
          at: index of the token whose logits are wanted, an int or int [...] (-1: the last); only
            that position goes through the head.
          cache: of the tokens before these, as from `kv_cache.empty` or an earlier call. A cache
            too full for T more is refused outside of jit; inside, its last tokens are overwritten.
          prefix: the tokens before these, as `remember` gives them; for `at` alone. Its leading
            axes broadcast too, so that many continuations share it. The last layer's query and MLP
            then see that one position. Gradients for parameters take O(L) times their memory
            traffic: differentiate for the other arguments.
          hidden: return what the head reads instead of what it says.

        Returns:
          logits [..., T, V], or [..., V] with `at`; at least float32. With `hidden`: the normed
          states [..., T, D] or [..., D] in the parameters' dtype. With a cache: these, and the
          cache with these tokens in it.

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
            at=at,
            cache=cache,
            prefix=prefix,
        )
        table = self.weight("embedding", "V D")
        x = (
            table[jnp.asarray(tokens)]
            if embeddings is None
            else jnp.asarray(embeddings, table.dtype)
        )
        num_tokens = x.shape[-2]
        before = prefix if cache is None else cache
        if before is not None and start is None:
            start = before.end
        d, times, steps = _clock(x, durations, start, times)
        picked = () if at is None else jnp.shape(at)
        rows = () if before is None else before.end.shape
        batch = jnp.broadcast_shapes(x.shape[:-2], d.shape[:-1], times.shape[:-1], picked, rows)
        if prefix is None:
            x = jnp.broadcast_to(x, (*batch, *x.shape[-2:]))
        first, memory = None, None
        if cache is not None:
            first, memory = cache.filled, Memory(cache.keys, cache.values)
            num_tokens = cache.durations.shape[-1]
            if steps is not None:
                times = jnp.broadcast_to(times, (*rows, times.shape[-1]))
            steps = d if steps is None else from_times(times, cache.end)
            cache = cache._replace(
                durations=kv_cache.append(cache.durations, d, first),
                steps=kv_cache.append(cache.steps, steps, first),
                end=jnp.broadcast_to(times[..., -1], cache.end.shape),
                filled=first + x.shape[-2],
            )
            d, steps = cache.durations, cache.steps
        if prefix is not None:
            num_tokens = prefix.durations.shape[-1] + num_tokens
            steps = d if steps is None else from_times(times, prefix.end)
            asked = jnp.arange(x.shape[-2]) <= (jnp.asarray(at) % x.shape[-2])[..., None]
            # What comes later weighs nothing: the position asked for is then as good as the last.
            d, steps = (
                kv_cache.joined(old, jnp.where(asked, new, 0.0), axis=-1)
                for old, new in ((prefix.durations, d), (prefix.steps, steps))
            )

        config, dtype = self.config, self.param_dtype
        if config.scale_embeddings:
            x = x * jnp.sqrt(jnp.float32(config.hidden_size)).astype(x.dtype)
        if config.max_positions is not None:
            x = x + between_rows(self.weight("positions", "M D"), times - 1.0)
        turns = [
            None
            if rope is None
            else rotary.turns(
                rotary.angles(times, rope, config.head_dim, num_tokens), rope.amplitude
            )
            for rope in (config.rope, config.local_rope)
        ]
        clock, numbers = Clock(d, steps, first, *turns), jnp.arange(config.num_layers)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "L"},
        )
        if prefix is None:
            stack: Any = layers(config, dtype, self.implementation, name="layers")
            (x, memory), _ = stack((x, memory), clock, numbers, jnp.array(config.windowed))
            x = x if at is None else _pick(x, at)[..., 0, :]
        else:
            x = self._continue(x, batch, prefix, clock, at)[..., 0, :]
        x = Norm(config, dtype, name="final_norm")(x)
        if not hidden:
            head = table if config.tie_embeddings else self.weight("head", "V D")
            wide = jnp.promote_types(x.dtype, jnp.float32)
            x = jnp.einsum("...d,vd->...v", x, head, preferred_element_type=wide)
            if config.logits_softcap is not None:
                x = config.logits_softcap * jnp.tanh(x / config.logits_softcap)
        if cache is None or memory is None:
            return x
        return x, cache._replace(keys=memory.keys, values=memory.values)

    def remember(self, tokens: ArrayLike | None = None, **arguments: Any) -> KVCache:
        """What a call with `prefix` needs of these tokens; arguments as of `__call__`.

        Tokens of duration 0 may fill them up at the end, since nothing sees those.
        LongRoPE chooses by the tokens of one call: make its choice for the whole sequence first, by
        a config `at_length` of it.
        """
        given = tokens if tokens is not None else arguments["embeddings"][..., 0]
        leading = [np.shape(given)[:-1], np.shape(arguments.get("start", 0.0))]
        leading += [
            np.shape(arguments[name])[:-1] for name in ("durations", "times") if name in arguments
        ]
        dtype = self.variables["params"]["embedding"].dtype
        room = kv_cache.empty(
            self.config, np.shape(given)[-1], np.broadcast_shapes(*leading), dtype
        )
        return self(tokens, cache=room, at=-1, hidden=True, **arguments)[1]

    def _continue(
        self, x: jax.Array, batch: tuple[int, ...], prefix: KVCache, clock: Clock, at: Any
    ) -> jax.Array:
        """The states [*batch, 1, D] at `at` after all layers, of which the last does no more.

        While all of the batch have the same x, as before the first attention, its projections in
        the first layer are made once.
        """
        config = self.config
        block = Block(config, self.param_dtype, self.implementation, parent=None)
        stacks = nn.meta.unbox(self.variables["params"]["layers"]), prefix.keys, prefix.values

        def layer(x, i, at=None):
            # An index into the whole stacks: slices of them as operands of a loop would be copies.
            params, keys, values = jax.tree.map(lambda stack: stack[i], stacks)
            local = jnp.array(config.windowed)[i]
            carry = x, Prefix(keys, values)
            return block.apply({"params": params}, carry, clock, i, local, at)[0][0], None

        if self.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        last, full, done = config.num_layers - 1, (*batch, *x.shape[-2:]), 0
        if last and x.shape != full:
            x, done = layer(x, 0)[0], 1
        x = jnp.broadcast_to(x, full)
        if done < last:
            x, _ = jax.lax.scan(layer, x, np.arange(done, last))
        return layer(x, last, at)[0]


def between_rows(table: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of `table` [M, D] at real `positions` [..., T], linear in between, clamped to its ends.

    Returns:
      [..., T, D] in the table's dtype.
    """
    top = (
        table.shape[0] - 1.0
    )  # not clip: it would halve the derivative at 0, where sentences begin
    positions = jnp.where(positions < 0, 0.0, jnp.where(positions > top, top, positions))
    below = jnp.clip(positions.astype(jnp.int32), 0, max(table.shape[0] - 2, 0))
    share = (positions - below)[..., None]
    rows = (1.0 - share) * table[below] + share * table[below + 1]
    return rows.astype(table.dtype)


def check(
    config: TransformerConfig,
    tokens: ArrayLike | None = None,
    *,
    embeddings: ArrayLike | None = None,
    durations: ArrayLike | None = None,
    start: ArrayLike | None = None,
    times: ArrayLike | None = None,
    at: ArrayLike | None = None,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
) -> None:
    """Refuses arguments of `Transformer` that do not fit; values only where they are known.

    Raises:
      InputError: which argument is wrong, where, and how.
    """
    if tokens is not None and embeddings is None:
        shape = list(np.shape(tokens))
        if shape and shape[-1]:
            check_integers("tokens", tokens, 0, config.vocab_size)
    elif embeddings is not None and tokens is None:
        *shape, width = np.shape(embeddings) or (0,)
        if width != config.hidden_size:
            raise InputError(
                f"embeddings are {width} wide; they must be [..., T, {config.hidden_size}]"
            )
        check_numbers("embeddings", embeddings)
    else:
        raise InputError("give either tokens or embeddings")
    if not shape or not shape[-1]:
        raise InputError(
            "there are no tokens; tokens are [..., T] and embeddings [..., T, D], T >= 1"
        )
    n = shape[-1]
    if durations is not None:
        check_durations(durations, n)
        least = float(jnp.finfo(jnp.float32).tiny)  # less is nothing in float32
        if (
            cache is None
            and prefix is None
            and _known(durations)
            and not (np.asarray(durations)[..., 0] >= least).all()
        ):
            raise InputError(
                "durations: the first token has duration 0, so that nothing is there to attend to;"
                " give it a positive one, or leave it out"
            )
    if times is not None:
        if start is not None:
            raise InputError("times already say where the first token begins; leave out start")
        check_durations(times, n, "times", minimum=-np.inf)
    if start is not None:
        check_numbers("start", start)
    if at is not None:
        check_integers("at", at, -n, n)
    leading = {
        "tokens": shape[:-1],
        "durations": () if durations is None else jnp.shape(durations)[:-1],
        "times": () if times is None else jnp.shape(times)[:-1],
        "start": () if start is None else jnp.shape(start),
        "at": () if at is None else jnp.shape(at),
        "the cache": () if cache is None else cache.end.shape,
        "the prefix": () if prefix is None else prefix.end.shape,
    }
    axes_lib.check_leading(leading)
    if prefix is not None:
        if cache is not None or at is None:
            raise InputError(
                "a prefix needs `at`, the one position that is asked for, and no cache"
            )
        _check_shape(config, prefix, "prefix")
    elif cache is not None:
        _check_cache(config, cache, n, leading)
    elif durations is not None and times is not None and config.window is not None:
        _check_rows(durations, times, config.window)


def _check_cache(config: TransformerConfig, cache: KVCache, n: int, leading) -> None:
    """Refuses a cache of another model, for other sequences, or without room for n more tokens."""
    length = cache.durations.shape[-1]
    _check_shape(config, cache, "cache")
    if np.broadcast_shapes(*map(tuple, leading.values())) != cache.end.shape:
        raise InputError(
            f"the cache is for leading axes {list(cache.end.shape)}, and those of the arguments do"
            " not fit into them"
        )
    if _known(cache.filled) and int(cache.filled) + n > length:
        raise InputError(
            f"the cache holds {int(cache.filled)} tokens and has room for {length}: {n} more do not"
            " fit; make it longer"
        )


def _check_shape(config: TransformerConfig, cache: KVCache, what: str) -> None:
    """Refuses a cache or prefix of another model."""
    length = cache.durations.shape[-1]
    wanted = (config.num_layers, *cache.end.shape, length, config.num_kv_heads, config.head_dim)
    if cache.keys.shape != wanted:
        raise InputError(
            f"the {what}'s keys have shape {list(cache.keys.shape)}; this model's are"
            f" {list(wanted)}"
        )


def _check_rows(durations: ArrayLike, times: ArrayLike, window: float) -> None:
    """Refuses tokens that see nothing: all that lies in their window has duration 0."""
    if not (_known(durations) and _known(times)) or (np.asarray(durations) > 0).all():
        return  # every token sees itself
    times, d = as_float(times), as_float(durations)
    steps = from_times(times, times[..., 0])
    index = np.arange(d.shape[-1])
    seen = visible(index, index, window_times(steps), window) & (d > 0)[..., None, :]
    empty = np.argwhere(~np.asarray(seen.any(axis=-1)))
    if len(empty):
        raise InputError(
            f"durations: token {empty[0][-1]} has nothing to attend to, since all tokens within its"
            f" window of {window:g} have duration 0; give one of them a positive one"
        )


def _known(values: ArrayLike) -> bool:
    """Whether values can be looked at, as they can outside of jit."""
    return not isinstance(values, jax.core.Tracer)


def _clock(x, durations, start, times) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Durations and times [..., T], and the steps that windows sum (None: the durations)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    d = jnp.ones(x.shape[-2], wide) if durations is None else as_float(durations)
    if times is None:
        return d, end_times(d, 0.0 if start is None else start), None
    times = as_float(times)
    return d, times, from_times(times, times[..., 0])


def _pick(x: jax.Array, at: ArrayLike) -> jax.Array:
    """x [..., T, D] at index `at` (int or int [...]): [..., 1, D]; leading axes broadcast."""
    at = jnp.asarray(at) % x.shape[-2]
    batch = jnp.broadcast_shapes(x.shape[:-2], at.shape)
    x = jnp.broadcast_to(x, (*batch, *x.shape[-2:]))
    return jnp.take_along_axis(x, jnp.broadcast_to(at, batch)[..., None, None], axis=-2)


def _after(old: jax.Array, new: jax.Array) -> jax.Array:
    """Keys or values [..., S, K, H] of a prefix and then new ones."""
    return kv_cache.joined(old.astype(new.dtype), new, axis=-3)
