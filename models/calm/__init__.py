"""CALM: next-vector models of C tokens a step (Shao et al., arXiv:2510.27688).

lm = calm.load("path/to/a/calm/folder", "path/to/its/autoencoder/folder")
new = calm.sample(lm, tokens, max_new_tokens=64, temperature=0.5, key=key)
"""

from continuous_lm.models.calm import autoencoder, implicit_heads, repeated_draws
from continuous_lm.models.calm.checkpoint import (
    is_config,
    load,
    read_config,
    save,
    write_config,
)
from continuous_lm.models.calm.model import (
    NextVectorLM,
    NextVectorModel,
    create,
    example_inputs,
    split_into_chunks,
)
from continuous_lm.models.calm.samplers import SAMPLING_METHODS, sample

__all__ = [
    "SAMPLING_METHODS",
    "NextVectorLM",
    "NextVectorModel",
    "autoencoder",
    "create",
    "example_inputs",
    "implicit_heads",
    "is_config",
    "load",
    "read_config",
    "repeated_draws",
    "sample",
    "save",
    "split_into_chunks",
    "write_config",
]
