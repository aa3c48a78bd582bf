"""The shape of a transformer: one frozen description that every family fills in."""

import dataclasses
from collections.abc import Callable, Mapping

import jax

from continuous_lm.errors import InputError
from continuous_lm.rotary import Rope

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What a `Transformer` computes. Every field changes the mathematics; letters as in `axes`."""

    family: str = "llama"  # whose checkpoint layout it has: a key of models.families.FAMILIES
    vocab_size: int  # V
    hidden_size: int  # D
    mlp_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    norm_eps: float = 1e-5
    activation: str = "silu"
    rope: Rope = Rope()
    window: float | None = None  # in tokens of duration 1
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "mlp_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{name} is {size!r}; it must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.head_dim > 2**16:
            raise InputError(f"head_dim is {self.head_dim}; it must be at most {2**16}")
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; rotary pairs need an even width")
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}"
            )
        if self.window is not None and not self.window > 0:
            raise InputError(f"window is {self.window}; it must be positive, or None")

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
        }
