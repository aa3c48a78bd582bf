"""Loss functions: pure functions of arrays.

Negative log-likelihoods of vectors [..., W], in nats:

- `gaussian_nll`: Gaussian with one scale for each dimension.
- `low_rank_gaussian_nll`: Gaussian with a diagonal plus rank-R covariance.
- `full_gaussian_nll`: Gaussian with any covariance, given by its Cholesky factor.
- `mixture_nll`: mixture of any components, given by their negative log-likelihoods.
- `gaussian_mixture_nll`: mixture of Gaussians with one scale for each dimension.

Scores of models that can be sampled but have no density:

- `energy_score`: score of sampled vectors.
- `brier_n`, `brier_lm`: scores of sampled tokens.

Losses of distributions over tokens:

- `cross_entropy`: cross-entropy in nats, computed by optax.
- `brier`: squared distance to the one-hot target.

Losses of latent vectors and codebooks:

- `gaussian_kl`: KL divergence from the standard Gaussian, with a floor for each dimension.
- `codebook_loss`: squared distance whose gradient moves codes to vectors.
- `commitment_loss`: squared distance whose gradient moves vectors to codes.
- `code_entropy`: entropy per vector and entropy of the mean assignment, as a `CodeEntropy`.

Every function reduces the last axis and keeps the leading axes, except `code_entropy` and
`brier_lm`, which return scalars. `energy_score` also reduces the axes of samples and targets, and
`brier_n` replaces the token axis by an axis of n-grams. Sums are computed in at least float32.
Arguments of the wrong shape or dtype raise `InputError`. Values are checked only outside jit.
Densities are not probabilities, so a negative log-likelihood can be negative.
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
