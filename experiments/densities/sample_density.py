"""Sample text from a density model or the softmax baseline, and steer it.

    python -m continuous_lm sample_density --model=results/mixture --prompt="Return the"
    python -m continuous_lm sample_density --model=results/mixture \
        --towards=file,path,directory --strengths=0,0.5,1,2

Steering shifts the mean of each density along a direction. The direction is the mean row of the
words in --towards, minus the mean row of the words in --away (of all rows if --away is empty). The
measure is the share of new tokens among the --near_k rows nearest to a word of --towards.
"""

import dataclasses
import math
import pathlib

import numpy as np
import tokenizers

from continuous_lm.errors import InputError
from continuous_lm.experiments.common import plots, program, tables
from continuous_lm.experiments.densities import density_training, steering
from continuous_lm.experiments.training import text, train_program
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models import density
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.parallel import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.DeviceConfig):
    """Flags of sample_density."""

    model: str | None = program.flag(
        None, help="Folder that train_density, train_head or train_lm wrote; required."
    )
    prompt: str = program.flag("", help="Prompt text.  [default: the end of a text]")
    samples: int = program.flag(
        4, help="Number of texts of each strength.", lower_bound=1
    )
    max_new_tokens: int = program.flag(
        64, help="Number of new tokens of each text, at most.", lower_bound=1
    )
    temperature: float = program.flag(
        0.7, help="Temperature of the draws; at 0 the mean is taken.", lower_bound=0.0
    )
    quantize: str = program.flag(
        "rerank", help="Way from vectors to tokens.", choices=steering.QUANTIZE_METHODS
    )
    towards: tuple[str, ...] = program.flag((), help="Words to steer towards.")
    away: tuple[str, ...] = program.flag((), help="Words to steer away from.")
    strengths: tuple[float, ...] = program.flag(
        (0.0,), help="Strengths of steering, in units of the rows."
    )
    near_k: int = program.flag(
        16, help="Number of rows that are near a word.", lower_bound=1
    )
    seed: int = program.flag(0, help="Seed of the draws.", lower_bound=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strengths or not all(map(math.isfinite, self.strengths)):
            raise InputError("--strengths: give at least one finite number")
        if not self.towards and (self.away or self.strengths != (0.0,)):
            raise InputError(
                "--away and --strengths need --towards, the words to steer towards"
            )


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """Samples of each strength.

    Attributes:
      prompt: the prompt.
      samples: tokens of each strength.
      texts: [strength][sample], the new text.
      table: the shares, if there is steering.
    """

    prompt: str
    samples: list[steering.SteeredSamples]
    texts: list[list[str]]
    table: tables.Table | None

    def summary(self) -> str:
        lines = []
        for strength_samples, sample_texts in zip(
            self.samples, self.texts, strict=True
        ):
            label = ""
            if self.table is not None:
                label = (
                    f" strength {strength_samples.strength:g},"
                    f" {strength_samples.share.value:.1%} near"
                )
            lines += [
                f"---{label}\n{self.prompt}{sample_text}"
                for sample_text in sample_texts
            ]
        if self.table is not None:
            lines.append(f"\n{self.table.as_text()}")
        return "\n".join(lines)


def draw_samples(
    config: Config,
    lm: LanguageModel[density.DensityModel],
    tokenizer: tokenizers.Tokenizer,
) -> list[steering.SteeredSamples]:
    """The samples of each strength."""
    prompt = tokenizer.encode(config.prompt, add_special_tokens=False).ids
    prompt = prompt or [text.end_of_text_id(tokenizer)]
    return steering.sample_steered(
        lm,
        [np.asarray(prompt, np.int32)] * config.samples,
        steering.Steering(
            steering.word_tokens(tokenizer, config.towards, "towards"),
            steering.word_tokens(tokenizer, config.away, "away"),
            config.near_k,
        ),
        config.strengths,
        steering.SampleSettings(
            config.max_new_tokens, config.temperature, config.quantize, config.seed
        ),
    )


def write_files(config: Config, folder: pathlib.Path, result: Result) -> None:
    """Write sample.json and, with steering, a figure and a table."""
    sample_records = [
        {
            "strength": strength_samples.strength,
            "share": strength_samples.share._asdict(),
            "tokens": strength_samples.tokens,
            "texts": sample_texts,
        }
        for strength_samples, sample_texts in zip(
            result.samples, result.texts, strict=True
        )
    ]
    with write_atomically(folder) as staging_folder:
        write_json(
            staging_folder / "sample.json",
            {"run": program.record(config), "samples": sample_records},
        )
        if result.table is not None:
            xlabel = f"strength towards {', '.join(config.towards)}"
            figure = steering.plot_steering(result.samples, xlabel)
            plots.save(figure, staging_folder, "steering")
            result.table.write(staging_folder)


def run(config: Config) -> Result:
    """Load the model, sample texts, and write them."""
    folder = program.output_folder(config)
    model_folder = train_program.require(config.model, "model", "a trained model")
    mesh = program.make_mesh(config)
    lm = density_training.load_density_model(model_folder, mesh=mesh)
    tokenizer = density_training.require_tokenizer(lm, model_folder)
    samples = draw_samples(config, lm, tokenizer)
    texts = [
        [tokenizer.decode(row) for row in strength_samples.tokens]
        for strength_samples in samples
    ]
    table = steering.make_table(samples) if config.towards else None
    result = Result(config.prompt, samples, texts, table)
    if folder is not None and processes.is_first_process():
        write_files(config, folder, result)
    return result


if __name__ == "__main__":
    program.main(Config, run)
