"""Next-vector models: their functions against their parts, their parameters, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import losses
from continuous_lm.models import calm
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.implicit_heads import EnergyHead
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import flatten
from continuous_lm.models.transformer import Transformer
from tests.fixtures import tiny

KEY = jax.random.key(0)
V, SIZE = tiny.CODEC_CONFIG.vocab_size, tiny.CODEC_CONFIG.chunk_size
CHUNKS = np.random.default_rng(0).integers(0, V, (2, 5, SIZE))
DURATIONS = np.array([1.0, 0.25, 2.0, 0.5, 1.5], np.float32)


@pytest.fixture(scope="module")
def lm():
    return tiny.next_vector_lm()


# --- The functions ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"durations": DURATIONS, "start": 2.0}])
def test_apply_is_the_pure_function_and_the_jitted_one(lm, options):
    found = lm.model.apply({"params": lm.params}, CHUNKS, **options)
    inputs = lm.model.make_inputs(CHUNKS, **options)
    hidden = lm.model.hidden_states(lm.params, inputs).hidden
    np.testing.assert_array_equal(found, hidden)
    jitted = calm.hidden_states(lm, CHUNKS, **options)
    np.testing.assert_allclose(jitted, hidden, rtol=1e-4, atol=1e-5)
    last = calm.hidden_states(lm, CHUNKS, position=-1, **options)
    np.testing.assert_allclose(last, hidden[:, -1], rtol=1e-4, atol=1e-5)
    context = lm.model.context_states(lm.params, inputs)
    np.testing.assert_allclose(context, hidden[:, :-1], rtol=1e-4, atol=1e-5)


def test_durations_and_times_are_read(lm):
    plain = calm.hidden_states(lm, CHUNKS)
    timed = calm.hidden_states(lm, CHUNKS, durations=DURATIONS)
    ends = np.cumsum(DURATIONS)
    same = calm.hidden_states(lm, CHUNKS, durations=DURATIONS, times=ends)
    np.testing.assert_allclose(same, timed, rtol=1e-4, atol=1e-5)
    other = calm.hidden_states(lm, CHUNKS, durations=DURATIONS, times=3 * ends)
    assert np.abs(timed - plain)[:, 1:].max() > 1e-3
    assert np.abs(other - timed)[:, 1:].max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"durations": DURATIONS}])
def test_loss_by_hand(lm, options):
    """The energy score of the head's samples against draws of the posterior, key by key."""
    key = jax.random.key(7)
    found = calm.loss(lm, CHUNKS, key, **options)
    assert found.shape == (2, 4)
    target_key, head_key = jax.random.split(key)
    codec = calm.autoencoder_of(lm)
    mean, log_scale = autoencoder.encode(codec, CHUNKS[:, 1:])
    spread = jax.random.normal(target_key, (lm.model.num_targets, *mean.shape))
    targets = np.asarray(mean) + np.exp(np.asarray(log_scale)) * np.asarray(spread)
    hidden = calm.hidden_states(lm, CHUNKS, **options)[:, :-1]
    head = lm.model.head
    noise = head.noise(head_key, (head.num_samples, *hidden.shape[:-1]))
    samples = calm.transform(lm, noise, hidden)
    expected = losses.energy_score(samples, targets, beta=head.beta)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.ptp(np.asarray(log_scale)) > 0.5  # neither the scale nor its square is 1


@pytest.mark.parametrize("num_targets", [1, 4, 7])
def test_loss_of_many_durations(lm, num_targets):
    model = lm.model.clone(num_targets=num_targets)
    lm = lm.with_model(model)
    durations = np.stack([DURATIONS * factor for factor in (0.5, 1.0, 1.5, 2.0)])
    nats = calm.loss(lm, CHUNKS[0], KEY, durations=durations)
    repeated_chunks = np.stack([CHUNKS[0]] * len(durations))
    expected = calm.loss(lm, repeated_chunks, KEY, durations=durations)
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_the_autoencoder_gets_no_gradient(lm):
    inputs = lm.model.make_inputs(CHUNKS)

    @jax.jit
    @jax.grad
    def gradient(params):
        return lm.model.loss(params, inputs, KEY).sum()

    sizes = {
        path: np.abs(slope).max()
        for path, slope in flatten(gradient(lm.params)).items()
    }
    for path, size in sizes.items():
        assert (size == 0) == path.startswith("autoencoder/"), path


def test_chunks_are_drawn_and_decoded(lm):
    hidden = calm.hidden_states(lm, CHUNKS)
    drawn = lm.model.sample_chunks(lm.params, KEY, hidden, 3)
    assert drawn.shape == (3, *CHUNKS.shape)
    latents = calm.transform(lm, lm.model.head.noise(KEY, (3, 2, 5)), hidden)
    logits = autoencoder.decode(calm.autoencoder_of(lm), latents)
    np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1))
    assert len(np.unique(drawn)) > 3


# --- Parameters ------------------------------------------------------------------------------


def test_linen_makes_the_parameters_of_the_table(lm):
    """With the axes of the table, by which a mesh divides them; the same for the same key."""
    table = lm.model.parameter_table()
    shapes = jax.eval_shape(lm.model.init, KEY, CHUNKS)["params"]
    boxes = flatten(shapes)
    assert {path: box.names for path, box in boxes.items()} == {
        path: declaration.axes for path, declaration in table.items()
    }
    assert {path.partition("/")[0].partition("_")[0] for path in table} == {
        "trunk",
        "read",
        "head",
        "autoencoder",
    }


