"""Density models in programs: the flags of a trunk and a head, training, loading."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh
from jax.typing import ArrayLike

from continuous_lm import losses
from continuous_lm.errors import InputError, about
from continuous_lm.experiments.common import program
from continuous_lm.experiments.training import fit, window_batches
from continuous_lm.inputs import Inputs
from continuous_lm.io.atomic_files import absolute_path
from continuous_lm.io.json_files import read_json
from continuous_lm.models import calm, density, parameters
from continuous_lm.models import head as head_lib
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density.model import DensityModel
from continuous_lm.models.head import Head
from continuous_lm.models.language_model import LanguageModel, Model
from continuous_lm.models.parameters import Params
from continuous_lm.models.settings import Value
from continuous_lm.rotary import Rope

# Held-out windows from which a training run computes its loss and its score.
NUM_LOSS_WINDOWS = 32
NUM_SCORE_WINDOWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkFlags(program.CheckedConfig):
    """Flags of a new trunk."""

    hidden_size: int = program.flag(128, help="Width of a new trunk.", lower_bound=2)
    num_layers: int = program.flag(4, help="Layers of a new trunk.", lower_bound=1)
    num_heads: int = program.flag(
        4, help="Attention heads of a new trunk.", lower_bound=1
    )

    def trunk_config(self, vocab_size: int) -> TransformerConfig:
        """The trunk for a vocabulary."""
        return trunk_config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadFlags(program.CheckedConfig):
    """Flags of a model's head and its sequences."""

    head_settings: tuple[str, ...] = program.flag(
        (),
        help="Settings of the head as name=value: covariance=full,min_scale=0.1",
    )
    length: int = program.flag(
        128, help="Tokens (vectors, for train_calm) in a sequence.", lower_bound=1
    )

    def parsed_head_settings(
        self, kind: str, registry: Mapping[str, type[Head]]
    ) -> dict[str, Value]:
        """The settings by name, of a kind of head in a registry."""
        with about("--head_settings"):
            return head_lib.parse_settings(kind, self.head_settings, registry)


def trunk_config(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    mlp_size: int | None = None,
) -> TransformerConfig:
    """A Llama: its MLPs are 8/3 times as wide as it is, in steps of 32, and its head is tied."""
    if hidden_size % (2 * num_heads):
        raise InputError(
            f"{num_heads} heads do not share {hidden_size} channels in even parts; choose others"
        )
    return TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        mlp_size=mlp_size or -(-8 * hidden_size // 96) * 32,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        rope=Rope(),
        tie_embeddings=True,
    )


def parse_settings(assignments: Sequence[str], flag_name: str) -> dict[str, Any]:
    """The settings in "name=value", ... of a flag; values are JSON, or words."""
    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise InputError(f"--{flag_name}: {assignment!r} is not name=value")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = value.strip()
    return settings


def make_inputs(
    model: DensityModel, items: ArrayLike, durations: ArrayLike | None = None
) -> Inputs:
    """The inputs of tokens [..., T] or vectors [..., T, W], whichever the model reads."""
    if model.input_kind == "vectors":
        return model.make_inputs(vectors=items, durations=durations)
    return model.make_inputs(items, durations=durations)


def make_loss(model: DensityModel) -> fit.LossFunction[Params, jax.Array]:
    """The mean loss of a batch of windows: tokens int [B, n + 1], or vectors [B, n + 1, W]."""

    def loss(params, batch, key):
        return jnp.mean(model.loss(params, make_inputs(model, batch))), {}

    return loss


def make_evaluation(
    model: DensityModel, held_out: np.ndarray, length: int
) -> fit.Evaluation[Params]:
    """Parameters -> "held_out", the loss of held-out windows, and of tokens "brier_1".

    brier_1 is 2 P(token) - sum_v P(v)^2: what next-vector models are scored by, in closed form.

    Args:
      model: the model.
      held_out: tokens [m] or vectors [m, W].
      length: inputs in a window.
    """
    loss = make_loss(model)
    loss_windows = window_batches.consecutive_windows(
        held_out, length=length, max_windows=NUM_LOSS_WINDOWS
    )
    score_windows = window_batches.consecutive_windows(
        held_out, length=length, max_windows=NUM_SCORE_WINDOWS
    )

    @jax.jit
    def held_out_loss(params):
        return loss(params, jnp.asarray(loss_windows), jax.random.key(0))[0]

    @jax.jit
    def brier_1(params):
        def window_brier_1(window):  # one at a time: its logits are length x V numbers
            logits = model.token_logits(params, model.make_inputs(window))
            return losses.brier(jax.nn.softmax(logits), window[1:])

        return 1.0 - jnp.mean(jax.lax.map(window_brier_1, score_windows))

    def evaluate(params):
        metrics = {"held_out": float(held_out_loss(params))}
        if model.predicts_tokens:
            metrics["brier_1"] = float(brier_1(params))
        return metrics

    return evaluate


