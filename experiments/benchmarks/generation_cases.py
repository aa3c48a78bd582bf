"""The benchmark's text: tokens a second of `generate`, of transformers', and of next-vector models.

Random models in float32 continue prompts of 64 tokens by 128, in batches of 1 and of 8.
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import baselines, timing
from continuous_lm.experiments.benchmarks.timing import Row
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.densities import density_training
from continuous_lm.models import calm
from continuous_lm.models.calm.implicit_heads import EnergyHead
from continuous_lm.models.samplers import Sampler

PROMPT_LENGTH, NUM_NEW_TOKENS, BATCH_SIZES = 64, 128, (1, 8)
TRUNK_SIZES: Mapping[str, int] = dict(
    vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8
)
TINY_SIZES: Mapping[str, int] = dict(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4
)


def generation_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """Greedy tokens of a Llama, against transformers' `generate`; both make the same ones."""
    missing_reason = baselines.why_missing("torch", "transformers")
    lm, num_new_tokens = (
        random_softmax_lm(TINY_SIZES if quick else TRUNK_SIZES),
        8 if quick else NUM_NEW_TOKENS,
    )
    for batch_size in BATCH_SIZES:
        label = f"batch {batch_size}: times as fast as transformers"
        if missing_reason:
            yield Row(label, note=missing_reason)
            continue
        prompts = random_prompts(lm.config.vocab_size, batch_size)
        generate = functools.partial(
            clm.generate, lm, prompts, max_new_tokens=num_new_tokens, stop=()
        )
        transformers_generate = prepare_transformers_generate(
            lm, prompts, num_new_tokens
        )
        share_equal = np.mean(generate().tokens == transformers_generate())
        seconds = timing.time_in_turns(
            {"ours": generate, "theirs": transformers_generate}, repeats
        )
        rate = format_rate(batch_size * num_new_tokens, seconds["ours"])
        note = f"{rate}, {share_equal:.1%} of them the same"
        yield timing.speedup_row(label, seconds["ours"], seconds["theirs"], note=note)


def prepare_transformers_generate(
    lm: clm.LanguageModel, prompts: np.ndarray, num_new_tokens: int
) -> Callable[[], Any]:
    """The same weights and prompts in transformers."""
    torch = baselines.import_baseline("torch")
    with tempfile.TemporaryDirectory() as folder:
        clm.save(folder, lm)
        model: Any = baselines.load_causal_lm(folder, "sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    tokens = torch.tensor(prompts)
    generate = functools.partial(
        model.generate,
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=num_new_tokens,
        do_sample=False,
    )
    return lambda: generate()[:, prompts.shape[1] :].numpy()


def next_vector_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """Drawn tokens of next-vector models of C tokens a vector, against softmax models.

    At temperature 1, and at 1/2 from 64 candidates. Beside its trunk a next-vector model has an
    energy head of 3 blocks and an autoencoder 256 wide: the softmax model that it is measured
    against is as large as that of K = 4, with 4 layers more.
    """
    trunk_sizes, num_new_tokens = (
        (TINY_SIZES, 8) if quick else (TRUNK_SIZES, NUM_NEW_TOKENS)
    )
    same_trunk_lm, equal_size_lm = (
        random_softmax_lm({**trunk_sizes, "num_layers": trunk_sizes["num_layers"] + n})
        for n in (0, 4)
    )
    models = {
        chunk_size: random_next_vector_lm(trunk_sizes, chunk_size)
        for chunk_size in ((4,) if quick else (1, 2, 4, 8))
    }
    for batch_size in BATCH_SIZES[:1] if quick else BATCH_SIZES:
        prompts = random_prompts(trunk_sizes["vocab_size"], batch_size)
        shared_arguments: dict[str, Any] = dict(
            max_new_tokens=num_new_tokens, key=jax.random.key(0), stop=()
        )
        models_and_samplers: dict[str, tuple[Any, Sampler[Any]]] = {
            "softmax of equal size": (equal_size_lm, clm.Temperature()),
            "softmax with the same trunk": (same_trunk_lm, clm.Temperature()),
        }
        for chunk_size, lm in models.items():
            models_and_samplers |= {
                f"K = {chunk_size}": (lm, calm.Repetition()),
                f"K = {chunk_size}, T = 1/2": (
                    lm,
                    calm.Repetition(0.5, num_candidates=64),
                ),
            }
        callables = {
            side_name: functools.partial(
                clm.generate, lm, prompts, sampler=sampler, **shared_arguments
            )
            for side_name, (lm, sampler) in models_and_samplers.items()
        }
        seconds = timing.time_in_turns(callables, repeats)
        baseline_seconds = seconds["softmax of equal size"]
        for side_name, side_seconds in seconds.items():
            num_parameters = sum(
                leaf.size
                for leaf in jax.tree.leaves(models_and_samplers[side_name][0].params)
            )
            yield timing.speedup_row(
                f"batch {batch_size}, {side_name}: times as fast as softmax of equal size",
                side_seconds,
                baseline_seconds,
                note=f"{format_rate(batch_size * num_new_tokens, side_seconds)},"
                f" {num_parameters / 1e6:.0f} M numbers",
            )


def format_rate(tokens: int, seconds: Sequence[float]) -> str:
    """The median speed, in words."""
    return f"{tokens / statistics.median(seconds):.3g} tokens/s"


def random_prompts(vocab_size: int, batch_size: int) -> np.ndarray:
    """Prompts [B, T]."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch_size, PROMPT_LENGTH))


def random_softmax_lm(trunk_sizes: Mapping[str, int]) -> clm.LanguageModel:
    """A Llama whose weights are so large that it does not repeat one token."""
    config = density_training.trunk_config(**trunk_sizes)
    variables = clm.Transformer(config).init(jax.random.key(0), np.zeros(1, np.int32))
    params = jax.tree.map(
        lambda x: 7.0 * x if x.ndim > 1 else x, nn.unbox(variables["params"])
    )
    return clm.LanguageModel(clm.Transformer(config), params)


def random_next_vector_lm(
    trunk_sizes: Mapping[str, int], chunk_size: int
) -> clm.LanguageModel[calm.NextVectorModel]:
    """A model of vectors of C tokens, on the trunk of `trunk_sizes`."""
    width = trunk_sizes["hidden_size"]
    codec = calm_training.create_codec(
        jax.random.key(0),
        vocab_size=trunk_sizes["vocab_size"],
        hidden_size=width // 2,
        chunk_size=chunk_size,
        latent_size=width // 4,
    )
    head = EnergyHead(width // 4, depth=3)
    return calm.create(
        jax.random.key(1), density_training.trunk_config(**trunk_sizes), codec, head
    )
