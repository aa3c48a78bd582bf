"""Train a density model: the trunk with a density over the vector of the next token.

    python -m continuous_lm train_density --output_dir=results/density
    python -m continuous_lm train_density --head=mixture --table_from=results/baseline \
        --output_dir=results/mixture

The vectors are the rows of a table. --table_from takes the frozen table of another model. Otherwise
they are the trunk's embeddings, which are trained; --token_loss_weight prevents their collapse.

The same command resumes a stopped run, from `run/` in the folder. The other files of the folder are
the checkpoint that `models.density.load` reads.
"""

import dataclasses

import jax

import continuous_lm as clm
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
    """Flags of train_density."""

    head: str = program.flag(
        "gaussian",
        help="Density over the next vector.",
        choices=density_programs.DENSITY_HEADS,
    )
    table_from: str | None = program.flag(
        None,
        help="Model whose embedding table, frozen, holds the vectors.  [default: its own]",
    )
    token_loss_weight: float = program.flag(
        1.0,
        help="Weight of the tokens' cross-entropy under the density, against the nats of a"
        " dimension.",
        lower_bound=0.0,
    )


def create_model(config: Config) -> density_programs.NewModel:
    """The model with new parameters, and the text in its tokens."""
    table = None
    if config.table_from is None:
        data = tokenized_text.read_corpus(config)
        vocab_size = data.tokenizer.get_vocab_size()
    else:
        config.check_no_tokenizer()
        table_model = density.trunk_of(clm.load(config.table_from, dtype="float32"))
        table = table_model.params["embedding"]
        data = tokenized_text.read_corpus(config, table_model.tokenizer)
        vocab_size = table_model.config.vocab_size
    trunk_config = config.trunk_config(vocab_size)
    parsed_settings = config.parsed_head_settings(config.head, heads.DISTRIBUTION_HEADS)
    head_settings = {"kind": config.head, "width": trunk_config.hidden_size}
    head = heads.from_dict({**head_settings, **parsed_settings})
    with about("--table_from" if table is not None else "--head"):
        lm = density.create(
            jax.random.key(config.seed),
            trunk_config,
            head,
            table=table,
            tokenizer=data.tokenizer,
            token_loss_weight=config.token_loss_weight,
        )
    return density_programs.NewModel(lm, data, str(config.table_from))


def run(
    config: Config,
) -> train_program.TrainResult[LanguageModel[density.DensityModel]]:
    """Train the model and write it."""
    return density_programs.train_and_write(config, create_model, config.head)


if __name__ == "__main__":
    program.main(Config, run)
