"""Next-vector models learn on the default text: minutes of training, so slow."""

import jax
import numpy as np
import pytest

from continuous_lm.experiments.calm import calm_evaluation, calm_training
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import fit, text
from continuous_lm.models import calm
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.implicit_heads import EnergyHead

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokens():
    """Training and held-out tokens of the text that every Python carries, and their tokenizer."""
    train, held_out = text.split_held_out(text.default_text().documents)
    tokenizer = text.train_tokenizer(train, 1024)
    return (
        text.encode_documents(tokenizer, train),
        text.encode_documents(tokenizer, held_out),
        tokenizer,
    )


@pytest.fixture(scope="module")
def codec(tokens, tmp_path_factory):
    train, held_out, tokenizer = tokens
    created = calm_training.create_codec(
        jax.random.key(0),
        vocab_size=1024,
        hidden_size=128,
        chunk_size=4,
        latent_size=64,
        tokenizer=tokenizer,
        settings={"kl_weight": 0.03},
    )
    folder = tmp_path_factory.mktemp("codec")
    return calm_training.train_codec(
        created,
        train,
        held_out,
        folder=folder,
        config=fit.FitConfig(steps=600, learning_rate=2e-3, batch_size=16),
    )


def test_chunks_come_back_from_draws_and_with_noise(tokens, codec):
    held_out = tokens[1]
    assert len(held_out) > 40_000
    shares = calm_evaluation.reconstruction_shares(codec, held_out)
    assert shares["sampled"] >= 0.995
    assert shares["noisy"] >= 0.97
    # And not because the noise is nothing beside the means: it is a third of their deviation.
    mean, log_scale = autoencoder.encode(codec, held_out[:8192].reshape(-1, 4))
    assert np.exp(log_scale).mean() > 0.2 * np.std(mean)


def test_contexts_tell_what_follows(tokens, codec, tmp_path):
    """Brier-1 and 2 exceed those with other contexts, and their intervals do not overlap."""
    train, held_out, _ = tokens
    config = density_training.trunk_config(
        vocab_size=1024, hidden_size=128, num_layers=4, num_heads=4
    )
    head = EnergyHead(64, depth=2)
    lm = calm.create(
        jax.random.key(1),
        config,
        codec,
        head,
        num_targets=calm_training.NUM_TARGET_DRAWS,
    )
    lm = calm_training.train(
        lm,
        train,
        held_out,
        folder=tmp_path / "run",
        config=fit.FitConfig(steps=1000, learning_rate=2e-3, batch_size=16),
        length=32,
    )
    scores = calm_evaluation.evaluate_brier_lm(
        lm, held_out, context=32, stride=8, limit=4096
    )
    for name in ("brier_1", "brier_2"):
        assert scores["sampled"][name]["low"] > scores["shuffled"][name]["high"]
