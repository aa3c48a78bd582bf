"""Calls that remember what they have seen equal one call over all of it."""

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
    """A tiny model of a family, with parameters far from zero, norms too."""
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
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, lm.config.vocab_size, shape))
    return tokens, jnp.asarray(rng.uniform(0.05, 3.0, shape), jnp.float32)


def call(model, params, tokens, *, position=None, cache=None, prefix=None, **timing):
    """The output of one call, of which nothing is jitted."""
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
    """Logits [..., T, V] of calls one after another, and the cache behind them."""
    if cache is None:
        dtype = lm.params["embedding"].dtype
        cache = kv_cache.empty(
            lm.config, tokens.shape[-1] + 3, tokens.shape[:-1], dtype
        )
    if start is not None:
        start = jnp.asarray(start, jnp.float32)
        cache = cache._replace(end_time=jnp.broadcast_to(start, cache.end_time.shape))
    found, ends = [], np.cumsum(sizes)
    for first, end in zip(ends - sizes, ends, strict=True):
        part = {name: values[..., first:end] for name, values in timing.items()}
        logits, cache = step(lm.model, lm.params, tokens[..., first:end], part, cache)
        found.append(logits)
    return jnp.concatenate(found, axis=-2), cache


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
def test_pieces_equal_the_whole(family, fields):
    lm = random_lm(family, **fields)
    tokens, d = draw(lm, N)
    ours, _ = in_pieces(lm, tokens, PIECES, durations=d, start=2.5)
    assert_close(ours, lm(tokens, durations=d, start=2.5))


@pytest.fixture(scope="module")
def lm():
    return random_lm("mistral", sliding_window=3)


def test_one_token_at_a_time_under_jit_is_one_program(lm):
    tokens, d = draw(lm, N)
    compiled = step._cache_size()
    ours, cache = in_pieces(lm, tokens, (1,) * N, durations=d)
    assert_close(ours, lm(tokens, durations=d))
    assert step._cache_size() <= compiled + 1
    assert int(cache.num_tokens) == N
    assert_close(cache.end_time, d.sum())
    np.testing.assert_array_equal(cache.durations[:N], d)
    assert (cache.durations[N:] == 0).all()


def test_explicit_times(lm):
    """They say what is in the window, whatever the durations."""
    tokens, d = draw(lm, N)
    times = jnp.cumsum(draw(lm, N, seed=1)[1]) - 4.0
    ours, cache = in_pieces(lm, tokens, PIECES, durations=d, times=times)
    assert_close(ours, lm(tokens, durations=d, times=times))
    assert np.abs(ours - lm(tokens, durations=d)).max() > 1e-2
    assert float(cache.end_time) == times[-1]


def test_a_start_inside_leaves_a_gap(lm):
    """Angles see it; windows, which sum durations, do not."""
    tokens, d = draw(lm, N)
    room = kv_cache.empty(lm.config, N + 3)
    _, cache = in_pieces(lm, tokens[:6], (6,), cache=room, durations=d[:6])
    timing = {"durations": d[6:12], "start": cache.end_time + 2.0}
    _, cache = step(lm.model, lm.params, tokens[6:12], timing, cache)
    assert_close(cache.end_time, d[:12].sum() + 2.0)
    assert_close(cache.intervals[:12], d[:12])


def test_without_durations_tokens_last_one(lm):
    tokens, _ = draw(lm, N)
    ours, cache = in_pieces(lm, tokens, PIECES)
    assert_close(ours, lm(tokens))
    assert float(cache.end_time) == N


def test_leading_axes(lm):
    tokens, d = draw(lm, 2, 3, N)
    start = jnp.arange(6.0).reshape(2, 3)
    ours, cache = in_pieces(lm, tokens, PIECES, durations=d, start=start)
    assert_close(ours, lm(tokens, durations=d, start=start))
    assert cache.keys.shape == (3, 2, 3, N + 3, 2, 12)
    assert cache.end_time.shape == (2, 3)


