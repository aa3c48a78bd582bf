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
from continuous_lm.experiments.common import plots, pretrained, program, prompt
from continuous_lm.io.atomic_files import written_aside
from continuous_lm.io.json_files import write_json
from continuous_lm.parallel import processes

_PROMPT = flags.DEFINE_string("prompt", prompt.PROMPT, "What the model reads.")
_ANSWER = flags.DEFINE_string(
    "answer", None, "What is explained, one token.  [default: the model's most probable answer]"
)
_NODES = flags.DEFINE_integer(
    "nodes", 64, "Gradients along the path, a multiple of 4.", lower_bound=attribution.PANEL
)


def as_html(read: prompt.Reading, rows: dict[str, np.ndarray]) -> str:
    """A page of its own: the text once for each method, coloured by what tokens contribute."""
    blocks = []
    for name, values in rows.items():
        top = max(np.abs(values).max(), 1e-9)
        spans = []
        for gap, piece, value in zip(read.gaps, read.pieces, values, strict=True):
            colour = "213, 94, 0" if value >= 0 else "0, 114, 178"
            spans.append(
                f'{html.escape(gap)}<span title="{value:+.4f} nats" style="background:'
                f'rgba({colour}, {abs(value) / top:.3f})">{html.escape(piece)}</span>'
            )
        blocks.append(f"<h2>{html.escape(name)}</h2>\n<p>{''.join(spans)}</p>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<title>Attribution</title>'
        "<style>body { font: 16px/1.9 serif; max-width: 46em; margin: 3em auto; }"
        " p { white-space: pre-wrap; } span { padding: 2px; border-radius: 3px; }"
        " h2 { font-size: 1em; }</style></head><body>\n"
        f"<h1>What argues for {html.escape(repr(read.answer))}</h1>\n"
        + "\n".join(blocks)
        + "\n<p>Orange argues for the answer, blue against it.</p>\n</body></html>\n"
    )


def main() -> None:
    """Three methods, their deletion curves, table, files."""
    folder = program.output_dir("attribution")
    if _NODES.value % attribution.PANEL:
        raise clm.InputError(f"--nodes is {_NODES.value}; it must be a multiple of 4")
    lm, tokenizer = pretrained.load()
    read = prompt.read(lm, tokenizer, _PROMPT.value, _ANSWER.value)
    value = attribution.log_probability(lm, read.group, tokens=read.tokens)
    durations = jnp.ones(len(read.tokens))
    methods = {
        "integrated gradients": attribution.integrated(value, durations, nodes=_NODES.value),
        "gradient times input": attribution.gradient_times_input(value, durations),
        "leave one out": attribution.leave_one_out(value, durations),
    }
    deletions = {
        name: deletion_curve(value, durations, found.tokens) for name, found in methods.items()
    }
    rows = {name: found.tokens for name, found in methods.items()}
    exact = methods["integrated gradients"]

    title = f"{read.answer!r}: log probability {exact.base:.2f} to {exact.end:.2f}"
    heat = plots.heat_maps(read.pieces, read.gaps, rows, title=title)
    curves = plots.deletion_curves({name: d.values for name, d in deletions.items()})
    if not processes.is_first():
        return
    with written_aside(folder) as aside:
        plots.save(heat, aside, "attribution")
        plots.save(curves, aside, "deletion")
        (aside / "attribution.html").write_text(as_html(read, rows), encoding="utf-8")
        write_json(
            aside / "attribution.json",
            {
                "prompt": read.text,
                "pieces": list(read.pieces),
                "answer": read.answer,
                "group": [tokenizer.id_to_token(token) for token in read.group],
                "log_probability": {"whole": exact.end, "first token alone": exact.base},
                "relative_residual": exact.relative_residual(),
                "methods": {
                    name: {
                        "tokens": found.tokens.tolist(),
                        "residual": found.residual,
                        "deletion": {
                            "order": deletions[name].order.tolist(),
                            "values": deletions[name].values.tolist(),
                            "area": deletions[name].area,
                        },
                    }
                    for name, found in methods.items()
                },
                "run": program.record(),
            },
        )
    print(f"{read.text}\n\n{title}\n")
    print(f"{'method':<22} {'sum':>8} {'residual':>10} {'area of deletion':>17}")
    for name, found in methods.items():
        area = deletions[name].area
        print(f"{name:<22} {found.tokens.sum():8.3f} {found.residual:10.4f} {area:17.3f}")
    print(f"\n{'token':<14} {'integrated':>11} {'gradient':>10} {'left out':>10}")
    for piece, *contributions in zip(read.pieces, *rows.values(), strict=True):
        print(f"{piece:<14} " + " ".join(f"{c:+10.3f}" for c in contributions))
    if exact.relative_residual() > 0.01:
        print(f"\nThe integral is off by {exact.relative_residual():.1%}: ask for more --nodes.")
    print(f"\n{folder}/attribution.html, .json, .png, .pdf; deletion.png, .pdf")


if __name__ == "__main__":
    program.run(main, meshes=True)
