"""Next-vector models: functions against their parts, parameters, and refused arguments."""

import dataclasses
import functools

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
from continuous_lm.models.parameters import flatten, unflatten
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


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"durations": DURATIONS, "start": 2.0},
    ],
)
def test_hidden_states_equal_apply_and_the_pure_functions(lm, options):
    @jax.jit
    def apply(params):
        return lm.model.apply({"params": params}, CHUNKS, **options)

    by_apply = apply(lm.params)
    inputs = lm.model.make_inputs(CHUNKS, **options)
    hidden = jax.jit(lm.model.hidden_states)(lm.params, inputs).hidden
    hidden = np.asarray(hidden)
    np.testing.assert_array_equal(by_apply, hidden)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    near(calm.hidden_states(lm, CHUNKS, **options), hidden)
    near(calm.hidden_states(lm, CHUNKS, position=-1, **options), hidden[:, -1])
    context_states = jax.jit(lm.model.context_states)(lm.params, inputs)
    near(context_states, hidden[:, :-1])


def test_durations_and_times_have_an_effect(lm):
    by_default = calm.hidden_states(lm, CHUNKS)
    by_durations = calm.hidden_states(lm, CHUNKS, durations=DURATIONS)
    ends = np.cumsum(DURATIONS)
    by_times = calm.hidden_states(lm, CHUNKS, durations=DURATIONS, times=ends)
    np.testing.assert_allclose(by_times, by_durations, rtol=1e-4, atol=1e-5)
    by_other_times = calm.hidden_states(lm, CHUNKS, durations=DURATIONS, times=3 * ends)
    for a, b in ((by_durations, by_default), (by_other_times, by_durations)):
        assert np.abs(np.asarray(a) - np.asarray(b))[:, 1:].max() > 1e-3


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"durations": DURATIONS}]
)
def test_loss_is_the_energy_score_of_samples_against_latents(lm, options):
    """The samples and the latents of the posterior are computed here, with the same keys."""
    key = jax.random.key(7)
    loss = calm.loss(lm, CHUNKS, key, **options)
    assert loss.shape == (2, 4)
    target_key, head_key = jax.random.split(key)
    codec = calm.autoencoder_of(lm)
    mean, log_scale = map(np.asarray, autoencoder.encode(codec, CHUNKS[:, 1:]))
    noise = jax.random.normal(target_key, (lm.model.num_targets, *mean.shape))
    targets = mean + np.exp(log_scale) * np.asarray(noise)
    hidden = np.asarray(calm.hidden_states(lm, CHUNKS, **options))[:, :-1]
    head = lm.model.head
    noise = head.noise(head_key, (head.num_samples, *hidden.shape[:-1]))
    samples = calm.transform(lm, noise, hidden)
    score = jax.jit(functools.partial(losses.energy_score, beta=head.beta))
    np.testing.assert_allclose(loss, score(samples, targets), rtol=1e-4)
    assert np.ptp(log_scale) > 0.5  # neither the scale nor its square is 1


@pytest.mark.parametrize(
    "num_targets",
    [
        pytest.param(1, marks=pytest.mark.slow),
        4,
        pytest.param(7, marks=pytest.mark.slow),
    ],
)
def test_loss_of_many_durations(lm, num_targets):
    model = lm.model.clone(num_targets=num_targets)
    lm = lm.with_model(model)
    durations = np.stack([DURATIONS * factor for factor in (0.5, 1.0, 1.5, 2.0)])
    nats = calm.loss(lm, CHUNKS[0], KEY, durations=durations)
    repeated_chunks = np.stack([CHUNKS[0]] * len(durations))
    expected = calm.loss(lm, repeated_chunks, KEY, durations=durations)
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_the_autoencoder_has_no_gradient(lm):
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


def test_sampled_chunks_are_decoded_latents(lm):
    hidden = calm.hidden_states(lm, CHUNKS)
    sample_chunks = jax.jit(lm.model.sample_chunks, static_argnums=3)
    chunks = sample_chunks(lm.params, KEY, hidden, 3)
    assert chunks.shape == (3, *CHUNKS.shape)
    latents = calm.transform(lm, lm.model.head.noise(KEY, (3, 2, 5)), hidden)
    logits = autoencoder.decode(calm.autoencoder_of(lm), latents)
    np.testing.assert_array_equal(chunks, np.argmax(logits, axis=-1))
    assert len(np.unique(chunks)) > 3


# --- Parameters ------------------------------------------------------------------------------


def test_init_of_linen_has_the_parameters_and_axes_of_the_table(lm):
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


def test_new_models_have_the_given_autoencoder(lm):
    codec = calm.autoencoder_of(lm)
    new = calm.create(KEY, tiny.TRUNK_CONFIG, codec, tiny.ENERGY_HEAD, num_targets=3)
    assert new.model == lm.model
    assert new.params["autoencoder"] is codec.params
    kernel = np.asarray(new.params["read_inner"])
    fan_in = kernel[0].size
    assert np.std(kernel) == pytest.approx(fan_in**-0.5, rel=0.1)


@pytest.mark.slow
def test_parameters_of_new_models_depend_on_the_key(lm):
    codec = calm.autoencoder_of(lm)
    first, same, other = (
        calm.create(jax.random.key(seed), tiny.TRUNK_CONFIG, codec, tiny.ENERGY_HEAD)
        for seed in (0, 0, 1)
    )
    for path, leaf in flatten(first.params).items():
        np.testing.assert_array_equal(leaf, flatten(same.params)[path])
    kernel = first.params["read_inner"]
    assert np.abs(kernel - other.params["read_inner"]).max() > 0


# --- Refused arguments -----------------------------------------------------------------------


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


def test_the_loss_of_a_single_chunk_is_refused(lm):
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
def test_trunks_that_config_json_cannot_express_are_not_saved(lm, tmp_path, changes):
    config = dataclasses.replace(tiny.TRUNK_CONFIG, **changes)
    model = lm.model.clone(config=config)
    table = model.parameter_table()
    params = unflatten({path: np.zeros(d.shape, "f4") for path, d in table.items()})
    other_lm = lm.with_model(model).with_params(params)
    with pytest.raises(clm.InputError, match="cannot express"):
        clm.save(tmp_path, other_lm)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pad_token", [-1, True, 1.0, "a"])
def test_padding_tokens_that_are_no_token_are_refused(pad_token):
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
