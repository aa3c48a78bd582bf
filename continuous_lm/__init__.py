"""Language models as continuous systems, in JAX.

    import continuous_lm as clm

    lm = clm.load("apples")
    logits = lm(tokens, durations=d)

The face of the package. What it hands on, from the ground up:
"""

# The ground: time, attention, rotary embedding, text; and sweeps, from above the models.
from continuous_lm import attention, axes, durations, rotary, tokenization
from continuous_lm.analysis import sweep
from continuous_lm.errors import InputError

# Models, from the layer above.
from continuous_lm.models import (
    GeneratedTokens,
    KVCache,
    LanguageModel,
    Transformer,
    TransformerConfig,
    bundled_models,
    generate,
    load,
    sample_token,
    save,
)

__version__ = "0.1.0"

__all__ = [
    "GeneratedTokens",
    "InputError",
    "KVCache",
    "LanguageModel",
    "Transformer",
    "TransformerConfig",
    "attention",
    "axes",
    "bundled_models",
    "durations",
    "generate",
    "load",
    "rotary",
    "sample_token",
    "save",
    "sweep",
    "tokenization",
]
