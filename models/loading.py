"""`load` and `save`: folders to language models of every kind, and back."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm.errors import InputError
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import write_atomically
from continuous_lm.io.json_files import read_json
from continuous_lm.models.checkpoints import hf_folder, trunk
from continuous_lm.models.families.registry import FAMILIES
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.transformer import Transformer

__all__ = [
    "load",
    "save",
]


def load(
    folder_or_name: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
    cache_dir: str | os.PathLike[str] | None = None,
) -> LanguageModel[Any]:
    """Load a checkpoint folder in the Hugging Face layout, a bundled model, or one of the hub.

    The files of the folder decide the kind of the model. It is a trunk with its softmax, a density
    model, a next-vector model with its autoencoder, or an autoencoder. `density.trunk_of` returns
    the trunk of a density model. `calm.load` takes an autoencoder from a separate folder. A density
    model with a tied token head, which adds nothing to its trunk, loads as a trunk; `density.load`
    loads it with its head.

    Each parameter is read once, cast, and placed on its devices; there is never a second copy of
    the model in memory. On many hosts, each host reads only the parts of its own devices.

    Args:
      folder_or_name: a folder with config.json, model.safetensors (or shards with their index) and
        optionally tokenizer.json. Or the name of a bundled model, such as "apples". Or "org/name"
        or "org/name@revision" on the Hugging Face hub, which needs the extra `hub`.
      dtype: dtype of the parameters and of the computation; config.json's dtype if omitted.
      mesh: devices to shard the parameters over, with axes "data" and "model" (see
        `axes.SHARDING_RULES`); all on the default device if omitted.
      ignore_fields: fields of config.json that are known not to change the result.
      cache_dir: folder for the converted parameters of a trunk, for later calls; not stored if
        omitted. They are converted again when the folder's files have changed.

    Raises:
      InputError: naming the file, field or tensor that is missing, left over or not handled.
    """
    folder = hf_folder.find_folder(folder_or_name)
    hf_folder.check_mesh(mesh)
    load_other_kind = _loader_of_other_kind(folder, ignore_fields)
    if load_other_kind is None:
        return trunk.read(
            folder,
            dtype=dtype,
            mesh=mesh,
            ignore_fields=ignore_fields,
            cache_dir=cache_dir,
        )
    if cache_dir is not None:
        raise InputError(f"{folder} holds no trunk alone; leave out cache_dir")
    return load_other_kind(folder, dtype=dtype, mesh=mesh, ignore_fields=ignore_fields)


class _Loader(Protocol):
    """Reads a folder of one kind."""

    def __call__(
        self,
        folder: pathlib.Path,
        *,
        dtype: DTypeLike | None,
        mesh: Mesh | None,
        ignore_fields: Sequence[str],
    ) -> LanguageModel[Any]: ...


def _loader_of_other_kind(
    folder: pathlib.Path, ignore_fields: Sequence[str]
) -> _Loader | None:
    """The function that reads the folder, if it is not of a trunk."""
    # Other kinds are imported where they are needed.
    if (folder / hf_folder.DENSITY_FILE).is_file():
        from continuous_lm.models import density

        return density.load if density.has_head(folder, ignore_fields) else None
    fields = read_json(folder / "config.json")
    if fields.get("model_type") in tuple(FAMILIES):
        return None
    from continuous_lm.models import calm

    if calm.autoencoder.is_config(fields):
        return calm.autoencoder.load
    return calm.load if calm.is_config(fields) else None


def save(
    folder: str | os.PathLike[str],
    lm: LanguageModel[Any],
    *,
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
) -> None:
    """Write `lm`, of any kind, as a checkpoint folder that `load` reads, in its dtype.

    The files reach the folder when all of them are written, not before; weights and a tokenizer
    that were there are then gone. Parameters are fetched from their devices tensor by tensor.

    Args:
      folder: made if it is not there.
      lm: the model.
      shard_size: the most bytes of weights in one file; a model that is larger becomes several
        files with an index.

    Raises:
      InputError: if the folder cannot be written, or the family's config.json cannot express the
        model.
    """
    if not isinstance(lm, LanguageModel):
        raise InputError(
            f"lm is a {type(lm).__name__}; only a LanguageModel can be saved"
        )
    if not isinstance(lm.model, Transformer):
        _save_other_kind(folder, lm, shard_size)
        return
    with write_atomically(
        folder, stale_pattern=hf_folder.MODEL_FILES
    ) as staging_folder:
        trunk.write(staging_folder, lm, shard_size)


def _save_other_kind(
    folder: str | os.PathLike[str], lm: LanguageModel[Any], shard_size: int
) -> None:
    """Save a model that is not a trunk."""
    from continuous_lm.models import calm, density  # only where they are needed

    if isinstance(lm.model, density.DensityModel):
        density.save(folder, lm, shard_size=shard_size)
    elif isinstance(lm.model, calm.Autoencoder):
        calm.autoencoder.save(folder, lm, shard_size=shard_size)
    elif isinstance(lm.model, calm.NextVectorModel):
        calm.save(folder, lm, shard_size=shard_size)
    else:
        raise InputError(
            f"lm holds a {type(lm.model).__name__}, which has no layout of checkpoints"
        )
