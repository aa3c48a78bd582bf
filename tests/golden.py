"""Golden outputs: what every program writes when it is run small, and how to compare a new run.

    python -m tests.golden --write            # stores tests/golden_outputs.json.gz anew
    python -m tests.golden [calm sweeps ...]  # runs again and prints what differs
"""

import argparse
import gzip
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests import tiny

STORED = pathlib.Path(__file__).with_name("golden_outputs.json.gz")
TOLERANCE = 1e-6  # relative to the larger number, in an array to its largest

# --- The programs -----------------------------------------------------------------------------

X = "continuous_lm.experiments."
MODEL = "--hidden_size=16 --num_layers=1 --num_heads=2"
TRAIN = "--data=text.txt --batch_size=4 --steps=3 --save_every=3 --warm_up=1"
DENSITY = f"{TRAIN} {MODEL} --length=16"
NEXT = f"{TRAIN} {MODEL} --stage=calm --codec=codec --length=8"
EVAL = "--data=text.txt --length=16"
ABLATE = f"{EVAL} --codes=16 --stages=2 --windows=2 --candidates=4"

# group/name: (module, flags). A group's programs run in this order in one folder, in which each
# writes to the folder of its name, and text.txt lies.
PROGRAMS: dict[str, tuple[str, str]] = {
    "sweeps/counting": (X + "counting", "--points=8"),
    "sweeps/counting_mass": (X + "counting", "--points=8 --vary=mass --word=cat --batch_size=3"),
    "sweeps/counting_times": (X + "counting", "--points=8 --vary=times --tracking=paper"),
    "sweeps/counting_bfloat16": (X + "counting", "--points=4 --dtype=bfloat16"),
    "sweeps/events": (X + "events", "--points=8 --scene=zoo"),
    "sweeps/sums": (X + "sums", "--points=8 --shrink=1"),
    "sweeps/interpolation": (X + "interpolation", "--points=8"),
    "sweeps/interpolation_spherical": (
        X + "interpolation",
        "--points=8 --path=spherical --words=cats,dogs --template='We bought two [] at the'",
    ),
    "sweeps/boolean": (X + "boolean", "--points=4"),
    "sweeps/translation": (X + "shifting", "--points=8"),
    "sweeps/scaling": (X + "shifting", "--points=8 --change=scaling"),
    "studies/counting": (X + "study", "--study=counting --limit=3 --points=6"),
    "studies/tutorials": (X + "study", "--study=tutorials --limit=2 --points=6"),
    "studies/sums": (X + "study", "--study=sums --limit=3 --points=6"),
    "studies/words": (X + "study", "--study=words --limit=4 --points=6"),
    "studies/analysis": (X + "analysis", "--studies=counting,tutorials,sums,words"),
    "gradients/attribution": (X + "attribution", "--nodes=8"),
    "gradients/inverse": (X + "inverse", "--ascent=4"),
    "gradients/pruning": (X + "pruning", "--descent=5"),
    "report/report": (X + "report", "--studied=2 --points=5"),
    "embedded/train": (X + "train_embedded", "--steps=2 --prompts_per_step=4"),
    "embedded/evaluate": (X + "evaluate_embedded", "--held_out_prompts=4"),
    "densities/baseline": (X + "calm_train", f"{DENSITY} --vocab_size=280 --head=token"),
    "densities/gaussian": (X + "calm_train", f"{DENSITY} --head=gaussian --rows_of=baseline"),
    "densities/mixture": (X + "calm_train", f"{DENSITY} --head=mixture --rows_of=baseline"),
    "densities/experts": (
        X + "calm_train",
        f"{DENSITY} --head=experts --rows_of=baseline --accumulate=2 --head_settings=experts=2",
    ),
    "densities/learned": (X + "calm_train", f"{DENSITY} --vocab_size=280 --contrast=0.5"),
    "densities/on_trunk": (X + "calm_train", f"{TRAIN} --length=16 --trunk=baseline"),
    "densities/sample": (X + "calm_sample", "--model=mixture --samples=2 --max_new_tokens=8"),
    "densities/steered": (
        X + "calm_sample",
        "--model=gaussian --samples=2 --max_new_tokens=6 --towards=file --strengths=0,2",
    ),
    "densities/eval": (
        X + "calm_eval",
        f"{EVAL} --models=baseline,gaussian,mixture,experts,learned,on_trunk --windows=4",
    ),
    "densities/ablation": (X + "quantization_ablation", f"{ABLATE} --model=mixture"),
    "vectors/codec": (
        X + "calm_train",
        f"{TRAIN} --stage=autoencoder --vocab_size=280 --hidden_size=16 --latent_size=8",
    ),
    "vectors/energy": (X + "calm_train", f"{NEXT} --head=energy"),
    "vectors/flow": (X + "calm_train", f"{NEXT} --head=flow"),
    "vectors/diffusion": (X + "calm_train", f"{NEXT} --head=diffusion"),
    "vectors/baseline": (X + "calm_train", f"{DENSITY} --stage=baseline --tokenizer=codec"),
    "vectors/sample": (X + "calm_sample", "--model=energy --samples=2 --max_new_tokens=8"),
    "vectors/between": (
        X + "calm_sample",
        "--model=flow --samples=1 --max_new_tokens=8 --between='a path' --between='the file'",
    ),
    "vectors/eval": (
        X + "calm_eval",
        f"{EVAL} --models=baseline,energy,flow,diffusion --positions=16 --context=8 --windows=4",
    ),
    "vectors/ablation": (X + "quantization_ablation", f"{ABLATE} --model=energy"),
    "heads/implicit_heads": (
        X + "implicit_heads",
        "--steps=3 --hidden_size=8 --conditions=4 --samples=8 --batch_size=8",
    ),
    "sound/frames": (
        X + "frames",
        "--seconds=8 --held_out_seconds=4 --steps=2 --batch_size=2 --length=24 --prompt=6"
        " --codes=8 --components=2 --hidden_size=16 --num_heads=2 --num_layers=1 --bands=12"
        " --samples=2 --iterations=3",
    ),
    "growth/growth": ("tests.small_growth", "--shapes=small"),
}  # `benchmark` writes times alone
GROUPS = tuple(dict.fromkeys(name.partition("/")[0] for name in PROGRAMS))

