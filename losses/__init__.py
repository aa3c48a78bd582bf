"""Losses: pure functions of arrays, and a table of what there is.

Likelihoods, in nats, of vectors [..., W]:
  gaussian_nll            scale for each dimension
  low_rank_gaussian_nll   that, and a factor of rank R
  full_gaussian_nll       any covariance, by its Cholesky factor
  mixture_nll             of any components, by their own losses
  gaussian_mixture_nll    of Gaussians with a scale for each dimension

Of a model that can only be sampled:
  energy_score            of vectors
  brier_n, brier_lm       of tokens

Of distributions over tokens:
  cross_entropy           in nats, by optax
  brier                   squared distance

Of latent vectors and codebooks:
  gaussian_kl             from the standard Gaussian, with a floor for each dimension
  codebook_loss           moves codes to vectors
  commitment_loss         holds vectors to codes
  code_entropy            sureness and use: `CodeEntropy`

All reduce the last axis alone (code_entropy and brier_lm give one number), keep leading axes, hold
sums in at least float32, and refuse arguments that do not fit. Values are looked at outside of jit
only. The densities are not probabilities: their losses can be negative.
"""

from continuous_lm.losses.brier import brier, brier_lm, brier_n
from continuous_lm.losses.cross_entropy import cross_entropy
from continuous_lm.losses.energy import energy_score
from continuous_lm.losses.gaussian import (
    full_gaussian_nll,
    gaussian_nll,
    low_rank_gaussian_nll,
)
from continuous_lm.losses.kl import gaussian_kl
from continuous_lm.losses.mixture import gaussian_mixture_nll, mixture_nll
from continuous_lm.losses.vector_quantization import (
    CodeEntropy,
    code_entropy,
    codebook_loss,
    commitment_loss,
)

__all__ = [
    "CodeEntropy",
    "brier",
    "brier_lm",
    "brier_n",
    "code_entropy",
    "codebook_loss",
    "commitment_loss",
    "cross_entropy",
    "energy_score",
    "full_gaussian_nll",
    "gaussian_kl",
    "gaussian_mixture_nll",
    "gaussian_nll",
    "low_rank_gaussian_nll",
    "mixture_nll",
]