@pytest.mark.parametrize("timing", ["start", "times"])
def test_one_sequence_goes_into_every_row_of_a_cache(lm, timing):
    tokens, d = draw(lm, N)
    cache = kv_cache.empty(lm.config, N, (2,))
    arguments = {
        "start": {"durations": d, "start": 0.0},
        "times": {"durations": d, "times": jnp.cumsum(d)},
    }[timing]
    ours, cache = step(lm.model, lm.params, tokens, arguments, cache)
    assert ours.shape == (2, N, 64)
    assert_close(ours[1], lm(tokens, durations=d))
    assert cache.end_time.shape == (2,)


def test_another_ending_goes_on_from_the_same_cache(lm):
    """A cache is a value: what is appended to it leaves it as it was."""
    tokens, d = draw(lm, N)
    _, cache = in_pieces(lm, tokens[:6], (6,), durations=d[:6])
    for seed in (1, 2):
        other, e = draw(lm, 3, seed=seed)
        ours, _ = in_pieces(lm, other, (3,), cache=cache, durations=e)
        whole = lm(jnp.append(tokens[:6], other), durations=jnp.append(d[:6], e))
        assert_close(ours, whole[6:])


def test_tokens_of_duration_zero_in_front_change_nothing(lm):
    """So prompts of different lengths share a batch."""
    tokens, d = draw(lm, N - 4)
    padded, zeros = jnp.append(jnp.zeros(4, int), tokens), jnp.append(jnp.zeros(4), d)
    ours, cache = in_pieces(lm, padded, PIECES, durations=zeros, start=1.5)
    assert jnp.isfinite(ours).all()
    assert_close(ours[4:], lm(tokens, durations=d, start=1.5))
    assert_close(cache.end_time, 1.5 + d.sum())


def test_windows_forget_by_time_over_calls(lm):
    """A long pause moves everything before it out of the window of 3."""
    tokens, _ = draw(lm, 12)
    d = jnp.ones(12).at[6].set(50.0)
    other = tokens.at[:3].set((tokens[:3] + 1) % 64)
    a, b = (in_pieces(lm, t, (6, 6), durations=d)[0] for t in (tokens, other))
    np.testing.assert_allclose(a[6:], b[6:], atol=1e-6)
    assert (a[:3] != b[:3]).any(axis=-1).all()


def test_bfloat16_stays():
    """In a batch: XLA for CPUs has not every product of a batch in bfloat16."""
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
    tokens, _ = draw(lm, 5)
    _, cache = in_pieces(lm, tokens, (5,), cache=kv_cache.empty(lm.config, 6))
    with pytest.raises(
        clm.InputError, match="holds 5 tokens and has room for 6: 2 more"
    ):
        call(lm.model, lm.params, tokens[:2], cache=cache)


def test_a_cache_of_another_model_is_refused(lm):
    other = random_lm("llama", num_hidden_layers=2)
    with pytest.raises(clm.InputError, match="the cache's keys have shape"):
        call(lm.model, lm.params, [1], cache=kv_cache.empty(other.config, 4))


@pytest.mark.parametrize("length", [0, -3, True, 2.5])
def test_lengths_that_make_no_sense_are_refused(lm, length):
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
def after_prefix(model, params, tokens, d, cut, at, of):
    """The answer from a prefix of `cut` tokens and the rest."""
    before = {name: x[:cut] if x.ndim else x for name, x in of.items()}
    prefix = prefill(model, params, tokens[:cut], durations=d[:cut], **before)
    rest = {name: x[cut:] for name, x in of.items() if x.ndim}
    rest |= {"durations": d[cut:], "prefix": prefix, "position": at}
    return call(model, params, tokens[cut:], **rest).logits


