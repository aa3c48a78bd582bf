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
NEW = 16  # tokens of text that are compared
LAYERS = (32, 16, 8, 4, 2)  # of Llama 3's: as many as the memory holds
STEPS, PROMPTS = 50, 48  # of training
TINY = clm.TransformerConfig(
    vocab_size=64,
    hidden_size=32,
    mlp_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)

# --- A sweep --------------------------------------------------------------------------------------


def sweep(tiny: bool) -> Iterator[Check]:
    """Four apples as they shrink; and how long a sweep of a large model takes."""
    factors = np.array([*ANSWERS, *np.linspace(0.1, 1.0, 12 if tiny else 100)], np.float32)
    yield from isolated_checks.guarded("apples, float32", lambda: apples(factors))
    yield from isolated_checks.guarded("apples, as stored", lambda: stored(factors))
    yield from isolated_checks.guarded("a sweep of a large model", lambda: large_sweep(tiny))


def apples(factors: np.ndarray) -> Iterator[Check]:
    """In float32, against the CPU."""
    lm = clm.load("apples", dtype=jnp.float32)
    ours, theirs = on_both(lm, functools.partial(distributions, factors=factors))
    yield answered("apples, float32: right answers at 1, 3/4, 1/2, 1/4", lm, ours)
    same = float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1)))
    what = f"apples, float32: share of {len(factors)} points with the CPU's answer"
    yield isolated_checks.judged(what, same, Target(least=1.0))
    apart = float(np.abs(ours - theirs).max())
    yield isolated_checks.judged(
        "apples, float32: largest difference of a probability from the CPU's",
        apart,
        Target(most=2e-5),
    )


def stored(factors: np.ndarray) -> Iterator[Check]:
    """In bfloat16, at the default precision of products."""
    lm = clm.load("apples")
    found = distributions(lm, factors)
    yield answered("apples, bfloat16: right answers at 1, 3/4, 1/2, 1/4", lm, found)
    exact = distributions(clm.load("apples", dtype=jnp.float32), factors)
    apart = float(np.abs(found - exact).max())
    yield Check(
        "apples, bfloat16: largest difference of a probability from float32's",
        isolated_checks.MEASURED,
        apart,
    )


def distributions(lm: clm.LanguageModel, factors: np.ndarray) -> np.ndarray:
    """The probability of every token after the prompt, for each duration of the apples: [P, V]."""
    tokenizer: Any = lm.tokenizer
    encoding = clm.tokenization.encode(tokenizer, PROMPT)
    span = clm.tokenization.span(encoding, PROMPT, "apple")
    durations = np.ones((len(factors), len(encoding.ids)), np.float32)
    durations[:, slice(*span)] = factors[:, None]
    groups = [[token] for token in range(lm.config.vocab_size)]
    return clm.sweep.probabilities(lm, groups, tokens=np.array(encoding.ids), durations=durations)


def answered(what: str, lm: clm.LanguageModel, found: np.ndarray) -> Check:
    """How many of the first rows have the answers that are known."""
    tokenizer: Any = lm.tokenizer
    given = [tokenizer.id_to_token(int(row.argmax())) for row in found[: len(ANSWERS)]]
    right = sum(a == b for a, b in zip(given, ANSWERS.values(), strict=True))
    return isolated_checks.judged(what, right, Target(least=len(ANSWERS)), note=f"{given}")


def large_sweep(tiny: bool) -> Iterator[Check]:
    """The benchmark's, of as many of Llama 3's layers as fit."""
    setting = gpu_cases.Setting(model=large(tiny))
    if tiny:
        setting = dataclasses.replace(setting, points=5, tokens=8)
    for row in gpu_cases.large_sweep(setting, 1 if tiny else 3):
        whole = setting.model == gpu_cases.LLAMA
        row = row if whole else dataclasses.replace(row, target=None)  # which is of all its layers
        note = f"Llama 3's shape, {setting.model.num_layers} layers"
        yield dataclasses.replace(isolated_checks.measured(row), unit="s", note=note)


# --- Generation -----------------------------------------------------------------------------------


def generation(tiny: bool) -> Iterator[Check]:
    """Greedy tokens against the CPU's; and how fast they come from a large model."""
    yield from isolated_checks.guarded("apples, greedy tokens", greedy)
    yield from isolated_checks.guarded("text of a large model", lambda: speed_of_text(tiny))


