"""Costs extrapolated from few layers hold for many; tables have the measured values."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import device_costs, program_costs
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.transformer import parameter_table
from tests.fixtures import tiny
from tests.fixtures.product_flops import product_flops
from tests.fixtures.programs import ENVIRONMENT

TASK = program_costs.SweepBatch(tokens=12, shared_tokens=4, points=6)


def one_device():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))


def llama(num_layers):
    fields = tiny.llama_config(model_type="llama", num_hidden_layers=num_layers)
    return trunk.read_config(fields)


def test_three_and_four_layers_say_what_six_cost():
    mesh = one_device()
    assert program_costs.extrapolate_cost(
        llama(6), mesh, TASK
    ) == program_costs.count_cost(llama(6), mesh, TASK)


@pytest.mark.slow
def test_xla_counts_the_body_of_a_loop_once():
    """Otherwise no layer would have to be unrolled, nor anything extrapolated."""

    def looped(n):
        return program_costs.compile_sweep(
            llama(n), one_device(), TASK
        ).cost_analysis()["flops"]

    assert looped(3) == pytest.approx(looped(6), rel=0.01)


@pytest.mark.slow
def test_products_are_most_of_what_is_counted():
    config = dataclasses.replace(llama(4), hidden_size=512, mlp_size=1024, head_dim=128)
    operations, _ = program_costs.extrapolate_cost(config, one_device(), TASK)
    assert 1.0 <= operations / program_costs.count_product_flops(config, TASK) < 1.02


def gpt2(num_layers):
    fields = tiny.gpt2_config(model_type="gpt2", n_layer=num_layers)
    return trunk.read_config(fields)


@pytest.mark.parametrize("config", [llama(5), gpt2(3)])
def test_products_against_every_product_of_the_program(config):
    """Compare with each product of the traced program."""
    arguments = program_costs.program_arguments(config, one_device(), TASK, jnp.float32)
    execution = program_costs.unrolled(config)
    traced = jax.make_jaxpr(
        program_costs.next_token_probabilities, static_argnums=(0, 1)
    )(config, execution, *arguments)
    expected = product_flops(traced.jaxpr)
    assert program_costs.count_product_flops(config, TASK) == expected


def test_bytes_of_arguments_are_those_that_xla_allocates():
    config, mesh = llama(3), one_device()
    actual = program_costs.compile_sweep(config, mesh, TASK).memory_analysis()
    held = program_costs.bytes_per_device(
        program_costs.program_arguments(config, mesh, TASK, jnp.float32)
    )
    assert held == pytest.approx(
        actual.argument_size_in_bytes, abs=64
    )  # scalars not read
    halved = program_costs.memory_use(config, mesh, TASK).arguments
    assert held / 2 < halved < 0.51 * held  # but for times and durations


def test_batches_are_even_over_the_rows_of_a_mesh():
    for case in (
        *device_costs.make_cases(),
        device_costs.SweepCase(tokens=4096, points=7, data=4),
    ):
        at_once = case.batch.points
        assert at_once % case.data == 0
        batches = math.ceil(case.points / at_once)
        assert (batches - 1) * at_once < case.points <= batches * at_once
        assert (
            at_once / case.data * (case.tokens - case.batch.shared_tokens)
            <= device_costs.MAX_TOKENS_AT_ONCE
        )


def test_sizes_are_the_published_ones():
    counts = {}
    for name, fields in device_costs.MODEL_FIELDS.items():
        boxes = parameter_table(trunk.read_config(fields))
        counts[name] = sum(
            math.prod(declaration.shape) for declaration in boxes.values()
        )
    assert counts == {
        "Llama-3-8B": 8_030_261_248,
        "Llama-3-70B": 70_553_706_496,
        "Gemma-2-9B": 9_241_705_984,
    }


def test_the_least_number_of_devices_is_named():
    rows = [
        {"model": 1, "weights": 30e9, "temporaries": 1e9, "fits": ["H200"]},
        {"model": 2, "weights": 15e9, "temporaries": 1e9, "fits": ["H200", "TPU v6e"]},
    ]
    heads, *body = device_costs.fitting_table({"m": rows}).cells
    assert heads == ["accelerator", "GB", "m"]
    assert ["TPU v5e", "16", ""] in body
    assert ["TPU v6e", "32", "2"] in body
    assert ["H200", "141", "1"] in body


SHARDED = """
import json, sys
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import Mesh
from continuous_lm.experiments.benchmarks import program_costs
from continuous_lm.models.checkpoints import trunk
from tests.fixtures import tiny
fields = tiny.llama_config(
    model_type="llama", num_hidden_layers=4, hidden_size=256, head_dim=64, intermediate_size=512
)
config, task = trunk.read_config(fields), program_costs.SweepBatch(12, 4, 6)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
arguments = program_costs.program_arguments(config, mesh, task, jnp.float32)
held = program_costs.bytes_per_device(arguments)
found = program_costs.compile_sweep(config, mesh, task).memory_analysis().argument_size_in_bytes
whole = program_costs.count_product_flops(config, task)
ratio = 4 * program_costs.count_cost(config, mesh, task).operations / whole
print(json.dumps([held, found, ratio]))
"""


SMALL_GROWTH = """
import sys
from continuous_lm.experiments.common import program
from tests.fixtures import small_growth
program.main(program.RunConfig, small_growth.run, sys.argv[1:])
"""


def python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


@pytest.mark.slow
def test_four_devices_share_the_work():
    flag = "--xla_force_host_platform_device_count=4"
    held, actual, ratio = json.loads(python(SHARDED, XLA_FLAGS=flag))
    assert held == pytest.approx(actual, abs=64)
    assert 1.0 <= ratio < 1.1


def test_unknown_shapes_are_refused():
    with pytest.raises(clm.InputError, match="--shapes is 'Lama'; it must be of Llama"):
        device_costs.Config(shapes=("Lama",))


def test_a_process_with_few_devices_is_refused():
    assert jax.device_count() < device_costs.MAX_DEVICES
    with pytest.raises(clm.InputError, match="run it in a process of its own"):
        device_costs.run(device_costs.Config())


@pytest.mark.slow
def test_the_program_writes_what_it_prints(tmp_path):
    out = python(SMALL_GROWTH, "small_growth", f"--output_dir={tmp_path}")
    rows = json.loads((tmp_path / "device_costs.json").read_text())["growth"]["small"]
    all_accelerators = list(device_costs.ACCELERATOR_GIGABYTES)
    assert [row["at_once"] for row in rows] == [4, 4]
    for row in rows:
        assert row["fits"] == all_accelerators
        assert row["over_products"] > 1.0
    assert device_costs.growth_table({"small": rows}).as_text() in out
    for name in ("growth", "memory", "fitting"):
        assert "small" in (tmp_path / f"{name}.md").read_text()
