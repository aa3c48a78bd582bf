"""Flax modules and their checkpoints: the trunk, one file a family, density and CALM models.

The packages of continuous output, `density` and `calm`, are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from continuous_lm.models.checkpoints.hf_folder import bundled_models
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.generation import Generated, generate
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.loading import load, save
from continuous_lm.models.samplers import Greedy, Sampler, Temperature, sample_token
from continuous_lm.models.transformer import Output, Transformer

if TYPE_CHECKING:
    from continuous_lm.models import calm, density

__all__ = [
    "Generated",
    "Greedy",
    "KVCache",
    "LanguageModel",
    "Output",
    "Sampler",
    "Temperature",
    "Transformer",
    "TransformerConfig",
    "bundled_models",
    "calm",
    "density",
    "generate",
    "load",
    "sample_token",
    "save",
]

_LATER = ("calm", "density")


if not TYPE_CHECKING:  # with it, checkers would take any name for one of the package

    def __getattr__(name: str) -> object:
        if name in _LATER:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
