"""Positions, reconstruction and continuations of next-vector models, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.experiments.calm import calm_evaluation, calm_training
from continuous_lm.models import calm
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.generation import generate
from tests.fixtures import tiny

KEY = jax.random.key(0)
V = tiny.CODEC_CONFIG.vocab_size
slow = pytest.mark.slow


# --- Positions -------------------------------------------------------------------------------


@given(
    length=st.integers(12, 300),
    context=st.integers(1, 8),
    stride=st.integers(1, 20),
    limit=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_positions_are_places_of_the_text(length, context, stride, limit, seed):
    """Tokens that are their own indices say where each row is from."""
    options = dict(context=context, stride=stride, limit=limit, seed=seed)
    contexts, references, groups = calm_evaluation.evaluation_positions(
        np.arange(length), **options
    )
    begins = contexts[:, 0]
    np.testing.assert_array_equal(contexts, begins[:, None] + np.arange(context))
    np.testing.assert_array_equal(references, begins[:, None] + context + np.arange(4))
    assert references.max() < length
    there = range(0, length - context - 4 + 1, stride)
    assert len(set(begins)) == len(begins) == min(limit, len(there))
    assert set(begins) <= set(there)
    if limit >= 2 and len(begins) < len(there):  # spread over the text
        assert np.ptp(begins) >= 0.4 * (length - context - 4 - stride)
    if stride >= 4:
        assert len(np.unique(references)) == references.size  # no token is judged twice
    # Positions in one group are near, and contexts of any that are not neighbours share nothing.
    np.testing.assert_array_equal(groups, begins // (context + 4))
    for contexts_of, number in (
        (contexts[groups == g], g) for g in set(groups.tolist())
    ):
        assert np.ptp(contexts_of[:, 0]) < context + 4, number
    again = calm_evaluation.evaluation_positions(np.arange(length), **options)
    for a, b in zip(again, (contexts, references, groups), strict=True):
        np.testing.assert_array_equal(a, b)


def test_positions_come_in_an_order_of_chance():
    """Seeds change the order, but not the positions."""
    options = dict(context=4, stride=4, limit=50)
    first, second = (
        calm_evaluation.evaluation_positions(np.arange(400), **options, seed=seed)[0][
            :, 0
        ]
        for seed in (0, 1)
    )
    assert sorted(first) == sorted(second)
    assert (first != second).mean() > 0.8
    assert (np.diff(first) < 0).any()


def test_a_text_without_a_position_is_refused():
    options = dict(context=8, stride=1, limit=4)
    with pytest.raises(clm.InputError, match="the held-out data is too short"):
        calm_evaluation.evaluation_positions(np.arange(11), **options)
    assert calm_evaluation.evaluation_positions(np.arange(12), **options)[0].shape == (
        1,
        8,
    )


# --- The autoencoder -------------------------------------------------------------------------


def returned(codec, chunks, latents):
    """The share of the chunks' tokens that their latents are decoded to."""
    return float(
        np.mean(np.argmax(autoencoder.decode(codec, latents), axis=-1) == chunks)
    )


def test_reconstruction_is_the_mean_over_all_chunks():
    """An untrained autoencoder; an incomplete last chunk is dropped."""
    codec, tokens = (
        calm.autoencoder_of(tiny.next_vector_lm()),
        np.random.default_rng(0).integers(0, V, 602),
    )
    actual = calm_evaluation.reconstruction_shares(codec, tokens)
    assert list(actual) == ["mean", "sampled", "noisy"]
    assert all(0 <= share <= 1 for share in actual.values())
    assert len(set(actual.values())) == 3
    chunks = tokens[:600].reshape(-1, 3)
    mean, log_scale = autoencoder.encode(codec, chunks)
    assert actual["mean"] == pytest.approx(returned(codec, chunks, mean), abs=1e-6)
    # Noise of variance 1 and of variance 2, of the posterior's scale, from the same draws.
    noise = jnp.exp(log_scale) * jax.random.normal(
        jax.random.fold_in(KEY, 0), mean.shape
    )
    for name, factor in (("sampled", 1.0), ("noisy", 2**0.5)):
        expected = returned(codec, chunks, mean + factor * noise)
        assert actual[name] == pytest.approx(expected, abs=2e-3)
    assert (
        calm_evaluation.reconstruction_shares(codec, tokens, seed=1)["sampled"]
        != actual["sampled"]
    )
    assert calm_evaluation.reconstruction_shares(codec, tokens[:600]) == actual


