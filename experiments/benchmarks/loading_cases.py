"""The benchmark's loading of a large checkpoint, and the time that the import takes."""

import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import baselines, timing
from continuous_lm.experiments.benchmarks.timing import Row
from continuous_lm.experiments.densities import density_training
from continuous_lm.models.transformer import parameter_table

DEFAULT_GIGABYTES = 2.0  # of the checkpoint that is loaded
NUM_SHARDS = 4

# The folders of a small and a large checkpoint -> the call that loads the large one.
Loader = Callable[[pathlib.Path, pathlib.Path], Callable[[], object]]


def loading_rows(
    quick: bool, repeats: int, gigabytes: float = DEFAULT_GIGABYTES
) -> Iterator[Row]:
    """A sharded bf16 checkpoint from the page cache, in a fresh process each time.

    Ours, transformers with every page of its parameters touched, and a plain read of the files into
    memory. Each has loaded a tiny checkpoint before, so that devices and libraries are awake.
    """
    loaders: dict[str, Loader] = {"ours": prepare_load, "read": prepare_plain_read}
    missing_reason = baselines.why_missing("torch", "transformers")
    if not missing_reason:
        loaders["transformers"] = prepare_transformers_load
    num_bytes, runs = _time_loaders(loaders, 0.0 if quick else gigabytes, repeats)
    seconds = {
        name: [run.seconds for run in loader_runs] for name, loader_runs in runs.items()
    }
    label = f"{num_bytes / 1e9:.3g} GB"
    if missing_reason:
        yield Row(f"{label}: time over that of transformers", note=missing_reason)
    else:
        yield timing.cost_ratio_row(
            f"{label}: time over that of transformers, pages touched",
            seconds["ours"],
            seconds["transformers"],
            1.3,
        )
    yield timing.speedup_row(
        f"{label}: share of the speed of a plain read", seconds["ours"], seconds["read"]
    )
    for name, maximum in {"ours": 1.05, "transformers": None}.items():
        peak_bytes = [
            run.memory_bytes
            for run in runs.get(name, [])
            if run.memory_bytes is not None
        ]
        if peak_bytes:
            yield timing.cost_ratio_row(
                f"{label}: peak of anonymous memory over the weights, {name}",
                peak_bytes,
                [num_bytes] * len(peak_bytes),
                None if quick else maximum,
                "B",
            )


def _time_loaders(
    loaders: Mapping[str, Loader], gigabytes: float, repeats: int
) -> tuple[int, dict[str, list[timing.ProcessCost]]]:
    """The bytes of the weights, and the costs of each loader in each round."""
    runs: dict[str, list[timing.ProcessCost]] = {name: [] for name in loaders}
    with tempfile.TemporaryDirectory() as folder:
        small_folder = pathlib.Path(folder, "small")
        large_folder = pathlib.Path(folder, "large")
        timing.measure_in_process(prepare_checkpoint, small_folder, 0.0)
        num_bytes = timing.measure_in_process(
            prepare_checkpoint, large_folder, gigabytes
        ).result
        for _ in range(repeats):
            for name, loader in loaders.items():
                cost = timing.measure_in_process(loader, small_folder, large_folder)
                runs[name].append(cost)
    return num_bytes, runs


def prepare_checkpoint(folder: pathlib.Path, gigabytes: float) -> Callable[[], int]:
    """For `timing.measure_in_process`: writes a Llama of about that size.

    It gives the bytes of its weights.
    """
    if gigabytes:
        config = dataclasses.replace(
            density_training.trunk_config(
                vocab_size=32000,
                hidden_size=2048,
                num_layers=1,
                num_heads=32,
                mlp_size=5632,
            ),
            num_layers=max(1, round((gigabytes * 1e9 / 2 - 65.5e6) / 51.4e6)),
        )
    else:
        config = density_training.trunk_config(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4
        )
    random_block = (
        np.random.default_rng(0).standard_normal(100_003).astype(ml_dtypes.bfloat16)
    )
    parameters = parameter_table(config)
    flat_params = {
        path: np.resize(random_block, declaration.shape)
        for path, declaration in parameters.items()
    }
    lm = clm.LanguageModel(
        clm.Transformer(config), traverse_util.unflatten_dict(flat_params, sep="/")
    )
    num_bytes = sum(array.nbytes for array in flat_params.values())

    def write_checkpoint() -> int:
        clm.save(folder, lm, shard_size=num_bytes // NUM_SHARDS + 1)
        return num_bytes

    return write_checkpoint


def prepare_load(
    small_folder: pathlib.Path, large_folder: pathlib.Path
) -> Callable[[], object]:
    """For `timing.measure_in_process`: ours."""
    jax.block_until_ready(clm.load(small_folder).params)
    return lambda: jax.block_until_ready(clm.load(large_folder)).params


def prepare_transformers_load(
    small_folder: pathlib.Path, large_folder: pathlib.Path
) -> Callable[[], object]:
    """For `timing.measure_in_process`: theirs; files are mapped, read when used."""
    torch = baselines.import_baseline("torch")
    transformers = baselines.import_baseline("transformers")
    transformers.utils.logging.disable_progress_bar()
    page_size = os.sysconf("SC_PAGE_SIZE")

    def load_and_touch(folder: pathlib.Path) -> object:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16
        )
        for parameter in model.parameters():
            parameter.detach().view(torch.uint8).flatten()[::page_size].sum().item()
        return model

    load_and_touch(small_folder)
    return functools.partial(load_and_touch, large_folder)


def prepare_plain_read(
    small_folder: pathlib.Path, large_folder: pathlib.Path
) -> Callable[[], object]:
    """For `timing.measure_in_process`: the files' bytes into new memory, by one thread."""
    del small_folder
    paths = sorted(large_folder.glob("*.safetensors"))
    return lambda: [np.fromfile(path, np.uint8) for path in paths]


def import_time_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """`import continuous_lm` over importing jax and flax, in fresh interpreters."""
    del quick
    script = "import time; begin = time.perf_counter(); import {};"
    script += " print(time.perf_counter() - begin)"
    times_by_modules: dict[str, list[float]] = {"continuous_lm": [], "jax, flax": []}
    for _ in range(repeats + 1):
        for modules, import_times in times_by_modules.items():
            command = [sys.executable, "-c", script.format(modules)]
            import_times.append(
                float(subprocess.run(command, capture_output=True, check=True).stdout)
            )
    ours = times_by_modules["continuous_lm"][1:]
    theirs = times_by_modules["jax, flax"][1:]
    yield timing.median_row(
        "import continuous_lm: seconds more than jax and flax",
        [
            our_seconds - their_seconds
            for our_seconds, their_seconds in zip(ours, theirs, strict=True)
        ],
        target=timing.Target(maximum=0.3),
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        unit="s",
    )
