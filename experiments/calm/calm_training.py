"""Training of next-vector models: the autoencoder, then the model of its vectors."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from continuous_lm import losses
from continuous_lm.errors import InputError
from continuous_lm.experiments.calm import brier_lm
from continuous_lm.experiments.calm.calm_evaluation import reconstructed_share
from continuous_lm.experiments.training import fit, text, window_batches
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import Autoencoder, AutoencoderConfig
from continuous_lm.models.calm.chunk_inputs import ChunkInputs
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import Params

CODEC_WINDOW_TOKENS = 64  # of a window from which the autoencoder's chunks are cut
NUM_TARGET_DRAWS = 16  # draws of the posterior for each chunk of a training step
# Held-out windows from which a training run computes its loss and its scores.
NUM_LOSS_WINDOWS = 32
NUM_SCORE_WINDOWS = 128


# --- The autoencoder ------------------------------------------------------------------------------


def create_codec(
    key: jax.Array,
    *,
    vocab_size: int,
    hidden_size: int,
    chunk_size: int,
    latent_size: int,
    tokenizer: tokenizers.Tokenizer | None = None,
    settings: Mapping[str, Any] | None = None,
) -> LanguageModel[Autoencoder]:
    """An autoencoder whose MLPs are 8/3 times as wide as it is, in steps of 32.

    Args:
      key: PRNG key of the parameters.
      vocab_size: tokens that it knows.
      hidden_size: its width.
      chunk_size: tokens in a vector.
      latent_size: width of the vector.
      tokenizer: tokenizer of the tokens.
      settings: other fields of `AutoencoderConfig`, or other values of them.

    Raises:
      InputError: for a setting that `AutoencoderConfig` does not have, or of another type.
    """
    settings = settings or {}
    field_names = [field.name for field in dataclasses.fields(AutoencoderConfig)]
    for name in sorted(settings.keys() - set(field_names)):
        raise InputError(
            f"an autoencoder has no setting {name!r}; it has {', '.join(field_names)}"
        )
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "chunk_size": chunk_size,
        "latent_size": latent_size,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "mlp_size": -(-8 * hidden_size // 96) * 32,
    }
    hf_fields = {}
    if tokenizer is not None:
        hf_fields = {"eos_token_id": text.end_of_text_id(tokenizer)}
    config = AutoencoderConfig(**(fields | dict(settings)))
    return autoencoder.create(key, config, tokenizer, hf_fields)


def train_codec(
    codec: LanguageModel[Autoencoder],
    train_data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike[str],
    config: fit.FitConfig,
    settings: Mapping[str, Any] | None = None,
    label: str = "training",
) -> LanguageModel[Autoencoder]:
    """Train an autoencoder on the chunks of tokens [n], or resume the run in `folder`.

    Args:
      codec: the autoencoder with its initial parameters.
      train_data: training tokens.
      held_out: tokens whose reconstruction is logged with each checkpoint.
      folder: folder of the run; see `training.fit`.
      config: training settings. A row of a batch is a window of 64 tokens, rounded up to chunks.
        The seed also orders the data.
      settings: other settings that must be equal to resume a run.
      label: label of the progress bar.
    """
    codec_config = codec.model.config
    chunk_size = codec_config.chunk_size
    window_tokens = -(-CODEC_WINDOW_TOKENS // chunk_size) * chunk_size
    params = fit.fit(
        make_codec_loss(codec_config),
        codec.params,
        window_batches.shuffled_windows(
            train_data,
            length=window_tokens - 1,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
        folder=folder,
        config=config,
        settings={
            "autoencoder": dataclasses.asdict(codec_config),
            **(settings or {}),
            "batch_size": config.batch_size,
        },
        evaluate=make_codec_evaluation(
            codec_config,
            _held_out_windows(held_out, window_tokens).reshape(-1, chunk_size),
        ),
        tokens_per_step=window_tokens * config.batch_size,
        label=label,
    )
    return codec.with_params(params)


def make_codec_loss(
    codec_config: AutoencoderConfig,
) -> fit.LossFunction[Params, jax.Array]:
    """The mean loss of the chunks of windows int [B, n]."""

    def loss(params, batch, key):
        chunks = batch.reshape(-1, codec_config.chunk_size)
        nats = autoencoder.chunk_losses(codec_config, params, chunks, key)
        return jnp.mean(nats), {}

    return loss


def make_codec_evaluation(
    codec_config: AutoencoderConfig, held_out_chunks: np.ndarray
) -> fit.Evaluation[Params]:
    """Parameters -> "reconstructed", the share of tokens that come back of chunks int [n, C]."""

    @jax.jit
    def held_out_share(params):
        key = jax.random.key(0)
        return reconstructed_share(codec_config, params, held_out_chunks, key, 1.0)

    def evaluate(params):
        return {"reconstructed": float(held_out_share(params))}

    return evaluate


# --- The next-vector model ------------------------------------------------------------------------


def train(
    lm: LanguageModel[NextVectorModel],
    train_data: np.ndarray,
    held_out: np.ndarray,
    *,
    folder: str | os.PathLike[str],
    config: fit.FitConfig,
    length: int,
    settings: Mapping[str, Any] | None = None,
    label: str = "training",
) -> LanguageModel[NextVectorModel]:
    """Train a next-vector model on tokens [n] with a frozen autoencoder, or resume a run.

    Args:
      lm: the model with its initial parameters.
      train_data: training tokens.
      held_out: tokens whose loss and scores are logged with each checkpoint.
      folder: folder of the run; see `training.fit`.
      config: training settings. The seed also orders the data.
      length: chunks in a sequence.
      settings: other settings that must be equal to resume a run.
      label: label of the progress bar.
    """
    chunk_size = lm.model.chunk_size
    window_tokens = chunk_size * (length + 1)
    params = fit.fit(
        make_loss(lm.model),
        lm.params,
        window_batches.shuffled_windows(
            train_data,
            length=window_tokens - 1,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
        folder=folder,
        config=config,
        is_frozen=lambda path: path.startswith("autoencoder/"),
        settings={
            "length": length,
            "batch_size": config.batch_size,
            **(settings or {}),
        },
        evaluate=make_evaluation(lm.model, held_out, window_tokens),
        tokens_per_step=length * chunk_size * config.batch_size,
        label=label,
    )
    return lm.with_params(params)


def make_loss(
    model: NextVectorModel,
) -> fit.LossFunction[Params, jax.Array]:
    """The mean loss of the chunks of windows int [B, n]."""

    def loss(params, batch, key):
        chunks = batch.reshape(*batch.shape[:-1], -1, model.chunk_size)
        return jnp.mean(model.loss(params, ChunkInputs(chunks), key)), {}

    return loss


def make_evaluation(
    model: NextVectorModel, held_out: np.ndarray, window_tokens: int
) -> fit.Evaluation[Params]:
    """Parameters -> "held_out", the loss of held-out windows, and "brier_n" of their chunks.

    Args:
      model: the model.
      held_out: tokens [m].
      window_tokens: tokens of a window.
    """
    loss = make_loss(model)
    chunk_size = model.chunk_size
    loss_windows = _held_out_windows(held_out, window_tokens)
    score_windows = _held_out_windows(held_out, window_tokens, NUM_SCORE_WINDOWS)
    ngram_lengths = [n for n in brier_lm.NGRAM_LENGTHS if n <= chunk_size]

    @jax.jit
    def held_out_loss(params):
        return loss(params, jnp.asarray(loss_windows), jax.random.key(0))[0]

    @jax.jit
    def draws_and_reference(params):
        """Two draws for each of many held-out chunks, and these: [2, B, T, C] and [B, T, C]."""
        chunks = score_windows.reshape(len(score_windows), -1, chunk_size)
        hidden = model.context_states(params, ChunkInputs(jnp.asarray(chunks)))
        draws = model.sample_chunks(params, jax.random.key(0), hidden, 2)
        return draws, chunks[:, 1:]

    def evaluate(params):
        (first, second), reference = draws_and_reference(params)
        metrics = {"held_out": float(held_out_loss(params))}
        for n in ngram_lengths:
            scores = losses.brier_n(
                first[..., :n], second[..., :n], reference[..., :n], n=n
            )
            metrics[f"brier_{n}"] = float(jnp.mean(scores))
        return metrics

    return evaluate


def _held_out_windows(
    tokens: np.ndarray, length: int, limit: int = NUM_LOSS_WINDOWS
) -> np.ndarray:
    """Held-out windows of so many tokens, [k, length]."""
    return window_batches.consecutive_windows(
        tokens, length=length - 1, max_windows=limit
    )
