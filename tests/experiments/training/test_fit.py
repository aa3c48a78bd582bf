"""Training: the steps are AdamW's, and where a run is stopped changes nothing of it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

import continuous_lm as clm
from continuous_lm.experiments.training import fit, run_folder, run_log, window_batches

ROOT = pathlib.Path(__file__).resolve().parents[3]
KILLS = 20
TOKENS = (np.random.default_rng(0).integers(0, 4, 2000).cumsum() % 32).astype(np.int32)


def loss(params, batch, key):
    """A model of the next token from the one before, with noise so that keys matter."""
    x = params["table"][batch[:, :-1]]
    x = jnp.tanh(x @ params["layers"]["mix"][0] + params["layers"]["bias"][0])
    x = x + 0.01 * jax.random.uniform(key, x.shape)
    logits = (x @ params["out"]).astype(jnp.float32)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1)
    return jnp.mean(nats), {"largest": jnp.max(logits)}


def initial():
    keys = jax.random.split(jax.random.key(7), 3)
    return {
        "table": jax.random.normal(keys[0], (32, 16)),
        "layers": {
            "mix": jax.random.normal(keys[1], (1, 16, 16)) / 4,
            "bias": jnp.zeros((1, 16)),
        },
        "out": jax.random.normal(keys[2], (16, 32)) / 4,
    }


def data():
    return window_batches.shuffled_windows(TOKENS, length=8, batch_size=8, seed=1)


def fitted(folder, loss=loss, params=None, batches=None, **changes):
    options = dict(
        steps=45,
        learning_rate=1e-2,
        batch_size=8,
        warm_up=5,
        save_every=10,
        steps_per_dispatch=5,
    )
    of_config = {field.name for field in dataclasses.fields(fit.FitConfig)}
    options |= {name: changes.pop(name) for name in of_config & changes.keys()}
    params = initial() if params is None else params
    return fit.fit(
        loss,
        params,
        batches or data(),
        folder=folder,
        config=fit.FitConfig(**options),
        **changes,
    )


def lines(folder, name=run_log.METRICS_FILE):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def remaining(folder):
    return [step for step, _ in run_folder.list_checkpoints(folder)]


def assert_same(params, others):
    assert jax.tree.structure(params) == jax.tree.structure(others)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class Interrupted:
    """Batches that do something before one of them is drawn."""

    def __init__(self, arguments, number, act):
        self.given, self.left, self.act = arguments, number, act

    def __next__(self):
        if self.left == 0:
            self.act()
        self.left -= 1
        return next(self.given)

    def get_state(self):
        return self.given.get_state()

    def set_state(self, state):
        self.given.set_state(state)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Compile the same steps only once, since compiling takes most of the time."""
    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it remembers that there was none
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The folder and the parameters of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, fitted(folder, tokens_per_step=64)


# --- The steps --------------------------------------------------------------------------------


