"""Generation against transformers, against loops of whole forward passes, and by its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import continuous_lm as clm
from continuous_lm.models import generation, kv_cache
from continuous_lm.models.generation import generate
from continuous_lm.models.samplers import (
    Greedy,
    Temperature,
    _mask_unlikely,
    sample_token,
)
from tests.fixtures import many_devices, tiny
from tests.models.families.test_parity import LONGROPE, STORIES
from tests.models.test_kv_cache import random_lm

KEY = jax.random.key(0)
LENGTHS = (3, 9, 17)


def prompts(vocab_size=64, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n) for n in lengths]


# Without jit, every operation is a program.
sample = jax.jit(sample_token, static_argnames="top_k")
mask_unlikely = jax.jit(_mask_unlikely, static_argnames="top_k")


# --- transformers ----------------------------------------------------------------------------

# Tied to their embeddings, random models repeat the last token; others do for some seeds.
UNTIED = {"tie_word_embeddings": False}
CASES = {
    "llama": ("llama", {"seed": 1}),
    "mistral, window 3": ("mistral", {"sliding_window": 3}),
    "mistral, window 20": ("mistral", {"sliding_window": 20}),
    "gemma": ("gemma", UNTIED),
    "gemma2, window 3": ("gemma2", UNTIED),
    "gemma2, window 20": ("gemma2", UNTIED | {"sliding_window": 20}),
    "gemma3, window 3": ("gemma3_text", UNTIED),
    "phi3": ("phi3", {}),
    "phi3, longrope, long": (
        "phi3",
        LONGROPE | {"original_max_position_embeddings": 2},
    ),
    "phi3, longrope, short": (
        "phi3",
        LONGROPE | {"original_max_position_embeddings": 200},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gpt_neox": ("gpt_neox", {"seed": 3}),
    "gpt2": ("gpt2", UNTIED | {"n_positions": 128}),
}


def theirs(reference, rows, num_new) -> list[list[int]]:
    """Return transformers' greedy tokens for prompts padded on the left, without stop token."""
    import torch

    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    mask = torch.tensor(
        [[0] * p + [1] * len(row) for p, row in zip(pad, rows, strict=True)]
    )
    tokens = torch.tensor(
        [[0] * p + list(row) for p, row in zip(pad, rows, strict=True)]
    )
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 0
    out = reference.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=num_new,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.scores).topk(2, dim=-1).values
    # Rounding must not decide between the two best tokens.
    assert (best[..., 0] - best[..., 1]).min() > 2e-5
    return out.sequences[:, width:].tolist()


QUICK = ("llama", "gemma2, window 3", "phi3, longrope, long")
slow = pytest.mark.slow


def named(name):
    return pytest.param(
        name, id=name.replace(", ", "-"), marks=() if name in QUICK else slow
    )


