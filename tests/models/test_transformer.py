"""Exact properties of the trunk, on random parameters."""

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
    """Parameters far from zero, norms too."""
    rng, flat = np.random.default_rng(seed), {}
    for path, declaration in parameter_table(config).items():
        middle = 1.0 if path.endswith("scale") else 0.0
        flat[path] = jnp.asarray(
            middle + 0.2 * rng.normal(size=declaration.shape), dtype
        )
    return clm.LanguageModel(
        clm.Transformer(config), traverse_util.unflatten_dict(flat, sep="/")
    )


LM, LM_WINDOWED = random_lm(), random_lm(WINDOWED)
both = pytest.mark.parametrize("lm", [LM, LM_WINDOWED], ids=["plain", "windowed"])


def draw(seed=0, n=N):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 40, n)), jnp.asarray(
        rng.uniform(0.1, 2, n), jnp.float32
    )


@both
def test_durations_of_one_are_the_plain_model(lm):
    tokens, _ = draw()
    np.testing.assert_array_equal(lm(tokens, durations=jnp.ones(N)), lm(tokens))


@both
@given(st.integers(0, 1000), st.floats(-10, 10, width=32))
def test_a_translation_changes_nothing(lm, seed, shift):
    tokens, d = draw(seed)
    plain = lm(tokens, durations=d)
    moved = lm(tokens, durations=d, start=shift)
    assert np.abs(moved - plain).max() <= 1e-5 * np.abs(plain).max()
    times = clm.durations.translate(clm.durations.end_times(d), shift)
    moved = lm(tokens, durations=d, times=times)
    assert np.abs(moved - plain).max() <= 1e-5 * np.abs(plain).max()


def test_an_empty_batch_has_empty_logits():
    assert LM(np.zeros((0, 5), int)).shape == (0, 5, LM.config.vocab_size)


@both
@pytest.mark.parametrize("gone", [[3], [3, 4], [1, 6, 11], [0], [0, 1, 5]])
def test_a_token_of_duration_zero_is_as_if_not_there(lm, gone):
    """Also the first ones, inside jit: outside of it they are refused."""
    tokens, d = draw()
    kept = np.setdiff1d(np.arange(N), gone)
    apply = jax.jit(lm.model.apply)
    with_gone = apply(
        {"params": lm.params}, tokens, durations=d.at[jnp.array(gone)].set(0.0)
    )
    without = apply({"params": lm.params}, tokens[kept], durations=d[kept])
    np.testing.assert_allclose(
        with_gone[kept], without, atol=1e-5 * np.abs(without).max()
    )


@both
def test_the_future_never_leaks(lm):
    tokens, d = draw()
    d = d.at[0].set(4096.0).at[3:].set(1e-4)
    other = tokens.at[7:].set((tokens[7:] + 1) % 40)
    a, b = lm(tokens, durations=d), lm(other, durations=d)
    np.testing.assert_array_equal(a[:7], b[:7])
    assert (a[7:] != b[7:]).any(axis=1).all()


@both
def test_gradients_match_finite_differences(lm):
    with jax.enable_x64(True):
        lm = random_lm(lm.config, dtype=jnp.float64)
        tokens, _ = draw()
        d = jnp.asarray(np.random.default_rng(0).uniform(0.1, 2, N)).at[4].set(0.0)
        rows, start = lm.params["embedding"][tokens], jnp.asarray(0.3)

        @jax.jit
        def loss(params, rows, d, start):
            logits = lm.model.apply(
                {"params": params}, embeddings=rows, durations=d, start=start
            )
            assert logits.dtype == jnp.float64
            return jnp.sum(jnp.sin(logits))

        point = (rows, d, start)
        grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3)))(lm.params, *point)
        rng = np.random.default_rng(1)
        for i, x in enumerate(point):
            # Steps forward alone from d = 0, where durations end; fourth order.
            # Nothing curves along start, so that its step can drown the rounding.
            direction, h = (
                jnp.asarray(rng.uniform(0.1, 1, x.shape)),
                (1e-4, 1e-4, 1e-2)[i],
            )
            moved = [
                (*point[:i], x + k * h * direction, *point[i + 1 :]) for k in range(5)
            ]
            f = [loss(lm.params, *arguments) for arguments in moved]
            numeric = (-25 * f[0] + 48 * f[1] - 36 * f[2] + 16 * f[3] - 3 * f[4]) / (
                12 * h
            )
            exact = jnp.vdot(grads[i], direction)
            scale = jnp.abs(grads[i] * direction).sum() + 1e-3  # start's gradient is 0
            np.testing.assert_allclose(exact, numeric, atol=1e-6 * scale)
        assert np.abs(grads[2]) < 1e-9


def test_gradients_are_finite_in_float32_at_duration_zero():
    tokens, d = draw()
    d = d.at[3:7].set(0.0)
    grads = jax.jit(
        jax.grad(lambda d: LM_WINDOWED(tokens, durations=d, position=-1).max())
    )(d)
    assert jnp.isfinite(grads).all()
    assert (grads[3:7] != 0).any()


def test_leading_axes_are_free_and_broadcast():
    tokens, d = draw()
    other, e = draw(1)
    batch = LM(jnp.stack([tokens, other]), durations=jnp.stack([d, e]))
    np.testing.assert_allclose(batch[1], LM(other, durations=e), atol=2e-5)
    points = LM(tokens, durations=jnp.stack([d, e])[:, None], start=jnp.zeros((2, 1)))
    assert points.shape == (2, 1, N, 40)
    np.testing.assert_allclose(points[1, 0], LM(tokens, durations=e), atol=2e-5)


