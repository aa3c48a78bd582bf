"""Density models: the trunk under a head that is a density over the next vector.

    head = density.heads.MixtureHead(width=96, depth=1)
    lm = density.add_head(clm.load("apples"), head, key=key)
    density.log_prob(lm, tokens, durations=d)  # nats, [..., T - 1]
    new = clm.generate(lm, tokens, sampler=density.NearestRow(), max_new_tokens=8, key=key)

The functions here take a `LanguageModel[DensityModel]` and check their arguments. Under them are
the methods of `DensityModel`, pure functions of parameters and checked inputs.
"""

from continuous_lm.models.density import distributions, heads
from continuous_lm.models.density.checkpoint import has_head, load, save, trunk_of
from continuous_lm.models.density.model import DensityModel, standardize_table
from continuous_lm.models.density.samplers import (
    DensitySampler,
    NearestRow,
    NextVector,
    Renormalized,
    Rerank,
    rerank,
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
    "DensityModel",
    "DensitySampler",
    "NearestRow",
    "NextVector",
    "Renormalized",
    "Rerank",
    "add_head",
    "create",
    "density_model",
    "distributions",
    "has_head",
    "heads",
    "load",
    "log_prob",
    "loss",
    "rerank",
    "save",
    "standardize_table",
    "steering_direction",
    "token_logits",
    "token_table",
    "trunk_of",
]
