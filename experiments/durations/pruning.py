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
from continuous_lm.experiments.common import plots, pretrained, program, prompt
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

_PROMPT = flags.DEFINE_string("prompt", prompt.PROMPT, "What the model reads.")
_ANSWER = flags.DEFINE_string(
    "answer", None, "What is kept, one token.  [default: the model's most probable answer]"
)
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.1, "What its log probability may lose, in nats.", lower_bound=1e-3
)
_DESCENT = flags.DEFINE_integer("descent", 200, "Steps of gradient descent.", lower_bound=1)


def main() -> None:
    """Prune, verify, table, files."""
    folder = program.output_dir("pruning")
    lm, tokenizer = pretrained.load()
    read = prompt.read(lm, tokenizer, _PROMPT.value, _ANSWER.value)
    value = log_probability(lm, read.group, tokens=read.tokens)
    plain = np.ones(len(read.tokens), np.float32)
    pruned = prune(value, plain, tolerance=_TOLERANCE.value, steps=_DESCENT.value)
    d = pruned.durations
    kept = np.flatnonzero(d > 0)

    before = float(value(jnp.asarray(plain)))
    # The plain model, to which no optimiser or absent token is known.
    last = [] if d[-1] > 0 else [len(d) - 1]  # the query itself has a place, if no time
    left = np.array([*kept, *last])
    logits = lm(read.tokens[left], durations=d[left], at=-1)
    after = float(jax.nn.logsumexp(jax.nn.log_softmax(logits)[jnp.array(read.group)]))
    said = tokenizer.id_to_token(int(np.asarray(logits).argmax()))

    title = (
        f"{read.answer!r}: {d[1:].sum():.2f} of {len(d) - 1} left, log probability {before:.3f} to"
        f" {after:.3f}"
    )
    figure = plots.durations_over_text(read.pieces, read.gaps, {"pruned": d}, title=title)
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        plots.save(figure, aside, "pruning")
        write_json(
            aside / "pruning.json",
            {
                "prompt": read.text,
                "pieces": list(read.pieces),
                "answer": read.answer,
                "durations": d.tolist(),
                "kept": kept.tolist(),
                "total": {"before": len(d) - 1, "after": float(d[1:].sum())},
                "log_probability": {"before": before, "after": after},
                "says": said,
                "evaluations": pruned.evaluations,
                "run": program.record(),
            },
        )
    print(f"{read.text}\n\n{title}\n")
    print(f"{'token':<14} {'duration':>9}")
    for j in kept:
        print(f"{read.pieces[j]:<14} {d[j]:9.3f}")
    print(f"\n{len(kept)} of {len(d)} tokens are left, and the model says {said!r}.")
    print(f"\n{folder}/pruning.json, .png, .pdf")


if __name__ == "__main__":
    program.run(main, meshes=True)
