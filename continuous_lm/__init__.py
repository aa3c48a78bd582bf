"""Language models as continuous systems, in JAX.

    import continuous_lm as clm

    lm = clm.load("apples")
    logits = lm(tokens, durations=d)

Models:
  load                a model of any kind, from a folder or by its name
  save                the inverse of `load`
  bundled_models      the names of the models that come with the package
  LanguageModel       a model, its parameters and its tokenizer
  Transformer         the Flax module of the trunk
  TransformerConfig   the sizes and the family's choices of a trunk
  Inputs              tokens or vectors, with durations and times
  Output              logits, hidden states, the cache and captured intermediates
  KVCache             keys and values of the tokens so far
  density             models whose head is a density over the next vector
  calm                next-vector models of C tokens a step, and their autoencoders

Generation:
  generate            continue prompts with any kind of model
  Generated           the result of `generate`
  Greedy              sampler of the most probable token
  Temperature         sampler at a temperature, with top-k and top-p
  Sampler             protocol of samplers; `density` and `calm` have others
  sample_token        sample a token from logits
  tokenization        text to tokens, and characters to spans of tokens

Time:
  durations           durations and end times of tokens
  signals             continuous signals, sampled for a model
  attention           attention over keys with durations, in several forms
  rotary              rotary embedding at real times

Analysis:
  sweep               probabilities of answers along many durations of a prompt
  attribution         contributions of tokens to an answer, by gradients along durations
  deletion            curves that compare attributions
  duration_search     the inverse problem: durations for a chosen answer
  pruning             the smallest total duration that keeps an answer

Losses and codes:
  losses              likelihoods, scores and distances, as pure functions
  quantize            between vectors and codes

Ground:
  axes                letters of axes, and sharding on a mesh
  InputError          the exception for arguments that do not fit

Names are imported on first use. `python -m continuous_lm NAME` runs the programs of
`continuous_lm.experiments`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from continuous_lm import (
        attention,
        axes,
        durations,
        losses,
        quantize,
        rotary,
        signals,
        tokenization,
    )
    from continuous_lm.analysis import (
        attribution,
        deletion,
        duration_search,
        pruning,
        sweep,
    )
    from continuous_lm.errors import InputError
    from continuous_lm.inputs import Inputs
    from continuous_lm.models import (
        Generated,
        Greedy,
        KVCache,
        LanguageModel,
        Output,
        Sampler,
        Temperature,
        Transformer,
        TransformerConfig,
        bundled_models,
        calm,
        density,
        generate,
        load,
        sample_token,
        save,
    )

__version__ = "0.1.0"

__all__ = [
    "Generated",
    "Greedy",
    "InputError",
    "Inputs",
    "KVCache",
    "LanguageModel",
    "Output",
    "Sampler",
    "Temperature",
    "Transformer",
    "TransformerConfig",
    "attention",
    "attribution",
    "axes",
    "bundled_models",
    "calm",
    "deletion",
    "density",
    "duration_search",
    "durations",
    "generate",
    "load",
    "losses",
    "pruning",
    "quantize",
    "rotary",
    "sample_token",
    "save",
    "signals",
    "sweep",
    "tokenization",
]

_MODULES = {
    "attention": "continuous_lm.attention",
    "attribution": "continuous_lm.analysis.attribution",
    "axes": "continuous_lm.axes",
    "calm": "continuous_lm.models.calm",
    "deletion": "continuous_lm.analysis.deletion",
    "density": "continuous_lm.models.density",
    "duration_search": "continuous_lm.analysis.duration_search",
    "durations": "continuous_lm.durations",
    "losses": "continuous_lm.losses",
    "pruning": "continuous_lm.analysis.pruning",
    "quantize": "continuous_lm.quantize",
    "rotary": "continuous_lm.rotary",
    "signals": "continuous_lm.signals",
    "sweep": "continuous_lm.analysis.sweep",
    "tokenization": "continuous_lm.tokenization",
}
# Where the other names come from.
_SOURCES = {"InputError": "continuous_lm.errors", "Inputs": "continuous_lm.inputs"}


if not TYPE_CHECKING:  # with it, checkers would take any name for one of the package

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _MODULES:
            value = importlib.import_module(_MODULES[name])
        else:
            source = _SOURCES.get(name, "continuous_lm.models")
            value = getattr(importlib.import_module(source), name)
        globals()[name] = value  # the next time it is found at once
        return value


def __dir__() -> list[str]:
    return list(__all__)
