"""Ways from a drawn vector to tokens, on trained models: accuracy, noise, time.

    python -m continuous_lm compare_quantizers --model=results/mixture
    python -m continuous_lm compare_quantizers --model=results/calm-2,results/calm-4

On held-out text, each way gets the same draws from the density of the next vector. Nearest rows,
Euclidean and cosine, and the nearest few re-ranked by the density search the table itself. Vector,
residual and finite scalar quantization are fitted to the table's rows; their code goes on to the
row nearest to it. `kept` is the part of the rows that such a code leads back to themselves.

Of next-vector models, several of which can be given to compare how many tokens C a vector holds,
the decoder is one more way: see `code_comparison`.
"""

import pathlib

from absl import flags

from continuous_lm.errors import InputError
from continuous_lm.experiments.common import absl_program as program
from continuous_lm.experiments.densities import code_comparison, density_training
from continuous_lm.experiments.training import tokenized_text
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models.calm.model import NextVectorModel
from continuous_lm.parallel import processes

_MODEL = flags.DEFINE_list(
    "model",
    None,
    "Folder that the program train wrote; several of next-vector models.",
    required=True,
)
_CODEC = flags.DEFINE_string(
    "codec", None, "Folder of the autoencoder, for a next-vector model without its own."
)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a sequence.", lower_bound=1)
_MAX_WINDOWS = flags.DEFINE_integer("windows", 16, "Sequences, at most.", lower_bound=1)
_CODES = flags.DEFINE_integer(
    "codes", 512, "Codes of the vector quantizer.", lower_bound=2
)
_STAGES = flags.DEFINE_integer("stages", 4, "Of the residual quantizer.", lower_bound=1)
_CANDIDATES = flags.DEFINE_integer("candidates", 16, "Rows to re-rank.", lower_bound=1)
_LEVELS = flags.DEFINE_integer(
    "levels", 5, "Of each dimension, finite scalar.", lower_bound=2
)
_SEED = flags.DEFINE_integer("seed", 0, "Of draws and codebooks.", lower_bound=0)


def main() -> None:
    """Numbers, a table, files."""
    folder = program.output_dir("compare_quantizers")
    settings = {
        "length": _LENGTH.value,
        "windows": _MAX_WINDOWS.value,
        "seed": _SEED.value,
        "codes": _CODES.value,
        "stages": _STAGES.value,
        "levels": _LEVELS.value,
    }
    results = []
    for name in _MODEL.value:
        lm = density_training.load_text_model(name, _CODEC.value, program.mesh())
        data = tokenized_text.read_corpus(lm.tokenizer)
        if isinstance(lm.model, NextVectorModel):
            if flags.FLAGS["candidates"].present:
                raise InputError(
                    "--candidates: a next-vector model has no rows; leave it out"
                )
            label = pathlib.PurePath(name).name
            chunk_results = code_comparison.compare_latent_quantizers(
                lm, data.train, data.held_out, **settings
            )
            results += [{"model": label, **row} for row in chunk_results]
        elif len(_MODEL.value) == 1:
            results = code_comparison.compare_quantizers(
                lm, data.held_out, candidates=_CANDIDATES.value, **settings
            )
        else:
            raise InputError(f"--model: {name} is a density model; give it alone")
    result_table = code_comparison.make_table(results)
    if not processes.is_first_process():
        return
    with write_atomically(folder) as staging_folder:
        contents = {"run": program.record(), "data": data.source, "ways": results}
        write_json(staging_folder / "compare_quantizers.json", contents)
        result_table.write(staging_folder)
    print(
        f"{result_table.as_text()}\n\n{folder}/compare_quantizers.json, quantization.csv, .md, .tex"
    )


if __name__ == "__main__":
    program.run(main, supports_mesh=True)
