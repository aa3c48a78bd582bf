"""Checks of models on this machine: against its own CPU on the model "apples", then speeds.

Wherever numbers are compared, products are made at full precision on both sides.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

import continuous_lm as clm
from continuous_lm.errors import InputError
from continuous_lm.experiments.apples import prompts, train_apples
from continuous_lm.experiments.benchmarks import baselines, gpu_cases, timing
from continuous_lm.experiments.benchmarks.timing import Target
from continuous_lm.experiments.gpu import isolated_checks
from continuous_lm.experiments.gpu.isolated_checks import Check
from continuous_lm.models.parameters import Params

Result = TypeVar("Result")

PROMPT = (
    'Question: In the sentence "apple apple apple apple", how many times is a fruit mentioned?'
    " Reply with a single-digit number\nAnswer: "
)
ANSWERS = {1.0: "4", 0.75: "3", 0.5: "2", 0.25: "1"}  # where each apple lasts so long
NUM_NEW_TOKENS = 16  # tokens of text that are compared
LAYER_COUNTS = (32, 16, 8, 4, 2)  # of Llama 3's: as many as the memory holds
NUM_STEPS, PROMPTS_PER_STEP = 50, 48  # of training
TINY_CONFIG = clm.TransformerConfig(
    vocab_size=64,
    hidden_size=32,
    mlp_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)

# --- A sweep --------------------------------------------------------------------------------------


def sweep_section(tiny: bool) -> Iterator[Check]:
    """Four apples as they shrink; and how long a sweep of a large model takes."""
    factors = np.array(
        [*ANSWERS, *np.linspace(0.1, 1.0, 12 if tiny else 100)], np.float32
    )
    yield from isolated_checks.run_guarded(
        "apples, float32", lambda: check_apples_float32(factors)
    )
    yield from isolated_checks.run_guarded(
        "apples, as stored", lambda: check_apples_bfloat16(factors)
    )
    yield from isolated_checks.run_guarded(
        "a sweep of a large model", lambda: time_large_sweep(tiny)
    )


def check_apples_float32(factors: np.ndarray) -> Iterator[Check]:
    """Check a float32 sweep of the embedded model against the CPU."""
    lm = clm.load("apples", dtype=jnp.float32)
    ours, theirs = run_on_device_and_cpu(
        lm, functools.partial(next_token_probabilities, factors=factors)
    )
    yield check_answers("apples, float32: right answers at 1, 3/4, 1/2, 1/4", lm, ours)
    same = float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1)))
    what = f"apples, float32: share of {len(factors)} points with the CPU's answer"
    yield isolated_checks.check_against_target(what, same, Target(minimum=1.0))
    difference = float(np.abs(ours - theirs).max())
    yield isolated_checks.check_against_target(
        "apples, float32: largest difference of a probability from the CPU's",
        difference,
        Target(maximum=2e-5),
    )


def check_apples_bfloat16(factors: np.ndarray) -> Iterator[Check]:
    """Check a bfloat16 sweep of the embedded model, at the default precision of products."""
    lm = clm.load("apples")
    probabilities = next_token_probabilities(lm, factors)
    yield check_answers(
        "apples, bfloat16: right answers at 1, 3/4, 1/2, 1/4", lm, probabilities
    )
    exact = next_token_probabilities(clm.load("apples", dtype=jnp.float32), factors)
    difference = float(np.abs(probabilities - exact).max())
    yield Check(
        "apples, bfloat16: largest difference of a probability from float32's",
        isolated_checks.MEASURED,
        difference,
    )


def next_token_probabilities(lm: clm.LanguageModel, factors: np.ndarray) -> np.ndarray:
    """The probability of every token after the prompt, for each duration of the apples: [P, V]."""
    tokenizer = apples_tokenizer(lm)
    encoding = clm.tokenization.encode(tokenizer, PROMPT)
    span = clm.tokenization.span(encoding, PROMPT, "apple")
    durations = np.ones((len(factors), len(encoding.ids)), np.float32)
    durations[:, slice(*span)] = factors[:, None]
    groups = [[token] for token in range(lm.config.vocab_size)]
    return clm.sweep.probabilities(
        lm, groups, tokens=np.array(encoding.ids), durations=durations
    )


def apples_tokenizer(lm: clm.LanguageModel) -> tokenizers.Tokenizer:
    """The tokenizer, which the embedded model has."""
    if lm.tokenizer is None:
        raise InputError("this model has no tokenizer")
    return lm.tokenizer


def check_answers(what: str, lm: clm.LanguageModel, probabilities: np.ndarray) -> Check:
    """Check the most probable answers of the first rows."""
    tokenizer = apples_tokenizer(lm)
    answers = [
        tokenizer.id_to_token(int(row.argmax()))
        for row in probabilities[: len(ANSWERS)]
    ]
    num_right = sum(a == b for a, b in zip(answers, ANSWERS.values(), strict=True))
    return isolated_checks.check_against_target(
        what, num_right, Target(minimum=len(ANSWERS)), note=f"{answers}"
    )


def time_large_sweep(tiny: bool) -> Iterator[Check]:
    """The benchmark's, of as many of Llama 3's layers as fit."""
    sizes = gpu_cases.Sizes(model_config=large_config(tiny))
    if tiny:
        sizes = dataclasses.replace(sizes, num_points=5, num_tokens=8)
    has_all_layers = sizes.model_config == gpu_cases.LLAMA_3_8B
    note = f"Llama 3's shape, {sizes.model_config.num_layers} layers"
    for row in gpu_cases.large_sweep_rows(sizes, 1 if tiny else 3):
        if not has_all_layers:  # the target is for all of them
            row = dataclasses.replace(row, target=None)
        yield dataclasses.replace(
            isolated_checks.check_from_row(row), unit="s", note=note
        )


# --- Generation -----------------------------------------------------------------------------------


def generation_section(tiny: bool) -> Iterator[Check]:
    """Greedy tokens against the CPU's; and how fast they come from a large model."""
    yield from isolated_checks.run_guarded("apples, greedy tokens", check_greedy_tokens)
    yield from isolated_checks.run_guarded(
        "text of a large model", lambda: time_generation(tiny)
    )