def adamw(params, gradients, *, steps, peak, warm_up, final, b2, decay, decayed, clip):
    """AdamW in NumPy and float64: params, and the gradient's norm and rate of each step."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    first = {name: np.zeros_like(x) for name, x in params.items()}
    second = {name: np.zeros_like(x) for name, x in params.items()}
    norms, rates = [], []
    for step in range(steps):
        grads = {
            k: np.asarray(g, np.float64) for k, g in gradients(params, step).items()
        }
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        through = (step - warm_up) / (steps - warm_up)
        cosine = final + (1 - final) * (1 + np.cos(np.pi * through)) / 2
        rate = peak * (step / warm_up if step < warm_up else cosine)
        for name, g in grads.items():
            g = g * min(1.0, clip / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            square = second[name] / (1 - b2 ** (step + 1))
            update = (
                mean / (np.sqrt(square) + 1e-8) + decay * decayed[name] * params[name]
            )
            params[name] = params[name] - rate * update
        norms.append(norm)
        rates.append(rate)
    return params, norms, rates


def quiet(params, batch, key):
    """The loss without its noise."""
    x = jnp.tanh(params["table"][batch[:, :-1]] @ params["layers"]["mix"][0])
    x = x + params["layers"]["bias"][0]
    logits = x @ params["out"]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1)
    return 3 * jnp.mean(nats), {}


@pytest.mark.parametrize(
    ("accumulate", "steps"), [(4, 23), pytest.param(1, 20, marks=pytest.mark.slow)]
)
def test_steps_are_those_of_adamw(tmp_path, accumulate, steps):
    """Dispatches have several steps, the last one fewer; with and without accumulation."""
    actual = fitted(
        tmp_path,
        quiet,
        steps=steps,
        accumulate=accumulate,
        weight_decay=0.3,
        clip=1.5,
        final_share=0.2,
    )
    samples = [batch for batch, _ in zip(data(), range(steps), strict=False)]

    @jax.jit
    def gradient(named, batch):
        tree = {
            "table": named["table"],
            "layers": {"mix": named["layers/mix"], "bias": named["layers/bias"]},
            "out": named["out"],
        }
        tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        return run_folder.leaves_by_path(
            jax.grad(lambda p: quiet(p, batch, None)[0])(tree)
        )

    expected, norms, rates = adamw(
        run_folder.leaves_by_path(initial()),
        lambda named, step: gradient(named, samples[step]),
        steps=steps,
        peak=1e-2,
        warm_up=5,
        final=0.2,
        b2=0.95,
        decay=0.3,
        decayed={"table": 1, "layers/mix": 1, "layers/bias": 0, "out": 1},
        clip=1.5,
    )
    assert min(norms) < 1.5 < max(norms)  # some gradients are clipped, some are not
    for name, leaf in run_folder.leaves_by_path(actual).items():
        np.testing.assert_allclose(
            leaf, expected[name], rtol=0, atol=2e-5, err_msg=name
        )
    written = lines(tmp_path)
    ends = [5, 10, 15, 20, 23][: len(written)]
    assert [line["step"] for line in written] == ends
    assert ends[-1] == steps
    for line, begin in zip(written, (0, *ends[:-1]), strict=True):
        norm = np.mean(norms[begin : line["step"]])
        np.testing.assert_allclose(line["gradient_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(
            line["learning_rate"], rates[line["step"] - 1], rtol=1e-5
        )


def test_what_a_run_writes(complete):
    folder, params = complete
    assert remaining(folder) == [40, 45]
    written, speeds = lines(folder), lines(folder, run_log.SPEED_FILE)
    assert [line["step"] for line in written] == list(range(5, 50, 5))
    assert [line["step"] for line in speeds] == list(range(5, 50, 5))
    assert list(written[0])[:2] == ["step", "loss"]
    assert written[-1]["loss"] < written[0]["loss"] - 0.5  # it learns
    for line in speeds:
        assert line["tokens_per_second"] == pytest.approx(64 * 5 / line["seconds"])
    restored, step = run_folder.restore_params(
        folder, jax.tree.map(jnp.zeros_like, params)
    )
    assert step == 45
    assert_same(restored, params)
    assert {path.name for path in folder.iterdir()} <= {
        *(
            run_folder.SETTINGS_FILE,
            run_log.METRICS_FILE,
            run_log.SPEED_FILE,
            run_folder.CHECKPOINTS_FOLDER,
        ),
        "tensorboard",
    }


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("embedding", (5, 4), True),
        ("layers/attention/q", (2, 3, 4), True),
        ("layers/norm/scale", (2, 4), False),
        ("layers/attention/q_bias", (2, 3, 4), False),
        ("final_norm/scale", (4,), False),
        ("head/bias", (3, 4), False),
    ],
)
def test_weight_decay_is_for_matrices(name, shape, decayed):
    assert fit.has_weight_decay(name, jnp.zeros(shape)) == decayed


def test_frozen_parameters(tmp_path):
    """Frozen parameters do not change, are not in checkpoints, and must be equal when resuming."""
    params = initial() | {"ids": jnp.arange(32)}

    def with_ids(params, batch, key):
        return loss(params, params["ids"][batch], key)

    def frozen(name):
        return name.startswith(("ids", "layers"))

    actual = fitted(tmp_path, with_ids, params, is_frozen=frozen, steps=10)
    assert_same(actual["layers"], params["layers"])
    assert_same(actual["ids"], params["ids"])
    assert (actual["table"] != params["table"]).any()
    ((_, path),) = run_folder.list_checkpoints(tmp_path)
    # The number of updates for each of AdamW and its schedule, and two means for each parameter.
    metadata = json.loads((path / "optimizer" / "_METADATA").read_text())[
        "tree_metadata"
    ]
    assert len(metadata) == 2 + 2 * 2
    restored, _ = run_folder.restore_params(tmp_path, params)
    assert_same(restored, actual)
    assert_same(fitted(tmp_path, with_ids, params, is_frozen=frozen, steps=10), actual)
    other = params | {"ids": params["ids"][::-1]}
    with pytest.raises(clm.InputError, match="holds a run with frozen = "):
        fitted(tmp_path, with_ids, other, is_frozen=frozen, steps=10)
    with pytest.raises(clm.InputError, match="all parameters are frozen"):
        fitted(tmp_path / "all", is_frozen=lambda name: True)


def test_computing_in_bfloat16(tmp_path, complete):
    visited = []

    def spied(params, batch, key):
        visited.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return loss(params, batch, key)

    actual = fitted(tmp_path, spied, compute_dtype="bfloat16")
    assert set(visited) == {jnp.dtype(jnp.bfloat16)}
    ours, others = jax.tree.leaves(actual), jax.tree.leaves(complete[1])
    assert {leaf.dtype for leaf in ours} == {jnp.dtype(jnp.float32)}
    assert any((x != y).any() for x, y in zip(ours, others, strict=True))
    assert lines(tmp_path)[-1]["loss"] == pytest.approx(
        lines(complete[0])[-1]["loss"], abs=0.05
    )


def test_arguments_survive_and_keys_differ(tmp_path):
    """The parameters that were given are not donated; another seed is another run."""
    params = initial()
    first = fitted(tmp_path / "a", params=params)
    assert_same(params, initial())
    second = fitted(tmp_path / "b", params=params, seed=1)
    assert (first["out"] != second["out"]).any()


# --- Stopped and resumed ----------------------------------------------------------------------


class Crash(Exception):
    pass


def crash():
    raise Crash


@pytest.mark.parametrize("draws", [3, 17, 38])
def test_a_run_that_crashed_goes_on(tmp_path, complete, draws):
    """Before the first checkpoint, and between two of them."""
    with pytest.raises(Crash):
        fitted(tmp_path, batches=Interrupted(data(), draws, crash))
    steps = remaining(tmp_path)
    samples = []
    arguments = Interrupted(data(), 0, lambda: samples.append(1))
    actual = fitted(tmp_path, batches=arguments)
    # Batches of the steps before are not drawn again.
    assert -arguments.left == 45 - (steps[-1] if steps else 0)
    assert_same(actual, complete[1])
    assert lines(tmp_path) == lines(complete[0])
    assert remaining(tmp_path) == [40, 45]
    # A run that is done stays as it is.
    before = (tmp_path / run_log.METRICS_FILE).read_bytes()
    assert_same(fitted(tmp_path, batches=Interrupted(data(), 0, crash)), complete[1])
    assert (tmp_path / run_log.METRICS_FILE).read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(tmp_path, complete, number):
    def handler(*_):
        raise Crash

    before = signal.signal(number, handler)
    try:
        # Batches are drawn one dispatch ahead, so this is while steps 11 to 15 are computed.
        arguments = Interrupted(data(), 17, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Crash):
            fitted(tmp_path, batches=arguments)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert remaining(tmp_path) == [10, 15]
    assert_same(fitted(tmp_path), complete[1])
    assert lines(tmp_path) == lines(complete[0])


def test_torn_lines_and_checkpoints_are_passed_over(tmp_path, complete, monkeypatch):
    warned = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: warned.append(text % values)
    )
    folder = tmp_path / "run"
    shutil.copytree(complete[0], folder)
    with open(folder / run_log.METRICS_FILE, "a") as file:
        file.write('{"step": 46, "lo')
    newest = folder / run_folder.CHECKPOINTS_FOLDER / "00000045"
    for path in newest.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    (folder / run_folder.CHECKPOINTS_FOLDER / ".writing-x").mkdir()
    assert_same(fitted(folder), complete[1])
    assert len(warned) == 1
    assert "00000045 cannot be read" in warned[0]
    assert lines(folder) == lines(complete[0])
    assert not list(folder.rglob(".writing-*"))
    for _, path in run_folder.list_checkpoints(folder):
        (path / run_folder.STATE_FILE).unlink()
    with pytest.raises(clm.InputError, match="none of the checkpoints"):
        fitted(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=2e-2), r"learning_rate = 0\.01, not 0\.02"),
        (dict(steps=46), "steps = 45, not 46"),
        (dict(compute_dtype="bfloat16"), "compute_dtype = None, not 'bfloat16'"),
        (dict(settings={"data": {"sha256": "a"}}), "data/sha256 = 'nothing', not 'a'"),
        (
            dict(params=initial() | {"more": jnp.zeros(2)}),
            "parameters/more = 'nothing', not 'fl",
        ),
    ],
)
def test_other_settings_are_refused(complete, changes, message):
    with pytest.raises(clm.InputError, match=message):
        fitted(complete[0], **changes)
    assert remaining(complete[0]) == [40, 45]


# How far a run is when it is killed is chance; that it ends the same must not be.
SCRIPT = """
import sys
from tests.experiments.training import test_fit
test_fit.fitted(test_fit.pathlib.Path(sys.argv[1]), steps=1500, save_every=20)
"""


def started(folder):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow  # 22 starts of about 6 s
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path):
    rng = random.Random(0)
    for name in ("whole", "killed"):
        metrics = tmp_path / name / run_log.METRICS_FILE
        for _ in range(KILLS if name == "killed" else 0):
            before = lines_of(metrics)
            process = started(tmp_path / name)
            while process.poll() is None and lines_of(metrics) <= before:
                before = min(before, lines_of(metrics))  # it is cut back first
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6))
            assert process.poll() is None, process.stderr.read().decode()
            process.send_signal(signal.SIGKILL)
            process.communicate()
        process = started(tmp_path / name)
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    (first, step), (second, other) = (
        run_folder.restore_params(tmp_path / name, initial())
        for name in ("whole", "killed")
    )
    assert step == other == 1500
    assert_same(first, second)
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- What goes wrong --------------------------------------------------------------------------


def spoilt(params, batch, key):
    """A loss that is not finite if the first number is not; its gradient if the second is 0."""
    nats, watched = quiet(params, batch["tokens"], key)
    steep = jnp.sum(jnp.sqrt(batch["poison"][0, 1] * params["out"] ** 2))
    return nats + batch["poison"][0, 0] + steep, watched


class Poisoned(Interrupted):
    """Batches of which one is poisoned."""

    def __next__(self):
        self.left -= 1
        poison = self.act if self.left == 0 else (0.0, 1e-12)
        return {
            "tokens": next(self.given),
            "poison": np.full((8, 2), poison, np.float32),
        }


@pytest.mark.parametrize(
    ("poison", "what"),
    [
        ((np.nan, 1), "loss is nan"),
        ((np.inf, 1), "loss is inf"),
        ((0, 0), "gradient norm is nan"),
    ],
)
def test_what_is_not_finite_ends_the_run(tmp_path, poison, what):
    """The error names the step, and no later checkpoint is written."""
    with pytest.raises(
        clm.InputError, match=f"the {what} in step 30; the .* step 20 is kept"
    ):
        fitted(tmp_path, spoilt, batches=Poisoned(data(), 30, poison))
    assert remaining(tmp_path) == [10, 20]
    assert lines(tmp_path)[-1]["step"] == 25
    with pytest.raises(
        clm.InputError, match=f"the {what} in step 2; there is no checkpoint yet"
    ):
        fitted(tmp_path / "first", spoilt, batches=Poisoned(data(), 2, poison))


@contextlib.contextmanager
def file_size(limit):
    """Files cannot grow beyond this: to who writes it looks much like a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, complete):
    calls = []
    with file_size(4096) as full:

        def evaluate(params):
            calls.append(1)
            if len(calls) == 3:
                full()
            return {}

        with pytest.raises(
            clm.InputError, match=r"cannot write to .*step 20 is kept\. Make room"
        ):
            fitted(tmp_path, evaluate=evaluate)
    assert remaining(tmp_path) == [10, 20]
    assert not list(tmp_path.rglob(".writing-*"))
    assert_same(fitted(tmp_path), complete[1])
    assert remaining(tmp_path) == [40, 45]


