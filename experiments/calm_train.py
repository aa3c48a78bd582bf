"""Trains a continuous autoregressive language model: a density over the next token's vector.

    python -m continuous_lm.experiments.calm_train --head=token --output_dir=results/baseline
    python -m continuous_lm.experiments.calm_train --head=mixture --rows_of=results/baseline \
        --output_dir=results/mixture

The folder is what `continuous_lm.models.density.load` reads, and holds the run in `run/`; a run
that was stopped goes on when the same command is given again. The vectors are the rows of a table:
--rows_of freezes those of another model, otherwise they are the trunk's embeddings and learn with
it, which --contrast keeps from collapsing. --trunk fits a head on a pretrained model that stays as
it is.
"""

import jax
from absl import flags

import continuous_lm as clm
from continuous_lm.errors import InputError, about
from continuous_lm.experiments import calm, corpus, program, text
from continuous_lm.files import write_json, written_aside
from continuous_lm.models import density, heads

_HEAD = flags.DEFINE_enum("head", "gaussian", list(heads.HEADS), "What predicts.")
_HEAD_SETTINGS = flags.DEFINE_list(
    "head_settings", [], "Settings of the head as name=value: covariance=full,min_scale=0.1"
)
_TRUNK = flags.DEFINE_string(
    "trunk", None, "Checkpoint folder or bundled model to put the head on.  [default: a new trunk]"
)
_ROWS_OF = flags.DEFINE_string(
    "rows_of", None, "Model whose embedding table, frozen, holds the vectors.  [default: its own]"
)
_CONTRAST = flags.DEFINE_float(
    "contrast",
    1.0,
    "Weight of the tokens' cross-entropy under the density, against the nats of a dimension.",
    lower_bound=0.0,
)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 128, "Of a new trunk.", lower_bound=2)
_LAYERS = flags.DEFINE_integer("num_layers", 4, "Of a new trunk.", lower_bound=1)
_HEADS = flags.DEFINE_integer("num_heads", 4, "Of a new trunk.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a sequence.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Sequences in a step.", lower_bound=1)
_ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "Parts of a batch.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1000, "Optimiser steps.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "At its peak.", lower_bound=0.0)
_WARM_UP = flags.DEFINE_integer("warm_up", 100, "Steps to the peak.", lower_bound=0)
_CLIP = flags.DEFINE_float("clip", 1.0, "The largest norm of a gradient.", lower_bound=0.0)
_COMPUTE = flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Parameters are kept in float32."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 200, "Steps to a checkpoint.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters and data.", lower_bound=0)

# What a flag's presence leaves without a meaning.
_EXCLUDES = {
    "trunk": ("rows_of", "hidden_size", "num_layers", "num_heads"),
    "token": ("rows_of", "contrast"),
}


def initial() -> tuple[density.DensityLM, corpus.Corpus]:
    """The model that the flags name, before training, and the text in its tokens."""
    chosen = {"trunk": _TRUNK.value is not None, "token": _HEAD.value == "token"}
    for what, names in _EXCLUDES.items():
        for name in names:
            if chosen[what] and flags.FLAGS[name].present:
                told = (
                    "a pretrained trunk has its own" if what == "trunk" else "tokens have no rows"
                )
                raise InputError(f"--{name}: {told}; leave it out")
    key = jax.random.key(_SEED.value)
    settings = {"kind": _HEAD.value, **calm.head_settings(_HEAD_SETTINGS.value)}
    speaks = _HEAD.value == "token"
    contrast = 0.0 if speaks else _CONTRAST.value
    if speaks and _TRUNK.value is None:
        settings = {"tied": True} | settings  # so that the folder is an ordinary language model too
    if _TRUNK.value is not None:
        lm = clm.load(_TRUNK.value, dtype="float32")
        if lm.tokenizer is None:
            raise InputError(f"--trunk: {_TRUNK.value} has no tokenizer.json")
        data = corpus.read(lm.tokenizer)
        width = lm.config.vocab_size if speaks else lm.config.hidden_size
        head = heads.from_dict({"width": width} | settings)
        return density.on(lm, head, key=key, contrast=contrast), data
    table = None
    if _ROWS_OF.value is None:
        data = corpus.read()
        vocab_size = data.tokenizer.get_vocab_size()
    else:
        other = clm.load(_ROWS_OF.value, dtype="float32")
        table = other.params["embedding"]
        data = corpus.read(other.tokenizer)
        vocab_size = other.config.vocab_size
    config = calm.trunk(
        vocab_size=vocab_size,
        hidden_size=_HIDDEN_SIZE.value,
        num_layers=_LAYERS.value,
        num_heads=_HEADS.value,
    )
    width = vocab_size if speaks else config.hidden_size
    head = heads.from_dict({"width": width} | settings)
    with about("--rows_of" if table is not None else "--head"):
        made = density.create(
            key, config, head, table=table, tokenizer=data.tokenizer, contrast=contrast
        )
    return made, data


def main() -> None:
    """Trains, writes."""
    folder = program.output_dir("calm_train")
    lm, data = initial()
    text.check_tokenizer(data.tokenizer, lm.config.vocab_size, str(_TRUNK.value or _ROWS_OF.value))
    model = {"reads": lm.model.reads, "table": lm.model.table, "contrast": lm.model.contrast}
    lm = calm.train(
        lm,
        data.train,
        data.held_out,
        folder=folder / "run",
        length=_LENGTH.value,
        batch_size=_BATCH_SIZE.value,
        accumulate=_ACCUMULATE.value,
        steps=_STEPS.value,
        learning_rate=_LEARNING_RATE.value,
        warm_up=_WARM_UP.value,
        clip=_CLIP.value,
        compute_dtype=None if _COMPUTE.value == "float32" else _COMPUTE.value,
        save_every=_SAVE_EVERY.value,
        seed=_SEED.value,
        trunk_is_frozen=_TRUNK.value is not None,
        settings={"data": data.source, "head": heads.to_dict(lm.model.head), "model": model},
        label=_HEAD.value,
    )
    density.save(folder, lm)
    with written_aside(folder) as aside:
        write_json(aside / "calm_train.json", {"run": program.record(), "data": data.source})
    print(f"{folder}: a model for calm_sample, calm_eval, quantization_ablation")


if __name__ == "__main__":
    program.run(main)
