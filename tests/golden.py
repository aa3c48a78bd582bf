"""Golden outputs: the stored outputs of every program, run small, and their comparison.

    python -m tests.golden [GROUP...]          # run the programs, print the numbers that moved
    python -m tests.golden --write [GROUP...]  # store the numbers again, of some groups or all
    python -m tests.golden --noise [GROUP...]  # measure again how other compilers move them

A group is the first part of a name in PROGRAMS.
"""

import argparse
import contextlib
import gzip
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with numpy)
import numpy as np
from safetensors.numpy import load_file

from tests.fixtures.programs import REPOSITORY_ROOT, run_all

STORED = pathlib.Path(__file__).with_name("golden_outputs.json.gz")
TOLERANCE = 1e-6  # relative to the larger number, in an array to its largest
# Another CPU rounds float32 operations differently. A number of order 1 moves by some 1e-7, and so
# does a small difference of such numbers (1 - the sum of probabilities).
ROUNDING = 1e-6  # absolute, allowed in addition on another machine

# --- The programs -----------------------------------------------------------------------------

MODEL = "--hidden_size=16 --num_layers=1 --num_heads=2"
TRAIN = "--data=text.txt --batch_size=4 --steps=3 --save_every=3 --warm_up=1"
DENSITY = f"{TRAIN} {MODEL} --length=16"
NEXT = f"{TRAIN} {MODEL} --codec=codec --length=8"
EVAL = "--data=text.txt --length=16"
ABLATE = f"{EVAL} --codes=16 --stages=2 --windows=2 --candidates=4"

# group/name: (module, flags). A group's programs run in this order in one folder, in which each
# writes to the folder of its name, and text.txt lies.
PROGRAMS: dict[str, tuple[str, str]] = {
    "sweeps/counting": ("counting", "--points=8"),
    "sweeps/counting_mass": (
        "counting",
        "--points=8 --change=mass --word=cat --batch_size=3",
    ),
    "sweeps/counting_times": (
        "counting",
        "--points=8 --change=times --answer_tokens=paper",
    ),
    "sweeps/counting_bfloat16": ("counting", "--points=4 --dtype=bfloat16"),
    "sweeps/events": ("events", "--points=8 --scene=zoo"),
    "sweeps/sums": ("sums", "--points=8 --shrink=1"),
    "sweeps/interpolation": ("interpolation", "--points=8"),
    "sweeps/interpolation_spherical": (
        "interpolation",
        "--points=8 --path=spherical --words=cats,dogs --template='We bought two [] at the'",
    ),
    "sweeps/boolean": ("boolean", "--points=4"),
    "sweeps/translation": ("shifting", "--points=8"),
    "sweeps/scaling": ("shifting", "--points=8 --transform=scaling"),
    "studies/counting": ("study", "--study=counting --limit=3 --points=6"),
    "studies/tutorials": ("study", "--study=tutorials --limit=2 --points=6"),
    "studies/sums": ("study", "--study=sums --limit=3 --points=6"),
    "studies/words": ("study", "--study=words --limit=4 --points=6"),
    "studies/analysis": ("analysis", "--studies=counting,tutorials,sums,words"),
    "gradients/attribution": ("attribution", "--nodes=8"),
    "gradients/inverse": ("inverse", "--steps=4"),
    "gradients/pruning": ("pruning", "--steps=5"),
    "report/report": ("report", "--prompts_per_study=2 --points=5"),
    "embedded/train": ("train_apples", "--steps=2 --prompts_per_step=4"),
    "embedded/evaluate": ("evaluate_apples", "--held_out_prompts=4"),
    "densities/baseline": ("train_lm", f"{DENSITY} --vocab_size=280"),
    "densities/gaussian": (
        "train_density",
        f"{DENSITY} --head=gaussian --table_from=baseline",
    ),
    "densities/mixture": (
        "train_density",
        f"{DENSITY} --head=mixture --table_from=baseline",
    ),
    "densities/experts": (
        "train_density",
        f"{DENSITY} --head=experts --table_from=baseline --accumulate=2 --head_settings=experts=2",
    ),
    "densities/learned": (
        "train_density",
        f"{DENSITY} --vocab_size=280 --token_loss_weight=0.5",
    ),
    "densities/on_trunk": ("train_head", f"{TRAIN} --length=16 --trunk=baseline"),
    "densities/sample": (
        "sample_density",
        "--model=mixture --samples=2 --max_new_tokens=8",
    ),
    "densities/steered": (
        "sample_density",
        "--model=gaussian --samples=2 --max_new_tokens=6 --towards=file --strengths=0,2",
    ),
    "densities/eval": (
        "evaluate",
        f"{EVAL} --models=baseline,gaussian,mixture,experts,learned,on_trunk --windows=4",
    ),
    "densities/ablation": ("compare_quantizers", f"{ABLATE} --model=mixture"),
    "vectors/codec": (
        "train_autoencoder",
        f"{TRAIN} --vocab_size=280 --hidden_size=16 --latent_size=8",
    ),
    "vectors/energy": ("train_calm", f"{NEXT} --head=energy"),
    "vectors/flow": ("train_calm", f"{NEXT} --head=flow"),
    "vectors/diffusion": ("train_calm", f"{NEXT} --head=diffusion"),
    "vectors/baseline": ("train_lm", f"{DENSITY} --tokenizer=codec"),
    "vectors/sample": ("sample_calm", "--model=energy --samples=2 --max_new_tokens=8"),
    "vectors/between": (
        "sample_calm",
        "--model=flow --max_new_tokens=8 --between='Ann reads a path.'"
        " --between='Bob opens the file.'",
    ),
    "vectors/eval": (
        "evaluate",
        f"{EVAL} --models=baseline,energy,flow,diffusion --positions=16 --context=8 --windows=4",
    ),
    "vectors/ablation": (
        "compare_quantizers",
        f"{EVAL} --codes=16 --stages=2 --windows=2 --model=energy",
    ),
    "heads/implicit_heads": (
        "compare_heads",
        "--steps=3 --hidden_size=8 --conditions=4 --samples=8 --batch_size=8",
    ),
    "sound/frames": (
        "frames",
        "--seconds=8 --held_out_seconds=4 --steps=2 --batch_size=2 --length=24 --prompt=6"
        " --codes=8 --components=2 --hidden_size=16 --num_heads=2 --num_layers=1 --bands=12"
        " --samples=2 --iterations=3",
    ),
    "growth/growth": ("tests.fixtures.small_growth", ""),
}  # `benchmark` writes times alone
GROUPS = tuple(dict.fromkeys(name.partition("/")[0] for name in PROGRAMS))