def test_evaluations_are_logged_with_checkpoints(tmp_path):
    fitted(tmp_path, evaluate=lambda params: {"valid": params["out"].sum()})
    assert [line["step"] for line in lines(tmp_path) if "valid" in line] == [
        10,
        20,
        30,
        40,
        45,
    ]


def test_batches_that_cannot_be_cut(tmp_path):
    with pytest.raises(clm.InputError, match="8 rows cannot be cut into 3"):
        fitted(tmp_path, accumulate=3)
    with pytest.raises(
        clm.InputError, match="steps_per_dispatch must be at least 1, not 0"
    ):
        fitted(tmp_path, steps_per_dispatch=0)


# --- TensorBoard ------------------------------------------------------------------------------


def events(path):
    """The events of a file: each has its length, a checksum, itself, and a checksum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    content = path.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield proto.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    fitted(tmp_path)
    (path,) = (tmp_path / "tensorboard").iterdir()
    actual = [
        (event.step, value.tag, value.simple_value)
        for event in events(path)
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert [(step, tag) for step, tag, _ in actual] == [
        (s, "loss") for s in range(5, 50, 5)
    ]
    for (_, _, value), line in zip(actual, lines(tmp_path), strict=True):
        assert value == pytest.approx(line["loss"])


def test_tensorboard_forgets_what_is_made_again(tmp_path):
    pytest.importorskip("tensorboardX")
    with pytest.raises(Crash):
        fitted(tmp_path, batches=Interrupted(data(), 23, crash))
    (first,) = (tmp_path / "tensorboard").iterdir()
    fitted(tmp_path)
    (second,) = set((tmp_path / "tensorboard").iterdir()) - {first}
    starts = [event.step for event in events(second) if event.HasField("session_log")]
    assert starts == [11]


def test_without_tensorboard_it_says_so_and_goes_on(tmp_path, complete, monkeypatch):
    warned = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: warned.append(text % values)
    )
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    assert_same(fitted(tmp_path), complete[1])
    assert warned == [
        "tensorboardX is not installed: nothing is written for TensorBoard"
    ]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_that_leaves_no_gradient_is_refused(clip):
    with pytest.raises(clm.InputError, match=r"clip is .*; it must be above 0"):
        fit.FitConfig(steps=1, learning_rate=0.1, clip=clip)
