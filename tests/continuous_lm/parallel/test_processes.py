import jax
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.analysis.sweep import pmap_sweep
from continuous_lm.parallel import processes
from continuous_lm.parallel.mesh import make_mesh
from tests.fixtures import many_devices

# --- Meshes ---------------------------------------------------------------------------------------


def test_mesh_of_one_device():
    mesh = make_mesh("data=1")
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert make_mesh().size == jax.device_count()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data",
        "data=0",
        "data=-1",
        "data=1,data=1",
        "rows=2",
        "data=1.5",
        "data=1;model=1",
    ],
)
def test_malformed_meshes_are_refused(text):
    with pytest.raises(clm.InputError, match="data=2,model=4"):
        make_mesh(text)


def test_meshes_of_too_many_devices_are_refused():
    with pytest.raises(clm.InputError, match="takes 4096 devices, and there are"):
        make_mesh("data=64,model=64")


MANY = """
from continuous_lm.parallel.mesh import make_mesh

from continuous_lm.analysis import sweep_batches
from continuous_lm.analysis.sweep import pmap_sweep

import jax, numpy as np
import jax.numpy as jnp
import continuous_lm as clm
from continuous_lm import axes
from continuous_lm.parallel import processes
from continuous_lm.parallel import pmap

assert jax.device_count() == 8
assert dict(make_mesh("model=4, data=2").shape) == {"data": 2, "model": 4}
assert dict(make_mesh("model=2").shape) == {"data": 1, "model": 2}  # of the first devices
assert dict(make_mesh().shape) == {"data": 8, "model": 1}

mesh = make_mesh("data=2,model=4")
x = np.arange(4 * 3 * 8.0, dtype=np.float32).reshape(4, 3, 8)
y = axes.place(mesh, x, "B T F")
assert {s.data.shape for s in y.addressable_shards} == {(2, 3, 2)}
np.testing.assert_array_equal(y, x)
z = jax.jit(lambda x: axes.place(mesh, 2 * x, "B - F"))(x)
assert z.sharding.is_equivalent_to(y.sharding, 3)
assert axes.place(None, x, "B T F") is x
assert axes.place(mesh, x, "- T -").sharding.is_fully_replicated
assert axes.place(mesh, x[:3], "B T F").sharding.spec[0] is None  # 2 does not divide 3

rows = {"a": np.arange(11.0), "b": np.ones((11, 2), np.float32)}
shapes = []
def double(shared, rows):
    shapes.append(rows["a"].shape)
    return {"sum": shared * (rows["a"] + rows["b"].sum(1))}
for devices, shape in ((None, (2,)), (jax.devices()[:3], (4,))):  # of 11 rows
    doubled = pmap.pmap_rows(double, devices)(np.float32(2.0), rows)
    np.testing.assert_array_equal(doubled["sum"], 2 * np.arange(11.0) + 4)
    assert shapes[-1] == shape

lm = clm.load("apples", dtype="float32")
tokens = np.array(lm.tokenizer.encode("apple apple apple").ids)
d = np.linspace(0.1, 1.0, 11)[:, None] * np.ones(len(tokens), np.float32)
groups = [[1], [2, 3], []]
one = clm.sweep.probabilities(lm, groups, tokens=tokens, durations=d)
many = pmap_sweep(lm, groups, tokens=tokens, durations=d)
assert many.shape == one.shape == (11, 3)
np.testing.assert_allclose(many, one, atol=1e-5)
assert np.ptp(one, axis=0).max() > 1e-4  # else anything would do

sweep_batches.MIN_SAVED_FLOPS = 0  # so that what the points share is computed apart
tokens = np.tile(tokens, 3)
d = np.ones((11, len(tokens)), np.float32)
d[:, 5:] = np.linspace(0.1, 1.0, 11)[:, None]
one = clm.sweep.probabilities(lm, groups, tokens=tokens, durations=d)
assert np.ptp(one, axis=0).max() > 1e-4
for shape in ("data=8", "data=2,model=4"):
    spread = clm.load("apples", dtype="float32", mesh=make_mesh(shape))
    many = clm.sweep.probabilities(spread, groups, tokens=tokens, durations=d, batch_size=6)
    np.testing.assert_allclose(many, one, atol=1e-5)
"""


