"""Train a next-vector model: a head without a likelihood predicts an autoencoder's next vector.

    python -m continuous_lm train_autoencoder --output_dir=results/codec
    python -m continuous_lm train_calm --codec=results/codec --output_dir=results/calm

The same command resumes a stopped run, from `run/` in the folder. The other files of the folder are
the checkpoint that `models.calm.load` reads.
"""

import dataclasses

import jax

from continuous_lm.errors import InputError, about
from continuous_lm.experiments.calm import calm_training
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import tokenized_text, train_program
from continuous_lm.models import calm
from continuous_lm.models import head as head_lib
from continuous_lm.models.calm import autoencoder
from continuous_lm.models.calm.implicit_heads import IMPLICIT_HEADS
from continuous_lm.models.language_model import LanguageModel

HEAD_DEPTH = 2  # blocks, unless --head_settings says otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    density_training.HeadFlags,
    density_training.TrunkFlags,
    tokenized_text.TextConfig,
    train_program.TrainConfig,
):
    """Flags of train_calm."""

    codec: str | None = program.flag(
        None, help="Folder of the autoencoder, which stays as it is; required."
    )
    head: str = program.flag(
        "energy",
        help="Distribution of the next vector.",
        choices=tuple(IMPLICIT_HEADS),
    )


def load_codec(config: Config) -> LanguageModel[calm.Autoencoder]:
    """The autoencoder, with a tokenizer."""
    folder = train_program.require(
        config.codec, "codec", "the folder that train_autoencoder wrote"
    )
    with about("--codec"):
        codec = autoencoder.load(folder, dtype="float32")
        if codec.tokenizer is None:
            raise InputError(f"{folder} has no tokenizer.json")
    return codec


def create_model(
    config: Config, codec: LanguageModel[calm.Autoencoder]
) -> LanguageModel[calm.NextVectorModel]:
    """The next-vector model with new parameters, beside those of the autoencoder."""
    settings = config.parsed_head_settings(config.head, IMPLICIT_HEADS)
    if "width" in settings:
        raise InputError("--head_settings: width follows from --codec; leave it out")
    head_settings = {
        "kind": config.head,
        "width": codec.model.config.latent_size,
        "depth": HEAD_DEPTH,
    }
    head = head_lib.from_dict({**head_settings, **settings}, IMPLICIT_HEADS)
    return calm.create(
        jax.random.key(config.seed),
        config.trunk_config(codec.model.config.vocab_size),
        codec,
        head,
        num_targets=calm_training.NUM_TARGET_DRAWS,
    )


def run(
    config: Config,
) -> train_program.TrainResult[LanguageModel[calm.NextVectorModel]]:
    """Train the model and write it, its autoencoder beside it."""
    folder = config.output_folder()
    codec = load_codec(config)
    data = tokenized_text.read_corpus(config, codec.tokenizer)
    lm = create_model(config, codec)
    lm = calm_training.train(
        density_training.place_on_mesh(lm, program.make_mesh(config)),
        data.train,
        data.held_out,
        folder=folder / train_program.RUN_FOLDER,
        config=config.fit_config(),
        length=config.length,
        settings={"data": data.source, "model": calm.write_config(lm.model)},
        label=config.head,
    )
    return train_program.write_result(config, calm.save, lm, data.source)


if __name__ == "__main__":
    program.main(Config, run)