@pytest.fixture(scope="module", params=map(named, CASES))
def pair(request, tmp_path_factory):
    """A random checkpoint in both implementations."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    family, config = CASES[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny.save_reference(folder, family, **config), clm.load(folder)


def test_greedy_tokens_of_a_batch_equal_those_of_transformers(pair):
    reference, lm = pair
    expected = theirs(reference, prompts(), 64)
    assert min(len(set(row)) for row in expected) >= 5  # not a constant loop
    generated = generate(lm, prompts(), max_new_tokens=64, stop=())
    assert generated.tokens.tolist() == expected
    assert generated.lengths.tolist() == [64] * 3


@slow
def test_greedy_tokens_of_single_prompts_equal_those_of_transformers(pair):
    reference, lm = pair
    for row in prompts():
        generated = generate(lm, row, max_new_tokens=64, stop=())
        assert generated.tokens.tolist() == theirs(reference, [row], 64)


@pytest.fixture(scope="module")
def stories():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not STORIES.exists():
        pytest.skip(
            f"the TinyStories weights are not at {STORIES.relative_to(STORIES.parents[3])}"
        )
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(STORIES, attn_implementation="eager").eval(), clm.load(
        STORIES
    )


@slow
def test_real_weights_continue_stories_as_transformers_does(stories):
    reference, lm = stories
    texts = [
        "Once upon a time, there was a little girl named",
        "The dog",
        "One day, Tom saw a big",
    ]
    rows = [clm.tokenization.encode(lm.tokenizer, text).ids for text in texts]
    expected = theirs(reference, rows, 100)
    assert min(len(set(row)) for row in expected) > 30  # stories, not loops
    assert generate(lm, rows, max_new_tokens=100, stop=()).tokens.tolist() == expected


# --- Loops of whole forward passes -----------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    """A model with windows in one of two layers."""
    return random_lm("gemma2", sliding_window=4, final_logit_softcapping=30.0, **UNTIED)


ROOM = 48


def naive(lm, row, new_d, d=None, start=0.0, name="tokens"):
    """Return greedy tokens of one prompt: a forward pass over all tokens for each of them."""
    table = np.asarray(lm.params["embedding"])
    vectors = np.zeros((ROOM, table.shape[-1]), np.float32)
    times = np.ones(ROOM, np.float32)
    n, tokens = len(row), []
    vectors[:n] = table[row] if name == "tokens" else row
    times[:n] = 1.0 if d is None else d
    for duration in new_d:
        logits = lm(
            embeddings=vectors, durations=times, start=np.float32(start), position=n - 1
        )
        tokens.append(int(np.argmax(logits)))
        vectors[n], times[n] = table[tokens[-1]], duration
        n += 1
    return tokens


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 2.5, shape).astype(np.float32)


NEW = 24
TIMES = {
    "ordinary": {},
    "scalar": {"new_durations": 0.3},
    "of each token": {"new_durations": uniform(NEW)},
    "of each token and row": {"new_durations": uniform(3, NEW)},
    "of the prompts": {"durations": [uniform(n) for n in LENGTHS]},
    "from a start": {"start": 5.25, "new_durations": 0.5},
    "from starts": {"start": np.array([0.0, -3.0, 7.5]), "new_durations": 0.5},
    "zero": {"new_durations": np.r_[uniform(NEW - 9), np.zeros(9)]},
}


def test_tokens_at_any_durations_equal_a_loop_of_forward_passes(lm):
    results = []
    for case, timing in TIMES.items():
        generated = generate(lm, prompts(), max_new_tokens=NEW, **timing)
        tokens = generated.tokens.tolist()
        new_d = np.broadcast_to(timing.get("new_durations", 1.0), (3, NEW))
        start = np.broadcast_to(timing.get("start", 0.0), 3)
        d = timing.get("durations", [None] * 3)
        rows = zip(prompts(), new_d, d, start, strict=True)
        assert tokens == [naive(lm, *row) for row in rows], case
        assert min(len(set(row)) for row in tokens) >= 5, case
        results.append(generated.tokens.tobytes())
    assert len(set(results[:5])) == 5  # durations have an effect


def test_the_duration_of_the_last_token_has_no_effect(lm):
    d = uniform(NEW)
    short, long = (
        generate(lm, prompts(), max_new_tokens=NEW, new_durations=np.r_[d[:-1], last])
        for last in (0.1, 9.0)
    )
    np.testing.assert_array_equal(short.tokens, long.tokens)


def test_learned_positions_at_real_times():
    """With a start, which has no effect on models of relative positions."""
    lm = random_lm("gpt2")
    timing = {"new_durations": 0.7, "start": 0.25}
    generated = generate(lm, prompts(), max_new_tokens=NEW, stop=(), **timing)
    expected = [naive(lm, row, [0.7] * NEW, start=0.25) for row in prompts()]
    assert generated.tokens.tolist() == expected


def test_embeddings_in_place_of_tokens(lm):
    table = np.asarray(lm.params["embedding"])
    vectors = [table[row] for row in prompts()]
    by_rows = generate(lm, vectors, max_new_tokens=NEW)
    by_tokens = generate(lm, prompts(), max_new_tokens=NEW)
    np.testing.assert_array_equal(by_rows.tokens, by_tokens.tokens)
    moved = [row + 0.1 * uniform(*row.shape) for row in vectors]
    generated = generate(lm, moved, max_new_tokens=NEW)
    expected = [naive(lm, row, [1.0] * NEW, name="rows") for row in moved]
    assert generated.tokens.tolist() == expected


def test_rows_of_a_batch_do_not_affect_each_other(lm):
    durations = TIMES["of the prompts"]["durations"]
    batch = generate(lm, prompts(), max_new_tokens=NEW, durations=durations)
    for prompt, d, row in zip(prompts(), durations, batch.tokens, strict=True):
        alone = generate(lm, prompt, durations=d, max_new_tokens=NEW)
        np.testing.assert_array_equal(alone.tokens, row[None])


def test_prompts_may_be_lists_arrays_or_a_single_row(lm):
    row, options = prompts()[1], {"max_new_tokens": 4}
    expected = generate(lm, row, **options).tokens
    assert expected.shape == (1, 4)
    array, ints = jnp.asarray(row), row.tolist()
    for prompt in (
        *(ints, array, [row], [ints], (array,), row[None], row.astype(np.uint8)),
    ):
        np.testing.assert_array_equal(generate(lm, prompt, **options).tokens, expected)
    d = uniform(9).tolist()
    expected = generate(lm, row, durations=[d], **options)
    generated = generate(lm, [row], durations=d, **options)
    np.testing.assert_array_equal(generated.tokens, expected.tokens)


@slow
def test_tokens_of_bfloat16_parameters_are_nearly_the_likeliest():
    lm = random_lm("llama", jnp.bfloat16)
    generated = generate(lm, prompts(), max_new_tokens=8, stop=())
    for prompt, new in zip(prompts(), generated.tokens, strict=True):
        logits = np.asarray(lm(np.append(prompt, new)))[len(prompt) - 1 : -1]
        generated_logits = np.take_along_axis(logits, new[:, None], axis=-1)[:, 0]
        difference = logits.max(axis=-1) - generated_logits
        assert difference.max() < 0.05 * np.abs(logits).max()


# --- Pieces of prompts, memory and programs --------------------------------------------------


@slow
@pytest.mark.parametrize("chunk", [7, 64])
def test_prefill_in_pieces_does_not_change_tokens(lm, chunk):
    rows = prompts(lengths=(70, 2, 66))
    options = {"durations": [uniform(len(row)) for row in rows], "max_new_tokens": 8}
    generated = generate(lm, rows, max_prefill_length=chunk, **options)
    expected = generate(lm, rows, **options)
    np.testing.assert_array_equal(generated.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("length", "chunk", "expected"),
    [
        (1, 1024, (64, 64)),
        (64, 64, (64, 64)),
        (65, 1024, (128, 128)),
        (1025, 1024, (1088, 544)),
        (1025, 64, (1088, 64)),
        (60, 7, (70, 7)),
        (3, 1, (64, 1)),
    ],
)
def test_prefill_lengths_are_multiples_of_equal_pieces(length, chunk, expected):
    assert generation._prefill_lengths(length, chunk) == expected


def compiled(monkeypatch, lm, tokens, **options):
    """Return the program that `generate` would run."""
    programs = []

    def catch(*arguments):
        programs.append(original.lower(*arguments).compile())
        return np.zeros((1, 1), np.int32), np.ones(1, np.int32)

    with monkeypatch.context() as patch:
        original = generation._decode_loop
        patch.setattr(generation, "_decode_loop", catch)
        generate(lm, tokens, **options)
    return programs[0]


@slow
def test_memory_of_prefill_in_pieces_grows_as_the_cache(monkeypatch):
    lm = random_lm("llama", hidden_size=96, intermediate_size=1024)

    def bytes_of(length, chunk):
        program = compiled(
            monkeypatch,
            lm,
            np.zeros(length, int),
            max_new_tokens=8,
            max_prefill_length=chunk,
            stop=(),
        )
        return program.memory_analysis().temp_size_in_bytes

    def cache_of(length):
        cache = kv_cache.empty(lm.config, length + 64)
        return sum(leaf.nbytes for leaf in cache)

    short, long = bytes_of(1024, 64), bytes_of(2048, 64)
    assert long - short < 3 * (cache_of(2048) - cache_of(1024))
    assert long < 0.5 * bytes_of(2048, 2048)


@pytest.mark.parametrize("top_p", [None, pytest.param(0.9, marks=slow)])
def test_one_program_serves_all_values_of_the_options(lm, top_p):
    def run(n, temperature=0.5, top_p=top_p, **options):
        usual = {"max_new_tokens": 5, "key": KEY}
        sampler = Temperature(temperature, top_p=top_p)
        rows = prompts(lengths=(n, 2))
        generate(lm, rows, sampler=sampler, **usual | options)

    run(3)
    before = generation._decode_loop._cache_size()
    run(64)
    run(9, temperature=3.0, top_p=top_p and 0.1)
    run(9, temperature=np.int64(2), top_p=top_p and jnp.float32(1.0))
    run(9, new_durations=0.3, start=4, durations=[[1] * 9, [2.5] * 2])
    run(9, new_durations=np.ones((2, 5), int))
    run(9, max_new_tokens=64)
    run(9, max_new_tokens=np.int64(1))
    run(9, stop=())
    run(9, stop=[1, 2, 3])
    run(9, max_prefill_length=2000)
    assert generation._decode_loop._cache_size() == before
    run(65)
    assert generation._decode_loop._cache_size() == before + 1


@slow
def test_any_number_of_new_tokens(lm):
    """Also below, at and above the length of the compiled buffer."""
    row = prompts()[0]
    long = generate(lm, row, max_new_tokens=65).tokens
    for n in (1, 63, 64):
        generated = generate(lm, row, max_new_tokens=n)
        np.testing.assert_array_equal(generated.tokens, long[:, :n])
        assert generated.lengths.tolist() == [n]


# --- Stop tokens -----------------------------------------------------------------------------


def test_rows_end_with_their_stop_tokens(lm):
    rows = prompts()
    endless = generate(lm, rows, max_new_tokens=NEW, stop=()).tokens
    stop = [int(endless[0, 3]), int(endless[1, 9])]
    generated = generate(lm, rows, max_new_tokens=NEW, stop=stop)
    ends = [
        next((i + 1 for i, t in enumerate(row) if t in stop), NEW) for row in endless
    ]
    assert len(set(ends)) > 1
    assert generated.lengths.tolist() == ends
    assert generated.token_lists() == [
        row[:end].tolist() for row, end in zip(endless, ends, strict=True)
    ]
    after = np.arange(NEW) >= np.array(ends)[:, None]
    assert (generated.tokens[after] == 0).all()


def test_the_default_stop_token_is_that_of_the_config(lm):
    rows = prompts()
    endless = generate(lm, rows, max_new_tokens=NEW, stop=())
    token = int(endless.tokens[0, 3])

    def with_eos(eos, **options):
        fields = {"eos_token_id": eos}
        model = clm.Transformer(lm.config)
        with_field = clm.LanguageModel(model, lm.params, hf_fields=fields)
        return generate(with_field, rows, max_new_tokens=NEW, **options)

    for eos in (token, [token, int(endless.tokens[1, 9])]):
        expected = generate(lm, rows, max_new_tokens=NEW, stop=eos)
        assert with_eos(eos).token_lists() == expected.token_lists()
        assert with_eos(eos).lengths[0] <= 4
        assert with_eos(eos, stop=()).token_lists() == endless.token_lists()
    assert with_eos(None).token_lists() == endless.token_lists()


def test_decoding_ends_with_the_last_row(monkeypatch):
    """The compiled program counts calls of the model with one token."""
    lm, steps = random_lm("llama", rms_norm_eps=1.5e-5), []
    append = kv_cache.append

    def counted(buffer, new, filled):
        if new.shape[-1] == 1:
            jax.debug.callback(lambda: steps.append(1))
        return append(buffer, new, filled)

    monkeypatch.setattr(kv_cache, "append", counted)

    def count_steps(**options):
        steps.clear()
        generated = generate(lm, prompts(), **options)
        jax.effects_barrier()
        return generated, len(steps) // 2  # durations and intervals of a call

    endless, number = count_steps(max_new_tokens=20, stop=())
    assert number == 19  # the last token is not read
    stop = sorted({int(row[7]) for row in endless.tokens})
    generated, number = count_steps(max_new_tokens=20, stop=stop)
    assert number == generated.lengths.max() - 1 <= 7


# --- Sampling --------------------------------------------------------------------------------

logits_and_cuts = st.tuples(
    st.lists(st.integers(-12, 12), min_size=9, max_size=9),
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.sampled_from([None, 1, 4, 14]),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
)


@given(logits_and_cuts)
def test_top_k_and_top_p_equal_those_of_transformers(case):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits, temperature, top_k, top_p = case
    logits = np.asarray(logits, np.float32) / 3
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
    expected = torch.tensor(logits)[None]
    for warp in warpers:
        expected = warp(None, expected)
    expected = expected[0].numpy()
    tempered = logits / np.float32(temperature)
    ours = np.asarray(mask_unlikely(tempered, top_k=top_k, top_p=top_p))
    if top_p is not None and rounding_decides(tempered, top_k, top_p):
        return
    # Transformers cuts tied tokens in its own order: only the remaining values are compared.
    np.testing.assert_allclose(
        np.sort(ours[np.isfinite(ours)]),
        np.sort(expected[np.isfinite(expected)]),
        rtol=1e-5,
    )
    if len(set(logits)) == len(logits):
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))


def rounding_decides(logits, top_k, top_p):
    """Return whether a sum of probabilities is so near to top_p that rounding cuts a token."""
    p = np.exp(np.float64(mask_unlikely(logits, top_k=top_k, top_p=None)))
    sums = np.cumsum(np.sort(p / p.sum())[::-1])
    return np.abs(sums - top_p).min() < 1e-5


def assert_frequencies(counts, p):
    """Assert that counts [V] are those of samples from probabilities p [V]."""
    expected = counts.sum() * p / p.sum()
    assert (counts[p == 0] == 0).all()
    is_frequent = expected > 5
    assert is_frequent.sum() >= 2
    counts, expected = counts[is_frequent], expected[is_frequent]
    expected *= counts.sum() / expected.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "num_tokens"),
    [
        ({}, 6),
        ({"temperature": 0.5}, 6),
        ({"top_k": 3}, 3),
        ({"top_p": 0.75}, 2),
        ({"temperature": 2.0, "top_k": 4, "top_p": 0.9}, 4),
    ],
)
def test_frequencies_match_the_probabilities(options, num_tokens):
    logits = np.array([0.5, 1.5, -1.0, 2.0, 0.0, -9.0], np.float32)
    tokens = sample(KEY, np.tile(logits, (20_000, 1)), **options)
    p = np.exp(np.float64(logits) / options.get("temperature", 1.0))
    p[np.argsort(-p)[num_tokens:]] = 0
    assert_frequencies(np.bincount(tokens, minlength=6), p)


def random_logits(vocab_size, scale):
    rng = np.random.default_rng(1)
    return (scale * rng.normal(size=(50, vocab_size))).astype(np.float32)


def test_cuts_that_allow_all_tokens_change_no_sample():
    """Even where rounded sums of probabilities reach 1 before the last token."""
    logits = random_logits(5000, 4)
    expected = sample(KEY, logits)
    for options in ({"top_p": 1.0}, {"top_k": 5000}, {"top_k": 9999}):
        np.testing.assert_array_equal(sample(KEY, logits, **options), expected)
    assert np.isfinite(mask_unlikely(logits, top_k=5000, top_p=1.0)).all()


def test_cold_and_cut_samples_are_the_likeliest():
    logits = random_logits(500, 40)
    expected = logits.argmax(-1)
    for temperature in (1e-3, 1e-30, 1e-44, 0.0):
        tokens = sample(KEY, logits, temperature=temperature)
        np.testing.assert_array_equal(tokens, expected)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        np.testing.assert_array_equal(sample(KEY, logits, **options), expected)


def test_temperatures_and_cuts_of_each_row():
    logits = np.tile(np.arange(4, dtype=np.float32), (2000, 1))
    for options, even in (
        ({"temperature": np.tile([0.0, 50.0], 1000)}, {3}),
        ({"top_p": np.tile([0.7, 1.0], 1000)}, {2, 3}),
    ):
        tokens = np.asarray(sample(KEY, logits, **options))
        assert set(tokens[::2].tolist()) == even
        assert set(tokens[1::2].tolist()) == {0, 1, 2, 3}


@slow
def test_samples_are_independent_over_rows_steps_and_keys():
    """All tokens are equally likely."""
    lm = random_lm("llama")
    lm = clm.LanguageModel(
        clm.Transformer(lm.config), jax.tree.map(jnp.zeros_like, lm.params)
    )

    def draw(key):
        options = {"max_new_tokens": 60, "sampler": Temperature(1), "stop": ()}
        return generate(lm, np.ones((8, 3), int), key=key, **options).tokens

    a, b = draw(KEY), draw(jax.random.key(1))
    np.testing.assert_array_equal(a, draw(jax.random.key(0)))
    np.testing.assert_array_equal(a, draw(jax.random.PRNGKey(0)))
    assert_frequencies(np.bincount(a.ravel(), minlength=64), np.ones(64))
    for x, y in [
        (a, b),
        (a[:, 1:], a[:, :-1]),
        (a[1:], a[:-1]),
        (a[1:, 1:], a[:-1, :-1]),
    ]:
        assert (x == y).mean() < 4 / 64  # 1 / 64 in the mean


@slow
def test_sampled_tokens_have_the_models_probabilities(lm):
    row = prompts()[1]
    tokens = generate(
        lm, [row] * 512, max_new_tokens=2, sampler=Temperature(3, top_k=6), key=KEY
    ).tokens
    common = np.bincount(tokens[:, 0]).argmax()
    after = tokens[tokens[:, 0] == common]
    for before, new_tokens in (([], tokens[:, 0]), ([common], after[:, 1])):
        logits = np.float64(lm(np.append(row, before).astype(int), position=-1)) / 3
        p = np.where(logits >= np.sort(logits)[-6], np.exp(logits - logits.max()), 0)
        assert_frequencies(np.bincount(new_tokens, minlength=64), p)


def test_cold_temperatures_are_greedy_and_0_needs_no_key(lm):
    """The first of tied tokens is taken, for every key."""
    greedy = generate(lm, prompts(), sampler=Greedy(), max_new_tokens=NEW)
    for temperature, options in ((0.0, {}), (0.0, {"key": KEY}), (1e-4, {"key": KEY})):
        sampler = Temperature(temperature, top_p=0.9)
        cold = generate(lm, prompts(), sampler=sampler, max_new_tokens=NEW, **options)
        np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    params = jax.tree.map(np.zeros_like, lm.params)
    flat = generate(
        lm.with_params(params), ROW, sampler=Temperature(0), max_new_tokens=2, stop=()
    )
    assert flat.token_lists() == [[0, 0]]


# --- Many devices ----------------------------------------------------------------------------

MESH_PROGRAM = """
import functools, sys
import jax, numpy as np
import continuous_lm as clm
from continuous_lm.models import generation

