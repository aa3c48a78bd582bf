"""The exception for invalid arguments, files and flags."""

import contextlib
from collections.abc import Iterator

__all__ = [
    "InputError",
    "about",
]


class InputError(ValueError):
    """A checkpoint, configuration, prompt, array or flag that cannot be used.

    The message is one line that names the culprit and the remedy. Programs print it and exit. Any
    other exception is a defect of this package and keeps its traceback. Unprintable characters, for
    example in the name of a tensor, are escaped.
    """

    def __init__(self, message: str) -> None:
        printable = (c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__("".join(printable))


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """Prefix every `InputError` raised inside with `subject`, the place of the problem."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{subject}: {error}") from error
