"""Trains continuous autoregressive language models, and the discrete ones they are held against.

    python -m continuous_lm train --stage=baseline --output_dir=results/baseline
    python -m continuous_lm train --head=mixture --table_from=results/baseline \
        --output_dir=results/mixture
    python -m continuous_lm train --stage=autoencoder --output_dir=results/codec
    python -m continuous_lm train --stage=calm --codec=results/codec \
        --output_dir=results/calm

A run that was stopped goes on when the same command is given again: it is in `run/` of the folder,
which is otherwise what `models.density.load`, `autoencoder.load` or `models.calm.load` read.

density      a density over the next token's vector. The vectors are the rows of a table:
             --table_from freezes those of another model, otherwise they are the trunk's embeddings
             and learn with it, which --token_loss_weight keeps from collapsing. --trunk fits a head
             on a pretrained model that stays as it is.
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
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import fit, text, tokenized_text
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models import calm as calm_models
from continuous_lm.models import density
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.implicit_heads import IMPLICIT_HEADS
from continuous_lm.models.density import heads
from continuous_lm.models.head import from_dict as implicit_head_from_dict
from continuous_lm.parallel import processes

STAGES = ("density", "baseline", "autoencoder", "calm")

_STAGE = flags.DEFINE_enum("stage", "density", STAGES, "What to train; see above.")
_HEAD = flags.DEFINE_enum(
    "head",
    None,
    [*heads.DISTRIBUTION_HEADS, *IMPLICIT_HEADS],
    "What predicts.  [default: gaussian; token for a baseline, energy for calm]",
)
_HEAD_SETTINGS = flags.DEFINE_list(
    "head_settings",
    [],
    "Settings of the head as name=value: covariance=full,min_scale=0.1",
)
_TRUNK = flags.DEFINE_string(
    "trunk",
    None,
    "Checkpoint folder or bundled model to put the head on.  [default: a new trunk]",
)
_TABLE_FROM = flags.DEFINE_string(
    "table_from",
    None,
    "Model whose embedding table, frozen, holds the vectors.  [default: its own]",
)
_TOKEN_LOSS_WEIGHT = flags.DEFINE_float(
    "token_loss_weight",
    1.0,
    "Weight of the tokens' cross-entropy under the density, against the nats of a dimension.",
    lower_bound=0.0,
)
_CODEC = flags.DEFINE_string(
    "codec", None, "Folder of the autoencoder, which stays as it is."
)
_CHUNK_SIZE = flags.DEFINE_integer(
    "chunk_size", 4, "Tokens in a vector.", lower_bound=1
)
_LATENT_SIZE = flags.DEFINE_integer("latent_size", 64, "Of the vector.", lower_bound=1)
_CODEC_SETTINGS = flags.DEFINE_list(
    "codec_settings",
    [],
    "Settings of the autoencoder as name=value: kl_weight=0.01,dropout=0.1",
)
_HIDDEN_SIZE = flags.DEFINE_integer(
    "hidden_size", 128, "Of what is new.", lower_bound=2
)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 4, "Of a new trunk.", lower_bound=1)
_NUM_HEADS = flags.DEFINE_integer("num_heads", 4, "Of a new trunk.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "length", 128, "Tokens (calm: chunks) in a sequence.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Sequences (autoencoder: of 64 tokens) in a step.", lower_bound=1
)
_ACCUMULATE = flags.DEFINE_integer("accumulate", 1, "Parts of a batch.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1000, "Optimiser steps.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float(
    "learning_rate", 2e-3, "At its peak.", lower_bound=0.0
)
_WARM_UP = flags.DEFINE_integer("warm_up", 100, "Steps to the peak.", lower_bound=0)
_MAX_GRADIENT_NORM = flags.DEFINE_float(
    "clip", 1.0, "The largest norm of a gradient.", lower_bound=0.0
)
_COMPUTE_DTYPE = flags.DEFINE_enum(
    "compute_dtype",
    "float32",
    ["float32", "bfloat16"],
    "Parameters are kept in float32.",
)
_SAVE_EVERY = flags.DEFINE_integer(
    "save_every", 200, "Steps to a checkpoint.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters and data.", lower_bound=0)

# What is chosen, why that leaves flags without a meaning, and which.
_CODEC_FLAGS = ("chunk_size", "latent_size", "codec_settings")
_EXCLUDED_FLAGS = {
    "trunk": (
        "a pretrained trunk has its own",
        ("table_from", "hidden_size", "num_layers", "num_heads"),
    ),
    "token": ("tokens have no rows", ("table_from", "token_loss_weight")),
    "density": (
        "only an autoencoder and a model on it have chunks",
        (*_CODEC_FLAGS, "codec"),
    ),
    "baseline": (
        "only an autoencoder and a model on it have chunks",
        (*_CODEC_FLAGS, "codec"),
    ),
    "autoencoder": (
        "an autoencoder has none",
        (
            "head head_settings trunk table_from token_loss_weight"
            " num_layers num_heads length codec"
        ).split(),
    ),
    "calm": (
        "a next-vector model is new, and reads the chunks of its autoencoder",
        ("trunk", "table_from", "token_loss_weight", *_CODEC_FLAGS),
    ),
}


def read_head_kind() -> str:
    """The head that the flags name, refused if it is not one of the stage's."""
    stage = _STAGE.value
    default_kind = {"density": "gaussian", "baseline": "token", "calm": "energy"}.get(
        stage, "gaussian"
    )
    kind = _HEAD.value or default_kind
    stage_kinds = {"baseline": ["token"], "calm": list(IMPLICIT_HEADS)}.get(
        stage, list(heads.DISTRIBUTION_HEADS)
    )
    if kind not in stage_kinds:
        raise InputError(
            f"--head={kind} is none of --stage={stage}, which has {', '.join(stage_kinds)}"
        )
    return str(kind)


