"""Train the softmax baseline: a language model of tokens, for comparison with densities.

    python -m continuous_lm train_lm --output_dir=results/baseline

The same command resumes a stopped run, from `run/` in the folder. The other files of the folder are
the checkpoint, for `models.density.load` and, with tied embeddings, `clm.load`.
"""

import dataclasses

import jax

from continuous_lm.errors import about
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_programs, density_training
from continuous_lm.experiments.training import tokenized_text, train_program
from continuous_lm.models import density
from continuous_lm.models.density import heads
from continuous_lm.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    density_programs.DensityConfig,
    density_training.TrunkFlags,
    tokenized_text.TokenizerConfig,
):
    """Flags of train_lm."""


def create_model(config: Config) -> density_programs.NewModel:
    """The model with new parameters, and the text in its tokens."""
    data = tokenized_text.read_corpus(config)
    vocab_size = data.tokenizer.get_vocab_size()
    # Tied, so that the folder is an ordinary language model too.
    parsed_settings = config.parsed_head_settings(
        density_programs.TOKEN_HEAD, heads.DISTRIBUTION_HEADS
    )
    head_settings = {
        "kind": density_programs.TOKEN_HEAD,
        "width": vocab_size,
        "tied": True,
    }
    head = heads.from_dict({**head_settings, **parsed_settings})
    with about("--head_settings"):
        lm = density.create(
            jax.random.key(config.seed),
            config.trunk_config(vocab_size),
            head,
            tokenizer=data.tokenizer,
            token_loss_weight=0.0,
        )
    return density_programs.NewModel(lm, data, "the new model")


def run(
    config: Config,
) -> train_program.TrainResult[LanguageModel[density.DensityModel]]:
    """Train the model and write it."""
    return density_programs.train_and_write(
        config, create_model, density_programs.TOKEN_HEAD
    )


if __name__ == "__main__":
    program.main(Config, run)
