"""Trains the embedded model: a small Llama that counts, from the prompts of `prompts`.

    python -m continuous_lm train_apples --output_dir=results/embedded --seed=0

writes a Hugging Face folder (config.json, model.safetensors in bfloat16, tokenizer.json). Every
token in training lasts 1: what the model does with other durations is for the experiments to find.

The loss is the answer's cross-entropy + 0.3 times that of every next token, in nats. An answer that
is a digit is smoothed over the ten digits (Szegedy et al., arXiv:1512.00567): all the wrong ones
alike, so that nothing says which digits are neighbours, and the log-odds of neighbouring counts
stay bounded. Where between two counts the answer changes is not in the data; it differs from run to
run.

Prompts are sorted by length into rows of similar length, so that little of a batch is padding; as
the model is causal, padding on the right changes nothing before it.
"""

import dataclasses
import functools
import itertools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

import continuous_lm as clm
from continuous_lm import axes as axes_lib
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.common import program
from continuous_lm.experiments.training import train_program
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.transformer import Transformer
from continuous_lm.parallel import processes

WARM_UP_STEPS = 100  # steps
STEPS_PER_DISPATCH = 50  # steps in one call of the jitted function
NEXT_TOKEN_WEIGHT = 0.3  # weight of the next-token loss
DIGIT_SMOOTHING = 0.05  # share of a digit's target that goes to all ten digits
EMBEDDING_STD = 0.1
LENGTH_QUANTILES = (
    0.0,
    0.375,
    0.75,
    0.917,
    1.0,
)  # quantiles of length between which rows share a width


def apples_config(vocab_size: int) -> TransformerConfig:
    """The embedded model's shape: about a quarter of a million parameters."""
    return TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        mlp_size=256,
        num_layers=2,
        num_heads=3,
        num_kv_heads=3,
        head_dim=32,
        tie_embeddings=True,
    )


def init_params(key: jax.Array, transformer_config: TransformerConfig):
    """Initial parameters: the trunk's own, with an embedding table of standard deviation 0.1."""
    params = nn.unbox(
        Transformer(transformer_config).init(key, jnp.zeros(1, jnp.int32))["params"]
    )
    table = params["embedding"]
    return params | {"embedding": table * (EMBEDDING_STD / jnp.std(table))}


def draw_batches(
    rng: np.random.Generator, tokenizer, steps: int, prompts_per_step: int
):
    """Draws `steps` batches of `prompts_per_step` prompts.

    Returns:
        For each group of lengths a pair: tokens int32 [steps, B, T] with the answer as each row's
        last token before padding, and lengths int32 [steps, B] without the answer. The groups' B
        add up to `prompts_per_step`.
    """
    sampled_prompts = [
        prompts.sample_prompt(rng) for _ in range(steps * prompts_per_step)
    ]
    rows = [
        [*encoding.ids, tokenizer.token_to_id(prompt.answer)]
        for encoding, prompt in zip(
            tokenizer.encode_batch(
                [sampled_prompt.text for sampled_prompt in sampled_prompts]
            ),
            sampled_prompts,
            strict=True,
        )
    ]
    rows.sort(key=len)  # stable: chance comes from rng alone
    group_ends = [
        round(quantile * prompts_per_step) * steps for quantile in LENGTH_QUANTILES
    ]
    groups = []
    for start, end in itertools.pairwise(group_ends):
        group = rows[start:end]
        if not group:
            continue
        padded_length = len(group[-1])
        tokens = np.zeros((len(group), padded_length), np.int32)
        for row, ids in zip(
            tokens,
            (group[row_index] for row_index in rng.permutation(len(group))),
            strict=True,
        ):
            row[: len(ids)] = ids
        lengths = np.count_nonzero(tokens, axis=-1).astype(np.int32) - 1
        groups.append(
            (tokens.reshape(steps, -1, padded_length), lengths.reshape(steps, -1))
        )
    return groups


