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

PROMPT, NEW, BATCHES = 64, 128, (1, 8)
TRUNK: Mapping[str, int] = dict(vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8)
TINY: Mapping[str, int] = dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4)


def generation(quick: bool, repeats: int) -> Iterator[Row]:
    """Greedy tokens of a Llama, against transformers' `generate`; both make the same ones."""
    absent = baselines.missing("torch", "transformers")
    lm, new = discrete(TINY if quick else TRUNK), 8 if quick else NEW
    for batch in BATCHES:
        what = f"batch {batch}: times as fast as transformers"
        if absent:
            yield Row(what, note=absent)
            continue
        prompts = drawn(lm.config.vocab_size, batch)
        generate = functools.partial(clm.generate, lm, prompts, max_new_tokens=new, stop=())
        theirs = their_generation(lm, prompts, new)
        same = np.mean(generate().tokens == theirs())
        taken = timing.in_turns({"ours": generate, "theirs": theirs}, repeats)
        note = f"{rate(batch * new, taken['ours'])}, {same:.1%} of them the same"
        yield timing.times_as_fast(what, taken["ours"], taken["theirs"], note=note)


def their_generation(lm: clm.LanguageModel, prompts: np.ndarray, new: int) -> Callable[[], Any]:
    """The same weights and prompts in transformers."""
    torch = baselines.load("torch")
    with tempfile.TemporaryDirectory() as folder:
        clm.save(folder, lm)
        model = baselines.causal_lm(folder, "sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    tokens = torch.tensor(prompts)
    generate = functools.partial(
        model.generate,
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
    )
    return lambda: generate()[:, prompts.shape[1] :].numpy()


def next_vectors(quick: bool, repeats: int) -> Iterator[Row]:
    """Drawn tokens of next-vector models of K tokens a vector, against softmax models.

    At temperature 1, and at 1/2 from 64 candidates. Beside its trunk a next-vector model has an
    energy head of 3 blocks and an autoencoder 256 wide: the softmax model that it is measured
    against is as large as that of K = 4, with 4 layers more.
    """
    shape, new = (TINY, 8) if quick else (TRUNK, NEW)
    same, equal = (discrete({**shape, "num_layers": shape["num_layers"] + n}) for n in (0, 4))
    models = {k: of_vectors(shape, k) for k in ((4,) if quick else (1, 2, 4, 8))}
    for batch in BATCHES[:1] if quick else BATCHES:
        prompts = drawn(shape["vocab_size"], batch)
        common: dict[str, Any] = dict(max_new_tokens=new, key=jax.random.key(0), stop=())
        softmax = functools.partial(clm.generate, temperature=1.0, **common)
        draw = functools.partial(calm.sample, **common)
        cooler = functools.partial(draw, temperature=0.5, candidates=64)
        sides: dict[str, tuple[Any, Callable[..., Any]]] = {
            "softmax of equal size": (equal, softmax),
            "softmax with the same trunk": (same, softmax),
        }
        for k, lm in models.items():
            sides |= {f"K = {k}": (lm, draw), f"K = {k}, T = 1/2": (lm, cooler)}
        ways = {name: functools.partial(run, lm, prompts) for name, (lm, run) in sides.items()}
        seconds = timing.in_turns(ways, repeats)
        base = seconds["softmax of equal size"]
        for name, taken in seconds.items():
            numbers = sum(leaf.size for leaf in jax.tree.leaves(sides[name][0].params))
            yield timing.times_as_fast(
                f"batch {batch}, {name}: times as fast as softmax of equal size",
                taken,
                base,
                note=f"{rate(batch * new, taken)}, {numbers / 1e6:.0f} M numbers",
            )


def rate(tokens: int, seconds: Sequence[float]) -> str:
    """The median speed, in words."""
    return f"{tokens / statistics.median(seconds):.3g} tokens/s"


def drawn(vocab_size: int, batch: int) -> np.ndarray:
    """Prompts [B, T]."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, PROMPT))


def discrete(shape: Mapping[str, int]) -> clm.LanguageModel:
    """A Llama whose weights are so large that it does not repeat one token."""
    config = density_training.trunk(**shape)
    made = clm.Transformer(config).init(jax.random.key(0), np.zeros(1, np.int32))
    params = jax.tree.map(lambda x: 7.0 * x if x.ndim > 1 else x, nn.unbox(made["params"]))
    return clm.LanguageModel(config, params)


def of_vectors(shape: Mapping[str, int], chunk_size: int) -> calm.NextVectorLM:
    """A model of vectors of K tokens, on the trunk of `shape`."""
    width = shape["hidden_size"]
    codec = calm_training.new_codec(
        jax.random.key(0),
        vocab_size=shape["vocab_size"],
        hidden_size=width // 2,
        chunk_size=chunk_size,
        latent_size=width // 4,
    )
    head = EnergyHead(width // 4, depth=3)
    return calm.create(jax.random.key(1), density_training.trunk(**shape), codec, head)