def check_flags() -> None:
    """Refuses flags that have no meaning beside others."""
    choices = [_STAGE.value, *(["trunk"] if _TRUNK.value is not None else []), "token"]
    for choice in choices:
        if choice == "token" and read_head_kind() != "token":
            continue
        reason, flag_names = _EXCLUDED_FLAGS[choice]
        for flag_name in flag_names:
            if flags.FLAGS[flag_name].present:
                raise InputError(f"--{flag_name}: {reason}; leave it out")
    if _STAGE.value == "calm" and _CODEC.value is None:
        raise InputError(
            "--codec is missing: the folder that --stage=autoencoder wrote"
        )


def new_trunk_config(vocab_size: int) -> clm.TransformerConfig:
    """Of a new trunk."""
    return density_training.trunk_config(
        vocab_size=vocab_size,
        hidden_size=_HIDDEN_SIZE.value,
        num_layers=_NUM_LAYERS.value,
        num_heads=_NUM_HEADS.value,
    )


def create_density_model(
    kind: str, key: jax.Array
) -> tuple[density.DensityLM, tokenized_text.Corpus]:
    """The density model or baseline that the flags name, and the text in its tokens."""
    settings = {
        "kind": kind,
        **density_training.parse_settings(_HEAD_SETTINGS.value, "head_settings"),
    }
    predicts_tokens = kind == "token"
    token_loss_weight = 0.0 if predicts_tokens else _TOKEN_LOSS_WEIGHT.value
    if predicts_tokens and _TRUNK.value is None:
        settings = {
            "tied": True
        } | settings  # so that the folder is an ordinary language model too
    if _TRUNK.value is not None:
        lm = clm.load(_TRUNK.value, dtype="float32", mesh=program.mesh())
        if lm.tokenizer is None:
            raise InputError(f"--trunk: {_TRUNK.value} has no tokenizer.json")
        data = tokenized_text.read_corpus(lm.tokenizer)
        width = lm.config.vocab_size if predicts_tokens else lm.config.hidden_size
        head = heads.from_dict({"width": width} | settings)
        return density.add_head(
            lm, head, key=key, token_loss_weight=token_loss_weight
        ), data
    table = None
    if _TABLE_FROM.value is None:
        data = tokenized_text.read_corpus()
        vocab_size = data.tokenizer.get_vocab_size()
    else:
        table_model = clm.load(_TABLE_FROM.value, dtype="float32")
        table = table_model.params["embedding"]
        data = tokenized_text.read_corpus(table_model.tokenizer)
        vocab_size = table_model.config.vocab_size
    config = new_trunk_config(vocab_size)
    width = vocab_size if predicts_tokens else config.hidden_size
    head = heads.from_dict({"width": width} | settings)
    with about("--table_from" if table is not None else "--head"):
        density_lm = density.create(
            key,
            config,
            head,
            table=table,
            tokenizer=data.tokenizer,
            token_loss_weight=token_loss_weight,
        )
    return density_lm, data