def greedy() -> Iterator[Check]:
    """Of two prompts of different lengths, new tokens lasting half as long."""
    lm = clm.load("apples", dtype=jnp.float32)
    tokenizer: Any = lm.tokenizer
    prompts = [tokenizer.encode(text).ids for text in (PROMPT, "The sum of 4 and 3 is")]

    def continued(lm: clm.LanguageModel) -> np.ndarray:
        return clm.generate(lm, prompts, max_new_tokens=NEW, new_durations=0.5, stop=()).tokens

    ours, theirs = on_both(lm, continued)
    what = f"apples, float32: share of {ours.size} greedy tokens that are the CPU's"
    yield isolated_checks.judged(what, float(np.mean(ours == theirs)), Target(least=1.0))


def speed_of_text(tiny: bool) -> Iterator[Check]:
    """Tokens a second of all rows."""
    config, new = large(tiny), 8 if tiny else 128
    lm = clm.LanguageModel(config, gpu_cases.random_params(config))
    for batch in (1, 8):
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, 64))
        run = functools.partial(clm.generate, lm, tokens, max_new_tokens=new, stop=())
        taken = timing.in_turns({"ours": run}, 1 if tiny else 3)["ours"]
        yield Check(
            f"text of a large model, batch {batch}",
            isolated_checks.MEASURED,
            batch * new / statistics.median(taken),
            "tokens/s",
            note=f"Llama 3's shape, {config.num_layers} layers, {new} new tokens",
        )


# --- Training -------------------------------------------------------------------------------------


def training(tiny: bool) -> Iterator[Check]:
    """The embedded model anew: one step against the CPU's, and a falling loss."""
    yield from isolated_checks.guarded("one step of training", lambda: one_step(tiny))
    yield from isolated_checks.guarded("training", lambda: falling(tiny))


def start(steps: int, tiny: bool) -> tuple[clm.LanguageModel, Any, jax.Array]:
    """A new model, batches for so many steps, and the tokens of the digits."""
    from continuous_lm.experiments.apples import (
        prompts,
        train_apples,  # late: they define flags
    )

    tokenizer = prompts.tokenizer()
    config = train_apples.config(tokenizer.get_vocab_size())
    if tiny:
        config = dataclasses.replace(config, hidden_size=32, mlp_size=64)
    params = nn.unbox(clm.Transformer(config).init(jax.random.key(0), jnp.zeros(1, jnp.int32)))
    size = 8 if tiny else PROMPTS
    groups = train_apples.batches(np.random.default_rng(0), tokenizer, steps, size)
    groups = groups[:1]  # the shorter prompts alone: each group is compiled apart
    digits = jnp.array([tokenizer.token_to_id(digit) for digit in clm.tokenization.DIGITS])
    return clm.LanguageModel(config, params["params"], tokenizer), groups, digits


def one_step(tiny: bool) -> Iterator[Check]:
    """By gradient descent, whose change of a parameter is its gradient."""
    import optax

    from continuous_lm.experiments.apples import train_apples

    lm, groups, digits = start(1, tiny)
    optimizer = optax.sgd(1.0)

    def change(lm: clm.LanguageModel) -> Any:
        params = jax.tree.map(jnp.array, lm.params)  # a copy, as it is donated
        after, _, watched = train_apples.train_steps(
            params,
            optimizer.init(params),
            groups,
            np.asarray(digits),
            model=lm.model,
            optimizer=optimizer,
        )
        moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, lm.params)
        return jax.tree.leaves(moved), {name: float(x) for name, x in watched.items()}

    (ours, our_loss), (theirs, their_loss) = on_both(lm, change)
    apart = max(abs(our_loss[name] / their_loss[name] - 1) for name in ("answer", "next"))
    yield isolated_checks.judged(
        "one step: relative difference of the loss", apart, Target(most=1e-5)
    )
    pairs = zip(ours, theirs, strict=True)
    apart = float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]))
    what = "one step: largest difference of a gradient, as a share of the parameter's largest"
    yield isolated_checks.judged(what, apart, Target(most=1e-3))


