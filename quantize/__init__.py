"""Vector quantization: mapping vectors to codes, the rows of a codebook.

Reduced-precision arithmetic, such as int8, is not part of this package.

- Exact search: `nearest`, `k_nearest`, `distance`, `squared_norms`.
- A learned codebook: `init`, `quantize`, `lookup`, `update_ema`, `revive`.
- A residual quantizer (several codebooks, each for the residuals of the previous one):
  `init_residual`, `quantize_residual`, `lookup_residual`, `update_residual_ema`, `revive_residual`.
- Finite scalar quantization (fixed levels, no codebook): `quantize_finite`, `finite_bound`,
  `finite_indices`, `finite_vectors`.
- Gradients through a quantizer: `straight_through`, `rotation_trick`.
- A codebook from data: `kmeans`.
- Diagnostics: `code_use`, `quantization_noise`, `spread`.
"""

from continuous_lm.quantize.diagnostics import (
    CodeUse,
    QuantizationNoise,
    VectorSpread,
    code_use,
    quantization_noise,
    spread,
)
from continuous_lm.quantize.fsq import (
    FiniteQuantized,
    finite_bound,
    finite_indices,
    finite_vectors,
    quantize_finite,
)
from continuous_lm.quantize.kmeans import Clusters, kmeans
from continuous_lm.quantize.nearest import (
    METRICS,
    Neighbours,
    distance,
    k_nearest,
    nearest,
    squared_norms,
)
from continuous_lm.quantize.rvq import (
    init_residual,
    lookup_residual,
    quantize_residual,
    revive_residual,
    update_residual_ema,
)
from continuous_lm.quantize.straight_through import (
    GRADIENTS,
    rotation_trick,
    straight_through,
)
from continuous_lm.quantize.vq import (
    Codebook,
    Quantized,
    init,
    lookup,
    quantize,
    revive,
    update_ema,
)

__all__ = [
    "GRADIENTS",
    "METRICS",
    "Clusters",
    "CodeUse",
    "Codebook",
    "FiniteQuantized",
    "Neighbours",
    "QuantizationNoise",
    "Quantized",
    "VectorSpread",
    "code_use",
    "distance",
    "finite_bound",
    "finite_indices",
    "finite_vectors",
    "init",
    "init_residual",
    "k_nearest",
    "kmeans",
    "lookup",
    "lookup_residual",
    "nearest",
    "quantization_noise",
    "quantize",
    "quantize_finite",
    "quantize_residual",
    "revive",
    "revive_residual",
    "rotation_trick",
    "spread",
    "squared_norms",
    "straight_through",
    "update_ema",
    "update_residual_ema",
]
