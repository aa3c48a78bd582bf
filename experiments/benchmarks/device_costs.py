"""Compute the cost of large sweeps on simulated devices, and the devices that can hold them.

    python -m continuous_lm device_costs [--shapes=Llama-3-8B,...] [--output_dir=FOLDER]

The first table has operations, bytes and memory of each device by tokens of the prompt, points and
mesh, for models of published sizes. The first quarter of a prompt is shared by all points. The
second table has the memory by number of devices, the third the least number of devices that holds a
model. `program_costs` describes the method. It takes five minutes on two cores, and no memory for
weights.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import program_costs
from continuous_lm.experiments.common import program, results, tables
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.config import TransformerConfig

# Sizes from the config.json of the published checkpoints.
_LLAMA_FIELDS = dict(
    model_type="llama",
    vocab_size=128256,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
)
MODEL_FIELDS: Mapping[str, dict[str, Any]] = {
    "Llama-3-8B": _LLAMA_FIELDS
    | dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "Llama-3-70B": _LLAMA_FIELDS
    | dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
    ),
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
ACCELERATOR_GIGABYTES: Mapping[str, int] = {
    "TPU v5e": 16,
    "TPU v6e": 32,
    "A100 40 GB": 40,
    "A100 80 GB": 80,
    "H100": 80,
    "TPU v5p": 95,
    "H200": 141,
}
USABLE_MEMORY_SHARE = 0.9  # share of it that a program may fill

PROMPT_LENGTHS, NUM_POINTS, MODEL_AXIS_SIZE = (64, 256, 1024, 4096), 100, 8
MAX_TOKENS_AT_ONCE = (
    16384  # tokens after the shared ones that a row of the mesh computes at once
)
DEVICE_COUNTS = (1, 2, 4, 8, 16, 32)  # that the memory is spread over

MAX_DEVICES = 64  # CPU devices that stand for accelerators


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.RunConfig):
    """Flags of device_costs."""

    shapes: tuple[str, ...] = program.flag(
        tuple(MODEL_FIELDS),
        help=f"Models whose costs are computed, of {', '.join(MODEL_FIELDS)}.",
        choices=tuple(MODEL_FIELDS),
    )


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Costs by model.

    Attributes:
      growth: model -> a row a case, as in `measure_case`.
      memory: model -> a row a number of devices, as in `measure_memory`.
    """

    growth: Mapping[str, Sequence[Mapping[str, Any]]]
    memory: Mapping[str, Sequence[Mapping[str, Any]]]

    def result_tables(self) -> tuple[tables.Table, ...]:
        return (
            growth_table(self.growth),
            memory_table(self.memory),
            fitting_table(self.memory),
        )

    def summary(self) -> str:
        return "\n\n".join(table.as_text() for table in self.result_tables())

    def write(self, config: program.RunConfig, folder: pathlib.Path) -> None:
        """Write every number, and the tables."""
        values = {"growth": self.growth, "memory": self.memory}
        results.write(
            config, folder, "device_costs", values, tables=self.result_tables()
        )


