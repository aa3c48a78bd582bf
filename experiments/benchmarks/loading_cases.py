"""The benchmark's loading of a large checkpoint, and the time that the import takes."""

import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import flags
from flax import traverse_util

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import baselines, timing
from continuous_lm.experiments.benchmarks.timing import Row
from continuous_lm.experiments.densities import density_training
from continuous_lm.models.language_model import parameter_boxes

_GIGABYTES = flags.DEFINE_float(
    "gigabytes", 2.0, "Of the checkpoint that is loaded, in bfloat16.", lower_bound=0.0
)
SHARDS = 4


def load(quick: bool, repeats: int) -> Iterator[Row]:
    """A sharded bf16 checkpoint from the page cache, in a fresh process each time.

    Ours, transformers with every page of its parameters touched, and a plain read of the files into
    memory. Each has loaded a tiny checkpoint before, so that devices and libraries are awake.
    """
    with tempfile.TemporaryDirectory() as folder:
        small, large = (pathlib.Path(folder, name) for name in ("small", "large"))
        timing.fresh(written, small, 0.0)
        size = timing.fresh(written, large, 0.0 if quick else _GIGABYTES.value).result
        sides = {"ours": loaded, "read": plainly_read}
        absent = baselines.missing("torch", "transformers")
        if not absent:
            sides["transformers"] = loaded_by_transformers
        runs: dict[str, list[timing.Fresh]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                runs[name].append(timing.fresh(side, small, large))
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    what = f"{size / 1e9:.3g} GB"
    if absent:
        yield Row(f"{what}: time over that of transformers", note=absent)
    else:
        yield timing.times_as_much(
            f"{what}: time over that of transformers, pages touched",
            seconds["ours"],
            seconds["transformers"],
            1.3,
        )
    yield timing.times_as_fast(
        f"{what}: share of the speed of a plain read", seconds["ours"], seconds["read"]
    )
    for name, most in {"ours": 1.05, "transformers": None}.items():
        memory = [run.memory for run in runs.get(name, []) if run.memory is not None]
        if memory:
            yield timing.times_as_much(
                f"{what}: peak of anonymous memory over the weights, {name}",
                memory,
                [size] * len(memory),
                None if quick else most,
                "B",
            )


def written(folder: pathlib.Path, gigabytes: float) -> Callable[[], int]:
    """For `measuring.fresh`: writes a Llama of about that size; gives the bytes of its weights."""
    if gigabytes:
        config = dataclasses.replace(
            density_training.trunk(
                vocab_size=32000, hidden_size=2048, num_layers=1, num_heads=32, mlp_size=5632
            ),
            num_layers=max(1, round((gigabytes * 1e9 / 2 - 65.5e6) / 51.4e6)),
        )
    else:
        config = density_training.trunk(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4)
    block = np.random.default_rng(0).standard_normal(100_003).astype(ml_dtypes.bfloat16)
    boxes = parameter_boxes(config)
    flat = {path: np.resize(block, box.value.shape) for path, box in boxes.items()}
    lm = clm.LanguageModel(config, traverse_util.unflatten_dict(flat, sep="/"))
    size = sum(array.nbytes for array in flat.values())

    def write() -> int:
        clm.save(folder, lm, shard_size=size // SHARDS + 1)
        return size

    return write


def loaded(small: pathlib.Path, large: pathlib.Path) -> Callable[[], Any]:
    """For `measuring.fresh`: ours."""
    jax.block_until_ready(clm.load(small).params)
    return lambda: jax.block_until_ready(clm.load(large)).params


def loaded_by_transformers(small: pathlib.Path, large: pathlib.Path) -> Callable[[], Any]:
    """For `measuring.fresh`: theirs, which maps files and reads them when they are used."""
    torch, transformers = baselines.load("torch"), baselines.load("transformers")
    transformers.utils.logging.disable_progress_bar()
    page = os.sysconf("SC_PAGE_SIZE")

    def load(folder: pathlib.Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.detach().view(torch.uint8).flatten()[::page].sum().item()
        return model

    load(small)
    return functools.partial(load, large)


def plainly_read(small: pathlib.Path, large: pathlib.Path) -> Callable[[], Any]:
    """For `measuring.fresh`: the files' bytes into new memory, by one thread."""
    del small
    paths = sorted(large.glob("*.safetensors"))
    return lambda: [np.fromfile(path, np.uint8) for path in paths]


def imports(quick: bool, repeats: int) -> Iterator[Row]:
    """`import continuous_lm` over importing jax and flax, in fresh interpreters."""
    del quick
    program = (
        "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"
    )
    taken: dict[str, list[float]] = {"continuous_lm": [], "jax, flax": []}
    for _ in range(repeats + 1):
        for names, found in taken.items():
            run = [sys.executable, "-c", program.format(names)]
            found.append(float(subprocess.run(run, capture_output=True, check=True).stdout))
    ours, theirs = (found[1:] for found in taken.values())
    yield timing.figures(
        "import continuous_lm: seconds more than jax and flax",
        [a - b for a, b in zip(ours, theirs, strict=True)],
        target=timing.Target(most=0.3),
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        unit="s",
    )
