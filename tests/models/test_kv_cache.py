"""Calls with a KV cache or a prefix equal one call for all tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import continuous_lm as clm
from continuous_lm.models import kv_cache, transformer, trunk_inputs
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.transformer import parameter_table
from tests.fixtures import tiny

N = 13
PIECES = (6, 1, 6)
LONGROPE = {
    "rope_parameters": tiny.longrope_scaling(),
    "original_max_position_embeddings": 8,
}


def random_lm(family, dtype=jnp.float32, seed=0, **fields):
    """Return a tiny model of a family whose parameters are far from zero, norms too."""
    config = trunk.read_config(
        {"model_type": family} | tiny.CONFIG_MAKERS[family](**fields)
    )
    rng, flat = np.random.default_rng(seed), {}
    for path, declaration in parameter_table(config).items():
        plain = path.endswith("scale") and config.norm != "rms_plus_one"
        values = (1.0 if plain else 0.0) + 0.2 * rng.normal(size=declaration.shape)
        flat[path] = jnp.asarray(values, dtype)
    return clm.LanguageModel(
        clm.Transformer(config), traverse_util.unflatten_dict(flat, sep="/")
    )


def draw(lm, *shape, seed=0):
    """Random tokens and durations of a shape."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, lm.config.vocab_size, shape)
    return tokens, rng.uniform(0.05, 3.0, shape).astype(np.float32)


def call(model, params, tokens, *, position=None, cache=None, prefix=None, **timing):
    """Return the output of one call, without jit."""
    past = {"position": position, "cache": cache, "prefix": prefix}
    inputs = trunk_inputs.make_inputs(model.config, tokens, **timing, **past)
    return transformer.forward(
        model.config, params, inputs, **past, execution=model.execution
    )


def prefill(model, params, tokens, **timing):
    inputs = trunk_inputs.make_inputs(model.config, tokens, **timing)
    return transformer.prefill(model.config, params, inputs, model.execution)


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, tokens, timing, cache):
    output = call(model, params, tokens, cache=cache, **timing)
    return output.logits, output.cache


def in_pieces(lm, tokens, sizes, *, start=None, cache=None, **timing):
    """Return logits [..., T, V] of successive calls, and the cache after them."""
    if cache is None:
        dtype = lm.params["embedding"].dtype
        cache = kv_cache.empty(
            lm.config, tokens.shape[-1] + 3, tokens.shape[:-1], dtype
        )
    if start is not None:
        times = np.broadcast_to(np.float32(start), cache.end_time.shape)
        cache = cache._replace(end_time=jnp.asarray(times))
    logits, ends = [], np.cumsum(sizes)
    for first, end in zip(ends - sizes, ends, strict=True):
        part = {name: values[..., first:end] for name, values in timing.items()}
        piece, cache = step(lm.model, lm.params, tokens[..., first:end], part, cache)
        logits.append(piece)
    return np.concatenate(logits, axis=-2), cache


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(
        ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0
    )


FAMILIES = [
    pytest.param("gemma2", {}, id="gemma2"),
    pytest.param("phi3", LONGROPE, id="longrope"),
    *(
        pytest.param(family, fields, id=f"{family}-{number}", marks=pytest.mark.slow)
        for number, (family, fields) in enumerate(
            [
                ("llama", {}),
                ("mistral", {"sliding_window": 3}),
                ("mistral", {"sliding_window": 7}),
                ("gemma", {}),
                ("gemma3_text", {}),
                ("phi3", {}),
                (
                    "qwen2",
                    {
                        "use_sliding_window": True,
                        "sliding_window": 3,
                        "max_window_layers": 1,
                    },
                ),
                ("qwen3", {}),
                ("gpt_neox", {}),
                ("gpt2", {}),
            ]
        )
    ),
]


@pytest.mark.parametrize(("family", "fields"), FAMILIES)
def test_calls_for_pieces_equal_one_call(family, fields):
    lm = random_lm(family, **fields)
    tokens, d = draw(lm, N)
    ours, _ = in_pieces(lm, tokens, PIECES, durations=d, start=2.5)
    assert_close(ours, lm(tokens, durations=d, start=2.5))


