"""Files that are read with suspicion and written aside, then renamed."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from continuous_lm.errors import InputError


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      InputError: if the file is missing or does not hold one JSON object of finite numbers.
    """

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file, parse_constant=refuse)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold one JSON object, not a {type(values).__name__}")
    return values


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read; NaN and infinity are refused."""
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_aside(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A new folder to write into, whose files reach `folder` only when all of them are written.

    A `folder` that is not there yet appears in one rename. In one that is, files of the same names
    are replaced by one rename each. On an exception nothing has changed.

    Raises:
      InputError: if the folder cannot be made or written.
    """
    folder = pathlib.Path(folder).absolute()
    aside = None
    try:
        existing = _existing(folder)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=existing))
        aside.chmod(0o777 & ~_umask())
        yield aside
        for path in aside.iterdir():  # some writers keep their files to themselves
            path.chmod(0o666 & ~_umask())
        if folder.exists():
            for path in sorted(aside.iterdir()):
                if (folder / path.name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{path.name} is a folder there")
            for path in sorted(aside.iterdir()):
                os.replace(path, folder / path.name)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(aside, folder)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def check_writable(folder: str | os.PathLike) -> None:
    """Refuses a folder that could not be written, before any work is done for it."""
    folder = pathlib.Path(folder).absolute()
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest above it that is there (a link that leads nowhere is there)."""
    for path in (folder, *folder.parents):
        try:
            path.lstat()
            return path
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise AssertionError("the root is always there")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
