"""Attribution: the contribution of each token's duration to an answer.

    python -m continuous_lm attribution [--prompt=TEXT] [--answer=4] [--nodes=64]

Integrated gradients run along durations, from 0 for all tokens but the first to the ordinary
sentence. They distribute the change of the answer's log probability over the tokens. Two other
methods are shown beside them: gradient times input, and leaving out one token. Deletion curves
remove tokens, the most important first. A method is better if the answer is lost earlier. On the
embedded model this takes about ten seconds.
"""

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from matplotlib.figure import Figure

import continuous_lm as clm
from continuous_lm.analysis import attribution
from continuous_lm.analysis.deletion import DeletionCurve, deletion_curve
from continuous_lm.experiments.common import (
    answer_curves,
    plots,
    pretrained,
    program,
    results,
)
from continuous_lm.experiments.common import prompt as prompt_lib
from continuous_lm.parallel import processes

MAX_RELATIVE_RESIDUAL = 0.01  # of an integral; the summary warns above it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(prompt_lib.PromptConfig):
    """Flags of attribution."""

    answer: str | None = program.flag(
        None,
        help="Answer to explain, one token.  [default: the model's most probable answer]",
    )
    nodes: int = program.flag(
        64,
        help="Gradients along the path, a multiple of 4.",
        lower_bound=attribution.NODES_PER_PANEL,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes % attribution.NODES_PER_PANEL:
            raise clm.InputError(f"--nodes is {self.nodes}; it must be a multiple of 4")


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Contributions of each token to an answer, by three methods.

    Attributes:
      prompt: the prompt with its answer.
      answer_token_names: names of the tokens that count for the answer.
      methods: name -> its contributions.
      deletions: name -> log probability as tokens are removed.
    """

    prompt: prompt_lib.AnsweredPrompt
    answer_token_names: tuple[str, ...]
    methods: Mapping[str, attribution.Attribution]
    deletions: Mapping[str, DeletionCurve]

    @property
    def integrated(self) -> attribution.Attribution:
        """The integrated gradients."""
        return self.methods["integrated gradients"]

    def contributions(self) -> dict[str, np.ndarray]:
        """Method -> contributions [T]."""
        return {name: method.contributions for name, method in self.methods.items()}

    def title(self) -> str:
        begin = self.integrated.baseline_value
        end = self.integrated.end_value
        return f"{self.prompt.answer!r}: log probability {begin:.2f} to {end:.2f}"

    def figures(self) -> dict[str, Figure]:
        """The text in colours, and the deletion curves."""
        deletion_values = {name: curve.values for name, curve in self.deletions.items()}
        return {
            "attribution": plots.heat_maps(
                self.prompt.token_texts,
                self.prompt.separators,
                self.contributions(),
                title=self.title(),
            ),
            "deletion": plots.deletion_curves(deletion_values),
        }

    def as_json(self) -> dict[str, Any]:
        """Every number, for the results file."""
        return {
            **self.prompt.as_json(),
            "group": self.answer_token_names,
            "log_probability": {
                "whole": self.integrated.end_value,
                "first token alone": self.integrated.baseline_value,
            },
            "relative_residual": self.integrated.relative_residual(),
            "methods": {name: self._method_json(name) for name in self.methods},
        }

    def _method_json(self, name: str) -> dict[str, Any]:
        deletion = self.deletions[name]
        return {
            "tokens": self.methods[name].contributions.tolist(),
            "residual": self.methods[name].residual,
            "deletion": {
                "order": deletion.order.tolist(),
                "values": deletion.values.tolist(),
                "area": deletion.area,
            },
        }

    def summary(self) -> str:
        lines = [
            f"{self.prompt.text}\n\n{self.title()}\n",
            f"{'method':<22} {'sum':>8} {'residual':>10} {'area of deletion':>17}",
        ]
        for name, method in self.methods.items():
            total = method.contributions.sum()
            area = self.deletions[name].area
            lines.append(
                f"{name:<22} {total:8.3f} {method.residual:10.4f} {area:17.3f}"
            )
        lines.append(
            f"\n{'token':<14} {'integrated':>11} {'gradient':>10} {'left out':>10}"
        )
        for token_text, *contributions in zip(
            self.prompt.token_texts, *self.contributions().values(), strict=True
        ):
            columns = " ".join(f"{value:+10.3f}" for value in contributions)
            lines.append(f"{token_text:<14} {columns}")
        residual = self.integrated.relative_residual()
        if residual > MAX_RELATIVE_RESIDUAL:
            lines.append(
                f"\nThe integral is off by {residual:.1%}: ask for more --nodes."
            )
        return "\n".join(lines)


def compute(
    config: Config, lm: clm.LanguageModel, tokenizer: tokenizers.Tokenizer
) -> Result:
    """Three methods and their deletion curves."""
    prompt = prompt_lib.encode_prompt(lm, tokenizer, config.prompt, config.answer)
    objective = attribution.log_probability(
        lm, prompt.answer_tokens, tokens=prompt.tokens
    )
    durations = jnp.ones(len(prompt.tokens))
    methods = {
        "integrated gradients": attribution.integrated_gradients(
            objective, durations, nodes=config.nodes
        ),
        "gradient times input": attribution.gradient_times_input(objective, durations),
        "leave one out": attribution.leave_one_out(objective, durations),
    }
    deletions = {
        name: deletion_curve(objective, durations, method.contributions)
        for name, method in methods.items()
    }
    answer_token_names = tuple(
        answer_curves.token_name(tokenizer, token) for token in prompt.answer_tokens
    )
    return Result(prompt, answer_token_names, methods, deletions)


def as_html(
    answered_prompt: prompt_lib.AnsweredPrompt, contributions: dict[str, np.ndarray]
) -> str:
    """Return an HTML page with the text once for each method, coloured by contributions."""
    html_blocks = []
    for method, values in contributions.items():
        max_value = max(np.abs(values).max(), 1e-9)
        token_spans = []
        for separator, token_text, value in zip(
            answered_prompt.separators, answered_prompt.token_texts, values, strict=True
        ):
            colour = "213, 94, 0" if value >= 0 else "0, 114, 178"
            token_spans.append(
                f'{html.escape(separator)}<span title="{value:+.4f} nats" style="background:'
                f'rgba({colour}, {abs(value) / max_value:.3f})">{html.escape(token_text)}</span>'
            )
        html_blocks.append(
            f"<h2>{html.escape(method)}</h2>\n<p>{''.join(token_spans)}</p>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>Attribution</title>'
        "<style>body { font: 16px/1.9 serif; max-width: 46em; margin: 3em auto; }"
        " p { white-space: pre-wrap; } span { padding: 2px; border-radius: 3px; }"
        " h2 { font-size: 1em; }</style></head><body>\n"
        f"<h1>What argues for {html.escape(repr(answered_prompt.answer))}</h1>\n"
        + "\n".join(html_blocks)
        + "\n<p>Orange argues for the answer, blue against it.</p>\n</body></html>\n"
    )


def run(config: Config) -> Result:
    """Load the model, attribute its answer, and write figures, a page and numbers."""
    folder = program.output_folder(config)
    lm, tokenizer = pretrained.load(config)
    result = compute(config, lm, tokenizer)
    if folder is not None and processes.is_first_process():
        texts = {"attribution.html": as_html(result.prompt, result.contributions())}
        figures = result.figures()
        results.write(config, folder, "attribution", result.as_json(), figures, texts)
    return result


if __name__ == "__main__":
    program.main(Config, run)
