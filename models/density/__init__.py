"""Density models: the trunk under a head that is a density over the next vector.

lm = density.add_head(clm.load("apples"), density.heads.MixtureHead(width=96, depth=1), key=key)
lm.log_prob(tokens, durations=d)  # nats, [..., T - 1]
new = density.sample(lm, tokens, max_new_items=8, key=key)
"""

from continuous_lm.models.density import distributions, heads
from continuous_lm.models.density.checkpoint import load, save
from continuous_lm.models.density.model import (
    DensityLM,
    DensityModel,
    add_head,
    create,
    example_inputs,
    standardize_table,
)
from continuous_lm.models.density.samplers import (
    QUANTIZE_METHODS,
    get_token_table,
    quantize_to_tokens,
    sample,
    steering_direction,
)

__all__ = [
    "QUANTIZE_METHODS",
    "DensityLM",
    "DensityModel",
    "add_head",
    "create",
    "distributions",
    "example_inputs",
    "get_token_table",
    "heads",
    "load",
    "quantize_to_tokens",
    "sample",
    "save",
    "standardize_table",
    "steering_direction",
]
