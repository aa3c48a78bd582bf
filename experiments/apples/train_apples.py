"""Train the embedded model, a small Llama that counts, on the prompts of `prompts`.

    python -m continuous_lm train_apples --output_dir=results/embedded --seed=0

writes a Hugging Face folder (config.json, model.safetensors in bfloat16, tokenizer.json). Every
token in training lasts 1. The experiments measure the model's behaviour at other durations.

The loss is the answer's cross-entropy plus 0.3 times that of every next token, in nats. A digit as
answer is smoothed over the ten digits (Szegedy et al., arXiv:1512.00567). All wrong digits get the
same probability, so the labels do not show which digits are neighbours, and the log-odds of
neighbouring counts stay bounded. The data do not determine where between two counts the answer
changes; that point differs between runs.

Prompts are sorted by length, so that a batch has little padding. The model is causal: padding on
the right does not change earlier tokens.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from jax.sharding import Mesh
from tqdm import tqdm

import continuous_lm as clm
from continuous_lm import axes as axes_lib
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.common import program
from continuous_lm.experiments.training import train_program
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models import parameters
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.parameters import Params
from continuous_lm.models.transformer import Transformer
from continuous_lm.parallel import processes

WARM_UP_STEPS = 100  # steps
STEPS_PER_DISPATCH = 50  # steps in one call of the jitted function
NEXT_TOKEN_WEIGHT = 0.3  # weight of the next-token loss
DIGIT_SMOOTHING = 0.05  # share of a digit's target that goes to all ten digits
EMBEDDING_STD = 0.1
# Quantiles of length between which rows share a width.
LENGTH_QUANTILES = (0.0, 0.375, 0.75, 0.917, 1.0)


class Rows(NamedTuple):
    """Rows of one width.

    Attributes:
      tokens: int32 [..., B, T], the answer as each row's last token before padding.
      lengths: int32 [..., B], without the answer.
    """

    tokens: Any
    lengths: Any


# --- The model ------------------------------------------------------------------------------------


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


def init_params(key: jax.Array, transformer_config: TransformerConfig) -> Params:
    """Initial parameters: the trunk's own, with an embedding table of standard deviation 0.1."""
    variables = Transformer(transformer_config).init(key, jnp.zeros(1, jnp.int32))
    params: Params = nn.unbox(variables["params"])
    embedding = params["embedding"]
    return {**params, "embedding": embedding * (EMBEDDING_STD / jnp.std(embedding))}


# --- The prompts ----------------------------------------------------------------------------------


def draw_batches(
    rng: np.random.Generator,
    tokenizer: tokenizers.Tokenizer,
    steps: int,
    prompts_per_step: int,
) -> list[Rows]:
    """Draw `steps` batches of `prompts_per_step` prompts.

    Returns:
        A group for each range of lengths, with a leading axis of steps. The groups' B add up to
        `prompts_per_step`.
    """
    drawn_prompts = [
        prompts.sample_prompt(rng) for _ in range(steps * prompts_per_step)
    ]
    encodings = tokenizer.encode_batch([prompt.text for prompt in drawn_prompts])
    rows = [
        [*encoding.ids, tokenizer.token_to_id(prompt.answer)]
        for encoding, prompt in zip(encodings, drawn_prompts, strict=True)
    ]
    rows.sort(key=len)  # stable: chance comes from rng alone
    group_ends = [
        round(quantile * prompts_per_step) * steps for quantile in LENGTH_QUANTILES
    ]
    groups = []
    for start, end in itertools.pairwise(group_ends):
        if start < end:
            group = rows[start:end]
            order = rng.permutation(len(group))
            groups.append(_pad_rows([group[index] for index in order], steps))
    return groups


def _pad_rows(rows: list[list[int]], steps: int) -> Rows:
    """Rows as arrays with a leading axis of steps, padded with 0 to the longest."""
    padded_length = max(map(len, rows))
    tokens = np.zeros((len(rows), padded_length), np.int32)
    for token_row, ids in zip(tokens, rows, strict=True):
        token_row[: len(ids)] = ids
    lengths = np.count_nonzero(tokens, axis=-1).astype(np.int32) - 1
    return Rows(tokens.reshape(steps, -1, padded_length), lengths.reshape(steps, -1))


# --- The steps ------------------------------------------------------------------------------------


