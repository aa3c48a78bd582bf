"""Against faiss, a plain float64 search, and itself in other blocks and on other devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm import quantize
from tests.fixtures import many_devices

METRICS = quantize.METRICS


def draw(num_vectors=60, num_codes=333, width=24, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((n, width), np.float32) for n in (num_vectors, num_codes)
    )


def all_distances(x, codes, metric):
    """Every distance [N, E] in float64."""
    x, codes = np.asarray(x, np.float64), np.asarray(codes, np.float64)
    if metric == "euclidean":
        return (x**2).sum(1)[:, None] - 2 * x @ codes.T + (codes**2).sum(1)
    if metric == "cosine":
        lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(codes, axis=1)
        cosine = np.divide(
            x @ codes.T, lengths, out=np.zeros(lengths.shape), where=lengths > 0
        )
        return 1 - cosine
    return -x @ codes.T


def without_ties(distances, k, gap):
    """Return a mask of the vectors whose distances to the k + 1 nearest codes differ clearly."""
    first = np.sort(distances, axis=1)[:, : k + 1]
    scale = np.abs(distances).max(axis=1, keepdims=True)
    return (np.diff(first, axis=1) > gap * scale).all(axis=1)


def faiss_search(x, codes, k, metric):
    faiss = pytest.importorskip("faiss")
    x, codes = x.copy(), codes.copy()
    if metric == "cosine":
        faiss.normalize_L2(x)
        faiss.normalize_L2(codes)
    index = (faiss.IndexFlatL2 if metric == "euclidean" else faiss.IndexFlatIP)(
        x.shape[1]
    )
    index.add(codes)
    distances, indices = index.search(x, k)
    return indices, {
        "euclidean": distances,
        "cosine": 1 - distances,
        "dot": -distances,
    }[metric]


@pytest.mark.parametrize(
    ("metric", "k"),
    [("euclidean", 1), ("euclidean", 100), ("cosine", 1), ("cosine", 7), ("dot", 5)],
)
def test_equals_faiss(metric, k):
    x, codes = draw(num_vectors=200)
    indices, distances = faiss_search(x, codes, k, metric)
    neighbours = quantize.k_nearest(x, codes, k, metric=metric, block_size=64)
    clear = without_ties(all_distances(x, codes, metric), k, 1e-6)
    assert clear.mean() > (0.99 if k < 100 else 0.8)
    np.testing.assert_array_equal(neighbours.indices[clear], indices[clear])
    np.testing.assert_allclose(neighbours.distances, distances, atol=2e-5)
    assert neighbours.indices.dtype == jnp.int32


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_equals_faiss_on_a_large_codebook(metric):
    x, codes = draw(num_vectors=512, num_codes=32768, width=512)
    for k in (1, 10):
        indices, distances = faiss_search(x, codes, k, metric)
        neighbours = quantize.k_nearest(x, codes, k, metric=metric)
        clear = without_ties(all_distances(x, codes, metric), k, 3e-7)
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(neighbours.indices[clear], indices[clear])
        np.testing.assert_allclose(
            neighbours.distances, distances, rtol=1e-5, atol=1e-5
        )


# One size and few numbers, so that few programs are compiled.
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    metric=st.sampled_from(["euclidean", "dot"]),
    k=st.sampled_from([1, 40]),
    block=st.sampled_from([32, 1024]),
)
def test_ties_go_to_the_lowest_index(seed, metric, k, block):
    """Small integers, whose products are exact: nearly every vector has ties, in many blocks."""
    num_vectors, num_codes, width = 5, 130, 2
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (num_vectors, width)).astype(np.float32)
    codes = rng.integers(-2, 3, (num_codes, width)).astype(np.float32)
    neighbours = quantize.k_nearest(x, codes, k, metric=metric, block_size=block)
    distances = all_distances(x, codes, metric)
    expected = np.argsort(distances, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(neighbours.indices, expected)
    np.testing.assert_array_equal(
        neighbours.distances, np.take_along_axis(distances, expected, 1)
    )


@pytest.mark.parametrize(
    ("metric", "num_codes", "width", "k"),
    [
        ("euclidean", 37, 5, 1),
        ("cosine", 37, 5, 1),
        ("dot", 37, 5, 1),
        ("cosine", 333, 67, 20),
    ],
)
def test_doubles_tie_exactly(metric, num_codes, width, k):
    """Any numbers: a double must get the same score wherever it stands in a block."""
    x, codes = draw(num_codes=num_codes, width=width)
    half = num_codes // 2
    codes[half:] = codes[np.random.default_rng(0).integers(0, half, num_codes - half)]
    at_once = quantize.k_nearest(x, codes, k, metric=metric)
    blocked = quantize.k_nearest(x, codes, k, metric=metric, block_size=16)
    jax.tree.map(np.testing.assert_array_equal, blocked, at_once)
    if k == 1:
        assert (at_once.indices < half).all()
    # Equal distances stand by index.
    tied = np.diff(at_once.distances, axis=1) == 0
    assert (np.diff(at_once.indices, axis=1)[tied] > 0).all()


@pytest.mark.parametrize(("num_vectors", "num_codes"), [(1, 130), (3, 37), (5, 13)])
def test_equal_codes_score_the_same_beside_full_tiles(num_vectors, num_codes):
    """The plain product of one vector sums the last rows in another order."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        codes = np.repeat(rng.standard_normal((1, 67), np.float32), num_codes, axis=0)
        x = rng.standard_normal((num_vectors, 67), np.float32)
        np.testing.assert_array_equal(
            quantize.nearest(x, codes, metric="dot").indices, 0
        )


