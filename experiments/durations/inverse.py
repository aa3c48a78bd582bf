"""The inverse problem: durations that make the model say a chosen answer.

    python -m continuous_lm inverse [--prompt=TEXT] --answer=3 [--within="apple apple"]

Durations are found by gradients, near 1 and mostly equal to 1, at which the answer leads every
other token by --margin; random search with as many evaluations of the model (a gradient counts as
three) is set beside them. On the embedded model this takes under a minute.
"""

import jax.numpy as jnp
import numpy as np
from absl import flags

import continuous_lm as clm
from continuous_lm.analysis import duration_search
from continuous_lm.analysis.attribution import next_token
from continuous_lm.experiments.common import plots, pretrained, program, prompt
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

_PROMPT = flags.DEFINE_string("prompt", prompt.PROMPT, "What the model reads.")
_ANSWER = flags.DEFINE_string("answer", "3", "What the model is to say, one token.")
_WITHIN = flags.DEFINE_string(
    "within", None, "A piece of the prompt whose tokens may change.  [default: all but the first]"
)
_MARGIN = flags.DEFINE_float(
    "margin", 0.1, "Lead in log-odds over every other token.", lower_bound=0.0
)
_ASCENT = flags.DEFINE_integer("ascent", 60, "Steps of gradient ascent.", lower_bound=1)
_SEED = flags.DEFINE_integer("search_seed", 0, "Of the random search.")


def main() -> None:
    """Search, verify, table, files."""
    folder = program.output_dir("inverse")
    lm, tokenizer = pretrained.load()
    read = prompt.read(lm, tokenizer, _PROMPT.value, _ANSWER.value)
    span = None
    if _WITHIN.value is not None:
        encoding = clm.tokenization.encode(tokenizer, read.text)
        span = clm.tokenization.span(encoding, read.text, _WITHIN.value)
    plain = jnp.ones(len(read.tokens))
    group = jnp.array(read.group)
    slack = duration_search.Margin(next_token(lm, tokens=read.tokens), group, _MARGIN.value)
    steered = duration_search.steer(slack, plain, span=span, steps=_ASCENT.value)
    chance = duration_search.random_search(
        slack, plain, span=span, evaluations=steered.evaluations, seed=_SEED.value
    )

    rows = {"gradients": steered, "random search": chance}
    found, drawn = {}, {}
    for name, result in rows.items():
        logits = lm(read.tokens, durations=result.durations, at=-1)  # apart from the search
        said = int(np.asarray(logits).argmax())
        found[name] = {
            "durations": result.durations.tolist(),
            "total_change": result.total,
            "changed": int((np.abs(result.durations - 1.0) > 1e-3).sum()),
            "lead": float(duration_search.lead(logits, group)),
            "says": tokenizer.id_to_token(said),
            "holds": said in read.group,
            "evaluations": result.evaluations,
        }
        if said in read.group:
            drawn[f"{name}: total change {result.total:.3f}"] = result.durations
    title = f"durations that make it say {read.answer!r}"
    figure = plots.durations_over_text(
        read.pieces, read.gaps, drawn or {"ordinary": np.ones(len(plain))}, title=title
    )
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        plots.save(figure, aside, "inverse")
        write_json(
            aside / "inverse.json",
            {
                "prompt": read.text,
                "pieces": list(read.pieces),
                "answer": read.answer,
                "span": None if span is None else list(span),
                "found": found,
                "run": program.record(),
            },
        )
    print(f"{read.text}\n\n{title}\n")
    print(
        f"{'search':<15} {'says':<8} {'lead':>8} {'total change':>13} {'changed':>8}   evaluations"
    )
    for name, row in found.items():
        print(
            f"{name:<15} {row['says']:<8} {row['lead']:8.3f} {row['total_change']:13.3f}"
            f" {row['changed']:8d}   {row['evaluations']}"
        )
    print(f"\n{'token':<14} {'gradients':>10} {'random':>10}")
    for j, piece in enumerate(read.pieces):
        lasts = np.array([result.durations[j] for result in rows.values()])
        if (np.abs(lasts - 1.0) > 1e-3).any():
            print(f"{piece:<14} " + " ".join(f"{d:10.3f}" for d in lasts))
    if not found["gradients"]["holds"]:
        print("\nNo durations were found that make it say so; allow more steps or another piece.")
    print(f"\n{folder}/inverse.json, .png, .pdf")


if __name__ == "__main__":
    program.run(main, meshes=True)