class SweepCase(NamedTuple):
    """A sweep on a mesh."""

    tokens: int = 256
    points: int = NUM_POINTS
    data: int = 1
    model: int = MODEL_AXIS_SIZE

    @property
    def batch(self) -> program_costs.SweepBatch:
        """A batch of its points, as even as can be over batches and rows of the mesh."""
        num_shared_tokens = self.tokens // 4
        max_points = (
            max(1, MAX_TOKENS_AT_ONCE // (self.tokens - num_shared_tokens)) * self.data
        )
        points_per_batch = math.ceil(self.points / math.ceil(self.points / max_points))
        return program_costs.SweepBatch(
            self.tokens,
            num_shared_tokens,
            math.ceil(points_per_batch / self.data) * self.data,
        )

    @property
    def mesh(self) -> Mesh:
        devices = np.array(jax.devices()[: self.data * self.model])
        return Mesh(devices.reshape(self.data, self.model), ("data", "model"))


def make_cases() -> list[SweepCase]:
    """One thing at a time: tokens, points, rows of the mesh and their width."""
    return [
        *(SweepCase(tokens=num_tokens) for num_tokens in PROMPT_LENGTHS),
        *(SweepCase(points=num_points) for num_points in (10, 1000)),
        SweepCase(data=8),
        SweepCase(model=2 * MODEL_AXIS_SIZE),
    ]


def measure_case(config: TransformerConfig, case: SweepCase) -> dict[str, Any]:
    """The numbers of one case; operations and bytes are those of the whole sweep on a device."""
    num_batches = math.ceil(case.points / case.batch.points)
    operations, bytes_accessed = program_costs.extrapolate_cost(
        config, case.mesh, case.batch
    )
    product_flops = program_costs.count_product_flops(config, case.batch) / (
        case.data * case.model
    )
    return {
        **case._asdict(),
        "at_once": case.batch.points,
        "operations": num_batches * operations,
        "over_products": operations / product_flops,
        "bytes": num_batches * bytes_accessed,
        **measure_memory(config, case),
    }


def measure_memory(config: TransformerConfig, case: SweepCase) -> dict[str, Any]:
    """Bytes on each device, and the accelerators that have them."""
    memory_use = program_costs.memory_use(config, case.mesh, case.batch)
    fitting_accelerators = [
        name
        for name, gigabytes in ACCELERATOR_GIGABYTES.items()
        if memory_use.total <= USABLE_MEMORY_SHARE * gigabytes * 1e9
    ]
    return {
        "weights": memory_use.arguments,
        "temporaries": memory_use.temporaries,
        "fits": fitting_accelerators,
    }


# --- Tables -------------------------------------------------------------------------------------


def growth_table(
    rows_by_model: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tables.Table:
    """Costs of each model and case."""
    titles = "model|tokens|points|at once|mesh|operations (T)|over products|bytes (GB)|weights (GB)"
    cell_formats = ["", "d", "d", "d", "", ",.1f", ".3f", ",.0f", ".2f", ".2f"]
    return tables.Table(
        "growth",
        "A sweep on each device of a mesh, data x model: operations counted by XLA, in all and over"
        " those of the matrix products; bytes that steps read and write, in float32; bfloat16"
        " weights; temporaries in float32",
        [
            tables.Column(title, format=cell_format)
            for title, cell_format in zip(
                [*titles.split("|"), "temporaries (GB)"], cell_formats, strict=True
            )
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
            for name, rows in rows_by_model.items()
            for row in rows
        ],
    )


def memory_table(
    rows_by_model: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tables.Table:
    """Memory over more and more devices."""
    first_rows = next(iter(rows_by_model.values()), ())
    titles = ["model", *(f"{row['model']} (GB)" for row in first_rows)]
    return tables.Table(
        "memory",
        f"Memory on each of so many devices: bfloat16 weights + temporaries, {NUM_POINTS} points of"
        f" {SweepCase().tokens} tokens, {SweepCase().batch.points} at once",
        [tables.Column(title) for title in titles],
        [
            [
                name,
                *(
                    f"{row['weights'] / 1e9:.1f} + {row['temporaries'] / 1e9:.1f}"
                    for row in rows
                ),
            ]
            for name, rows in rows_by_model.items()
        ],
    )


def fitting_table(
    rows_by_model: Mapping[str, Sequence[Mapping[str, Any]]],
) -> tables.Table:
    """The least number of devices that holds each model."""

    def min_devices(rows: Sequence[Mapping[str, Any]], name: str) -> int | None:
        return next((row["model"] for row in rows if name in row["fits"]), None)

    return tables.Table(
        "fitting",
        "The shortest axis `model` with which that sweep fills at most"
        f" {USABLE_MEMORY_SHARE:.0%} of each device;"
        " any axis `data` may be beside it",
        [
            tables.Column("accelerator"),
            tables.Column("GB", format="d"),
            *(tables.Column(name, format="d") for name in rows_by_model),
        ],
        [
            [
                name,
                gigabytes,
                *(min_devices(rows, name) for rows in rows_by_model.values()),
            ]
            for name, gigabytes in ACCELERATOR_GIGABYTES.items()
        ],
    )


def run(config: Config) -> Result:
    """Compile all programs for simulated devices, and write their costs."""
    folder = program.output_folder(config)
    simulate_devices()
    configs = {name: trunk.read_config(MODEL_FIELDS[name]) for name in config.shapes}
    result = measure_models(configs, make_cases(), DEVICE_COUNTS)
    if folder is not None:
        result.write(config, folder)
    return result


def simulate_devices() -> None:
    """Make `MAX_DEVICES` devices of the CPU.

    Raises:
      InputError: if this process has used JAX before, with fewer.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", MAX_DEVICES)
    except RuntimeError:
        if jax.device_count() < MAX_DEVICES:
            raise InputError(
                f"JAX has started with {jax.device_count()} devices, and {MAX_DEVICES} are needed;"
                " run it in a process of its own, or set jax_num_cpu_devices before"
            ) from None


def measure_models(
    configs: Mapping[str, TransformerConfig],
    cases: Sequence[SweepCase],
    device_counts: Sequence[int],
) -> Result:
    """The costs of all cases, and the memory on so many devices, of each model."""
    growth: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    memory: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    num_measurements = len(configs) * (len(cases) + len(device_counts))
    with tqdm.tqdm(total=num_measurements, unit="case") as progress_bar:
        for name, config in configs.items():
            for case in cases:
                growth[name].append(measure_case(config, case))
                progress_bar.update()
            for num_devices in device_counts:
                case = SweepCase(model=num_devices)
                memory[name].append(case._asdict() | measure_memory(config, case))
                progress_bar.update()
    return Result(growth, memory)


if __name__ == "__main__":
    program.main(Config, run)
