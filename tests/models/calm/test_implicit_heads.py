"""Heads without a likelihood: the map itself, losses, solvers against closed forms, recovery."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm import axes, losses
from continuous_lm.experiments.calm import two_mode_target
from continuous_lm.models import head as heads
from continuous_lm.models import settings as model_settings
from continuous_lm.models.calm import noise_network
from continuous_lm.models.calm.flow_solvers import (
    MIN_SIGNAL_VARIANCE,
    denoise,
    integrate,
    signal_variance,
)
from continuous_lm.models.calm.implicit_heads import (
    IMPLICIT_HEADS,
    DiffusionHead,
    EnergyHead,
    FlowHead,
)
from continuous_lm.models.density.heads import DISTRIBUTION_HEADS
from continuous_lm.models.parameters import initialize, unflatten

KEY = jax.random.key(0)
HIDDEN, WIDTH, SIZE, DEPTH = 5, 3, 4, 2
SHARED = {"width": WIDTH, "hidden_size": SIZE, "depth": DEPTH, "num_samples": 4}
HEADS = {
    "energy": EnergyHead(noise_size=6, **SHARED),
    "flow": FlowHead(steps=3, **SHARED),
    "diffusion": DiffusionHead(steps=3, **SHARED),
    "ancestral": DiffusionHead(steps=3, ancestral=True, **SHARED),
}


def most(*quick):
    """All heads, of which those that are not quick are slow tests: each compiles for seconds."""
    return [
        pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in HEADS
    ]


def far(head, dtype=np.float32):
    """Parameters anywhere but at the start."""
    table = head.parameter_table(HIDDEN)
    rng = np.random.default_rng(0)
    return unflatten(
        {
            name: rng.normal(size=table[name].shape).astype(dtype)
            for name in sorted(table)
        }
    )


def structs(head, dtype):
    """The parameters' shapes, all of a dtype."""
    table = head.parameter_table(HIDDEN)
    return {
        name: jax.ShapeDtypeStruct(declaration.shape, dtype)
        for name, declaration in table.items()
    }


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(head, params, *args, method):
    return getattr(head, method)(params, *args)


