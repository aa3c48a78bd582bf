"""Our quantizers against vector-quantize-pytorch's: error and code use on the same batches.

    python -m continuous_lm vector_quantizers [--steps=200] [--num_seeds=5]

Vectors are drawn from a mixture of correlated Gaussians. Both sides see the same batches, with the
same codebook sizes, decay, k-means initialisation on the first batch and threshold of revival; for
FSQ, with the same first weights of the linear maps around it, and Adam. Measured on vectors that
neither has seen: the squared error for each dimension, as a part of the variance, and the
perplexity of the codes (of the first stage, for residual quantizers). Mean and standard deviation
over seeds, and the mean and standard error of the difference of a seed's two runs.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from continuous_lm import quantize as q
from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import baselines
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json

_WIDTH = flags.DEFINE_integer("width", 16, "Of the vectors.")
_COMPONENTS = flags.DEFINE_integer("components", 64, "Of the mixture.")
_CODES = flags.DEFINE_integer("codes", 256, "Of a codebook.")
_STAGES = flags.DEFINE_integer("stages", 4, "Of the residual quantizer.")
_LEVELS = flags.DEFINE_list(
    "levels", ["8", "5", "5", "5"], "Of finite scalar quantization."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1024, "Vectors a step.")
_STEPS = flags.DEFINE_integer("steps", 200, "Batches.")
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 5, "Runs of each.")
_DECAY = flags.DEFINE_float("decay", 0.95, "Of the moving averages.")
_KMEANS_STEPS = flags.DEFINE_integer(
    "kmeans_steps", 10, "Steps of k-means at the start."
)
_REVIVAL_THRESHOLD = flags.DEFINE_float(
    "revival_threshold", 2.0, "Codes with a smaller count are replaced."
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Learning rate, for FSQ.")


def draw_vectors(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches [steps, batch, W] and unseen vectors [4 batch, W]."""
    rng = np.random.default_rng(seed)
    width, components = _WIDTH.value, _COMPONENTS.value
    means = rng.normal(size=(components, width))
    factors = 0.3 * rng.normal(size=(components, width, width)) / np.sqrt(width)
    component_weights = rng.dirichlet(np.full(components, 2.0))
    steps, batch_size = _STEPS.value, _BATCH_SIZE.value
    component_indices = rng.choice(
        components, p=component_weights, size=(steps + 4) * batch_size
    )
    noise = rng.normal(size=(len(component_indices), width))
    x = means[component_indices] + np.einsum(
        "bw,bwW->bW", noise, factors[component_indices]
    )
    x = (x / x.std()).astype(np.float32)
    return x[: steps * batch_size].reshape(steps, batch_size, width), x[
        steps * batch_size :
    ]


def error_and_perplexity(x, vectors, indices, num_codes: int) -> tuple[float, float]:
    """Error as a part of the variance, and perplexity."""
    error = np.mean(np.square(x - np.asarray(vectors))) / np.mean(x.var(axis=0))
    return float(error), float(q.code_use(np.asarray(indices), num_codes).perplexity)


# --- Ours ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("stages", "num_codes", "kmeans_steps"))
def train_codebook(
    key, batches, stages: int, num_codes: int, kmeans_steps: int, decay, threshold
):
    """A codebook after all batches; residual ones if there are stages."""
    quantize_vectors: Callable[..., Any] = q.quantize_residual if stages else q.quantize
    update_codebook: Callable[..., Any] = (
        q.update_residual_ema if stages else q.update_ema
    )
    revive_codes: Callable[..., Any] = q.revive_residual if stages else q.revive
    if stages:
        codebook = q.init_residual(
            key, batches[0], stages, num_codes, steps=kmeans_steps
        )
    else:
        codebook = q.init(key, batches[0], num_codes, steps=kmeans_steps)

    def step(codebook, inputs):
        i, x = inputs
        codebook = update_codebook(
            codebook, x, quantize_vectors(codebook, x).indices, decay=decay
        )
        return revive_codes(
            jax.random.fold_in(key, i), codebook, x, threshold=threshold
        ), None

    return jax.lax.scan(step, codebook, (jnp.arange(len(batches)), batches))[0]


def run_our_codebook(seed, batches, unseen, stages=0):
    """Error and perplexity of our quantizer, residual if there are stages."""
    codebook = train_codebook(
        jax.random.key(seed),
        batches,
        stages,
        _CODES.value,
        _KMEANS_STEPS.value,
        _DECAY.value,
        _REVIVAL_THRESHOLD.value,
    )
    quantize: Callable[..., Any] = q.quantize_residual if stages else q.quantize
    quantized = quantize(codebook, unseen)
    indices = quantized.indices[:, 0] if stages else quantized.indices
    return error_and_perplexity(unseen, quantized.vectors, indices, _CODES.value)