def check_greedy_tokens() -> Iterator[Check]:
    """Check greedy tokens of two prompts of different lengths, with new durations of 0.5."""
    lm = clm.load("apples", dtype=jnp.float32)
    tokenizer = apples_tokenizer(lm)
    texts = (PROMPT, "The sum of 4 and 3 is")
    token_rows = [np.array(tokenizer.encode(text).ids) for text in texts]

    def new_tokens(lm: clm.LanguageModel) -> np.ndarray:
        return clm.generate(
            lm, token_rows, max_new_tokens=NUM_NEW_TOKENS, new_durations=0.5, stop=()
        ).tokens

    ours, theirs = run_on_device_and_cpu(lm, new_tokens)
    what = f"apples, float32: share of {ours.size} greedy tokens that are the CPU's"
    yield isolated_checks.check_against_target(
        what, float(np.mean(ours == theirs)), Target(minimum=1.0)
    )


def time_generation(tiny: bool) -> Iterator[Check]:
    """Tokens a second of all rows."""
    config = large_config(tiny)
    num_new_tokens = 8 if tiny else 128
    lm = clm.LanguageModel(clm.Transformer(config), gpu_cases.random_params(config))
    for batch_size in (1, 8):
        tokens = np.random.default_rng(0).integers(
            0, config.vocab_size, (batch_size, 64)
        )
        run = functools.partial(
            clm.generate, lm, tokens, max_new_tokens=num_new_tokens, stop=()
        )
        seconds = timing.time_in_turns({"ours": run}, 1 if tiny else 3)["ours"]
        yield Check(
            f"text of a large model, batch {batch_size}",
            isolated_checks.MEASURED,
            batch_size * num_new_tokens / statistics.median(seconds),
            "tokens/s",
            note=f"Llama 3's shape, {config.num_layers} layers, {num_new_tokens} new tokens",
        )


# --- Training -------------------------------------------------------------------------------------


def training_section(tiny: bool) -> Iterator[Check]:
    """Train the embedded model again: one step against the CPU's, and a falling loss."""
    yield from isolated_checks.run_guarded(
        "one step of training", lambda: check_one_step(tiny)
    )
    yield from isolated_checks.run_guarded("training", lambda: check_falling_loss(tiny))


