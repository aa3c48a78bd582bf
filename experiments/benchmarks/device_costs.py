"""What a sweep costs as it grows, on devices that need not be there, and which of them hold it.

    python -m continuous_lm device_costs [--shapes=Llama-3-8B,...] [--output_dir=FOLDER]

Operations, bytes and memory on each device against the tokens of the prompt, the points and the
mesh, for models of published sizes; the first quarter of a prompt is shared by all points. A second
table has the memory over more and more devices, a third the least number of them that holds a
model. `costs` says what is measured on simulated devices and what follows from shapes. It takes
five minutes of two cores, and no memory for weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh

from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import program_costs
from continuous_lm.experiments.common import program, tables
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.models import language_model
from continuous_lm.models.config import TransformerConfig

# What changes the sizes in the config.json of the published checkpoints.
_LLAMA = dict(
    model_type="llama",
    vocab_size=128256,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
)
MODELS: Mapping[str, dict[str, Any]] = {
    "Llama-3-8B": _LLAMA
    | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "Llama-3-70B": _LLAMA
    | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "Gemma-2-9B": dict(
        model_type="gemma2",
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
    ),
}

# GB of memory of one device: Google Cloud's pages on TPU versions, NVIDIA's data sheets.
ACCELERATORS: Mapping[str, int] = {
    "TPU v5e": 16,
    "TPU v6e": 32,
    "A100 40 GB": 40,
    "A100 80 GB": 80,
    "H100": 80,
    "TPU v5p": 95,
    "H200": 141,
}
ROOM = 0.9  # share of it that a program may fill

TOKENS, POINTS, MODEL = (64, 256, 1024, 4096), 100, 8
AT_ONCE = 16384  # tokens after the shared ones that a row of the mesh computes at once
DEVICES = (1, 2, 4, 8, 16, 32)  # that the memory is spread over

_SHAPES = flags.DEFINE_list("shapes", list(MODELS), f"Of {', '.join(MODELS)}.")


class Case(NamedTuple):
    """A sweep on a mesh."""

    tokens: int = 256
    points: int = POINTS
    data: int = 1
    model: int = MODEL

    @property
    def task(self) -> program_costs.Task:
        """A batch of its points, as even as can be over batches and rows of the mesh."""
        shared = self.tokens // 4
        most = max(1, AT_ONCE // (self.tokens - shared)) * self.data
        size = math.ceil(self.points / math.ceil(self.points / most))
        return program_costs.Task(self.tokens, shared, math.ceil(size / self.data) * self.data)

    @property
    def mesh(self) -> Mesh:
        devices = np.array(jax.devices()[: self.data * self.model])
        return Mesh(devices.reshape(self.data, self.model), ("data", "model"))


def cases() -> list[Case]:
    """One thing at a time: tokens, points, rows of the mesh and their width."""
    return [
        *(Case(tokens=n) for n in TOKENS),
        *(Case(points=points) for points in (10, 1000)),
        Case(data=8),
        Case(model=2 * MODEL),
    ]


def measure(config: TransformerConfig, case: Case) -> dict[str, Any]:
    """The numbers of one case; operations and bytes are those of the whole sweep on a device."""
    batches = math.ceil(case.points / case.task.points)
    operations, moved = program_costs.work(config, case.mesh, case.task)
    products = program_costs.products(config, case.task) / (case.data * case.model)
    return {
        **case._asdict(),
        "at_once": case.task.points,
        "operations": batches * operations,
        "over_products": operations / products,
        "bytes": batches * moved,
        **needed(config, case),
    }


def needed(config: TransformerConfig, case: Case) -> dict[str, Any]:
    """Bytes on each device, and the accelerators that have them."""
    found = program_costs.memory(config, case.mesh, case.task)
    fits = [name for name, size in ACCELERATORS.items() if found.total <= ROOM * size * 1e9]
    return {"weights": found.arguments, "temporaries": found.temporaries, "fits": fits}


# --- Tables -------------------------------------------------------------------------------------


def growth_table(numbers: Mapping[str, Sequence[Mapping[str, Any]]]) -> tables.Table:
    """Costs of each model and case."""
    heads = "model|tokens|points|at once|mesh|operations (T)|over products|bytes (GB)|weights (GB)"
    formats = ["", "d", "d", "d", "", ",.1f", ".3f", ",.0f", ".2f", ".2f"]
    return tables.Table(
        "growth",
        "A sweep on each device of a mesh, data x model: operations counted by XLA, in all and over"
        " those of the matrix products; bytes that steps read and write, in float32; bfloat16"
        " weights; temporaries in float32",
        [
            tables.Column(head, format=form)
            for head, form in zip([*heads.split("|"), "temporaries (GB)"], formats, strict=True)
        ],
        [
            [
                name,
                *(row[key] for key in ("tokens", "points", "at_once")),
                f"{row['data']} x {row['model']}",
                row["operations"] / 1e12,
                row["over_products"],
                *(row[key] / 1e9 for key in ("bytes", "weights", "temporaries")),
            ]
            for name, rows in numbers.items()
            for row in rows
        ],
    )


def memory_table(numbers: Mapping[str, Sequence[Mapping[str, Any]]]) -> tables.Table:
    """Memory over more and more devices."""
    columns = ["model", *(f"{devices} (GB)" for devices in DEVICES)]
    return tables.Table(
        "memory",
        f"Memory on each of so many devices: bfloat16 weights + temporaries, {POINTS} points of"
        f" {Case().tokens} tokens, {Case().task.points} at once",
        [tables.Column(head) for head in columns],
        [
            [name, *(f"{r['weights'] / 1e9:.1f} + {r['temporaries'] / 1e9:.1f}" for r in rows)]
            for name, rows in numbers.items()
        ],
    )


def fitting_table(numbers: Mapping[str, Sequence[Mapping[str, Any]]]) -> tables.Table:
    """The least number of devices that holds each model."""

    def least(rows: Sequence[Mapping[str, Any]], name: str) -> int | None:
        return next((row["model"] for row in rows if name in row["fits"]), None)

    return tables.Table(
        "fitting",
        f"The shortest axis `model` with which that sweep fills at most {ROOM:.0%} of each device;"
        " any axis `data` may be beside it",
        [
            tables.Column("accelerator"),
            tables.Column("GB", format="d"),
            *(tables.Column(name, format="d") for name in numbers),
        ],
        [
            [name, size, *(least(rows, name) for rows in numbers.values())]
            for name, size in ACCELERATORS.items()
        ],
    )


def main() -> None:
    """Numbers and tables."""
    for name in _SHAPES.value:
        if name not in MODELS:
            raise InputError(f"--shapes: {name!r:.60} is not known; known are {', '.join(MODELS)}")
    folder = program.output_dir("device_costs")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 64)
    configs = {name: language_model.read_config(MODELS[name]) for name in _SHAPES.value}
    growing: dict[str, list] = {name: [] for name in configs}
    spread: dict[str, list] = {name: [] for name in configs}
    with tqdm.tqdm(total=len(configs) * (len(cases()) + len(DEVICES)), unit="case") as bar:
        for name, config in configs.items():
            for case in cases():
                growing[name].append(measure(config, case))
                bar.update()
            for model in DEVICES:
                case = Case(model=model)
                spread[name].append(case._asdict() | needed(config, case))
                bar.update()
    made = growth_table(growing), memory_table(spread), fitting_table(spread)
    with written_aside(folder) as aside:
        record = {"run": program.record(), "growth": growing, "memory": spread}
        write_json(aside / "device_costs.json", record)
        for table in made:
            table.write(aside)
    print("\n\n".join(table.as_text() for table in made))
    print(f"\n{folder}: device_costs.json; growth, memory and fitting as .csv, .md, .tex")


if __name__ == "__main__":
    program.run(main)