def train(
    lm: LanguageModel[DensityModel],
    train_data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike[str],
    config: fit.FitConfig,
    length: int,
    trunk_is_frozen: bool = False,
    settings: Mapping[str, Any] | None = None,
    label: str = "training",
) -> LanguageModel[DensityModel]:
    """Train a density model on tokens [n] or vectors [n, W], or resume the run in `folder`.

    Args:
      lm: the model with its initial parameters.
      train_data: training data.
      held_out: data whose loss is logged with each checkpoint.
      folder: folder of the run; see `training.fit`.
      config: training settings. The seed also orders the data.
      length: inputs in a sequence.
      trunk_is_frozen: train only the head.
      settings: other settings that must be equal to resume a run.
      label: label of the progress bar.
    """
    params = fit.fit(
        make_loss(lm.model),
        lm.params,
        window_batches.shuffled_windows(
            train_data,
            length=length,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
        folder=folder,
        config=config,
        is_frozen=lambda path: (
            path == "table" or (trunk_is_frozen and path.startswith("trunk/"))
        ),
        settings={
            "length": length,
            "batch_size": config.batch_size,
            **(settings or {}),
        },
        evaluate=make_evaluation(lm.model, held_out, length),
        tokens_per_step=length * config.batch_size,
        label=label,
    )
    return lm.with_params(params)


def place_on_mesh(lm: LanguageModel[Model], mesh: Mesh | None) -> LanguageModel[Model]:
    """A model of any kind with its parameters on a mesh."""
    table = lm.model.parameter_table()
    return lm.with_params(parameters.place(mesh, lm.params, table))


# --- Loading --------------------------------------------------------------------------------------


def load_text_model(
    folder: str, codec: str | None = None, mesh: Mesh | None = None
) -> LanguageModel[DensityModel] | LanguageModel[NextVectorModel]:
    """The density or next-vector model in a folder, with a tokenizer.

    Args:
      folder: folder of the model.
      codec: folder of the autoencoder of a next-vector model that does not hold one.
      mesh: on which its parameters are to lie.
    """
    if _holds_next_vector_model(folder):
        return load_next_vector_model(folder, codec, mesh)
    if codec is not None:
        raise InputError(f"--codec: {folder} is a density model; leave it out")
    return load_density_model(folder, mesh=mesh)


def load_next_vector_model(
    folder: str, codec: str | None = None, mesh: Mesh | None = None
) -> LanguageModel[NextVectorModel]:
    """The next-vector model in a folder, with a tokenizer; arguments as in `load_text_model`."""
    if not _holds_next_vector_model(folder):
        raise InputError(
            f"{folder} holds no next-vector model; give one that train_calm wrote"
        )
    lm = calm.load(folder, codec, mesh=mesh)
    require_tokenizer(lm, folder)
    return lm


def load_density_model(
    folder: str, *, mesh: Mesh | None = None
) -> LanguageModel[DensityModel]:
    """The density model of tokens in a folder, with a tokenizer.

    Args:
      folder: folder of the model.
      mesh: on which its parameters are to lie.
    """
    if _holds_next_vector_model(folder):
        raise InputError(
            f"{folder} holds a next-vector model; give one that train_density wrote"
        )
    lm = density.load(folder, mesh=mesh)
    if lm.model.input_kind != "tokens":
        raise InputError(
            f"{folder} holds a model that reads {lm.model.input_kind}, not tokens"
        )
    require_tokenizer(lm, folder)
    return lm


def require_tokenizer(
    lm: LanguageModel[DensityModel] | LanguageModel[NextVectorModel], folder: str
) -> tokenizers.Tokenizer:
    """The tokenizer of a model.

    Raises:
      InputError: that names the folder, if it has none.
    """
    if lm.tokenizer is None:
        raise InputError(f"{folder} has no tokenizer.json, which this program needs")
    return lm.tokenizer


def _holds_next_vector_model(folder: str) -> bool:
    """Return whether a model's folder holds a next-vector model, by its config.json.

    Raises:
      InputError: if it holds no model, or an autoencoder.
    """
    config_path = absolute_path(folder) / "config.json"
    if not config_path.is_file():
        raise InputError(f"{folder} is not a folder that a training program wrote")
    fields = read_json(config_path)
    if autoencoder.is_config(fields):
        raise InputError(
            f"{folder} holds an autoencoder; give a model that is trained on it"
        )
    return calm.is_config(fields)


def num_learned_parameters(
    lm: LanguageModel[DensityModel] | LanguageModel[NextVectorModel],
) -> int:
    """Count the trained numbers, without a frozen table or autoencoder."""
    frozen_parts = ("table", "autoencoder")
    learned_parts = {
        name: leaf for name, leaf in lm.params.items() if name not in frozen_parts
    }
    return sum(leaf.size for leaf in jax.tree.leaves(learned_parts))
