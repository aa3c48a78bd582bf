"""Tokens a second of `generate` and of transformers' `generate`, side by side.

    python -m tests.benchmarks.generation [--batch 1 8] [--repeats 3]

A random Llama of 29 million parameters in float32 continues prompts of 64 tokens by 128 greedy
tokens, in batches of 1 and of 8. The two take turns, so that what else the machine does falls on
both; the best time of each counts. Both must make the same tokens.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np
import torch
import transformers

import continuous_lm as clm
from continuous_lm.models import generation

CONFIG = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    initializer_range=0.15,
)
PROMPT, NEW = 64, 128


def seconds(run) -> tuple[float, np.ndarray]:
    began = time.perf_counter()
    tokens = run()
    return time.perf_counter() - began, tokens


def compare(lm: clm.LanguageModel, reference, batch: int, repeats: int) -> None:
    prompts = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (batch, PROMPT))
    inputs = torch.tensor(prompts)

    def ours() -> np.ndarray:
        return generation.generate(lm, prompts, max_new_tokens=NEW, stop=()).tokens

    def theirs() -> np.ndarray:
        out = reference.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NEW,
            do_sample=False,
        )
        return out[:, PROMPT:].numpy()

    first, tokens = seconds(ours)
    expected = theirs()
    best = [np.inf, np.inf]
    for _ in range(repeats):
        for i, run in enumerate((ours, theirs)):
            best[i] = min(best[i], seconds(run)[0])
    rates = [batch * NEW / t for t in best]
    print(
        f"batch {batch}: ours {rates[0]:.1f} tokens/s, transformers {rates[1]:.1f} tokens/s,"
        f" ratio {rates[0] / rates[1]:.2f}; compile {first - best[0]:.1f} s;"
        f" same tokens: {(tokens == expected).mean():.1%}, {len(set(tokens[0].tolist()))} distinct",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG)
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(pathlib.Path(folder))
        lm = clm.load(folder)
    million = sum(p.numel() for p in reference.parameters()) / 1e6
    print(f"{million:.1f} million parameters, {torch.get_num_threads()} threads", flush=True)
    for batch in arguments.batch:
        compare(lm, reference, batch, arguments.repeats)


if __name__ == "__main__":
    main()
