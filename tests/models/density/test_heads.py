"""Heads: initial values, bounds, training on known sources, and settings."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

import continuous_lm as clm
from continuous_lm.models import settings as models_settings
from continuous_lm.models.density import heads
from continuous_lm.models.density.heads import (
    ExpertsHead,
    GaussianHead,
    MixtureHead,
    TokenHead,
)
from continuous_lm.models.parameters import initialize

KEY = jax.random.key(0)
HIDDEN, WIDTH = 5, 3
HEADS = {
    "token": TokenHead(width=7, depth=1, mlp_size=6),
    "gaussian": GaussianHead(width=WIDTH, min_scale=0.1),
    "low rank": GaussianHead(width=WIDTH, covariance="low_rank", rank=2, depth=2),
    "full": GaussianHead(width=WIDTH, covariance="full", min_scale=0.2),
    "mixture": MixtureHead(width=WIDTH, components=4, depth=1),
    "experts": ExpertsHead(
        width=WIDTH, experts=4, top_k=2, expert_size=6, min_scale=0.01
    ),
}
DENSITIES = [name for name in HEADS if name != "token"]


def some(values, *quick):
    """All of them as parameters, and those that are not quick as slow ones."""
    return [
        pytest.param(v, marks=() if v in quick else pytest.mark.slow) for v in values
    ]


def initial(head, size=HIDDEN):
    """Parameters as they are at the start."""
    return jax.jit(lambda: initialize(KEY, head.parameter_table(size)))()


def shapes_of(head, size=HIDDEN):
    return jax.eval_shape(lambda: initialize(KEY, head.parameter_table(size)))


@functools.cache
def far(name):
    """Parameters anywhere but at the start."""
    leaves, tree = jax.tree.flatten(shapes_of(HEADS[name]))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [rng.normal(size=a.shape).astype(np.float32) for a in leaves]
    )


def scales(density):
    """All that `min_scale` bounds."""
    if hasattr(density, "cholesky"):
        return np.diagonal(density.cholesky, axis1=-2, axis2=-1)
    return np.asarray(density.scales if hasattr(density, "scales") else density.scale)


@pytest.mark.parametrize("name", some(DENSITIES, "mixture", "full"))
def test_scales_are_1_at_first(name):
    hidden = np.random.default_rng(0).normal(size=(6, HIDDEN)).astype(np.float32)
    density = distribution(name, initial(HEADS[name]), hidden)
    np.testing.assert_allclose(scales(density), 1.0, rtol=1e-6)
    if name == "low rank":
        assert 0 < np.abs(density.factor).max() < 0.3  # not 0, where it has no gradient
    if name == "full":
        np.testing.assert_array_equal(
            density.cholesky, np.broadcast_to(np.eye(3), (6, 3, 3))
        )
    if hasattr(density, "means"):  # components that are equal would stay so
        assert np.abs(np.diff(density.means, axis=-2)).min() > 1e-4


@settings(max_examples=25)
@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32), min_size=HIDDEN, max_size=HIDDEN
    )
)
def test_scales_are_not_below_their_bound(hidden):
    hidden = np.asarray(hidden, np.float32)
    for name in ("gaussian", "full", "experts"):
        values = scales(distribution(name, far(name), hidden))
        bound = np.float32(HEADS[name].min_scale)
        assert (values >= bound).all()
        assert np.isfinite(values).all()


@functools.partial(jax.jit, static_argnums=0)
def distribution(name, params, hidden):
    return HEADS[name].distribution(params, hidden)


def test_the_least_scale_bounds_the_density():
    head = GaussianHead(width=2, min_scale=0.05)
    params = {**zeros(head), "scale_bias": np.full(2, -1e4, np.float32)}
    hidden, target = np.zeros(HIDDEN, np.float32), np.zeros(2, np.float32)

    @jax.jit
    def scale_and_peak(params):
        density = head.distribution(params, hidden)
        return density.scale, density.log_prob(target)

    scale, peak = scale_and_peak(params)
    np.testing.assert_allclose(scale, 0.05, rtol=1e-6)
    expected = -2 * math.log(math.sqrt(2 * math.pi) * 0.05)
    assert float(peak) == pytest.approx(expected, rel=1e-5)


def zeros(head):
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes_of(head))


@pytest.mark.parametrize("name", some(HEADS, "token", "experts"))
def test_methods_equal_those_of_the_distribution(name):
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(4, 1, HIDDEN)).astype(np.float32)
    target = rng.normal(size=(4, 2, WIDTH)).astype(np.float32)
    target = np.array([[1, 6]]) if name == "token" else target
    head = HEADS[name]

    @jax.jit
    def every(params):
        ours = {
            "log_prob": head.log_prob(params, hidden, target),
            "sample": head.sample(params, KEY, hidden, 0.5),
            "loss": head.loss(params, hidden, target),
            "mean": 0 if name == "token" else head.mean(params, hidden),
        }
        distribution = head.distribution(params, hidden)
        theirs = {
            "log_prob": distribution.log_prob(target),
            "sample": distribution.sample(KEY, 0.5),
            "mean": 0 if name == "token" else distribution.mean,
        }
        return ours, theirs

    ours, theirs = every(far(name))
    for method, expected in theirs.items():
        np.testing.assert_allclose(ours[method], expected, rtol=1e-6)
    log_prob, loss = ours["log_prob"], ours["loss"]
    assert log_prob.shape == (4, 2)
    if name == "experts":  # and its balance, which is the same for all
        more = np.asarray(loss + log_prob)
        np.testing.assert_allclose(more, more[0, 0], atol=1e-4)
        assert more[0, 0] > 0.005
    else:
        np.testing.assert_allclose(loss, -log_prob, rtol=1e-6)
    if name == "token":
        with pytest.raises(clm.InputError, match="no mean"):
            head.mean(far(name), hidden)
    else:
        assert ours["mean"].shape == (4, 1, WIDTH)


@pytest.mark.parametrize("name", HEADS)
def test_distributions_are_float32_at_least(name):
    """Parameters of bfloat16 give float32, as those of float32 do where float64 is enabled."""
    for low, expected in (
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ):
        with jax.enable_x64(low != "bfloat16"):
            cast = lambda a, low=low: jax.ShapeDtypeStruct(a.shape, low)  # noqa: E731
            tree = jax.tree.map(cast, far(name))
            hidden = jax.ShapeDtypeStruct((HIDDEN,), low)
            dtypes = jax.eval_shape(HEADS[name].distribution, tree, hidden)
        assert {a.dtype.name for a in jax.tree.leaves(dtypes)} == {expected}


@pytest.mark.parametrize("depth", [0, 2])
def test_mlp_blocks_are_zero_at_first_and_follow_their_formula(depth):
    head = GaussianHead(width=2, depth=depth, mlp_size=6)
    mean_of = jax.jit(head.mean)
    params = jax.tree.map(np.asarray, initial(head))
    assert sorted(n for n in params if n.startswith("down_") and "bias" not in n) == [
        f"down_{i}" for i in range(depth)
    ]
    hidden = np.arange(1, 1 + HIDDEN, dtype=np.float32)
    expected = params["mean"] @ hidden + params["mean_bias"]
    np.testing.assert_allclose(mean_of(params, hidden), expected, rtol=1e-6)
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=a.shape) for name, a in params.items()}
    x = hidden.astype(np.float64)
    for i in range(depth):
        normed = x / np.sqrt(np.mean(x**2) + 1e-6) * p[f"norm_{i}"]
        gate = p[f"gate_{i}"] @ normed + p[f"gate_{i}_bias"]
        up = p[f"up_{i}"] @ normed + p[f"up_{i}_bias"]
        inner = gate / (1 + np.exp(-gate)) * up
        x = x + p[f"down_{i}"] @ inner + p[f"down_{i}_bias"]
    params = jax.tree.map(np.float32, p)
    expected = p["mean"] @ x + p["mean_bias"]
    np.testing.assert_allclose(mean_of(params, hidden), expected, rtol=1e-4)


# --- Experts ---------------------------------------------------------------------------------


def test_experts_follow_their_formula():
    head, p = HEADS["experts"], far("experts")
    hidden = np.random.default_rng(2).normal(size=(6, HIDDEN)).astype(np.float32)
    outputs = jax.jit(head.route)(p, hidden)
    routes, experts, mixture = jax.tree.map(np.asarray, outputs)
    expected = hidden @ p["router"].T + p["router_bias"]
    np.testing.assert_allclose(routes, expected, rtol=1e-4)
    gelu = jax.jit(jax.nn.gelu)
    for i, h in enumerate(hidden):
        best = np.argsort(-routes[i])[:2]
        np.testing.assert_array_equal(experts[i], best)
        np.testing.assert_array_equal(mixture.logits[i], routes[i][best])
        for j, x in enumerate(best):
            inner = np.asarray(gelu(p["inner"][x] @ h + p["inner_bias"][x]))
            mean = p["mean"][x] @ inner + p["mean_bias"][x]
            np.testing.assert_allclose(mixture.means[i, j], mean, rtol=1e-4, atol=1e-5)
            raw = p["scale"][x] @ inner + p["scale_bias"][x]
            scale = 0.01 + np.logaddexp(0, raw + math.log(math.expm1(0.99)))
            np.testing.assert_allclose(
                mixture.scales[i, j], scale, rtol=1e-4, atol=1e-5
            )


def balance(routes, top_k, weight=1.0):
    """Return the balancing term of a router whose outputs are `routes` [N, X]."""
    experts = np.shape(routes)[1]
    head = ExpertsHead(width=1, experts=experts, top_k=top_k, balance=weight)
    params = {
        k: np.zeros(a.shape, np.float32) for k, a in shapes_of(head, experts).items()
    } | {"router": np.eye(experts, dtype=np.float32)}
    target = np.zeros((len(routes), 1), np.float32)

    @jax.jit
    def balancing_term(routes):
        log_prob = head.log_prob(params, routes, target)
        return head.loss(params, routes, target) + log_prob

    return float(balancing_term(np.asarray(routes, np.float32))[0])


@pytest.mark.parametrize("top_k", some([1, 2], 2))
def test_balance_is_least_for_equal_use_of_all_experts(top_k):
    even = 3.0 * np.eye(4)  # each state prefers another expert
    even = even + 2.0 * np.roll(np.eye(4), 1, axis=1)
    assert balance(even, top_k) == pytest.approx(1.0, rel=1e-5)
    one = np.tile(even[0], (4, 1))
    p = np.exp(one[0]) / np.exp(one[0]).sum()
    expected = 4 * np.mean(np.sort(p)[::-1][:top_k])  # by hand: X sum_x share_x p_x
    assert balance(one, top_k) == pytest.approx(expected, rel=1e-5)
    assert expected > 1.5
    assert balance(one, top_k, weight=0.25) == pytest.approx(expected / 4, rel=1e-4)
    rng = np.random.default_rng(0)
    assert balance(rng.normal(size=(200, 4)), top_k) > 0.999


# --- Training --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def train(head, params, hidden, target, steps=400, rate=0.03):
    """Adam on one batch; parameters and the last loss."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(params):
        return head.loss(params, hidden, target).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(
        step, (params, optimizer.init(params)), None, steps
    )
    return params, values[-1]


