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
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<bos>",
    "<s>",
)
# Not English (tables, code to be translated), not documentation, or not Python's own.
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ dist-packages encodings ensurepip idlelib idle_test lib2to3 pydoc_data"
    " site-packages test tests turtledemo".split()
)
_DOCUMENTS_PER_BATCH = (
    64  # documents encoded together: their encodings take many times their own memory
)


class SourceText(NamedTuple):
    """Documents, and their description for reports."""

    documents: tuple[str, ...]
    source: str  # where they are from
    num_bytes: int  # bytes of UTF-8
    sha256: str  # of the documents, each followed by a zero byte


def _make_source_text(documents: Sequence[str], source: str) -> SourceText:
    encoded = [document.encode() for document in documents]
    digest = hashlib.sha256(
        b"".join(encoded_document + b"\0" for encoded_document in encoded)
    )
    return SourceText(
        tuple(documents), source, sum(map(len, encoded)), digest.hexdigest()
    )


# --- What every Python carries --------------------------------------------------------------------


def default_text(library_folder: pathlib.Path | None = None) -> SourceText:
    """The help topics and docstrings of this Python, each of them once.

    Args:
      library_folder: the folder of the standard library's modules; this Python's if omitted.

    Raises:
      InputError: if it has no source files to read them from.
    """
    library_folder = library_folder or pathlib.Path(sysconfig.get_path("stdlib"))
    topics_path = library_folder / "pydoc_data" / "topics.py"
    module_paths = [
        path
        for path in library_folder.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(library_folder).parts)
    ]
    module_paths.sort(key=lambda path: path.relative_to(library_folder).parts)
    seen_passages: set[str] = set()
    documents = [
        *(
            [topic]
            for topic in (
                _read_help_topics(topics_path) if topics_path.is_file() else ()
            )
        ),
        *map(_read_docstrings, module_paths),
    ]
    # dict.fromkeys removes repeated parts of a document, such as docstrings of overloads.
    unique_documents = []
    for passages in documents:
        cleaned = dict.fromkeys(
            inspect.cleandoc(passage).replace("\r\n", "\n") for passage in passages
        )
        new_passages = [
            passage for passage in cleaned if passage and passage not in seen_passages
        ]
        seen_passages.update(new_passages)
        if new_passages:
            unique_documents.append("\n\n".join(new_passages) + "\n")
    if not unique_documents:
        raise InputError(
            f"{library_folder} has no Python source files to read text from; give --data"
        )
    return _make_source_text(
        unique_documents, f"documentation of Python {platform.python_version()}"
    )


