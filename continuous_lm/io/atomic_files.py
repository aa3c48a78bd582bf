"""Files that are read with suspicion and written aside, then renamed."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import stat
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
        check_regular(path)
        with open(path, encoding="utf-8") as file:
            values = json.load(file, parse_constant=refuse, object_pairs_hook=named_once)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold one JSON object, not a {type(values).__name__}")
    return values


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, in which no name may stand twice (readers differ about which)."""
    values = dict(pairs)
    if len(values) < len(pairs):
        left = dict.fromkeys(values, 1)
        twice = next(name for name, _ in pairs if left.pop(name, None) is None)
        raise ValueError(f"{twice!r:.60} stands there twice")
    return values


def as_path(folder: str | os.PathLike) -> pathlib.Path:
    """The absolute path.

    Raises:
      InputError: if no file can have that name.
    """
    try:
        path = pathlib.Path(folder).absolute()
        if b"\0" not in os.fsencode(path):
            return path
    except (TypeError, UnicodeEncodeError):
        pass
    raise InputError(f"{folder!r:.200} is not a path that a folder can have")


def check_regular(path: pathlib.Path) -> None:
    """Refuses to open a pipe or a device, which would be waited for without an end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "Not a file")


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read; NaN and infinity are refused."""
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except ValueError as error:
        raise InputError(f"what is to be written holds NaN or infinity ({error})") from None
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_aside(
    folder: str | os.PathLike, replaces: re.Pattern[str] | None = None
) -> Iterator[pathlib.Path]:
    """A new folder to write into, whose files reach `folder` only when all of them are written.

    A `folder` that is not there yet appears in one rename. In one that is, files of the same names
    are replaced by one rename each, and then those whose whole name `replaces` matches and that are
    not among the new ones are removed. On an exception nothing has changed.

    Raises:
      InputError: if the folder cannot be made or written.
    """
    folder = as_path(folder)
    aside = None
    try:
        existing = _existing(folder)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=existing))
        aside.chmod(0o777 & ~_umask())
        yield aside
        for path in aside.iterdir():  # some writers keep their files to themselves
            path.chmod(0o666 & ~_umask())
        if folder.exists():
            written = sorted(path.name for path in aside.iterdir())
            stale = [
                path.name
                for path in sorted(folder.iterdir())
                if replaces and replaces.fullmatch(path.name) and path.name not in written
            ]
            for name in (*written, *stale):
                if (folder / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
            for name in written:
                os.replace(aside / name, folder / name)
            for name in stale:
                (folder / name).unlink(missing_ok=True)
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


@contextlib.contextmanager
def replaced_whole(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A new folder to write into, which takes the place of `folder`, sub-folders and all.

    What was there goes. Of several processes that do this at once, one wins. On an exception
    nothing has changed.

    Raises:
      InputError: if the folder cannot be made or written.
    """
    folder = as_path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".writing-", dir=folder.parent, ignore_cleanup_errors=True
        ) as beside:
            new = pathlib.Path(beside, "new")
            new.mkdir()
            yield new
            with contextlib.suppress(FileNotFoundError):  # never there, or another was faster
                os.rename(folder, pathlib.Path(beside, "old"))
            try:
                os.rename(new, folder)
            except OSError:
                if not folder.is_dir():  # another was faster
                    raise
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error


def check_writable(folder: str | os.PathLike) -> None:
    """Refuses a folder that could not be written, before any work is done for it."""
    folder = as_path(folder)
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
