"""Text to train on: what every Python carries, or any files; its split, its tokenizer, its tokens.

The default text is the reference that Python's `help()` reads (pydoc_data.topics) and the
docstrings of the standard library, which are read from the source files: nothing is imported. It
differs from one Python to the next, so its size and checksum go with it.

A document is a text of its own: a help topic, a module's docstrings, a file. An end-of-text token
follows each, so that a model learns where one ends.
"""

import ast
import bisect
import hashlib
import inspect
import itertools
import pathlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from continuous_lm.errors import InputError

END_OF_TEXT = "<|endoftext|>"
# What other tokenizers call it, and the beginning that some have instead.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<bos>", "<s>")
# Not English (tables, code to be translated), not documentation, or not Python's own.
_SKIPPED = frozenset(
    "__pycache__ dist-packages encodings ensurepip idlelib idle_test lib2to3 pydoc_data"
    " site-packages test tests turtledemo".split()
)
_AT_ONCE = 64  # documents encoded together: their encodings take many times their own memory


class Text(NamedTuple):
    """Documents, and what a report says of them."""

    documents: tuple[str, ...]
    source: str  # where they are from
    size: int  # bytes of UTF-8
    sha256: str  # of the documents, each followed by a zero byte


def _text(documents: Sequence[str], source: str) -> Text:
    content = [document.encode() for document in documents]
    digest = hashlib.sha256(b"".join(part + b"\0" for part in content))
    return Text(tuple(documents), source, sum(map(len, content)), digest.hexdigest())


# --- What every Python carries --------------------------------------------------------------------


def default_text(library: pathlib.Path | None = None) -> Text:
    """The help topics and docstrings of this Python, each of them once.

    Args:
      library: the folder of the standard library's modules; this Python's if left out.

    Raises:
      InputError: if it has no source files to read them from.
    """
    library = library or pathlib.Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    modules = [
        path
        for path in library.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(library).parts)
    ]
    modules.sort(key=lambda path: path.relative_to(library).parts)
    seen: set[str] = set()
    documents = [
        *([topic] for topic in (_topics(topics) if topics.is_file() else ())),
        *map(_docstrings, modules),
    ]
    # dict.fromkeys: what one document says twice, such as the docstrings of overloads.
    kept = []
    for pieces in documents:
        tidy = dict.fromkeys(inspect.cleandoc(piece).replace("\r\n", "\n") for piece in pieces)
        new = [piece for piece in tidy if piece and piece not in seen]
        seen.update(new)
        if new:
            kept.append("\n\n".join(new) + "\n")
    if not kept:
        raise InputError(f"{library} has no Python source files to read text from; give --data")
    return _text(kept, f"documentation of Python {platform.python_version()}")


def _parsed(path: pathlib.Path) -> ast.Module:
    """The syntax tree of a source file; an empty one if it is no Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _topics(path: pathlib.Path) -> list[str]:
    """The values of the one dictionary in pydoc_data/topics.py, in the order of their names."""
    for node in _parsed(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name] for name in sorted(topics)]
    return []


def _docstrings(path: pathlib.Path) -> list[str]:
    """The docstrings of a module, its classes and its functions, in their order in the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(_parsed(path)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    # A lone surrogate can stand in a string, and not in a text.
    return [text.encode(errors="ignore").decode() for text in found if text]


# --- Files ----------------------------------------------------------------------------------------


def read_text(files: Sequence[str]) -> Text:
    """The text files of `files`, each a document. A byte order mark goes, a line's end is LF.

    Raises:
      InputError: if there is none, or one is missing, a folder, empty or not UTF-8.
    """
    if not files:
        raise InputError("no text files are given")
    documents = [_read(pathlib.Path(file)) for file in files]
    return _text(documents, ", ".join(pathlib.Path(file).name for file in files))


def _read(path: pathlib.Path) -> str:
    if path.is_dir():
        raise InputError(
            f"{path} is a folder, of which it is not clear what is text and in which order; name"
            " the files in it"
        )
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {getattr(error, 'strerror', error) or error}"
        ) from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}"
            f" ({error.reason})"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


