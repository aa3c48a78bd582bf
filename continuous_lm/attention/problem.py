"""The one argument list of all forms of attention, checked and completed."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from continuous_lm.arguments import check_shapes, is_integer
from continuous_lm.attention.visibility import WindowTimes, exact_end_times
from continuous_lm.errors import InputError


class AttentionProblem(NamedTuple):
    """Arguments of a form of attention, which returns y [..., T, K, G, H] in the weights' dtype.

    Leading axes broadcast. Scale, soft-cap and offset are Python numbers if they are known at
    compile time; some forms require that.
    """

    q: (
        jax.Array
    )  # queries [..., T, K, G, H], grouped by the key/value head that they read
    k: jax.Array  # keys [..., S, K, H]
    v: jax.Array  # values [..., S, K, H]
    key_weights: jax.Array  # d [..., S], at least float32
    scale: float | jax.Array  # of the scores
    softcap: float | jax.Array | None = None  # bound of the scores
    window: ArrayLike | None = None  # in tokens
    window_times: WindowTimes | None = None  # end times of the keys, for the window
    query_offset: int | jax.Array = 0  # index of the first query's own key

    @classmethod
    def make(
        cls,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        key_weights: jax.Array | None = None,
        *,
        scale: float | jax.Array | None = None,
        softcap: float | jax.Array | None = None,
        window: ArrayLike | None = None,
        intervals: jax.Array | None = None,
        query_offset: int | jax.Array | None = None,
    ) -> "AttentionProblem":
        """The problem of the arguments of `attention.attend`, with q [..., T, N, H].

        Shapes are not checked; see `check_arguments`.
        """
        num_queries, num_heads, head_width = q.shape[-3:]
        num_keys, num_kv_heads, _ = k.shape[-3:]
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        if key_weights is None:
            key_weights = jnp.ones(num_keys, dtype)
        key_weights = key_weights.astype(dtype)
        window_times = None
        if window is not None:
            intervals = key_weights if intervals is None else intervals.astype(dtype)
            window_times = exact_end_times(jax.lax.stop_gradient(intervals))
        group_size = num_heads // num_kv_heads
        return cls(
            q=q.reshape(*q.shape[:-2], num_kv_heads, group_size, head_width),
            k=k,
            v=v,
            key_weights=key_weights,
            scale=1.0 / math.sqrt(head_width) if scale is None else scale,
            softcap=softcap,
            window=window,
            window_times=window_times,
            query_offset=(
                num_keys - num_queries if query_offset is None else query_offset
            ),
        )

    @property
    def num_queries(self) -> int:
        return self.q.shape[-4]

    @property
    def num_keys(self) -> int:
        return self.k.shape[-3]

    @property
    def head_width(self) -> int:
        return self.q.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of scores, sums and the result."""
        return self.key_weights.dtype

    @property
    def static_scale(self) -> float:
        """The scale as a number; an InputError if it is traced."""
        return _static_number("scale", self.scale)

    @property
    def static_softcap(self) -> float | None:
        """The soft-cap as a number; an InputError if it is traced."""
        return None if self.softcap is None else _static_number("softcap", self.softcap)

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The arrays with gradients: q, k, v and key_weights."""
        return self.q, self.k, self.v, self.key_weights

    def as_function_of_arrays(
        self, attend: Callable[["AttentionProblem"], jax.Array]
    ) -> Callable[..., jax.Array]:
        """Return `attend` as a function of `arrays`; all other arguments are static."""

        def attend_arrays(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            key_weights: jax.Array,
        ) -> jax.Array:
            return attend(
                self._replace(
                    q=q,
                    k=k,
                    v=v,
                    key_weights=key_weights,
                )
            )

        return attend_arrays

    def flatten_batch(self) -> tuple[tuple[int, ...], "AttentionProblem"]:
        """The shape of the leading axes, and the problem with one axis B in their place."""
        batch_shape = jnp.broadcast_shapes(
            self.q.shape[:-4],
            self.k.shape[:-3],
            self.v.shape[:-3],
            self.key_weights.shape[:-1],
            *(times.shape[:-1] for times in self.window_times or ()),
        )

        def flatten(array: jax.Array, num_inner_axes: int) -> jax.Array:
            inner_shape = array.shape[array.ndim - num_inner_axes :]
            broadcast = jnp.broadcast_to(array, (*batch_shape, *inner_shape))
            return broadcast.reshape(math.prod(batch_shape), *inner_shape)

        problem = self._replace(
            q=flatten(self.q, 4),
            k=flatten(self.k, 3),
            v=flatten(self.v, 3),
            key_weights=flatten(self.key_weights, 1),
            window_times=jax.tree.map(
                lambda times: flatten(times, 1), self.window_times
            ),
        )
        return batch_shape, problem


def _static_number(name: str, value: float | jax.Array) -> float:
    """The number that a program is compiled for.

    Raises:
      InputError: if it is traced.
    """
    if isinstance(value, jax.core.Tracer):
        raise InputError(
            f"{name} is traced; this implementation needs a number, so make it static"
        )
    return float(value) if isinstance(value, jax.Array) else value


def find_array(values: Mapping[str, object]) -> str | None:
    """The name of the first value that is an array, where kernels need numbers."""
    names = (name for name, value in values.items() if isinstance(value, jax.Array))
    return next(names, None)


def check_arguments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_weights: jax.Array | None,
    intervals: jax.Array | None,
    window: ArrayLike | None,
    query_offset: int | jax.Array | None,
) -> None:
    """Raise InputError unless the arguments of `attention.attend` fit each other.

    Shapes always; the window and the offset where they are Python's numbers.
    """
    check_shapes(
        {
            "q": (q, "... T N H"),
            "k": (k, "... S K H"),
            "v": (v, "... S K H"),
            "key_weights": (key_weights, "... S"),
            "intervals": (intervals, "... S"),
        }
    )
    num_queries, num_heads, _ = q.shape[-3:]
    num_keys, num_kv_heads, _ = k.shape[-3:]
    if num_heads % num_kv_heads:
        raise InputError(
            f"{num_kv_heads} key/value heads do not divide {num_heads} query heads"
        )
    if num_queries > num_keys:
        raise InputError(
            f"{num_queries} queries for {num_keys} keys; queries are the last tokens of the keys"
        )
    last_offset = num_keys - num_queries
    if is_integer(query_offset) and not 0 <= query_offset <= last_offset:
        raise InputError(
            f"query_offset is {query_offset}; it must be from 0 to {last_offset}, or queries have"
            " no keys of their own"
        )
    if isinstance(window, int | float) and not window > 0:
        raise InputError(f"window is {window}; it must be above 0")
