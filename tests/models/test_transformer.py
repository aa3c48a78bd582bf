"""Exact properties of the trunk, on random parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.models import layers, transformer
from continuous_lm.models.transformer import parameter_table
from continuous_lm.rotary import Rope

CONFIG = clm.TransformerConfig(
    vocab_size=40,
    hidden_size=32,
    mlp_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
WINDOWED = clm.TransformerConfig(**{**CONFIG.__dict__, "window": 4.0})
N = 12


def random_lm(config=CONFIG, seed=0, dtype=jnp.float32):
    """Return a model whose parameters are far from zero, norms too."""
    rng, flat = np.random.default_rng(seed), {}
    for path, declaration in parameter_table(config).items():
        mean = 1.0 if path.endswith("scale") else 0.0
        flat[path] = jnp.asarray(mean + 0.2 * rng.normal(size=declaration.shape), dtype)
    params = traverse_util.unflatten_dict(flat, sep="/")
    return clm.LanguageModel(clm.Transformer(config), params)


LM, LM_WINDOWED = random_lm(), random_lm(WINDOWED)
both = pytest.mark.parametrize("lm", [LM, LM_WINDOWED], ids=["plain", "windowed"])


def draw(seed=0, n=N):
    """Random tokens [n] and durations [n]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 40, n), rng.uniform(0.1, 2, n).astype(np.float32)


def logits_of(lm, *arguments, **options):
    return np.asarray(lm(*arguments, **options))


@both
def test_durations_of_one_are_the_default(lm):
    tokens, _ = draw()
    np.testing.assert_array_equal(lm(tokens, durations=np.ones(N)), lm(tokens))


@both
@given(st.integers(0, 1000), st.floats(-10, 10, width=32))
def test_translations_in_time_do_not_change_logits(lm, seed, shift):
    tokens, d = draw(seed)
    logits = logits_of(lm, tokens, durations=d)
    tolerance = 1e-5 * np.abs(logits).max()
    by_start = lm(tokens, durations=d, start=shift)
    assert np.abs(by_start - logits).max() <= tolerance
    times = clm.durations.translate(clm.durations.end_times(d), shift)
    by_times = lm(tokens, durations=d, times=times)
    assert np.abs(by_times - logits).max() <= tolerance


def test_empty_batches_have_empty_logits():
    assert LM(np.zeros((0, 5), int)).shape == (0, 5, LM.config.vocab_size)


@both
@pytest.mark.parametrize(
    "absent",
    [
        [3],
        pytest.param([3, 4], marks=pytest.mark.slow),
        pytest.param([1, 6, 11], marks=pytest.mark.slow),
        pytest.param([0], marks=pytest.mark.slow),
        [0, 1, 5],
    ],
)
def test_tokens_of_duration_zero_have_no_effect(lm, absent):
    """Under jit even the first ones, which are refused outside of it."""
    tokens, d = draw()
    others = np.setdiff1d(np.arange(N), absent)
    apply = jax.jit(lm.model.apply)
    params = {"params": lm.params}
    with_zeros = np.asarray(
        apply(
            params,
            tokens,
            durations=np.where(np.isin(np.arange(N), absent), np.float32(0), d),
        )
    )
    without = np.asarray(apply(params, tokens[others], durations=d[others]))
    np.testing.assert_allclose(
        with_zeros[others], without, atol=1e-5 * np.abs(without).max()
    )


@both
def test_logits_do_not_depend_on_later_tokens(lm):
    tokens, d = draw()
    d[0], d[3:] = 4096.0, 1e-4
    other = np.append(tokens[:7], (tokens[7:] + 1) % 40)
    a, b = logits_of(lm, tokens, durations=d), logits_of(lm, other, durations=d)
    np.testing.assert_array_equal(a[:7], b[:7])
    assert (a[7:] != b[7:]).any(axis=1).all()


