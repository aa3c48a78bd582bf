"""Chunks drawn from next-vector models: against whole passes, and exact tempered distributions."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import continuous_lm as clm
from continuous_lm.models import calm, density, generation
from continuous_lm.models.calm import autoencoder, repeated_draws
from continuous_lm.models.calm.chunk_inputs import ChunkInputs
from continuous_lm.models.calm.implicit_heads import FlowHead, ImplicitHead
from continuous_lm.models.calm.samplers import Rejection, Repetition
from continuous_lm.models.generation import generate
from continuous_lm.models.language_model import LanguageModel
from tests.fixtures import tiny

KEY = jax.random.key(0)
V, SIZE, W = (
    tiny.CODEC_CONFIG.vocab_size,
    tiny.CODEC_CONFIG.chunk_size,
    tiny.CODEC_CONFIG.latent_size,
)
ROOM = 8  # chunks of a whole pass
slow = pytest.mark.slow
ONE_DRAW = Repetition()


@pytest.fixture(scope="module")
def lm():
    return tiny.next_vector_lm()


def prompts(seed=0):
    """Prompts of 1, 3 and 5 chunks."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, SIZE * n) for n in (1, 3, 5)]


# --- The loop --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def hidden_after(model, params, chunks, durations, start, at):
    """Hidden states [B, D] after chunk `at` of each row, of whole passes without any cache."""
    inputs = ChunkInputs(chunks, durations=durations, start=start)
    states = model.hidden_states(params, inputs).hidden
    return states[jnp.arange(len(at)), at]


@functools.partial(jax.jit, static_argnums=0)
def one_draw(model, params, key, hidden):
    """Chunks [B, C] that the noise of this key gives."""
    noise = model.head.noise(key, (1, len(hidden)))
    latents = model.transform(params, noise, hidden)[0]
    return jnp.argmax(model.decode(params, latents), axis=-1)