# What is not compared: what differs from run to run or from machine to machine.
SKIPPED_KEYS = ("run", "date", "seconds", "sha256", "digest", "per_second", "source")
SKIPPED_FILES = ("tokenizer.json", "speed.jsonl", "checkpoints")

# Everything that decides how numbers are rounded is the same for every run.
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
} | {
    "PYTHONPATH": str(tiny.ROOT),
    "PYTHONHASHSEED": "0",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
FLAGS = "--xla_cpu_multi_thread_eigen=false"


def write_text(path: pathlib.Path) -> None:
    """A text of 600 short sentences, the same on every machine."""
    names, verbs = ("Ann", "Bob", "Eve"), ("reads", "opens")
    things, state = ("the file", "a path"), 1
    sentences = []
    for _ in range(600):
        state = state * 1103515245 % 2**31 + 12345  # a linear congruential generator
        pick = state >> 8
        sentences.append(f"{names[pick % 3]} {verbs[pick // 3 % 2]} {things[pick // 6 % 2]}.")
    path.write_text("\n".join(sentences) + "\n")


def run(group: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the programs of a group wrote: "group/name/file/key/..." -> number, array or text."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, tiny.forking(environment) as call:
        cwd = pathlib.Path(folder)
        write_text(cwd / "text.txt")
        for name, (module, flags) in PROGRAMS.items():
            if name.partition("/")[0] != group:
                continue
            out = name.partition("/")[2]
            started = time.perf_counter()
            status, _, stderr = call(cwd, module, *shlex.split(flags), f"--output_dir={out}")
            if os.environ.get("GOLDEN_TIMES"):
                print(f"{time.perf_counter() - started:7.1f} s  {name}", file=sys.stderr)
            if "Traceback" in stderr:
                raise RuntimeError(f"{name}: {stderr}")
            found[f"{name}/exit status"] = status
            if status:
                found[f"{name}/error"] = stderr
            for path in sorted((cwd / out).rglob("*")):
                if not any(skipped in path.parts for skipped in SKIPPED_FILES):
                    found |= numbers_of(path, f"{name}/{path.relative_to(cwd / out)}")
    return found


def numbers_of(path: pathlib.Path, key: str) -> dict[str, Any]:
    """What a file holds, if it is JSON, JSON lines or tensors; of tensors, size, mean and norm."""
    if path.suffix == ".json":
        return dict(flat(json.loads(path.read_text()), key))
    if path.suffix == ".jsonl":
        return dict(flat([json.loads(line) for line in path.read_text().splitlines()], key))
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
        try:
            array = np.array(value)
        except ValueError:  # ragged
            array = np.array(None)
        if array.size and array.dtype.kind in "iuf":
            yield key, array
            return
        if any(isinstance(part, dict | list) for part in value):
            for i, part in enumerate(value):
                yield from flat(part, f"{key}/{i}")
            return
    yield key, value
