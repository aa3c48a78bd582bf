"""Text: read whole or refused, parted without overlap, spelled by tokens that give it back."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import continuous_lm as clm
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.training import text

STORY = "The cat sat on the mat.\n\n    "
STORY += "And then \u2014 it slept, \U0001f431 indeed!\r\n\t<|endoftext|>"


@pytest.fixture(scope="module")
def default():
    return text.default_text()


@pytest.fixture(scope="module")
def bpe():
    return text.train_tokenizer([STORY * 3, "of cats and mats and hats\n" * 9], 300)


# --- What every Python carries ----------------------------------------------------------------


@pytest.mark.slow
def test_default_text_is_english_and_each_part_comes_once(default):
    content = [document.encode() for document in default.documents]
    assert default.num_bytes == sum(map(len, content)) > 1_000_000
    assert default.sha256 == hashlib.sha256(b"\0".join([*content, b""])).hexdigest()
    assert default.source.endswith(sys.version.split()[0])
    words = " ".join(default.documents).split()
    assert 0.03 < words.count("the") / len(words) < 0.1
    assert len(set(default.documents)) == len(default.documents)
    assert any(d.startswith('The "assert" statement\n***') for d in default.documents)
    assert any("Logging package for Python." in d for d in default.documents)
    assert not any("This module contains tests" in d for d in default.documents)


def test_a_library_is_read_and_not_run(tmp_path):
    files = {
        "pydoc_data/topics.py": "topics = {'b': 'Second topic.\\n', 'a': 'First\\n    topic.'}",
        "zoo.py": '"""The zoo.\n\n    Its beasts.\n    """\nraise SystemExit\ndef f():\n  "Feeds."',
        "ark/__init__.py": 'class A:\n  "An ark."\n  async def f(self): "Feeds."\n  def g(): "G."',
        "ark/test/t.py": '"""A test."""',
        "encodings/e.py": '"""A table."""',
        "broken.py": "def (",
        "strange.py": '"A \\ud800surrogate."\nx = "\\d"',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    actual = text.default_text(tmp_path)
    assert text.default_text(tmp_path) == actual
    assert actual.documents == (
        "First\ntopic.\n",
        "Second topic.\n",
        "An ark.\n\nFeeds.\n\nG.\n",
        "A surrogate.\n",
        "The zoo.\n\nIts beasts.\n",
    )


def test_a_python_without_sources(tmp_path):
    with pytest.raises(clm.InputError, match=r"no Python source files.*--data"):
        text.default_text(tmp_path)


# --- Files ------------------------------------------------------------------------------------


def test_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "b.txt").write_bytes("\u00e9t\u00e9".encode())
    actual = text.read_text_files([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert actual.documents == ("one\ntwo\n", "\u00e9t\u00e9")
    assert actual.source == "a.txt, b.txt"
    assert actual.num_bytes == 8 + 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text is missing"),
        (b"", "text is empty"),
        (b"\xef\xbb\xbf \n", "text is empty"),
        (b"caf\xe9 au lait", r"not UTF-8: byte 0xe9 at offset 3"),
        ("pipe", "is not a file"),
        ("folder", "is a folder.*name its text files"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text"
    match content:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case bytes():
            path.write_bytes(content)
    with pytest.raises(clm.InputError, match=message):
        text.read_text_files([str(path)])
    with pytest.raises(clm.InputError, match="no text files"):
        text.read_text_files([])


# --- The split --------------------------------------------------------------------------------

LINES = st.lists(st.text("ab\n", max_size=60), min_size=1, max_size=8)


@given(LINES, st.integers(2, 6), st.integers(1, 40))
def test_parts_are_the_text_each_once(documents, every, characters):
    try:
        train, held = text.split_held_out(
            documents, held_out_every=every, block_characters=characters
        )
    except clm.InputError:
        assert sum(map(len, documents)) < 2 * every * characters + 2 * every * len(
            documents
        )
        return
    left = "".join(documents)
    assert sorted("".join(train + held)) == sorted(left)
    for part in (
        train,
        held,
    ):  # each in its order, and nothing between them is left over
        others = iter(left)
        assert all(character in others for character in "".join(part))


def test_held_out_blocks_are_spread_and_end_with_lines():
    lines = [f"{i:04d}\n" for i in range(1000)]
    train, held = text.split_held_out(
        ["".join(lines)], held_out_every=20, block_characters=48
    )
    assert not set("".join(train).split()) & set("".join(held).split())
    assert all(part.endswith("\n") for part in train + held)
    assert len("".join(held)) == pytest.approx(5000 / 20, rel=0.1)
    assert len(train) == len(held) + 1  # cut only where something was held out
    assert text.split_held_out(
        ["".join(lines)], held_out_every=20, block_characters=48
    ) == (
        train,
        held,
    )
    np.testing.assert_allclose(np.diff([int(part[:4]) for part in held]), 200, atol=2)


def test_a_text_of_one_line_is_parted_too():
    _, held = text.split_held_out(["x" * 1000], held_out_every=5)
    assert len("".join(held)) == pytest.approx(200, rel=0.3)
    with pytest.raises(clm.InputError, match="of 1 characters is too short"):
        text.split_held_out(["x"])


# --- Tokens -----------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
@settings(max_examples=100)
def test_tokens_give_the_text_back(bpe, documents):
    documents = [*documents, STORY]
    ids = text.encode_documents(bpe, documents)
    assert ids.dtype == np.int32
    ends = np.flatnonzero(ids == text.end_of_text_id(bpe))
    assert len(ends) == len(documents)  # the one that is spelled out is no end
    begins = [0, *(ends[:-1] + 1)]
    for document, begin, end in zip(documents, begins, ends, strict=True):
        assert (
            bpe.decode(ids[begin:end].tolist(), skip_special_tokens=False) == document
        )


def test_training_a_tokenizer_is_deterministic(bpe):
    program = (
        "from continuous_lm.experiments.training import text\n"
        "from tests.experiments.training.test_text import STORY\n"
        "print(text.train_tokenizer([STORY * 3, 'of cats and mats and hats\\n' * 9], 300).to_str())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"RAYON_NUM_THREADS": "3", "PYTHONUTF8": "1"},
        cwd=pathlib.Path(__file__).resolve().parents[3],
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    assert done.stdout.strip() == bpe.to_str()


def test_a_vocabulary_has_the_size_that_was_asked(bpe):
    assert bpe.get_vocab_size() == 300
    assert sorted(bpe.get_vocab().values()) == list(range(300))
    assert len(text.encode_documents(bpe, ["of cats and mats"])) < 10  # merges are used
    with pytest.raises(clm.InputError, match="256 bytes and the end of text take 257"):
        text.train_tokenizer([STORY], 256)
    with pytest.raises(
        clm.InputError, match=r"too short for a vocabulary of 5000: it makes one"
    ):
        text.train_tokenizer([STORY], 5000)


def test_a_tokenizer_must_fit_the_vocabulary(bpe):
    text.check_tokenizer(bpe, 300, "model")
    text.check_tokenizer(bpe, 512, "model")  # padded rows
    with pytest.raises(
        clm.InputError, match=r"up to id 299.*fit model, which has.* of 299"
    ):
        text.check_tokenizer(bpe, 299, "model")


def test_a_given_tokenizer_needs_an_end():
    words = (
        prompts.make_tokenizer()
    )  # it has <bos>, which stands in front of each of its texts
    assert text.end_of_text_id(words) == words.token_to_id("<bos>")
    none = type(words).from_str(words.to_str().replace('"<bos>"', '"begin"'))
    with pytest.raises(clm.InputError, match="no token that ends a text"):
        text.encode_documents(none, ["a"])
