"""Density models: the trunk under a head that is a density over the next vector.

lm = density.on(clm.load("apples"), density.heads.MixtureHead(width=96, depth=1), key=key)
lm.log_prob(tokens, durations=d)  # nats, [..., T - 1]
new = density.sample(lm, tokens, max_new=8, key=key)
"""

from continuous_lm.models.density import distributions, heads
from continuous_lm.models.density.checkpoint import load, save
from continuous_lm.models.density.model import (
    DensityLM,
    DensityModel,
    create,
    on,
    stand_in,
    standardised,
)
from continuous_lm.models.density.samplers import (
    WAYS,
    quantized,
    sample,
    steering_direction,
    token_rows,
)

__all__ = [
    "WAYS",
    "DensityLM",
    "DensityModel",
    "create",
    "distributions",
    "heads",
    "load",
    "on",
    "quantized",
    "sample",
    "save",
    "stand_in",
    "standardised",
    "steering_direction",
    "token_rows",
]
