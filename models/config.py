"""The shape of a transformer: one frozen description that every family fills in."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import jax

from continuous_lm.arguments import check_count
from continuous_lm.errors import InputError
from continuous_lm.rotary import LongRope, Rope

__all__ = [
    "ACTIVATIONS",
    "NORM_KINDS",
    "TransformerConfig",
]

NORM_KINDS = ("rms", "rms_plus_one", "layer")
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

_SIZE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "mlp_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and constants of a `Transformer`; every field changes its output."""

    family: str = "llama"  # whose checkpoint layout it has: a key of FAMILIES
    vocab_size: int  # V
    hidden_size: int  # D
    mlp_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    norm: str = (
        "rms"  # "rms_plus_one": scales by 1 + w; "layer": mean removed, and a bias
    )
    norm_eps: float = 1e-5
    post_norms: bool = False  # norms after attention and MLP too
    qk_norm: bool = False  # an RMS norm over each head of q and k
    parallel: bool = False  # attention and MLP both read the layer's input
    activation: str = "silu"
    gated: bool = True
    rope: Rope | None = Rope()  # None: no rotary embedding
    local_rope: Rope | None = None  # of layers with a window, where theirs differs
    max_positions: int | None = None  # rows of a learned table of positions
    window: float | None = None  # in tokens of duration 1
    window_pattern: tuple[bool, ...] = (
        True,
    )  # which layers have it, repeated over the layers
    query_width: float | None = (
        None  # scores are divided by its root; head_dim if omitted
    )
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    scale_embeddings: bool = False  # by sqrt(hidden_size)
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                self._check_rope(rope)
        self._check_positions()

    def _check_sizes(self) -> None:
        for name in _SIZE_FIELDS:
            check_count(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.head_dim > 2**16:
            raise InputError(f"head_dim is {self.head_dim}; it must be at most {2**16}")
        for name in ("window", "query_width", "attention_softcap", "logits_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; it must be positive, or None")

    def _check_choices(self) -> None:
        choices = {"norm": NORM_KINDS, "activation": tuple(ACTIVATIONS)}
        for name, valid_names in choices.items():
            value = getattr(self, name)
            if value not in valid_names:
                raise InputError(
                    f"{name} {value!r} is not known; known are {', '.join(valid_names)}"
                )

    def _check_rope(self, rope: Rope) -> None:
        num_channels = self._num_rotary_channels(rope)
        if not 0 < rope.fraction <= 1 or num_channels % 2:
            raise InputError(
                f"{rope.fraction} of a head of {self.head_dim} channels cannot turn: that must"
                " be an even number of them"
            )
        if isinstance(rope.scaling, LongRope):
            num_factors = num_channels // 2
            if any(len(factors) != num_factors for factors in rope.scaling.factors):
                raise InputError(
                    "the rope scaling's short_factor and long_factor must be lists of"
                    f" {num_factors}"
                )

    def _check_positions(self) -> None:
        if (self.rope is None) == (self.max_positions is None):
            raise InputError(
                "a model needs either rope or max_positions, to tell times apart"
            )
        if self.max_positions is not None and self.max_positions < 1:
            raise InputError(
                f"max_positions is {self.max_positions}; it must be positive, or None"
            )
        if not self.window_pattern:
            raise InputError(
                "window_pattern is empty; it must say of each layer whether it has one"
            )
        if self.local_rope is not None and not self._turn_alike():
            raise InputError(
                "local_rope must turn the channels that rope turns, as strongly"
            )

    def _turn_alike(self) -> bool:
        """Return whether both ropes rotate the same channels with the same attention factor."""
        if self.rope is None or self.local_rope is None:
            return False
        has_same_fraction = self.local_rope.fraction == self.rope.fraction
        has_same_factor = self.local_rope.attention_factor == self.rope.attention_factor
        return has_same_fraction and has_same_factor

    def _num_rotary_channels(self, rope: Rope) -> int:
        return int(self.head_dim * rope.fraction)

    @property
    def windowed_layers(self) -> tuple[bool, ...]:
        """For each of the L layers, whether it has the window."""
        cycle = itertools.cycle(self.window_pattern)
        return tuple(
            self.window is not None and next(cycle) for _ in range(self.num_layers)
        )

    def at_length(self, num_tokens: int) -> "TransformerConfig":
        """The model for a sequence of so many tokens, however they are divided over calls."""
        rope = None if self.rope is None else self.rope.at_length(num_tokens)
        local_rope = self.local_rope
        if local_rope is not None:
            local_rope = local_rope.at_length(num_tokens)
        return dataclasses.replace(self, rope=rope, local_rope=local_rope)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.mlp_size,
            "L": self.num_layers,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
            "M": self.max_positions or 0,
        }