def step_loss(
    params: Params, model: Transformer, groups: Sequence[Rows], digits: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one step, in nats, and scalars to log.

    Args:
        params: The parameter tree.
        model: The transformer.
        groups: As from `draw_batches`, without the steps.
        digits: The ids of the ten digits, int [10].
    """
    # Of the answers' nats, the other tokens' nats, the right answers.
    sums = jnp.zeros(3)
    num_answers = 0
    num_others = jnp.zeros((), jnp.int32)
    for tokens, lengths in groups:
        sums += _group_sums(params, model, Rows(tokens, lengths), digits)
        num_answers += len(lengths)
        num_others += jnp.sum(lengths - 1)
    answer_loss = sums[0] / num_answers
    other_loss = sums[1] / num_others
    metrics = {
        "answer": answer_loss,
        "next": other_loss,
        "accuracy": sums[2] / num_answers,
    }
    return answer_loss + NEXT_TOKEN_WEIGHT * other_loss, metrics


def _group_sums(
    params: Params, model: Transformer, rows: Rows, digits: jax.Array
) -> jax.Array:
    """Sums over rows [3]: nats of the answers, nats of the other tokens, right answers."""
    tokens, lengths = rows
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    answer_index = lengths[:, None] - 1
    logits: Any = model.apply({"params": params}, inputs)  # [B, T - 1, V]
    token_losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, targets
    )
    is_right = jnp.argmax(logits, axis=-1) == targets
    positions = jnp.arange(token_losses.shape[-1])
    digit_losses = jax.nn.logsumexp(logits, -1) - jnp.mean(logits[..., digits], -1)
    smoothing = DIGIT_SMOOTHING * jnp.isin(targets, digits)
    smoothed_losses = (1 - smoothing) * token_losses + smoothing * digit_losses
    return jnp.stack(
        [
            jnp.sum(smoothed_losses, where=positions == answer_index),
            jnp.sum(token_losses, where=positions < answer_index),
            jnp.sum(is_right, where=positions == answer_index),
        ]
    )


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer"), donate_argnums=(0, 1)
)
def train_steps(
    params: Params,
    optimizer_state: optax.OptState,
    groups: Sequence[Rows],
    digits: jax.Array,
    *,
    model: Transformer,
    optimizer: optax.GradientTransformation,
) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
    """Run one optimiser step for each entry of `groups`; return mean metrics."""

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


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW of clipped gradients; its rate rises on a line and falls on a cosine to 3 %."""
    rate_schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        learning_rate,
        min(WARM_UP_STEPS, steps // 2),
        steps,
        end_value=0.03 * learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate_schedule, b2=0.98, weight_decay=0.1),
    )


def train(
    *,
    seed: int,
    steps: int,
    prompts_per_step: int = 48,
    learning_rate: float = 2e-3,
    mesh: Mesh | None = None,
) -> clm.LanguageModel:
    """Train a model from scratch; the same arguments give the same one on the same machine."""
    tokenizer = prompts.make_tokenizer()
    model = Transformer(apples_config(tokenizer.get_vocab_size()))
    params = parameters.place(
        mesh, init_params(jax.random.key(seed), model.config), model.parameter_table()
    )
    optimizer = make_optimizer(learning_rate, steps)
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
            params, optimizer_state, metrics = train_steps(
                params,
                optimizer_state,
                _place_steps(mesh, groups, start),
                digits,
                model=model,
                optimizer=optimizer,
            )
            progress.set_postfix(
                {name: f"{value:.3f}" for name, value in metrics.items()}
            )
            progress.update(min(STEPS_PER_DISPATCH, steps - start))
    return clm.LanguageModel(model, params, tokenizer)


def _place_steps(mesh: Mesh | None, groups: Sequence[Rows], start: int) -> list[Rows]:
    """The groups of the steps of one dispatch, their rows over the mesh's data axis."""
    steps = slice(start, start + STEPS_PER_DISPATCH)
    return [
        Rows(
            axes_lib.place(mesh, tokens[steps], "- B T"),
            axes_lib.place(mesh, lengths[steps], "- B"),
        )
        for tokens, lengths in groups
    ]


# --- The program ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.DeviceConfig):
    """Flags of train_apples."""

    seed: int = program.flag(0, help="Seed of the initial weights and of the prompts.")
    steps: int = program.flag(3500, help="Number of optimiser steps.", lower_bound=1)
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
    """Train the model and write it, with the record of its run."""
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
