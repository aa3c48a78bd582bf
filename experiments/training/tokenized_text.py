"""The text that a model is trained and evaluated on: its flags, its tokens, its two parts."""

import dataclasses
from typing import Any

import numpy as np
import tokenizers

from continuous_lm import tokenization
from continuous_lm.errors import InputError
from continuous_lm.experiments.common import program
from continuous_lm.experiments.training import text
from continuous_lm.io.atomic_files import absolute_path

DEFAULT_VOCAB_SIZE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(program.CheckedConfig):
    """Flags of the text."""

    data: tuple[str, ...] = program.flag(
        (),
        help="UTF-8 text files.  [default: the documentation that this Python carries]",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(TextConfig):
    """Flags of the tokenizer."""

    tokenizer: str | None = program.flag(
        None,
        help="Folder of a tokenizer.json, of a checkpoint, say.  [default: one trained on the"
        " text]",
    )
    vocab_size: int | None = program.flag(
        None,
        help=f"Tokens of the tokenizer that is trained.  [default: {DEFAULT_VOCAB_SIZE}]",
        lower_bound=257,
    )

    def check_no_tokenizer(self) -> None:
        """Raise InputError if both flags are set for a model with a tokenizer."""
        for name, value in {
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
        }.items():
            if value is not None:
                raise InputError(
                    f"--{name}: the model brings its own tokenizer; leave it out"
                )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text in tokens.

    Attributes:
      tokenizer: whose tokens they are.
      train: int32 [n].
      held_out: int32 [m], of other parts of the text.
      bytes_per_token: mean bytes of a held-out token, to compare tokenizers.
      source: where the text is from, its size in bytes and its SHA-256, for the records.
    """

    tokenizer: tokenizers.Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    source: dict[str, Any]


def read_corpus(
    config: TextConfig, tokenizer: tokenizers.Tokenizer | None = None
) -> Corpus:
    """Read and tokenize the text that the flags name.

    Args:
      config: config with the paths of the text.
      tokenizer: tokenizer of the model. If omitted, `config` must be a `TokenizerConfig`: it names
        a tokenizer, or one is trained.
    """
    source_text = (
        text.read_text_files(config.data) if config.data else text.default_text()
    )
    train_documents, held_out_documents = text.split_held_out(source_text.documents)
    if tokenizer is None:
        tokenizer = _make_tokenizer(config, train_documents)
    held_out_tokens = text.encode_documents(tokenizer, held_out_documents)
    num_bytes = sum(len(document.encode()) for document in held_out_documents)
    return Corpus(
        tokenizer,
        text.encode_documents(tokenizer, train_documents),
        held_out_tokens,
        num_bytes / len(held_out_tokens),
        {
            "text": source_text.source,
            "bytes": source_text.num_bytes,
            "sha256": source_text.sha256,
        },
    )


def _make_tokenizer(
    config: TextConfig, train_documents: list[str]
) -> tokenizers.Tokenizer:
    """The tokenizer in the folder of --tokenizer, or one that is trained on the documents."""
    if not isinstance(config, TokenizerConfig):
        raise TypeError("a tokenizer is needed, or the flags of one")
    if config.tokenizer is None:
        vocab_size = config.vocab_size or DEFAULT_VOCAB_SIZE
        return text.train_tokenizer(train_documents, vocab_size)
    tokenizer = tokenization.load(absolute_path(config.tokenizer))
    if tokenizer is None:
        raise InputError(f"--tokenizer: {config.tokenizer} has no tokenizer.json")
    return tokenizer