def trained(head, hidden, target, **options):
    return train(
        head, initial(head, hidden.shape[-1]), hidden, target, *options.values()
    )


@pytest.mark.slow
def test_training_recovers_a_known_mixture():
    rng = np.random.default_rng(0)
    weights, means = (
        np.array([0.5, 0.3, 0.2]),
        np.array([[0.0, 0.0], [3.0, 1.0], [-2.0, 3.0]]),
    )
    spreads = np.array([[0.5, 0.8], [0.4, 0.3], [0.6, 0.4]])
    which = rng.choice(3, 2000, p=weights)
    target = means[which] + spreads[which] * rng.normal(size=(2000, 2))
    head = MixtureHead(width=2, components=3)
    hidden = jnp.ones((1, 1))
    params, _ = trained(head, hidden, jnp.asarray(target, jnp.float32))
    fit = jax.tree.map(lambda a: np.asarray(a[0]), head.distribution(params, hidden))
    order = [np.argmin(((fit.means - mean) ** 2).sum(axis=-1)) for mean in means]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(fit.means[order], means, atol=0.12)
    np.testing.assert_allclose(fit.scales[order], spreads, atol=0.06)
    np.testing.assert_allclose(np.asarray(fit.weights)[order], weights, atol=0.05)


def test_trained_covariances_reach_their_least_loss():
    """A diagonal costs -1/2 log det of the correlations more than a full covariance.

    Both losses are the least possible ones, in nats on these samples. A factor of rank 1 is between
    them.
    """
    rng, width = np.random.default_rng(0), 3
    mix = np.array([[1.0, 0.0, 0.0], [0.9, 0.5, 0.0], [-0.7, 0.6, 0.5]])
    target = rng.normal(size=(500, width)) @ mix.T
    covariance = np.cov(target.T, bias=True)
    best = 0.5 * (
        width * math.log(2 * math.pi * math.e) + np.linalg.slogdet(covariance)[1]
    )
    deviations = np.sqrt(np.diag(covariance))
    gap = -0.5 * np.linalg.slogdet(covariance / np.outer(deviations, deviations))[1]
    assert gap > 0.8
    hidden, target = np.ones((1, 1), np.float32), target.astype(np.float32)
    nats = {
        covariance: float(
            trained(
                GaussianHead(width=width, covariance=covariance, rank=1), hidden, target
            )[1]
        )
        for covariance in heads.COVARIANCES
    }
    assert nats["full"] == pytest.approx(best, abs=0.01)
    assert nats["diagonal"] == pytest.approx(best + gap, abs=0.01)
    assert nats["full"] + 0.05 < nats["low_rank"] < nats["diagonal"] - 0.05


