"""Text to tokens and back: spans by character offsets, answers by their spellings.

Tokenizers are those of the `tokenizers` library, read from a checkpoint's tokenizer.json.
"""

import os
import pathlib
from typing import TYPE_CHECKING

from continuous_lm.durations import Span
from continuous_lm.errors import InputError

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "DIGITS",
    "encode",
    "find_characters",
    "load",
    "span",
    "token_span",
    "tokens_containing",
    "tokens_spelling",
]

DIGITS = tuple("0123456789")


def load(folder: pathlib.Path) -> "tokenizers.Tokenizer | None":
    """The tokenizer of a checkpoint folder, or None if it has no tokenizer.json."""
    import tokenizers  # late: importing the package should not cost more than jax and flax

    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # a broken link, a folder, a pipe
        raise InputError(f"{path} is not a file that can be read")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception, or panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(
            f"{path} is not a tokenizer that can be read ({_one_line(error)})"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def encode(tokenizer: "tokenizers.Tokenizer", text: str) -> "tokenizers.Encoding":
    """Encode `text`, special tokens added as the tokenizer says.

    Raises:
      InputError: if it has words that the vocabulary cannot spell; all are named.
    """
    try:
        encoding = tokenizer.encode(text)
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
        raise InputError(
            f"the tokenizer cannot encode {text!r} ({_one_line(error)})"
        ) from None
    unknown_token = getattr(tokenizer.model, "unk_token", None)
    unknown_id = tokenizer.token_to_id(unknown_token) if unknown_token else None
    unknown_words = [
        text[begin:end]
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if token_id == unknown_id and end > begin
    ]
    if unknown_words:
        word_list = ", ".join(map(repr, dict.fromkeys(unknown_words)))
        raise InputError(
            f"the vocabulary cannot spell {word_list};"
            " use other words, or a model with a larger vocabulary"
        )
    if not encoding.ids:
        raise InputError(f"the text {text!r} has no tokens")
    return encoding


def span(
    encoding: "tokenizers.Encoding", text: str, first: str, last: str | None = None
) -> Span:
    """The tokens from where `first` first occurs to where `last` last ends.

    Args:
      encoding: encoding of `text`.
      text: the prompt.
      first: a piece of the text, where the span begins.
      last: a piece of the text, at whose last occurrence the span ends; `first` if omitted.

    Returns:
      (first token, token after the last), every token that overlaps those characters.

    Raises:
      InputError: if a piece is not in the text.
    """
    return token_span(encoding, *find_characters(text, first, last))


def find_characters(text: str, first: str, last: str | None = None) -> tuple[int, int]:
    """The characters [begin, end) from where `first` first occurs to where `last` last ends."""
    last = first if last is None else last
    for piece in (first, last):
        if not piece or piece not in text:
            raise InputError(f"{piece!r} is not in the prompt {text!r}")
    begin, end = text.index(first), text.rindex(last) + len(last)
    if begin >= end:
        raise InputError(
            f"{last!r} ends before {first!r} begins in the prompt {text!r}"
        )
    return begin, end


def token_span(encoding: "tokenizers.Encoding", begin: int, end: int) -> Span:
    """The tokens that overlap the characters begin, ..., end - 1."""
    covered_tokens = [
        i
        for i, (token_begin, token_end) in enumerate(encoding.offsets)
        if token_begin < end and token_end > begin
    ]
    if not covered_tokens:
        raise InputError(f"no token covers characters {begin} to {end}")
    return covered_tokens[0], covered_tokens[-1] + 1


def tokens_spelling(
    tokenizer: "tokenizers.Tokenizer", answers: tuple[str, ...]
) -> dict[str, list[int]]:
    """The tokens that spell each answer and nothing else: "4", and "4" after a space.

    A token counts if it decodes to the answer, white space around it aside. An answer without one
    gets an empty list.
    """
    tokens_by_answer: dict[str, list[int]] = {answer: [] for answer in answers}
    for token in sorted(tokenizer.get_vocab().values()):
        text = tokenizer.decode([token], skip_special_tokens=False).strip()
        if text in tokens_by_answer:
            tokens_by_answer[text].append(token)
    return tokens_by_answer


def tokens_containing(
    tokenizer: "tokenizers.Tokenizer", answers: tuple[str, ...]
) -> dict[str, list[int]]:
    """The tokens whose name contains an answer, as the paper's code groups them.

    Case is ignored, byte tokens ("<0x34>") are left out, and a token that contains several answers
    counts for the first of them.
    """
    tokens_by_answer: dict[str, list[int]] = {answer: [] for answer in answers}
    for name, token in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        answer = next(
            (candidate for candidate in answers if candidate.lower() in name.lower()),
            None,
        )
        if answer is not None and "0x" not in name:
            tokens_by_answer[answer].append(token)
    return tokens_by_answer