def some(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- The blocks ------------------------------------------------------------------------------


def test_parameters_of_the_energy_head():
    d, w, u, j, h = SIZE, WIDTH, 6, DEPTH, HIDDEN
    shapes = {"noise": (d, u), "hidden": (d, h), "last_inner": (d, d), "last": (w, d)}
    shapes |= {"blocks_inner": (j, d, 2 * d), "blocks_middle": (j, d, d)}
    shapes |= {"blocks_outer": (j, 2 * d, d), "blocks_down": (j, d, d)}
    shapes = shapes | {f"{name}_bias": shape[:-1] for name, shape in shapes.items()}
    for name in ("noise_norm", "hidden_norm", "last_norm"):
        shapes |= {name: (d,), f"{name}_bias": (d,)}
    shapes |= {"blocks_norm": (j, d), "blocks_norm_bias": (j, d)}
    table = HEADS["energy"].parameter_table(HIDDEN)
    assert {name: a.shape for name, a in table.items()} == shapes
    timed = HEADS["ancestral"].parameter_table(HIDDEN)
    assert set(timed) == {*shapes, "time", "time_bias"}
    assert timed["noise"].shape == (d, w)  # of a noisy vector, whatever noise there is


def test_parameters_are_those_of_axes_and_no_mesh_axis_is_used_twice():
    table = HEADS["flow"].parameter_table(HIDDEN)
    for name, declaration in table.items():
        assert len(declaration.axes) == len(declaration.shape), name
        placed = [
            axes.SHARDING_RULES[letter]
            for letter in declaration.axes
            if letter in axes.SHARDING_RULES
        ]
        assert len(placed) == len(set(placed)), name
    assert {letter for a in table.values() for letter in a.axes} == set("DUJFW-")


def torch_head(torch, p):
    """The generative head of CALM, from its description, with these parameters."""
    functional = torch.nn.functional

    class Block(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.in_ln = torch.nn.LayerNorm(size, eps=1e-6)
            self.linears = torch.nn.Sequential(
                torch.nn.Linear(2 * size, size),
                torch.nn.SiLU(),
                torch.nn.Linear(size, size),
                torch.nn.SiLU(),
                torch.nn.Linear(size, 2 * size),
            )
            self.down_proj = torch.nn.Linear(size, size)

        def forward(self, x, y):
            h = self.linears(torch.cat([self.in_ln(x), y], dim=-1))
            gate, up = h.chunk(2, dim=-1)
            return x + self.down_proj(functional.silu(gate) * up)

    def put(module, name, index=...):
        with torch.no_grad():
            module.weight.copy_(torch.tensor(p[name][index]))
            module.bias.copy_(torch.tensor(p[f"{name}_bias"][index]))
        return module

    def linear(name):
        return put(torch.nn.Linear(*p[name].shape[::-1]), name)

    def norm(name):
        return put(torch.nn.LayerNorm(p[name].shape[-1], eps=1e-6), name)

    blocks = [Block(p["noise"].shape[0]) for _ in p["blocks_norm"]]
    for i, block in enumerate(blocks):
        put(block.in_ln, "blocks_norm", i)
        put(block.down_proj, "blocks_down", i)
        for at, name in {0: "inner", 2: "middle", 4: "outer"}.items():
            put(block.linears[at], f"blocks_{name}", i)

    def forward(noise, hidden):
        x = norm("noise_norm")(linear("noise")(noise))
        y = norm("hidden_norm")(linear("hidden")(hidden))
        x, y = torch.broadcast_tensors(x, y)
        for block in blocks:
            x = block(x, y)
        return linear("last")(
            functional.silu(linear("last_inner")(norm("last_norm")(x)))
        )

    return forward


def test_the_energy_head_equals_that_of_calm():
    torch = pytest.importorskip("torch", reason="the reference is written in PyTorch")
    head = HEADS["energy"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True), torch.no_grad():
            p = far(head, np.float64)
            noise, hidden = (
                some(1, 7, 2, 6).astype(np.float64),
                some(2, 2, HIDDEN).astype(float),
            )
            expected = torch_head(torch, p)(
                torch.tensor(noise), torch.tensor(hidden)
            ).numpy()
            actual = apply(head, p, noise, hidden, method="transform")
            assert actual.dtype == np.float64
    finally:
        torch.set_default_dtype(default)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    assert actual.shape == (7, 2, WIDTH)


def test_program_size_does_not_depend_on_the_number_of_blocks():
    """Programs of 2 and of 9 blocks have equally many equations."""

    def equations(depth):
        head = dataclasses.replace(HEADS["energy"], depth=depth)
        params = structs(head, "float32")
        noise, hidden = jnp.zeros(6), jnp.zeros(HIDDEN)
        jaxpr = jax.make_jaxpr(lambda p: head.transform(p, noise, hidden))
        return str(jaxpr(params)).count("\n")

    assert equations(2) == equations(9) > 20


# --- Samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", most("energy", "ancestral"))
def test_samples_are_a_map_of_noise(name):
    head, params = HEADS[name], far(HEADS[name])
    hidden = some(1, 2, HIDDEN)
    noise = head.noise(KEY, (2,))
    assert noise.shape == (2, head.noise_width)
    sample = apply(head, params, KEY, hidden, 0.5, method="sample")
    assert sample.shape == (2, WIDTH)
    many = np.stack([0.5 * noise, 0 * noise, noise])
    moved = apply(head, params, many, hidden, method="transform")
    np.testing.assert_allclose(moved[0], sample, rtol=1e-4, atol=1e-4)
    # Each by its own noise and hidden state.
    turned = apply(head, params, many[::-1, ::-1], hidden[::-1], method="transform")
    np.testing.assert_allclose(turned[::-1, ::-1], moved, rtol=1e-4, atol=1e-4)
    again = apply(head, params, KEY, hidden, 0.5, method="sample")
    np.testing.assert_array_equal(sample, again)
    other = apply(head, params, jax.random.key(1), hidden, 0.5, method="sample")
    assert np.abs(sample - other).min() > 1e-6
    still = apply(head, params, KEY, hidden, 0.0, method="sample")
    np.testing.assert_allclose(still, moved[1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_every_part_of_ancestral_noise_counts():
    head, params = HEADS["ancestral"], far(HEADS["ancestral"])
    noise, hidden = some(0, head.noise_width), some(1, HIDDEN)
    slopes = jax.jacobian(lambda z: apply(head, params, z, hidden, method="transform"))(
        noise
    )
    assert (np.abs(np.asarray(slopes)).max(axis=0) > 1e-6).all()


def test_noise_has_its_documented_distribution():
    for name, deviation in (("energy", 12**-0.5), ("ancestral", 1.0)):
        noise = np.asarray(
            jax.jit(lambda key, name=name: HEADS[name].noise(key, (5000,)))(KEY)
        )
        assert noise.mean() == pytest.approx(0.0, abs=0.02)
        assert noise.std() == pytest.approx(deviation, rel=0.02)
        assert (np.abs(noise).max() <= 0.5) == (name == "energy")


@pytest.mark.parametrize("name", HEADS)
def test_dtypes(name):
    """float32 at least, and float64 where it is on."""
    head = HEADS[name]
    for low, expected in (
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ):
        with jax.enable_x64(low != "bfloat16"):
            of = lambda *shape, low=low: jax.ShapeDtypeStruct(shape, low)  # noqa: E731
            params = structs(head, low)
            call = lambda method: functools.partial(apply, head, method=method)  # noqa: E731
            outputs = [
                jax.eval_shape(
                    call("transform"), params, of(head.noise_width), of(HIDDEN)
                ),
                jax.eval_shape(call("sample"), params, KEY, of(HIDDEN)),
                jax.eval_shape(call("loss"), params, of(2, HIDDEN), of(2, WIDTH), KEY),
            ]
        assert [a.dtype.name for a in outputs] == [expected] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["energy", "flow"])
def test_initial_values_of_parameters(name):
    """The last map and biases are 0, norms 1, other kernels as wide as their inputs are many."""
    head = dataclasses.replace(HEADS[name], hidden_size=40)
    sizes = head.network_sizes(HIDDEN)._replace(input_width=30, time_width=20)
    params = initialize(KEY, noise_network.parameter_table(sizes))
    for parameter, values in params.items():
        if parameter.endswith("norm"):
            assert (values == 1).all()
        elif parameter == "last" or parameter.endswith("bias"):
            assert (values == 0).all()
        else:
            wide = values.shape[-1] ** -0.5
            assert np.std(values) == pytest.approx(wide, rel=0.15), parameter


# --- Losses ----------------------------------------------------------------------------------


def test_the_energy_loss_is_the_score_of_its_samples():
    head, params = dataclasses.replace(HEADS["energy"], beta=1.3), far(HEADS["energy"])
    hidden, target = some(1, 2, HIDDEN), some(2, 3, 2, WIDTH)

    @jax.jit
    def both(params):
        samples = head.transform(params, head.noise(KEY, (4, 2)), hidden)
        return (
            [head.loss(params, hidden, y, KEY) for y in (target, target[0])],
            [losses.energy_score(samples, y, beta=1.3) for y in (target, target[:1])],
        )

    np.testing.assert_allclose(*both(params), rtol=1e-5)


def test_the_energy_loss_is_proper():
    """Targets that the head itself draws cost it the least: the gap is an energy distance."""
    head = dataclasses.replace(HEADS["energy"], num_samples=64)
    params = far(head)
    hidden = np.tile(some(1, 1, HIDDEN), (64, 1))
    target = apply(
        head, params, jax.random.key(5), np.tile(hidden, (64, 1)), method="sample"
    )
    target = target.reshape(64, 64, WIDTH)

    def cost(params):
        return np.asarray(apply(head, params, hidden, target, KEY, method="loss"))

    least = cost(params)
    wider = params | {"last": 1.5 * params["last"], "last_bias": params["last_bias"]}
    moved = params | {"last_bias": params["last_bias"] + 0.5}
    narrower = params | {"last": 0.5 * params["last"]}
    for other in (wider, moved, narrower):
        gap = cost(other) - least
        assert gap.mean() > 4 * gap.std() / math.sqrt(len(gap))


@pytest.mark.parametrize(
    "name", ["flow", pytest.param("diffusion", marks=pytest.mark.slow)]
)
def test_timed_losses_are_squared_errors_of_the_prediction(name):
    head, params = HEADS[name], far(HEADS[name])
    hidden, target = some(1, 2, HIDDEN), some(2, 3, 2, WIDTH)

    @jax.jit
    def inside(params):
        y, noise, time = head.noised_targets(hidden, target, KEY)
        a, t = signal_variance(time)[..., None], time[..., None]
        x, velocity = {
            "flow": ((1 - t) * noise + t * y, y - noise),
            "diffusion": (jnp.sqrt(a) * y + jnp.sqrt(1 - a) * noise, noise),
        }[name]
        predicted = head.make_predictor(params, hidden)(x, time)
        by_hand = jnp.mean((predicted - velocity) ** 2, axis=(0, -1))
        return y, noise, time, by_hand, head.loss(params, hidden, target, KEY)

    y, noise, time, by_hand, loss = inside(params)
    np.testing.assert_array_equal(y, target[[0, 1, 2, 0]])  # in turn
    assert noise.shape == y.shape
    np.testing.assert_array_equal(
        np.floor(4 * np.asarray(time)), np.arange(4)[:, None] * [1, 1]
    )
    np.testing.assert_allclose(loss, by_hand, rtol=1e-4)


@pytest.mark.parametrize("name", most("energy"))
@pytest.mark.slow
def test_first_gradients_reach_only_the_last_map_and_then_all(name):
    """All samples are 0 at first, and the gradient is of the last map alone; then of everything."""
    head = HEADS[name]
    params = far(head)
    params |= {n: np.zeros_like(params[n]) for n in ("last", "last_bias")}
    hidden, target = some(1, 8, HIDDEN), some(2, 8, WIDTH)

    @jax.jit
    def gradient(params):
        def loss(params):
            samples = head.transform(params, head.noise(KEY, (9, 8)), hidden)
            return head.loss(params, hidden, target, KEY).mean(), samples

        return jax.grad(loss, has_aux=True)(params)

    first, samples = gradient(params)
    if name == "energy":
        np.testing.assert_array_equal(samples, np.zeros((9, 8, WIDTH)))
    assert {n for n, g in first.items() if np.abs(g).max() > 0} == {"last", "last_bias"}
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, first)
    second, samples = gradient(params)
    assert np.asarray(samples).std(axis=0).min() > 1e-5  # the tie is broken by one step
    for parameter, slope in second.items():
        assert np.abs(slope).max() > 0, parameter
        assert np.isfinite(slope).all()


# --- Solvers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_solvers_converge_at_their_order(solver, order):
    """dx/dt = A x + t b, whose solution is an exponential of a matrix."""
    scipy_linalg = pytest.importorskip(
        "scipy.linalg", reason="the closed form is scipy's"
    )
    a, b = np.array([[0.5, -2.0], [1.0, -0.3]]), np.array([1.0, -1.0])
    generator = np.zeros((4, 4))  # of x, t and 1
    generator[:2, :2], generator[:2, 2], generator[2, 3] = a, b, 1.0
    x = np.array([[0.3, 1.0], [-1.0, 0.5]])
    exact = np.array(
        [(scipy_linalg.expm(generator) @ [*row, 0.0, 1.0])[:2] for row in x]
    )
    with jax.enable_x64(True):
        velocity = lambda x, t: x @ a.T + t * b  # noqa: E731
        solve = functools.partial(integrate, velocity, solver=solver)
        ends = jax.jit(lambda x: [solve(x, steps=n) for n in (32, 64, 128)])(x)
    errors = [np.abs(np.asarray(ends) - exact).max() for ends in ends]
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx(
        [order] * 2, abs=0.08
    )
    assert errors[-1] < 0.02


def gaussian_noise(x, time, mean, deviation):
    """E[noise | x] at a time, where targets are normal."""
    left = signal_variance(time)
    variance = left * deviation**2 + 1 - left
    return jnp.sqrt(1 - left) * (x - jnp.sqrt(left) * mean) / variance


def test_deterministic_denoising_converges_to_the_map_of_normal_densities():
    """With the exact noise, (x - E x) / deviation is the same at all times."""
    mean, deviation = 1.5, 0.3
    with jax.enable_x64(True):
        z = np.linspace(-2.0, 2.0, 5)
        least = MIN_SIGNAL_VARIANCE
        first = (z - math.sqrt(least) * mean) / math.sqrt(
            least * deviation**2 + 1 - least
        )
        predict = functools.partial(gaussian_noise, mean=mean, deviation=deviation)
        solve = functools.partial(denoise, predict)
        solutions = jax.jit(lambda z: [solve(z, steps=n) for n in (64, 128, 256, 512)])(
            z
        )
    errors = [
        np.abs(np.asarray(ends) - (mean + deviation * first)).max()
        for ends in solutions
    ]
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert rates == pytest.approx([1.0] * 3, abs=0.2)
    assert errors[-1] < 0.01


def test_ancestral_denoising_samples_the_normal_density():
    mean, deviation, steps, count = -0.5, 0.6, 150, 20_000
    predict = functools.partial(gaussian_noise, mean=mean, deviation=deviation)

    @jax.jit
    def denoise_noise(key):
        noise = jax.random.normal(key, (1 + steps, count))
        return noise[0], denoise(predict, noise[0], noise[1:], steps=steps)

    z, samples = map(np.asarray, denoise_noise(KEY))
    assert samples.mean() == pytest.approx(mean, abs=0.03)
    assert samples.std() == pytest.approx(deviation, rel=0.03)
    assert (
        abs(np.corrcoef(samples, z)[0, 1]) < 0.2
    )  # where it begins is nearly forgotten


def test_fresh_noise_has_the_variance_of_the_posterior():
    """Two steps without predicted noise; Ho et al. (arXiv:2006.11239), equation 7."""
    x, fresh_noise = np.float32([0.3]), np.float32([[2.0], [5.0]])
    denoise_to_zero = jax.jit(
        lambda noise: denoise(lambda x, t: jnp.zeros_like(x), x, noise, steps=2)
    )
    last, middle, first = np.asarray(signal_variance(np.float32([1.0, 0.5, 0.0])))
    fresh_variance = (1 - middle) / (1 - last) * (1 - last / middle)
    after_one = x * np.sqrt(middle / last) + np.sqrt(fresh_variance) * fresh_noise[0]
    expected = after_one * np.sqrt(first / middle)
    np.testing.assert_allclose(denoise_to_zero(fresh_noise), expected, rtol=1e-5)
    assert 0.1 < fresh_variance < 0.9 * (1 - last / middle)


def test_signal_is_the_cosine_schedule():
    time = np.linspace(0.0, 0.97, 30)
    f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    variances = np.asarray(jax.jit(signal_variance)(np.append(time, 1.0)))
    np.testing.assert_allclose(variances[:-1], f(time) / f(0), rtol=1e-5)
    assert variances[0] == 1.0
    assert variances[-1] == np.float32(MIN_SIGNAL_VARIANCE)


def test_evaluations_are_counted():
    for solver, expected in (("euler", 3), ("midpoint", 6)):
        assert FlowHead(width=1, steps=3, solver=solver).num_evaluations == expected
        velocity = mock.Mock(side_effect=lambda x, t: x)
        integrate(velocity, 1.0, steps=3, solver=solver)
        assert 3 * velocity.call_count == expected  # traced once, run in each step
    assert (HEADS["energy"].num_evaluations, HEADS["diffusion"].num_evaluations) == (
        1,
        3,
    )


# --- Refused arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_there_is_no_density(name):
    head, params = HEADS[name], far(HEADS[name])
    hidden = np.zeros(HIDDEN, np.float32)
    with pytest.raises(clm.InputError, match=r"only be sampled.*no log_prob"):
        head.log_prob(params, hidden, np.zeros(WIDTH))
    with pytest.raises(clm.InputError, match="mean has no closed form"):
        head.mean(params, hidden)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3), max_size=4), st.integers(1, 4))
