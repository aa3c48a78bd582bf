"""Counted products are those of the traced program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from continuous_lm.analysis import flops
from continuous_lm.models import transformer, trunk_inputs
from continuous_lm.models.checkpoints import trunk
from tests.fixtures import tiny
from tests.fixtures.product_flops import product_flops

LLAMA = trunk.read_config(tiny.llama_config(model_type="llama", num_hidden_layers=3))
GPT2 = trunk.read_config(tiny.gpt2_config(model_type="gpt2", n_layer=3))
DENSE = transformer.Execution(implementation="dense")
NUM_TOKENS = 7


def abstract_params(config):
    model = transformer.Transformer(config)
    tokens = jnp.zeros(1, jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return nn.unbox(variables["params"])


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_a_token_in_all_layers(config):
    def logits(params, tokens):
        inputs = trunk_inputs.make_inputs(config, tokens)
        return transformer.forward(config, params, inputs, execution=DENSE).logits

    tokens = jnp.zeros(NUM_TOKENS, jnp.int32)
    traced = jax.make_jaxpr(logits)(abstract_params(config), tokens)
    scores = 4 * config.num_heads * config.head_dim * NUM_TOKENS * config.num_layers
    unembedding = 2 * config.hidden_size * config.vocab_size
    expected = NUM_TOKENS * (flops.token_flops(config) + scores + unembedding)
    assert product_flops(traced.jaxpr) == expected


def test_a_layer_by_hand():
    config = LLAMA
    width, head_width = config.hidden_size, config.head_dim
    weights = flops.layer_weights(config)
    assert weights.query == width * config.num_heads * head_width
    assert weights.key_value == 2 * width * config.num_kv_heads * head_width
    assert weights.output == weights.query
    assert weights.mlp == 3 * width * config.mlp_size
    assert flops.layer_weights(GPT2).mlp == 2 * GPT2.hidden_size * GPT2.mlp_size


def test_scores_of_later_tokens_are_not_counted_by_default():
    options = {"num_points": 1, "num_tokens": 8, "num_shared_tokens": 4}
    few = flops.continuation_flops(LLAMA, **options)
    every = flops.continuation_flops(LLAMA, **options, all_scores=True)
    products_per_key = 2 * LLAMA.num_heads * LLAMA.head_dim
    saved_keys = 4 * (8 - (8 + 4) / 2) * (LLAMA.num_layers - 1)
    assert every - few == 2 * products_per_key * saved_keys


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_flops_of_one_point_do_not_depend_on_the_length_of_its_prefix(config):
    def total_flops(num_shared):
        continuation = flops.continuation_flops(
            config, num_points=1, num_tokens=12, num_shared_tokens=num_shared
        )
        return flops.prefix_flops(config, num_shared) + continuation

    assert total_flops(4) == total_flops(0) == total_flops(8)
