"""One layer of the trunk: norms, attention, MLP and their parameters, as pure functions.

Kernels keep the checkpoints' order, outputs before inputs, so that loading them is one read with no
transposition. The functions take the parameters of one layer; `transformer` loops over layers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm import rotary
from continuous_lm.arguments import as_float
from continuous_lm.attention import AttentionProblem, attend_problem
from continuous_lm.models import kv_cache
from continuous_lm.models.config import ACTIVATIONS, TransformerConfig
from continuous_lm.models.parameters import (
    ONES,
    ZEROS,
    Declaration,
    Params,
    declare,
    with_prefix,
)

__all__ = [
    "CAPTURABLE",
    "TokenTiming",
    "attention",
    "layer_norm",
    "layer_table",
    "mlp",
    "norm",
    "norm_table",
    "project",
    "rms_norm",
    "take_position",
    "transformer_layer",
]

# The intermediates that `transformer.forward` can capture of each layer, [..., T, D] each.
CAPTURABLE = (
    "residual_before",  # the residual stream that enters the layer
    "attention_input",
    "attention_output",  # as it is added to the residual stream
    "mlp_input",
    "mlp_output",  # as it is added to the residual stream
)


class TokenTiming(NamedTuple):
    """Times and weights of the tokens, the same in every layer."""

    durations: jax.Array  # [..., S]
    intervals: jax.Array | None  # [..., S] that windows sum; None: the durations
    query_offset: jax.Array | None  # int [], index of the first query; None: T = S
    cos_sin: jax.Array | None  # [..., T, rotary_channels], rotary cosines and sines
    local_cos_sin: jax.Array | None  # those of layers with a window, where they differ


# --- Parameters -------------------------------------------------------------------------------


def layer_table(config: TransformerConfig, stack: str = "L ") -> dict[str, Declaration]:
    """The parameters of all layers, stacked on axis L, by their paths in a layer.

    Args:
      config: config of the model.
      stack: axes in front of those of one layer.
    """
    sizes = config.sizes
    attention = {
        "q": declare(sizes, stack + "N H D"),
        "k": declare(sizes, stack + "K H D"),
        "v": declare(sizes, stack + "K H D"),
        "o": declare(sizes, stack + "D N H"),
    }
    if config.qkv_bias:
        attention["q_bias"] = declare(sizes, stack + "N H", ZEROS)
        attention["k_bias"] = declare(sizes, stack + "K H", ZEROS)
        attention["v_bias"] = declare(sizes, stack + "K H", ZEROS)
    if config.output_bias:
        attention["o_bias"] = declare(sizes, stack + "D", ZEROS)
    mlp = {"up": declare(sizes, stack + "F D"), "down": declare(sizes, stack + "D F")}
    if config.gated:
        mlp["gate"] = declare(sizes, stack + "F D")
    if config.mlp_bias:
        mlp["up_bias"] = declare(sizes, stack + "F", ZEROS)
        mlp["down_bias"] = declare(sizes, stack + "D", ZEROS)
    if config.mlp_bias and config.gated:
        mlp["gate_bias"] = declare(sizes, stack + "F", ZEROS)
    table = with_prefix("attention", attention) | with_prefix("mlp", mlp)
    for name in ("attention_norm", "mlp_norm"):
        table |= with_prefix(name, norm_table(config, stack + "D"))
        if config.post_norms:
            post_name = name.replace("_norm", "_post_norm")
            table |= with_prefix(post_name, norm_table(config, stack + "D"))
    if config.qk_norm:
        for name in ("attention/q_norm", "attention/k_norm"):
            table |= with_prefix(name, norm_table(config, stack + "H"))
    return table


def norm_table(config: TransformerConfig, axes: str) -> dict[str, Declaration]:
    """The parameters of the config's norm over the last of these axes."""
    match config.norm:
        case "layer":
            scale = declare(config.sizes, axes, ONES)
            return {"scale": scale, "bias": declare(config.sizes, axes, ZEROS)}
        case "rms_plus_one":
            return {"scale": declare(config.sizes, axes, ZEROS)}
    return {"scale": declare(config.sizes, axes, ONES)}


