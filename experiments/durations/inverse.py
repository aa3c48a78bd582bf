"""The inverse problem: durations that make the model say a chosen answer.

    python -m continuous_lm inverse [--prompt=TEXT] --answer=3 [--span="apple apple"]

Durations are found by gradients, near 1 and mostly equal to 1, at which the answer leads every
other token by --margin; random search with as many evaluations of the model (a gradient counts as
three) is set beside them. On the embedded model this takes under a minute.
"""

import jax.numpy as jnp
import numpy as np
from absl import flags

import continuous_lm as clm
from continuous_lm.analysis import duration_search
from continuous_lm.analysis.attribution import next_token_logits
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
_ANSWER = flags.DEFINE_string("answer", "3", "What the model is to say, one token.")
_SPAN = flags.DEFINE_string(
    "span",
    None,
    "A piece of the prompt whose tokens may change.  [default: all but the first]",
)
_MARGIN = flags.DEFINE_float(
    "margin", 0.1, "Lead in log-odds over every other token.", lower_bound=0.0
)
_STEPS = flags.DEFINE_integer("steps", 60, "Steps of gradient ascent.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random search.")


def main() -> None:
    """Search, verify, table, files."""
    folder = program.output_dir("inverse")
    lm, tokenizer = pretrained.load()
    answered_prompt = prompt.encode_prompt(lm, tokenizer, _PROMPT.value, _ANSWER.value)
    token_span = None
    if _SPAN.value is not None:
        encoding = clm.tokenization.encode(tokenizer, answered_prompt.text)
        token_span = clm.tokenization.span(encoding, answered_prompt.text, _SPAN.value)
    ordinary_durations = jnp.ones(len(answered_prompt.tokens))
    answer_tokens = jnp.array(answered_prompt.answer_tokens)
    constraint = duration_search.Margin(
        next_token_logits(lm, tokens=answered_prompt.tokens),
        answer_tokens,
        _MARGIN.value,
    )
    by_gradients = duration_search.find_durations(
        constraint, ordinary_durations, span=token_span, steps=_STEPS.value
    )
    by_random_search = duration_search.random_search(
        constraint,
        ordinary_durations,
        span=token_span,
        evaluations=by_gradients.evaluations,
        seed=_SEED.value,
    )

    results = {"gradients": by_gradients, "random search": by_random_search}
    result_records, drawn_durations = {}, {}
    for method, result in results.items():
        # Apart from the search.
        logits = lm(answered_prompt.tokens, durations=result.durations, position=-1)
        top_token = int(np.asarray(logits).argmax())
        result_records[method] = {
            "durations": result.durations.tolist(),
            "total_change": result.total,
            "changed": int((np.abs(result.durations - 1.0) > 1e-3).sum()),
            "lead": float(duration_search.answer_lead(logits, answer_tokens)),
            "says": tokenizer.id_to_token(top_token),
            "holds": top_token in answered_prompt.answer_tokens,
            "evaluations": result.evaluations,
        }
        if top_token in answered_prompt.answer_tokens:
            drawn_durations[f"{method}: total change {result.total:.3f}"] = (
                result.durations
            )
    title = f"durations that make it say {answered_prompt.answer!r}"
    figure = plots.durations_over_text(
        answered_prompt.token_texts,
        answered_prompt.separators,
        drawn_durations or {"ordinary": np.ones(len(ordinary_durations))},
        title=title,
    )
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        plots.save(figure, staging_folder, "inverse")
        write_json(
            staging_folder / "inverse.json",
            {
                "prompt": answered_prompt.text,
                "pieces": list(answered_prompt.token_texts),
                "answer": answered_prompt.answer,
                "span": None if token_span is None else list(token_span),
                "found": result_records,
                "run": program.record(),
            },
        )
    print(f"{answered_prompt.text}\n\n{title}\n")
    print(
        f"{'search':<15} {'says':<8} {'lead':>8} {'total change':>13} {'changed':>8}   evaluations"
    )
    for method, result_record in result_records.items():
        print(
            f"{method:<15} {result_record['says']:<8} {result_record['lead']:8.3f}"
            f" {result_record['total_change']:13.3f}"
            f" {result_record['changed']:8d}   {result_record['evaluations']}"
        )
    print(f"\n{'token':<14} {'gradients':>10} {'random':>10}")
    for j, token_text in enumerate(answered_prompt.token_texts):
        token_durations = np.array([result.durations[j] for result in results.values()])
        if (np.abs(token_durations - 1.0) > 1e-3).any():
            print(
                f"{token_text:<14} " + " ".join(f"{d:10.3f}" for d in token_durations)
            )
    if not result_records["gradients"]["holds"]:
        print(
            "\nNo durations were found that make it say so; allow more steps or another piece."
        )
    print(f"\n{folder}/inverse.json, .png, .pdf")


if __name__ == "__main__":
    program.run(main, supports_mesh=True)
