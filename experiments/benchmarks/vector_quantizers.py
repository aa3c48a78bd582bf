"""Our quantizers against vector-quantize-pytorch's: error and code use on the same batches.

    python -m continuous_lm vector_quantizers [--steps=200] [--num_seeds=5]

Vectors are drawn from a mixture of correlated Gaussians. Both sides are trained on the same
batches, with the same codebook sizes, decay, k-means initialisation on the first batch and
threshold of revival. For FSQ both have the same initial linear maps around it, and Adam. On new
vectors, two numbers are measured: the squared error of each dimension as a part of the variance,
and the perplexity of the codes (of the first stage, for residual quantizers). The table has the
mean and standard deviation over seeds, and the mean and standard error of the difference of a
seed's runs.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from continuous_lm import quantize as q
from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import baselines, codebooks
from continuous_lm.experiments.benchmarks.codebooks import CodebookSettings
from continuous_lm.experiments.common import program, results, tables

if TYPE_CHECKING:
    import torch

SIDES = ("ours", "theirs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.RunConfig):
    """Flags of vector_quantizers."""

    width: int = program.flag(16, help="Width of the vectors.", lower_bound=1)
    components: int = program.flag(64, help="Components of the mixture.", lower_bound=1)
    codes: int = program.flag(256, help="Codes of a codebook.", lower_bound=1)
    stages: int = program.flag(
        4, help="Stages of the residual quantizer.", lower_bound=1
    )
    levels: tuple[int, ...] = program.flag(
        (8, 5, 5, 5), help="Levels of finite scalar quantization."
    )
    batch_size: int = program.flag(1024, help="Vectors in a step.", lower_bound=1)
    steps: int = program.flag(200, help="Batches of a run.", lower_bound=1)
    num_seeds: int = program.flag(5, help="Runs of each quantizer.", lower_bound=2)
    decay: float = program.flag(0.95, help="Decay of the moving averages.")
    kmeans_steps: int = program.flag(10, help="Steps of k-means at the start.")
    revival_threshold: float = program.flag(
        2.0, help="Codes with a smaller count are replaced."
    )
    learning_rate: float = program.flag(3e-3, help="Learning rate, for FSQ.")

    def codebook_settings(self, num_stages: int = 0) -> CodebookSettings:
        return CodebookSettings(
            self.codes,
            num_stages,
            self.decay,
            self.kmeans_steps,
            self.revival_threshold,
        )


class Data(NamedTuple):
    """Vectors of one seed."""

    batches: np.ndarray  # [steps, B, W]
    unseen: np.ndarray  # [4 B, W]


class Score(NamedTuple):
    """Scores of one run on new vectors."""

    error: float  # squared, as a part of the variance
    perplexity: float  # of the codes


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Scores of both sides.

    Attributes:
      scores: quantizer -> side -> the score of each seed.
    """

    scores: Mapping[str, Mapping[str, Sequence[Score]]]

    def table(self) -> tables.Table:
        """Means and deviations over seeds, and the mean difference with its standard error."""
        rows = [
            [name, metric, *_comparison(scores_by_side, metric)]
            for name, scores_by_side in self.scores.items()
            for metric in Score._fields
        ]
        titles = ("quantizer", "metric", *SIDES, "ours - theirs")
        return tables.Table(
            "vector_quantizers",
            "Quantizers on the same batches: mean and standard deviation over seeds; mean and"
            " standard error of the difference",
            [tables.Column(title) for title in titles],
            rows,
        )

    def summary(self) -> str:
        return self.table().as_text()


def _comparison(
    scores_by_side: Mapping[str, Sequence[Score]], metric: str
) -> list[str]:
    """The cells of a metric: both sides, and their difference."""
    values_by_side = [
        [getattr(score, metric) for score in scores_by_side[side]] for side in SIDES
    ]
    differences = [ours - theirs for ours, theirs in zip(*values_by_side, strict=True)]
    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
    sides = [_format_mean_deviation(values) for values in values_by_side]
    return [*sides, f"{statistics.mean(differences):.4f} ± {standard_error:.4f}"]


def _format_mean_deviation(values: Sequence[float]) -> str:
    digits = 4 if max(values) < 10 else 1
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def draw_data(config: Config, seed: int) -> Data:
    """Vectors from a mixture of correlated Gaussians."""
    generator = np.random.default_rng(seed)
    width, components = config.width, config.components
    means = generator.normal(size=(components, width))
    factors = 0.3 * generator.normal(size=(components, width, width)) / np.sqrt(width)
    shares = generator.dirichlet(np.full(components, 2.0))
    num_vectors = (config.steps + 4) * config.batch_size
    component_indices = generator.choice(components, p=shares, size=num_vectors)
    noise = generator.normal(size=(num_vectors, width))
    correlated_noise = np.einsum("bw,bwW->bW", noise, factors[component_indices])
    x = means[component_indices] + correlated_noise
    x = (x / x.std()).astype(np.float32)
    num_trained = config.steps * config.batch_size
    batches = x[:num_trained].reshape(config.steps, config.batch_size, width)
    return Data(batches, x[num_trained:])


def score_codes(
    x: np.ndarray, vectors: ArrayLike, indices: ArrayLike, num_codes: int
) -> Score:
    """The score of codes [B] and their vectors [B, W], for vectors x [B, W]."""
    error = np.mean(np.square(x - np.asarray(vectors))) / np.mean(x.var(axis=0))
    use = q.code_use(np.asarray(indices), num_codes)
    return Score(float(error), float(use.perplexity))