def test_targets_that_do_not_fit_are_refused(lead, width):
    """Hidden [2, D]: targets are [W], or what broadcasts with [2], or draws of these."""
    shape = (*lead, width)
    hidden, target = jnp.zeros((2, HIDDEN)), np.zeros(shape)
    if width == WIDTH and len(shape) in (2, 3) and shape[-2] in (1, 2):
        draws = jax.eval_shape(HEADS["flow"].as_target_draws, hidden, target)
        assert draws.shape == (shape if len(shape) == 3 else (1, *shape))
    else:
        with pytest.raises(clm.InputError, match="target has shape"):
            HEADS["flow"].as_target_draws(hidden, target)


def test_noise_that_does_not_fit_is_refused():
    head, params = HEADS["energy"], far(HEADS["energy"])
    for noise, hidden in (
        (np.zeros((2, 5)), np.zeros(HIDDEN)),
        (np.zeros(()), np.zeros(HIDDEN)),
    ):
        with pytest.raises(clm.InputError, match=r"noise has shape .* \[\.\.\., 6\]"):
            head.transform(params, noise, hidden)
    with pytest.raises(clm.InputError, match="fit those of hidden"):
        head.transform(params, np.zeros((2, 6)), np.zeros((3, HIDDEN)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gaussian", {}, "kind of head is 'gaussian'"),
        ("energy", {"num_samples": 1}, "num_samples is 1"),
        ("energy", {"beta": 2.0}, "beta is 2.0"),
        ("energy", {"beta": float("nan")}, "beta is nan"),
        ("energy", {"beta": True}, "beta"),
        ("energy", {"noise_size": 0}, "noise_size is 0"),
        ("energy", {"depth": -1}, "depth is -1"),
        ("energy", {"hidden_size": "8"}, "hidden_size"),
        ("energy", {"steps": 3}, "no setting 'steps'"),
        ("flow", {"solver": "heun"}, "solver is 'heun'"),
        ("flow", {"steps": 0}, "steps is 0"),
        ("diffusion", {"ancestral": 1}, "ancestral"),
    ],
)
def test_settings_that_are_refused(kind, changes, message):
    with pytest.raises(clm.InputError) as refused:
        heads.from_dict({"kind": kind, "width": 3} | changes, IMPLICIT_HEADS)
    assert message in str(refused.value)