def test_placement_pmap_and_sweeps_on_eight_devices():
    many_devices.run_on_devices(MANY)


def test_pmap_sweep_refuses_wrong_arguments():
    lm = clm.load("apples", dtype="float32")
    for arguments, why in (
        ({"tokens": [1, 2]}, "number of points"),
        ({"tokens": [1, 2], "durations": np.ones((0, 2))}, "number of points"),
    ):
        with pytest.raises(clm.InputError, match=why):
            pmap_sweep(lm, [[1]], **arguments)
    with pytest.raises(clm.InputError, match="group 0"):
        pmap_sweep(lm, [[10**6]], tokens=[1, 2], durations=np.ones((3, 2)))


# --- Processes ------------------------------------------------------------------------------------


def test_collectives_of_a_single_process():
    assert processes.is_first_process()
    assert processes.broadcast_from_first({"a": [1]}) == {"a": [1]}
    assert processes.any_process(True)
    assert not processes.any_process(False)
    np.testing.assert_array_equal(
        processes.gather_to_hosts({"x": jax.numpy.ones(2)})["x"], np.ones(2)
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((None, 2, 0), "coordinator is missing"),
        (("localhost", 2, 0), "host:port"),
        (("localhost:http", 2, 0), "host:port"),
        (("localhost:70000", 2, 0), "host:port"),
        (("localhost:1234", None, 0), "num_processes is missing"),
        (("localhost:1234", 2, None), "process_id is missing"),
        (("localhost:1234", 2, 2), "process_id is 2"),
        (("localhost:1234", 0, 0), "process_id is 0"),
        (("auto", 2, None), "leave out num_processes"),
    ],
)
def test_incomplete_arguments_of_initialize_are_refused(monkeypatch, arguments, why):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    with pytest.raises(clm.InputError, match=why):
        processes.initialize(*arguments)


def test_malformed_environment_variables_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(clm.InputError, match="num_processes is 'two'"):
        processes.initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    with pytest.raises(clm.InputError, match="process_id is 3"):
        processes.initialize()


def test_missing_processes_are_named():
    address = f"localhost:{many_devices.find_free_port()}"
    with pytest.raises(
        clm.InputError, match=r"of 3 processes these have not come: \[1, 2\]"
    ):
        processes.initialize(address, 3, 0, startup_timeout=1)
    with pytest.raises(clm.InputError, match="process 0 does not answer"):
        processes.initialize(address, 3, 1, startup_timeout=1)


# The watchdog is tested without JAX's distributed runtime, which it does not need.
WATCHED = """
from continuous_lm.parallel.watchdog import Watchdog

import os, sys, threading, time
from continuous_lm.parallel import processes

number, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watch = Watchdog(number, 2, heartbeat_timeout=2.0)
watch.connect_all("localhost", port, 60.0)
watch.start()
print("met", flush=True)
if number == 1:
    time.sleep(0.5)
    if how == "silent":
        os.kill(os.getpid(), 19)  # SIGSTOP
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "raises":
        raise RuntimeError("of its own")
    sys.exit()
time.sleep(4.0 if how == "well" else 60.0)
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("killed", "process 1 has ended early"),
        pytest.param("raises", "process 1 has ended early", marks=pytest.mark.slow),
        ("silent", "nothing was heard of process 1 for 2 seconds"),
        pytest.param("well", None, marks=pytest.mark.slow),
    ],
)
def test_one_lost_process_ends_the_other(how, why):
    port = str(many_devices.find_free_port())
    commands = [("-c", WATCHED, str(i), port, how) for i in (0, 1)]
    with many_devices.run_processes(commands, 1) as (first, second):
        _, message = first.communicate(timeout=60)
        if how != "silent":
            _, other_message = second.communicate(timeout=60)
            assert ("of its own" in other_message) == (how == "raises")
    if why is None:
        assert (first.returncode, message) == (0, "")
        assert (second.returncode, other_message) == (0, "")
        return
    assert first.returncode == 1, message
    assert (
        message
        == f"\nerror: {why}, so process 0 ends too; start all again with the same flags to go on\n"
    )