def _parse_source(path: pathlib.Path) -> ast.Module:
    """The syntax tree of a source file; an empty one if it is no Python of this version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _read_help_topics(path: pathlib.Path) -> list[str]:
    """The values of the one dictionary in pydoc_data/topics.py, in the order of their names."""
    for node in _parse_source(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name] for name in sorted(topics)]
    return []


def _read_docstrings(path: pathlib.Path) -> list[str]:
    """The docstrings of a module, its classes and its functions, in their order in the file."""
    node_types = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        node for node in ast.walk(_parse_source(path)) if isinstance(node, node_types)
    ]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = (ast.get_docstring(node, clean=False) for node in nodes)
    # A lone surrogate can stand in a string, and not in a text.
    return [
        docstring.encode(errors="ignore").decode()
        for docstring in docstrings
        if docstring
    ]


# --- Files ----------------------------------------------------------------------------------------


def read_text_files(paths: Sequence[str]) -> SourceText:
    """The text files of `paths`, each a document. A byte order mark goes, a line's end is LF.

    Raises:
      InputError: if there is none, or one is missing, a folder, empty or not UTF-8.
    """
    if not paths:
        raise InputError("no text files are given")
    documents = [_read_file(pathlib.Path(path)) for path in paths]
    return _make_source_text(
        documents, ", ".join(pathlib.Path(path).name for path in paths)
    )


def _read_file(path: pathlib.Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name its text files, in order")
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


def split_held_out(
    documents: Sequence[str],
    *,
    held_out_every: int = 20,
    block_characters: int = 10_000,
) -> tuple[list[str], list[str]]:
    """Documents to train on, and those held out: every so many-th block of contiguous text.

    A block is about `block_characters` long and ends where a line ends. Blocks that are neighbours
    in a document stay together, so that a document to train on is cut only where something was held
    out.

    Args:
      documents: texts.
      held_out_every: one of so many blocks is held out, the middle one first.
      block_characters: characters of a block; fewer in texts too short to hold one out.

    Returns:
      Training documents and held-out ones; together they are the text, each part once.

    Raises:
      InputError: if the text is too short to be parted.
    """
    num_characters = sum(map(len, documents))
    block_characters = max(1, min(block_characters, num_characters // held_out_every))
    parts: tuple[list[str], list[str]] = ([], [])
    num_blocks = 0
    for document in documents:
        blocks: list[tuple[bool, str]] = []
        for block in _split_blocks(document, block_characters):
            blocks.append((num_blocks % held_out_every == held_out_every // 2, block))
            num_blocks += 1
        for is_held_out, group in itertools.groupby(blocks, key=lambda pair: pair[0]):
            parts[is_held_out].append("".join(block for _, block in group))
    if not all(parts):
        raise InputError(
            f"a text of {num_characters} characters is too short to hold out a part of it"
        )
    return parts


def _split_blocks(document: str, block_characters: int) -> Iterator[str]:
    """The document in blocks of at least `block_characters` and less than twice as many."""
    line_ends = [i + 1 for i, character in enumerate(document) if character == "\n"]
    start = 0
    while len(document) - start >= 2 * block_characters:
        index = bisect.bisect_left(line_ends, start + block_characters)
        line_end = line_ends[index] if index < len(line_ends) else len(document)
        end = (
            line_end
            if line_end < start + 2 * block_characters
            else start + block_characters
        )
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]


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


def check_tokenizer(
    tokenizer: tokenizers.Tokenizer, vocab_size: int, model_name: str
) -> None:
    """Raise InputError for a tokenizer with tokens beyond a model's `vocab_size` rows.

    Args:
      tokenizer: the tokenizer.
      vocab_size: rows of the checkpoint's table, which may be padded beyond its tokens.
      model_name: name of the checkpoint, for the message.
    """
    largest_id = max(tokenizer.get_vocab().values(), default=-1)
    if largest_id >= vocab_size:
        raise InputError(
            f"the tokenizer has tokens up to id {largest_id} and so does not fit {model_name},"
            " which has a"
            f" vocabulary of {vocab_size}; give the tokenizer that it was trained with"
        )


def end_of_text_id(tokenizer: tokenizers.Tokenizer) -> int:
    """The id of the token that stands between documents.

    Raises:
      InputError: if the tokenizer has none of the names that are usual.
    """
    for name in _END_OF_TEXT_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise InputError(
        f"the tokenizer has no token that ends a text; of {', '.join(_END_OF_TEXT_NAMES)} one"
        " is needed"
    )


def encode_documents(
    tokenizer: tokenizers.Tokenizer, documents: Sequence[str]
) -> np.ndarray:
    """The tokens of the documents, an end-of-text token after each: int32 [n].

    Text that looks like a special token is spelled out, as any other.

    Raises:
      InputError: if the tokenizer has no end of text, or cannot encode a text.
    """
    end_ids = [end_of_text_id(tokenizer)]
    id_lists: list[list[int]] = []
    previous_setting = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        for start in range(0, len(documents), _DOCUMENTS_PER_BATCH):
            batch = list(documents[start : start + _DOCUMENTS_PER_BATCH])
            for encoding in tokenizer.encode_batch_fast(
                batch, add_special_tokens=False
            ):
                id_lists += [encoding.ids, end_ids]
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
        message = " ".join(str(error).split())
        raise InputError(
            f"the tokenizer cannot encode the text ({message:.200})"
        ) from None
    finally:
        tokenizer.encode_special_tokens = previous_setting
    return np.concatenate(
        [np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids in id_lists)]
    )