@pytest.fixture(scope="module")
def lm():
    return random_lm("mistral", sliding_window=3)


def test_decoding_token_by_token_compiles_one_program(lm):
    tokens, d = draw(lm, N)
    compiled = step._cache_size()
    ours, cache = in_pieces(lm, tokens, (1,) * N, durations=d)
    assert_close(ours, lm(tokens, durations=d))
    assert step._cache_size() <= compiled + 1
    assert int(cache.num_tokens) == N
    assert_close(cache.end_time, d.sum())
    durations = np.asarray(cache.durations)
    np.testing.assert_array_equal(durations[:N], d)
    assert (durations[N:] == 0).all()


def test_explicit_times(lm):
    """Times decide which tokens are in the window, for any durations."""
    tokens, d = draw(lm, N)
    times = np.cumsum(draw(lm, N, seed=1)[1]) - np.float32(4.0)
    ours, cache = in_pieces(lm, tokens, PIECES, durations=d, times=times)
    assert_close(ours, lm(tokens, durations=d, times=times))
    assert np.abs(ours - lm(tokens, durations=d)).max() > 1e-2
    assert float(cache.end_time) == times[-1]


def test_a_start_after_the_end_of_the_cache_leaves_a_gap(lm):
    """Angles depend on the gap. Windows, which sum durations, do not."""
    tokens, d = draw(lm, N)
    cache = kv_cache.empty(lm.config, N + 3)
    _, cache = in_pieces(lm, tokens[:6], (6,), cache=cache, durations=d[:6])
    timing = {"durations": d[6:12], "start": np.asarray(cache.end_time) + 2}
    _, cache = step(lm.model, lm.params, tokens[6:12], timing, cache)
    assert_close(cache.end_time, d[:12].sum() + 2.0)
    assert_close(np.asarray(cache.intervals)[:12], d[:12])


def test_tokens_last_1_by_default(lm):
    tokens, _ = draw(lm, N)
    ours, cache = in_pieces(lm, tokens, PIECES)
    assert_close(ours, lm(tokens))
    assert float(cache.end_time) == N


def test_leading_axes(lm):
    tokens, d = draw(lm, 2, 3, N)
    start = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours, cache = in_pieces(lm, tokens, PIECES, durations=d, start=start)
    assert_close(ours, lm(tokens, durations=d, start=start))
    assert cache.keys.shape == (3, 2, 3, N + 3, 2, 12)
    assert cache.end_time.shape == (2, 3)


@pytest.mark.parametrize("timing", ["start", "times"])
def test_one_sequence_is_written_to_every_row_of_a_cache(lm, timing):
    tokens, d = draw(lm, N)
    cache = kv_cache.empty(lm.config, N, (2,))
    arguments = {"durations": d}
    arguments |= {"start": 0.0} if timing == "start" else {"times": np.cumsum(d)}
    ours, cache = step(lm.model, lm.params, tokens, arguments, cache)
    assert ours.shape == (2, N, 64)
    assert_close(ours[1], lm(tokens, durations=d))
    assert cache.end_time.shape == (2,)


def test_two_continuations_of_the_same_cache(lm):
    """A cache is a value: appending does not change it."""
    tokens, d = draw(lm, N)
    cache = kv_cache.empty(lm.config, N + 3)
    _, cache = in_pieces(lm, tokens[:6], (6,), cache=cache, durations=d[:6])
    for seed in (1, 2):
        other, e = draw(lm, 6, seed=seed)
        ours, _ = in_pieces(lm, other, (6,), cache=cache, durations=e)
        both = np.append(tokens[:6], other), np.append(d[:6], e)
        expected = lm(both[0], durations=both[1])
        assert_close(ours, np.asarray(expected)[6:])


def test_leading_tokens_of_duration_zero_have_no_effect(lm):
    """Prompts of different lengths share a batch in this way."""
    tokens, d = draw(lm, N - 4)
    padded, durations = np.append([0] * 4, tokens), np.append(np.zeros(4, "f4"), d)
    ours, cache = in_pieces(lm, padded, PIECES, durations=durations, start=1.5)
    assert np.isfinite(ours).all()
    assert_close(ours[4:], lm(tokens, durations=d, start=1.5))
    assert_close(cache.end_time, 1.5 + d.sum())


