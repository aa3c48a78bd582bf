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
    """transformers' greedy tokens for prompts padded on the left, with no end of the text."""
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
    assert (
        best[..., 0] - best[..., 1]
    ).min() > 2e-5  # no tie, which rounding could turn
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


def test_greedy_tokens_of_a_batch_are_those_of_transformers(pair):
    reference, lm = pair
    expected = theirs(reference, prompts(), 64)
    assert min(len(set(row)) for row in expected) >= 5  # not a constant loop
    made = generate(lm, prompts(), max_new_tokens=64, stop=())
    assert made.tokens.tolist() == expected
    assert made.lengths.tolist() == [64] * 3


@slow
def test_greedy_tokens_of_single_prompts_are_those_of_transformers(pair):
    reference, lm = pair
    for row in prompts():
        assert generate(lm, row, max_new_tokens=64, stop=()).tokens.tolist() == theirs(
            reference, [row], 64
        )


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


def test_real_weights_tell_the_stories_of_transformers(stories):
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
    """With windows in one of two layers, so that both kinds are there."""
    return random_lm("gemma2", sliding_window=4, final_logit_softcapping=30.0, **UNTIED)


ROOM = 48


def naive(lm, row, new_d, d=None, start=0.0, name="tokens"):
    """Greedy tokens of one prompt: a whole forward pass for each, over a buffer of one length."""
    table = np.asarray(lm.params["embedding"])
    vectors = np.zeros((ROOM, table.shape[-1]), np.float32)
    times = np.ones(ROOM, np.float32)
    n, made = len(row), []
    vectors[:n] = table[row] if name == "tokens" else row
    times[:n] = 1.0 if d is None else d
    for duration in new_d:
        logits = lm(
            embeddings=vectors, durations=times, start=np.float32(start), position=n - 1
        )
        made.append(int(jnp.argmax(logits)))
        vectors[n], times[n] = table[made[-1]], duration
        n += 1
    return made


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


@pytest.mark.parametrize("timing", TIMES.values(), ids=TIMES)
def test_any_durations_equal_a_loop_of_forward_passes(lm, timing):
    made = generate(lm, prompts(), max_new_tokens=NEW, **timing).tokens.tolist()
    new_d = np.broadcast_to(timing.get("new_durations", 1.0), (3, NEW))
    start = np.broadcast_to(timing.get("start", 0.0), 3)
    d = timing.get("durations", [None] * 3)
    expected = [
        naive(lm, *each) for each in zip(prompts(), new_d, d, start, strict=True)
    ]
    assert made == expected
    assert min(len(set(row)) for row in made) >= 5


def test_durations_matter(lm):
    """Else the test above would show nothing."""
    made = [
        generate(lm, prompts(), max_new_tokens=NEW, **timing)
        for timing in TIMES.values()
    ]
    made = [row.tokens.tobytes() for row in made]
    assert len(set(made[:5])) == 5


def test_the_last_duration_is_of_a_token_that_nothing_follows(lm):
    d = uniform(NEW)
    made = [
        generate(
            lm, prompts(), max_new_tokens=NEW, new_durations=np.r_[d[:-1], last]
        ).tokens
        for last in (0.1, 9.0)
    ]
    np.testing.assert_array_equal(*made)


def test_learned_positions_at_real_times():
    """Also from a start, which models that know distances alone cannot tell."""
    lm = random_lm("gpt2")
    made = generate(
        lm, prompts(), max_new_tokens=NEW, new_durations=0.7, start=0.25, stop=()
    )
    assert made.tokens.tolist() == [
        naive(lm, row, [0.7] * NEW, start=0.25) for row in prompts()
    ]


def test_embeddings_in_place_of_tokens(lm):
    table = np.asarray(lm.params["embedding"])
    vectors = [table[row] for row in prompts()]
    made = generate(lm, vectors, max_new_tokens=NEW)
    np.testing.assert_array_equal(
        made.tokens, generate(lm, prompts(), max_new_tokens=NEW).tokens
    )
    between = [row + 0.1 * uniform(*row.shape) for row in vectors]
    made = generate(lm, between, max_new_tokens=NEW)
    assert made.tokens.tolist() == [
        naive(lm, r, [1.0] * NEW, name="rows") for r in between
    ]


