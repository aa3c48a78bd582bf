"""Fields of a config.json, each read once, and those that have no effect."""

from collections.abc import Mapping
from typing import Any, overload

import numpy as np

from continuous_lm.errors import InputError

__all__ = [
    "INERT_FIELDS",
    "MAX_LAYERS",
    "REQUIRED",
    "ConfigFields",
]

REQUIRED: Any = object()
MAX_LAYERS = 1_000  # more is a mistake, and would cost time and memory before it shows

# Fields that do not change the output of a causal model at inference.
INERT_FIELDS = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_dropout
    attention_probs_dropout_prob attn_pdrop auto_map bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range
    is_decoder is_encoder_decoder label2id max_position_embeddings model_type n_ctx n_special
    output_attentions output_hidden_states output_past pad_token_id predict_special_tokens
    pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop return_dict
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params torch_dtype transformers_version unk_token_id
    use_cache
    _commit_hash decoder_start_token_id do_sample finetuning_task max_length min_length num_beams
    repetition_penalty sep_token_id temperature tokenizer_class top_k top_p
    """.split()
)


class ConfigFields:
    """The fields of a config.json: each is read with its type checked, and none is passed over."""

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values, self._prefix, self._read_names = dict(values), prefix, set[str]()

    def get(self, name: str, default: Any = REQUIRED) -> object:
        """The value; the default if it is absent or null."""
        self._read_names.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise InputError(f"field {self._prefix}{name} is missing")
        return default

    def __contains__(self, name: str) -> bool:
        """Return whether config.json has the field, even as null."""
        return name in self._values

    def integer(
        self, name: str, default: Any = REQUIRED, maximum: int = 2**31 - 1
    ) -> int:
        return self._get_typed(
            name,
            default,
            int,
            f"an integer from 1 to {maximum}",
            lambda v: 0 < v <= maximum,
        )

    @overload
    def number(self, name: str, default: float = REQUIRED) -> float: ...
    @overload
    def number(self, name: str, default: None) -> float | None: ...

    def number(self, name: str, default: float | None = REQUIRED) -> float | None:
        return self._get_typed(
            name,
            default,
            (int, float),
            "a positive number",
            _is_positive,
        )

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        return self._get_typed(name, default, bool, "true or false")

    def text(self, name: str, default: Any = REQUIRED) -> str:
        return self._get_typed(name, default, str, "a string")

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        values = self._get_typed(
            name, REQUIRED, list, "a list of positive numbers", _are_positive
        )
        return tuple(map(float, values))

    def nested(self, name: str) -> "ConfigFields | None":
        """The fields of an object inside, or None if there is none."""
        value = self._get_typed(name, None, dict, "an object")
        return None if value is None else ConfigFields(value, f"{self._prefix}{name}.")

    def must_be(self, name: str, *allowed: Any) -> None:
        """Raise InputError unless a field has one of the supported values."""
        value = self.get(name, allowed[0])
        if not any(
            value == option and isinstance(value, bool) == isinstance(option, bool)
            for option in allowed
        ):
            raise InputError(
                f"field {self._prefix}{name} is {value!r:.60}, which is not handled;"
                f" only {', '.join(map(repr, allowed))}"
            )

    def check_equal(
        self, name: str, value: Any, other_name: str, other_value: Any
    ) -> None:
        """Raise InputError if two fields with the same meaning differ; None is no value."""
        if value is not None and other_value is not None and value != other_value:
            raise InputError(
                f"fields {other_name} ({other_value!r:.60}) and {self._prefix}{name}"
                f" ({value!r:.60}) differ"
            )

    def check_all_read(self, ignore: tuple[str, ...] = ()) -> None:
        """Raise InputError for the first unread field that may change the model's output."""
        for name, value in self._values.items():
            if (
                name not in self._read_names | INERT_FIELDS | set(ignore)
                and value is not None
            ):
                raise InputError(
                    f"field {self._prefix}{_printable_name(name)} ({value!r:.60}) is not handled"
                    " and may change the result; if it does not, name it in ignore_fields"
                )

    def _get_typed(self, name, default, types, expected, is_valid=lambda v: True):
        value = self.get(name, default)
        if value is default:
            return value
        if (
            not isinstance(value, types)
            or (isinstance(value, bool) and types is not bool)
            or not is_valid(value)
        ):
            raise InputError(
                f"field {self._prefix}{name} is {value!r:.60}; it must be {expected}"
            )
        return value


def _is_positive(value: int | float) -> bool:
    """Return whether a number is positive and finite in float32 too."""
    limits = np.finfo(np.float32)
    return float(limits.tiny) <= value <= float(limits.max)


def _are_positive(values: list) -> bool:
    return all(
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and _is_positive(value)
        for value in values
    )


def _printable_name(name: str) -> str:
    """A field's name as it can stand in one line."""
    return name if name.isprintable() and len(name) <= 60 else f"{name!a:.60}"
