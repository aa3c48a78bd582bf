"""The inverse problem: find durations for which the model gives a chosen answer.

    python -m continuous_lm inverse [--prompt=TEXT] --answer=3 [--span="apple apple"]

A search by gradients finds durations near 1, most of them equal to 1, for which the answer leads
every other token by --margin. It is compared with random search with the same number of model
evaluations (a gradient counts as three). On the embedded model this takes under a minute.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from matplotlib.figure import Figure

import continuous_lm as clm
from continuous_lm.analysis import duration_search
from continuous_lm.analysis.attribution import next_token_logits
from continuous_lm.analysis.shrinking import SearchResult
from continuous_lm.experiments.common import (
    answer_curves,
    plots,
    pretrained,
    program,
    results,
)
from continuous_lm.experiments.common import prompt as prompt_lib
from continuous_lm.parallel import processes

MIN_CHANGE = 1e-3  # of a duration, above which it counts as changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(prompt_lib.PromptConfig):
    """Flags of inverse."""

    answer: str = program.flag("3", help="Answer that the model is to give, one token.")
    span: str | None = program.flag(
        None,
        help="A piece of the prompt whose tokens may change.  [default: all but the first]",
    )
    margin: float = program.flag(
        0.1, help="Lead in log-odds over every other token.", lower_bound=0.0
    )
    steps: int = program.flag(60, help="Steps of gradient ascent.", lower_bound=1)
    seed: int = program.flag(0, help="Seed of the random search.")


@dataclasses.dataclass(frozen=True)
class VerifiedSearch:
    """Durations from a search, and the plain model's answer for them.

    Attributes:
      search: the durations, their total change and number of evaluations.
      lead: the answer's log-odds against the best other token.
      top_token: the name of the most probable token.
      holds: whether that is the answer.
    """

    search: SearchResult
    lead: float
    top_token: str
    holds: bool

    @property
    def num_changed(self) -> int:
        """Number of tokens whose duration is not 1."""
        return int((np.abs(self.search.durations - 1.0) > MIN_CHANGE).sum())

    def as_json(self) -> dict[str, Any]:
        """Every number, for the results file."""
        return {
            "durations": self.search.durations.tolist(),
            "total_change": self.search.total,
            "changed": self.num_changed,
            "lead": self.lead,
            "says": self.top_token,
            "holds": self.holds,
            "evaluations": self.search.evaluations,
        }


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Durations that make the model give an answer, by gradients and by random search.

    Attributes:
      prompt: with the answer.
      token_span: the tokens that may change; None for all but the first.
      by_gradients: result of the search by gradients.
      by_random_search: result of random search.
    """

    prompt: prompt_lib.AnsweredPrompt
    token_span: tuple[int, int] | None
    by_gradients: VerifiedSearch
    by_random_search: VerifiedSearch

    @property
    def searches(self) -> Mapping[str, VerifiedSearch]:
        """Both, by their names."""
        return {
            "gradients": self.by_gradients,
            "random search": self.by_random_search,
        }

    def title(self) -> str:
        return f"durations that make it say {self.prompt.answer!r}"

    def figure(self) -> Figure:
        """Plot the text with the durations of each search."""
        rows = {
            f"{name}: total change {verified.search.total:.3f}": verified.search.durations
            for name, verified in self.searches.items()
            if verified.holds
        }
        return durations_figure(self.prompt, rows, self.title())

    def as_json(self) -> dict[str, Any]:
        """Every number, for the results file."""
        return {
            **self.prompt.as_json(),
            "span": self.token_span,
            "found": {
                name: verified.as_json() for name, verified in self.searches.items()
            },
        }

    def summary(self) -> str:
        lines = [
            f"{self.prompt.text}\n\n{self.title()}\n",
            f"{'search':<15} {'says':<8} {'lead':>8} {'total change':>13} {'changed':>8}"
            "   evaluations",
        ]
        for name, verified in self.searches.items():
            lines.append(
                f"{name:<15} {verified.top_token:<8} {verified.lead:8.3f}"
                f" {verified.search.total:13.3f} {verified.num_changed:8d}"
                f"   {verified.search.evaluations}"
            )
        lines.append(f"\n{'token':<14} {'gradients':>10} {'random':>10}")
        durations = [verified.search.durations for verified in self.searches.values()]
        for token_text, *token_durations in zip(
            self.prompt.token_texts, *durations, strict=True
        ):
            if np.abs(np.array(token_durations) - 1.0).max() > MIN_CHANGE:
                columns = " ".join(f"{duration:10.3f}" for duration in token_durations)
                lines.append(f"{token_text:<14} {columns}")
        if not self.by_gradients.holds:
            lines.append(
                "\nNo durations give this answer; allow more steps or another span."
            )
        return "\n".join(lines)


def durations_figure(
    prompt: prompt_lib.AnsweredPrompt, rows: dict[str, np.ndarray], title: str
) -> Figure:
    """The text with rows of durations over it, the ordinary ones if there are none."""
    rows = rows or {"ordinary": np.ones(len(prompt.tokens))}
    return plots.durations_over_text(
        prompt.token_texts, prompt.separators, rows, title=title
    )


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> Result:
    """Both searches, verified."""
    prompt = prompt_lib.encode_prompt(lm, tokenizer, config.prompt, config.answer)
    token_span = None
    if config.span is not None:
        encoding = clm.tokenization.encode(tokenizer, prompt.text)
        token_span = clm.tokenization.span(encoding, prompt.text, config.span)
    constraint = duration_search.Margin(
        next_token_logits(lm, tokens=prompt.tokens),
        jnp.array(prompt.answer_tokens),
        config.margin,
    )
    ordinary_durations = jnp.ones(len(prompt.tokens))
    by_gradients = duration_search.find_durations(
        constraint, ordinary_durations, span=token_span, steps=config.steps
    )
    by_random_search = duration_search.random_search(
        constraint,
        ordinary_durations,
        span=token_span,
        evaluations=by_gradients.evaluations,
        seed=config.seed,
    )
    return Result(
        prompt,
        token_span,
        verify(lm, tokenizer, prompt, by_gradients),
        verify(lm, tokenizer, prompt, by_random_search),
    )


def verify(
    lm: clm.LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompt: prompt_lib.AnsweredPrompt,
    search: SearchResult,
) -> VerifiedSearch:
    """Ask the plain model, apart from the search."""
    logits = lm(prompt.tokens, durations=search.durations, position=-1)
    top_token = int(np.asarray(logits).argmax())
    lead = duration_search.answer_lead(logits, jnp.array(prompt.answer_tokens))
    return VerifiedSearch(
        search,
        float(lead),
        answer_curves.token_name(tokenizer, top_token),
        top_token in prompt.answer_tokens,
    )


def run(config: Config) -> Result:
    """Load the model, run the searches, and write a figure and numbers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    if folder is not None and processes.is_first_process():
        figures = {"inverse": result.figure()}
        results.write(config, folder, "inverse", result.as_json(), figures)
    return result


if __name__ == "__main__":
    program.main(Config, run)