def test_neighbours_in_a_batch_change_nothing(lm):
    durations = TIMES["of the prompts"]["durations"]
    together = generate(lm, prompts(), max_new_tokens=NEW, durations=durations).tokens
    for row, d, made in zip(prompts(), durations, together, strict=True):
        alone = generate(lm, row, durations=d, max_new_tokens=NEW)
        np.testing.assert_array_equal(alone.tokens, made[None])


def test_prompts_come_as_lists_arrays_or_alone(lm):
    row, new = prompts()[1], {"max_new_tokens": 4}
    expected = generate(lm, row, **new).tokens
    assert expected.shape == (1, 4)
    array, numbers = jnp.asarray(row), row.tolist()
    for way in (
        numbers,
        array,
        [row],
        [numbers],
        (array,),
        row[None],
        row.astype(np.uint8),
    ):
        np.testing.assert_array_equal(generate(lm, way, **new).tokens, expected)
    d = uniform(9).tolist()
    expected = generate(lm, row, durations=[d], **new).tokens
    np.testing.assert_array_equal(
        generate(lm, [row], durations=d, **new).tokens, expected
    )


@slow
def test_bfloat16_parameters_make_tokens():
    lm = random_lm("llama", jnp.bfloat16)
    made = generate(lm, prompts(), max_new_tokens=8, stop=())
    whole = [
        np.append(row, new) for row, new in zip(prompts(), made.tokens, strict=True)
    ]
    for row, n in zip(whole, LENGTHS, strict=True):
        logits = np.asarray(lm(row))[n - 1 : -1]
        likeliest = logits.max(axis=-1)
        picked = np.take_along_axis(logits, row[n:, None], axis=-1)[:, 0]
        assert (likeliest - picked).max() < 0.05 * np.abs(logits).max()


# --- Pieces of prompts, memory and programs --------------------------------------------------


@slow
@pytest.mark.parametrize("chunk", [7, 64])
def test_prompts_in_pieces(lm, chunk):
    rows = prompts(lengths=(70, 2, 66))
    d = [uniform(len(row)) for row in rows]
    made = generate(
        lm, rows, durations=d, max_new_tokens=8, max_prefill_length=chunk
    ).tokens
    expected = generate(lm, rows, durations=d, max_new_tokens=8).tokens
    np.testing.assert_array_equal(made, expected)


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
def test_pieces_are_even(length, chunk, expected):
    assert generation._prefill_lengths(length, chunk) == expected


def compiled(monkeypatch, lm, tokens, **options):
    """The program that `generate` would run."""
    found = []

    def catch(*arguments):
        found.append(original.lower(*arguments).compile())
        return np.zeros((1, 1), np.int32), np.ones(1, np.int32)

    with monkeypatch.context() as patch:
        original = generation._decode_loop
        patch.setattr(generation, "_decode_loop", catch)
        generate(lm, tokens, **options)
    return found[0]


@slow
def test_memory_for_long_prompts_is_that_of_the_cache_and_a_piece(monkeypatch):
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

    small, large, whole = bytes_of(1024, 64), bytes_of(2048, 64), bytes_of(2048, 2048)
    assert large - small < 3 * (cache_of(2048) - cache_of(1024))
    assert large < 0.5 * whole


@pytest.mark.parametrize("top_p", [None, pytest.param(0.9, marks=slow)])
def test_one_program_serves_all_that_is_alike(lm, top_p):
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
def test_numbers_of_new_tokens_below_and_across_the_bucket(lm):
    row = prompts()[0]
    long = generate(lm, row, max_new_tokens=65).tokens
    for n in (1, 63, 64):
        made = generate(lm, row, max_new_tokens=n)
        np.testing.assert_array_equal(made.tokens, long[:, :n])
        assert made.lengths.tolist() == [n]


# --- Ends ------------------------------------------------------------------------------------


def test_rows_end_with_their_stop_tokens(lm):
    rows = prompts()
    free = generate(lm, rows, max_new_tokens=NEW, stop=()).tokens
    stop = [int(free[0, 3]), int(free[1, 9])]
    made = generate(lm, rows, max_new_tokens=NEW, stop=stop)
    ends = [next((i + 1 for i, t in enumerate(row) if t in stop), NEW) for row in free]
    assert len(set(ends)) > 1
    assert made.lengths.tolist() == ends
    assert made.token_lists() == [
        row[:end].tolist() for row, end in zip(free, ends, strict=True)
    ]
    after = np.arange(NEW) >= np.array(ends)[:, None]
    assert (made.tokens[after] == 0).all()


