"""Flax modules and what they are loaded from: the trunk, and one file a family of checkpoints."""

from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.loading import LanguageModel, load, save
from continuous_lm.models.transformer import Transformer

__all__ = ["LanguageModel", "Transformer", "TransformerConfig", "load", "save"]
