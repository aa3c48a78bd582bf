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
