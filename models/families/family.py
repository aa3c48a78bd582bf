"""A model family: how its config.json is read and written, and its tensor table."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from continuous_lm.models.checkpoints.config_fields import ConfigFields
from continuous_lm.models.checkpoints.tensor_table import StoredTensor
from continuous_lm.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
      read_config: from the fields of its config.json.
      write_config: to the fields of its config.json, model_type and dtype aside.
      tensors: parameter path ("layers/attention/q") -> where it is stored.
      architecture: the name that Hugging Face gives to its causal model.
      tensor_prefix: prefix of the tensors' names; checkpoints saved without a head omit it.
      ignored_tensors: regular expressions of tensors that hold nothing to load.
    """

    read_config: Callable[[ConfigFields], TransformerConfig]
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    tensors: Mapping[str, StoredTensor]
    architecture: str
    tensor_prefix: str = "model."
    ignored_tensors: tuple[str, ...] = ()