def test_nearest_equals_k_nearest_without_the_last_axis():
    x, codes = draw(num_vectors=6)
    x = x.reshape(2, 3, -1)
    one = quantize.nearest(x, codes, norms=quantize.squared_norms(codes))
    many = quantize.k_nearest(x, codes, 1)
    assert one.indices.shape == (2, 3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[..., 0]), one, many)
    single = quantize.k_nearest(x[1, 2], codes, 4)
    assert single.indices.shape == (4,)
    assert single.indices[0] == one.indices[1, 2]


def test_cosine_distance_of_zero_vectors_is_1():
    x, codes = np.array([[0.0, 0.0], [-1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 0.0]])
    neighbours = quantize.k_nearest(x, codes, 2, metric="cosine")
    np.testing.assert_array_equal(neighbours.indices, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(neighbours.distances, [[1.0, 1.0], [1.0, 2.0]])


def test_distances_have_no_cancellation():
    """Far from the origin |x|^2 - 2 x.c + |c|^2 would lose all digits."""
    codes = np.array([[1000.0, 1000.0], [1001.0, 1000.0]], np.float32)
    neighbour = quantize.nearest([1000.0, 1000.0625], codes)
    assert neighbour.distances == 0.0625**2


def test_half_precision_is_searched_in_float32():
    x, codes = (jnp.asarray(a, jnp.bfloat16) for a in draw())
    narrow = quantize.k_nearest(x, codes, 3, block_size=64)
    wide = quantize.k_nearest(
        x.astype(jnp.float32), codes.astype(jnp.float32), 3, block_size=64
    )
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


def test_float64_is_searched_in_float64():
    with jax.enable_x64(True):
        x, codes = (a.astype(np.float64) for a in draw())
        codes[7] = x[0] * (1 + 1e-6)
        codes[3] = x[0] * (1 + 2e-6)  # float32 would see a tie, and take this one
        neighbours = quantize.nearest(x, codes, block_size=64)
        assert neighbours.distances.dtype == jnp.float64
        assert neighbours.indices[0] == 7


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_distances(metric):
    x, codes = draw(num_vectors=3, num_codes=40, width=4)

    def total(x, codes):
        weights = jnp.arange(1.0, 4.0)
        return jnp.sum(
            weights * quantize.k_nearest(x, codes, 3, metric=metric).distances
        )

    with jax.enable_x64(True):
        x, codes = x.astype(np.float64), codes.astype(np.float64)
        both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        gradients = both(x, codes)[1]
        rng = np.random.default_rng(1)
        for _ in range(3):
            dx, dc = rng.normal(size=x.shape), rng.normal(size=codes.shape)
            h = 1e-6
            change = (
                both(x + h * dx, codes + h * dc)[0]
                - both(x - h * dx, codes - h * dc)[0]
            )
            slope = np.sum(gradients[0] * dx) + np.sum(gradients[1] * dc)
            np.testing.assert_allclose(slope, change / (2 * h), rtol=1e-6)


def test_memory_does_not_grow_with_the_codebook():
    def temporary(num_codes):
        x, codes = draw(num_vectors=256, num_codes=num_codes, width=32)
        search = jax.jit(functools.partial(quantize.k_nearest, k=5, block_size=256))
        return search.lower(x, codes).compile().memory_analysis().temp_size_in_bytes

    norms = 4 * 16384
    assert temporary(16384) <= temporary(1024) + 2 * norms
    assert temporary(16384) < 256 * 16384 * 4 / 4  # of all scores


def test_memory_with_the_default_block_size():
    """Codes of few scores are not copied, others are scanned in blocks."""

    def temporary(num_vectors, num_codes, width):
        x, codes = draw(num_vectors=num_vectors, num_codes=num_codes, width=width)
        norms = quantize.squared_norms(codes)
        search = jax.jit(
            lambda x, codes, norms: quantize.nearest(x, codes, norms=norms)
        )
        return (
            search.lower(x, codes, norms).compile().memory_analysis().temp_size_in_bytes
        )

    for num_codes in (16384, 16391):  # full tiles or not
        assert temporary(2, num_codes, 64) < 4 * num_codes * 64 / 4
    assert temporary(512, 40000, 2) < 4 * 512 * 40000 / 8  # of all scores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (np.ones((2, 3)), np.ones((4, 5)), 1),
            "x has shape [2, 3]; it must be [..., W] with W = 5, as in codes",
        ),
        ((np.float32(1), np.ones((4, 5)), 1), "x has shape []; it must be [..., W]"),
        ((np.ones((2, 5)), np.ones((4, 5)), 5), "k is 5; it must be at most 4"),
        (
            (np.ones((2, 5)), np.ones((4, 5)), 0),
            "k is 0; it must be a positive integer",
        ),
        (
            (np.ones((2, 5)), np.ones((4, 5)), 2.0),
            "k is 2.0; it must be a positive integer",
        ),
        (
            (np.ones((2, 5)), np.ones((0, 5)), 1),
            "codes has shape [0, 5]; E and W must be at least 1",
        ),
        ((np.ones((2, 5)), np.ones(5), 1), "codes has shape [5]; it must be [E, W]"),
        ((np.ones((2, 5)) * 1j, np.ones((4, 5)), 1), "x has dtype complex64"),
        (([[1.0], [np.nan]], np.ones((4, 1)), 1), "x[1] is not finite"),
        (([np.inf], np.ones((4, 1)), 1), "x is not finite"),
        (([[1.0]], [[1.0], [2.0], [np.nan]], 1), "codes[2] is not finite"),
        (
            ([[1.0]], [[1.0], [1e30]], 1),
            "codes[1] is not finite, or so large that its squared length overflows",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(clm.InputError) as refused:
        quantize.k_nearest(*arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metric": "manhattan"},
            "metric is 'manhattan'; it must be one of euclidean, cosine, dot",
        ),
        ({"block_size": 0}, "block_size is 0; it must be a positive integer"),
        (
            {"norms": jnp.ones(3)},
            "norms has shape [3]; it must be [E] with E = 4, as in codes",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(clm.InputError) as refused:
        quantize.nearest(np.ones((2, 5)), np.ones((4, 5)), **options)
    assert message in str(refused.value)
    with pytest.raises(clm.InputError):
        quantize.distance(np.ones((2, 5)), np.ones(4))


MESH_PROGRAM = """
import re
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from continuous_lm import quantize

assert jax.device_count() == 8
devices = np.reshape(jax.devices(), (2, 4))
rng = np.random.default_rng(0)
codes = rng.integers(-2, 3, (320, 6)).astype(np.float32)
codes[160:] = codes[:160]
x = rng.integers(-2, 3, (50, 6)).astype(np.float32)
real = rng.standard_normal((320, 6), np.float32)
real[160:] = real[:160]
mesh, other = Mesh(devices, ("data", "model")), jax.make_mesh((2, 4), ("data", "model"))
for mesh, rows, vectors, k, metric, table in (
    (mesh, P("model", "data"), P("data"), 1, "euclidean", codes),
    (mesh, P(("data", "model")), P(), 60, "dot", codes),
    (other, P("model"), P("data"), 3, "cosine", real),
):
    many_x = jax.device_put(x, NamedSharding(mesh, vectors))
    many = jax.device_put(table, NamedSharding(mesh, rows))
    one = quantize.k_nearest(x, table, k, metric=metric, block_size=32)
    sharded = quantize.k_nearest(many_x, many, k, metric=metric, block_size=32)
    np.testing.assert_array_equal(sharded.indices, one.indices)
    tolerance = 0 if table is codes else 5e-7  # sums of real numbers round by their order
    np.testing.assert_allclose(sharded.distances, one.distances, rtol=0, atol=tolerance)

# Inside of jit, with gradients; what crosses between the devices is k candidates of each.
mesh = Mesh(devices, ("data", "model"))
placed = NamedSharding(mesh, P("model"))
many = jax.device_put(codes, placed)

def total(x, codes, sharding=None):
    return quantize.k_nearest(x, codes, 5, sharding=sharding).distances.sum()

gradient = jax.jit(jax.grad(lambda x, codes: total(x, codes, placed)))
np.testing.assert_allclose(gradient(x, many), jax.grad(total)(x, codes), rtol=1e-5)
search = jax.jit(lambda x, codes: quantize.k_nearest(x, codes, 5, sharding=placed))
text = search.lower(x, many).compile().as_text()
shapes = re.findall(r"= \\(?[a-z0-9]+\\[([0-9,]*)\\]\\S* all-gather", text)
print(*sorted(set(shapes)))
"""


def test_codebooks_on_a_mesh_equal_those_on_one_device():
    output = many_devices.run_on_devices(MESH_PROGRAM)
    assert output.split() == ["50,20"]  # 50 vectors, 5 candidates of 4 devices
