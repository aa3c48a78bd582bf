"""Between vectors and codes: this maps vectors to rows of codebooks, and is not int8 arithmetic.

nearest             nearest, k_nearest, distance, squared_norms
vector_quantizer    init, quantize, lookup, update_ema, revive: a learned codebook
residual            the same in stages, each of what the one before left over
finite              finite scalar quantization: fixed levels instead of a codebook
gradients           straight_through, rotation_trick
kmeans              a codebook from data
diagnostics         code_use, quantization_noise, spread: what goes wrong, in numbers
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
