"""Learned codebooks, of one stage and of several, against plain NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm import losses, quantize

KEY = jax.random.key(0)

# Without jit, every operation of these functions is a program.
init = jax.jit(quantize.init, static_argnums=2, static_argnames=("steps", "axis_name"))
revive = jax.jit(quantize.revive, static_argnames="axis_name")
init_residual = jax.jit(
    quantize.init_residual, static_argnums=(2, 3), static_argnames="steps"
)
quantize_residual = jax.jit(quantize.quantize_residual)


def clusters(num_vectors=400, num_clusters=8, width=4, noise=0.05, seed=0):
    """Vectors around points far from each other, and these points."""
    rng = np.random.default_rng(seed)
    corners = rng.permutation(2**width)[:num_clusters]
    points = 4.0 * ((corners[:, None] >> np.arange(width)) & 1)
    which = rng.permutation(np.arange(num_vectors) % num_clusters)
    x = points[which] + noise * rng.standard_normal((num_vectors, width))
    return x.astype(np.float32), points, which


def nearest(x, codes):
    return ((x[:, None] - codes) ** 2).sum(-1).argmin(1)


# --- K-means ---------------------------------------------------------------------------------


def test_kmeans_finds_clusters():
    x, _, which = clusters()
    result = quantize.kmeans(KEY, x, 8, steps=5)
    means = np.array([x[which == i].mean(0) for i in range(8)])
    order = nearest(means, np.asarray(result.centres))
    assert sorted(order) == list(range(8))
    np.testing.assert_allclose(np.asarray(result.centres)[order], means, atol=1e-5)
    np.testing.assert_array_equal(result.counts, np.full(8, 50))


def test_lloyd_steps_equal_those_of_numpy():
    x = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    codes = np.array(quantize.kmeans(KEY, x, 10, steps=0).centres)
    assert all(
        (x == code).all(1).any() for code in codes
    )  # the start is drawn from the vectors
    assert len(np.unique(codes, axis=0)) == 10
    for _ in range(5):
        which = nearest(x, codes)
        codes = np.array([x[which == i].mean(0) for i in range(10)])
    result = quantize.kmeans(KEY, x, 10, steps=5)
    np.testing.assert_allclose(result.centres, codes, atol=1e-5)
    np.testing.assert_array_equal(
        result.counts, np.bincount(nearest(x, codes), minlength=10)
    )


def test_kmeans_of_few_different_vectors():
    x = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    result = quantize.kmeans(KEY, x, 5)
    assert np.isfinite(result.centres).all()
    assert sorted(result.counts.tolist()) == [0, 0, 4, 4, 4]


# --- One stage -------------------------------------------------------------------------------


def test_quantize_gives_codes_and_losses():
    rng = np.random.default_rng(0)
    x, codes = rng.standard_normal((2, 7, 3)), rng.standard_normal((12, 3))
    codebook = quantize.Codebook(jnp.asarray(codes), jnp.ones(12), jnp.asarray(codes))
    coded = quantize.quantize(codebook, x)
    indices = nearest(x.reshape(-1, 3), codes).reshape(2, 7)
    np.testing.assert_array_equal(coded.indices, indices)
    np.testing.assert_array_equal(
        coded.vectors, quantize.lookup(codebook.codes, indices)
    )
    squared = ((x - codes[indices]) ** 2).sum(-1)
    np.testing.assert_allclose(coded.codebook_loss, squared, rtol=1e-5)
    np.testing.assert_allclose(coded.commitment_loss, squared, rtol=1e-5)


@pytest.mark.parametrize("gradient", quantize.GRADIENTS)
def test_each_loss_has_gradients_only_of_its_argument(gradient):
    rng = np.random.default_rng(0)
    x, codes = (jnp.asarray(rng.standard_normal((n, 3)), jnp.float32) for n in (5, 12))
    g = rng.standard_normal((5, 3)).astype(np.float32)

    def parts(x, codes):
        coded = quantize.quantize(
            quantize.Codebook(codes, None, None), x, gradient=gradient
        )
        return jnp.stack(
            [
                jnp.sum(g * coded.vectors),
                coded.codebook_loss.sum(),
                coded.commitment_loss.sum(),
            ]
        )

    to_x, to_codes = jax.jit(jax.jacobian(parts, argnums=(0, 1)))(x, codes)
    indices = nearest(np.asarray(x), np.asarray(codes))
    trick = {
        "rotation": quantize.rotation_trick,
        "straight_through": quantize.straight_through,
    }
    codes = np.asarray(codes)

    def through_trick(x):
        return jnp.sum(g * trick[gradient](x, codes[indices]))

    through = jax.jit(jax.grad(through_trick))(x)
    x = np.asarray(x)
    np.testing.assert_allclose(to_x[0], through, rtol=1e-5)
    np.testing.assert_array_equal(to_codes[0], 0)
    np.testing.assert_array_equal(to_x[1], 0)
    expected = np.zeros((12, 3), np.float32)
    np.add.at(expected, indices, 2 * (codes[indices] - x))
    np.testing.assert_allclose(to_codes[1], expected, atol=1e-5)
    np.testing.assert_allclose(to_x[2], 2 * (x - codes[indices]), atol=1e-5)
    np.testing.assert_array_equal(to_codes[2], 0)


def numpy_ema(codes, counts, sums, x, decay, epsilon):
    """One step of appendix A.1, a code at a time, in float64."""
    which = nearest(x, codes)
    for i in range(len(codes)):
        mine = x[which == i]
        counts[i] = decay * counts[i] + (1 - decay) * len(mine)
        sums[i] = decay * sums[i] + (1 - decay) * mine.sum(0)
    total = counts.sum()
    for i in range(len(codes)):
        codes[i] = sums[i] / (
            (counts[i] + epsilon) / (total + len(codes) * epsilon) * total
        )
    return which


@functools.partial(jax.jit, static_argnames="axis_name")
def ema_step(codebook, x, axis_name=None):
    indices = quantize.quantize(codebook, x).indices
    options = {"decay": 0.8, "epsilon": 1e-2, "axis_name": axis_name}
    return quantize.update_ema(codebook, x, indices, **options), indices


def test_moving_averages_equal_those_of_numpy():
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((6, 64, 3)).astype(np.float32)
    codebook = init(KEY, batches[0], 9, steps=1)
    codes, counts, sums = (np.array(a, np.float64) for a in codebook)
    np.testing.assert_allclose(sums, codes * counts[:, None], rtol=1e-6)
    for x in batches:
        codebook, indices = ema_step(codebook, x)
        np.testing.assert_array_equal(
            indices, numpy_ema(codes, counts, sums, x, 0.8, 1e-2)
        )
        for ours, theirs in zip(codebook, (codes, counts, sums), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_updates_of_a_sharded_batch_equal_those_of_the_full_batch():
    """The same update, revival and start from four parts as from all of it."""
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    codebook = init(KEY, x, 9, steps=1)
    expected = ema_step(codebook, x)[0]
    expected = revive(KEY, expected, x, threshold=6.0)
    assert (expected.counts == 6.0).any()

    def step(x):
        codebook = init(KEY, x, 9, steps=1, axis_name="data")
        after = ema_step(codebook, x, axis_name="data")[0]
        return revive(KEY, after, x, threshold=6.0, axis_name="data")

    parts = jax.jit(jax.vmap(step, axis_name="data"))(x.reshape(4, 16, 3))
    for ours, theirs in zip(parts, expected, strict=True):
        for part in ours:
            np.testing.assert_allclose(part, theirs, rtol=1e-4, atol=1e-5)


def test_dead_codes_become_vectors_of_the_batch():
    x = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    counts = jnp.array([5.0, 0.5, 3.0, 0.0, 0.9, 1.0])
    codebook = quantize.Codebook(jnp.full((6, 3), 9.0), counts, jnp.full((6, 3), 2.0))
    after = jax.tree.map(np.asarray, revive(KEY, codebook, x, threshold=1.0))
    codebook = jax.tree.map(np.asarray, codebook)
    dead = np.array([False, True, False, True, True, False])
    for new, old in zip(after, codebook, strict=True):
        np.testing.assert_array_equal(new[~dead], old[~dead])
    np.testing.assert_array_equal(after.counts[dead], 1.0)
    np.testing.assert_array_equal(after.sums[dead], after.codes[dead])
    sources = {int(np.flatnonzero((x == code).all(1))[0]) for code in after.codes[dead]}
    assert len(sources) == 3  # none was drawn twice
    other = revive(jax.random.key(1), codebook, x, threshold=1.0)
    assert (np.asarray(other.codes)[dead] != after.codes[dead]).any()


def test_a_gradient_codebook_learns_the_clusters():
    x, points, _ = clusters()
    start = jnp.asarray(points + 0.9, jnp.float32)

    @jax.jit
    def fit(codes):
        def loss(codes):
            coded = quantize.quantize(quantize.Codebook(codes, None, None), x)
            return jnp.mean(coded.codebook_loss)

        return jax.lax.fori_loop(
            0, 60, lambda _, codes: codes - 2.0 * jax.grad(loss)(codes), codes
        )

    np.testing.assert_allclose(fit(start), points, atol=0.05)


# --- Stages ----------------------------------------------------------------------------------


def test_stages_quantize_residuals():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 3)).astype(np.float32)
    codebooks = init_residual(KEY, x, 3, 8, steps=2)
    coded = quantize_residual(codebooks, x)
    residual, total = x, 0
    for stage, codes in enumerate(np.asarray(codebooks.codes)):
        which = nearest(residual, codes)
        np.testing.assert_array_equal(coded.indices[:, stage], which)
        residual, total = residual - codes[which], total + codes[which]
        np.testing.assert_allclose(
            coded.commitment_loss[:, stage], (residual**2).sum(1), atol=1e-5
        )
    np.testing.assert_allclose(coded.vectors, total, atol=1e-6)
    vectors = quantize.lookup_residual(codebooks.codes, coded.indices)
    np.testing.assert_allclose(vectors, total, atol=1e-6)
    errors = np.asarray(coded.commitment_loss).mean(0)
    assert (np.diff(errors) < 0).all()  # each stage of k-means takes some of it away


def test_stages_follow_their_moving_averages():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 3)).astype(np.float32)
    codebooks = init_residual(KEY, x, 2, 6, steps=1)
    y = rng.standard_normal((64, 3)).astype(np.float32)
    indices = quantize_residual(codebooks, y).indices
    after = quantize.update_residual_ema(codebooks, y, indices, decay=0.8, epsilon=1e-2)
    residual = y.astype(np.float64)
    for stage in range(2):
        codes, counts, sums = (np.array(a[stage], np.float64) for a in codebooks)
        before = codes.copy()
        which = numpy_ema(codes, counts, sums, residual, 0.8, 1e-2)
        np.testing.assert_array_equal(indices[:, stage], which)
        np.testing.assert_allclose(after.codes[stage], codes, atol=1e-4)
        residual = residual - before[which]


def test_stages_are_revived_with_residuals():
    x, _, _ = clusters(num_vectors=40)
    codebooks = init_residual(KEY, x, 2, 8, steps=3)
    counts = np.array(codebooks.counts)
    counts[1, 2] = 0.0
    dead = codebooks._replace(counts=counts)
    after = quantize.revive_residual(KEY, dead, x)
    np.testing.assert_array_equal(after.codes[0], codebooks.codes[0])
    residual = (
        x - np.asarray(codebooks.codes)[0][nearest(x, np.asarray(codebooks.codes)[0])]
    )
    assert np.abs(residual - np.asarray(after.codes)[1, 2]).max(1).min() < 1e-6
    np.testing.assert_array_equal(after.codes[1, 3:], codebooks.codes[1, 3:])


def test_residual_gradients():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((20, 3)), jnp.float32)
    codebooks = init_residual(KEY, x, 2, 4, steps=1)

    def total(x, codes):
        coded = quantize_residual(codebooks._replace(codes=codes), x)
        return jnp.sum(3 * coded.vectors) + coded.codebook_loss.sum()

    to_x, to_codes = jax.jit(jax.grad(total, argnums=(0, 1)))(x, codebooks.codes)
    np.testing.assert_allclose(to_x, 3.0)
    residual = np.asarray(x)
    for stage, codes in enumerate(np.asarray(codebooks.codes)):
        which = nearest(residual, codes)
        expected = np.zeros_like(codes)
        np.add.at(expected, which, 2 * (codes[which] - residual))
        np.testing.assert_allclose(to_codes[stage], expected, atol=1e-5)
        residual = residual - codes[which]


BOOK = quantize.Codebook(jnp.ones((4, 3)), jnp.ones(4), jnp.ones((4, 3)))
BOOKS = jax.tree.map(lambda a: a[None], BOOK)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize.kmeans(KEY, np.ones((0, 3)), 2), "x has shape [0, 3]"),
        (lambda: quantize.kmeans(KEY, np.ones((5, 3)), 0), "num_codes is 0"),
        (lambda: quantize.kmeans(KEY, np.ones((5, 3)), 2, steps=-1), "steps is -1"),
        (lambda: quantize.init(KEY, [[np.nan]], 2), "x[0, 0] is nan"),
        (
            lambda: quantize.quantize(BOOK, np.ones((2, 5))),
            "x has shape [2, 5]; it must be [..., W] with W = 3, as in codes",
        ),
        (
            lambda: quantize.quantize(BOOK, np.ones(3), gradient="none"),
            "gradient is 'none'",
        ),
        (lambda: quantize.lookup(BOOK.codes, 4), "indices is 4"),
        (
            lambda: quantize.lookup(BOOKS.codes, 0),
            "codes has shape [1, 4, 3]; it must be [E, W]",
        ),
        (
            lambda: quantize.update_ema(BOOK, np.ones((2, 5)), [0, 0]),
            "x has shape [2, 5]; it must be [..., W] with W = 3, as in codes",
        ),
        (
            lambda: quantize.update_ema(BOOK, np.ones((2, 3)), [0]),
            "indices have shape [1]",
        ),
        (
            lambda: quantize.revive(KEY, BOOK, np.ones((2, 5))),
            "x has shape [2, 5]; it must be [..., W] with W = 3, as in codes",
        ),
        (lambda: quantize.init_residual(KEY, np.ones((2, 3)), 0, 2), "num_stages is 0"),
        (
            lambda: quantize.quantize_residual(BOOK, np.ones((2, 3))),
            "codes has shape [4, 3]; it must be [Q, E, W]",
        ),
        (
            lambda: quantize.quantize_residual(BOOKS, np.ones((2, 4))),
            "x has shape [2, 4]; it must be [..., W] with W = 3, as in codes",
        ),
        (
            lambda: quantize.lookup_residual(BOOKS.codes, [[0, 0]]),
            "indices has shape [1, 2]; it must be [..., Q] with Q = 1, as in codes",
        ),
        (
            lambda: quantize.update_residual_ema(BOOKS, np.ones((2, 3)), [0, 0]),
            "indices have shape [2]; for vectors of shape [2, 3] and 1 stages it must be [2, 1]",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(clm.InputError) as refused:
        call()
    assert message in str(refused.value)


def test_losses_equal_those_of_the_losses_package():
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    coded = quantize.quantize(BOOK, x)
    expected = losses.commitment_loss(x, coded.vectors)
    np.testing.assert_array_equal(coded.commitment_loss, expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_indices_of_any_integer_dtype(dtype):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.normal(size=(2, 300, 3)), jnp.float32)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    indices = np.array([[1, 127], [0, 3], [9, 9], [1, 127]])
    narrow_indices = indices.astype(dtype)
    codebook = quantize.Codebook(codes[0], jnp.ones(300), codes[0])
    for call in (
        lambda i: quantize.lookup(codes[0], i),
        lambda i: quantize.lookup_residual(codes, i),
        lambda i: quantize.code_use(i, 300).counts,
        lambda i: quantize.update_ema(codebook, x, i[:, 0]).codes,
    ):
        np.testing.assert_array_equal(call(narrow_indices), call(indices))