@both
def test_gradients_match_finite_differences(lm):
    with jax.enable_x64(True):
        lm = random_lm(lm.config, dtype=jnp.float64)
        tokens, _ = draw()
        d = np.random.default_rng(0).uniform(0.1, 2, N)
        d[4] = 0.0
        point = (np.asarray(lm.params["embedding"])[tokens], d, np.array(0.3))

        @jax.jit
        def loss(params, rows, d, start):
            logits = lm.model.apply(
                {"params": params}, embeddings=rows, durations=d, start=start
            )
            assert logits.dtype == jnp.float64
            return jnp.sum(jnp.sin(logits))

        grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3)))(lm.params, *point)
        grads = [np.asarray(grad) for grad in grads]
        rng = np.random.default_rng(1)
        # Logits do not depend on start, so that its step may be large.
        for i, h in enumerate((1e-4, 1e-4, 1e-2)):
            direction = rng.uniform(0.1, 1, point[i].shape)

            def value_at(k, i=i, step=h * direction):
                moved = (*point[:i], point[i] + k * step, *point[i + 1 :])
                return float(loss(lm.params, *moved))

            # Fourth order, with steps forward only: durations end at 0.
            f = [value_at(k) for k in range(5)]
            weighted = -25 * f[0] + 48 * f[1] - 36 * f[2] + 16 * f[3] - 3 * f[4]
            numeric = weighted / (12 * h)
            exact = np.vdot(grads[i], direction)
            scale = np.abs(grads[i] * direction).sum() + 1e-3  # start's gradient is 0
            np.testing.assert_allclose(exact, numeric, atol=1e-6 * scale)
        assert np.abs(grads[2]) < 1e-9


def test_gradients_are_finite_in_float32_at_duration_zero():
    tokens, d = draw()
    d[3:7] = 0.0

    def largest(d):
        return LM_WINDOWED(tokens, durations=d, position=-1).max()

    grads = np.asarray(jax.jit(jax.grad(largest))(d))
    assert np.isfinite(grads).all()
    assert (grads[3:7] != 0).any()


def test_leading_axes_are_free_and_broadcast():
    (tokens, d), (other, e) = draw(), draw(1)
    batch = logits_of(LM, np.stack([tokens, other]), durations=np.stack([d, e]))
    np.testing.assert_allclose(batch[1], LM(other, durations=e), atol=2e-5)
    grid = {"durations": np.stack([d, e])[:, None], "start": np.zeros((2, 1))}
    points = logits_of(LM, tokens, **grid)
    assert points.shape == (2, 1, N, 40)
    np.testing.assert_allclose(points[1, 0], LM(tokens, durations=e), atol=2e-5)


def test_position_selects_rows_of_the_logits():
    tokens, d = draw()
    batch = np.stack([tokens, tokens[::-1]])
    full = logits_of(LM, batch, durations=d)
    last = LM(batch, durations=d, position=-1)
    np.testing.assert_allclose(last, full[:, -1], atol=1e-5)
    for_each = LM(batch, durations=d, position=np.array([2, 5]))
    np.testing.assert_allclose(for_each, full[[0, 1], [2, 5]], atol=1e-5)
    broadcast = LM(tokens, durations=d, position=[0, 3])
    np.testing.assert_allclose(broadcast, full[0, [0, 3]], atol=1e-5)


def test_tokens_with_an_empty_window_are_refused():
    tokens, _ = draw(n=5)
    d, times = np.array([1.0, 1, 1, 1, 0]), np.array([1.0, 2.0, 3.0, 4.0, 1000.0])
    with pytest.raises(clm.InputError, match="token 4 has nothing to attend to"):
        LM_WINDOWED(tokens, durations=d, times=times)
    near = np.append(times[:4], 4.5)
    assert np.isfinite(LM_WINDOWED(tokens, durations=d, times=near)).all()
    assert np.isfinite(LM(tokens, durations=d, times=times)).all()


def test_positions_between_rows_are_linear_and_clamped():
    table = jnp.array([[0.0], [1.0], [4.0]])
    positions = np.array([-1.0, 0.0, 0.25, 1.0, 1.5, 2.0, 9.0], np.float32)

    @jax.jit
    @jax.vmap
    @jax.value_and_grad
    def row_at(position):
        return transformer.interpolate_positions(table, position[None])[0, 0]

    values, slopes = row_at(positions)
    np.testing.assert_allclose(values, [0, 0, 0.25, 1, 2.5, 4, 4])
    # At a row, the slope is that to its right.
    np.testing.assert_allclose(slopes, [0, 1, 1, 3, 3, 3, 0])


def test_the_head_is_computed_only_at_the_position():
    """The lowered program has no [T, V] array."""
    big = clm.TransformerConfig(**{**CONFIG.__dict__, "vocab_size": 5000})
    lm = random_lm(big)
    apply = jax.jit(
        lambda params, t: lm.model.apply({"params": params}, t, position=-1)
    )
    text = apply.lower(lm.params, jnp.zeros(N, int)).as_text()
    assert "x5000" in text or "5000x" in text
    assert f"{N}x5000" not in text


