"""Checkpoints of density models: the trunk's folder and two files more."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import absolute_path, write_atomically
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints import hf_folder, trunk
from continuous_lm.models.checkpoints.parameter_layout import check_parameters
from continuous_lm.models.config import TransformerConfig
from continuous_lm.models.density import heads
from continuous_lm.models.density.model import INPUT_KINDS, TRUNK, DensityModel
from continuous_lm.models.density.scoring import density_model
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.parameters import (
    ParameterTable,
    check_shapes,
    flatten,
    unflatten,
)
from continuous_lm.models.transformer import Transformer

__all__ = [
    "has_head",
    "load",
    "save",
    "trunk_of",
]

_SETTING_NAMES = {"format", "reads", "table", "contrast", "head"}


def save(
    folder: str | os.PathLike[str],
    lm: LanguageModel[DensityModel],
    *,
    shard_size: int = safetensors_files.MAX_SHARD_BYTES,
) -> None:
    """Write the model as a folder: a checkpoint of the trunk, with density.json and the head.

    `load` reads it back. The files move to the folder only when all of them are written.

    Args:
      folder: made if it is not there.
      lm: the model.
      shard_size: the most bytes of the trunk's weights in one file.

    Raises:
      InputError: if the folder cannot be written, its config.json cannot express the trunk, or `lm`
        is no density model.
    """
    model = density_model(lm)
    flat_params = flatten(
        {name: part for name, part in lm.params.items() if name != TRUNK}
    )
    check_parameters(flat_params, model.table_above_trunk())
    with write_atomically(
        folder, stale_pattern=hf_folder.MODEL_FILES
    ) as staging_folder:
        trunk.write(staging_folder, trunk_of(lm), shard_size)
        with about(hf_folder.DENSITY_FILE):
            write_json(staging_folder / hf_folder.DENSITY_FILE, _settings(model))
        _write_parameters(staging_folder / hf_folder.DENSITY_WEIGHTS_FILE, flat_params)


def trunk_of(lm: LanguageModel[Any]) -> LanguageModel[Transformer]:
    """The language model under the head; a language model is its own."""
    if isinstance(lm.model, Transformer):
        return lm
    model = density_model(lm)
    trunk_model = Transformer(
        model.config, implementation=model.implementation, remat=model.remat
    )
    return lm.with_model(trunk_model).with_params(lm.params[TRUNK])


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    ignore_fields: Sequence[str] = (),
) -> LanguageModel[DensityModel]:
    """Load a folder that `save` wrote.

    Args:
      folder: the folder.
      dtype: dtype of the trunk's parameters; as stored if omitted. The head keeps its dtype.
      mesh: devices to shard the parameters over, with axes "data" and "model".
      ignore_fields: fields of config.json that are known not to change the result.

    Raises:
      InputError: naming the file, setting or tensor that is missing, left over or wrong.
    """
    folder = absolute_path(folder)
    settings = _read_settings(folder / hf_folder.DENSITY_FILE)
    trunk_lm = trunk.read(folder, dtype=dtype, mesh=mesh, ignore_fields=ignore_fields)
    with about(str(folder / hf_folder.DENSITY_FILE)):
        model = _make_model(trunk_lm.config, settings)
    params = _read_parameters(
        folder / hf_folder.DENSITY_WEIGHTS_FILE, model.table_above_trunk(), mesh
    )
    all_params = {TRUNK: trunk_lm.params, **params}
    return trunk_lm.with_model(model).with_params(all_params)


def has_head(folder: str | os.PathLike[str], ignore_fields: Sequence[str] = ()) -> bool:
    """Return whether a folder that `save` wrote holds more than a language model.

    A token head on the trunk's own table, without blocks, adds nothing to a trunk whose logits are
    the products with that table: one with tied embeddings and no soft-cap of the logits.

    Args:
      folder: folder of the model.
      ignore_fields: fields of config.json that are known not to change the result.
    """
    folder = absolute_path(folder)
    settings_path = folder / hf_folder.DENSITY_FILE
    settings = _read_settings(settings_path)
    head = settings["head"]
    if not isinstance(head, heads.TokenHead) or not head.is_tied_without_blocks:
        return True
    fields = read_json(folder / "config.json")
    with about(str(folder / "config.json")):
        config = trunk.read_config(fields, ignore_fields)
    with about(str(settings_path)):
        return not _make_model(config, settings).is_trunks_own


# --- Settings ---------------------------------------------------------------------------------


def _settings(model: DensityModel) -> dict[str, Any]:
    return {
        "format": 1,
        "reads": model.input_kind,
        "table": model.table,
        "contrast": model.token_loss_weight,
        "head": model.head.to_dict(),
    }


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The settings in a file, with a head in place of its own; the trunk is not known yet."""
    settings = read_json(path)
    with about(str(path)):
        for name in sorted(_SETTING_NAMES ^ set(settings)):
            problem = "missing" if name in _SETTING_NAMES else "not known"
            raise InputError(f"setting {name} is {problem}")
        if settings["format"] is True or settings["format"] != 1:
            raise InputError("format is not 1, the only one that this version reads")
        if not isinstance(settings["head"], dict):
            raise InputError("head must be an object of settings")
        if settings["reads"] not in INPUT_KINDS:
            raise InputError(
                f"reads is {settings['reads']!r:.60}, not {' or '.join(INPUT_KINDS)}"
            )
        contrast = settings["contrast"]
        if type(contrast) not in (int, float) or not 0.0 <= contrast < float("inf"):
            raise InputError(
                f"contrast is {contrast!r:.60}; it must be a number, at least 0"
            )
        head = heads.from_dict(settings["head"])
        is_over_tokens = not isinstance(head, heads.TokenHead)
        if contrast and (settings["reads"] == "vectors" or not is_over_tokens):
            raise InputError("contrast is for densities over a table of tokens")
        return settings | {"head": head}


def _make_model(config: TransformerConfig, settings: dict[str, Any]) -> DensityModel:
    return DensityModel(
        config,
        settings["head"],
        input_kind=settings["reads"],
        table=settings["table"],
        token_loss_weight=settings["contrast"],
    )


# --- Parameters -------------------------------------------------------------------------------


def _write_parameters(path: pathlib.Path, flat_params: dict[str, Any]) -> None:
    """Write parameters under their paths, in the dtype that holds all of them."""
    dtypes = [array.dtype for array in flat_params.values()] or [np.float32]
    safetensors_files.save_file(
        path,
        {name: tuple(np.shape(array)) for name, array in flat_params.items()},
        np.dtype(jnp.result_type(*dtypes)),
        lambda name: np.asarray(flat_params[name]),
    )


def _read_parameters(
    path: pathlib.Path, table: ParameterTable, mesh: Mesh | None
) -> dict[str, Any]:
    """The tree of parameters in a file, checked against their table."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    tensors = safetensors_files.Tensors()
    tensors.add(path)
    with about(str(path)):
        # Shapes alone: a tensor is read when all of them are known to fit.
        shapes = {
            name: jax.ShapeDtypeStruct(tensors.shape(name), jnp.float32)
            for name in tensors.names
        }
        check_shapes(shapes, table)
    flat_params = {}
    for name, (axes, shape, _) in table.items():
        sharding = None if mesh is None else axes_lib.sharding(mesh, axes, shape)
        flat_params[name] = jax.device_put(np.array(tensors[name]), sharding)
    return unflatten(flat_params)
