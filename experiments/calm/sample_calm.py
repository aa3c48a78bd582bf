"""Sample text from a next-vector model, and decode points between two texts.

    python -m continuous_lm sample_calm --model=results/calm --temperature=0.5
    python -m continuous_lm sample_calm --model=results/calm \
        --between="Return the name." --between="Raise an error."

The temperature is 1, 1/2, 1/3 ... or 0; with --method=exact any number up to 1. --between decodes
points on the line between the vectors of two texts.
"""

import dataclasses

import jax
import numpy as np
import tokenizers

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_evaluation
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import text, train_program
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import write_json
from continuous_lm.models import calm
from continuous_lm.models.generation import generate
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.parallel import processes

SAMPLING_METHODS = ("batch", "exact")
DEFAULT_CANDIDATES = 128
DEFAULT_MAX_ROUNDS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.DeviceConfig):
    """Flags of sample_calm."""

    model: str | None = program.flag(
        None, help="Folder that train_calm wrote; required."
    )
    codec: str | None = program.flag(
        None, help="Folder of the autoencoder, for a model without its own."
    )
    prompt: str = program.flag("", help="Prompt text.  [default: the end of a text]")
    samples: int = program.flag(4, help="Number of texts.", lower_bound=1)
    max_new_tokens: int = program.flag(
        64, help="Number of new tokens of each text, at most.", lower_bound=1
    )
    temperature: float = program.flag(
        0.5,
        help="Temperature of the draws; at 0 the most frequent chunk is taken.",
        lower_bound=0.0,
    )
    method: str = program.flag(
        "batch",
        help="How vectors are drawn at a temperature.",
        choices=SAMPLING_METHODS,
    )
    candidates: int | None = program.flag(
        None,
        help=f"Candidates of --method=batch.  [default: {DEFAULT_CANDIDATES}]",
        lower_bound=1,
    )
    max_rounds: int | None = program.flag(
        None,
        help=f"Rounds of --method=exact, at most.  [default: {DEFAULT_MAX_ROUNDS}]",
        lower_bound=1,
    )
    between: tuple[str, ...] = program.flag(
        (), help="One of two texts to go between; given twice.", repeated=True
    )
    seed: int = program.flag(0, help="Seed of the draws.", lower_bound=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.between) not in (0, 2):
            raise InputError(
                f"--between is given {len(self.between)} times; give it twice, or not at all"
            )
        method_of_flag = {"candidates": "batch", "max_rounds": "exact"}
        for name, method in method_of_flag.items():
            if self.method != method and getattr(self, name) is not None:
                raise InputError(
                    f"--{name} is not of --method={self.method}; leave it out"
                )


@dataclasses.dataclass(frozen=True)
class Result(program.Result):
    """New texts.

    Attributes:
      prompt: the prompt.
      texts: the new text of each sample.
      between: decoded texts from the first --between text to the second, if any.
    """

    prompt: str
    texts: list[str]
    between: list[str] | None

    def summary(self) -> str:
        lines = [f"---\n{self.prompt}{sample_text}" for sample_text in self.texts]
        if self.between is not None:
            lines += ["--- between", *self.between]
        return "\n".join(lines)


def make_sampler(config: Config, pad_token: int) -> calm.Repetition | calm.Rejection:
    """The sampler of --method."""
    if config.method == "exact":
        return calm.Rejection(
            config.temperature,
            max_rounds=config.max_rounds or DEFAULT_MAX_ROUNDS,
            pad_token=pad_token,
        )
    return calm.Repetition(
        config.temperature,
        num_candidates=config.candidates or DEFAULT_CANDIDATES,
        pad_token=pad_token,
    )


def draw_texts(
    config: Config,
    lm: LanguageModel[calm.NextVectorModel],
    tokenizer: tokenizers.Tokenizer,
) -> list[str]:
    """The new text of each sample."""
    prompt = tokenizer.encode(config.prompt, add_special_tokens=False).ids
    end_token = text.end_of_text_id(tokenizer)
    generated = generate(
        lm,
        np.tile(prompt or [end_token], (config.samples, 1)),
        sampler=make_sampler(config, end_token),
        max_new_tokens=config.max_new_tokens,
        stop=None if "eos_token_id" in lm.hf_fields else end_token,
        key=jax.random.key(config.seed),
    )
    return [tokenizer.decode(row) for row in generated.token_lists()]


def interpolate(
    config: Config,
    lm: LanguageModel[calm.NextVectorModel],
    tokenizer: tokenizers.Tokenizer,
) -> list[str]:
    """Texts from the first of --between to the second."""
    first, second = config.between
    with about("--between"):
        token_rows = calm_evaluation.interpolate_texts(
            calm.autoencoder_of(lm),
            tokenizer.encode(first, add_special_tokens=False).ids,
            tokenizer.encode(second, add_special_tokens=False).ids,
        )
    return [tokenizer.decode(tokens) for tokens in token_rows]


def run(config: Config) -> Result:
    """Load the model, sample texts, and write them."""
    folder = program.output_folder(config)
    model_folder = train_program.require(config.model, "model", "a trained model")
    lm = density_training.load_next_vector_model(
        model_folder, config.codec, program.make_mesh(config)
    )
    tokenizer = density_training.require_tokenizer(lm, model_folder)
    texts = draw_texts(config, lm, tokenizer)
    between = interpolate(config, lm, tokenizer) if config.between else None
    if folder is not None and processes.is_first_process():
        values = {"run": program.record(config), "texts": texts}
        if between is not None:
            values["between"] = between
        with write_atomically(folder) as staging_folder:
            write_json(staging_folder / "sample.json", values)
    return Result(config.prompt, texts, between)


if __name__ == "__main__":
    program.main(Config, run)
