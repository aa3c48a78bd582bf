"""Samples of density models against loops of whole forward passes, and plain numpy."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

import continuous_lm as clm
from continuous_lm import quantize
from continuous_lm.models import calm, density, generation
from continuous_lm.models.density.distributions import Categorical, Gaussian, Mixture
from continuous_lm.models.density.samplers import (
    NearestRow,
    NextVector,
    Renormalized,
    Rerank,
    rerank,
    steering_direction,
)
from continuous_lm.models.generation import generate
from continuous_lm.models.samplers import Greedy, Temperature
from tests.fixtures import tiny
from tests.models.density.test_distributions import at, reference
from tests.models.density.test_model import CONFIG, WIDTH, build

KEY = jax.random.key(0)
slow = pytest.mark.slow


def prompts(lengths=(2, 5, 9), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 11, n) for n in lengths]


def vectors(lengths=(2, 5, 9), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, WIDTH)).astype(np.float32) for n in lengths]


# --- Tokens of a vector ----------------------------------------------------------------------


def by_numpy(way, density, x, rows, k):
    """Return the token of a vector x [W], in float64."""
    near = np.argsort(((rows - x) ** 2).sum(axis=-1), kind="stable")
    if way == "cosine":
        lengths = np.linalg.norm(rows, axis=-1) * np.linalg.norm(x)
        return np.argmax(rows @ x / lengths)
    if way == "rerank":
        return near[:k][np.argmax(reference(density, rows[near[:k]]))]
    return near[0]


@pytest.mark.parametrize("way", ["euclidean", "cosine", "rerank"])
def test_tokens_of_vectors_equal_those_of_numpy(way):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 3)).astype(np.float32)
    mixture = Mixture(
        *(rng.normal(size=(25, *shape)).astype(np.float32) for shape in [(2,), (2, 3)]),
        rng.uniform(0.3, 1.0, (25, 2, 3)).astype(np.float32),
    )
    x = (2 * rng.normal(size=(25, 3))).astype(np.float32)
    norms = np.sum(rows**2, axis=-1)
    tokens = {}
    reranked = jax.jit(rerank, static_argnums=3)
    for k in (1, 7, 40) if way == "rerank" else (1,):
        if way == "rerank":
            tokens[k] = reranked(mixture, x, rows, k, norms=norms)
        else:
            tokens[k] = quantize.nearest(x, rows, metric=way, norms=norms).indices
        expected = [
            by_numpy(way, at(mixture, i), x[i], rows.astype(float), k)
            for i in range(25)
        ]
        np.testing.assert_array_equal(tokens[k], expected)
    if way == "rerank":
        # With 1 candidate it is the nearest row; with all, the mode for every x.
        assert np.sum(np.asarray(tokens[1]) != np.asarray(tokens[7])) > 3
        assert np.sum(np.asarray(tokens[40]) != np.asarray(tokens[7])) > 3


def test_renormalised_frequencies_are_proportional_to_the_density():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(5, 2)).astype(np.float32)
    gaussian = Gaussian(*np.broadcast_to(np.float32([[[0.0]], [[0.9]]]), (2, 4000, 2)))
    logs = reference(at(gaussian, 0), rows.astype(float))

    @jax.jit
    def sample(gaussian, temperature):
        return Categorical(gaussian.log_probs(rows)).sample(KEY, temperature)

    for temperature in (1.0, 0.5):
        p = np.exp((logs - logs.max()) / temperature)
        counts = np.bincount(sample(gaussian, temperature), minlength=5)
        assert stats.chisquare(counts, 4000 * p / p.sum()).pvalue > 1e-3


# --- Generation ------------------------------------------------------------------------------

ROOM = 16


def sampler_of(way, lm=None, **settings):
    """Return the sampler by its name; a token head draws tokens itself."""
    if lm is not None and lm.model.predicts_tokens:
        return Temperature(**settings)
    samplers = {
        "euclidean": NearestRow,
        "cosine": functools.partial(NearestRow, "cosine"),
        "rerank": functools.partial(Rerank, 4),
        "renormalised": Renormalized,
    }
    return samplers[way](**settings)


@functools.partial(jax.jit, static_argnums=0)
def distribution_after(model, params, durations, start, position, **inputs):
    """Return the distribution after a position, of one forward pass without a cache."""
    options = {"durations": durations, "start": start, "position": position}
    hidden = model.apply({"params": params}, **options, **inputs)
    return model.distribution(params, hidden)


def naive(lm, prompt, count, *, d=None, new_d=1.0, start=0.0, way="euclidean"):
    """Return the samples at temperature 0, by a forward pass over all tokens for each."""
    reads, n, samples = lm.model.input_kind, len(prompt), []
    buffer = np.zeros((ROOM, *np.shape(prompt)[1:]), np.asarray(prompt).dtype)
    times = np.ones(ROOM, np.float32)
    buffer[:n], times[:n] = prompt, 1.0 if d is None else d
    new_d = np.broadcast_to(new_d, count)
    for i in range(count):
        inputs = {reads: buffer.copy()}
        start = np.float32(start)
        p = distribution_after(lm.model, lm.params, times, start, n + i - 1, **inputs)
        p = at(p, ...)
        if lm.model.predicts_tokens:
            item = np.argmax(p.logits)
        else:
            item = p.means[np.argmax(p.logits)] if hasattr(p, "logits") else p.mean
            if reads == "tokens":
                rows = np.asarray(density.token_table(lm), np.float64)
                if way == "renormalised":
                    item = np.argmax(reference(p, rows))
                else:
                    item = by_numpy(way, p, item, rows, 4)
        samples.append(item)
        buffer[n + i], times[n + i] = item, new_d[i]
    return np.asarray(samples)


NEW = 6


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param("mixture", "euclidean", marks=slow),
        pytest.param("gaussian", "rerank", marks=slow),
        pytest.param("token", "euclidean", marks=slow),
        ("full", "cosine"),
        pytest.param("experts", "renormalised", marks=slow),
        pytest.param("low rank", "renormalised", marks=slow),
        pytest.param("experts", "rerank", marks=slow),
    ],
)
def test_tokens_of_a_batch_equal_those_without_a_cache(name, way):
    """Prompts have different lengths, durations and starts."""
    lm, rows, rng = build(name), prompts(), np.random.default_rng(3)
    d = [rng.uniform(0.3, 2.0, len(row)).astype(np.float32) for row in rows]
    new_d = rng.uniform(0.3, 2.0, (3, NEW)).astype(np.float32)
    start = np.array([0.0, 2.0, -1.5], np.float32)
    options = dict(
        max_new_tokens=NEW, sampler=sampler_of(way, lm, temperature=0.0), stop=()
    )
    timing = {"durations": d, "new_durations": new_d, "start": start}
    generated = generate(lm, rows, **timing, **options)
    expected = [
        naive(lm, row, NEW, d=d[i], new_d=new_d[i], start=start[i], way=way)
        for i, row in enumerate(rows)
    ]
    np.testing.assert_array_equal(generated.tokens, expected)
    np.testing.assert_array_equal(generated.lengths, NEW)
    assert len(np.unique(generated.tokens)) > 1
    alone = generate(
        lm,
        rows[1],
        durations=d[1],
        new_durations=new_d[1],
        start=start[1],
        max_prefill_length=2,
        **options,
    )
    np.testing.assert_array_equal(alone.tokens[0], expected[1])


@pytest.mark.parametrize("name", ["mixture", pytest.param("full", marks=slow)])
def test_vectors_of_a_batch_equal_those_without_a_cache(name):
    lm, rows, rng = build(name, "vectors"), vectors(), np.random.default_rng(4)
    d = [rng.uniform(0.3, 2.0, len(row)).astype(np.float32) for row in rows]
    new_d = rng.uniform(0.3, 2.0, NEW).astype(np.float32)
    options = dict(max_new_tokens=NEW, sampler=NextVector(temperature=0.0))
    generated = generate(lm, rows, durations=d, new_durations=new_d, **options)
    np.testing.assert_array_equal(generated.lengths, NEW)
    with pytest.raises(clm.InputError, match="makes vectors"):
        generated.token_lists()
    samples = generated.vectors
    assert samples.shape == (3, NEW, WIDTH)
    assert samples.dtype == np.float32
    for i, row in enumerate(rows):
        expected = naive(lm, row, NEW, d=d[i], new_d=new_d)
        np.testing.assert_allclose(samples[i], expected, rtol=1e-3, atol=1e-4)
    others = generate(lm, rows, durations=d, **options).vectors
    np.testing.assert_array_equal(others[:, 0], samples[:, 0])
    assert np.abs(others[:, 1:] - samples[:, 1:]).max() > 1e-3


@slow
def test_first_samples_after_a_prompt_have_the_moments_of_the_density():
    lm, prompt = build("mixture", "vectors"), vectors((4,))[0]
    many = np.broadcast_to(prompt, (3000, *prompt.shape))
    buffer = np.zeros((ROOM, WIDTH), np.float32)
    buffer[:4] = prompt
    ones, start = np.ones(ROOM, np.float32), np.float32(0)
    p = distribution_after(lm.model, lm.params, ones, start, 3, vectors=buffer)
    w, means, scales = (np.asarray(a, np.float64) for a in (p.weights, *p[1:]))
    mean = w @ means
    std = np.sqrt(w @ (means**2 + scales**2) - mean**2)
    generated = generate(lm, many, sampler=NextVector(), max_new_tokens=1, key=KEY)
    samples = generated.vectors[:, 0]
    assert (np.abs(samples.mean(axis=0) - mean) < 5 * std / 3000**0.5).all()
    np.testing.assert_allclose(samples.std(axis=0), std, rtol=0.1)


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(Temperature(), marks=slow),
        Temperature(2.0, top_k=4, top_p=0.9),
        pytest.param(Greedy(), marks=slow),
    ],
    ids=["temperature", "cuts", "greedy"],
)
def test_samples_of_a_token_head_equal_those_of_a_language_model(sampler):
    """The language model has the same head, and no bias."""
    lm = build("token")
    head = lm.params["head"]
    zero = np.zeros_like(head["logits_bias"])
    without_bias = lm.with_params(lm.params | {"head": head | {"logits_bias": zero}})
    params = lm.params["trunk"] | {"head": head["logits"]}
    plain = clm.LanguageModel(clm.Transformer(CONFIG), params)
    options = dict(sampler=sampler, max_new_tokens=8, key=KEY, stop=())
    ours = generate(without_bias, prompts(), **options)
    theirs = generate(plain, prompts(), **options)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert len(np.unique(theirs.tokens)) > 1


def test_stop_tokens_end_rows():
    lm = build("mixture")
    options = dict(max_new_tokens=12, sampler=NearestRow(), key=KEY)
    endless = generate(lm, prompts(), stop=(), **options).tokens
    stop = int(endless[0, 2])
    generated = generate(lm, prompts(), stop=stop, **options)
    for row, length, before in zip(
        generated.tokens, generated.lengths, endless, strict=True
    ):
        stops = np.flatnonzero(before == stop)
        expected = stops[0] + 1 if len(stops) else 12
        assert length == expected
        np.testing.assert_array_equal(row[:length], before[:length])
        np.testing.assert_array_equal(row[length:], 0)
    with_field = clm.LanguageModel(lm.model, lm.params, None, {"eos_token_id": stop})
    by_field = generate(with_field, prompts(), **options)
    np.testing.assert_array_equal(by_field.tokens, generated.tokens)


# --- Steering --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("mixture", "euclidean"),
        pytest.param("full", "rerank", marks=slow),
        pytest.param("low rank", "renormalised", marks=slow),
        pytest.param("experts", "cosine", marks=slow),
        pytest.param("gaussian", "renormalised", marks=slow),
    ],
)
def test_steering_of_tokens_by_its_strength(name, way):
    """Strength 0 changes no bit, and a large one samples the target."""
    lm = build(name)
    rows = np.asarray(density.token_table(lm))
    # Far along the direction, the row of this token is the nearest.
    target = int(np.argmax(np.linalg.norm(rows - rows.mean(axis=0), axis=-1)))
    direction = steering_direction(lm, [target])
    assert lm.config.vocab_size < 16  # fewer than the default candidates of Rerank

    def draw(**steering):
        sampler = sampler_of(way, **steering)
        options = dict(max_new_tokens=20, key=KEY, stop=())
        return generate(lm, prompts(), sampler=sampler, **options).tokens

    np.testing.assert_array_equal(draw(direction=direction, strength=0.0), draw())
    shares = [
        np.mean(draw(direction=direction, strength=s) == target)
        for s in (0.0, 1.0, 50.0)
    ]
    assert shares[0] < 0.5
    assert shares[0] <= shares[1] <= shares[2]
    if way == "euclidean":
        assert shares[2] > 0.95


def test_steering_of_vectors_by_its_strength():
    lm, rows = build("mixture", "vectors"), vectors()

    def draw(**steering):
        sampler = NextVector(**steering)
        return generate(lm, rows, sampler=sampler, max_new_tokens=10, key=KEY).vectors

    plain = draw()
    direction = np.array([1.0, -2.0, 0.5])
    unsteered = draw(direction=direction, strength=0.0)
    np.testing.assert_array_equal(unsteered, plain)
    moved = draw(direction=direction, strength=0.5)
    # Only of the first ones: the model reads them before the others.
    np.testing.assert_allclose(
        moved[:, 0], plain[:, 0] + 0.5 * direction, rtol=1e-4, atol=1e-5
    )


def test_steering_directions_are_differences_of_means():
    lm = build("gaussian", table="embedding")
    rows = np.asarray(density.token_table(lm), np.float64)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    expected = rows[[1, 4]].mean(axis=0) - rows[[2, 3, 9]].mean(axis=0)
    near(steering_direction(lm, [1, 4], [2, 3, 9]), expected)
    near(steering_direction(lm, np.array([5])), rows[5] - rows.mean(axis=0))


# --- Programs and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NearestRow, pytest.param(Renormalized, marks=slow)])
def test_one_program_serves_temperatures_strengths_and_directions(kind):
    lm = build("mixture")

    def run(rows, seed, *, max_new_tokens=5, **settings):
        key = jax.random.key(seed)
        options = dict(max_new_tokens=max_new_tokens, key=key, new_durations=0.5)
        generate(lm, rows, sampler=kind(**settings), start=2.0, **options)

    run(prompts(), 0, direction=np.ones(6), strength=1.0)
    before = generation._decode_loop._cache_size()
    for temperature, strength in ((0.5, 2), (1, -1.0), (0.0, np.float64(0.0))):
        direction = (np.arange(6.0) * strength).tolist()
        run(
            prompts((4, 1, 30)),
            1,
            max_new_tokens=9,
            direction=direction,
            strength=strength,
            temperature=temperature,
        )
    assert generation._decode_loop._cache_size() == before


@pytest.mark.parametrize(
    ("temperature", "other"),
    [
        (0.6, Temperature(0.6)),
        pytest.param(0.0, Greedy(), marks=slow),
        pytest.param(0.0, Temperature(0.6, top_k=1), marks=slow),
    ],
    ids=["temperature", "greedy", "top 1"],
)
def test_samplers_of_tokens_on_a_density_equal_renormalized(temperature, other):
    lm, options = build("mixture"), dict(max_new_tokens=9, key=KEY, stop=())
    sampler = Renormalized(temperature=temperature)
    expected = generate(lm, prompts(), sampler=sampler, **options).tokens
    tokens = generate(lm, prompts(), sampler=other, **options).tokens
    np.testing.assert_array_equal(tokens, expected)
    assert len(np.unique(tokens)) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_prefill_length": 0}, "max_prefill_length is 0"),
        ({"sampler": Rerank(0)}, "num_candidates is 0"),
        ({"sampler": Rerank(12)}, "there are 11 tokens"),
        ({"sampler": Rerank()}, "num_candidates is 16, but there are 11 tokens"),
        ({"sampler": NearestRow("nearest")}, "metric is 'nearest'"),
        ({"sampler": NearestRow(temperature=-1.0)}, "temperature is -1"),
        ({"sampler": Rerank(4, temperature=-1.0)}, "temperature is -1"),
        ({"sampler": Renormalized(temperature=-1.0)}, "temperature is -1"),
        ({"sampler": NearestRow(temperature=np.ones(3))}, "temperature has shape"),
        ({"sampler": NearestRow(temperature=None)}, "temperature has dtype"),
        ({"key": None}, "needs a key"),
        ({"sampler": NearestRow(strength=1.0)}, "needs a direction"),
        (
            {"sampler": NearestRow(strength=np.nan, direction=np.ones(6))},
            "strength is nan",
        ),
        (
            {"sampler": NearestRow(strength=np.ones(3), direction=np.ones(6))},
            "strength has shape [3]",
        ),
        ({"sampler": NearestRow(direction=np.ones(5))}, "direction has shape [5]"),
        (
            {"sampler": NearestRow(direction=np.full(6, np.inf))},
            "direction[0] is inf",
        ),
        ({"prompts": None}, "prompts must be"),
        ({"prompts": np.ones((2, 6))}, "this model reads tokens"),
        ({"prompts": [[1, 11]]}, "prompt 0: tokens[1] is 11"),
        ({"prompts": []}, "empty"),
        ({"durations": np.ones(3)}, "durations"),
        ({"durations": [0.0, 1.0]}, "duration 0"),
        ({"new_durations": -1.0}, "new_durations is -1"),
        ({"new_durations": np.ones(3)}, "new_durations has shape [3]"),
        ({"stop": 11}, "stop"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    options = {"sampler": NearestRow(), "max_new_tokens": 2, "key": KEY}
    with pytest.raises(clm.InputError) as refused:
        generate(build("gaussian"), **{"prompts": [1, 2]} | options | changes)
    assert message in str(refused.value)


def test_samplers_that_do_not_fit_the_model():
    token_lm, plain = build("token"), build("gaussian", "vectors")
    lm, trunk = build("gaussian"), clm.LanguageModel(clm.Transformer(CONFIG), {})
    for model, sampler, message in (
        (
            token_lm,
            NearestRow(direction=np.ones(11)),
            "token head; give Greedy or Temp",
        ),
        (token_lm, Rerank(4), "Rerank needs a density over a table of tokens"),
        (token_lm, NextVector(), "this model reads tokens"),
        (lm, NextVector(), "this model reads tokens; give NearestRow"),
        (plain, NearestRow(), "model that reads vectors; give NextVector"),
        (plain, Renormalized(), "Renormalized needs a density over a table of tokens"),
        (plain, Greedy(), "give a sampler of models.density"),
        (plain, Temperature(), "Temperature draws from logits of tokens"),
        (trunk, NearestRow(), "this needs a DensityModel"),
        (trunk, NextVector(), "this needs a DensityModel"),
    ):
        with pytest.raises(clm.InputError) as refused:
            generate(model, [1], sampler=sampler, max_new_tokens=1, key=KEY)
        assert message in str(refused.value)


def test_models_that_generate_nothing_are_refused():
    lm = calm.autoencoder_of(tiny.next_vector_lm())
    with pytest.raises(clm.InputError, match="Autoencoder, which generates nothing"):
        generate(lm, [1], max_new_tokens=1)


def test_arguments_that_do_not_fit_the_model():
    token_lm, plain = build("token"), build("gaussian", "vectors")
    lm, options = build("gaussian"), dict(max_new_tokens=1, key=KEY)
    vector_options = options | {"sampler": NextVector()}
    for call, message in {
        lambda: generate(plain, [1, 2], **vector_options): "this model reads vectors",
        lambda: generate(plain, np.ones((2, 4)), **vector_options): "prompt 0",
        lambda: generate(
            plain, np.ones((2, 3)), stop=3, **vector_options
        ): "leave out stop",
        lambda: steering_direction(plain, [1]): "table of tokens",
        lambda: steering_direction(token_lm, [1]): "table of tokens",
        lambda: steering_direction(lm, []): "towards is empty",
        lambda: steering_direction(lm, [11]): "towards[0] is 11",
        lambda: steering_direction(lm, [1], [0.5]): "away has dtype",
    }.items():
        with pytest.raises(clm.InputError) as refused:
            call()
        assert message in str(refused.value)