@pytest.mark.parametrize(
    "family", ["gemma2", "gpt2"]
)  # windows and caps; learned positions
def test_what_follows_a_prefix_is_as_in_one_call(family):
    lm = random_lm(family)
    tokens, d = draw(lm, N)
    for of in (
        {"start": jnp.array(1.5)},
        {"times": clm.durations.end_times(1.3 * d, 0.4)},
    ):
        whole = lm(tokens, durations=d, **of)
        for at in (N - 1, 8):
            found = after_prefix(lm.model, lm.params, tokens, d, 6, at - 6, of)
            assert_close(found, whole[at])


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {}),  # windows and caps
        ("gpt2", {}),  # learned positions
        ("gpt_neox", {}),  # channels that do not turn
        ("llama", {"num_hidden_layers": 1}),  # the last layer is the first
        ("llama", {"num_hidden_layers": 2}),  # and none is between them
    ],
)
def test_points_after_a_prefix_are_as_each_alone(family, fields):
    """Tokens have no axis of points, so that the first layer's projections are made once."""
    lm = random_lm(family, **fields)
    tokens, d = draw(lm, N)
    factors = jnp.where(jnp.arange(N) < 6, 1.0, jnp.array([0.5, 1.0, 2.0])[:, None])
    prefix = lm.prefill(tokens[:6], durations=d[:6])
    at = jnp.array([N - 1, 8, N - 1])
    found = lm.forward(
        tokens[6:], durations=(factors * d)[:, 6:], prefix=prefix, position=at - 6
    ).logits
    for row, factor, i in zip(found, factors, at, strict=True):
        assert_close(row, lm(tokens, durations=factor * d)[i])


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_reach_through_a_prefix(remat):
    with jax.enable_x64(True):
        lm = random_lm("llama", jnp.float64)
        tokens, d = draw(lm, N)
        d = d.astype(jnp.float64)

        def grad(answer):
            return jax.jit(jax.grad(lambda d: answer(d)[..., 3].sum()))(d)

        apply = functools.partial(lm.model.apply, {"params": lm.params})
        one = grad(lambda d: apply(tokens, durations=d, position=-1))
        model = lm.model.clone(remat=remat)
        two = grad(lambda d: after_prefix(model, lm.params, tokens, d, 6, -1, {}))
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)

        # Points, that have the first layer's projections in common.
        factors = jnp.array([0.5, 1.0, 2.0])[:, None]
        prefix = prefill(lm.model, lm.params, tokens[:6], durations=d[:6])

        def points(d):
            rest = {"durations": factors * d[6:], "prefix": prefix, "position": -1}
            return call(model, lm.params, tokens[6:], **rest).logits

        def alone(d):
            return apply(
                tokens,
                durations=jnp.where(jnp.arange(N) < 6, d, factors * d),
                position=-1,
            )

        np.testing.assert_allclose(
            grad(points)[6:], grad(alone)[6:], rtol=1e-9, atol=1e-12
        )


def test_a_prefix_that_does_not_fit_is_refused(lm):
    tokens, d = draw(lm, N)
    apply = functools.partial(call, lm.model, lm.params)
    prefix = prefill(lm.model, lm.params, tokens[:6], durations=d[:6])
    with pytest.raises(clm.InputError, match="a prefix needs `position`"):
        apply(tokens[6:], prefix=prefix)
    with pytest.raises(clm.InputError, match="and no cache"):
        apply(
            tokens[6:], prefix=prefix, position=-1, cache=kv_cache.empty(lm.config, 9)
        )
    other = random_lm("llama", num_hidden_layers=2)
    with pytest.raises(clm.InputError, match="the prefix's keys have shape"):
        call(other.model, other.params, tokens[6:], prefix=prefix, position=-1)
    two = jax.tree.map(lambda x: jnp.stack([x, x], 1 if x.ndim > 1 else 0), prefix)
    with pytest.raises(
        clm.InputError, match=r"do not broadcast: \[3\] of durations, .*prefix"
    ):
        apply(tokens[6:], durations=jnp.ones((3, 7)), prefix=two, position=-1)