# --- The split ------------------------------------------------------------------------------------


def split(
    documents: Sequence[str], *, every: int = 20, characters: int = 10_000
) -> tuple[list[str], list[str]]:
    """Documents to train on, and those held out: every so many-th block of contiguous text.

    A block is about `characters` long and ends where a line ends. Blocks that are neighbours in a
    document stay together, so that a document to train on is cut only where something was held out.

    Args:
      documents: texts.
      every: of so many blocks one is held out, the middle one first.
      characters: of a block; less where a text is too short to hold one out.

    Returns:
      Training documents and held-out ones; together they are the text, each part once.

    Raises:
      InputError: if the text is too short to be parted.
    """
    total = sum(map(len, documents))
    characters = max(1, min(characters, total // every))
    parts: tuple[list[str], list[str]] = ([], [])
    count = 0
    for document in documents:
        joined: list[tuple[bool, str]] = []
        for block in _blocks(document, characters):
            joined.append((count % every == every // 2, block))
            count += 1
        for held, group in itertools.groupby(joined, key=lambda pair: pair[0]):
            parts[held].append("".join(block for _, block in group))
    if not all(parts):
        raise InputError(f"a text of {total} characters is too short to hold out a part of it")
    return parts


def _blocks(document: str, characters: int) -> Iterator[str]:
    """The document in blocks of at least `characters` and less than twice as many."""
    ends = [i + 1 for i, character in enumerate(document) if character == "\n"]
    begin = 0
    while len(document) - begin >= 2 * characters:
        index = bisect.bisect_left(ends, begin + characters)
        line = ends[index] if index < len(ends) else len(document)
        end = line if line < begin + 2 * characters else begin + characters
        yield document[begin:end]
        begin = end
    if begin < len(document):
        yield document[begin:]


# --- The tokenizer --------------------------------------------------------------------------------


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer (Sennrich et al., arXiv:1508.07909) of the documents.

    Its tokens are the end of text (id 0), the 256 bytes and merges of them: it spells any text, and
    decoding gives the same text back.

    Raises:
      InputError: if the size is below 257, or the text has not enough to merge.
    """
    if vocab_size < 257:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and the end of text take 257"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"the text is too short for a vocabulary of {vocab_size}: it makes one of"
            f" {tokenizer.get_vocab_size()}"
        )
    return tokenizer


def check_tokenizer(tokenizer: tokenizers.Tokenizer, vocab_size: int, name: str) -> None:
    """Refuses a tokenizer with tokens that a model of `vocab_size` rows does not know.

    Args:
      tokenizer: the tokenizer.
      vocab_size: of the checkpoint; it may have more rows than there are tokens, as many pad them.
      name: of the checkpoint, for the message.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer has tokens up to id {largest} and so does not fit {name}, which has a"
            f" vocabulary of {vocab_size}; give the tokenizer that it was trained with"
        )


def end_of_text(tokenizer: tokenizers.Tokenizer) -> int:
    """The id of the token that stands between documents.

    Raises:
      InputError: if the tokenizer has none of the names that are usual.
    """
    for name in _ENDS:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise InputError(
        f"the tokenizer has no token that ends a text; of {', '.join(_ENDS)} one is needed"
    )


def encode(tokenizer: tokenizers.Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """The tokens of the documents, an end-of-text token after each: int32 [n].

    Text that looks like a special token is spelled out, as any other.

    Raises:
      InputError: if the tokenizer has no end of text, or cannot encode a text.
    """
    end = [end_of_text(tokenizer)]
    parts: list[list[int]] = []
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        for first in range(0, len(documents), _AT_ONCE):
            some = list(documents[first : first + _AT_ONCE])
            for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
                parts += [encoding.ids, end]
    except Exception as error:  # the library raises bare Exception
        line = " ".join(str(error).split())
        raise InputError(f"the tokenizer cannot encode the text ({line:.200})") from None
    finally:
        tokenizer.encode_special_tokens = before
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids in parts)])
