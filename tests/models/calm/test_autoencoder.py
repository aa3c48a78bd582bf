"""The autoencoder: its loss and layers against numpy, its folders, and that it learns."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

import continuous_lm as clm
from continuous_lm import losses
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import Autoencoder, AutoencoderConfig
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.transformer import Transformer
from tests.fixtures import tiny

KEY = jax.random.key(0)
SIZES = dict(
    vocab_size=12,
    hidden_size=8,
    mlp_size=10,
    encoder_layers=4,
    decoder_layers=4,
    latent_size=5,
    chunk_size=3,
)
CONFIG = AutoencoderConfig(**SIZES, dropout=0.3, kl_weight=0.2, kl_floor=0.4)
CHUNKS = np.random.default_rng(0).integers(0, 12, (2, 4, 3))
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def codec():
    """An autoencoder whose parameters are neither zeros, ones nor small."""
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(
            name.endswith("norm") + 0.3 * rng.normal(size=declaration.shape), "float32"
        )
        for name, declaration in autoencoder.parameter_table(CONFIG).items()
    }
    return LanguageModel(Autoencoder(CONFIG), params)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(config, params, key):
    return autoencoder.chunk_losses(config, params, CHUNKS, key)


@pytest.fixture(scope="module")
def encode_visible():
    """`encode_chunks` of the visible tokens, compiled."""
    return jax.jit(autoencoder.encode_chunks, static_argnums=0)


# --- The loss --------------------------------------------------------------------------------


@jax.jit
def draw_masks(key, keep):
    """Return masks of visible tokens, noise, and masks of latents without dropout."""
    of_tokens, of_noise, of_latents = jax.random.split(key, 3)
    latents = (*CHUNKS.shape[:2], CONFIG.latent_size)
    return (
        jax.random.bernoulli(of_tokens, keep, CHUNKS.shape),
        jax.random.normal(of_noise, latents),
        jax.random.bernoulli(of_latents, keep, latents),
    )


def by_hand(codec, config, key, encode):
    """The loss [2, 4] in numpy, from the model's own encoder and decoder."""
    keep = 1 - config.dropout
    mask, noise, is_kept = map(np.asarray, draw_masks(key, keep))
    mean, log_scale = (
        np.asarray(a, np.float64) for a in encode(CONFIG, codec.params, CHUNKS, mask)
    )
    z = mean + np.exp(log_scale) * noise
    z = np.where(is_kept, z / keep, 0)
    logs = log_softmax(np.asarray(autoencoder.decode(codec, z), np.float64), axis=-1)
    nats = -np.take_along_axis(logs, CHUNKS[..., None], axis=-1)[..., 0].sum(axis=-1)
    kl = (mean**2 + np.exp(2 * log_scale) - 1) / 2 - log_scale
    return nats, np.maximum(kl, config.kl_floor).sum(axis=-1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(dict(dropout=0.0, kl_weight=0.0), marks=slow),
        pytest.param(dict(dropout=0.6, kl_floor=0.0), marks=slow),
    ],
    ids=str,
)
def test_loss_by_hand(codec, encode_visible, changes):
    config = dataclasses.replace(CONFIG, **changes)
    key = jax.random.key(4)
    nats, divergence = by_hand(codec, config, key, encode_visible)
    loss = loss_of(config, codec.params, key)
    assert loss.shape == (2, 4)
    np.testing.assert_allclose(loss, nats + config.kl_weight * divergence, rtol=2e-5)
    assert np.ptp(nats) > 1
    assert (divergence > 1.01 * config.kl_floor * config.latent_size).all()


