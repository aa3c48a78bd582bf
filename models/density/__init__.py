"""Density models: the trunk under a head that is a density over the next vector.

head = density.heads.MixtureHead(width=96, depth=1)
lm = density.add_head(clm.load("apples"), head, key=key)
density.log_prob(lm, tokens, durations=d)  # nats, [..., T - 1]
new = density.sample(lm, tokens, max_new_items=8, key=key)

The functions here take a `LanguageModel[DensityModel]` and check their arguments. Under them are
the methods of `DensityModel`, pure functions of parameters and checked inputs.
"""

from continuous_lm.models.density import distributions, heads
from continuous_lm.models.density.checkpoint import has_head, load, save, trunk_of
from continuous_lm.models.density.model import DensityModel, standardize_table
from continuous_lm.models.density.samplers import (
    QUANTIZE_METHODS,
    quantize_to_tokens,
    sample,
    steering_direction,
)
from continuous_lm.models.density.scoring import (
    add_head,
    create,
    density_model,
    log_prob,
    loss,
    token_logits,
    token_table,
)

__all__ = [
    "QUANTIZE_METHODS",
    "DensityModel",
    "add_head",
    "create",
    "density_model",
    "distributions",
    "has_head",
    "heads",
    "load",
    "log_prob",
    "loss",
    "quantize_to_tokens",
    "sample",
    "save",
    "standardize_table",
    "steering_direction",
    "token_logits",
    "token_table",
    "trunk_of",
]