assert jax.device_count() == 8
mesh = jax.make_mesh((2, 4), ("data", "model"))
rows = [np.arange(1 + n) % 64 for n in (3, 9, 17, 12)]
sampler = clm.Temperature(1.0, top_p=0.9) if sys.argv[2:] else clm.Greedy()
generate = functools.partial(
    generation.generate,
    prompts=rows,
    sampler=sampler,
    max_new_tokens=16,
    key=jax.random.key(3),
    stop=(),
)
one = generate(clm.load(sys.argv[1])).tokens
original = generation._decode_loop

def inspected(how, *arguments):
    program = original.lower(how, *arguments).compile()
    text = program.as_text()
    print("f32[3,2,128,1,12]" in text, "f32[3,4,128,4,12]" in text)
    return program(*arguments)

generation._decode_loop = inspected
many = generate(clm.load(sys.argv[1], mesh=mesh)).tokens
print((one == many).all(), len(set(one.ravel().tolist())))
"""


@slow
@pytest.mark.parametrize("sampled", [[], ["sampled"]], ids=["greedy", "sampled"])
def test_tokens_on_a_mesh_equal_those_on_one_device(tmp_path, sampled):
    """The cache is sharded: a device holds half of the rows and a quarter of the heads."""
    folder = tiny.save(tmp_path / "x", num_key_value_heads=4)
    output = many_devices.run_on_devices(MESH_PROGRAM, 8, str(folder), *sampled)
    (has_part, has_all), (is_same, num_tokens) = map(str.split, output.splitlines())
    assert (has_part, has_all, is_same) == ("True", "False", "True")
    assert int(num_tokens) >= 5


# --- Arguments that do not fit ---------------------------------------------------------------

ROW = [1, 2, 3]
BAD = [
    ({"prompts": [1, 64]}, r"prompt 0: tokens\[1\] is 64"),
    ({"prompts": [ROW, [-1]]}, r"prompt 1: tokens\[0\] is -1"),
    (
        {"prompts": [1.0, 2.0]},
        r"prompt 0: prompts have shape \[\]; it must be \[T, W\]",
    ),
    ({"prompts": [True, False]}, "prompts hold bool"),
    ({"prompts": []}, "prompts are empty"),
    ({"prompts": np.zeros((0, 3), int)}, "prompts are empty"),
    ({"prompts": [ROW, []]}, "prompt 1: there are no tokens"),
    ({"prompts": [[]]}, "prompt 0: there are no tokens"),
    ({"prompts": np.zeros((2, 0), int)}, "prompt 0: there are no tokens"),
    ({"prompts": 3}, "prompts must be one prompt"),
    ({"prompts": jnp.int32(3)}, "prompts must be one prompt"),
    ({"prompts": [[1, [2, 3]]]}, "prompts must be one prompt"),
    ({"prompts": np.zeros((2, 3, 4), int)}, r"prompt 0: prompts have shape \[3, 4\]"),
    ({"prompts": [ROW, 3]}, r"prompt 1: prompts have shape \[\]"),
    ({"prompts": [None]}, "prompts hold object"),
    ({"prompts": None}, "prompts must be one prompt"),
    ({"prompts": "Once upon a time"}, "prompts are text"),
    ({"prompts": ["Once", "upon"]}, "prompts are text"),
    ({"prompts": np.ones((3, 47))}, "prompt 0: embeddings are 47 wide"),
    ({"prompts": np.ones(48)}, "prompts have shape"),
    ({"prompts": [ROW, np.ones((3, 48))]}, "prompts hold float64; all must be"),
    ({"prompts": np.full((3, 48), np.nan)}, r"prompt 0: embeddings\[0, 0\] is nan"),
    ({"prompts": ROW, "durations": [1.0, 2.0]}, r"prompt 0: durations has shape \[2\]"),
    (
        {"prompts": [ROW, [1]], "durations": [[1.0] * 3, [1.0] * 2]},
        "prompt 1: durations has shape",
    ),
    (
        {"prompts": [ROW, [1]], "durations": [[1.0] * 3]},
        "durations are given for 1 prompts",
    ),
    (
        {"prompts": [ROW, ROW], "durations": [1.0] * 3},
        "durations are given for 1 prompts",
    ),
    (
        {"prompts": ROW, "durations": [1.0, np.nan, 1.0]},
        r"prompt 0: durations\[1\] is nan",
    ),
    (
        {"prompts": ROW, "durations": [1.0, -1.0, 1.0]},
        r"prompt 0: durations\[1\] is -1",
    ),
    (
        {"prompts": ROW, "durations": [0.0, 1.0, 1.0]},
        "prompt 0: durations: the first token",
    ),
    ({"prompts": ROW, "durations": 2.0}, "durations must be"),
    ({"prompts": ROW, "start": np.nan}, "start is nan"),
    ({"prompts": ROW, "start": [0.0, 1.0]}, r"start has shape \[2\]"),
    ({"prompts": ROW, "new_durations": -0.5}, "new_durations is -0.5"),
    (
        {"prompts": ROW, "new_durations": [1.0, np.inf, 1, 1]},
        r"new_durations\[1\] is inf",
    ),
    (
        {"prompts": ROW, "new_durations": [1.0, 2.0]},
        r"new_durations has shape \[2\].*\[1, 4\]",
    ),
    (
        {"prompts": ROW, "new_durations": np.ones((2, 4))},
        r"new_durations has shape \[2, 4\]",
    ),
    ({"prompts": ROW, "new_durations": "long"}, "new_durations has dtype"),
    ({"prompts": ROW, "sampler": Temperature(top_k=0)}, "top_k is 0"),
    ({"prompts": ROW, "sampler": Temperature(top_k=2.0)}, "top_k is 2.0"),
    ({"prompts": ROW, "sampler": Temperature(top_p=0.0)}, "top_p is 0"),
    ({"prompts": ROW, "sampler": Temperature(top_p=2.0)}, "top_p is 2"),
    ({"prompts": ROW, "sampler": Temperature(top_p=np.nan)}, "top_p is nan"),
    ({"prompts": ROW, "sampler": Temperature(top_p=[0.5])}, r"top_p has shape \[1\]"),
    ({"prompts": ROW, "sampler": Temperature(-1.0)}, "temperature is -1"),
    ({"prompts": ROW, "sampler": Temperature(np.nan)}, "temperature is nan"),
    ({"prompts": ROW, "sampler": Temperature(np.inf)}, "temperature is inf"),
    ({"prompts": ROW, "sampler": Temperature(1e39)}, "temperature is inf"),
    ({"prompts": ROW, "sampler": Temperature("hot")}, "temperature has dtype"),
    ({"prompts": ROW, "sampler": Temperature(None)}, "temperature"),
    ({"prompts": ROW, "sampler": Temperature(1.0)}, "needs a key"),
    (
        {"prompts": ROW, "sampler": Temperature(1.0), "key": 0},
        "key is not a single PRNG key",
    ),
    (
        {"prompts": ROW, "sampler": Temperature(1.0), "key": jax.random.split(KEY)},
        "key is not a single",
    ),
    ({"prompts": ROW, "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"prompts": ROW, "max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"prompts": ROW, "max_new_tokens": True}, "max_new_tokens is True"),
    ({"prompts": ROW, "max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
    ({"prompts": ROW, "max_new_tokens": None}, "max_new_tokens is None"),
    ({"prompts": ROW, "max_prefill_length": 0}, "max_prefill_length is 0"),
    ({"prompts": ROW, "stop": 64}, "stop is 64"),
    ({"prompts": ROW, "stop": [1, -1]}, r"stop\[1\] is -1"),
    ({"prompts": ROW, "stop": "."}, "stop has dtype"),
    ({"prompts": ROW, "stop": 1.0}, "stop has dtype"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_arguments_that_do_not_fit_are_named(lm, arguments, message):
    with pytest.raises(clm.InputError, match=message):
        generate(lm, **{"max_new_tokens": 4} | arguments)


def test_wrong_stop_tokens_of_the_config_are_named(lm):
    noted = clm.LanguageModel(
        clm.Transformer(lm.config), lm.params, hf_fields={"eos_token_id": 64}
    )
    with pytest.raises(clm.InputError, match=r"eos_token_id of config\.json is 64"):
        generate(noted, ROW, max_new_tokens=4)


def test_wrong_counts_of_samples_are_refused():
    with pytest.raises(clm.InputError, match="top_k is 0"):
        sample_token(KEY, jnp.zeros(4), top_k=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": np.array([1.0, np.nan])}, r"temperature\[1\] is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": np.array([0.5, 1.5])}, "top_p is .*at most 1"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_sample_token_refuses_settings_out_of_range(settings, message):
    with pytest.raises(clm.InputError, match=message):
        clm.sample_token(jax.random.key(0), jnp.zeros((2, 5)), **settings)
