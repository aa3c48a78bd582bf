"""Flax modules and what they are loaded from: the trunk, and one file a family of checkpoints."""

from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.generation import Generated, generate, sample_token
from continuous_lm.models.kv_cache import KVCache
from continuous_lm.models.loading import LanguageModel, bundled, load, save
from continuous_lm.models.transformer import Transformer

__all__ = [
    "Generated",
    "KVCache",
    "LanguageModel",
    "Transformer",
    "TransformerConfig",
    "bundled",
    "generate",
    "load",
    "sample_token",
    "save",
]
