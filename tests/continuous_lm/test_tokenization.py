import json
import pathlib

import pytest
import tokenizers as lib

import continuous_lm as clm
from continuous_lm import tokenization
from continuous_lm.tokenization import DIGITS
from tests.fixtures import tiny

STORIES = pathlib.Path(__file__).parents[3] / "shared" / "data" / "stories260k"
SENTENCE = 'the sentence "apple apple apple" is said'


@pytest.fixture(scope="module")
def stories():
    """A real BPE with byte fallback, which spells apple as a, pp, le."""
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is not there")
    return tokenization.load(STORIES)


@pytest.fixture(scope="module")
def words():
    return tiny.word_tokenizer(SENTENCE + " 4 10 how many , ? you say")


def word_level(vocabulary, decoder=None):
    tokenizer = lib.Tokenizer(lib.models.WordLevel(vocabulary, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def hand_made():
    """Names as SentencePiece, byte fallback and GPT-2 write them, and look-alikes."""
    names = [
        "<unk>",
        "4",
        "▁4",
        "▁▁4",
        "<0x34>",
        "10",
        "44",
        "▁14",
        "x4",
        "four",
        "4.",
        "0",
        "IV",
    ]
    decoders = lib.decoders
    return word_level(
        {name: i for i, name in enumerate(names)},
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
    )


# --- Spans -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "covered"),
    [
        ("apple", None, "apple apple apple"),  # from its first to its last occurrence
        ("apple apple", None, "apple apple apple"),
        ("sentence", None, "sentence"),
        ("the", "sentence", "the sentence"),
        ("pp", "pp", "apple apple apple"),  # a token that is touched is in the span
        (SENTENCE, None, SENTENCE),
        ('"', None, '"apple apple apple"'),
    ],
)
def test_span_of_words(words, first, last, covered):
    encoding = tokenization.encode(words, SENTENCE)
    a, b = tokenization.span(encoding, SENTENCE, first, last)
    assert encoding.tokens[0] == "<bos>"
    assert a >= 1
    assert encoding.tokens[a:b] == [
        t for t in words.encode(covered).tokens if t != "<bos>"
    ]


@pytest.mark.parametrize(
    ("text", "piece", "tokens"),
    [
        ('the "apple apple"', "apple apple", ["a", "pp", "le", "▁a", "pp", "le"]),
        ("an apple is", "apple", ["▁a", "pp", "le"]),
        ("an apple is", "p", ["pp"]),
        ("an 🍎 is 🍎, 🍎", "🍎", ["▁", *["<0xF0>", "<0x9F>", "<0x8D>", "<0x8E>"]]),
        ("é apple", "apple", ["▁a", "pp", "le"]),  # offsets count characters, not bytes
    ],
)
def test_span_of_many_tokens_a_word(stories, text, piece, tokens):
    encoding = tokenization.encode(stories, text)
    a, b = tokenization.span(encoding, text, piece)
    if piece == "🍎":
        assert encoding.tokens[a:b].count("<0x8E>") == 3
        assert encoding.tokens[a:][:4] == tokens[1:]
        assert b == len(encoding.tokens)
    else:
        assert encoding.tokens[a:b] == tokens


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("pear", None, "'pear' is not in the prompt"),
        ("apple", "pear", "'pear' is not in the prompt"),
        ("Apple", None, "'Apple' is not in the prompt"),
        ("", None, "'' is not in the prompt"),
        ("said", "the", "'the' ends before 'said' begins"),
        (" ", " ", None),
    ],
)
def test_span_that_is_not_there(words, first, last, message):
    encoding = tokenization.encode(words, SENTENCE)
    if (
        message is None
    ):  # white space alone, between words: the words between are covered
        a, b = tokenization.span(encoding, SENTENCE, first, last)
        assert (a, b) == (2, len(encoding) - 1)
        return
    with pytest.raises(clm.InputError, match=message):
        tokenization.span(encoding, SENTENCE, first, last)


def test_span_of_characters_that_no_token_covers(words):
    encoding = tokenization.encode(words, "how  many")
    with pytest.raises(clm.InputError, match="no token covers characters 3 to 5"):
        tokenization.token_span(encoding, 3, 5)


# --- Encoding --------------------------------------------------------------------------------