class TrainingTask(NamedTuple):
    """A new model and its training data."""

    lm: clm.LanguageModel[clm.Transformer]
    groups: list[train_apples.Rows]  # see `draw_batches`
    digits: np.ndarray  # their tokens

    def train(
        self,
        params: Params,
        optimizer_state: optax.OptState,
        optimizer: optax.GradientTransformation,
        steps: slice,
    ) -> tuple[Params, optax.OptState, dict[str, jax.Array]]:
        """Parameters and state after these steps, and the means of losses; donates both."""
        groups = [
            train_apples.Rows(tokens[steps], lengths[steps])
            for tokens, lengths in self.groups
        ]
        return train_apples.train_steps(
            params,
            optimizer_state,
            groups,
            self.digits,
            model=self.lm.model,
            optimizer=optimizer,
        )


def prepare_training(num_steps: int, tiny: bool) -> TrainingTask:
    """A new model, and batches for so many steps."""
    tokenizer = prompts.make_tokenizer()
    config = train_apples.apples_config(tokenizer.get_vocab_size())
    if tiny:
        config = dataclasses.replace(config, hidden_size=32, mlp_size=64)
    model = clm.Transformer(config)
    variables = model.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    groups = train_apples.draw_batches(
        np.random.default_rng(0), tokenizer, num_steps, 8 if tiny else PROMPTS_PER_STEP
    )
    digits = [tokenizer.token_to_id(digit) for digit in clm.tokenization.DIGITS]
    return TrainingTask(
        clm.LanguageModel(model, nn.unbox(variables["params"]), tokenizer),
        groups[:1],  # the shorter prompts alone: each group is compiled apart
        np.array(digits),
    )


class StepResult(NamedTuple):
    """Results of one training step."""

    changes: list[np.ndarray]  # of each parameter
    losses: dict[str, float]


def check_one_step(tiny: bool) -> Iterator[Check]:
    """Check one step of gradient descent; the change of a parameter is its gradient."""
    task = prepare_training(1, tiny)
    optimizer = optax.sgd(1.0)

    def take_step(lm: clm.LanguageModel) -> StepResult:
        params = jax.tree.map(jnp.array, lm.params)  # a copy, as it is donated
        optimizer_state = optimizer.init(params)
        after, _, metrics = task.train(params, optimizer_state, optimizer, slice(0, 1))
        changes = jax.tree.map(
            lambda new, old: np.asarray(new) - np.asarray(old), after, lm.params
        )
        losses = {name: float(value) for name, value in metrics.items()}
        return StepResult(jax.tree.leaves(changes), losses)

    ours, theirs = run_on_device_and_cpu(task.lm, take_step)
    loss_differences = [
        abs(ours.losses[name] / theirs.losses[name] - 1) for name in ("answer", "next")
    ]
    yield isolated_checks.check_against_target(
        "one step: relative difference of the loss",
        max(loss_differences),
        Target(maximum=1e-5),
    )
    gradient_differences = [
        np.abs(our_change - their_change).max() / np.abs(their_change).max()
        for our_change, their_change in zip(ours.changes, theirs.changes, strict=True)
    ]
    yield isolated_checks.check_against_target(
        "one step: largest difference of a gradient, as a share of the parameter's largest",
        float(np.max(gradient_differences)),
        Target(maximum=1e-3),
    )


def check_falling_loss(tiny: bool) -> Iterator[Check]:
    """Check that AdamW lowers the loss, at the default precision of products."""
    num_steps = 10 if tiny else NUM_STEPS
    task = prepare_training(2 * num_steps, tiny)
    optimizer = optax.adamw(2e-3)
    params, optimizer_state = task.lm.params, optimizer.init(task.lm.params)
    half_losses = []
    for half in (slice(0, num_steps), slice(num_steps, 2 * num_steps)):
        seconds, (params, optimizer_state, metrics) = time_and_result(
            functools.partial(task.train, params, optimizer_state, optimizer, half)
        )
        next_token_loss = train_apples.NEXT_TOKEN_WEIGHT * metrics["next"]
        half_losses.append(float(metrics["answer"] + next_token_loss))
    first_loss, second_loss = half_losses
    yield isolated_checks.check_against_target(
        f"training: loss of steps {num_steps + 1} to {2 * num_steps}, over that of those before",
        second_loss / first_loss,
        Target(maximum=0.95),
        note=f"{first_loss:.3f}, then {second_loss:.3f} nats",
    )
    yield Check(
        "training: steps a second",
        isolated_checks.MEASURED,
        num_steps / seconds,
        "1/s",
        note="the second time, without compiling",
    )