@slow
def test_the_divergence_is_weighted_and_has_a_floor(codec):
    """Beside the same draws, nothing else changes; far above all of it, the floor counts."""
    configs = [
        dataclasses.replace(CONFIG, dropout=0.0, **changes)
        for changes in (
            dict(kl_weight=0.0),
            dict(kl_weight=2.0),
            dict(kl_weight=2.0, kl_floor=1e3),
        )
    ]
    without, with_it, floored = (loss_of(c, codec.params, KEY) for c in configs)
    mean, log_scale = autoencoder.encode(codec, CHUNKS)
    divergence = losses.gaussian_kl(mean, jnp.exp(log_scale), floor=CONFIG.kl_floor)
    np.testing.assert_allclose(with_it - without, 2 * divergence, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(floored - without, 2e3 * CONFIG.latent_size, rtol=1e-5)


@given(hidden=st.lists(st.booleans(), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_only_visible_tokens_have_an_effect(codec, encode_visible, hidden, seed):
    rng, hidden = np.random.default_rng(seed), np.array(hidden)
    moved = (CHUNKS + rng.integers(1, 12, CHUNKS.shape)) % 12
    mask = np.broadcast_to(~hidden, CHUNKS.shape)
    first = encode_visible(CONFIG, codec.params, CHUNKS, mask)
    for changed, same in ((hidden, True), (~hidden, hidden.all())):
        other = encode_visible(
            CONFIG, codec.params, np.where(changed, moved, CHUNKS), mask
        )
        for a, b in zip(first, other, strict=True):
            assert (np.array_equal(a, b)) == same
    if not hidden.any():
        for a, b in zip(first, autoencoder.encode(codec, CHUNKS), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_embeddings_of_hidden_tokens_have_no_gradient(codec):
    chunk, mask = np.array([3, 7, 9]), np.array([True, False, True])

    @jax.jit
    @jax.grad
    def gradient(table):
        params = codec.params | {"embedding": table}
        mean, _ = autoencoder.encode_chunks(CONFIG, params, chunk, mask)
        return mean.sum()

    size = np.abs(gradient(codec.params["embedding"])).sum(axis=-1)
    assert np.flatnonzero(size).tolist() == [3, 9]


# --- The layers ------------------------------------------------------------------------------


def normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def looped(x, p, name, layers):
    """Pre-normed, residual gated MLPs in turn."""
    for i in layers:
        y = normed(x, p[f"{name}_norm"][i])
        gate = y @ p[f"{name}_gate"][i].T
        x = (
            x
            + (gate / (1 + np.exp(-gate)) * (y @ p[f"{name}_up"][i].T))
            @ p[f"{name}_down"][i].T
        )
    return x


def test_layers_equal_a_loop(codec):
    """The loop runs in float64, chunk by chunk, with an explicit order of tokens and halves."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in codec.params.items()}
    mean, log_scale = autoencoder.encode(codec, CHUNKS)
    latents = np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32)
    logits = autoencoder.decode(codec, latents)
    assert logits.shape == (2, 4, 3, 12)
    for i in np.ndindex(2, 4):
        tokens = looped(p["embedding"][CHUNKS[i]], p, "encoder", (0, 1))
        x = p["squeeze_bias"] + sum(p["squeeze"][:, o] @ tokens[o] for o in range(3))
        x = normed(looped(x, p, "encoder", (2, 3)), p["encoder_last_norm"])
        close(mean[i], p["mean"] @ x + p["mean_bias"])
        close(log_scale[i], p["log_scale"] @ x + p["log_scale_bias"])
        x = looped(p["latent"] @ latents[i] + p["latent_bias"], p, "decoder", (0, 1))
        x = np.stack([p["expand"][o] @ x + p["expand_bias"][o] for o in range(3)])
        x = normed(looped(x, p, "decoder", (2, 3)), p["decoder_last_norm"])
        close(logits[i], x @ p["embedding"].T)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)
    assert np.std(expected) > 0.05


# --- Folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_models_load_bit_for_bit(codec, tmp_path, dtype):
    tokenizer = tiny.word_tokenizer("one two three four five six seven eight nine ten")
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype)), codec.params
    )
    notes = {"eos_token_id": 3, "initializer_range": 0.5}
    lm = LanguageModel(Autoencoder(CONFIG), params, tokenizer, notes)
    autoencoder.save(tmp_path / "out", lm)
    loaded = autoencoder.load(tmp_path / "out")
    assert loaded.model.config == CONFIG
    assert loaded.tokenizer.to_str() == tokenizer.to_str()
    assert notes.items() <= loaded.hf_fields.items()
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    for a, b in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True
    ):
        assert a.dtype == b.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    again = tmp_path / "again"
    autoencoder.save(again, loaded)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    first, second = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "out", again)
    )
    assert first == second
    assert first["torch_dtype"] == dtype
    mean, log_scale = autoencoder.encode(loaded, CHUNKS)
    logits = autoencoder.decode(loaded, mean)
    assert mean.dtype == log_scale.dtype == logits.dtype == jnp.float32
    # The rounding of bfloat16's 8 digits, through ten layers, against values of order 1.
    tolerance = 1e-6 if dtype == "float32" else 0.15
    np.testing.assert_allclose(
        mean, autoencoder.encode(codec, CHUNKS)[0], atol=tolerance, rtol=tolerance
    )


def test_parameters_that_do_not_fit_are_not_saved(codec, tmp_path):
    for change in ({"more": jnp.zeros(3)}, {"squeeze": jnp.zeros((8, 2, 8))}):
        changed = codec.with_params(codec.params | change)
        with pytest.raises(clm.InputError, match=next(iter(change))):
            autoencoder.save(tmp_path / "out", changed)
    assert not (tmp_path / "out").exists()


@slow
def test_a_key_makes_the_parameters(codec):
    small = dataclasses.replace(CONFIG, hidden_size=2, mlp_size=3)
    first, again, other = (
        autoencoder.create(jax.random.key(seed), small).params for seed in (0, 0, 1)
    )
    assert first.keys() == codec.params.keys()
    assert first["encoder_up"].shape == (4, 3, 2)
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[name])
        assert leaf.std() == 0 or not np.array_equal(leaf, other[name])


# --- Refused arguments -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(encoder_layers=3), "num_encoder_layers is 3; it must be even"),
        (dict(decoder_layers=1), "num_decoder_layers is 1; it must be even"),
        (dict(dropout=1.0), "ae_dropout is 1.0"),
        (dict(dropout=-0.1), "ae_dropout is -0.1"),
        (dict(dropout=float("nan")), "ae_dropout is nan"),
        (dict(kl_weight=-1.0), "kl_weight is -1.0"),
        (dict(kl_weight=float("inf")), "kl_weight is inf"),
        (dict(kl_floor=-1e-9), "kl_floor is -1e-09"),
        (dict(kl_floor=float("nan")), "kl_floor is nan"),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(clm.InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_chunks_and_latents_that_do_not_fit(codec):
    for chunks, message in (
        (CHUNKS[..., :2], r"chunks have shape \[2, 4, 2\]; it must be \[..., 3\]"),
        (np.int32(3), r"chunks have shape \[\]"),
        (np.zeros((0,), int), r"chunks have shape \[0\]"),
        (CHUNKS + 1, "chunks"),
        (CHUNKS - 1, "chunks"),
        (CHUNKS * 1.0, "chunks"),
    ):
        with pytest.raises(clm.InputError, match=message):
            autoencoder.encode(codec, chunks)
    for shape in ((2, 4), (5, 1), ()):
        with pytest.raises(clm.InputError, match=r"it must be \[..., 5\]"):
            autoencoder.decode(codec, np.zeros(shape, np.float32))
    inside = jax.jit(lambda chunks: codec.model.apply({"params": codec.params}, chunks))
    with pytest.raises(
        clm.InputError, match="chunks have shape"
    ):  # shapes are known in jit
        inside(CHUNKS[..., :2])
    assert autoencoder.encode(codec, np.zeros((0, 3), np.int32))[0].shape == (0, 5)


def test_other_kinds_of_models_are_refused(codec):
    trunk = LanguageModel(Transformer(tiny.TRUNK_CONFIG), {})
    for call in (autoencoder.encode, autoencoder.decode):
        with pytest.raises(
            clm.InputError, match=r"a Transformer.* needs an Autoencoder"
        ):
            call(trunk, CHUNKS)


def test_apply_decodes_the_mean(codec):
    logits = jax.jit(codec.model.apply)({"params": codec.params}, CHUNKS)
    mean, _ = autoencoder.encode(codec, CHUNKS)
    np.testing.assert_allclose(
        logits, autoencoder.decode(codec, mean), rtol=1e-5, atol=1e-6
    )


def test_init_of_linen_has_the_parameters_of_the_table(codec):
    """With the axes of the table, by which a mesh divides them."""
    variables = jax.eval_shape(codec.model.init, KEY, CHUNKS)["params"]
    table = autoencoder.parameter_table(CONFIG)
    assert {name: box.names for name, box in variables.items()} == {
        name: declaration.axes for name, declaration in table.items()
    }
    fewer = {n: a for n, a in codec.params.items() if n != "squeeze"}
    with pytest.raises(clm.InputError, match="parameter squeeze is missing"):
        codec.model.apply({"params": fewer}, CHUNKS)


# --- It learns -------------------------------------------------------------------------------


@slow
def test_a_trained_autoencoder_reconstructs_from_sampled_latents():
    """All 144 chunks of two out of 12 tokens, with noise of the posterior's own scale."""
    config = AutoencoderConfig(
        vocab_size=12,
        hidden_size=16,
        mlp_size=32,
        encoder_layers=2,
        decoder_layers=2,
        latent_size=16,
        chunk_size=2,
    )
    chunks, losses = (
        np.stack(np.divmod(np.arange(144), 12), axis=-1),
        autoencoder.create(KEY, config),
    )
    optimizer = optax.adamw(5e-3)

    def share(params, key):
        mean, log_scale = autoencoder.encode_chunks(config, params, chunks)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, (50, *mean.shape))
        logits = autoencoder.decode_latents(config, params, z)
        return jnp.mean(jnp.argmax(logits, axis=-1) == chunks)

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            nats, grads = jax.value_and_grad(
                lambda params: autoencoder.chunk_losses(
                    config, params, chunks, key
                ).mean()
            )(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), nats

        keys = jax.random.split(key, 800)
        (params, _), nats = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, nats

    params, nats = train(losses.params, jax.random.key(1))
    share_of = jax.jit(share)
    assert nats[-50:].mean() < nats[:50].mean()
    assert share_of(losses.params, KEY) < 0.5
    assert share_of(params, KEY) > 0.99