# Not compared: run records, times, checksums of bits, paths, and copies of compared values.
SKIPPED_KEYS = set(
    "run frozen sha256 sha256_of_frames sources microseconds per_second seconds_of_training".split()
)
SKIPPED_FILES = {"tokenizer.json", "speed.jsonl", "checkpoints"}

# --- Where they run ---------------------------------------------------------------------------

# The same for every run, so that the numbers are those of the program and of little else.
SINGLE, UNOPTIMISED = (
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_backend_optimization_level=0",
)
if sys.version_info < (3, 12):  # of which JAX still has the older code generator
    UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"
OLD, OLDEST = (
    f" --xla_cpu_max_isa={name}" if platform.machine() == "x86_64" else ""
    for name in ("AVX2", "SSE4_2")
)
FLAGS = f"{SINGLE} {UNOPTIMISED}{OLD}"
# Stand in for other machines and compilers.
OTHERS = {"default": "", "unoptimised": UNOPTIMISED, "oldest": SINGLE + OLDEST}


def environment(flags: str = FLAGS) -> dict[str, str]:
    """Return a program's environment with these XLA flags; no setting of JAX is inherited."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return ours | {
        "PYTHONPATH": str(REPOSITORY_ROOT),
        "PYTHONHASHSEED": "0",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "OPENBLAS_NUM_THREADS": "1",
        "OPENBLAS_CORETYPE": "Haswell",
    }


def cpu_model() -> str:
    """Name, family and model of the CPU; virtual machines give many models the same name."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
        if "model name" in fields:
            keys = ("model name", "cpu family", "model", "stepping")
            return " ".join(fields.get(key, "?") for key in keys)
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Properties of a machine on which the same program gives the same bits."""
    cpu = cpu_model()
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")
    }
    python = platform.python_version()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "flags": FLAGS,
        "python": python,
        **versions,
    }


def write_text(path: pathlib.Path) -> None:
    """A text of 600 short sentences, the same on every machine."""
    names, verbs = ("Ann", "Bob", "Eve"), ("reads", "opens")
    objects, state = ("the file", "a path"), 1
    sentences = []
    for _ in range(600):
        state = state * 1103515245 % 2**31 + 12345  # a linear congruential generator
        pick = state >> 8
        sentences.append(
            f"{names[pick % 3]} {verbs[pick // 3 % 2]} {objects[pick // 6 % 2]}."
        )
    path.write_text("\n".join(sentences) + "\n")


def run(group: str, flags: str = FLAGS) -> dict[str, Any]:
    """Run a group, or one program "group/name"; return "group/name/file/key/..." -> value."""
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cwd = pathlib.Path(folder)
        write_text(cwd / "text.txt")
        compiled = {  # programs of a group share compiled code
            "JAX_COMPILATION_CACHE_DIR": str(cwd / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        names = [name for name in PROGRAMS if f"{name}/".startswith(f"{group}/")]
        commands = [command(name) for name in names]
        run_all(cwd, commands, environment(flags) | compiled)
        for name in names:
            out_folder = cwd / name.partition("/")[2]
            for path in sorted(out_folder.rglob("*")):
                inside = path.relative_to(out_folder)
                if SKIPPED_FILES.isdisjoint(inside.parts):
                    values |= numbers_of(path, f"{name}/{inside}")
    return values


def command(name: str) -> list[str]:
    """The program of that name with its flags; it writes to the folder of its name."""
    program, flags = PROGRAMS[name]
    return [program, *shlex.split(flags), f"--output_dir={name.partition('/')[2]}"]


def numbers_of(path: pathlib.Path, key: str) -> dict[str, Any]:
    """Return the contents of JSON and JSON lines; of tensors, size, norm and mean."""
    if path.suffix == ".json":
        return dict(flat(json.loads(path.read_text()), key))
    if path.suffix == ".jsonl":
        return dict(
            flat([json.loads(line) for line in path.read_text().splitlines()], key)
        )
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    elif path.suffix == ".npz":
        tensors = dict(np.load(path))
    else:
        return {}
    return {f"{key}/{name}": summary(tensor) for name, tensor in tensors.items()}


def summary(tensor: np.ndarray) -> np.ndarray:
    wide = tensor.astype(np.float64)
    return np.array([wide.size, np.sqrt((wide**2).mean()), wide.mean()])


def flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The leaves of JSON by their key paths; a nested list of numbers is one leaf, an array."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in SKIPPED_KEYS:
                yield from flat(part, f"{key}/{name}")
        return
    if isinstance(value, list):
        array = flat_array(value)
        if array is not None:
            yield key, array
            return
        if any(isinstance(part, dict | list) for part in value):
            for i, part in enumerate(value):
                yield from flat(part, f"{key}/{i}")
            return
    yield key, value


def flat_array(value: list) -> np.ndarray | None:
    """A nested list of numbers as an array, None for other lists."""
    try:
        array = np.array(value)
    except ValueError:  # ragged
        return None
    return array if array.size and array.dtype.kind in "iuf" else None


# --- Comparing --------------------------------------------------------------------------------


def moved(old: Any, new: Any, rounding: float = 0.0) -> float:
    """Return the difference beyond `rounding`, relative to the larger number.

    Infinite where text or a shape differs.
    """
    if not all(isinstance(value, int | float | np.ndarray) for value in (old, new)):
        return 0.0 if old == new else math.inf
    a, b = (np.asarray(value, np.float64) for value in (old, new))
    if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
        return math.inf
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    largest = max(np.abs(a).max(), np.abs(b).max())
    excess = max(np.abs(a - b).max() - rounding, 0.0)
    return float(excess / largest) if largest else 0.0


MISSING = "nothing"


def differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    noise: Mapping[str, float] | None = None,
) -> dict[str, tuple[float, str]]:
    """Return the keys that moved too far, with distance and both values, farthest first.

    Args:
      old: stored values.
      new: values of a new run.
      noise: effect of rounding on each key. Four times the noise and ROUNDING are allowed. None:
        the same machine, where neither is allowed.
    """
    rounding = 0.0 if noise is None else ROUNDING
    moved_keys = {}
    for key in old.keys() | new.keys():
        a, b = old.get(key, MISSING), new.get(key, MISSING)
        far = moved(a, b, rounding)
        if far > max(TOLERANCE, 4 * (noise or {}).get(key, 0.0)):
            moved_keys[key] = far, f"{key}: {shown(a, b)} -> {shown(b, a)} ({far:.2g})"
    return dict(sorted(moved_keys.items(), key=lambda item: (-item[1][0], item[0])))


def shown(value: Any, other: Any) -> str:
    """A value, of an array the entry that is farthest from another array's."""
    if isinstance(value, np.ndarray) and np.shape(value) == np.shape(other):
        place = np.unravel_index(
            np.abs(value - np.asarray(other)).argmax(), value.shape
        )
        return f"{value[place]:.9g} at {list(map(int, place))}"
    return f"{value!r:.80}"