@pytest.mark.parametrize("name", HEADS)
def test_settings_round_trip(name):
    written = HEADS[name].to_dict()
    assert heads.from_dict(written, IMPLICIT_HEADS) == HEADS[name]
    with pytest.raises(clm.InputError, match="kind of head"):
        heads.from_dict(written, DISTRIBUTION_HEADS)


def test_solvers_refuse():
    with pytest.raises(clm.InputError, match="solver is 'rk4'"):
        integrate(lambda x, t: x, 1.0, steps=1, solver="rk4")
    for solve in (integrate, denoise):
        with pytest.raises(clm.InputError, match="steps is 0"):
            solve(lambda x, t: x, 1.0, steps=0)


CHANGED = {
    "width": 4,
    "hidden_size": 7,
    "depth": 3,
    "num_samples": 5,
    "noise_size": 3,
    "beta": 0.5,
    "steps": 5,
    "solver": "euler",
    "ancestral": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["energy", "flow", "diffusion"])
def test_every_setting_has_an_effect(name):
    """Changed, the parameters, the loss or the samples are others."""
    base, hidden = HEADS[name], some(1, 2, HIDDEN)

    def outcome(head):
        params, target = far(head), np.zeros((2, head.width), np.float32)
        loss = apply(head, params, hidden, target, KEY, method="loss")
        return [
            *jax.tree.leaves(params),
            loss,
            apply(head, params, KEY, hidden, method="sample"),
        ]

    for setting in model_settings.values(base):
        changed = dataclasses.replace(base, **{setting: CHANGED[setting]})
        pairs = zip(outcome(base), outcome(changed), strict=True)
        assert not all(np.array_equal(*pair) for pair in pairs), setting


# --- Recovery --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["energy", "flow, midpoint", "diffusion", "diffusion, ancestral"]
)
def test_two_modes_are_recovered_where_one_gaussian_cannot(name):
    """Against the best Gaussian there is; what data is to other data is 0."""
    head = two_mode_target.make_heads(32, 2, 8)[name]
    params, _ = two_mode_target.fit_head(
        head, KEY, steps=700, batch_size=128, learning_rate=3e-3
    )
    sizes = {"key": jax.random.key(7), "conditions": 48, "samples": 150}
    metrics = two_mode_target.evaluate_samples(
        two_mode_target.make_sampler(head, params), **sizes
    )
    best = two_mode_target.evaluate_samples(two_mode_target.draw_best_gaussian, **sizes)
    assert metrics.interval[1] < 0.15 * best.interval[0]
    assert metrics.in_modes > 0.9 > 3 * best.in_modes
    assert metrics.likelier == pytest.approx(
        two_mode_target.LIKELIER_MODE_SHARE, abs=0.05
    )
