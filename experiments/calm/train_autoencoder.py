"""Train an autoencoder: --chunk_size tokens to one vector, and back.

    python -m continuous_lm train_autoencoder --output_dir=results/codec

The same command resumes a stopped run, from `run/` in the folder. The other files of the folder are
the checkpoint that `models.calm.autoencoder.load` reads.
"""

import dataclasses

import jax

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import tokenized_text, train_program
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.autoencoder import Autoencoder
from continuous_lm.models.language_model import LanguageModel

# Settings that other flags say, or that follow from the text.
RESERVED_SETTINGS = (
    "chunk_size",
    "hidden_size",
    "key",
    "latent_size",
    "tokenizer",
    "vocab_size",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(tokenized_text.TokenizerConfig, train_program.TrainConfig):
    """Flags of train_autoencoder."""

    chunk_size: int = program.flag(4, help="Tokens in a vector.", lower_bound=1)
    latent_size: int = program.flag(64, help="Width of the vector.", lower_bound=1)
    hidden_size: int = program.flag(
        128, help="Width of the autoencoder.", lower_bound=2
    )
    codec_settings: tuple[str, ...] = program.flag(
        (),
        help="Settings of the autoencoder as name=value: kl_weight=0.01,dropout=0.1",
    )


def create_codec(
    config: Config, data: tokenized_text.Corpus
) -> LanguageModel[Autoencoder]:
    """The autoencoder with new parameters."""
    settings = density_training.parse_settings(config.codec_settings, "codec_settings")
    for name in sorted(settings.keys() & set(RESERVED_SETTINGS)):
        raise InputError(
            f"--codec_settings: {name} is set by other flags; leave it out"
        )
    with about("--codec_settings"):
        return calm_training.create_codec(
            jax.random.key(config.seed),
            vocab_size=data.tokenizer.get_vocab_size(),
            hidden_size=config.hidden_size,
            chunk_size=config.chunk_size,
            latent_size=config.latent_size,
            tokenizer=data.tokenizer,
            settings=settings,
        )


def run(
    config: Config,
) -> train_program.TrainResult[LanguageModel[Autoencoder]]:
    """Train the autoencoder and write it."""
    folder = config.output_folder()
    data = tokenized_text.read_corpus(config)
    codec = create_codec(config, data)
    codec = calm_training.train_codec(
        density_training.place_on_mesh(codec, program.make_mesh(config)),
        data.train,
        data.held_out,
        folder=folder / train_program.RUN_FOLDER,
        config=config.fit_config(),
        settings={"data": data.source},
        label="autoencoder",
    )
    return train_program.write_result(config, autoencoder.save, codec, data.source)


if __name__ == "__main__":
    program.main(Config, run)
