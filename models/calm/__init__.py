"""CALM: next-vector models of C tokens a step (Shao et al., arXiv:2510.27688).

    lm = calm.load("path/to/a/calm/folder", "path/to/its/autoencoder/folder")
    hidden = calm.hidden_states(lm, calm.split_into_chunks(tokens, lm.model.chunk_size))
    new = clm.generate(lm, tokens, sampler=calm.Repetition(0.5), max_new_tokens=64, key=key)

The functions here take a `LanguageModel[NextVectorModel]` and check their arguments. Under them are
the methods of `NextVectorModel`, pure functions of parameters and checked inputs.
"""

from continuous_lm.models.calm import autoencoder, implicit_heads, repeated_draws
from continuous_lm.models.calm.autoencoder import Autoencoder
from continuous_lm.models.calm.checkpoint import (
    is_config,
    load,
    read_config,
    save,
    write_config,
)
from continuous_lm.models.calm.chunk_inputs import ChunkInputs, split_into_chunks
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.calm.next_vector import (
    autoencoder_of,
    create,
    hidden_states,
    loss,
    next_vector_model,
    transform,
)
from continuous_lm.models.calm.samplers import Rejection, Repetition

__all__ = [
    "Autoencoder",
    "ChunkInputs",
    "NextVectorModel",
    "Rejection",
    "Repetition",
    "autoencoder",
    "autoencoder_of",
    "create",
    "hidden_states",
    "implicit_heads",
    "is_config",
    "load",
    "loss",
    "next_vector_model",
    "read_config",
    "repeated_draws",
    "save",
    "split_into_chunks",
    "transform",
    "write_config",
]
