"""Files that are read with suspicion and written aside, then renamed."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator

from continuous_lm.errors import InputError

__all__ = [
    "absolute_path",
    "check_regular_file",
    "check_writable",
    "replace_atomically",
    "write_atomically",
]


def absolute_path(folder: str | os.PathLike[str]) -> pathlib.Path:
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


def check_regular_file(path: pathlib.Path) -> None:
    """Raise InputError for a pipe or a device, which could block forever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "Not a file")


@contextlib.contextmanager
def write_atomically(
    folder: str | os.PathLike[str], stale_pattern: re.Pattern[str] | None = None
) -> Iterator[pathlib.Path]:
    """A new folder to write into, whose files reach `folder` only when all of them are written.

    A new `folder` appears in one rename. In an existing folder, each file of the same name is
    replaced by one rename. Then other files whose whole name matches `stale_pattern` are removed.
    On an exception nothing has changed.

    Raises:
      InputError: if the folder cannot be made or written.
    """
    folder = absolute_path(folder)
    staging_folder = None
    try:
        existing_folder = _nearest_existing(folder)
        staging_folder = pathlib.Path(
            tempfile.mkdtemp(prefix=".writing-", dir=existing_folder)
        )
        staging_folder.chmod(0o777 & ~_umask())
        yield staging_folder
        for (
            path
        ) in staging_folder.iterdir():  # some writers keep their files to themselves
            path.chmod(0o666 & ~_umask())
        if folder.exists():
            new_names = sorted(path.name for path in staging_folder.iterdir())
            stale_names = [
                path.name
                for path in sorted(folder.iterdir())
                if stale_pattern
                and stale_pattern.fullmatch(path.name)
                and path.name not in new_names
            ]
            for name in (*new_names, *stale_names):
                if (folder / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there")
            for name in new_names:
                (staging_folder / name).replace(folder / name)
            for name in stale_names:
                (folder / name).unlink(missing_ok=True)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging_folder.rename(folder)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error
    finally:
        if staging_folder is not None:
            shutil.rmtree(staging_folder, ignore_errors=True)


@contextlib.contextmanager
def replace_atomically(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A new folder to write into, which takes the place of `folder`, sub-folders and all.

    The old contents are removed. If several processes do this simultaneously, one of them wins. On
    an exception nothing has changed.

    Raises:
      InputError: if the folder cannot be made or written.
    """
    folder = absolute_path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".writing-", dir=folder.parent, ignore_cleanup_errors=True
        ) as staging_folder:
            new_folder = pathlib.Path(staging_folder, "new")
            new_folder.mkdir()
            yield new_folder
            with contextlib.suppress(
                FileNotFoundError
            ):  # never there, or another was faster
                folder.rename(pathlib.Path(staging_folder, "old"))
            try:
                new_folder.rename(folder)
            except OSError:
                if not folder.is_dir():  # another was faster
                    raise
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise InputError, before any work, for a folder that cannot be written."""
    folder = absolute_path(folder)
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(folder)):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error


def _nearest_existing(folder: pathlib.Path) -> pathlib.Path:
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