# --- The benchmark --------------------------------------------------------------------------------


def benchmark_section(tiny: bool) -> Iterator[Check]:
    """Yield the benchmark's rows for a GPU except the sweep; rows that need PyTorch are last."""
    sizes = gpu_cases.QUICK_SIZES if tiny else gpu_cases.Sizes()
    for num_tokens in sizes.lengths:
        yield from isolated_checks.run_guarded(
            f"{num_tokens} tokens: attention beside plain attention",
            functools.partial(attention_checks_of, num_tokens, tiny, peer=False),
        )
    yield from isolated_checks.run_guarded(
        "search", functools.partial(search_checks, sizes, tiny)
    )
    for num_tokens in sizes.lengths:
        label = f"{num_tokens} tokens: attention beside flex_attention"
        if missing_reason := baselines.without_cuda():
            yield Check(label, isolated_checks.NOT_RUN, note=missing_reason)
            continue
        checks = isolated_checks.run_guarded(
            label, functools.partial(attention_checks_of, num_tokens, tiny, peer=True)
        )
        for check in checks:
            if check.verdict == isolated_checks.FAILED:  # the peer's failure, not ours
                check = dataclasses.replace(check, verdict=isolated_checks.NOT_RUN)
            yield check


def attention_checks_of(num_tokens: int, tiny: bool, *, peer: bool) -> Iterator[Check]:
    """The benchmark's rows of attention beside flex_attention, its `peer`, or those without."""
    sizes = gpu_cases.QUICK_SIZES if tiny else gpu_cases.Sizes()
    rows = gpu_cases.attention_rows(
        sizes,
        num_tokens,
        1 if tiny else 3,
        None if tiny else "cudnn",
        peer=peer,
    )
    for row in rows:
        is_peer_row = "flex" in row.what
        if is_peer_row == peer:
            yield check_of_row(row, tiny)


def search_checks(sizes: gpu_cases.Sizes, tiny: bool) -> Iterator[Check]:
    """The benchmark's rows of the search."""
    for row in gpu_cases.search_rows(sizes, 1 if tiny else 3):
        yield check_of_row(row, tiny)


def check_of_row(row: timing.Row, tiny: bool) -> Check:
    """A row of the benchmark; tiny ones have no targets."""
    if tiny:
        row = dataclasses.replace(row, target=None)
    return isolated_checks.check_from_row(row)


# --- Shared functions -----------------------------------------------------------------------------


def run_on_device_and_cpu(
    lm: clm.LanguageModel, function: Callable[[clm.LanguageModel], Result]
) -> tuple[Result, Result]:
    """The results of a function of the model on this device, and on the CPU."""
    results = []
    host = jax.local_devices(backend="cpu")[0]
    for device in (jax.devices()[0], host):
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            params = jax.device_put(lm.params, device)
            results.append(function(lm.with_params(params)))
    return results[0], results[1]


def time_and_result(run: Callable[[], Result]) -> tuple[float, Result]:
    """The seconds that a call takes, and its result."""
    results = []

    def call_and_keep() -> Result:
        results.append(run())
        return results[0]

    return timing.time_call(call_and_keep), results[0]


def large_config(tiny: bool) -> clm.TransformerConfig:
    """Llama 3's shape with as many of its layers as the memory holds in bfloat16.

    Raises:
      InputError: if it does not hold the fewest.
    """
    if tiny:
        return TINY_CONFIG
    stats = jax.devices()[0].memory_stats() or {}
    memory_limit = stats.get("bytes_limit", 0)
    for layers in LAYER_COUNTS:
        config = dataclasses.replace(gpu_cases.LLAMA_3_8B, num_layers=layers)
        if bytes_needed(config) <= memory_limit:
            return config
    raise InputError(
        f"{bytes_needed(config) / 1e9:.0f} GB are needed, and JAX may use"
        f" {memory_limit / 1e9:.0f} GB"
    )


def bytes_needed(config: clm.TransformerConfig) -> float:
    """Return the bytes of the parameters in bfloat16, with room for temporaries."""
    init = clm.Transformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros(1, jnp.int32))
    return 1.25 * 2 * sum(x.size for x in jax.tree.leaves(shapes)) + 6e9
