"""Checks of models on this machine: against its own CPU on the model "apples", then speeds.

Wherever numbers are compared, products are made at full precision on both sides.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import continuous_lm as clm
from continuous_lm.errors import InputError
from continuous_lm.experiments.benchmarks import baselines, gpu_cases, timing
from continuous_lm.experiments.benchmarks.timing import Target
from continuous_lm.experiments.gpu import isolated_checks
from continuous_lm.experiments.gpu.isolated_checks import Check

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
    """In float32, against the CPU."""
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
    """In bfloat16, at the default precision of products."""
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
    tokenizer: Any = lm.tokenizer
    encoding = clm.tokenization.encode(tokenizer, PROMPT)
    span = clm.tokenization.span(encoding, PROMPT, "apple")
    durations = np.ones((len(factors), len(encoding.ids)), np.float32)
    durations[:, slice(*span)] = factors[:, None]
    groups = [[token] for token in range(lm.config.vocab_size)]
    return clm.sweep.probabilities(
        lm, groups, tokens=np.array(encoding.ids), durations=durations
    )


def check_answers(what: str, lm: clm.LanguageModel, probabilities: np.ndarray) -> Check:
    """How many of the first rows have the answers that are known."""
    tokenizer: Any = lm.tokenizer
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
    setting = gpu_cases.Sizes(model_config=large_config(tiny))
    if tiny:
        setting = dataclasses.replace(setting, num_points=5, num_tokens=8)
    for row in gpu_cases.large_sweep_rows(setting, 1 if tiny else 3):
        is_full_model = setting.model_config == gpu_cases.LLAMA_3_8B
        row = (
            row if is_full_model else dataclasses.replace(row, target=None)
        )  # which is of all its layers
        note = f"Llama 3's shape, {setting.model_config.num_layers} layers"
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
    """Of two prompts of different lengths, new tokens lasting half as long."""
    lm = clm.load("apples", dtype=jnp.float32)
    tokenizer: Any = lm.tokenizer
    prompts = [tokenizer.encode(text).ids for text in (PROMPT, "The sum of 4 and 3 is")]

    def new_tokens(lm: clm.LanguageModel) -> np.ndarray:
        return clm.generate(
            lm, prompts, max_new_tokens=NUM_NEW_TOKENS, new_durations=0.5, stop=()
        ).tokens

    ours, theirs = run_on_device_and_cpu(lm, new_tokens)
    what = f"apples, float32: share of {ours.size} greedy tokens that are the CPU's"
    yield isolated_checks.check_against_target(
        what, float(np.mean(ours == theirs)), Target(minimum=1.0)
    )


def time_generation(tiny: bool) -> Iterator[Check]:
    """Tokens a second of all rows."""
    config, new = large_config(tiny), 8 if tiny else 128
    lm = clm.LanguageModel(clm.Transformer(config), gpu_cases.random_params(config))
    for batch in (1, 8):
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, 64))
        run = functools.partial(clm.generate, lm, tokens, max_new_tokens=new, stop=())
        seconds = timing.time_in_turns({"ours": run}, 1 if tiny else 3)["ours"]
        yield Check(
            f"text of a large model, batch {batch}",
            isolated_checks.MEASURED,
            batch * new / statistics.median(seconds),
            "tokens/s",
            note=f"Llama 3's shape, {config.num_layers} layers, {new} new tokens",
        )


# --- Training -------------------------------------------------------------------------------------


def training_section(tiny: bool) -> Iterator[Check]:
    """The embedded model anew: one step against the CPU's, and a falling loss."""
    yield from isolated_checks.run_guarded(
        "one step of training", lambda: check_one_step(tiny)
    )
    yield from isolated_checks.run_guarded("training", lambda: check_falling_loss(tiny))


def prepare_training(
    steps: int, tiny: bool
) -> tuple[clm.LanguageModel, Any, jax.Array]:
    """A new model, batches for so many steps, and the tokens of the digits."""
    from continuous_lm.experiments.apples import (
        prompts,
        train_apples,  # late: they define flags
    )

    tokenizer = prompts.make_tokenizer()
    config = train_apples.apples_config(tokenizer.get_vocab_size())
    if tiny:
        config = dataclasses.replace(config, hidden_size=32, mlp_size=64)
    params = nn.unbox(
        clm.Transformer(config).init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    )
    size = 8 if tiny else PROMPTS_PER_STEP
    groups = train_apples.draw_batches(np.random.default_rng(0), tokenizer, steps, size)
    groups = groups[:1]  # the shorter prompts alone: each group is compiled apart
    digits = jnp.array(
        [tokenizer.token_to_id(digit) for digit in clm.tokenization.DIGITS]
    )
    return (
        clm.LanguageModel(clm.Transformer(config), params["params"], tokenizer),
        groups,
        digits,
    )


