"""JSON files: objects whose keys occur once."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from continuous_lm.errors import InputError
from continuous_lm.io.atomic_files import check_regular_file

__all__ = [
    "read_json",
    "reject_duplicate_names",
    "write_json",
]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      InputError: if the file is missing or does not hold one JSON object of finite numbers.
    """

    def refuse_constant(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        check_regular_file(path)
        with path.open(encoding="utf-8") as file:
            values = json.load(
                file,
                parse_constant=refuse_constant,
                object_pairs_hook=reject_duplicate_names,
            )
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(
            f"{path} must hold one JSON object, not a {type(values).__name__}"
        )
    return values


def reject_duplicate_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, in which no name may stand twice (readers differ about which)."""
    values = dict(pairs)
    if len(values) < len(pairs):
        remaining = dict.fromkeys(values, 1)
        duplicate = next(name for name, _ in pairs if remaining.pop(name, None) is None)
        raise ValueError(f"{duplicate!r:.60} stands there twice")
    return values


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read; NaN and infinity are refused."""
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except ValueError as error:
        raise InputError(
            f"the values to write contain NaN or infinity ({error})"
        ) from None
    path.write_text(text + "\n", encoding="utf-8")
