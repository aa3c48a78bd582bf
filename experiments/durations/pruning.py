"""Pruning: the shortest prompt, in time, that keeps an answer.

    python -m continuous_lm pruning [--prompt=TEXT] [--answer=4] [--tolerance=0.1]

Durations shrink as far as the log probability of the answer stays within a tolerance; what comes to
0 is gone. The result is verified by the plain model, on the prompt from which those tokens have
been taken. On the embedded model this takes under a minute.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from matplotlib.figure import Figure

import continuous_lm as clm
from continuous_lm.analysis.attribution import log_probability
from continuous_lm.analysis.pruning import prune
from continuous_lm.experiments.common import (
    answer_curves,
    plots,
    pretrained,
    program,
    results,
)
from continuous_lm.experiments.common import prompt as prompt_lib
from continuous_lm.parallel import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(prompt_lib.PromptConfig):
    """Flags of pruning."""

    answer: str | None = program.flag(
        None,
        help="Answer to keep, one token.  [default: the model's most probable answer]",
    )
    tolerance: float = program.flag(
        0.1,
        help="Nats that the answer's log probability may lose.",
        lower_bound=1e-3,
    )
    steps: int = program.flag(200, help="Steps of gradient descent.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """The shortest prompt that keeps an answer.

    Attributes:
      prompt: the prompt with its answer.
      durations: remaining duration of each token, [T].
      log_prob_before: log probability of the answer after the ordinary prompt.
      log_prob_after: log probability of the answer after the pruned prompt, by the plain model.
      top_token: name of the most probable token after the pruned prompt.
      evaluations: number of forward passes of the search.
    """

    prompt: prompt_lib.AnsweredPrompt
    durations: np.ndarray
    log_prob_before: float
    log_prob_after: float
    top_token: str
    evaluations: int

    @property
    def total_before(self) -> int:
        """The duration of the ordinary prompt after its first token."""
        return len(self.durations) - 1

    @property
    def total_after(self) -> float:
        """Remaining total duration after the first token."""
        return float(self.durations[1:].sum())

    def remaining_tokens(self) -> np.ndarray:
        """The indices of the tokens that are left."""
        return np.flatnonzero(self.durations > 0)

    def title(self) -> str:
        return (
            f"{self.prompt.answer!r}: {self.total_after:.2f} of {self.total_before} left,"
            f" log probability {self.log_prob_before:.3f} to {self.log_prob_after:.3f}"
        )

    def figure(self, title: str) -> Figure:
        """The text with its durations."""
        prompt = self.prompt
        rows = {"pruned": self.durations}
        return plots.durations_over_text(
            prompt.token_texts, prompt.separators, rows, title=title
        )

    def as_json(self) -> dict[str, Any]:
        """Every number, for the results file."""
        return {
            **self.prompt.as_json(),
            "durations": self.durations.tolist(),
            "kept": self.remaining_tokens().tolist(),
            "total": {"before": self.total_before, "after": self.total_after},
            "log_probability": {
                "before": self.log_prob_before,
                "after": self.log_prob_after,
            },
            "says": self.top_token,
            "evaluations": self.evaluations,
        }

    def summary(self) -> str:
        remaining_tokens = self.remaining_tokens()
        lines = [
            f"{self.prompt.text}\n\n{self.title()}\n",
            f"{'token':<14} {'duration':>9}",
        ]
        lines += [
            f"{self.prompt.token_texts[token]:<14} {self.durations[token]:9.3f}"
            for token in remaining_tokens
        ]
        num_tokens = len(self.durations)
        lines.append(
            f"\n{len(remaining_tokens)} of {num_tokens} tokens are left, and the model says"
            f" {self.top_token!r}."
        )
        return "\n".join(lines)


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> Result:
    """Prunes, and verifies by the plain model, to which no optimiser or absent token is known."""
    prompt = prompt_lib.encode_prompt(lm, tokenizer, config.prompt, config.answer)
    objective = log_probability(lm, prompt.answer_tokens, tokens=prompt.tokens)
    ordinary_durations = np.ones(len(prompt.tokens), np.float32)
    pruned = prune(
        objective, ordinary_durations, tolerance=config.tolerance, steps=config.steps
    )
    log_prob_before = float(objective(jnp.asarray(ordinary_durations)))
    model_tokens = np.flatnonzero(pruned.durations > 0)
    last_token = len(pruned.durations) - 1
    if pruned.durations[-1] == 0:  # the query itself has a place, if no time
        model_tokens = np.append(model_tokens, last_token)
    logits = lm(
        prompt.tokens[model_tokens],
        durations=pruned.durations[model_tokens],
        position=-1,
    )
    answer_log_probs = jax.nn.log_softmax(logits)[jnp.array(prompt.answer_tokens)]
    return Result(
        prompt,
        pruned.durations,
        log_prob_before,
        float(jax.nn.logsumexp(answer_log_probs)),
        answer_curves.token_name(tokenizer, int(np.asarray(logits).argmax())),
        pruned.evaluations,
    )


def run(config: Config) -> Result:
    """Load the model, prune the prompt, and write a figure and numbers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    if folder is not None and processes.is_first_process():
        figures = {"pruning": result.figure(result.title())}
        results.write(config, folder, "pruning", result.as_json(), figures)
    return result


if __name__ == "__main__":
    program.main(Config, run)
