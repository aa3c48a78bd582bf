"""Samples of density models: a vector is drawn, and mapped back to a token where tokens are read.

The ways back, `quantize=`, from a vector x to a token:

    euclidean      the row nearest to x
    cosine         the row whose angle with x is smallest
    rerank         of the k rows nearest to x, the one where the density is highest
    renormalised   no vector is drawn: the tokens' probabilities are proportional to the density at
                   their rows
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from continuous_lm import axes as axes_lib
from continuous_lm import quantize as quantize_lib
from continuous_lm.arguments import check_count, check_integers, check_numbers
from continuous_lm.errors import InputError
from continuous_lm.models.density.distributions import Categorical
from continuous_lm.models.density.model import DensityLM, DensityModel
from continuous_lm.models.generation import Generated, Program, prompt_rows, run, stop_tokens
from continuous_lm.models.samplers import check_sampling

WAYS = ("euclidean", "cosine", "rerank", "renormalised")


def sample(
    lm: DensityLM,
    tokens: ArrayLike | Sequence[ArrayLike] | None = None,
    *,
    max_new: int,
    vectors: ArrayLike | Sequence[ArrayLike] | None = None,
    durations: ArrayLike | Sequence[ArrayLike] | None = None,
    start: ArrayLike = 0.0,
    new_durations: ArrayLike = 1.0,
    temperature: float = 1.0,
    quantize: str = "euclidean",
    candidates: int = 16,
    direction: ArrayLike | None = None,
    strength: float = 0.0,
    key: jax.Array | None = None,
    stop: int | Sequence[int] | None = None,
    chunk: int = 1024,
) -> Generated | np.ndarray:
    """Continues prompts with draws from the density of each next vector.

    The program is compiled as that of `generate` is; temperature, direction and strength are values
    that it runs with.

    Args:
      lm: the density model.
      tokens: the prompts, as of `generate`, for a model that reads tokens, or
      vectors: [B, T, W], or a list of B [T, W], for one that reads vectors; [T, W] is one prompt.
      max_new: how many tokens or vectors each prompt gets, at most.
      durations: of the prompts, shaped as these; 1 if left out.
      start: the time at which each prompt begins, a scalar or [B].
      new_durations: d >= 0 of what is new: a scalar, [max_new] or [B, max_new].
      temperature: >= 0; see `densities`. At 0 the likeliest component's mean is taken.
      quantize: the way back to tokens; see the top of the module.
      candidates: k of "rerank".
      direction: [W], steers: each density is shifted by strength * direction before it is drawn
        from; see `steering_direction`.
      strength: 0 changes nothing, bit for bit.
      key: PRNG key; needed unless the temperature is 0.
      stop: tokens that end a row, or () for none; the trunk's eos_token_id if left out.
      chunk: prompts go through the model in pieces of at most so many.

    Returns:
      `Generated` tokens, or the new vectors, float [B, max_new, W]; on the host.

    Raises:
      InputError: for arguments that do not fit.
    """
    for name, count in {"max_new": max_new, "chunk": chunk, "candidates": candidates}.items():
        check_count(name, count)
    check_sampling(temperature, None, key)
    if quantize not in WAYS:
        raise InputError(f"quantize is {quantize!r:.60}; it must be one of {', '.join(WAYS)}")
    check_numbers("strength", strength)
    if np.ndim(strength):
        raise InputError(f"strength has shape {list(np.shape(strength))}; it must be a scalar")
    model, trunk = lm.model, lm.params["trunk"]
    kind, given, wrong = "tokens", tokens, vectors
    if model.reads == "vectors":
        kind, given, wrong = "vectors", vectors, tokens
    if given is None or wrong is not None:
        raise InputError(f"this model reads {kind}; give {kind} alone as its prompts")
    if kind == "vectors" and stop is not None:
        raise InputError("no vector ends a row; leave out stop")
    item = np.dtype(np.int32 if kind == "tokens" else np.float32)
    rows, d = prompt_rows(model, kind, given, durations, item)

    options: dict[str, Any] = {"temperature": np.float32(temperature)}
    if direction is not None:
        if model.speaks:
            raise InputError("a token head has no mean to shift; leave out direction")
        if np.shape(direction) != (model.head.width,):
            raise InputError(
                f"direction has shape {list(np.shape(direction))}; it must be [{model.head.width}]"
            )
        check_numbers("direction", direction)
        options["shift"] = np.float32(strength) * np.asarray(direction, np.float32)
    elif strength:
        raise InputError("strength needs a direction to steer along")
    if kind == "tokens" and not model.speaks:
        table = token_rows(lm)
        if quantize == "rerank" and candidates > len(table):
            raise InputError(f"candidates is {candidates}, but there are {len(table)} tokens")
        options |= {"rows": table, "norms": quantize_lib.squared_norms(table)}
    how = Program(
        model,
        kind,
        kind,
        _Draw(model, quantize, candidates),
        lm.config,
        chunk,
        axes_lib.mesh_of(trunk["embedding"]),
    )
    new, lengths = run(
        how,
        lm.params,
        rows,
        d,
        max_new=max_new,
        start=start,
        new_durations=new_durations,
        options=options,
        stop=stop_tokens(() if kind == "vectors" else stop, lm.notes, lm.config.vocab_size),
        key=jax.random.key(0) if key is None or temperature == 0 else key,
        dtype=trunk["embedding"].dtype,
    )
    return new if kind == "vectors" else Generated(new, lengths)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """The next tokens or vectors from hidden states."""

    model: DensityModel
    way: str
    candidates: int

    def __call__(self, params, options, key, hidden, done):
        variables: Any = {"params": params}
        density: Any = self.model.apply(variables, hidden, method="distribution")
        temperature = options["temperature"]
        if self.model.speaks:
            return density.sample(key, temperature)
        if "shift" in options:
            density = density.shifted(options["shift"])
        if self.model.reads == "tokens" and self.way == "renormalised":
            return Categorical(density.log_probs(options["rows"])).sample(key, temperature)
        x = density.sample(key, temperature)
        if self.model.reads == "vectors":
            return x
        return quantized(self.way, density, x, options, candidates=self.candidates)


def quantized(
    way: str,
    density: Any,
    x: jax.Array,
    table: dict[str, jax.Array],
    *,
    candidates: int = 16,
) -> jax.Array:
    """Tokens int32 [...] from vectors [..., W], by one of `WAYS` that goes through a vector.

    Args:
      way: "euclidean", "cosine" or "rerank"; see the top of the module.
      density: that the vectors were drawn from, with the same leading axes.
      x: the vectors.
      table: "rows" [V, W], and "norms", their squared norms [V].
      candidates: k of "rerank".
    """
    rows, norms = table["rows"], table["norms"]
    if way == "rerank":
        near = quantize_lib.k_nearest(x, rows, candidates, norms=norms).indices
        at_rows = jax.vmap(density.log_prob, in_axes=-2, out_axes=-1)(rows[near])
        best = jnp.argmax(at_rows, axis=-1)[..., None]
        return jnp.take_along_axis(near, best, axis=-1)[..., 0]
    return quantize_lib.nearest(x, rows, metric=way, norms=norms).indices


def token_rows(lm: DensityLM) -> jax.Array:
    """The tokens' vectors [V, W], as the head predicts them."""
    return cast(jax.Array, lm.model.apply({"params": lm.params}, method="rows"))


def steering_direction(
    lm: DensityLM, towards: Sequence[int], away: Sequence[int] = ()
) -> jax.Array:
    """The mean of some tokens' vectors less that of others', [W].

    Args:
      lm: a density model that reads tokens.
      towards: tokens.
      away: tokens; if there are none, the mean of all.
    """
    if lm.model.reads != "tokens" or lm.model.speaks:
        raise InputError("only a density over a table of tokens can be steered by tokens")
    rows = token_rows(lm)
    for name, tokens in {"towards": towards, "away": away}.items():
        if not len(tokens) and name == "towards":
            raise InputError("towards is empty; name at least one token")
        if len(tokens):
            check_integers(name, np.asarray(tokens), 0, len(rows))
    other = jnp.mean(rows[np.asarray(away, int)] if len(away) else rows, axis=0)
    return jnp.mean(rows[np.asarray(towards, int)], axis=0) - other