def test_layers_are_scanned():
    """The lowered program does not grow with depth."""

    def size(layers):
        config = clm.TransformerConfig(**{**CONFIG.__dict__, "num_layers": layers})
        model, tokens = clm.Transformer(config), np.zeros(N, int)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        return len(jax.jit(model.apply).lower(nn.unbox(params), tokens).as_text())

    assert size(40) < 1.05 * size(2)


def test_jitted_and_plain_calls_agree():
    tokens, d = draw()
    plain = LM.model.apply({"params": LM.params}, tokens, durations=d)
    np.testing.assert_allclose(LM(tokens, durations=d), plain, atol=1e-5)
    lists = LM(tokens.tolist(), durations=d.tolist())
    np.testing.assert_array_equal(lists, LM(tokens, durations=d))


def test_bfloat16_parameters_give_float32_logits_close_by():
    tokens, d = draw()
    low = random_lm(dtype=jnp.bfloat16)
    logits, exact = (
        logits_of(low, tokens, durations=d),
        logits_of(LM, tokens, durations=d),
    )
    assert logits.dtype == np.float32
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either tokens or embeddings"),
        (
            {"tokens": [1], "embeddings": np.ones((1, 32))},
            "either tokens or embeddings",
        ),
        ({"tokens": [1, 40]}, r"tokens\[1\] is 40; every entry must be from 0 to 39"),
        ({"tokens": [1, -1]}, r"tokens\[1\] is -1"),
        ({"tokens": np.ones(3)}, "dtype float"),
        ({"tokens": np.zeros(0, int)}, "no tokens"),
        ({"tokens": 3}, "no tokens"),
        ({"embeddings": np.ones((3, 31))}, "31 wide"),
        ({"embeddings": np.ones(32)}, "no tokens"),
        ({"embeddings": np.full((3, 32), np.nan)}, r"embeddings\[0, 0\] is nan"),
        (
            {"tokens": [1, 2], "durations": [1.0]},
            r"durations has shape \[1\]; .* with T = 2, as in tokens",
        ),
        ({"tokens": [1, 2], "durations": [1.0, np.nan]}, r"durations\[1\] is nan"),
        ({"tokens": [1, 2], "durations": [1.0, -1.0]}, r"durations\[1\] is -1"),
        ({"tokens": [1, 2], "durations": [0.0, 1.0]}, "first token has duration 0"),
        ({"tokens": [1, 2], "times": [0.0, np.inf]}, r"times\[1\] is inf"),
        ({"tokens": [1, 2], "times": [0.0, 1.0], "start": 1.0}, "leave out start"),
        ({"tokens": [1, 2], "start": np.nan}, "start is nan"),
        ({"tokens": [1, 2], "durations": [1e-39, 1.0]}, "first token has duration 0"),
        (
            {"tokens": [[1, 2]] * 2, "durations": np.ones((3, 2))},
            r"\[2\] of tokens, \[3\] of dur",
        ),
        (
            {"tokens": [[1, 2]] * 2, "start": np.ones(3)},
            r"\[2\] of tokens, \[3\] of start",
        ),
        ({"tokens": [1, 2], "position": 2}, "position is 2"),
        ({"tokens": [1, 2], "position": 0.5}, "position has dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(clm.InputError, match=message):
        LM(**arguments)
    arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    with pytest.raises(clm.InputError, match=message):
        LM.model.apply({"params": LM.params}, **arrays)


def test_values_are_not_checked_inside_jit():
    tokens, _ = draw()
    nan = np.full(N, np.nan, np.float32)
    assert np.isnan(jax.jit(LM)(tokens, durations=nan)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 7}, "a head of 7 channels"),
        ({"rope": None}, "rope or max_positions"),
        ({"rope": Rope(fraction=1.5)}, "1.5 of a head"),
        ({"rope": None, "max_positions": -1}, "max_positions is -1"),
        ({"window": 3.0, "window_pattern": ()}, "window_pattern is empty"),
        ({"local_rope": Rope(fraction=0.5)}, "local_rope"),
        ({"norm": "batch"}, "'batch'"),
        ({"logits_softcap": 0.0}, "logits_softcap is 0"),
        ({"activation": "mish"}, "'mish'"),
        ({"window": -1.0}, "window is -1"),
        ({"vocab_size": True}, "vocab_size is True"),
    ],
)
def test_configs_that_make_no_sense_are_named(change, message):
    with pytest.raises(clm.InputError, match=message):
        clm.TransformerConfig(**{**CONFIG.__dict__, **change})