def step_loss(
    params, model: Transformer, groups, digits: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one step, in nats, and what is worth watching.

    Args:
        params: The parameter tree.
        model: The transformer.
        groups: Pairs of tokens int [B, T] and lengths int [B], as from `draw_batches` without the
          steps.
        digits: The ids of the ten digits, int [10].
    """
    sums = jnp.zeros(
        3
    )  # of the answers' nats, the other tokens' nats, the right answers
    for tokens, lengths in groups:
        inputs, targets, answer_index = (
            tokens[:, :-1],
            tokens[:, 1:],
            lengths[:, None] - 1,
        )
        logits = cast(
            jax.Array, model.apply({"params": params}, inputs)
        )  # [B, T - 1, V]
        token_losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, targets
        )
        is_right = jnp.argmax(logits, axis=-1) == targets
        positions = jnp.arange(token_losses.shape[-1])
        digit_losses = jax.nn.logsumexp(logits, -1) - jnp.mean(logits[..., digits], -1)
        smoothing = DIGIT_SMOOTHING * jnp.isin(targets, digits)
        smoothed_losses = (1 - smoothing) * token_losses + smoothing * digit_losses
        answer_loss = jnp.sum(smoothed_losses, where=positions == answer_index)
        other_loss = jnp.sum(token_losses, where=positions < answer_index)
        sums += jnp.stack(
            [
                answer_loss,
                other_loss,
                jnp.sum(is_right, where=positions == answer_index),
            ]
        )
    num_answers = sum(len(lengths) for _, lengths in groups)
    num_others = sum(jnp.sum(lengths - 1) for _, lengths in groups)
    answer_loss, other_loss = sums[0] / num_answers, sums[1] / num_others
    metrics = {
        "answer": answer_loss,
        "next": other_loss,
        "accuracy": sums[2] / num_answers,
    }
    return answer_loss + NEXT_TOKEN_WEIGHT * other_loss, metrics


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer"), donate_argnums=(0, 1)
)
def train_steps(
    params,
    optimizer_state,
    groups,
    digits,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
):
    """As many optimiser steps as the leading axis of `groups`; returns the means of the watched."""

    def step(carry, groups):
        params, state = carry
        gradients, metrics = jax.grad(step_loss, has_aux=True)(
            params, model, groups, digits
        )
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), metrics

    (params, optimizer_state), metrics = jax.lax.scan(
        step, (params, optimizer_state), groups
    )
    return params, optimizer_state, jax.tree.map(jnp.mean, metrics)


def train(
    *,
    seed: int,
    steps: int,
    prompts_per_step: int = 48,
    learning_rate: float = 2e-3,
    mesh: Mesh | None = None,
) -> clm.LanguageModel:
    """Trains a model from scratch; the same arguments give the same one on the same machine."""
    tokenizer = prompts.make_tokenizer()
    transformer_config = apples_config(tokenizer.get_vocab_size())
    model = Transformer(transformer_config)
    params = init_params(jax.random.key(seed), transformer_config)
    abstract_params = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros(1, jnp.int32)
    )["params"]
    params = axes_lib.place_tree(mesh, params, abstract_params)
    rate_schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        learning_rate,
        min(WARM_UP_STEPS, steps // 2),
        steps,
        end_value=0.03 * learning_rate,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate_schedule, b2=0.98, weight_decay=0.1),
    )
    optimizer_state = jax.tree.map(
        lambda leaf: leaf if leaf.ndim else axes_lib.place(mesh, leaf, ""),
        optimizer.init(params),
    )
    digits = jnp.array(
        [tokenizer.token_to_id(digit) for digit in clm.tokenization.DIGITS]
    )
    groups = draw_batches(
        np.random.default_rng(seed), tokenizer, steps, prompts_per_step
    )
    with tqdm(
        total=steps, unit="step", desc=f"seed {seed}", mininterval=1.0
    ) as progress:
        for start in range(0, steps, STEPS_PER_DISPATCH):
            step_slice = slice(start, start + STEPS_PER_DISPATCH)
            step_groups = [
                (
                    axes_lib.place(mesh, tokens[step_slice], "- B T"),
                    axes_lib.place(mesh, lengths[step_slice], "- B"),
                )
                for tokens, lengths in groups
            ]
            params, optimizer_state, metrics = train_steps(
                params,
                optimizer_state,
                step_groups,
                digits,
                model=model,
                optimizer=optimizer,
            )
            progress.set_postfix(
                {name: f"{value:.3f}" for name, value in metrics.items()}
            )
            progress.update(min(STEPS_PER_DISPATCH, steps - start))
    return clm.LanguageModel(clm.Transformer(transformer_config), params, tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.DeviceConfig):
    """Flags of train_apples."""

    seed: int = program.flag(0, help="Seed of the initial weights and of the prompts.")
    steps: int = program.flag(3500, help="Optimiser steps.", lower_bound=1)
    prompts_per_step: int = program.flag(
        48, help="Prompts in each step.", lower_bound=1
    )
    learning_rate: float = program.flag(
        2e-3, help="Peak learning rate.", lower_bound=0.0
    )


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The trained model, its parameters in float32; it is written in bfloat16."""

    lm: clm.LanguageModel

    def summary(self) -> str:
        return "Trained: config.json, model.safetensors, tokenizer.json"


def run(config: Config) -> Result:
    """Trains the model and writes it, with the record of its run."""
    folder = program.output_folder(config)
    lm = train(
        seed=config.seed,
        steps=config.steps,
        prompts_per_step=config.prompts_per_step,
        learning_rate=config.learning_rate,
        mesh=program.make_mesh(config),
    )
    if folder is not None:
        stored_params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
        stored_lm = dataclasses.replace(lm, params=stored_params)
        train_program.save_on_first_process(clm.save, folder, stored_lm)
        if processes.is_first_process():
            record = {"run": program.record(config)}
            with write_atomically(folder) as staging_folder:
                write_json(staging_folder / train_program.RECORD_FILE, record)
    return Result(lm)


if __name__ == "__main__":
    program.main(Config, run)