# --- Ours ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def train_codebook(
    key: jax.Array, batches: jax.Array, settings: CodebookSettings
) -> q.Codebook:
    """The codebook after batches [steps, B, W]."""
    first_codebook = codebooks.init(key, batches[0], settings)

    def step(codebook, numbered_batch):
        index, x = numbered_batch
        step_key = jax.random.fold_in(key, index)
        return codebooks.train_step(step_key, codebook, x, settings), None

    numbered_batches = (jnp.arange(len(batches)), batches)
    codebook, _ = jax.lax.scan(step, first_codebook, numbered_batches)
    return codebook


def run_our_codebook(
    config: Config, seed: int, data: Data, num_stages: int = 0
) -> Score:
    """Our quantizer's score; residual if there are stages, of which the first is scored."""
    settings = config.codebook_settings(num_stages)
    codebook = train_codebook(jax.random.key(seed), jnp.asarray(data.batches), settings)
    quantized = codebooks.quantize(codebook, data.unseen, settings)
    indices = quantized.indices[:, 0] if num_stages else quantized.indices
    return score_codes(data.unseen, quantized.vectors, indices, config.codes)


def run_our_fsq(config: Config, seed: int, data: Data) -> Score:
    """Our finite scalar quantizer's score, from the first weights of theirs."""
    initial_weights = make_their_fsq(config, seed).state_dict()
    first_params = {
        name: jnp.asarray(weight.numpy())
        for name, weight in initial_weights.items()
        if "project" in name
    }
    optimizer = optax.adam(config.learning_rate)

    def encode_and_decode(params, x):
        latent = x @ params["project_in.weight"].T + params["project_in.bias"]
        quantized = q.quantize_finite(latent, config.levels)
        output = quantized.vectors @ params["project_out.weight"].T
        return output + params["project_out.bias"], quantized.indices

    def reconstruction_error(params, x):
        output, _ = encode_and_decode(params, x)
        return jnp.mean(jnp.square(output - x))

    def step(carry, x):
        params, optimizer_state = carry
        gradient = jax.grad(reconstruction_error)(params, x)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), None

    @jax.jit
    def fit(params, batches):
        first_carry = (params, optimizer.init(params))
        (params, _), _ = jax.lax.scan(step, first_carry, batches)
        return params

    params = fit(first_params, jnp.asarray(data.batches))
    vectors, indices = encode_and_decode(params, data.unseen)
    return score_codes(data.unseen, vectors, indices, math.prod(config.levels))


# --- Theirs ----------------------------------------------------------------------------------


def run_their_codebook(
    config: Config, seed: int, data: Data, num_stages: int = 0
) -> Score:
    """vector-quantize-pytorch's score, as in `run_our_codebook`."""
    torch = baselines.import_baseline("torch")
    torch.manual_seed(seed)
    module = codebooks.make_theirs(config.width, config.codebook_settings(num_stages))
    with torch.no_grad():
        for x in data.batches:
            module(torch.from_numpy(x)[None])
        module.eval()
        vectors, indices, _ = module(torch.from_numpy(data.unseen)[None])
    indices = indices[0, :, 0] if num_stages else indices[0]
    return score_codes(data.unseen, vectors[0], indices, config.codes)


def make_their_fsq(config: Config, seed: int) -> "torch.nn.Module":
    """vector-quantize-pytorch's finite scalar quantizer, with its linear maps."""
    baselines.import_baseline("torch").manual_seed(seed)
    library = baselines.import_baseline("vector_quantize_pytorch")
    return library.FSQ(levels=list(config.levels), dim=config.width)


def run_their_fsq(config: Config, seed: int, data: Data) -> Score:
    """The score of `make_their_fsq`, trained by PyTorch."""
    torch = baselines.import_baseline("torch")
    module = make_their_fsq(config, seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=config.learning_rate)
    for batch in data.batches:
        x = torch.from_numpy(batch)[None]
        optimizer.zero_grad()
        torch.mean(torch.square(module(x)[0] - x)).backward()
        optimizer.step()
    with torch.no_grad():
        vectors, indices = module(torch.from_numpy(data.unseen)[None])
    return score_codes(data.unseen, vectors[0], indices[0], math.prod(config.levels))


# --- The program -----------------------------------------------------------------------------

Runner = Callable[[Config, int, Data], Score]


def make_runners(config: Config) -> dict[str, dict[str, Runner]]:
    """Quantizer -> side -> how it is run."""
    stages = config.stages
    levels = " ".join(map(str, config.levels))
    return {
        f"VQ {config.codes}": {"ours": run_our_codebook, "theirs": run_their_codebook},
        f"residual VQ {stages} x {config.codes}": {
            "ours": functools.partial(run_our_codebook, num_stages=stages),
            "theirs": functools.partial(run_their_codebook, num_stages=stages),
        },
        f"FSQ {levels}": {"ours": run_our_fsq, "theirs": run_their_fsq},
    }


def run(config: Config) -> Result:
    """Run both sides on the same batches, and write every number.

    Raises:
      InputError: if PyTorch or vector-quantize-pytorch is not installed.
    """
    folder = program.output_folder(config)
    if missing := baselines.why_missing("torch", "vector_quantize_pytorch"):
        raise InputError(missing)
    runners = make_runners(config)
    scores: dict[str, dict[str, list[Score]]] = {
        name: {side: [] for side in SIDES} for name in runners
    }
    for seed in range(config.num_seeds):
        data = draw_data(config, seed)
        for name, runner_by_side in runners.items():
            for side, runner in runner_by_side.items():
                scores[name][side].append(runner(config, seed, data))
    result = Result(scores)
    if folder is not None:
        quantizers = {
            name: {
                side: [score._asdict() for score in side_scores]
                for side, side_scores in scores_by_side.items()
            }
            for name, scores_by_side in scores.items()
        }
        values = {"quantizers": quantizers}
        results.write(
            config, folder, "vector_quantizers", values, tables=[result.table()]
        )
    return result


if __name__ == "__main__":
    program.main(Config, run)
