"""Checkpoints of density models: the trunk's folder and two files more."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import absolute_path, write_atomically
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models.checkpoints import trunk
from continuous_lm.models.checkpoints.parameter_layout import check_parameters
from continuous_lm.models.density import heads
from continuous_lm.models.density.model import (
    _TRUNK_KEY,
    INPUT_KINDS,
    DensityLM,
    DensityModel,
    _declarations_above_trunk,
    _shape_struct,
)
from continuous_lm.models.language_model import LanguageModel
from continuous_lm.models.transformer import Transformer

_SETTINGS_FILE, _WEIGHTS_FILE = "density.json", "density.safetensors"


def save(folder: str | os.PathLike, lm: DensityLM) -> None:
    """Writes the model as a folder: a checkpoint of the trunk, and beside it what is above.

    `load` reads it back; `clm.load` reads the trunk alone. The files reach the folder when all of
    them are written, not before.

    Raises:
      InputError: if the folder cannot be written, or its config.json cannot express the trunk.
    """
    model, params = lm.model, dict(lm.params)
    trunk_lm = LanguageModel(
        Transformer(model.config), params.pop(_TRUNK_KEY), lm.tokenizer, lm.hf_fields
    )
    params_above_trunk = traverse_util.flatten_dict(params, sep="/")
    check_parameters(params_above_trunk, _declarations_above_trunk(model))
    settings = {
        "format": 1,
        "reads": model.input_kind,
        "table": model.table,
        "contrast": model.token_loss_weight,
        "head": heads.to_dict(model.head),
    }
    with write_atomically(
        folder, stale_pattern=safetensors_files.CHECKPOINT_FILES
    ) as staging_folder:
        trunk.write(staging_folder, trunk_lm)
        with about(_SETTINGS_FILE):
            write_json(staging_folder / _SETTINGS_FILE, settings)
        safetensors_files.save_file(
            staging_folder / _WEIGHTS_FILE,
            {
                path: tuple(np.shape(value))
                for path, value in params_above_trunk.items()
            },
            np.dtype(
                jnp.result_type(*params_above_trunk.values())
                if params_above_trunk
                else np.float32
            ),
            lambda path: np.asarray(params_above_trunk[path]),
        )


def load(
    folder: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> DensityLM:
    """Reads what `save` wrote.

    Args:
      folder: to read from.
      dtype: of the trunk's parameters; as stored if left out. The head's stay as they are.
      mesh: devices to shard the parameters over, with axes "data" and "model".

    Raises:
      InputError: naming the file, setting or tensor that is missing, left over or wrong.
    """
    folder = absolute_path(folder)
    settings = read_json(folder / _SETTINGS_FILE)
    with about(str(folder / _SETTINGS_FILE)):
        setting_names = {"format", "reads", "table", "contrast", "head"}
        for name in sorted(setting_names ^ set(settings)):
            raise InputError(
                f"setting {name} is {'missing' if name in setting_names else 'not known'}"
            )
        if settings["format"] is True or settings.pop("format") != 1:
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
        head = heads.from_dict(settings.pop("head"))
        if contrast and (
            settings["reads"] == "vectors" or isinstance(head, heads.TokenHead)
        ):
            raise InputError("contrast is for densities over a table of tokens")
    trunk_lm = trunk.read(folder, dtype=dtype, mesh=mesh)
    with about(str(folder / _SETTINGS_FILE)):
        model = DensityModel(
            trunk_lm.config,
            head,
            input_kind=settings["reads"],
            table=settings["table"],
            token_loss_weight=settings["contrast"],
        )
    declarations, tensors = (
        _declarations_above_trunk(model),
        safetensors_files.Tensors(),
    )
    if not (folder / _WEIGHTS_FILE).is_file():
        raise InputError(f"{folder / _WEIGHTS_FILE} is missing")
    tensors.add(folder / _WEIGHTS_FILE)
    with about(str(folder / _WEIGHTS_FILE)):
        check_parameters(
            {path: _shape_struct(tensors.shape(path)) for path in tensors.names},
            declarations,
        )
    params_above_trunk: dict[str, Any] = {}
    for path, declaration in declarations.items():
        array_sharding = mesh and axes_lib.sharding(
            mesh, declaration.axes, declaration.shape
        )
        params_above_trunk[path] = jax.device_put(
            np.array(tensors[path]), array_sharding
        )
    params = {
        _TRUNK_KEY: trunk_lm.params,
        **traverse_util.unflatten_dict(params_above_trunk, sep="/"),
    }
    return DensityLM(model, params, trunk_lm.tokenizer, trunk_lm.hf_fields)