def run_our_fsq(seed, batches, unseen):
    """Error and perplexity of our finite scalar quantizer."""
    levels = tuple(map(int, _LEVELS.value))
    initial_weights = make_their_fsq(seed).state_dict()
    params = {
        name: jnp.asarray(initial_weights[name].numpy())
        for name in initial_weights
        if "project" in name
    }
    optimizer = optax.adam(_LEARNING_RATE.value)

    def encode_and_decode(params, x):
        x = x @ params["project_in.weight"].T + params["project_in.bias"]
        quantized = q.quantize_finite(x, levels)
        output = (
            quantized.vectors @ params["project_out.weight"].T
            + params["project_out.bias"]
        )
        return output, quantized.indices

    @jax.jit
    def fit(params):
        def step(carry, x):
            params, optimizer_state = carry
            gradient = jax.grad(
                lambda p: jnp.mean(jnp.square(encode_and_decode(p, x)[0] - x))
            )(params)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state)
            return (optax.apply_updates(params, updates), optimizer_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    vectors, indices = encode_and_decode(fit(params), unseen)
    return error_and_perplexity(unseen, vectors, indices, int(np.prod(levels)))


# --- Theirs ----------------------------------------------------------------------------------


def run_their_codebook(seed, batches, unseen, stages=0):
    """Error and perplexity of vector-quantize-pytorch's quantizer, residual if there are stages."""
    torch, library = (
        baselines.import_baseline("torch"),
        baselines.import_baseline("vector_quantize_pytorch"),
    )
    torch.manual_seed(seed)
    settings = dict(
        dim=_WIDTH.value,
        codebook_size=_CODES.value,
        decay=_DECAY.value,
        kmeans_init=True,
        kmeans_iters=_KMEANS_STEPS.value,
        threshold_ema_dead_code=_REVIVAL_THRESHOLD.value,
    )
    if stages:
        module = library.ResidualVQ(num_quantizers=stages, **settings)
    else:
        module = library.VectorQuantize(**settings)
    with torch.no_grad():
        for x in batches:
            module(torch.from_numpy(x)[None])
        module.eval()
        vectors, indices, _ = module(torch.from_numpy(unseen)[None])
    indices = indices[0, :, 0] if stages else indices[0]
    return error_and_perplexity(unseen, vectors[0], indices, _CODES.value)


def make_their_fsq(seed):
    """vector-quantize-pytorch's finite scalar quantizer, with its linear maps."""
    baselines.import_baseline("torch").manual_seed(seed)
    return baselines.import_baseline("vector_quantize_pytorch").FSQ(
        levels=list(map(int, _LEVELS.value)), dim=_WIDTH.value
    )


def run_their_fsq(seed, batches, unseen):
    """Error and perplexity of `make_their_fsq`, trained by PyTorch."""
    torch = baselines.import_baseline("torch")
    module = make_their_fsq(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=_LEARNING_RATE.value)
    for x in batches:
        x = torch.from_numpy(x)[None]
        optimizer.zero_grad()
        torch.mean(torch.square(module(x)[0] - x)).backward()
        optimizer.step()
    with torch.no_grad():
        vectors, indices = module(torch.from_numpy(unseen)[None])
    return error_and_perplexity(
        unseen, vectors[0], indices[0], int(np.prod(module._levels.numpy()))
    )


def main() -> None:
    """Runs both sides on the same batches; writes every number and prints the table."""
    for name in ("torch", "vector_quantize_pytorch"):
        if missing := baselines.why_missing(name):
            raise InputError(f"{missing}; pip install -e '.[peers]'")
    folder = program.output_dir("vector_quantizers")
    stages = _STAGES.value
    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        f"VQ {_CODES.value}": (run_our_codebook, run_their_codebook),
        f"residual VQ {stages} x {_CODES.value}": (
            functools.partial(run_our_codebook, stages=stages),
            functools.partial(run_their_codebook, stages=stages),
        ),
        f"FSQ {' '.join(_LEVELS.value)}": (run_our_fsq, run_their_fsq),
    }
    runs: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in pairs}
    for seed in range(_NUM_SEEDS.value):
        data = draw_vectors(seed)
        for name, pair in pairs.items():
            for results, run in zip(runs[name], pair, strict=True):
                results.append(run(seed, *data))
    print(
        f"{_NUM_SEEDS.value} seeds, {_STEPS.value} batches of {_BATCH_SIZE.value} x {_WIDTH.value}"
    )
    with write_atomically(folder) as staging_folder:
        results_by_side = {
            name: {
                side: [
                    dict(zip(("error", "perplexity"), run, strict=True))
                    for run in side_runs
                ]
                for side, side_runs in zip(("ours", "theirs"), sides, strict=True)
            }
            for name, sides in runs.items()
        }
        write_json(
            staging_folder / "vector_quantizers.json",
            {"quantizers": results_by_side, "run": program.record()},
        )
    print(f"{'':22}  {'':10}  {'ours':>18}  {'theirs':>18}  {'ours - theirs':>18}")
    for name, (ours, theirs) in runs.items():
        for i, metric in enumerate(("error", "perplexity")):
            our_values, their_values = (
                [run[i] for run in runs_of_side] for runs_of_side in (ours, theirs)
            )
            difference = [x - y for x, y in zip(our_values, their_values, strict=True)]
            standard_error = statistics.stdev(difference) / len(difference) ** 0.5
            print(
                f"{name:22}  {metric:10}  {format_mean_deviation(our_values)} "
                f" {format_mean_deviation(their_values)}"
                f"  {statistics.mean(difference):9.4f} ± {standard_error:6.4f}"
            )
    print(f"\n{folder}/vector_quantizers.json")


def format_mean_deviation(values: list[float]) -> str:
    """Mean and standard deviation."""
    digits = 4 if max(values) < 10 else 1
    return f"{statistics.mean(values):9.{digits}f} ± {statistics.stdev(values):6.{digits}f}"


if __name__ == "__main__":
    program.run(main)
