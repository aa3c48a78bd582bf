"""Trains continuous autoregressive language models, and the discrete ones they are held against.

    python -m continuous_lm train --stage=baseline --output_dir=results/baseline
    python -m continuous_lm train --head=mixture --rows_of=results/baseline \
        --output_dir=results/mixture
    python -m continuous_lm train --stage=autoencoder --output_dir=results/codec
    python -m continuous_lm train --stage=calm --codec=results/codec \
        --output_dir=results/calm

A run that was stopped goes on when the same command is given again: it is in `run/` of the folder,
which is otherwise what `models.density.load`, `autoencoder.load` or `models.calm.load` read.

density      a density over the next token's vector. The vectors are the rows of a table: --rows_of
             freezes those of another model, otherwise they are the trunk's embeddings and learn
             with it, which --contrast keeps from collapsing. --trunk fits a head on a pretrained
             model that stays as it is.
baseline     tokens by a softmax.
autoencoder  --chunk_size tokens to one vector, and back.
calm         the next of these vectors, by a head without a likelihood.
"""

import pathlib
from typing import Any

import jax
from absl import flags

import continuous_lm as clm
from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import text, tokenized_text
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.models import calm as calm_models
from continuous_lm.models import density
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.implicit_heads import IMPLICIT
from continuous_lm.models.density import heads
from continuous_lm.parallel import processes

STAGES = ("density", "baseline", "autoencoder", "calm")

_STAGE = flags.DEFINE_enum("stage", "density", STAGES, "What to train; see above.")
_HEAD = flags.DEFINE_enum(
    "head",
    None,
    [*heads.HEADS, *IMPLICIT],
    "What predicts.  [default: gaussian; token for a baseline, energy for calm]",
)
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
_CODEC = flags.DEFINE_string("codec", None, "Folder of the autoencoder, which stays as it is.")
_CHUNK_SIZE = flags.DEFINE_integer("chunk_size", 4, "Tokens in a vector.", lower_bound=1)
_LATENT_SIZE = flags.DEFINE_integer("latent_size", 64, "Of the vector.", lower_bound=1)
_CODEC_SETTINGS = flags.DEFINE_list(
    "codec_settings", [], "Settings of the autoencoder as name=value: kl_weight=0.01,dropout=0.1"
)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 128, "Of what is new.", lower_bound=2)
_LAYERS = flags.DEFINE_integer("num_layers", 4, "Of a new trunk.", lower_bound=1)
_HEADS = flags.DEFINE_integer("num_heads", 4, "Of a new trunk.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens (calm: chunks) in a sequence.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Sequences (autoencoder: of 64 tokens) in a step.", lower_bound=1
)
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

# What is chosen, why that leaves flags without a meaning, and which.
_OF_CODEC = ("chunk_size", "latent_size", "codec_settings")
_EXCLUDES = {
    "trunk": (
        "a pretrained trunk has its own",
        ("rows_of", "hidden_size", "num_layers", "num_heads"),
    ),
    "token": ("tokens have no rows", ("rows_of", "contrast")),
    "density": ("only an autoencoder and a model on it have chunks", (*_OF_CODEC, "codec")),
    "baseline": ("only an autoencoder and a model on it have chunks", (*_OF_CODEC, "codec")),
    "autoencoder": (
        "an autoencoder has none",
        "head head_settings trunk rows_of contrast num_layers num_heads length codec".split(),
    ),
    "calm": (
        "a next-vector model is new, and reads the chunks of its autoencoder",
        ("trunk", "rows_of", "contrast", *_OF_CODEC),
    ),
}


def head_kind() -> str:
    """The head that the flags name, refused if it is not one of the stage's."""
    stage = _STAGE.value
    default = {"density": "gaussian", "baseline": "token", "calm": "energy"}.get(stage, "gaussian")
    kind = _HEAD.value or default
    known = {"baseline": ["token"], "calm": list(IMPLICIT)}.get(stage, list(heads.HEADS))
    if kind not in known:
        raise InputError(f"--head={kind} is none of --stage={stage}, which has {', '.join(known)}")
    return str(kind)


def check_flags() -> None:
    """Refuses flags that have no meaning beside others."""
    chosen = [_STAGE.value, *(["trunk"] if _TRUNK.value is not None else []), "token"]
    for what in chosen:
        if what == "token" and head_kind() != "token":
            continue
        told, names = _EXCLUDES[what]
        for name in names:
            if flags.FLAGS[name].present:
                raise InputError(f"--{name}: {told}; leave it out")
    if _STAGE.value == "calm" and _CODEC.value is None:
        raise InputError("--codec is missing: the folder that --stage=autoencoder wrote")


def trunk_config(vocab_size: int) -> clm.TransformerConfig:
    """Of a new trunk."""
    return density_training.trunk(
        vocab_size=vocab_size,
        hidden_size=_HIDDEN_SIZE.value,
        num_layers=_LAYERS.value,
        num_heads=_HEADS.value,
    )