def test_windows_are_measured_in_time_over_calls(lm):
    """A long token moves all tokens before it out of the window of 3."""
    tokens, _ = draw(lm, 12)
    d = np.ones(12, np.float32)
    d[6] = 50.0
    other = np.append((tokens[:3] + 1) % 64, tokens[3:])
    a, b = (in_pieces(lm, t, (6, 6), durations=d)[0] for t in (tokens, other))
    np.testing.assert_allclose(a[6:], b[6:], atol=1e-6)
    assert (a[:3] != b[:3]).any(axis=-1).all()


def test_bfloat16_caches():
    """With a batch: XLA for CPUs lacks some bfloat16 products without one."""
    lm = random_lm("llama", jnp.bfloat16)
    tokens, d = draw(lm, 2, N)
    ours, cache = in_pieces(lm, tokens, PIECES, durations=d)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.durations.dtype == cache.end_time.dtype == ours.dtype == jnp.float32
    assert_close(ours, lm(tokens, durations=d), 0.03)


@pytest.mark.parametrize(
    ("length", "batch", "tokens", "message"),
    [
        (4, (), np.zeros(5, int), "room for 4: 5 more do not fit"),
        (
            8,
            (2,),
            np.zeros((3, 5), int),
            r"leading axes do not broadcast.*\[3\] of tokens",
        ),
        (8, (), np.zeros((3, 5), int), r"the cache is for leading axes \[\]"),
        (8, (1,), np.zeros((3, 5), int), r"the cache is for leading axes \[1\]"),
    ],
)
def test_caches_that_do_not_fit_are_refused(lm, length, batch, tokens, message):
    cache = kv_cache.empty(lm.config, length, batch)
    with pytest.raises(clm.InputError, match=message):
        call(lm.model, lm.params, tokens, cache=cache)


def test_a_full_cache_is_refused(lm):
    cache = kv_cache.empty(lm.config, 6)._replace(num_tokens=np.int32(5))
    with pytest.raises(
        clm.InputError, match="holds 5 tokens and has room for 6: 2 more"
    ):
        call(lm.model, lm.params, np.array([1, 2]), cache=cache)


def test_a_cache_of_another_model_is_refused(lm):
    other = random_lm("llama", num_hidden_layers=2)
    with pytest.raises(clm.InputError, match="the cache's keys have shape"):
        call(lm.model, lm.params, [1], cache=kv_cache.empty(other.config, 4))


@pytest.mark.parametrize("length", [0, -3, True, 2.5])
def test_wrong_lengths_are_refused(lm, length):
    with pytest.raises(clm.InputError, match="length is"):
        kv_cache.empty(lm.config, length)


def test_the_axes_of_a_cache_are_named(lm):
    cache = kv_cache.empty(lm.config, 7, (5,))
    sizes = lm.config.sizes | {"B": 5, "S": 7}
    assert set(kv_cache.CACHE_AXES) == set(cache._fields)
    for field, axes in kv_cache.CACHE_AXES.items():
        shape = tuple(sizes[axis] for axis in axes.split())
        assert getattr(cache, field).shape == shape, field


# --- Prefixes, which are only read --------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 4))
def after_prefix(model, params, tokens, d, num_shared, position, timing):
    """Return the logits at a position, from a prefix of `num_shared` tokens and the others."""
    before = {name: x[:num_shared] if x.ndim else x for name, x in timing.items()}
    before["durations"] = d[:num_shared]
    after = {name: x[num_shared:] for name, x in timing.items() if x.ndim}
    after["durations"] = d[num_shared:]
    prefix = prefill(model, params, tokens[:num_shared], **before)
    past = {"prefix": prefix, "position": position}
    return call(model, params, tokens[num_shared:], **after, **past).logits


