"""Shared parts of train_density, train_lm and train_head: make, train and write a model."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_training
from continuous_lm.experiments.training import text, train_program
from continuous_lm.experiments.training.tokenized_text import Corpus
from continuous_lm.models import density
from continuous_lm.models.density import heads
from continuous_lm.models.language_model import LanguageModel

TOKEN_HEAD = "token"
DENSITY_HEADS = tuple(kind for kind in heads.DISTRIBUTION_HEADS if kind != TOKEN_HEAD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityConfig(density_training.HeadFlags, train_program.TrainConfig):
    """Flags of all three."""


Config = TypeVar("Config", bound=DensityConfig)


class NewModel(NamedTuple):
    """A model that is to be trained.

    Attributes:
      lm: the model with its first parameters.
      data: the text in its tokens.
      vocabulary_source: the model of the vocabulary, for errors.
    """

    lm: LanguageModel[density.DensityModel]
    data: Corpus
    vocabulary_source: str


def train_and_write(
    config: Config,
    create_model: Callable[[Config], NewModel],
    label: str,
    *,
    trunk_is_frozen: bool = False,
) -> train_program.TrainResult[LanguageModel[density.DensityModel]]:
    """Train a density model, or resume its run, and write it.

    Args:
      config: config of the program.
      create_model: function that reads the text and makes the model to train.
      label: label of the progress bar.
      trunk_is_frozen: train only the head.
    """
    folder = config.output_folder()
    new_model = create_model(config)
    lm = new_model.lm
    data = new_model.data
    text.check_tokenizer(
        data.tokenizer, lm.config.vocab_size, new_model.vocabulary_source
    )
    model_settings = {
        "reads": lm.model.input_kind,
        "table": lm.model.table,
        "contrast": lm.model.token_loss_weight,
    }
    trained_lm = density_training.train(
        density_training.place_on_mesh(lm, program.make_mesh(config)),
        data.train,
        data.held_out,
        folder=folder / train_program.RUN_FOLDER,
        config=config.fit_config(),
        length=config.length,
        trunk_is_frozen=trunk_is_frozen,
        settings={
            "data": data.source,
            "head": lm.model.head.to_dict(),
            "model": model_settings,
        },
        label=label,
    )
    return train_program.write_result(config, density.save, trained_lm, data.source)
