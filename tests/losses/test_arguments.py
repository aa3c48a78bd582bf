"""Checks of every loss: dtypes, shapes that do not fit, values out of range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import arguments, losses

W, V = 3, 4
CHOLESKY = np.tril(np.ones((2, W, W)))
EVEN = np.full((2, V), 1 / V)
FLOATS = {  # every loss of floats, with arguments that fit
    losses.gaussian_nll: np.ones((3, 2, W)),
    losses.low_rank_gaussian_nll: (*np.ones((3, 2, W)), np.ones((2, W, 2))),
    losses.full_gaussian_nll: (*np.ones((2, 2, W)), CHOLESKY),
    losses.mixture_nll: np.ones((2, 2, V)),
    losses.gaussian_mixture_nll: (np.ones((2, W)), EVEN, *np.ones((2, 2, V, W))),
    losses.energy_score: (np.ones((3, 2, W)), np.zeros((4, 2, W))),
    losses.gaussian_kl: np.ones((2, 2, W)),
    losses.codebook_loss: np.ones((2, 2, W)),
    losses.commitment_loss: np.ones((2, 2, W)),
}
NAMES = [function.__name__ for function in FLOATS]


@pytest.mark.parametrize(("function", "args"), FLOATS.items(), ids=NAMES)
def test_dtypes(function, args):
    """Halves are computed in float32, integers become it, and float64 stays."""

    def dtype(*arguments):
        return jax.eval_shape(function, *arguments).dtype

    for input_dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32):
        assert dtype(*(jnp.asarray(a, input_dtype) for a in args)) == jnp.float32
    with jax.enable_x64(True):
        mixed = [
            jnp.asarray(args[0], jnp.float32),
            *(jnp.asarray(a, jnp.float64) for a in args[1:]),
        ]
        assert dtype(*mixed) == jnp.float64


def test_bfloat16_inputs_give_float32_results():
    rng = np.random.default_rng(0)
    x, mean = (jnp.asarray(a, jnp.bfloat16) for a in rng.normal(size=(2, 50, 256)))
    scale = jnp.asarray(rng.uniform(0.5, 2, (50, 256)), jnp.bfloat16)
    wide = [np.asarray(a, np.float64) for a in (x, mean, scale)]
    z = (wide[0] - wide[1]) / wide[2]
    expected = (z**2 / 2 + np.log(wide[2]) + np.log(2 * np.pi) / 2).sum(axis=-1)
    np.testing.assert_allclose(losses.gaussian_nll(x, mean, scale), expected, rtol=1e-5)
    logits = jnp.asarray(rng.normal(size=(5, 3000)), jnp.bfloat16)
    labels = np.arange(5)
    actual = losses.cross_entropy(logits, labels)
    assert actual.dtype == jnp.float32
    exact = np.asarray(logits, np.float64)
    expected = np.log(np.exp(exact).sum(axis=-1)) - exact[labels, labels]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(("function", "args"), FLOATS.items(), ids=NAMES)
def test_shapes_that_do_not_fit_are_refused(function, args):
    """Every argument in turn: an axis cut, its leading axis of another size, or none left.

    Under jit too, where only shapes are known.
    """
    for i, array in enumerate(args):
        any_rank = function is losses.low_rank_gaussian_nll and i == 3
        cut = array[..., :-1, :] if any_rank else array[..., :-1]
        other = np.repeat(
            array, 3, axis=-array.ndim + (function is losses.energy_score)
        )
        for wrong in (cut, other, 1.0):
            arguments = [*args[:i], wrong, *args[i + 1 :]]
            with pytest.raises(clm.InputError, match=r"it must be|do not broadcast"):
                jax.eval_shape(function, *arguments)


def test_the_message_names_the_culprit():
    with pytest.raises(clm.InputError) as error:
        losses.low_rank_gaussian_nll(*np.ones((3, 2, W)), np.ones((2, 5, 2)))
    assert str(error.value) == (
        "factor has shape [2, 5, 2]; it must be [..., W, R] with W = 3, as in x"
    )


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize(
    ("function", "i"),
    [
        (losses.gaussian_nll, 2),
        (losses.low_rank_gaussian_nll, 2),
        (losses.full_gaussian_nll, 2),
        (losses.gaussian_mixture_nll, 3),
        (losses.gaussian_kl, 1),
    ],
)
def test_scales_not_above_zero_are_refused(function, i, wrong):
    args = [np.array(a) for a in FLOATS[function]]
    args[i][(1,) * args[i].ndim] = wrong  # on the diagonal, of a Cholesky factor
    with pytest.raises(clm.InputError, match=r"(scale|diagonal of cholesky).* is "):
        function(*args)
    assert jax.jit(function)(*args).shape == (2,)  # where values are not known


@pytest.mark.parametrize(
    ("function", "rows"),
    [(losses.cross_entropy, np.zeros((2, V))), (losses.brier, EVEN)],
)
def test_labels_that_do_not_fit_are_refused(function, rows):
    for labels, message in [
        (np.array([0, V]), r"labels\[1\] is 4"),
        (np.array([-1, 0]), r"labels\[0\] is -1"),
        (np.array([0.0, 1.0]), "must hold integers"),
        (np.array([0, 1, 2]), r"labels has shape \[3\]; it must be \[2\]"),
        (0, r"labels has shape \[\]"),
    ]:
        with pytest.raises(clm.InputError, match=message):
            function(rows, labels)


def test_wrong_probabilities_are_refused():
    for wrong, message in [
        (2 * EVEN, "adding up to 1"),
        (EVEN - [1, -1, 0, 0], "is -0.75"),
    ]:
        with pytest.raises(clm.InputError, match=message):
            losses.brier(wrong, np.zeros(2, int))
        with pytest.raises(clm.InputError, match=message):
            losses.code_entropy(probabilities=wrong)
    assert losses.brier(
        jnp.full((2, 3), 1 / 3, jnp.bfloat16), np.zeros(2, int)
    ).shape == (2,)


def test_tokens_that_do_not_fit_are_refused():
    x = np.zeros((2, 5), int)
    for wrong in (x[:, 1:], x[0], 0):
        with pytest.raises(clm.InputError, match="they must be the same"):
            losses.brier_n(x, x, wrong, n=1)
    with pytest.raises(clm.InputError, match="second has dtype"):
        losses.brier_n(x, x / 2, x, n=1)


@pytest.mark.parametrize("dtype", [bool, complex])
def test_values_that_are_no_number_are_refused(dtype):
    with pytest.raises(clm.InputError, match="mean has dtype"):
        losses.gaussian_nll(np.ones(3), np.ones(3, dtype), np.ones(3))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_labels_of_any_integer_dtype(dtype):
    logits = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    labels = np.array([1, 43, 127])
    for function, x in (
        (losses.cross_entropy, logits),
        (losses.brier, probabilities),
    ):
        expected = function(x, labels)
        np.testing.assert_array_equal(function(x, labels.astype(dtype)), expected)


def test_integers_of_64_bits_do_not_wrap():
    mean = np.int64(2**40)
    (array,) = arguments.check(mean=(mean, "..."))
    assert array == np.float32(2**40)
    assert arguments.as_float(2**40) == np.float32(2**40)