def clusters(count=800, number=4, seed=0):
    """Hidden states around `number` points, and targets that depend on each in another way."""
    rng = np.random.default_rng(seed)
    which = rng.integers(number, size=count)
    hidden = 2.0 * np.eye(number)[which] + 0.2 * rng.normal(size=(count, number))
    maps = rng.normal(size=(number, 2, number))
    target = np.einsum("zij,zj->zi", maps[which], hidden) + 0.1 * rng.normal(
        size=(count, 2)
    )
    return which, hidden.astype(np.float32), target.astype(np.float32)


@pytest.mark.parametrize("top_k", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_experts_specialise(top_k):
    """Experts specialise in clusters, and all are used about equally.

    With top_k = 1 each cluster has its expert. With top_k = 2, pairs of experts can distinguish
    clusters in other ways: the mutual information of expert and cluster is at least half of log 4.
    """
    which, hidden, target = clusters()
    head = ExpertsHead(width=2, experts=4, top_k=top_k, expert_size=8, balance=0.15)
    params, _ = trained(head, hidden, target)
    _, experts, mixture = jax.jit(head.route)(params, hidden)
    experts = np.asarray(experts)
    use = np.zeros((4, 4))  # [cluster, expert]: sum of the mixture's weights
    weights = np.exp(log_softmax(np.asarray(mixture.logits), axis=-1))
    np.add.at(use, (which[:, None], experts), weights)
    use /= use.sum()
    if top_k == 1:
        assert (use.max(axis=1) / use.sum(axis=1)).min() > 0.75
        assert sorted(use.argmax(axis=1)) == [0, 1, 2, 3]
    apart = use.sum(axis=0) * use.sum(axis=1)[:, None]
    information = np.sum(use * np.log(np.maximum(use, 1e-30) / apart))
    assert information > 0.5 * math.log(4)
    share = np.bincount(experts.ravel(), minlength=4) / experts.size
    assert share.min() > 0.15


# --- Settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_settings_round_trip(name):
    written = HEADS[name].to_dict()
    assert heads.from_dict(written) == HEADS[name]
    assert heads.from_dict({"kind": written["kind"], "width": 4}).width == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gauss"}, "kind of head is 'gauss'"),
        ({"kind": None}, "kind of head is None"),
        ({"kind": ["mixture"]}, "kind of head is"),
        ({"width": None}, "width"),
        ({"width": 0}, "width is 0"),
        ({"width": True}, "width"),
        ({"width": 3.0}, "width"),
        ({"width": 10**30}, "width"),
        ({"depth": -1}, "depth is -1"),
        ({"depth": 10**9}, "depth"),
        ({"mlp_size": 0}, "mlp_size is 0"),
        ({"components": 0}, "components is 0"),
        ({"components": "8"}, "components"),
        ({"min_scale": 0.0}, "min_scale is 0.0"),
        ({"min_scale": 1}, "min_scale is 1"),
        ({"min_scale": float("nan")}, "min_scale is nan"),
        ({"min_scale": "small"}, "min_scale"),
        ({"min_scale": True}, "min_scale"),
        ({"colour": None}, "no setting 'colour'"),
        ({"param_dtype": "float32"}, "no setting 'param_dtype'"),
        ({"rank": 2}, "no setting 'rank'"),
        (
            {"kind": "gaussian", "components": ..., "covariance": "round"},
            "covariance is 'round'",
        ),
        ({"kind": "gaussian", "components": ..., "rank": None}, "rank"),
        ({"kind": "experts", "components": ..., "top_k": 9}, "top_k is 9"),
        ({"kind": "experts", "components": ..., "balance": -1.0}, "balance is -1.0"),
        (
            {"kind": "experts", "components": ..., "balance": float("inf")},
            "balance is inf",
        ),
    ],
)
def test_settings_that_are_refused(changes, message):
    fields = {"kind": "mixture", "width": 3, "components": 4} | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    with pytest.raises(clm.InputError) as refused:
        heads.from_dict(fields)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    kind = fields.pop("kind")
    if (
        isinstance(kind, str)
        and kind in heads.DISTRIBUTION_HEADS
        and "no setting" not in message
    ):
        with pytest.raises(clm.InputError):
            heads.DISTRIBUTION_HEADS[kind](**fields)