def test_every_unknown_word_is_named_once(words):
    with pytest.raises(clm.InputError) as refused:
        tokenization.encode(words, "how zebras say pear , pear ? Many")
    message = str(refused.value)
    for word in ("zebras", "pear", "Many"):
        assert message.count(repr(word)) == 1
    for word in ("how", "say"):
        assert repr(word) not in message


def test_unknown_words_without_an_unknown_token_are_refused():
    with pytest.raises(clm.InputError, match="zebra"):
        tokenization.encode(word_level({"how": 0}), "zebra")


def test_byte_fallback_spells_everything(stories):
    assert "<0xF0>" in tokenization.encode(stories, "an 🍎").tokens


def test_text_without_tokens():
    with pytest.raises(clm.InputError, match="'' has no tokens"):
        tokenization.encode(word_level({"<unk>": 0, "a": 1}), "")


# --- Answers ---------------------------------------------------------------------------------


def test_spellings_are_the_answer_and_nothing_else():
    tokenizer = hand_made()
    names = [
        tokenizer.id_to_token(i)
        for i in tokenization.tokens_spelling(tokenizer, DIGITS)["4"]
    ]
    assert names == ["4", "▁4", "▁▁4", "<0x34>"]
    assert tokenization.tokens_spelling(tokenizer, DIGITS)["1"] == []


def test_containing_selects_tokens_by_a_part_of_their_name():
    tokenizer = hand_made()
    names_by_answer = {
        answer: [tokenizer.id_to_token(i) for i in tokens]
        for answer, tokens in tokenization.tokens_containing(tokenizer, DIGITS).items()
    }
    assert names_by_answer["4"] == ["4", "▁4", "▁▁4", "44", "x4", "4."]
    assert names_by_answer["1"] == [
        "▁14"
    ]  # of the digits in a name the first in the list counts
    assert names_by_answer["0"] == ["10", "0"]
    tokens = [t for group in names_by_answer.values() for t in group]
    assert len(tokens) == len(set(tokens))


def test_containing_ignores_case():
    tokenizer = word_level({"<unk>": 0, "Yes": 1, "yesterday": 2, "no": 3})
    assert tokenization.tokens_containing(tokenizer, ("yes", "No")) == {
        "yes": [1, 2],
        "No": [3],
    }


def test_byte_level_names_count_after_a_space():
    names = {"<unk>": 0, "Ġ4": 1, "4": 2, "Ġ": 3, "ĠĊ4": 4, "40": 5}
    tokenizer = word_level(names, lib.decoders.ByteLevel())
    assert tokenization.tokens_spelling(tokenizer, ("4",)) == {"4": [1, 2, 4]}
    assert tokenization.tokens_containing(tokenizer, ("4",)) == {"4": [1, 2, 4, 5]}


def test_ids_need_not_be_contiguous():
    tokenizer = word_level({"<unk>": 0, "4": 70})
    assert tokenization.tokens_spelling(tokenizer, ("4",)) == {"4": [70]}


def test_answers_of_a_real_vocabulary(stories):
    exact = tokenization.tokens_spelling(stories, DIGITS)
    paper = tokenization.tokens_containing(stories, DIGITS)
    for digit in DIGITS:
        named = {stories.id_to_token(i) for i in exact[digit]}
        assert named == {digit, f"<0x{ord(digit):02X}>"}
        assert [stories.id_to_token(i) for i in paper[digit]] == [digit]


# --- Loading ---------------------------------------------------------------------------------


def test_folder_without_a_tokenizer_has_none(tmp_path):
    assert tokenization.load(tmp_path) is None


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path, words):
    copy = lib.Tokenizer.from_str(words.to_str())
    copy.enable_padding(length=20)
    copy.enable_truncation(3)
    copy.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenization.load(tmp_path)
    assert loaded.encode(SENTENCE).ids == words.encode(SENTENCE).ids


@pytest.mark.parametrize(
    "text", ["", "{}", '{"model": 3}', '{"model": {"type": "WordLevel"}']
)
def test_broken_tokenizer_is_refused_by_name(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(clm.InputError, match=r"tokenizer\.json is not a tokenizer"):
        tokenization.load(tmp_path)


def test_cut_tokenizer_is_refused_by_name(tmp_path, words):
    text = words.to_str()
    assert json.loads(text)
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(clm.InputError, match=r"tokenizer\.json is not a tokenizer"):
        tokenization.load(tmp_path)