def test_a_new_model_stands_on_the_autoencoder_that_is_given(lm):
    codec = calm.autoencoder_of(lm)
    made = calm.create(KEY, tiny.TRUNK_CONFIG, codec, tiny.ENERGY_HEAD, num_targets=3)
    assert made.model == lm.model
    assert made.params["autoencoder"] is codec.params
    again = calm.create(KEY, tiny.TRUNK_CONFIG, codec, tiny.ENERGY_HEAD, num_targets=3)
    other = calm.create(jax.random.key(1), tiny.TRUNK_CONFIG, codec, tiny.ENERGY_HEAD)
    for path, leaf in flatten(made.params).items():
        np.testing.assert_array_equal(leaf, flatten(again.params)[path])
    kernel = made.params["read_inner"]
    assert np.abs(kernel - other.params["read_inner"]).max() > 0
    fan_in = kernel[0].size
    assert np.std(kernel) == pytest.approx(fan_in**-0.5, rel=0.1)


# --- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunks": CHUNKS[..., :2]}, r"chunks have shape \[2, 5, 2\].*\[..., T, 3\]"),
        ({"chunks": CHUNKS[0, 0]}, r"chunks have shape \[3\]"),
        ({"chunks": CHUNKS[:, :0]}, "there are no chunks"),
        ({"chunks": CHUNKS + V}, "chunks"),
        ({"chunks": CHUNKS * 1.0}, "chunks has dtype"),
        ({"durations": np.ones(4)}, "durations"),
        ({"durations": -DURATIONS}, "durations"),
        ({"durations": 0 * DURATIONS}, "the first token has duration 0"),
        ({"times": DURATIONS, "start": 1.0}, "leave out start"),
        ({"start": np.zeros(3)}, r"\[2\] of chunks, \[3\] of start"),
        ({"position": 5}, "position"),
        ({"position": 0.5}, "position has dtype"),
        ({"position": np.zeros(3, int)}, r"\[3\] of position"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(lm, arguments, message):
    with pytest.raises(clm.InputError, match=message):
        calm.hidden_states(lm, **({"chunks": CHUNKS} | arguments))
    if "position" not in arguments:
        with pytest.raises(clm.InputError, match=message):
            calm.loss(lm, **({"chunks": CHUNKS, "key": KEY} | arguments))


def test_a_single_chunk_is_predicted_from_nothing(lm):
    with pytest.raises(clm.InputError, match="give at least two"):
        calm.loss(lm, CHUNKS[:, :1], KEY)


def test_other_kinds_of_models_are_refused(lm, tmp_path):
    trunk = LanguageModel(Transformer(tiny.TRUNK_CONFIG), {})
    for call in (
        lambda: calm.hidden_states(trunk, CHUNKS),
        lambda: calm.loss(trunk, CHUNKS, KEY),
        lambda: calm.transform(trunk, np.zeros(5), np.zeros(8)),
        lambda: calm.autoencoder_of(calm.autoencoder_of(lm)),
        lambda: calm.save(tmp_path, calm.autoencoder_of(lm)),
    ):
        with pytest.raises(clm.InputError, match="this needs a NextVectorModel"):
            call()
    with pytest.raises(clm.InputError, match="this needs an Autoencoder"):
        calm.create(KEY, tiny.TRUNK_CONFIG, lm, tiny.ENERGY_HEAD)
    with pytest.raises(clm.InputError, match="this needs an Autoencoder"):
        autoencoder.save(tmp_path, lm)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"qkv_bias": True},
        {"window": 2.0},
        {"post_norms": True},
        {"gated": False},
        {"attention_softcap": 5.0},
        {"rope": None, "max_positions": 9},
    ],
    ids=str,
)
def test_a_trunk_that_its_config_json_cannot_express_is_not_saved(
    lm, tmp_path, changes
):
    config = dataclasses.replace(tiny.TRUNK_CONFIG, **changes)
    codec = calm.autoencoder_of(lm)
    other_lm = calm.create(KEY, config, codec, tiny.ENERGY_HEAD)
    with pytest.raises(clm.InputError, match="cannot express"):
        clm.save(tmp_path, other_lm)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pad_token", [-1, True, 1.0, "a"])
def test_padding_is_a_token(pad_token):
    with pytest.raises(clm.InputError, match=r"pad_token is .*; it must be one token"):
        calm.split_into_chunks([1, 2], 3, pad_token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": EnergyHead(width=5)}, "latent_size is 5, but 4 in the autoencoder"),
        ({"head": EnergyHead(width=4, depth=0)}, "depth of the head is 0"),
        ({"num_targets": 0}, "num_targets is 0"),
        ({"num_targets": 1.5}, "num_targets is 1.5"),
        ({"inner_size": -1}, "inner_size is -1"),
        (
            {"config": dataclasses.replace(tiny.TRUNK_CONFIG, vocab_size=12)},
            "vocab_size is 12, but 11 in the autoencoder",
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_each_other(lm, changes, message):
    with pytest.raises(clm.InputError, match=message):
        lm.model.clone(**changes)


def test_parameters_that_do_not_fit_are_named(lm):
    shorter = lm.params | {"read_inner_bias": jnp.zeros(3)}
    with pytest.raises(clm.InputError, match="parameter read_inner_bias has shape"):
        lm.model.apply({"params": shorter}, CHUNKS)