def test_at_is_that_position_of_all():
    tokens, d = draw()
    batch = jnp.stack([tokens, tokens[::-1]])
    full = LM(batch, durations=d)
    np.testing.assert_allclose(
        LM(batch, durations=d, position=-1), full[:, -1], atol=1e-5
    )
    np.testing.assert_allclose(
        LM(batch, durations=d, position=jnp.array([2, 5])),
        full[[0, 1], [2, 5]],
        atol=1e-5,
    )


def test_at_broadcasts_too():
    tokens, d = draw()
    np.testing.assert_allclose(
        LM(tokens, durations=d, position=[0, 3]),
        LM(tokens, durations=d)[jnp.array([0, 3])],
        atol=1e-5,
    )


def test_a_token_with_nothing_in_its_window_is_refused():
    tokens, _ = draw(n=5)
    d, times = jnp.ones(5).at[4].set(0.0), jnp.array([1.0, 2.0, 3.0, 4.0, 1000.0])
    with pytest.raises(clm.InputError, match="token 4 has nothing to attend to"):
        LM_WINDOWED(tokens, durations=d, times=times)
    assert jnp.isfinite(
        LM_WINDOWED(tokens, durations=d, times=times.at[4].set(4.5))
    ).all()
    assert jnp.isfinite(LM(tokens, durations=d, times=times)).all()


def test_positions_between_rows_are_linear_and_clamped():
    table = jnp.array([[0.0], [1.0], [4.0]])
    at = jnp.array([-1.0, 0.0, 0.25, 1.0, 1.5, 2.0, 9.0])
    np.testing.assert_allclose(
        transformer.interpolate_positions(table, at)[:, 0], [0, 0, 0.25, 1, 2.5, 4, 4]
    )
    slopes = jax.vmap(
        jax.grad(lambda p: transformer.interpolate_positions(table, p[None])[0, 0])
    )(at)
    np.testing.assert_allclose(
        slopes, [0, 1, 1, 3, 3, 3, 0]
    )  # at a row, that to its right


def test_the_head_is_computed_at_that_position_alone():
    """No [T, V] array is left in the compiled program."""
    big = clm.TransformerConfig(**{**CONFIG.__dict__, "vocab_size": 5000})
    lm = random_lm(big)
    apply = jax.jit(
        lambda params, t: lm.model.apply({"params": params}, t, position=-1)
    )
    text = apply.lower(lm.params, jnp.zeros(N, int)).as_text()
    assert "x5000" in text or "5000x" in text
    assert f"{N}x5000" not in text


def test_layers_are_scanned():
    """The compiled program does not grow with depth."""

    def size(layers):
        config = clm.TransformerConfig(**{**CONFIG.__dict__, "num_layers": layers})
        model = clm.Transformer(config)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(N, int))
        return len(
            jax.jit(model.apply).lower(nn.unbox(params), jnp.zeros(N, int)).as_text()
        )

    assert size(40) < 1.05 * size(2)


def test_jitted_and_plain_calls_agree():
    tokens, d = draw()
    plain = LM.model.apply({"params": LM.params}, tokens, durations=d)
    np.testing.assert_allclose(LM(tokens, durations=d), plain, atol=1e-5)
    lists = LM(tokens.tolist(), durations=d.tolist())
    np.testing.assert_array_equal(lists, LM(tokens, durations=d))


def test_bfloat16_parameters_give_float32_logits_close_by():
    tokens, d = draw()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), LM.params)
    logits = LM.model.apply({"params": low}, tokens, durations=d)
    exact = LM(tokens, durations=d)
    assert logits.dtype == jnp.float32
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


def test_values_are_free_inside_jit():
    tokens, _ = draw()
    assert jnp.isnan(jax.jit(LM)(tokens, durations=jnp.full(N, jnp.nan))).any()


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
        layers.rms_norm(jnp.asarray(x), scale, 1e-5), expected, rtol=1e-6
    )


# --- What changes how it is computed, and not what -------------------------------------------

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

    def loss(params, d, model):
        logits = model.apply({"params": params}, tokens, durations=d)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    results = [
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(
            lm.params, d, model
        )
        for model in (lm.model.clone(implementation="dense"), lm.model.clone(**options))
    ]
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * np.abs(x).max())


@pytest.mark.slow
def test_remat_keeps_the_input_of_each_layer_alone():
    """What one layer more adds to the memory of a gradient."""

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


def test_an_unknown_form_is_refused():
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
    model = clm.Transformer(config)
    tokens = np.array([1, 127, 5])
    variables = model.init(jax.random.key(0), tokens)
    expected = model.apply(variables, tokens)
    for dtype in ("int8", "uint8", "int16", "int64"):
        logits = model.apply(variables, tokens.astype(dtype))
        np.testing.assert_array_equal(logits, expected)
    start = 2**32 + 7  # times that int32 would wrap
    expected = model.apply(variables, tokens, start=float(start))
    for integer_start in (np.int64(start), start):
        logits = model.apply(variables, tokens, start=integer_start)
        np.testing.assert_array_equal(logits, expected)
