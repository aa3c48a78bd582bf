"""What the calm_* programs share: the trunk's shape, training a density model, reading one."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from continuous_lm import axes as axes_lib
from continuous_lm import losses
from continuous_lm.errors import InputError
from continuous_lm.experiments.training import fit, window_batches
from continuous_lm.io.atomic_files import absolute_path
from continuous_lm.io.json_files import read_json
from continuous_lm.models import calm as next_vector
from continuous_lm.models import density, parameters
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density.model import DensityLM
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.parallel import processes
from continuous_lm.rotary import Rope

NUM_LOSS_WINDOWS, NUM_SCORE_WINDOWS = (
    32,
    128,
)  # held-out windows that a training run takes its loss and score of


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


def parse_settings(assignments: list[str], flag_name: str) -> dict[str, Any]:
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


def train(
    lm: DensityLM,
    train_data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike,
    config: fit.FitConfig,
    length: int,
    trunk_is_frozen: bool = False,
    settings: Mapping[str, Any] | None = None,
    label: str = "training",
) -> DensityLM:
    """Trains a density model on tokens [n] or vectors [n, W], or goes on with the run in `folder`.

    Args:
      lm: the model with its first parameters.
      train_data: what to train on.
      held_out: what the loss is logged of, with each checkpoint.
      folder: of the run; see `training.fit`.
      config: how to train; its seed is that of the data's order too.
      length: inputs in a sequence.
      trunk_is_frozen: train the head alone.
      settings: other settings that must be the same for a run to go on.
      label: of the progress bar.
    """
    model, input_kind = lm.model, lm.model.input_kind

    def loss(params, batch, key):
        token_losses: Any = model.apply(
            {"params": params}, **{input_kind: batch}, method="loss"
        )
        return jnp.mean(token_losses), {}

    loss_windows = window_batches.consecutive_windows(
        held_out, length=length, max_windows=NUM_LOSS_WINDOWS
    )
    held_out_loss: Callable = jax.jit(
        lambda params: loss(params, loss_windows, None)[0]
    )
    score_windows = window_batches.consecutive_windows(
        held_out, length=length, max_windows=NUM_SCORE_WINDOWS
    )

    @jax.jit
    def brier_1(params):
        """2 P(token) - sum_v P(v)^2: what next-vector models are scored by, in closed form."""

        def window_brier_1(window):  # one at a time: its logits are length x V numbers
            logits: Any = model.apply({"params": params}, window, method="token_logits")
            return losses.brier(jax.nn.softmax(logits), window[1:])

        return 1.0 - jnp.mean(jax.lax.map(window_brier_1, score_windows))

    def evaluate(params):
        scores = {"brier_1": float(brier_1(params))} if model.predicts_tokens else {}
        return {"held_out": float(held_out_loss(params)), **scores}

    params = fit.fit(
        loss,
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
        evaluate=evaluate,
        tokens_per_step=length * config.batch_size,
        label=label,
    )
    return DensityLM(model, params, lm.tokenizer, lm.hf_fields)


def place_on_mesh(lm: Any, mesh: Mesh | None) -> Any:
    """A density or next-vector model or an autoencoder, with its parameters on a mesh."""
    key = jax.random.key(0)
    match lm:
        case DensityLM():
            example_inputs = density.example_inputs(lm.model)
            abstract_variables = jax.eval_shape(
                lambda: lm.model.init(key, **example_inputs)
            )
        case _:
            table = lm.model.parameter_table()
            return lm.with_params(parameters.place(mesh, lm.params, table))
    params = axes_lib.place_tree(mesh, lm.params, abstract_variables["params"])
    return dataclasses.replace(lm, params=params)


def save_on_first_process(
    write_model: Callable[[Any, Any], None], folder: str | os.PathLike, lm: Any
) -> None:
    """`write_model(folder, lm)` by process 0, which gets all of the parameters first."""
    if jax.process_count() > 1:
        lm = dataclasses.replace(lm, params=processes.gather_to_hosts(lm.params))
    if processes.is_first_process():
        write_model(folder, lm)


def load_text_model(
    folder: str | os.PathLike,
    codec: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
) -> DensityLM | LanguageModel[NextVectorModel]:
    """The density or next-vector model in a folder, with a tokenizer.

    Args:
      folder: of the model.
      codec: of the autoencoder, of a next-vector model that does not hold its own.
      mesh: on which its parameters are to lie.
    """
    path = absolute_path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"{folder} is not a folder that the program train wrote")
    fields = read_json(path / "config.json")
    if autoencoder.is_config(fields):
        raise InputError(
            f"{folder} holds an autoencoder; give a model that is trained on it"
        )
    if not next_vector.is_config(fields):
        if codec is not None:
            raise InputError(f"--codec: {folder} is a density model; leave it out")
        return load_density_model(folder, mesh=mesh)
    lm = next_vector.load(folder, codec, mesh=mesh)
    if lm.tokenizer is None:
        raise InputError(f"{folder} has no tokenizer.json, which this program needs")
    return lm


def load_density_model(
    folder: str | os.PathLike, *, input_kind: str = "tokens", mesh: Mesh | None = None
) -> DensityLM:
    """The density model in a folder, that a program can go on with."""
    folder = absolute_path(folder)
    if not pathlib.Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder; train writes one")
    lm = density.load(folder, mesh=mesh)
    if lm.model.input_kind != input_kind:
        raise InputError(
            f"{folder} holds a model that reads {lm.model.input_kind}, not {input_kind}"
        )
    if input_kind == "tokens" and lm.tokenizer is None:
        raise InputError(f"{folder} has no tokenizer.json, which this program needs")
    return lm


def num_learned_parameters(lm: DensityLM | LanguageModel[NextVectorModel]) -> int:
    """How many numbers are learned: a frozen table or autoencoder is not among them."""
    frozen_parts = ("table", "autoencoder")
    learned_parts = {
        name: leaf for name, leaf in lm.params.items() if name not in frozen_parts
    }
    return sum(leaf.size for leaf in jax.tree.leaves(learned_parts))