def test_the_stop_token_is_that_of_the_config(lm):
    rows = prompts()
    free = generate(lm, rows, max_new_tokens=NEW, stop=())
    token = int(free.tokens[0, 3])
    for eos in (token, [token, int(free.tokens[1, 9])]):
        noted = clm.LanguageModel(
            clm.Transformer(lm.config), lm.params, hf_fields={"eos_token_id": eos}
        )
        made = generate(noted, rows, max_new_tokens=NEW)
        expected = generate(lm, rows, max_new_tokens=NEW, stop=eos)
        assert made.token_lists() == expected.token_lists()
        assert made.lengths[0] <= 4
        made = generate(noted, rows, max_new_tokens=NEW, stop=())
        assert made.token_lists() == free.token_lists()
    noted = clm.LanguageModel(
        clm.Transformer(lm.config), lm.params, hf_fields={"eos_token_id": None}
    )
    assert generate(noted, rows, max_new_tokens=NEW).token_lists() == free.token_lists()


def test_nothing_is_computed_after_the_last_row_ended(monkeypatch):
    """Counted in the compiled program: calls of the model with one token."""
    lm, steps = random_lm("llama", rms_norm_eps=1.5e-5), []
    append = kv_cache.append

    def counted(buffer, new, filled):
        if new.shape[-1] == 1:
            jax.debug.callback(lambda: steps.append(1))
        return append(buffer, new, filled)

    monkeypatch.setattr(kv_cache, "append", counted)

    def count(**options):
        steps.clear()
        made = generate(lm, prompts(), **options)
        jax.effects_barrier()
        return made, len(steps) // 2  # durations and steps of a call

    free, number = count(max_new_tokens=20, stop=())
    assert number == 19  # the last token is not read
    stop = sorted({int(row[7]) for row in free.tokens})
    made, number = count(max_new_tokens=20, stop=stop)
    assert number == made.lengths.max() - 1 <= 7


# --- Sampling --------------------------------------------------------------------------------

logits_and_cuts = st.tuples(
    st.lists(st.integers(-12, 12), min_size=2, max_size=12),
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.one_of(st.none(), st.integers(1, 14)),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
)


@given(logits_and_cuts)
def test_the_tokens_drawn_from_are_those_of_transformers(drawn):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits, temperature, top_k, top_p = drawn
    logits = np.asarray(logits, np.float32) / 3
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p else []
    expected = torch.tensor(logits)[None]
    for warp in warpers:
        expected = warp(None, expected)
    expected = expected[0].numpy()
    ours = np.asarray(_mask_unlikely(jnp.asarray(logits / temperature), top_k, top_p))
    if top_p is not None and on_the_edge(logits / temperature, top_k, top_p):
        return
    # Which of tied tokens are cut is transformers' own order: the kept values are compared.
    np.testing.assert_allclose(
        np.sort(ours[np.isfinite(ours)]),
        np.sort(expected[np.isfinite(expected)]),
        rtol=1e-5,
    )
    if len(set(logits)) == len(logits):
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))


def on_the_edge(logits, top_k, top_p):
    """Whether rounding decides about a token."""
    p = np.exp(np.float64(_mask_unlikely(jnp.asarray(logits), top_k, None)))
    sums = np.cumsum(np.sort(p / p.sum())[::-1])
    return np.abs(sums - top_p).min() < 1e-5


def assert_drawn(counts, p):
    """Whether counts [V] are those of draws from probabilities p [V]."""
    expected = counts.sum() * p / p.sum()
    assert (counts[p == 0] == 0).all()
    some = expected > 5
    assert some.sum() >= 2
    expected *= counts[some].sum() / expected[some].sum()
    assert stats.chisquare(counts[some], expected[some]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "likeliest"),
    [
        ({}, 6),
        ({"temperature": 0.5}, 6),
        ({"top_k": 3}, 3),
        ({"top_p": 0.75}, 2),
        ({"temperature": 2.0, "top_k": 4, "top_p": 0.9}, 4),
    ],
)
def test_frequencies_are_the_probabilities(options, likeliest):
    logits = np.array([0.5, 1.5, -1.0, 2.0, 0.0, -9.0], np.float32)
    drawn = sample_token(KEY, np.tile(logits, (20_000, 1)), **options)
    p = np.exp(np.float64(logits) / options.get("temperature", 1.0))
    p[np.argsort(-p)[likeliest:]] = 0
    assert_drawn(np.bincount(drawn, minlength=6), p)