def new_density(kind: str, key: jax.Array) -> tuple[density.DensityLM, tokenized_text.Corpus]:
    """The density model or baseline that the flags name, and the text in its tokens."""
    settings = {
        "kind": kind,
        **density_training.named_settings(_HEAD_SETTINGS.value, "head_settings"),
    }
    speaks = kind == "token"
    contrast = 0.0 if speaks else _CONTRAST.value
    if speaks and _TRUNK.value is None:
        settings = {"tied": True} | settings  # so that the folder is an ordinary language model too
    if _TRUNK.value is not None:
        lm = clm.load(_TRUNK.value, dtype="float32", mesh=program.mesh())
        if lm.tokenizer is None:
            raise InputError(f"--trunk: {_TRUNK.value} has no tokenizer.json")
        data = tokenized_text.read(lm.tokenizer)
        width = lm.config.vocab_size if speaks else lm.config.hidden_size
        head = heads.from_dict({"width": width} | settings)
        return density.on(lm, head, key=key, contrast=contrast), data
    table = None
    if _ROWS_OF.value is None:
        data = tokenized_text.read()
        vocab_size = data.tokenizer.get_vocab_size()
    else:
        other = clm.load(_ROWS_OF.value, dtype="float32")
        table = other.params["embedding"]
        data = tokenized_text.read(other.tokenizer)
        vocab_size = other.config.vocab_size
    config = trunk_config(vocab_size)
    width = vocab_size if speaks else config.hidden_size
    head = heads.from_dict({"width": width} | settings)
    with about("--rows_of" if table is not None else "--head"):
        made = density.create(
            key, config, head, table=table, tokenizer=data.tokenizer, contrast=contrast
        )
    return made, data


def train_density(folder: pathlib.Path, key: jax.Array, options: dict[str, Any]) -> dict[str, Any]:
    """Trains and writes a density model or a baseline; returns where the text is from."""
    kind = head_kind()
    lm, data = new_density(kind, key)
    text.check_tokenizer(data.tokenizer, lm.config.vocab_size, str(_TRUNK.value or _ROWS_OF.value))
    model = {"reads": lm.model.reads, "table": lm.model.table, "contrast": lm.model.contrast}
    lm = density_training.train(
        density_training.on_mesh(lm, program.mesh()),
        data.train,
        data.held_out,
        length=_LENGTH.value,
        trunk_is_frozen=_TRUNK.value is not None,
        settings={"data": data.source, "head": heads.to_dict(lm.model.head), "model": model},
        label=kind,
        **options,
    )
    density_training.save(density.save, folder, lm)
    return data.source


def train_autoencoder(
    folder: pathlib.Path, key: jax.Array, options: dict[str, Any]
) -> dict[str, Any]:
    """Trains and writes an autoencoder; returns where the text is from."""
    data = tokenized_text.read()
    settings = density_training.named_settings(_CODEC_SETTINGS.value, "codec_settings")
    reserved = "chunk_size hidden_size key latent_size tokenizer vocab_size".split()
    for name in sorted(set(reserved) & set(settings)):
        raise InputError(f"--codec_settings: {name} is said by other flags; leave it out")
    with about("--codec_settings"):
        codec = calm_training.new_codec(
            key,
            vocab_size=data.tokenizer.get_vocab_size(),
            chunk_size=_CHUNK_SIZE.value,
            latent_size=_LATENT_SIZE.value,
            hidden_size=_HIDDEN_SIZE.value,
            tokenizer=data.tokenizer,
            **settings,
        )
    codec = calm_training.train_codec(
        density_training.on_mesh(codec, program.mesh()),
        data.train,
        data.held_out,
        settings={"data": data.source},
        label="autoencoder",
        **options,
    )
    density_training.save(autoencoder.save, folder, codec)
    return data.source


def train_calm(folder: pathlib.Path, key: jax.Array, options: dict[str, Any]) -> dict[str, Any]:
    """Trains and writes a next-vector model; returns where the text is from."""
    with about("--codec"):
        codec = autoencoder.load(str(_CODEC.value), dtype="float32")
        if codec.tokenizer is None:
            raise InputError(f"{_CODEC.value} has no tokenizer.json")
    data = tokenized_text.read(codec.tokenizer)
    settings = {"kind": head_kind(), "width": codec.config.latent_size, "depth": 2}
    given = density_training.named_settings(_HEAD_SETTINGS.value, "head_settings")
    for name in sorted({"kind", "width"} & set(given)):
        raise InputError(f"--head_settings: {name} follows from --head and --codec; leave it out")
    settings |= given
    head: Any = heads.from_dict(settings, kinds=IMPLICIT)
    lm = calm_models.create(
        key, trunk_config(codec.config.vocab_size), codec, head, num_targets=calm_training.TARGETS
    )
    lm = calm_training.train(
        density_training.on_mesh(lm, program.mesh()),
        data.train,
        data.held_out,
        length=_LENGTH.value,
        settings={"data": data.source, "model": calm_models.write_config(lm.model)},
        label=head_kind(),
        **options,
    )
    density_training.save(calm_models.save, folder, lm)
    return data.source


def main() -> None:
    """Trains, writes."""
    folder = program.output_dir("train")
    check_flags()
    stages = {"autoencoder": train_autoencoder, "calm": train_calm}
    options = {
        "folder": folder / "run",
        "batch_size": _BATCH_SIZE.value,
        "accumulate": _ACCUMULATE.value,
        "steps": _STEPS.value,
        "learning_rate": _LEARNING_RATE.value,
        "warm_up": _WARM_UP.value,
        "clip": _CLIP.value,
        "compute_dtype": None if _COMPUTE.value == "float32" else _COMPUTE.value,
        "save_every": _SAVE_EVERY.value,
        "seed": _SEED.value,
        "pmap": program.pmap(),
    }
    source = stages.get(_STAGE.value, train_density)(folder, jax.random.key(_SEED.value), options)
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        write_json(aside / "train.json", {"run": program.record(), "data": source})
    print(f"{folder}: for sample, evaluate, compare_quantizers")


if __name__ == "__main__":
    program.run(main, meshes=True, pmaps=True)
