"""Floating-point operations of the matrix products of a transformer: two a multiplication.

Norms, rotations, softmaxes and activations are left out; they are a percent of a model of usual
size. A sweep is a prefix that all points share, computed once, and its points, which continue it.
"""

from typing import NamedTuple

from continuous_lm.models.config import TransformerConfig

__all__ = [
    "LayerWeights",
    "continuation_flops",
    "layer_weights",
    "prefix_flops",
    "token_flops",
]


class LayerWeights(NamedTuple):
    """Weights of one layer that a token is multiplied by."""

    query: int
    key_value: int
    output: int
    mlp: int

    @property
    def total(self) -> int:
        return sum(self)


def layer_weights(config: TransformerConfig) -> LayerWeights:
    """The weights of a layer's products; each is one multiplication a token."""
    query_width = config.num_heads * config.head_dim
    key_width = config.num_kv_heads * config.head_dim
    num_mlp_products = 3 if config.gated else 2
    return LayerWeights(
        query=config.hidden_size * query_width,
        key_value=2 * config.hidden_size * key_width,
        output=query_width * config.hidden_size,
        mlp=num_mlp_products * config.hidden_size * config.mlp_size,
    )


def token_flops(config: TransformerConfig) -> int:
    """Return FLOPs of one token in all layers, without scores and unembedding."""
    return 2 * config.num_layers * layer_weights(config).total


def prefix_flops(config: TransformerConfig, num_tokens: int) -> float:
    """Return FLOPs of the keys and values of `num_tokens` tokens, the last layer's only work.

    A token has scores with itself and earlier tokens.
    """
    weights = layer_weights(config)
    num_pairs = num_tokens**2 / 2
    score_products = _products_per_key(config) * num_pairs
    inner_layer = num_tokens * weights.total + score_products
    last_layer = num_tokens * weights.key_value
    return 2 * ((config.num_layers - 1) * inner_layer + last_layer)


def continuation_flops(
    config: TransformerConfig,
    *,
    num_points: int,
    num_tokens: int,
    num_shared_tokens: int,
    all_scores: bool = False,
) -> float:
    """Return FLOPs of the next token's logits at each point, after the shared tokens.

    The last layer computes keys and values of all later tokens, and the rest for one token of each
    point. The first layer computes queries, keys and values once for all points, unless positions
    are added to the embeddings.

    Args:
      config: config of the model.
      num_points: number of points, P.
      num_tokens: tokens of the prompt.
      num_shared_tokens: number of first tokens that all points share.
      all_scores: whether masked scores of later tokens are computed too, as in the dense form.
    """
    weights = layer_weights(config)
    num_new = num_tokens - num_shared_tokens
    num_keys = num_tokens if all_scores else (num_tokens + num_shared_tokens) / 2
    inner_layer = num_new * (weights.total + _products_per_key(config) * num_keys)
    last_layer = (
        num_new * weights.key_value
        + (weights.total - weights.key_value)
        + _products_per_key(config) * num_tokens
    )
    unembedding = config.hidden_size * config.vocab_size
    inner_layers = (config.num_layers - 1) * inner_layer
    products = num_points * (inner_layers + last_layer + unembedding)
    if config.num_layers > 1 and config.max_positions is None:
        projections = weights.query + weights.key_value
        products -= (num_points - 1) * num_new * projections
    return 2 * products


def _products_per_key(config: TransformerConfig) -> int:
    """Multiplications of a query's score with one key, and of its value, in one layer."""
    return 2 * config.num_heads * config.head_dim