def test_no_cut_changes_no_draw():
    """Even where rounded sums of probabilities reach 1 before the last token."""
    logits = jax.random.normal(jax.random.key(1), (50, 5000)) * 4
    plain = sample_token(KEY, logits)
    np.testing.assert_array_equal(sample_token(KEY, logits, top_p=1.0), plain)
    np.testing.assert_array_equal(sample_token(KEY, logits, top_k=5000), plain)
    np.testing.assert_array_equal(sample_token(KEY, logits, top_k=9999), plain)
    assert jnp.isfinite(_mask_unlikely(logits, 5000, 1.0)).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44, 0.0])
def test_cold_draws_are_the_likeliest(temperature):
    logits = jax.random.normal(jax.random.key(1), (50, 500)) * 40
    drawn = sample_token(KEY, logits, temperature=temperature)
    np.testing.assert_array_equal(drawn, logits.argmax(-1))
    np.testing.assert_array_equal(sample_token(KEY, logits, top_k=1), logits.argmax(-1))
    np.testing.assert_array_equal(
        sample_token(KEY, logits, top_p=1e-6), logits.argmax(-1)
    )


def test_temperatures_and_cuts_of_each_row():
    logits = jnp.tile(jnp.arange(4.0), (2000, 1))
    drawn = sample_token(
        KEY, logits, temperature=jnp.tile(jnp.array([0.0, 50.0]), 1000)
    )
    assert set(drawn[::2].tolist()) == {3}
    assert set(drawn[1::2].tolist()) == {0, 1, 2, 3}
    drawn = sample_token(KEY, logits, top_p=jnp.tile(jnp.array([0.7, 1.0]), 1000))
    assert set(drawn[::2].tolist()) == {2, 3}
    assert set(drawn[1::2].tolist()) == {0, 1, 2, 3}


@slow
def test_draws_are_independent_over_rows_and_steps_and_go_by_the_key():
    """Of a model that finds all tokens equally likely."""
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
    assert_drawn(np.bincount(a.ravel(), minlength=64), np.ones(64))
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
    made = generate(
        lm, [row] * 512, max_new_tokens=2, sampler=Temperature(3, top_k=6), key=KEY
    ).tokens
    common = np.bincount(made[:, 0]).argmax()
    after = made[made[:, 0] == common]
    for before, counted in (([], made[:, 0]), ([common], after[:, 1])):
        logits = np.float64(lm(np.append(row, before).astype(int), position=-1)) / 3
        p = np.where(logits >= np.sort(logits)[-6], np.exp(logits - logits.max()), 0)
        assert_drawn(np.bincount(counted, minlength=64), p)


@slow
def test_a_low_temperature_is_greedy(lm):
    cold = generate(
        lm, prompts(), max_new_tokens=NEW, sampler=Temperature(1e-4), key=KEY
    )
    np.testing.assert_array_equal(
        cold.tokens, generate(lm, prompts(), max_new_tokens=NEW).tokens
    )


def test_temperature_0_is_greedy_and_needs_no_key(lm):
    """Also where all tokens tie: the first one is taken, whatever the key."""
    greedy = generate(lm, prompts(), sampler=Greedy(), max_new_tokens=NEW)
    for options in ({}, {"key": KEY}):
        sampler = Temperature(0.0, top_p=0.9)
        cold = generate(lm, prompts(), sampler=sampler, max_new_tokens=NEW, **options)
        np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    params = jax.tree.map(jnp.zeros_like, lm.params)
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


def test_a_stop_token_of_the_config_that_is_none_is_named(lm):
    noted = clm.LanguageModel(
        clm.Transformer(lm.config), lm.params, hf_fields={"eos_token_id": 64}
    )
    with pytest.raises(clm.InputError, match=r"eos_token_id of config\.json is 64"):
        generate(noted, ROW, max_new_tokens=4)


def test_counts_of_sampling_are_checked():
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
