"""The text that a density model is trained and judged on: its flags, its tokens, its two parts."""

import dataclasses
from typing import Any

import numpy as np
import tokenizers
from absl import flags

from continuous_lm import tokenization
from continuous_lm.errors import InputError
from continuous_lm.experiments.training import text
from continuous_lm.io.atomic_files import absolute_path

_DATA = flags.DEFINE_list(
    "data",
    [],
    "UTF-8 text files.  [default: the documentation that this Python carries]",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Folder of a tokenizer.json, of a checkpoint, say.  [default: one trained on the text]",
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 2048, "Tokens of the tokenizer that is trained.", lower_bound=257
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text in tokens.

    Attributes:
      tokenizer: whose tokens they are.
      train: int32 [n].
      held_out: int32 [m], of other parts of the text.
      bytes_per_token: of the held-out text, to compare tokenizers by.
      source: where the text is from, its size in bytes and its SHA-256, for the records.
    """

    tokenizer: tokenizers.Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    source: dict[str, Any]


def read_corpus(tokenizer: tokenizers.Tokenizer | None = None) -> Corpus:
    """The text that the flags name.

    Args:
      tokenizer: of the model; if left out, that of the flags or one that is trained now.
    """
    for flag_name in ("tokenizer", "vocab_size"):
        if tokenizer is not None and flags.FLAGS[flag_name].present:
            raise InputError(
                f"--{flag_name}: the model brings its own tokenizer; leave it out"
            )
    source_text = (
        text.read_text_files(_DATA.value) if _DATA.value else text.default_text()
    )
    train, held_out = text.split_held_out(source_text.documents)
    if tokenizer is None and _TOKENIZER.value is not None:
        tokenizer = tokenization.load(absolute_path(_TOKENIZER.value))
        if tokenizer is None:
            raise InputError(f"--tokenizer: {_TOKENIZER.value} has no tokenizer.json")
    if tokenizer is None:
        tokenizer = text.train_tokenizer(train, _VOCAB_SIZE.value)
    held_out_tokens = text.encode_documents(tokenizer, held_out)
    num_bytes = sum(len(document.encode()) for document in held_out)
    source = {
        "text": source_text.source,
        "bytes": source_text.num_bytes,
        "sha256": source_text.sha256,
    }
    return Corpus(
        tokenizer,
        text.encode_documents(tokenizer, train),
        held_out_tokens,
        num_bytes / len(held_out_tokens),
        source,
    )
