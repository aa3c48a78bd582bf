"""Checkpoints of density models: the trunk's folder and two files more."""

import os
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from continuous_lm import axes as axes_lib
from continuous_lm.errors import InputError, about
from continuous_lm.io import safetensors_files
from continuous_lm.io.atomic_files import as_path, written_aside
from continuous_lm.io.json_files import read_json, write_json
from continuous_lm.models import language_model
from continuous_lm.models.checkpoints.parameter_layout import check_tree
from continuous_lm.models.density import heads
from continuous_lm.models.density.model import _TRUNK, DensityLM, DensityModel, _boxes, _shape
from continuous_lm.models.language_model import LanguageModel

_SETTINGS, _WEIGHTS = "density.json", "density.safetensors"


def save(folder: str | os.PathLike, lm: DensityLM) -> None:
    """Writes the model as a folder: a checkpoint of the trunk, and beside it what is above.

    `load` reads it back; `clm.load` reads the trunk alone. The files reach the folder when all of
    them are written, not before.

    Raises:
      InputError: if the folder cannot be written, or its config.json cannot express the trunk.
    """
    model, params = lm.model, dict(lm.params)
    trunk = LanguageModel(model.config, params.pop(_TRUNK), lm.tokenizer, lm.notes)
    above = traverse_util.flatten_dict(params, sep="/")
    check_tree(above, _boxes(model))
    settings = {
        "format": 1,
        "reads": model.reads,
        "table": model.table,
        "contrast": model.contrast,
        "head": heads.to_dict(model.head),
    }
    with written_aside(folder, replaces=safetensors_files.FILES) as aside:
        language_model.write(aside, trunk)
        with about(_SETTINGS):
            write_json(aside / _SETTINGS, settings)
        safetensors_files.save_file(
            aside / _WEIGHTS,
            {path: tuple(np.shape(value)) for path, value in above.items()},
            np.dtype(jnp.result_type(*above.values()) if above else np.float32),
            lambda path: np.asarray(above[path]),
        )


def load(
    folder: str | os.PathLike, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> DensityLM:
    """Reads what `save` wrote.

    Args:
      folder: to read from.
      dtype: of the trunk's parameters; as stored if left out. The head's stay as they are.
      mesh: devices to shard the parameters over, with axes "data" and "model".

    Raises:
      InputError: naming the file, setting or tensor that is missing, left over or wrong.
    """
    folder = as_path(folder)
    settings = read_json(folder / _SETTINGS)
    with about(str(folder / _SETTINGS)):
        known = {"format", "reads", "table", "contrast", "head"}
        for name in sorted(known ^ set(settings)):
            raise InputError(f"setting {name} is {'missing' if name in known else 'not known'}")
        if settings["format"] is True or settings.pop("format") != 1:
            raise InputError("format is not 1, the only one that this version reads")
        if not isinstance(settings["head"], dict):
            raise InputError("head must be an object of settings")
        if type(settings["contrast"]) not in (int, float):
            raise InputError(f"contrast is {settings['contrast']!r:.60}; it must be a number")
        head = heads.from_dict(settings.pop("head"))
    trunk = language_model.load(folder, dtype=dtype, mesh=mesh)
    with about(str(folder / _SETTINGS)):
        model = DensityModel(trunk.config, head, **settings)
    boxes, tensors = _boxes(model), safetensors_files.Tensors()
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{folder / _WEIGHTS} is missing")
    tensors.add(folder / _WEIGHTS)
    with about(str(folder / _WEIGHTS)):
        check_tree({path: _shape(tensors.shape(path)) for path in tensors.names}, boxes)
    above: dict[str, Any] = {}
    for path, box in boxes.items():
        place = mesh and axes_lib.sharding(mesh, cast(Any, box.names), box.value.shape)
        above[path] = jax.device_put(np.array(tensors[path]), place)
    params = {_TRUNK: trunk.params, **traverse_util.unflatten_dict(above, sep="/")}
    return DensityLM(model, params, trunk.tokenizer, trunk.notes)