def check_one_step(tiny: bool) -> Iterator[Check]:
    """By gradient descent, whose change of a parameter is its gradient."""
    import optax

    from continuous_lm.experiments.apples import train_apples

    lm, groups, digits = prepare_training(1, tiny)
    optimizer = optax.sgd(1.0)

    def change(lm: clm.LanguageModel) -> Any:
        params = jax.tree.map(jnp.array, lm.params)  # a copy, as it is donated
        after, _, metrics = train_apples.train_steps(
            params,
            optimizer.init(params),
            groups,
            np.asarray(digits),
            model=lm.model,
            optimizer=optimizer,
        )
        changes = jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), after, lm.params
        )
        return jax.tree.leaves(changes), {name: float(x) for name, x in metrics.items()}

    (ours, our_loss), (theirs, their_loss) = run_on_device_and_cpu(lm, change)
    relative_difference = max(
        abs(our_loss[name] / their_loss[name] - 1) for name in ("answer", "next")
    )
    yield isolated_checks.check_against_target(
        "one step: relative difference of the loss",
        relative_difference,
        Target(maximum=1e-5),
    )
    pairs = zip(ours, theirs, strict=True)
    relative_difference = float(
        np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])
    )
    what = "one step: largest difference of a gradient, as a share of the parameter's largest"
    yield isolated_checks.check_against_target(
        what, relative_difference, Target(maximum=1e-3)
    )


def check_falling_loss(tiny: bool) -> Iterator[Check]:
    """By AdamW, at the default precision of products."""
    import optax

    from continuous_lm.experiments.apples import train_apples

    steps = 10 if tiny else NUM_STEPS
    lm, groups, digits = prepare_training(2 * steps, tiny)
    optimizer = optax.adamw(2e-3)
    params, state = lm.params, optimizer.init(lm.params)
    train = functools.partial(
        train_apples.train_steps, digits=digits, model=lm.model, optimizer=optimizer
    )
    half_losses, seconds = [], 0.0
    for half in (slice(0, steps), slice(steps, 2 * steps)):
        half_groups = [(tokens[half], lengths[half]) for tokens, lengths in groups]
        seconds, results = time_and_result(
            functools.partial(train, params, state, half_groups)
        )
        params, state, metrics = results
        half_losses.append(
            float(metrics["answer"] + train_apples.NEXT_TOKEN_WEIGHT * metrics["next"])
        )
    what = (
        f"training: loss of steps {steps + 1} to {2 * steps}, over that of those before"
    )
    note = f"{half_losses[0]:.3f}, then {half_losses[1]:.3f} nats"
    yield isolated_checks.check_against_target(
        what, half_losses[1] / half_losses[0], Target(maximum=0.95), note=note
    )
    yield Check(
        "training: steps a second",
        isolated_checks.MEASURED,
        steps / seconds,
        "1/s",
        note="the second time, without compiling",
    )


# --- The benchmark --------------------------------------------------------------------------------


def benchmark_section(tiny: bool) -> Iterator[Check]:
    """Its rows for a GPU, without the sweep, which is above; what needs PyTorch comes last."""
    setting = gpu_cases.QUICK_SIZES if tiny else gpu_cases.Sizes()
    rounds, plain = (1, None) if tiny else (3, "cudnn")

    def attention_checks_of(n: int, peer: bool) -> Iterator[Check]:
        for row in gpu_cases.attention_rows(setting, n, rounds, plain, peer=peer):
            if peer == ("flex" in row.what):
                yield as_check(row)

    def as_check(row: timing.Row) -> Check:
        return isolated_checks.check_from_row(
            dataclasses.replace(row, target=None) if tiny else row
        )

    for n in setting.lengths:
        what = f"{n} tokens: attention beside plain attention"
        yield from isolated_checks.run_guarded(
            what, functools.partial(attention_checks_of, n, False)
        )
    yield from isolated_checks.run_guarded(
        "search", lambda: map(as_check, gpu_cases.search_rows(setting, rounds))
    )
    for n in setting.lengths:
        what = f"{n} tokens: attention beside flex_attention"
        if absent := baselines.without_cuda():
            yield Check(what, isolated_checks.NOT_RUN, note=absent)
            continue
        for check in isolated_checks.run_guarded(
            what, functools.partial(attention_checks_of, n, True)
        ):
            if (
                check.verdict == isolated_checks.FAILED
            ):  # the peer's failure is not ours
                check = dataclasses.replace(check, verdict=isolated_checks.NOT_RUN)
            yield check


# --- What they share ------------------------------------------------------------------------------


def run_on_device_and_cpu(
    lm: clm.LanguageModel, function: Callable[[clm.LanguageModel], Any]
) -> tuple[Any, Any]:
    """What a function of the model gives here, and what it gives on the CPU."""
    results = []
    host = jax.local_devices(backend="cpu")[0]
    for device in (jax.devices()[0], host):
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            params = jax.device_put(lm.params, device)
            results.append(function(dataclasses.replace(lm, params=params)))
    return results[0], results[1]


def time_and_result(run: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds a call takes, and what it gives."""
    results = []

    def keep() -> Any:
        results.append(run())
        return results

    return timing.time_call(keep), results[0]


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
    """Bytes of the parameters in bfloat16, with room for what is made beside them."""
    init = clm.Transformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros(1, jnp.int32))
    return 1.25 * 2 * sum(x.size for x in jax.tree.leaves(shapes)) + 6e9
