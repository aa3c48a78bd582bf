"""Pruning: the shortest prompt, in time, that keeps an answer.

    python -m continuous_lm pruning [--prompt=TEXT] [--answer=4] [--tolerance=0.1]

Durations shrink as far as the log probability of the answer stays within a tolerance; what comes to
0 is gone. The result is verified by the plain model, on the prompt from which those tokens have
been taken. On the embedded model this takes under a minute.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from continuous_lm.analysis.attribution import log_probability
from continuous_lm.analysis.pruning import prune
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
    "What is kept, one token.  [default: the model's most probable answer]",
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.1, "What its log probability may lose, in nats.", lower_bound=1e-3
)
_STEPS = flags.DEFINE_integer("steps", 200, "Steps of gradient descent.", lower_bound=1)


def main() -> None:
    """Prune, verify, table, files."""
    folder = program.output_dir("pruning")
    lm, tokenizer = pretrained.load()
    answered_prompt = prompt.encode_prompt(lm, tokenizer, _PROMPT.value, _ANSWER.value)
    objective = log_probability(
        lm, answered_prompt.answer_tokens, tokens=answered_prompt.tokens
    )
    ordinary_durations = np.ones(len(answered_prompt.tokens), np.float32)
    pruned = prune(
        objective, ordinary_durations, tolerance=_TOLERANCE.value, steps=_STEPS.value
    )
    pruned_durations = pruned.durations
    remaining_tokens = np.flatnonzero(pruned_durations > 0)

    log_prob_before = float(objective(jnp.asarray(ordinary_durations)))
    # The plain model, to which no optimiser or absent token is known.
    # The query itself has a place, if no time.
    query_index = [] if pruned_durations[-1] > 0 else [len(pruned_durations) - 1]
    model_indices = np.array([*remaining_tokens, *query_index])
    logits = lm(
        answered_prompt.tokens[model_indices],
        durations=pruned_durations[model_indices],
        position=-1,
    )
    log_prob_after = float(
        jax.nn.logsumexp(
            jax.nn.log_softmax(logits)[jnp.array(answered_prompt.answer_tokens)]
        )
    )
    top_token = tokenizer.id_to_token(int(np.asarray(logits).argmax()))

    title = (
        f"{answered_prompt.answer!r}: {pruned_durations[1:].sum():.2f} of"
        f" {len(pruned_durations) - 1} left, log probability {log_prob_before:.3f} to"
        f" {log_prob_after:.3f}"
    )
    figure = plots.durations_over_text(
        answered_prompt.token_texts,
        answered_prompt.separators,
        {"pruned": pruned_durations},
        title=title,
    )
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        plots.save(figure, staging_folder, "pruning")
        write_json(
            staging_folder / "pruning.json",
            {
                "prompt": answered_prompt.text,
                "pieces": list(answered_prompt.token_texts),
                "answer": answered_prompt.answer,
                "durations": pruned_durations.tolist(),
                "kept": remaining_tokens.tolist(),
                "total": {
                    "before": len(pruned_durations) - 1,
                    "after": float(pruned_durations[1:].sum()),
                },
                "log_probability": {"before": log_prob_before, "after": log_prob_after},
                "says": top_token,
                "evaluations": pruned.evaluations,
                "run": program.record(),
            },
        )
    print(f"{answered_prompt.text}\n\n{title}\n")
    print(f"{'token':<14} {'duration':>9}")
    for j in remaining_tokens:
        print(f"{answered_prompt.token_texts[j]:<14} {pruned_durations[j]:9.3f}")
    print(
        f"\n{len(remaining_tokens)} of {len(pruned_durations)} tokens are left, and the model"
        f" says {top_token!r}."
    )
    print(f"\n{folder}/pruning.json, .png, .pdf")


if __name__ == "__main__":
    program.run(main, supports_mesh=True)
