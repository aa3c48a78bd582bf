"""The pretrained model that a program runs on: its flags, and how it is loaded."""

import dataclasses
import pathlib
from typing import Literal

import jax
import tokenizers

import continuous_lm as clm
from continuous_lm.experiments.common import program
from continuous_lm.models import density


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedConfig(program.DeviceConfig):
    """Flags of the model."""

    model: str = program.flag(
        "apples",
        help="A checkpoint folder, a bundled model by its name, or org/name on the Hugging Face"
        " hub.",
    )
    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = program.flag(
        "auto",
        help="Type of the parameters and the computation. auto: as stored on an accelerator,"
        " float32 on a CPU.",
    )
    cache_dir: str | None = program.flag(
        None,
        help="Folder that keeps converted parameters for the next run.  [default: none]",
    )
    ignore_config_fields: tuple[str, ...] = program.flag(
        (), help="Fields of config.json known not to change the result."
    )

    @property
    def model_name(self) -> str:
        """The model's name, without the folders it lies in."""
        return pathlib.PurePath(self.model).name

    @property
    def is_bundled(self) -> bool:
        """Return whether it is a bundled model, which knows the small language alone."""
        return self.model in clm.bundled_models()


def load(config: PretrainedConfig) -> tuple[clm.LanguageModel, tokenizers.Tokenizer]:
    """The model, on the mesh if there is one, and its tokenizer."""
    dtype: str = config.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "stored"
    stored_lm = clm.load(
        config.model,
        dtype=None if dtype == "stored" else dtype,
        ignore_fields=config.ignore_config_fields,
        cache_dir=config.cache_dir,
        mesh=program.make_mesh(config),
    )
    lm = density.trunk_of(stored_lm)
    if lm.tokenizer is None:
        raise clm.InputError(
            f"{config.model} has no tokenizer.json, which this program needs to read its prompt"
        )
    return lm, lm.tokenizer
