"""Train a new head on a frozen pretrained trunk.

    python -m continuous_lm train_head --trunk=results/baseline --head=mixture

A density is over the rows of the trunk's own embedding table. The same command resumes a stopped
run, from `run/` in the folder. The other files of the folder are the checkpoint that
`models.density.load` reads.
"""

import dataclasses

import jax

import continuous_lm as clm
from continuous_lm.errors import InputError
from continuous_lm.experiments.common import program
from continuous_lm.experiments.densities import density_programs
from continuous_lm.experiments.training import tokenized_text, train_program
from continuous_lm.models import density
from continuous_lm.models.density import heads
from continuous_lm.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(density_programs.DensityConfig, tokenized_text.TextConfig):
    """Flags of train_head."""

    trunk: str | None = program.flag(
        None, help="Checkpoint folder or bundled model; required."
    )
    head: str = program.flag(
        "gaussian",
        help="Density over the next vector, or token: a softmax over tokens.",
        choices=tuple(heads.DISTRIBUTION_HEADS),
    )
    token_loss_weight: float | None = program.flag(
        None,
        help="Weight of the tokens' cross-entropy under the density, against the nats of a"
        " dimension.  [default: 1]",
        lower_bound=0.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predicts_tokens and self.token_loss_weight is not None:
            raise InputError("--token_loss_weight: tokens have no rows; leave it out")

    @property
    def predicts_tokens(self) -> bool:
        """Return whether the head is a softmax over tokens."""
        return self.head == density_programs.TOKEN_HEAD


def create_model(config: Config) -> density_programs.NewModel:
    """The trunk under a new head, and the text in its tokens."""
    folder = train_program.require(config.trunk, "trunk", "a folder or bundled model")
    mesh = program.make_mesh(config)
    trunk_lm = density.trunk_of(clm.load(folder, dtype="float32", mesh=mesh))
    if trunk_lm.tokenizer is None:
        raise InputError(f"--trunk: {folder} has no tokenizer.json")
    data = tokenized_text.read_corpus(config, trunk_lm.tokenizer)
    width = trunk_lm.config.hidden_size
    token_loss_weight = 1.0
    if config.token_loss_weight is not None:
        token_loss_weight = config.token_loss_weight
    if config.predicts_tokens:
        width = trunk_lm.config.vocab_size
        token_loss_weight = 0.0
    parsed_settings = config.parsed_head_settings(config.head, heads.DISTRIBUTION_HEADS)
    head_settings = {"kind": config.head, "width": width}
    lm = density.add_head(
        trunk_lm,
        heads.from_dict({**head_settings, **parsed_settings}),
        key=jax.random.key(config.seed),
        token_loss_weight=token_loss_weight,
    )
    return density_programs.NewModel(lm, data, folder)


def run(
    config: Config,
) -> train_program.TrainResult[LanguageModel[density.DensityModel]]:
    """Train the head and write the model."""
    return density_programs.train_and_write(
        config, create_model, config.head, trunk_is_frozen=True
    )


if __name__ == "__main__":
    program.main(Config, run)