def test_a_head_needs_its_width():
    with pytest.raises(clm.InputError, match="width"):
        heads.from_dict({"kind": "mixture"})


CHANGED = {
    "depth": 2,
    "mlp_size": 9,
    "covariance": "full",
    "rank": 3,
    "min_scale": 0.3,
    "components": 5,
    "experts": 6,
    "top_k": 1,
    "expert_size": 9,
    "balance": 0.5,
    "width": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token", "low rank", "mixture", "experts"])
def test_every_setting_has_an_effect(name):
    """Changed, the parameters, the distribution or the loss are others."""
    base = dataclasses.replace(HEADS[name], depth=1, mlp_size=4)
    hidden = jnp.ones((2, HIDDEN))

    def outcome(head, compute):  # in shapes, or where these are the same, in numbers
        def all_of():
            params = initialize(KEY, head.parameter_table(HIDDEN))
            low = {k: v - 5.0 if k == "scale_bias" else v for k, v in params.items()}
            tokens = isinstance(head, TokenHead)
            target = jnp.zeros(2, int) if tokens else jnp.zeros((2, head.width))
            loss = head.loss(params, hidden, target)
            return [params, loss, head.distribution(low, hidden)]

        return jax.tree.leaves(compute(all_of))

    def shapes(head):
        return [a.shape for a in outcome(head, jax.eval_shape)]

    for setting in models_settings.values(base):
        if setting == "tied":  # then it has no kernel of its own
            tied = dataclasses.replace(base, tied=True)
            assert "logits" not in tied.parameter_table(HIDDEN)
            with pytest.raises(clm.InputError, match="table"):
                tied.distribution(initial(tied), hidden)
            continue
        changed = dataclasses.replace(base, **{setting: CHANGED[setting]})
        if shapes(changed) == shapes(base):
            pairs = [outcome(head, lambda f: jax.jit(f)()) for head in (base, changed)]
            assert not all(map(np.array_equal, *pairs)), setting


# --- Parameters ------------------------------------------------------------------------------


def block_parameters(i, inner):
    """Return the parameters of an MLP block: name -> axes and shape."""
    return {
        f"norm_{i}": ("D", (HIDDEN,)),
        f"gate_{i}": ("F D", (inner, HIDDEN)),
        f"gate_{i}_bias": ("F", (inner,)),
        f"up_{i}": ("F D", (inner, HIDDEN)),
        f"up_{i}_bias": ("F", (inner,)),
        f"down_{i}": ("D F", (HIDDEN, inner)),
        f"down_{i}_bias": ("D", (HIDDEN,)),
    }


def with_biases(kernels):
    """The kernels by name, and the bias of each."""
    biases = {
        f"{name}_bias": (axes[:-2], shape[:-1])
        for name, (axes, shape) in kernels.items()
    }
    return kernels | biases


DECLARED = {
    "token": block_parameters(0, 6) | with_biases({"logits": ("V D", (7, 5))}),
    "gaussian": with_biases({"mean": ("W D", (3, 5)), "scale": ("W D", (3, 5))}),
    "low rank": block_parameters(0, 20)
    | block_parameters(1, 20)
    | with_biases(
        {
            "mean": ("W D", (3, 5)),
            "scale": ("W D", (3, 5)),
            "factor": ("W R D", (3, 2, 5)),
        }
    ),
    "full": with_biases(
        {"mean": ("W D", (3, 5)), "scale": ("W D", (3, 5)), "below": ("- D", (3, 5))}
    ),
    "mixture": block_parameters(0, 20)
    | with_biases(
        {
            "logits": ("X D", (4, 5)),
            "mean": ("X W D", (4, 3, 5)),
            "scale": ("X W D", (4, 3, 5)),
        }
    ),
    "experts": with_biases(
        {
            "router": ("X D", (4, 5)),
            "inner": ("X F D", (4, 6, 5)),
            "mean": ("X W F", (4, 3, 6)),
            "scale": ("X W F", (4, 3, 6)),
        }
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_parameters_are_those_of_saved_folders(name):
    """Names, axes and shapes; density.safetensors has them under "head/"."""
    table = HEADS[name].parameter_table(HIDDEN)
    declared = {path: (" ".join(d.axes), d.shape) for path, d in table.items()}
    assert declared == DECLARED[name]


def test_heads_are_hashable_values():
    """Heads are static arguments of compiled functions."""
    assert len({*HEADS.values(), *map(dataclasses.replace, HEADS.values())}) == len(
        HEADS
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        HEADS["mixture"].width = 4