# Windows and caps; learned positions.
@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_logits_after_a_prefix_equal_one_call(family):
    lm = random_lm(family)
    tokens, d = draw(lm, N)
    end_times = np.float32(0.4) + np.cumsum(np.float32(1.3) * d)
    for timing in ({"start": np.float32(1.5)}, {"times": end_times}):
        expected = np.asarray(lm(tokens, durations=d, **timing))
        for position in (N - 1, 8):
            logits = after_prefix(
                lm.model, lm.params, tokens, d, 6, position - 6, timing
            )
            assert_close(logits, expected[position])


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {}),  # windows and caps
        pytest.param("gpt2", {}, marks=pytest.mark.slow),  # learned positions
        pytest.param("gpt_neox", {}, marks=pytest.mark.slow),  # channels without angle
        ("llama", {"num_hidden_layers": 1}),  # the first layer is the last
        ("llama", {"num_hidden_layers": 2}),  # no layer is between them
    ],
)
def test_points_after_a_prefix_equal_one_call_for_each(family, fields):
    """The tokens have no axis of points, so that all points share the first projections."""
    lm = random_lm(family, **fields)
    tokens, d = draw(lm, N)
    factors = np.array([0.5, 1.0, 2.0], np.float32)[:, None]
    durations = np.where(np.arange(N) < 6, d, factors * d)
    prefix = lm.prefill(tokens[:6], durations=d[:6])
    positions = np.array([N - 1, 8, N - 1])
    logits = lm.forward(
        tokens[6:], durations=durations[:, 6:], prefix=prefix, position=positions - 6
    ).logits
    expected = np.asarray(lm(tokens, durations=durations))
    for i, position in enumerate(positions):
        assert_close(logits[i], expected[i, position])


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_after_a_prefix_equal_those_of_one_call(remat):
    with jax.enable_x64(True):
        lm = random_lm("llama", jnp.float64, num_hidden_layers=2)
        tokens, d = draw(lm, N)
        d = d.astype(np.float64)
        factors = np.array([0.5, 1.0, 2.0])[:, None]
        model = lm.model.clone(remat=remat)

        @functools.partial(jax.jit, static_argnums=0)
        def grad(answer, *arguments):
            return jax.grad(lambda d: answer(d, *arguments)[..., 3].sum())(d)

        def one_call(d):
            return lm.model.apply(
                {"params": lm.params}, tokens, durations=d, position=-1
            )

        def with_prefix(d):
            return after_prefix(model, lm.params, tokens, d, 6, -1, {})

        np.testing.assert_allclose(
            grad(one_call), grad(with_prefix), rtol=1e-9, atol=1e-12
        )

        # Points that share the projections of the first layer.
        prefix = jax.jit(prefill, static_argnums=0)(
            lm.model, lm.params, tokens[:6], durations=d[:6]
        )

        def points_with_prefix(d, prefix):
            past = {"prefix": prefix, "position": -1}
            durations = factors * d[6:]
            return call(
                model, lm.params, tokens[6:], durations=durations, **past
            ).logits

        def points(d):
            return one_call(jnp.where(jnp.arange(N) < 6, d, factors * d))

        actual, expected = grad(points_with_prefix, prefix), grad(points)
        np.testing.assert_allclose(actual[6:], expected[6:], rtol=1e-9, atol=1e-12)


def test_a_prefix_that_does_not_fit_is_refused(lm):
    tokens, d = draw(lm, N)
    apply = functools.partial(call, lm.model, lm.params)
    prefix = lm.prefill(tokens[:6], durations=d[:6])
    with pytest.raises(clm.InputError, match="a prefix needs `position`"):
        apply(tokens[6:], prefix=prefix)
    with pytest.raises(clm.InputError, match="and no cache"):
        apply(
            tokens[6:], prefix=prefix, position=-1, cache=kv_cache.empty(lm.config, 9)
        )
    other = random_lm("llama", num_hidden_layers=2)
    with pytest.raises(clm.InputError, match="the prefix's keys have shape"):
        call(other.model, other.params, tokens[6:], prefix=prefix, position=-1)
    two = jax.tree.map(lambda x: np.stack([x, x], 1 if x.ndim > 1 else 0), prefix)
    with pytest.raises(
        clm.InputError, match=r"do not broadcast: \[3\] of durations, .*prefix"
    ):
        apply(tokens[6:], durations=jnp.ones((3, 7)), prefix=two, position=-1)