# --- Norms and projections --------------------------------------------------------------------


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in at least float32 (Zhang & Sennrich, 1910.07467)."""
    x_float = as_float(x)
    mean_square = jnp.mean(jnp.square(x_float), axis=-1, keepdims=True)
    normalized = x_float * jax.lax.rsqrt(mean_square + eps)
    return normalized.astype(x.dtype) * scale


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> jax.Array:
    """(x - mean) / std * scale + bias over the last axis, in at least float32 (1607.06450)."""
    x_float = as_float(x)
    centered = x_float - jnp.mean(x_float, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(variance + eps)
    return (normalized * scale + bias).astype(x.dtype)


def norm(config: TransformerConfig, params: Params, x: jax.Array) -> jax.Array:
    """The config's norm over the last axis of x, in the dtype of x."""
    match config.norm:
        case "layer":
            return layer_norm(x, params["scale"], params["bias"], config.norm_eps)
        case "rms_plus_one":
            one_plus_scale = 1.0 + as_float(params["scale"])
            normalized = rms_norm(as_float(x), one_plus_scale, config.norm_eps)
            return normalized.astype(x.dtype)
    return rms_norm(x, params["scale"], config.norm_eps)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] by a kernel [*output_shape, D]: [..., *output_shape], in the dtype of both.

    As one product of two matrices: over several axes at once XLA for CPUs would transpose copies.
    """
    *output_shape, input_width = kernel.shape
    y = jnp.einsum("...D,dD->...d", x, kernel.reshape(-1, input_width))
    return y.reshape(*x.shape[:-1], *output_shape)


def take_position(x: jax.Array, position: ArrayLike) -> jax.Array:
    """x [..., T, D] at index `position` (int or int [...]): [..., 1, D]; leading axes broadcast."""
    position = jnp.asarray(position) % x.shape[-2]
    batch_shape = jnp.broadcast_shapes(x.shape[:-2], position.shape)
    x = jnp.broadcast_to(x, (*batch_shape, *x.shape[-2:]))
    row_index = jnp.broadcast_to(position, batch_shape)[..., None, None]
    return jnp.take_along_axis(x, row_index, axis=-2)


# --- Attention, MLP, layer --------------------------------------------------------------------


def attention(
    config: TransformerConfig,
    params: Params,
    x: jax.Array,
    timing: TokenTiming,
    past: kv_cache.Past,
    is_windowed: jax.Array,
    *,
    position: ArrayLike | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, kv_cache.Past]:
    """The attention of one layer: projections around `attend_problem`.

    Args:
      config: config of the model.
      params: parameters of the layer's attention.
      x: normalized residual stream [..., T, D].
      timing: timing of the tokens.
      past: keys and values of earlier tokens; None if there are none.
      is_windowed: bool [], whether this layer has the config's window.
      position: int or int [...], the only query to compute; all if omitted.
      implementation: form of attention, as in `attend_problem`.

    Returns:
      [..., T, D] ([..., 1, D] with a position), and the past with the new keys and values.
    """
    query_inputs = x if position is None else take_position(x, position)
    q = project(query_inputs, params["q"])
    k = project(x, params["k"])
    v = project(x, params["v"])
    if config.qkv_bias:
        q = q + params["q_bias"]
        k = k + params["k_bias"]
        v = v + params["v_bias"]
    if config.qk_norm:
        q = norm(config, params["q_norm"], q)
        k = norm(config, params["k_norm"], k)
    if timing.cos_sin is not None:
        cos_sin = timing.cos_sin
        if timing.local_cos_sin is not None:
            cos_sin = jnp.where(is_windowed, timing.local_cos_sin, cos_sin)
        query_cos_sin = (
            cos_sin if position is None else take_position(cos_sin, position)
        )
        q = rotary.apply_rotary(q, query_cos_sin)
        k = rotary.apply_rotary(k, cos_sin)
    k, v, past = kv_cache.extend(past, k, v, timing.query_offset)
    window: ArrayLike | None = config.window
    if window is not None and not all(config.windowed_layers):
        window = jnp.where(is_windowed, window, jnp.inf)
    problem = AttentionProblem.make(
        q,
        k,
        v,
        timing.durations,
        scale=(config.query_width or config.head_dim) ** -0.5,
        softcap=config.attention_softcap,
        window=window,
        intervals=timing.intervals,
        query_offset=timing.query_offset,
    )
    y = attend_problem(problem, implementation)
    heads_width = config.num_heads * config.head_dim
    heads = y.reshape(*y.shape[:-2], heads_width)
    output = project(heads, params["o"].reshape(-1, heads_width))
    return output + params["o_bias"] if config.output_bias else output, past


def mlp(config: TransformerConfig, params: Params, x: jax.Array) -> jax.Array:
    """Two linear maps, the first gated (Shazeer, arXiv:2002.05202) or not: [..., D] to [..., D]."""
    activation = ACTIVATIONS[config.activation]
    hidden = project(x, params["up"])
    if config.mlp_bias:
        hidden = hidden + params["up_bias"]
    if config.gated:
        gate = project(x, params["gate"])
        if config.mlp_bias:
            gate = gate + params["gate_bias"]
        hidden = activation(gate) * hidden
    else:
        hidden = activation(hidden)
    output = project(hidden, params["down"])
    return output + params["down_bias"] if config.mlp_bias else output


def transformer_layer(
    config: TransformerConfig,
    params: Params,
    x: jax.Array,
    timing: TokenTiming,
    past: kv_cache.Past,
    is_windowed: jax.Array,
    *,
    position: ArrayLike | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, kv_cache.Past, Mapping[str, jax.Array]]:
    """Apply one layer. Arguments are as in `attention`; `params` are the whole layer's.

    Returns:
      the residual stream [..., T, D] ([..., 1, D] with a position), the past with the new keys and
      values, and the intermediates named in `CAPTURABLE`.
    """
    attention_input = norm(config, params["attention_norm"], x)
    attention_output, past = attention(
        config,
        params["attention"],
        attention_input,
        timing,
        past,
        is_windowed,
        position=position,
        implementation=implementation,
    )
    if config.post_norms:
        attention_output = norm(config, params["attention_post_norm"], attention_output)
    residual = x if position is None else take_position(x, position)
    after_attention = residual + attention_output
    mlp_input = norm(
        config, params["mlp_norm"], residual if config.parallel else after_attention
    )
    mlp_output = mlp(config, params["mlp"], mlp_input)
    if config.post_norms:
        mlp_output = norm(config, params["mlp_post_norm"], mlp_output)
    intermediates = {
        "residual_before": x,
        "attention_input": attention_input,
        "attention_output": attention_output,
        "mlp_input": mlp_input,
        "mlp_output": mlp_output,
    }
    return after_attention + mlp_output, past, intermediates
