"""Attribution: how much each token's time argues for an answer.

    python -m continuous_lm attribution [--prompt=TEXT] [--answer=4] [--nodes=64]

Integrated gradients along durations, from a sentence of which only the first token is there to the
whole of it, share out what the sentence adds to the log probability of the answer. Gradient times
input and leaving one token out are set beside them. Deletion curves take tokens away, the most
important first: the sooner the answer is lost, the better a method found the tokens that matter.
On the embedded model this takes about ten seconds.
"""

import html

import jax.numpy as jnp
import numpy as np
from absl import flags

import continuous_lm as clm
from continuous_lm.analysis import attribution
from continuous_lm.analysis.deletion import deletion_curve
from continuous_lm.experiments.common import (
    absl_pretrained as pretrained,
)
from continuous_lm.experiments.common import (
    absl_program as program,
)
from continuous_lm.experiments.common import (
    plots,
    prompt,
)
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

_PROMPT = flags.DEFINE_string("prompt", prompt.DEFAULT_PROMPT, "What the model reads.")
_ANSWER = flags.DEFINE_string(
    "answer",
    None,
    "What is explained, one token.  [default: the model's most probable answer]",
)
_NUM_NODES = flags.DEFINE_integer(
    "nodes",
    64,
    "Gradients along the path, a multiple of 4.",
    lower_bound=attribution.NODES_PER_PANEL,
)


def as_html(
    answered_prompt: prompt.AnsweredPrompt, contributions: dict[str, np.ndarray]
) -> str:
    """A page of its own: the text once for each method, coloured by what tokens contribute."""
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


def main() -> None:
    """Three methods, their deletion curves, table, files."""
    folder = program.output_dir("attribution")
    if _NUM_NODES.value % attribution.NODES_PER_PANEL:
        raise clm.InputError(
            f"--nodes is {_NUM_NODES.value}; it must be a multiple of 4"
        )
    lm, tokenizer = pretrained.load()
    answered_prompt = prompt.encode_prompt(lm, tokenizer, _PROMPT.value, _ANSWER.value)
    objective = attribution.log_probability(
        lm, answered_prompt.answer_tokens, tokens=answered_prompt.tokens
    )
    durations = jnp.ones(len(answered_prompt.tokens))
    methods = {
        "integrated gradients": attribution.integrated_gradients(
            objective, durations, nodes=_NUM_NODES.value
        ),
        "gradient times input": attribution.gradient_times_input(objective, durations),
        "leave one out": attribution.leave_one_out(objective, durations),
    }
    deletions = {
        method: deletion_curve(objective, durations, method_result.contributions)
        for method, method_result in methods.items()
    }
    token_contributions = {
        method: method_result.contributions for method, method_result in methods.items()
    }
    integrated = methods["integrated gradients"]

    values = f"{integrated.baseline_value:.2f} to {integrated.end_value:.2f}"
    title = f"{answered_prompt.answer!r}: log probability {values}"
    heat_map = plots.heat_maps(
        answered_prompt.token_texts,
        answered_prompt.separators,
        token_contributions,
        title=title,
    )
    deletion_figure = plots.deletion_curves(
        {method: d.values for method, d in deletions.items()}
    )
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        plots.save(heat_map, staging_folder, "attribution")
        plots.save(deletion_figure, staging_folder, "deletion")
        (staging_folder / "attribution.html").write_text(
            as_html(answered_prompt, token_contributions), encoding="utf-8"
        )
        write_json(
            staging_folder / "attribution.json",
            {
                "prompt": answered_prompt.text,
                "pieces": list(answered_prompt.token_texts),
                "answer": answered_prompt.answer,
                "group": [
                    tokenizer.id_to_token(token)
                    for token in answered_prompt.answer_tokens
                ],
                "log_probability": {
                    "whole": integrated.end_value,
                    "first token alone": integrated.baseline_value,
                },
                "relative_residual": integrated.relative_residual(),
                "methods": {
                    method: {
                        "tokens": method_result.contributions.tolist(),
                        "residual": method_result.residual,
                        "deletion": {
                            "order": deletions[method].order.tolist(),
                            "values": deletions[method].values.tolist(),
                            "area": deletions[method].area,
                        },
                    }
                    for method, method_result in methods.items()
                },
                "run": program.record(),
            },
        )
    print(f"{answered_prompt.text}\n\n{title}\n")
    print(f"{'method':<22} {'sum':>8} {'residual':>10} {'area of deletion':>17}")
    for method, method_result in methods.items():
        area = deletions[method].area
        print(
            f"{method:<22} {method_result.contributions.sum():8.3f}"
            f" {method_result.residual:10.4f} {area:17.3f}"
        )
    print(f"\n{'token':<14} {'integrated':>11} {'gradient':>10} {'left out':>10}")
    for token_text, *contributions in zip(
        answered_prompt.token_texts, *token_contributions.values(), strict=True
    ):
        print(f"{token_text:<14} " + " ".join(f"{c:+10.3f}" for c in contributions))
    if integrated.relative_residual() > 0.01:
        print(
            f"\nThe integral is off by {integrated.relative_residual():.1%}: ask for more --nodes."
        )
    print(f"\n{folder}/attribution.html, .json, .png, .pdf; deletion.png, .pdf")


if __name__ == "__main__":
    program.run(main, supports_mesh=True)