@slow
def test_reconstruction_of_many_chunks_counts_each_of_them_once():
    """Batches have unequal sizes."""
    codec, tokens = (
        calm.autoencoder_of(tiny.next_vector_lm()),
        np.random.default_rng(0).integers(0, V, 3 * 4101),
    )
    tokens[: 3 * 2000] = 0
    chunks = tokens.reshape(-1, 3)
    actual = calm_evaluation.reconstruction_shares(codec, tokens)["mean"]
    assert actual == pytest.approx(
        returned(codec, chunks, autoencoder.encode(codec, chunks)[0]), abs=1e-6
    )


def test_reconstruction_of_less_than_a_chunk_is_refused():
    with pytest.raises(clm.InputError, match="too short"):
        calm_evaluation.reconstruction_shares(
            calm.autoencoder_of(tiny.next_vector_lm()), np.arange(2)
        )


def test_between_two_texts():
    """Both ends are decoded from their own latents; the longer text is cut to whole chunks."""
    codec, rng = calm.autoencoder_of(tiny.next_vector_lm()), np.random.default_rng(1)
    first, second = rng.integers(0, V, 11).tolist(), rng.integers(0, V, 8).tolist()
    rows = calm_evaluation.interpolate_texts(codec, first, second, num_points=7)
    assert [len(row) for row in rows] == [6] * 7
    for row, tokens in ((rows[0], first), (rows[-1], second)):
        decoded = autoencoder.decode(
            codec, autoencoder.encode(codec, np.reshape(tokens[:6], (2, 3)))[0]
        )
        assert row == np.argmax(decoded, axis=-1).ravel().tolist()
    assert rows[0] != rows[-1]
    assert (
        calm_evaluation.interpolate_texts(codec, second, first, num_points=7)
        == rows[::-1]
    )
    ends = [
        autoencoder.encode(codec, np.reshape(tokens[:6], (2, 3)))[0]
        for tokens in (first, second)
    ]
    middle = (
        np.argmax(autoencoder.decode(codec, (ends[0] + ends[1]) / 2), axis=-1)
        .ravel()
        .tolist()
    )
    assert rows[3] == middle
    with pytest.raises(clm.InputError, match="less than the 3 tokens of a chunk"):
        calm_evaluation.interpolate_texts(codec, first, [1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(width=3), "no setting 'width'; it has vocab_size"),
        (dict(dropout="much"), "dropout is 'much'; it must be float"),
        (dict(encoder_layers=2.0), "encoder_layers is 2.0; it must be int"),
        (dict(encoder_layers=True), "encoder_layers is True; it must be int"),
        (dict(encoder_layers=3), "num_encoder_layers is 3; it must be even"),
        (dict(dropout=1), "ae_dropout is 1"),
        (dict(activation=1), "activation is 1; it must be str"),
        (dict(latent_size=None), "latent_size is None; it must be int"),
        (dict(mlp_size="wide"), "mlp_size is 'wide'; it must be int"),
        (
            dict(encoder_layers=0),
            "num_encoder_layers is 0; it must be an integer from 1",
        ),
        (dict(decoder_layers=-2), "num_decoder_layers is -2"),
        (dict(norm_eps=0.0), "norm_eps is 0.0"),
        (dict(activation="tanh"), "'tanh'"),
    ],
    ids=str,
)
def test_settings_of_an_autoencoder_are_checked(settings, message):
    sizes = dict(vocab_size=10, hidden_size=8, chunk_size=3, latent_size=4)
    with pytest.raises(clm.InputError, match=message):
        calm_training.create_codec(KEY, **sizes, settings=settings)


# --- Continuations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=slow) for size in (1, 4, 8))]
)
def test_continuations_have_4_tokens_whatever_a_chunk_has(size):
    """Equal to a loop of single batches with a padded last one."""
    lm, rng = tiny.next_vector_lm(chunk_size=size), np.random.default_rng(0)
    contexts = rng.integers(0, V, (5, 8))
    first, second = calm_evaluation.draw_continuations(lm, contexts, KEY, batch_size=2)
    for created in (first, second):
        assert created.shape == (5, 4)
        assert created.dtype.kind == "i"
        assert (created >= 0).all()
        assert (created < V).all()
    assert (first != second).any()
    for i in (0, 2, 4):
        picked = contexts[np.minimum([i, i + 1], 4)]
        new = generate(
            lm,
            np.concatenate([picked, picked]),
            sampler=calm.Repetition(),
            max_new_tokens=4,
            key=jax.random.fold_in(KEY, i),
            stop=(),
        ).tokens
        count = min(2, 5 - i)
        np.testing.assert_array_equal(first[i : i + 2], new[:count])
        np.testing.assert_array_equal(second[i : i + 2], new[2 : 2 + count])
