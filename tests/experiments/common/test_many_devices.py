"""Every program's numbers on meshes of eight devices, by pmap, and in two processes."""

import json
import math
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from continuous_lm.experiments.common import program
from continuous_lm.experiments.training import run_folder
from tests.fixtures import many_devices
from tests.fixtures.programs import call_program, run_all, run_program
from tests.fixtures.text_programs import write_text

MESHES = ("--mesh=data=8", "--mesh=model=8", "--mesh=data=4,model=2")
PMAP = "--pmap"
slow = pytest.mark.slow

# --- Refused --------------------------------------------------------------------------------------

REFUSED = {
    "counting": {
        "--mesh=rows=2": "data=2,model=4",
        "--mesh=data=2": "takes 2 devices, and there are 1",
        "--process_id=0": "--process_id: it is of several processes",
        "--heartbeat_timeout=9": "there is no --coordinator",
        "--coordinator=here --num_processes=2 --process_id=0": "host:port",
        "--coordinator=localhost:1234 --process_id=0": "num_processes is missing",
        "--coordinator=localhost:1234 --pmap": "--pmap is for one process",
        "--pmap --mesh=data=1": "two ways to the same",
        "--compilation_cache=/dev/null/x": "cannot be written",
    },
    "attribution": {"--pmap": "Unknown command line flag 'pmap'"},
    "compare_heads": {"--mesh=data=1": "Unknown command line flag 'mesh'"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_flags_are_read_or_refused(name, tmp_path):
    for options, why in REFUSED[name].items():
        status, _, stderr = call_program(tmp_path, name, *options.split())
        assert status == 1, options
        assert why in stderr
        assert len(stderr.splitlines()) == 1, stderr


def test_what_was_compiled_is_kept_unless_told_otherwise(monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program._enable_compilation_cache(program.RunConfig())
    folder = tmp_path / "continuous_lm" / "jax"
    assert updates == {"jax_compilation_cache_dir": str(folder)}
    assert folder.is_dir()
    updates.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    program._enable_compilation_cache(program.RunConfig())
    assert not updates
    program._enable_compilation_cache(program.RunConfig(compilation_cache="none"))
    assert updates == {"jax_enable_compilation_cache": False}
    own_folder = str(tmp_path / "own")
    program._enable_compilation_cache(program.RunConfig(compilation_cache=own_folder))
    assert updates["jax_compilation_cache_dir"] == own_folder


# --- Meshes and pmap ------------------------------------------------------------------------------


def run_on_eight(cwd, commands):
    """Programs, each a name and its flags, run in one process that sees eight devices."""
    run_all(cwd, commands, many_devices.device_environment(8))


def assert_close(one, other, where=""):
    """Assert equality, numbers to 1e-5, except for the record of the run."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        # Times differ between runs, and the order of equal values is arbitrary.
        for name in one.keys() - {"run", "microseconds", "order", "best_duration"}:
            assert_close(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, f"{where}/{i}")
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-5), (where, one, other)
    else:
        assert one == other, where


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


FRAMES = (
    "--seconds=8 --held_out_seconds=4 --steps=2 --batch_size=2 --length=24 --prompt=6 --codes=8"
    " --components=2 --hidden_size=16 --num_heads=2 --num_layers=1 --bands=12 --samples=2"
    " --iterations=3"
).split()
SWEEPS = {
    "counting": (("--points=13",), (*MESHES, PMAP)),
    "study": (("--limit=4", "--points=5"), (*MESHES, PMAP)),
    "interpolation": (("--points=6",), (MESHES[2], PMAP)),
    "attribution": (("--nodes=4",), MESHES),
    "inverse": (("--steps=2",), MESHES),
    "pruning": (("--steps=2",), MESHES),
    "evaluate_apples": (("--held_out_prompts=8",), MESHES[2:]),
    "frames": (FRAMES, MESHES[2:]),
} | dict.fromkeys(
    ("boolean", "events", "sums", "shifting"), (("--points=5",), (MESHES[2], PMAP))
)


@slow
@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_and_searches(name, tmp_path):
    arguments, ways = SWEEPS[name]
    commands = [
        (name, *arguments, *way.split(), f"--output_dir={i}")
        for i, way in enumerate(("", *ways))
    ]
    run_on_eight(tmp_path, commands)
    actual = [read(tmp_path / str(i) / f"{name}.json") for i in range(len(commands))]
    for way, other in zip(ways, actual[1:], strict=True):
        assert_close(actual[0], other, way)


TRAIN = "--data=text.txt --batch_size=8 --steps=6 --save_every=6 --accumulate=1".split()
TRUNK = "--hidden_size=16 --num_layers=1 --num_heads=2 --length=16".split()
NEW = "--vocab_size=280"  # of the tokenizer, where no model brings one
BASELINE = [*TRAIN, *TRUNK, NEW]
STAGES = {
    "baseline": ("train_lm", BASELINE),
    "density": (
        "train_density",
        [*TRAIN, *TRUNK, "--head=mixture", "--table_from=baseline0"],
    ),
    "codec": (
        "train_autoencoder",
        [*TRAIN, NEW, "--hidden_size=16", "--latent_size=8"],
    ),
    "calm": ("train_calm", [*TRAIN, *TRUNK, "--codec=codec0"]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the models of all stages, trained on one device and on meshes."""
    folder = tmp_path_factory.mktemp("many")
    write_text(folder)
    commands = [
        (program_name, *arguments, *way.split(), f"--output_dir={name}{i}")
        for name, (program_name, arguments) in STAGES.items()
        for i, way in enumerate(("", *MESHES))
    ]
    run_on_eight(folder, commands)
    return folder


@slow
@pytest.mark.parametrize("name", STAGES)
def test_training(name, trained):
    one = trained / f"{name}0"
    for i, _ in enumerate(MESHES, 1):
        other = trained / f"{name}{i}"
        assert_close(read(one / "run/metrics.jsonl"), read(other / "run/metrics.jsonl"))
        for path in one.glob("*.safetensors"):
            weights = load_file(other / path.name)
            for tensor, value in load_file(path).items():
                np.testing.assert_allclose(weights[tensor], value, rtol=1e-5, atol=1e-5)


@slow
def test_training_by_pmap(tmp_path):
    write_text(tmp_path)
    arguments = [*BASELINE, "--accumulate=8"]
    one = ("train_lm", *arguments, "--output_dir=one")
    by_pmap = ("train_lm", *arguments, PMAP, "--output_dir=pmap")
    run_on_eight(tmp_path, [one, by_pmap])
    one, other = (
        read(tmp_path / name / "run/metrics.jsonl") for name in ("one", "pmap")
    )
    assert_close(one, other)


EVALUATED = {
    "evaluate": "--models=baseline0,density0,calm0 --data=text.txt --length=16 --windows=8"
    " --positions=16 --context=8",
    "sample_density": "--model=density0 --samples=2 --max_new_tokens=6",
    "sample_calm": "--model=calm0 --samples=2 --max_new_tokens=8",
    "compare_quantizers": "--model=density0 --data=text.txt --length=16 --codes=32 --stages=2"
    " --windows=4",
}


@slow
@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_and_samples(name, trained):
    file_name = "sample" if name.startswith("sample_") else name
    folders = [f"results/{name}{i}" for i in range(len(MESHES) + 1)]
    commands = [
        (name, *EVALUATED[name].split(), *way.split(), f"--output_dir={folder}")
        for way, folder in zip(("", *MESHES), folders, strict=True)
    ]
    run_on_eight(trained, commands)
    actual = [read(trained / folder / f"{file_name}.json") for folder in folders]
    for way, other in zip(MESHES, actual[1:], strict=True):
        assert_close(actual[0], other, way)


FIT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from continuous_lm import axes
from continuous_lm.errors import InputError
from continuous_lm.experiments.training import fit, window_batches
from continuous_lm.parallel.mesh import make_mesh

params = {"matrix": jnp.linspace(-1.0, 1.0, 32).reshape(4, 8), "bias": jnp.zeros(8)}

def loss(params, batch, key):  # with noise, of which every micro-batch draws its own
    x = batch[..., :4] + 0.1 * jax.random.normal(key, batch[..., :4].shape)
    return jnp.mean((x @ params["matrix"] + params["bias"] - 1.0) ** 2), {"mean": jnp.mean(x)}

data = np.random.default_rng(0).standard_normal((500, 5)).astype(np.float32)
def train(name, params=params, **options):
    rows = window_batches.shuffled_windows(data, length=3, batch_size=32, seed=0)
    options = {"steps": 20, "learning_rate": 1e-2, "accumulate": 16, "save_every": 10} | options
    config = fit.FitConfig(**options)
    return fit.fit(loss, params, rows, folder=f"{sys.argv[1]}/{name}", config=config)

def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)

one = train("one")
close(train("pmap", pmap=True), one)
try:
    train("uneven", pmap=True, accumulate=4)
except InputError as error:
    assert "accumulate must be a multiple" in str(error)
else:
    raise AssertionError

mesh, other = make_mesh("data=2,model=4"), make_mesh("data=8")
def on(mesh):
    letters = {"matrix": "D F", "bias": "F"}
    return {name: axes.place(mesh, x, letters[name]) for name, x in params.items()}

assert not on(mesh)["matrix"].sharding.is_fully_replicated
close(train("mesh", on(mesh)), one)
# Half of a run on one mesh, the rest on another, or by pmap, or on one device.
import shutil
shutil.rmtree(f"{sys.argv[1]}/mesh/checkpoints/00000020")
for name, given in {"again": on(other), "alone": params}.items():
    shutil.copytree(f"{sys.argv[1]}/mesh", f"{sys.argv[1]}/{name}")
    new = train(name, given)
    close(new, one)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(given)):
        assert a.sharding == b.sharding, (a.sharding, b.sharding)
"""


@slow
def test_training_on_meshes_and_by_pmap(tmp_path):
    many_devices.run_on_devices(FIT, 8, str(tmp_path))


# --- Two processes --------------------------------------------------------------------------------


def together(cwd, name, *arguments):
    """`many_devices.run_processes` of a program in two processes of four devices."""
    address = f"localhost:{many_devices.find_free_port()}"
    message = (
        f"--coordinator={address}",
        "--num_processes=2",
        "--heartbeat_timeout=20",
    )
    return many_devices.run_processes(
        [
            ("-m", "continuous_lm", name, *arguments, *message, f"--process_id={i}")
            for i in (0, 1)
        ],
        cwd=cwd,
    )


def assert_all_end(processes):
    for process in processes:
        _, message = process.communicate(timeout=600)
        assert process.returncode == 0, message


@slow
def test_a_sweep_in_two_processes(tmp_path):
    status, _, stderr = run_program(
        tmp_path, "counting", "--points=9", "--output_dir=one"
    )
    assert status == 0, stderr
    arguments = ("--points=9", "--mesh=data=4,model=2", "--output_dir=two")
    with together(tmp_path, "counting", *arguments) as processes:
        assert_all_end(processes)
    one, two = (read(tmp_path / name / "counting.json") for name in ("one", "two"))
    assert_close(one, two)
    assert two["run"]["num_processes"] == 2
    assert two["run"]["num_devices"] == 8
    assert two["run"]["flags"]["process_id"] == 0


@slow
@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_two_processes_is_killed_and_the_run_goes_on(lost, tmp_path):
    write_text(tmp_path)
    arguments = [*BASELINE, "--steps=60", "--save_every=10"]
    with together(
        tmp_path, "train_lm", *arguments, "--mesh=data=4,model=2"
    ) as processes:
        deadline = time.monotonic() + 600
        while not run_folder.list_checkpoints(tmp_path / "results/train_lm/run"):
            assert time.monotonic() < deadline
            assert processes[0].poll() is None, processes[0].communicate()[1]
            time.sleep(0.1)
        processes[lost].kill()
        began = time.monotonic()
        _, message = processes[1 - lost].communicate(timeout=60)
        assert time.monotonic() - began < 20  # --heartbeat_timeout
        assert processes[1 - lost].returncode == 1, message
        assert message.splitlines()[-1].startswith(
            f"error: process {lost} has ended early"
        ), message
    created = [
        step
        for step, _ in run_folder.list_checkpoints(tmp_path / "results/train_lm/run")
    ]
    assert created[-1] < 60  # or there was nothing left to resume

    with together(tmp_path, "train_lm", *arguments, "--mesh=data=8") as processes:
        assert_all_end(processes)
    status, _, stderr = run_program(
        tmp_path, "train_lm", *arguments, "--output_dir=results/one"
    )
    assert status == 0, stderr
    one, two = (tmp_path / "results" / name for name in ("one", "train_lm"))
    assert_close(read(one / "run/metrics.jsonl"), read(two / "run/metrics.jsonl"))
