"""Tokens a second of next-vector models against a model of single tokens with the same trunk.

    python -m tests.benchmarks.next_vector [--chunks 1 2 4 8] [--batch 1 8] [--repeats 3]

A random trunk of 8 layers, 512 wide, and a vocabulary of 8192, in float32: prompts of 64 tokens are
continued by 128 tokens, drawn at temperature 1; and, for next vectors, at 1/2 from 64 candidates.
All take turns, so that what else the machine does falls on all; the median time of each counts.
Beside its trunk, a next-vector model has an energy head of 3 blocks and an autoencoder 256 wide:
"tokens" has the same trunk, and "equal" 4 layers more, which makes it about as large as K = 4.
"""

import argparse
import statistics
import time

import flax.linen as nn
import jax
import numpy as np

import continuous_lm as clm
from continuous_lm.experiments.calm import trunk
from continuous_lm.experiments.next_vector import new_codec
from continuous_lm.models import calm, calm_sampling
from continuous_lm.models.implicit import EnergyHead

PROMPT, NEW, VOCABULARY, WIDTH, LAYERS = 64, 128, 8192, 512, 8


def discrete(layers: int) -> clm.LanguageModel:
    config = trunk(vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=layers, num_heads=8)
    made = clm.Transformer(config).init(jax.random.key(0), np.zeros(1, np.int32))
    return clm.LanguageModel(config, nn.unbox(made["params"]))


def next_vector(chunk_size: int) -> calm.NextVectorLM:
    codec = new_codec(
        jax.random.key(0),
        vocab_size=VOCABULARY,
        hidden_size=256,
        chunk_size=chunk_size,
        latent_size=128,
    )
    config = trunk(vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=LAYERS, num_heads=8)
    return calm.create(jax.random.key(1), config, codec, EnergyHead(128, depth=3))


def size(params) -> float:
    return sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6


def compare(models: dict, batch: int, repeats: int) -> None:
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (batch, PROMPT))
    key, runs = jax.random.key(0), {}
    for name, lm in models.items():
        common = dict(max_new_tokens=NEW, key=key, stop=())
        if isinstance(lm, clm.LanguageModel):
            runs[name, "1"] = lambda lm=lm, o=common: clm.generate(
                lm, prompts, temperature=1.0, **o
            )
            continue
        runs[name, "1"] = lambda lm=lm, o=common: calm_sampling.sample(lm, prompts, **o)
        runs[name, "1/2"] = lambda lm=lm, o=common: calm_sampling.sample(
            lm, prompts, temperature=0.5, candidates=64, **o
        )
    seconds: dict = {way: [] for way in runs}
    for repeat in range(repeats + 1):
        for way, run in runs.items():
            began = time.perf_counter()
            assert (run().lengths == NEW).all()
            if repeat:  # the first one compiles
                seconds[way].append(time.perf_counter() - began)
    base = statistics.median(seconds["equal", "1"])
    for (name, temperature), taken in seconds.items():
        middle = statistics.median(taken)
        spread = f"{min(taken):.2f} to {max(taken):.2f} s"
        print(
            f"batch {batch}  {name:8s} T = {temperature:3s}  {batch * NEW / middle:7.1f} tokens/s"
            f"  ratio {base / middle:5.2f}  ({spread})  {size(models[name].params):.0f} M numbers",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    models = {"tokens": discrete(LAYERS), "equal": discrete(LAYERS + 4)}
    models |= {f"K = {k}": next_vector(k) for k in arguments.chunks}
    for batch in arguments.batch:
        compare(models, batch, arguments.repeats)


if __name__ == "__main__":
    main()