def without_cache(lm, rows, steps, *, d=None, new_d=1.0, start=0.0, key=KEY):
    """Return the samples at temperature 1, by a forward pass over all chunks for each new one."""
    lengths = np.array([len(row) // SIZE for row in rows])
    buffer = np.zeros((len(rows), ROOM, SIZE), np.int32)
    times = np.ones((len(rows), ROOM), np.float32)
    new_d = np.broadcast_to(new_d, (len(rows), steps))
    start = np.broadcast_to(np.float32(start), len(rows))
    for i, n in enumerate(lengths):
        buffer[i, :n] = np.reshape(rows[i], (-1, SIZE))
        times[i, :n] = 1.0 if d is None else d[i]
        times[i, n : n + steps] = new_d[i]
    chunks = []
    for step in range(steps):
        hidden = hidden_after(
            lm.model, lm.params, buffer, times, start, lengths + step - 1
        )
        new = np.asarray(
            one_draw(lm.model, lm.params, jax.random.fold_in(key, step), hidden)
        )
        buffer[np.arange(len(rows)), lengths + step] = new
        chunks.append(new)
    return np.concatenate(chunks, axis=1)


def random_timing(seed=3):
    """Durations of the prompts' chunks and of 3 new ones, and starts."""
    rng = np.random.default_rng(seed)
    d = [rng.uniform(0.3, 2.0, n).astype(np.float32) for n in (1, 3, 5)]
    return (
        d,
        rng.uniform(0.3, 2.0, (3, 3)).astype(np.float32),
        np.array([0.0, 2.0, -1.5]),
    )


@pytest.mark.parametrize(
    "head",
    [
        tiny.ENERGY_HEAD,
        pytest.param(FlowHead(width=W, hidden_size=8, depth=1, steps=3), marks=slow),
    ],
)
def test_chunks_equal_those_without_a_cache(head):
    """Prompts have different lengths, durations and starts."""
    lm, (d, new_d, start) = tiny.next_vector_lm(head), random_timing()
    for options in ({}, dict(d=d, new_d=new_d, start=start)):
        expected = without_cache(lm, prompts(), 3, **options)
        names = {"d": "durations", "new_d": "new_durations", "start": "start"}
        arguments: Any = {names[name]: value for name, value in options.items()}
        arguments |= dict(sampler=ONE_DRAW, max_new_tokens=3 * SIZE, key=KEY, stop=())
        generated = generate(lm, prompts(), **arguments)
        np.testing.assert_array_equal(generated.tokens, expected)
        np.testing.assert_array_equal(generated.lengths, 3 * SIZE)
        assert len(np.unique(generated.tokens)) > 3
        other = without_cache(lm, prompts(), 3, key=jax.random.key(1), **options)
        assert (other != expected).mean() > 0.2


def test_hidden_states_of_the_reference_equal_those_of_the_model(lm):
    chunks = np.reshape(prompts()[2], (-1, SIZE))
    padded = np.zeros((1, ROOM, SIZE), np.int32)
    padded[0, :5] = chunks
    states = hidden_after(
        lm.model, lm.params, padded, np.ones((1, ROOM)), np.zeros(1), np.array([4])
    )
    np.testing.assert_allclose(
        states[0], calm.hidden_states(lm, chunks)[-1], rtol=1e-4, atol=1e-5
    )


def test_durations_have_an_effect(lm):
    d, new_d, _ = random_timing()
    options = dict(sampler=ONE_DRAW, max_new_tokens=3 * SIZE, key=KEY, stop=())
    plain = generate(lm, prompts(), **options).tokens
    moved = generate(lm, prompts(), durations=d, **options).tokens
    assert (plain != moved).any()
    later = generate(lm, prompts(), new_durations=4 * new_d, **options).tokens
    np.testing.assert_array_equal(later[:, :SIZE], plain[:, :SIZE])
    assert (later != plain).any()


def test_chunks_of_no_duration_are_as_absent(lm):
    options = dict(sampler=ONE_DRAW, max_new_tokens=3 * SIZE, key=KEY, stop=())
    rows, rng = prompts(), np.random.default_rng(5)
    plain = generate(lm, rows, **options).tokens
    longer, d = [], []
    for i, row in enumerate(rows):  # after the first chunk: that one must be there
        count, more = len(row) // SIZE - 1, i + 1
        longer.append(
            np.concatenate([row[:SIZE], rng.integers(0, V, SIZE * more), row[SIZE:]])
        )
        d.append([1.0] + [0.0] * more + [1.0] * count)
    np.testing.assert_array_equal(
        generate(lm, longer, durations=d, **options).tokens, plain
    )
    assert (generate(lm, longer, **options).tokens != plain).any()


def test_prompts_are_padded_on_the_left_to_chunks(lm):
    fill, options = 4, dict(max_new_tokens=3 * SIZE, key=KEY, stop=())
    rows = [row[cut:] for row, cut in zip(prompts(), (2, 0, 1), strict=True)]
    by_hand = [
        np.concatenate([[fill] * (-len(row) % SIZE), row]).astype(int) for row in rows
    ]
    assert [len(row) for row in by_hand] == [3, 9, 15]
    for kind in (Repetition, Rejection):
        expected = generate(lm, by_hand, sampler=kind(), **options).tokens
        tokens = generate(lm, rows, sampler=kind(pad_token=fill), **options).tokens
        np.testing.assert_array_equal(tokens, expected)
        noted = LanguageModel(lm.model, lm.params, None, {"eos_token_id": [fill, 2]})
        tokens = generate(noted, rows, sampler=kind(), **options).tokens
        np.testing.assert_array_equal(tokens, expected)
        others = [
            generate(lm, rows, sampler=kind(pad_token=token), **options).tokens
            for token in (0, 7, 9)
        ]
        assert any((other != expected).any() for other in others)
        with pytest.raises(
            clm.InputError, match="prompt 0: 1 tokens are no multiple of a chunk of 3"
        ):
            generate(lm, rows, sampler=kind(), **options)


def test_stop_tokens_end_rows_within_chunks(lm):
    """A stop token may be anywhere in any chunk."""
    options = dict(sampler=ONE_DRAW, max_new_tokens=6 * SIZE, key=KEY)
    endless = generate(lm, prompts(), stop=(), **options)
    places = set()
    for stop in range(V):
        generated = generate(lm, prompts(), stop=stop, **options)
        for row, length, before in zip(
            generated.tokens, generated.lengths, endless.tokens, strict=True
        ):
            stops = np.flatnonzero(before == stop)
            expected = stops[0] + 1 if len(stops) else 6 * SIZE
            assert length == expected
            np.testing.assert_array_equal(row[:length], before[:length])
            np.testing.assert_array_equal(row[length:], 0)
            places |= {divmod(stops[0], SIZE)} if len(stops) else set()
        assert [
            len(row) for row in generated.token_lists()
        ] == generated.lengths.tolist()
        with_field = LanguageModel(lm.model, lm.params, None, {"eos_token_id": stop})
        np.testing.assert_array_equal(
            generate(with_field, prompts(), **options).tokens, generated.tokens
        )
    assert {0, 1} <= {place % SIZE for _, place in places}
    assert {min(chunk, 1) for chunk, _ in places} == {0, 1}


@pytest.mark.parametrize("count", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 2])
def test_any_number_of_new_tokens(lm, count):
    options = dict(sampler=ONE_DRAW, key=KEY, stop=())
    long = generate(lm, prompts(), max_new_tokens=3 * SIZE, **options)
    generated = generate(lm, prompts(), max_new_tokens=count, **options)
    np.testing.assert_array_equal(generated.tokens, long.tokens[:, :count])
    np.testing.assert_array_equal(generated.lengths, count)
    stop = int(long.tokens[0, count - 1])  # the last requested token, or an earlier one
    generated = generate(
        lm, prompts(), sampler=ONE_DRAW, max_new_tokens=count, key=KEY, stop=stop
    )
    assert generated.lengths[0] == np.flatnonzero(long.tokens[0] == stop)[0] + 1
    assert generated.lengths.max() <= count


@slow
def test_prompts_in_pieces_and_one_alone(lm):
    """Pieces of the prompt change nothing, nor does its form."""
    options = dict(sampler=ONE_DRAW, max_new_tokens=2 * SIZE, key=KEY, stop=())
    row = prompts()[2]
    alone = generate(lm, row, **options).tokens
    assert alone.shape == (1, 2 * SIZE)
    for prompt in ([row], row[None], row.tolist(), [row.tolist()]):
        np.testing.assert_array_equal(generate(lm, prompt, **options).tokens, alone)
    np.testing.assert_array_equal(
        generate(lm, row, max_prefill_length=2, **options).tokens, alone
    )


# --- Temperatures ----------------------------------------------------------------------------

P = (0.5, 0.3, 0.2)
ROWS = 4000


@dataclasses.dataclass(frozen=True)
class Points(ImplicitHead):
    """Latents that are one of a few points, with probabilities P: the noise alone decides."""

    points: tuple[tuple[float, ...], ...] = ()

    @property
    def noise_width(self):
        return 1

    def parameter_table(self, hidden_width):
        return {}

    def noise(self, key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, (*shape, 1), dtype)

    def transform(self, params, noise, hidden):
        which = jnp.sum(noise >= np.cumsum(P, dtype=np.float32)[:-1], axis=-1)
        return jnp.asarray(self.points, hidden.dtype)[which]


@pytest.fixture(scope="module")
def points_lm(lm):
    """A model that draws one of three chunks, and these chunks [3, C], the likeliest first."""
    latents = np.random.default_rng(0).normal(size=(64, W)).round(2)
    chunks = np.argmax(
        autoencoder.decode(calm.autoencoder_of(lm), latents.astype(np.float32)), axis=-1
    )
    _, first = np.unique(chunks, axis=0, return_index=True)
    head = Points(width=W, points=tuple(map(tuple, latents[first[:3]])))
    model = calm.NextVectorModel(tiny.TRUNK_CONFIG, tiny.CODEC_CONFIG, head)
    params = lm.params | {"head": {}}
    return LanguageModel(model, params), chunks[first[:3]]


def count_chunks(tokens, chunks):
    """Return the count of each chunk at each step: [steps, 3]."""
    chunk_of_row = np.reshape(tokens, (len(tokens), -1, 1, SIZE))
    counts = (chunk_of_row == chunks).all(axis=-1).sum(axis=0)
    assert (counts.sum(axis=-1) == len(tokens)).all()  # nothing else
    return counts


def tempered(t):
    weights = np.array(P) ** (1 / t)
    return weights / weights.sum()


def sample_many(points_lm, sampler):
    """Return two new chunks of each of ROWS rows, and counts [2, 3] of the known chunks."""
    lm, chunks = points_lm
    row = np.arange(2 * SIZE) % V
    generated = generate(
        lm,
        np.tile(row, (ROWS, 1)),
        sampler=sampler,
        max_new_tokens=2 * SIZE,
        stop=(),
        key=KEY,
    )
    return generated.tokens, count_chunks(generated.tokens, chunks)


@slow
@pytest.mark.parametrize(
    ("t", "kind"),
    [
        (1.0, Repetition),
        (1.0, Rejection),
        (0.7, Rejection),
        (1 / 2, Rejection),
        (1 / 3, Rejection),
    ],
    ids=str,
)
def test_draws_are_those_of_the_tempered_distribution(points_lm, t, kind):
    tokens, counts = sample_many(points_lm, kind(t))
    for step_counts in counts:
        assert stats.chisquare(step_counts, ROWS * tempered(t)).pvalue > 1e-3
        for other in (1.0, 0.7, 1 / 2, 1 / 3):  # similar temperatures are distinguished
            if abs(other - t) > 0.01:
                assert (
                    stats.chisquare(step_counts, ROWS * tempered(other)).pvalue < 1e-6
                )
    # Steps are independent, as the head reads nothing.
    same = (tokens[:, :SIZE] == tokens[:, SIZE:]).all(axis=1).mean()
    expected = (tempered(t) ** 2).sum()
    assert abs(same - expected) < 4 * np.sqrt(expected * (1 - expected) / ROWS)


def repetition_distribution(candidates, n):
    """Return the exact distribution of samples, over all counts of chunks among the candidates."""
    total = np.zeros(len(P))
    for first in range(candidates + 1):
        for second in range(candidates - first + 1):
            counts = np.array([first, second, candidates - first - second])
            order = min(n, counts.max())
            weights = np.array([math.comb(int(c), int(order)) for c in counts], float)
            chance = stats.multinomial.pmf(counts, candidates, P)
            total += chance * weights / weights.sum()
    return total


@slow  # test_repeated_draws.py tests the distribution in the quick run
@pytest.mark.parametrize(
    ("t", "candidates"), [(1 / 2, 6), (1 / 2, 64), (1 / 3, 4), (1 / 3, 48), (1 / 2, 2)]
)
def test_repetition_samples_the_distribution_of_its_counts(points_lm, t, candidates):
    """For few candidates that is not the tempered distribution, and for many nearly."""
    exact = repetition_distribution(candidates, round(1 / t))
    _, counts = sample_many(points_lm, Repetition(t, num_candidates=candidates))
    for step_counts in counts:
        assert stats.chisquare(step_counts, ROWS * exact).pvalue > 1e-3
        if candidates > 2:  # two candidates, equal or not, are drawn as one is
            assert stats.chisquare(step_counts, ROWS * np.array(P)).pvalue < 1e-6
        if candidates < 8:
            assert stats.chisquare(step_counts, ROWS * tempered(t)).pvalue < 1e-6
    distance = np.abs(exact - tempered(t)).sum()
    assert distance > 0.1 if candidates < 8 else distance < 0.1


@slow
def test_temperature_0_takes_the_most_frequent_chunk(points_lm):
    lm, chunks = points_lm
    rows = [np.arange(SIZE), np.arange(2 * SIZE) % V]
    sampler = Repetition(0.0, num_candidates=400)
    options = dict(sampler=sampler, max_new_tokens=3 * SIZE, stop=())
    for key in ({}, {"key": KEY}):
        generated = generate(lm, rows, **options, **key)
        np.testing.assert_array_equal(generated.tokens, np.tile(chunks[0], (2, 3)))


@slow
@pytest.mark.parametrize("key", [0, 1])
def test_draws_that_are_never_accepted_name_the_prompt(points_lm, key):
    """With two samples for a chunk at T = 1/2, about a third of all rows accept one."""
    lm, _ = points_lm
    model, key, steps, rounds = lm.model, jax.random.key(key), 2, 2
    rows = np.tile(np.arange(SIZE), (6, 1))
    hidden = jnp.zeros((6, tiny.TRUNK_CONFIG.hidden_size))
    accepted = np.stack(
        [
            repeated_draws.rejection_sample(
                jax.random.fold_in(key, i),
                lambda key: one_draw(model, lm.params, key, hidden),
                temperature=0.5,
                max_rounds=rounds,
            ).accepted
            for i in range(steps)
        ]
    )
    row = np.argmin(accepted.all(axis=0))
    assert not accepted[:, row].all()
    step = np.argmin(accepted[:, row])
    options = dict(sampler=Rejection(0.5, max_rounds=rounds), key=key, stop=())
    message = (
        f"prompt {row}: at new item {step}, no draw was accepted in 2 rounds; raise"
    )
    with pytest.raises(clm.InputError, match=message):
        generate(lm, rows, max_new_tokens=steps * SIZE, **options)


def test_one_program_serves_temperatures_prompts_and_fillings(lm):
    def run(sampler, rows, **options):
        options = dict(max_new_tokens=2 * SIZE, stop=()) | options
        key = options.pop("key", KEY)
        generate(lm, rows, sampler=sampler, key=key, **options)

    run(Rejection(0.9), prompts())
    run(Repetition(0.5, num_candidates=4), prompts())
    run(ONE_DRAW, prompts())
    before = generation._decode_loop._cache_size()
    rows = [row[1:] for row in prompts(1)]
    for sampler in (
        Rejection(1, pad_token=3),
        Rejection(np.float32(0.95), pad_token=5),
        Repetition(np.float32(0.5), num_candidates=4, pad_token=5),
        Repetition(0.5 + 1e-7, num_candidates=4, pad_token=0),
        Repetition(1, num_candidates=9, pad_token=5),
    ):
        run(sampler, rows, new_durations=0.5, start=1.0, key=jax.random.key(1))
        run(sampler, rows, max_new_tokens=3, stop=[1])
    assert generation._decode_loop._cache_size() == before


# --- Refused arguments -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampler=Repetition(0.7)), "1, 1/2, 1/3 or another 1/n"),
        (dict(sampler=Repetition(2.0)), "temperature is 2.0"),
        (dict(sampler=Rejection(2.0)), "temperature is 2.0"),
        (
            dict(sampler=Rejection(0.0)),
            "temperature is 0.0; Rejection needs one above 0",
        ),
        (dict(sampler=Repetition(-0.5)), "temperature"),
        (dict(sampler=Rejection(-0.5)), "temperature"),
        (dict(sampler=Repetition(float("nan"))), "temperature"),
        (dict(sampler=Rejection(float("nan"))), "temperature"),
        (
            dict(sampler=Repetition(np.array([0.5, 0.5]))),
            r"temperature has shape \[2\]",
        ),
        (dict(sampler=Rejection(np.array([0.5, 0.5]))), r"temperature has shape \[2\]"),
        (
            dict(sampler=Repetition(1 / 3, num_candidates=2)),
            "1/3 needs at least 3 candidates, not 2",
        ),
        (dict(sampler=clm.Greedy()), "Greedy draws .* give a sampler of models.calm"),
        (dict(sampler=clm.Temperature(0.5)), "Temperature draws from logits of tokens"),
        (dict(sampler=density.NearestRow()), "this needs a DensityModel"),
        (dict(key=None), "needs a key"),
        (dict(key=3), "key is not a single PRNG key"),
        (dict(sampler=Repetition(num_candidates=0)), "num_candidates is 0"),
        (dict(sampler=Rejection(max_rounds=0)), "max_rounds is 0"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens is 2.0"),
        (dict(max_prefill_length=0), "max_prefill_length is 0"),
        (dict(sampler=Repetition(pad_token=V)), "pad_token"),
        (dict(sampler=Rejection(pad_token=-1)), "pad_token"),
        (dict(stop=V), "stop"),
        (
            dict(prompts=np.arange(SIZE + 1)),
            "prompt 0: 4 tokens are no multiple of a chunk of 3",
        ),
        (
            dict(prompts=[np.arange(SIZE), np.arange(2)]),
            "prompt 1: 2 tokens are no multiple",
        ),
        (dict(prompts=[[1, 2, V]]), "prompt 0: tokens"),
        (dict(prompts=[[1, 2, 3], [1, -2, 3]]), "prompt 1: tokens"),
        (
            dict(prompts=[0.5, 1.5, 2.0]),
            r"prompt 0: prompts have shape \[\]; it must be \[T, W\]",
        ),
        (dict(prompts=[[1, 2, 3], []]), "prompt 1: there are no tokens"),
        (dict(prompts=np.ones((2, 3))), "prompt 0: tokens has dtype float64"),
        (dict(prompts=[]), "prompt"),
        (dict(prompts=5), "prompt"),
        (dict(prompts="text"), "prompt"),
        (dict(prompts=["text"]), "prompt"),
        (dict(durations=[1.0, 1.0]), "prompt 0: durations"),
        (dict(durations=[[1.0], [1.0]]), "durations are given for 2 prompts"),
        (dict(durations=[-1.0]), "durations"),
        (dict(new_durations=-1.0), "new_durations"),
        (
            dict(new_durations=[1.0] * 6),
            r"new_durations has shape \[6\]",
        ),  # chunks, not tokens
        (dict(start=[0.0, 1.0]), r"start has shape \[2\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(lm, options, message):
    arguments: Any = dict(prompts=np.arange(SIZE), sampler=ONE_DRAW, key=KEY)
    arguments |= dict(max_new_tokens=2 * SIZE) | options
    with pytest.raises(clm.InputError, match=message):
        generate(lm, **arguments)


def test_samplers_of_chunks_refuse_other_models():
    trunk = LanguageModel(clm.Transformer(tiny.TRUNK_CONFIG), {})
    for sampler in (ONE_DRAW, Rejection()):
        with pytest.raises(clm.InputError, match="this needs a NextVectorModel"):
            generate(trunk, [1], sampler=sampler, max_new_tokens=1, key=KEY)


# --- Derivatives in time ---------------------------------------------------------------------


@slow
@pytest.mark.parametrize("beta", [1.0, 1.5])
def test_loss_gradients_of_durations_match_finite_differences(beta):
    """Central differences in float64, one duration at a time, with the same noise."""
    lm = tiny.next_vector_lm(dataclasses.replace(tiny.ENERGY_HEAD, beta=beta))
    rng, count = np.random.default_rng(2), 5
    chunks = rng.integers(0, V, (count, SIZE))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype(jnp.float64), lm.params)

        @jax.jit
        @jax.value_and_grad
        def total(d):
            inputs = ChunkInputs(jnp.asarray(chunks), durations=d)
            key = jax.random.key(5)
            return lm.model.loss(params, inputs, key).sum()

        d, step = rng.uniform(0.3, 2.0, count), 1e-5
        gradient = np.asarray(total(d)[1])
        assert gradient.dtype == np.float64
        slopes = [
            (total(d + step * e)[0] - total(d - step * e)[0]) / (2 * step)
            for e in np.eye(count)
        ]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-8)
    assert gradient[-1] == 0.0
    assert np.abs(gradient[:-1]).min() > 1e-5


def test_the_test_autoencoder_decodes_many_chunks(lm):
    """Otherwise the comparisons above would say little."""
    latents = np.random.default_rng(0).normal(size=(64, W)).astype(np.float32)
    chunks = np.argmax(autoencoder.decode(calm.autoencoder_of(lm), latents), axis=-1)
    assert len(np.unique(chunks, axis=0)) > 10
    assert isinstance(calm.autoencoder_of(lm).model, calm.Autoencoder)
    assert (
        autoencoder.parameter_table(tiny.CODEC_CONFIG).keys()
        == lm.params["autoencoder"].keys()
    )