def falling(tiny: bool) -> Iterator[Check]:
    """By AdamW, at the default precision of products."""
    import optax

    from continuous_lm.experiments.apples import train_apples

    steps = 10 if tiny else STEPS
    lm, groups, digits = start(2 * steps, tiny)
    optimizer = optax.adamw(2e-3)
    params, state = lm.params, optimizer.init(lm.params)
    train = functools.partial(
        train_apples.train_steps, digits=digits, model=lm.model, optimizer=optimizer
    )
    losses, taken = [], 0.0
    for half in (slice(0, steps), slice(steps, 2 * steps)):
        part = [(tokens[half], lengths[half]) for tokens, lengths in groups]
        taken, made = taking(functools.partial(train, params, state, part))
        params, state, watched = made
        losses.append(float(watched["answer"] + train_apples.NEXT_TOKEN * watched["next"]))
    what = f"training: loss of steps {steps + 1} to {2 * steps}, over that of those before"
    note = f"{losses[0]:.3f}, then {losses[1]:.3f} nats"
    yield isolated_checks.judged(what, losses[1] / losses[0], Target(most=0.95), note=note)
    yield Check(
        "training: steps a second",
        isolated_checks.MEASURED,
        steps / taken,
        "1/s",
        note="the second time, without compiling",
    )


# --- The benchmark --------------------------------------------------------------------------------


def benchmark(tiny: bool) -> Iterator[Check]:
    """Its rows for a GPU, without the sweep, which is above; what needs PyTorch comes last."""
    setting = gpu_cases.QUICK if tiny else gpu_cases.Setting()
    rounds, plain = (1, None) if tiny else (3, "cudnn")

    def beside(n: int, peer: bool) -> Iterator[Check]:
        for row in gpu_cases.attention(setting, n, rounds, plain, peer=peer):
            if peer == ("flex" in row.what):
                yield of(row)

    def of(row: timing.Row) -> Check:
        return isolated_checks.measured(dataclasses.replace(row, target=None) if tiny else row)

    for n in setting.lengths:
        what = f"{n} tokens: attention beside plain attention"
        yield from isolated_checks.guarded(what, functools.partial(beside, n, False))
    yield from isolated_checks.guarded("search", lambda: map(of, gpu_cases.search(setting, rounds)))
    for n in setting.lengths:
        what = f"{n} tokens: attention beside flex_attention"
        if absent := baselines.without_cuda():
            yield Check(what, isolated_checks.NOT_RUN, note=absent)
            continue
        for check in isolated_checks.guarded(what, functools.partial(beside, n, True)):
            if check.verdict == isolated_checks.FAILED:  # the peer's failure is not ours
                check = dataclasses.replace(check, verdict=isolated_checks.NOT_RUN)
            yield check


# --- What they share ------------------------------------------------------------------------------


def on_both(lm: clm.LanguageModel, function: Callable[[clm.LanguageModel], Any]) -> tuple[Any, Any]:
    """What a function of the model gives here, and what it gives on the CPU."""
    found = []
    host = jax.local_devices(backend="cpu")[0]
    for device in (jax.devices()[0], host):
        with jax.default_matmul_precision("highest"), jax.default_device(device):
            params = jax.device_put(lm.params, device)
            found.append(function(dataclasses.replace(lm, params=params)))
    return found[0], found[1]


def taking(run: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds a call takes, and what it gives."""
    made = []

    def keep() -> Any:
        made.append(run())
        return made

    return timing.seconds(keep), made[0]


def large(tiny: bool) -> clm.TransformerConfig:
    """Llama 3's shape with as many of its layers as the memory holds in bfloat16.

    Raises:
      InputError: if it does not hold the fewest.
    """
    if tiny:
        return TINY
    stats = jax.devices()[0].memory_stats() or {}
    room = stats.get("bytes_limit", 0)
    for layers in LAYERS:
        config = dataclasses.replace(gpu_cases.LLAMA, num_layers=layers)
        if needed(config) <= room:
            return config
    raise InputError(
        f"{needed(config) / 1e9:.0f} GB are needed, and JAX may use {room / 1e9:.0f} GB"
    )


def needed(config: clm.TransformerConfig) -> float:
    """Bytes of the parameters in bfloat16, with room for what is made beside them."""
    init = clm.Transformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros(1, jnp.int32))
    return 1.25 * 2 * sum(x.size for x in jax.tree.leaves(shapes)) + 6e9