def test_rms_norm_is_its_formula():
    x, scale = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)[:, 0]
    expected = x / np.sqrt(np.mean(x**2) + 1e-5) * scale
    np.testing.assert_allclose(
        jax.jit(layers.rms_norm)(x, scale, 1e-5), expected, rtol=1e-6
    )


# --- Options of the execution, which do not change results -------------------------------------

CAPPED = clm.TransformerConfig(
    **{
        **WINDOWED.__dict__,
        "attention_softcap": 2.0,
        "window_pattern": (True, False, True),
    }
)


@pytest.mark.parametrize(
    "config",
    [CONFIG, pytest.param(CAPPED, marks=pytest.mark.slow)],
    ids=["plain", "windows and caps"],
)
@pytest.mark.parametrize(
    "options", [{"implementation": "blocked"}, {"remat": True}], ids=str
)
def test_options_change_neither_logits_nor_gradients(config, options):
    lm = random_lm(config)
    tokens, d = draw(n=37)
    models = (lm.model.clone(implementation="dense"), lm.model.clone(**options))
    results = [loss_and_gradients(model, lm.params, tokens, d) for model in models]
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * np.abs(x).max())


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, tokens, d):
    def loss(params, d):
        logits = model.apply({"params": params}, tokens, durations=d)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    return jax.value_and_grad(loss, argnums=(0, 1))(params, d)


@pytest.mark.slow
def test_remat_stores_only_the_input_of_each_layer():
    """The memory of a gradient grows by about one hidden state for each layer."""

    def memory(num_layers, remat):
        config = clm.TransformerConfig(**{**CONFIG.__dict__, "num_layers": num_layers})
        model = clm.Transformer(config, remat=remat)

        def loss(params, d):
            logits = model.apply(
                {"params": params}, jnp.zeros(256, jnp.int32), durations=d
            )
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        shapes = (
            jax.eval_shape(lambda: random_lm(config).params),
            jax.ShapeDtypeStruct((256,), jnp.float32),
        )
        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, remat = ((memory(24, r) - memory(8, r)) / 16 for r in (False, True))
    layer_input = 4 * 256 * CONFIG.hidden_size
    assert remat < 1.5 * layer_input < plain / 3


def test_unknown_implementations_are_refused():
    tokens, _ = draw()
    with pytest.raises(clm.InputError, match="implementation is 'flash'"):
        LM.model.clone(implementation="flash").apply({"params": LM.params}, tokens)


def test_intermediates_are_captured_by_name():
    lm = random_lm()
    tokens = jnp.arange(5)
    names = layers.CAPTURABLE
    captured = lm.forward(tokens, capture=names).captured
    assert set(captured) == set(names)
    states = captured["residual_before"]
    table = lm.params["embedding"]
    assert states.shape == (lm.config.num_layers, 5, lm.config.hidden_size)
    np.testing.assert_allclose(states[0], table[tokens], rtol=1e-6)
    added = captured["attention_output"] + captured["mlp_output"]
    np.testing.assert_allclose(states[1:], (states + added)[:-1], rtol=1e-5, atol=1e-6)
    with pytest.raises(clm.InputError, match="capture has 'nope'; it may have res"):
        lm.forward(tokens, capture=("nope",))
    prefix = lm.prefill(tokens)
    with pytest.raises(clm.InputError, match="captured after a prefix"):
        lm.forward(tokens, prefix=prefix, position=-1, capture=names)


def test_tokens_and_times_of_any_integer_dtype():
    config = clm.TransformerConfig(
        vocab_size=300,
        hidden_size=8,
        mlp_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    lm = random_lm(config)
    tokens = np.array([1, 127, 5])
    expected = lm(tokens)
    for dtype in ("int8", "uint8", "int16", "int64"):
        np.testing.assert_array_equal(lm(tokens.astype(dtype)), expected)
    start = 2**32 + 7  # int32 would wrap it
    expected = lm(tokens, start=float(start))
    for integer_start in (np.int64(start), start):
        np.testing.assert_array_equal(lm(tokens, start=integer_start), expected)