def train_density(
    folder: pathlib.Path, key: jax.Array, fit_config: fit.FitConfig
) -> dict[str, Any]:
    """Trains and writes a density model or a baseline; returns where the text is from."""
    kind = read_head_kind()
    lm, data = create_density_model(kind, key)
    text.check_tokenizer(
        data.tokenizer, lm.config.vocab_size, str(_TRUNK.value or _TABLE_FROM.value)
    )
    model = {
        "reads": lm.model.input_kind,
        "table": lm.model.table,
        "contrast": lm.model.token_loss_weight,
    }
    lm = density_training.train(
        density_training.place_on_mesh(lm, program.mesh()),
        data.train,
        data.held_out,
        length=_LENGTH.value,
        trunk_is_frozen=_TRUNK.value is not None,
        settings={
            "data": data.source,
            "head": heads.to_dict(lm.model.head),
            "model": model,
        },
        label=kind,
        folder=folder / "run",
        config=fit_config,
    )
    density_training.save_on_first_process(density.save, folder, lm)
    return data.source


def train_autoencoder(
    folder: pathlib.Path, key: jax.Array, fit_config: fit.FitConfig
) -> dict[str, Any]:
    """Trains and writes an autoencoder; returns where the text is from."""
    data = tokenized_text.read_corpus()
    settings = density_training.parse_settings(_CODEC_SETTINGS.value, "codec_settings")
    reserved = "chunk_size hidden_size key latent_size tokenizer vocab_size".split()
    for name in sorted(set(reserved) & set(settings)):
        raise InputError(
            f"--codec_settings: {name} is set by other flags; leave it out"
        )
    with about("--codec_settings"):
        codec = calm_training.create_codec(
            key,
            vocab_size=data.tokenizer.get_vocab_size(),
            chunk_size=_CHUNK_SIZE.value,
            latent_size=_LATENT_SIZE.value,
            hidden_size=_HIDDEN_SIZE.value,
            tokenizer=data.tokenizer,
            **settings,
        )
    codec = calm_training.train_codec(
        density_training.place_on_mesh(codec, program.mesh()),
        data.train,
        data.held_out,
        settings={"data": data.source},
        label="autoencoder",
        folder=folder / "run",
        config=fit_config,
    )
    density_training.save_on_first_process(autoencoder.save, folder, codec)
    return data.source


def train_calm(
    folder: pathlib.Path, key: jax.Array, fit_config: fit.FitConfig
) -> dict[str, Any]:
    """Trains and writes a next-vector model; returns where the text is from."""
    with about("--codec"):
        codec = autoencoder.load(str(_CODEC.value), dtype="float32")
        if codec.tokenizer is None:
            raise InputError(f"{_CODEC.value} has no tokenizer.json")
    data = tokenized_text.read_corpus(codec.tokenizer)
    settings = {
        "kind": read_head_kind(),
        "width": codec.model.config.latent_size,
        "depth": 2,
    }
    head_settings = density_training.parse_settings(
        _HEAD_SETTINGS.value, "head_settings"
    )
    for name in sorted({"kind", "width"} & set(head_settings)):
        raise InputError(
            f"--head_settings: {name} follows from --head and --codec; leave it out"
        )
    settings |= head_settings
    head = implicit_head_from_dict(settings, IMPLICIT_HEADS)
    lm = calm_models.create(
        key,
        new_trunk_config(codec.model.config.vocab_size),
        codec,
        head,
        num_targets=calm_training.NUM_TARGET_DRAWS,
    )
    lm = calm_training.train(
        density_training.place_on_mesh(lm, program.mesh()),
        data.train,
        data.held_out,
        length=_LENGTH.value,
        settings={"data": data.source, "model": calm_models.write_config(lm.model)},
        label=read_head_kind(),
        folder=folder / "run",
        config=fit_config,
    )
    density_training.save_on_first_process(calm_models.save, folder, lm)
    return data.source


def main() -> None:
    """Trains, writes."""
    folder = program.output_dir("train")
    check_flags()
    train_functions = {"autoencoder": train_autoencoder, "calm": train_calm}
    fit_config = fit.FitConfig(
        steps=_STEPS.value,
        learning_rate=_LEARNING_RATE.value,
        batch_size=_BATCH_SIZE.value,
        warm_up=_WARM_UP.value,
        clip=_MAX_GRADIENT_NORM.value,
        accumulate=_ACCUMULATE.value,
        compute_dtype=None
        if _COMPUTE_DTYPE.value == "float32"
        else _COMPUTE_DTYPE.value,
        seed=_SEED.value,
        save_every=_SAVE_EVERY.value,
        pmap=program.uses_pmap(),
    )
    text_source = train_functions.get(_STAGE.value, train_density)(
        folder, jax.random.key(_SEED.value), fit_config
    )
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        write_json(
            staging_folder / "train.json",
            {"run": program.record(), "data": text_source},
        )
    print(f"{folder}: for sample, evaluate, compare_quantizers")


if __name__ == "__main__":
    program.run(main, supports_mesh=True, supports_pmap=True)