# --- Storing ----------------------------------------------------------------------------------


def read() -> dict[str, Any]:
    """Read the stored file: machine by group, note, values by key, noise by key."""
    stored = json.loads(gzip.decompress(STORED.read_bytes()))
    for key, value in stored["values"].items():
        if isinstance(value, list) and flat_array(value) is not None:
            stored["values"][key] = flat_array(value)
    stored["noise"] = {
        k: math.inf if far is None else far for k, far in stored["noise"].items()
    }
    return stored


def write(
    values: Mapping[str, Any],
    noise: Mapping[str, float],
    measured: list[str],
    machines: Mapping[str, Mapping[str, Any]],
) -> None:
    """Stores them, the same bytes for the same numbers.

    Args:
      values: by key.
      noise: by key.
      measured: groups with measured noise.
      machines: group -> machine of its run.
    """
    far = [noise.get(key, 0.0) for key in values]
    note = {
        "keys": len(values),
        "compared to 1e-6 everywhere": sum(4 * x <= TOLERANCE for x in far),
        "elsewhere compared to four times their noise": sum(
            TOLERANCE < 4 * x < math.inf for x in far
        ),
        "not compared elsewhere, as rounding decides them": sum(
            x == math.inf for x in far
        ),
    }
    stored = {
        "note": note,
        "machines": dict(sorted(machines.items())),
        "measured": sorted(measured),
        "values": {key: rounded(value) for key, value in sorted(values.items())},
        "noise": {
            key: None if x == math.inf else float(f"{x:.2g}")
            for key, x in sorted(noise.items())
            if 4 * x > TOLERANCE
        },
    }
    text = json.dumps(stored, separators=(",", ":"))
    STORED.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(json.dumps(note, indent=2))


