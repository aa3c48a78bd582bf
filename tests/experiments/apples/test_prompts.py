"""The small language: training prompts, held-out prompts, and recounted answers."""

import re

import numpy as np
import pytest

from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.apples.language import (
    ATTRIBUTE_QUESTIONS,
    CATEGORIES,
    OPERATORS,
    PLURALS,
    UNSEEN_FILLER_WORDS,
    UNSEEN_SEPARATORS,
    UNSEEN_WORDS,
    WORDS,
)

NUM_PROMPTS = 3000


@pytest.fixture(scope="module")
def tokenizer():
    return prompts.make_tokenizer()


@pytest.fixture(scope="module", params=[False, True], ids=["training", "held_out"])
def samples(request):
    rng = np.random.default_rng(1)
    return [
        prompts.sample_prompt(rng, task, request.param)
        for task in prompts.TASK_WEIGHTS
        for _ in range(NUM_PROMPTS // len(prompts.TASK_WEIGHTS))
    ]


def recount(prompt: prompts.Prompt) -> str:
    """The answer, read off the text alone by other means than the sampler's."""
    text = prompt.text
    if prompt.task == "counting":
        words = re.findall(r"\w+", re.search('"(.*)"', text)[1])
        reference = {w for ws in WORDS.values() for w in ws}
        return str(sum(word in reference for word in words))
    if prompt.task == "events":
        if "Tutorial" in text:
            return str(text.count("\n- "))
        return str(len(re.findall(r"(She|He|They) (buys|saw|found) ", text)))
    if prompt.task == "sum":
        patterns = (
            r"sum of (\d) and (\d)",
            r"What is (\d) plus (\d)",
            r"has (\d) \w+ and (\d) \w+\. How",
        )
        (actual,) = filter(None, (re.search(pattern, text) for pattern in patterns))
        return str(int(actual[1]) + int(actual[2]))
    if prompt.task == "boolean":
        a, operator, b = re.search(
            r"([01]) (AND|OR|NAND|NOR|XOR) ([01])", text
        ).groups()
        ones = (a + b).count("1")
        true = {"AND": [2], "OR": [1, 2], "NAND": [0, 1], "NOR": [0], "XOR": [1]}
        return str(int(ones in true[operator]))
    question = re.search(r"(Are|Can|Do) [^?]*\?", text)[0]
    plural = question.split()[1]
    (noun,) = [
        (category, word)
        for category, words in WORDS.items()
        for word in words
        if PLURALS[word] == plural
    ]
    true = ATTRIBUTE_QUESTIONS[question.replace(plural, "{}")].split()
    return "yes" if plural in true or CATEGORIES[noun[0]] in true else "no"


def test_the_same_seed_gives_the_same_prompts():
    one, two, other = (np.random.default_rng(seed) for seed in (5, 5, 6))
    first = [prompts.sample_prompt(one) for _ in range(50)]
    assert first == [prompts.sample_prompt(two) for _ in range(50)]
    assert first != [prompts.sample_prompt(other) for _ in range(50)]


def test_answers_equal_an_independent_recount(samples):
    for prompt in samples:
        assert prompt.answer == recount(prompt), prompt


def test_every_prompt_is_spelled_and_every_answer_is_one_token(samples, tokenizer):
    unknown = tokenizer.token_to_id("<unk>")
    for prompt in samples:
        assert unknown not in tokenizer.encode(prompt.text).ids, prompt.text
        assert tokenizer.token_to_id(prompt.answer) is not None


def test_spans_hold_what_is_counted_and_nothing_else(samples):
    for prompt in samples:
        if prompt.task in ("boolean", "attribute"):
            assert prompt.span is None
            continue
        span = prompt.text[slice(*prompt.span)]
        if prompt.task == "counting":
            word = prompt.combination[0]
            assert span.startswith(word)
            assert span.endswith(word)
            others = prompt.text[: prompt.span[0]], prompt.text[prompt.span[1] :]
            assert word not in others[0].rpartition('"')[2].split()
            assert word not in others[1].partition('"')[0].split()
        elif prompt.task == "events":
            assert re.match(r"(She|He|They|-) ", span)
            assert span.endswith(".")
            assert recount(prompt) == str(span.count("."))
        else:
            assert span == str(prompt.combination[0])


def test_training_and_held_out_combinations_are_disjoint():
    rng = np.random.default_rng(2)
    for task in prompts.TASK_WEIGHTS:
        shown, held_out = (
            {prompts.sample_prompt(rng, task, held_out).combination for _ in range(400)}
            for held_out in (False, True)
        )
        assert len(held_out) > 3, f"too few held-out combinations of {task} to measure"
        assert not shown & held_out


def test_each_fact_keeps_a_wording_for_training():
    facts = [
        *((task, (a, b)) for task in ["sum"] for a in range(10) for b in range(10)),
        *(("boolean", (a, o, b)) for o in OPERATORS for a in (0, 1) for b in (0, 1)),
        *(
            ("attribute", (q, p))
            for q in ATTRIBUTE_QUESTIONS
            for p in prompts.true_plurals(q)
        ),
    ]
    for task, fact in facts:
        assert (
            sum(prompts.is_held_out(task, (*fact, wording)) for wording in range(4))
            <= 1
        )


def test_the_split_does_not_depend_on_the_process():
    """Python's own hash of strings changes from run to run; training would then see the test."""
    held_out = [
        n for n in range(1, 10) if prompts.is_held_out("counting", ("apple", n, "none"))
    ]
    assert held_out == [1, 5]


def test_words_for_tests_are_seen_but_never_counted_in_training():
    rng = np.random.default_rng(3)
    words = {word for pair in UNSEEN_WORDS.values() for word in pair}
    words |= set(UNSEEN_FILLER_WORDS) | {text.strip() for text in UNSEEN_SEPARATORS}
    inside, anywhere = set(), set()
    tokens = prompts.make_tokenizer()
    for _ in range(NUM_PROMPTS):
        prompt = prompts.sample_prompt(rng)
        anywhere |= set(tokens.encode(prompt.text).tokens)
        if prompt.task in ("counting", "events"):
            inside |= set(tokens.encode(prompt.text[slice(*prompt.span)]).tokens)
            quoted = re.search('"(.*)"', prompt.text)
            inside |= set(tokens.encode(quoted[1]).tokens if quoted else ())
    assert words <= anywhere
    assert not words & inside
    assert len(inside) > 50


def test_every_word_of_the_vocabulary_is_used():
    rng = np.random.default_rng(4)
    tokens, used = prompts.make_tokenizer(), set()
    for _ in range(6 * NUM_PROMPTS):
        prompt = prompts.sample_prompt(rng)
        used |= {*tokens.encode(prompt.text).tokens, prompt.answer}
    assert set(prompts.make_vocabulary()) - used == {"<unk>"}


def test_the_wording_is_the_papers():
    shop = ["a carton of milk", "an apple", "a potato", "a loaf of bread"]
    assert prompts.counting_prompt("fruit", "apple", [" "] * 3).text == (
        'Question: In the sentence "apple apple apple apple", how many times is a fruit mentioned? '
        "Reply with a single-digit number\nAnswer: "
    )
    assert prompts.counting_prompt(
        "fruit", "apple", [" "] * 3, wording="listed"
    ).text == (
        'Question: How many fruits are listed in the sentence "apple apple apple apple"? '
        "Reply with a single-digit number\nAnswer: "
    )
    assert prompts.events_prompt("shop", "Alice", shop).text == (
        "Question: Alice goes to the shop. She buys a carton of milk. She buys an apple. She buys "
        "a potato. She buys a loaf of bread. How many items did Alice buy? Reply with a "
        "single-digit number\nAnswer: "
    )
    assert prompts.sum_prompt(4, 3).text == "The sum of 4 and 3 is "
    assert prompts.boolean_prompt(0, "AND", 1).text == (
        "Question: What is the truth value of the following statement?\n0 AND 1\nAnswer (0 or 1): "
    )
    assert prompts.attribute_prompt("Are {} red?", "apples").text == (
        "Question: Are apples red? (yes/no)\nAnswer:"
    )


def test_the_language_has_fifty_pairs_with_four_kinds_of_questions():
    """True of both, of neither, of the first alone and of the second alone."""
    truths = {q: prompts.true_plurals(q) for q in ATTRIBUTE_QUESTIONS}
    plurals = [PLURALS[w] for words in WORDS.values() for w in words]
    kinds = lambda a, b: {(a in true, b in true) for true in truths.values()}  # noqa: E731
    pairs = [
        (a, b)
        for i, a in enumerate(plurals)
        for b in plurals[i + 1 :]
        if len(kinds(a, b)) == 4
    ]
    assert len(pairs) >= 50


def test_offsets_are_those_of_the_words(tokenizer):
    text = (
        'Question: In the sentence "apple; apple", how many times is a fruit mentioned?'
    )
    encoding = tokenizer.encode(text)
    assert encoding.tokens[0] == "<bos>"
    assert [text[a:b] for a, b in encoding.offsets[1:]] == encoding.tokens[1:]


def test_words_outside_the_vocabulary_are_unknown(tokenizer):
    encoding = tokenizer.encode("apple zebra")
    assert encoding.tokens == ["<bos>", "apple", "<unk>"]
    assert encoding.offsets[2] == (6, 11)