def rounded(value: Any) -> Any:
    """Nine digits, as JSON."""
    if isinstance(value, np.ndarray | list):
        return [
            rounded(part)
            for part in (value.tolist() if hasattr(value, "tolist") else value)
        ]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def incomparable(group: str, stored: Mapping[str, Any]) -> str | None:
    """Why a group cannot be compared here: a CPU or compiler whose rounding was not measured."""
    keys = ("cpu", "jax", "flags")
    old = {key: stored["machines"][group][key] for key in keys}
    new = {key: machine()[key] for key in keys}
    if group in stored["measured"] or old == new:
        return None
    return f"{group} was stored with {old}, this is {new}, and the noise between is not known"


def differing(group: str, stored: Mapping[str, Any]) -> list[str]:
    """Run a group, or one program of it, again; return a line for each key that moved."""
    old = {
        k: value for k, value in stored["values"].items() if k.startswith(f"{group}/")
    }
    stored_machine = stored["machines"][group.partition("/")[0]]
    noise = None if stored_machine == machine() else stored["noise"]
    new = run(group)
    if noise is not None:  # keys that rounding brings forth
        new = {k: v for k, v in new.items() if k in old or noise.get(k) != math.inf}
    return [line for _, line in differences(old, new, noise).values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--noise", action="store_true")
    arguments = parser.parse_args()
    groups = arguments.groups or GROUPS
    stored: dict[str, Any] = {"values": {}, "noise": {}, "measured": [], "machines": {}}
    if STORED.exists():
        stored = {name: part for name, part in read().items() if name in stored}
    if not (arguments.write or arguments.noise):
        lines = [line for group in groups for line in differing(group, stored)]
        sys.exit("\n".join(lines) or None)
    for group in groups:
        values, noise = (
            {k: x for k, x in stored[part].items() if k.partition("/")[0] != group}
            for part in ("values", "noise")
        )
        new_values = {
            k: x for k, x in stored["values"].items() if k.startswith(f"{group}/")
        }
        if arguments.write:
            new_values = run(group)
        far = {k: x for k, x in stored["noise"].items() if k.startswith(f"{group}/")}
        if arguments.noise:
            far = noise_of(group, new_values)
        measured = list({*stored["measured"], *([group] if arguments.noise else [])})
        machines = stored["machines"] | ({group: machine()} if arguments.write else {})
        stored = {
            "values": values | new_values,
            "noise": noise | far,
            "measured": measured,
            "machines": machines,
        }
        print(f"{group}: {len(new_values)} keys", flush=True)
        write(**stored)


def noise_of(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the largest move of each key of a group under flags that imitate other machines."""
    far: dict[str, float] = {}
    for flags in OTHERS.values():
        new = run(group, flags)
        for key in values.keys() | new.keys():
            move = moved(values.get(key, MISSING), new.get(key, MISSING))
            far[key] = max(far.get(key, 0.0), move)
    return far


if __name__ == "__main__":
    main()
