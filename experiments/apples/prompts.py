"""The small language of the embedded model: its words, its tasks, its prompts and its tokenizer.

All training and test prompts are made here by a seeded sampler:

    rng = numpy.random.default_rng(0)
    prompt = sample(rng)                        # a Prompt: text, answer, counted span, ...
    prompt = sample(rng, "sum", held_out=True)  # one that training never shows

Tasks; `TASK_WEIGHTS` has their shares in training:

    counting   how many times a category is mentioned in a sentence of one repeated word
    events     how many things a person bought, saw or found, or how many steps a tutorial has
    sum        the sum of two one-digit numbers; every answer, 0 to 18, is one token
    boolean    AND, OR, NAND, NOR, XOR of two truth values
    attribute  yes/no facts about plurals, true in the tables below

*Held-out combinations.* Each prompt has a combination: (word, repetitions, style of separators) for
counting, (scene, subject, repetitions) for events, (fact, wording) for the rest. A stable hash
splits combinations into training and held-out ones. A fact cannot be inferred, so at most one of
its wordings is held out: held-out accuracy of facts is about wordings, not about new facts.

*Words for tests.* The last two words of each category, `UNSEEN_SEPARATORS` and
`UNSEEN_FILLER_WORDS` are in the language, but training never puts them inside a counted span.

Training uses only durations of 1.
"""

import dataclasses
import re
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import tokenizers

from continuous_lm.experiments.apples.language import (
    ADJECTIVES,
    ATTRIBUTE_QUESTIONS,
    ATTRIBUTE_TEMPLATES,
    BOOLEAN_TEMPLATES,
    CATEGORIES,
    COUNTED_WORDS,
    COUNTING_TEMPLATES,
    FILLER_WORDS,
    NOUN_TABLE,
    OPERATORS,
    PEOPLE,
    PLACES,
    PLURALS,
    PRONOUNS,
    SCENES,
    SENTENCE_TEMPLATES,
    SEPARATOR_STYLES,
    SEPARATORS,
    SUM_TEMPLATES,
    UNSEEN_FILLER_WORDS,
    UNSEEN_SEPARATORS,
    WORDS,
)

Option = TypeVar("Option")

# --- Prompts ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question of the small language.

    Attributes:
        task: Name of the task, a key of `TASK_WEIGHTS`.
        text: Text of the question. The answer is the next token.
        answer: The answer, one token.
        combination: Key of the question, by which training and held-out prompts are split.
        span: Characters [start, end) of the counted part of `text` (in a sum, the first number), or
            None.
    """

    task: str
    text: str
    answer: str
    combination: tuple
    span: tuple[int, int] | None = None

    @property
    def is_held_out(self) -> bool:
        """Return whether training never shows this prompt's combination."""
        return is_held_out(self.task, self.combination)

    def with_leading_text(self, text: str) -> "Prompt":
        """The same prompt after other text."""
        span = self.span and (self.span[0] + len(text), self.span[1] + len(text))
        return dataclasses.replace(self, text=text + self.text, span=span)


def is_held_out(task: str, combination: tuple) -> bool:
    """Return whether `combination` is kept from training: about one in ten, by a hash of its text.

    The last entry of a fact's combination is its wording's number. A fact is kept from training in
    one wording at most.
    """
    if task in ("counting", "events"):
        return _stable_hash(task, *combination) % 10 == 0
    *fact, wording = combination
    return _stable_hash(task, *fact) % 12 == wording


def counting_prompt(
    category: str,
    word: str,
    gaps: list[str],
    *,
    wording: str = "times",
    lead: str = "",
    end: str = "",
    between: str = "",
    style: str = "",
) -> Prompt:
    """Ask how often `category` is mentioned in a sentence of `word` len(gaps) + 1 times.

    Args:
        category: A category, such as "fruit".
        word: The repeated word.
        gaps: What stands between its occurrences, spaces included.
        wording: A key of `COUNTING_TEMPLATES`; "times" and "listed" are the paper's.
        lead: Text inside the quotes before the words, outside the counted span.
        end: Text inside the quotes after the words, outside the counted span.
        between: Sentences between the quotes and the question's end.
        style: The separators' name in the prompt's combination.
    """
    span = "".join(word + separator for separator in gaps) + word
    prefix, suffix = COUNTING_TEMPLATES[wording].split("{span}")
    fields = dict(
        between=between and between + " ",
        a_category=f"{_article(category)} {category}",
        categories=CATEGORIES.get(category, category + "s"),
    )
    num_words = len(gaps) + 1
    return _prompt_with_span(
        "counting",
        prefix.format(**fields) + lead,
        span,
        end + suffix.format(**fields),
        num_words,
        (word, num_words, style),
    )


def events_prompt(
    scene: str,
    subject: str,
    objects: list[str],
    endings: list[str] | None = None,
    *,
    between: str = "",
) -> Prompt:
    """Ask how many events there were: one for each of `objects`, in `SCENES[scene]`.

    Args:
        scene: A key of `SCENES`; shop, zoo and beach are the paper's.
        subject: Who (in a tutorial, its title).
        objects: What each event is about.
        endings: Endings of the events; none by default.
        between: Sentences between the events and the question.
    """
    scene_spec = SCENES[scene]
    pronoun = PRONOUNS.get(subject, "")
    span = scene_spec.separator.join(
        scene_spec.event_template.format(they=pronoun, object=event_object, tail=ending)
        for event_object, ending in zip(
            objects, endings or [""] * len(objects), strict=True
        )
    )
    prefix, suffix = scene_spec.template.split("{span}")
    fields = dict(name=subject, between=between and between + " ")
    combination = (scene, subject, len(objects))
    return _prompt_with_span(
        "events",
        prefix.format(**fields),
        span,
        suffix.format(**fields),
        len(objects),
        combination,
    )


def sum_prompt(
    a: int,
    b: int,
    wording: int = 0,
    *,
    name: str = "Alice",
    nouns: str = "apples",
    others: str = "pears",
) -> Prompt:
    """Ask for a + b; wording 0 is the paper's."""
    prefix, suffix = SUM_TEMPLATES[wording].split("{a}")
    fields = dict(a=a, b=b, name=name, nouns=nouns, others=others)
    return _prompt_with_span(
        "sum",
        prefix.format(**fields),
        str(a),
        suffix.format(**fields),
        a + b,
        (a, b, wording),
    )


def boolean_prompt(a: int, operator: str, b: int, wording: int = 0) -> Prompt:
    """Ask for the truth value of `a operator b`; wording 0 is the paper's."""
    text = BOOLEAN_TEMPLATES[wording].format(a=a, op=operator, b=b)
    return Prompt(
        "boolean", text, str(OPERATORS[operator](a, b)), (a, operator, b, wording)
    )


def attribute_prompt(question: str, plural: str, wording: int = 0) -> Prompt:
    """Ask a yes/no question of `ATTRIBUTE_QUESTIONS` about a plural; wording 0 is the paper's."""
    text = ATTRIBUTE_TEMPLATES[wording].format(question=question.format(plural))
    answer = "yes" if plural in true_plurals(question) else "no"
    return Prompt("attribute", text, answer, (question, plural, wording))


def true_plurals(question: str) -> frozenset[str]:
    """The plurals of which a question of `ATTRIBUTE_QUESTIONS` is true."""
    plurals = {
        CATEGORIES[category]: [PLURALS[word] for word in words]
        for category, words in WORDS.items()
    }
    return frozenset(
        plural
        for name in ATTRIBUTE_QUESTIONS[question].split()
        for plural in plurals.get(name, [name])
    )


# --- The sampler --------------------------------------------------------------------------------


def sample_prompt(
    rng: np.random.Generator, task: str | None = None, held_out: bool = False
) -> Prompt:
    """Draw a prompt.

    Args:
        rng: The source of chance; the same state gives the same prompt.
        task: A task of `TASK_WEIGHTS`; drawn from the mixture by default.
        held_out: Whether to draw from the combinations that are kept from training (True) or from
            those that training shows (False).
    """
    if task is None:
        task = _TASKS[np.searchsorted(_CUMULATIVE_SHARES, rng.random(), side="right")]
    while True:
        prompt = _SAMPLERS[task](rng)
        if prompt.is_held_out == held_out:
            return prompt.with_leading_text(
                "".join(
                    sample_sentence(rng) + " "
                    for _ in range(_choose(rng, _NUM_LEADING_SENTENCES))
                )
            )


def sample_sentence(rng: np.random.Generator) -> str:
    """Draw a sentence of filler."""
    nouns = [_choose(rng, WORDS[_choose(rng, _CATEGORIES)]) for _ in range(2)]
    return _choose(rng, SENTENCE_TEMPLATES).format(
        name=_choose(rng, PEOPLE),
        friend=_choose(rng, PEOPLE),
        adjective=_choose(rng, ADJECTIVES),
        also=_choose(rng, ADJECTIVES),
        join=_choose(rng, _SENTENCE_JOINS),
        place=_choose(rng, PLACES),
        digit=_random_below(rng, 10),
        noun=nouns[0],
        nouns=PLURALS[nouns[0]],
        others=PLURALS[nouns[1]],
    )


def sample_gaps(
    rng: np.random.Generator,
    style: str,
    n: int,
    separators: Sequence[str] = SEPARATORS,
    filler: Sequence[str] = FILLER_WORDS,
) -> list[str]:
    """Draw what stands between `n` words: n - 1 strings, spaces included.

    Args:
        rng: The source of chance.
        style: One of `SEPARATOR_STYLES`: "none", "comma" and "and" are regular; "mixed" draws each
            separator; "filler" draws 0 to 2 words of filler for each gap; "both" draws both.
        n: The number of words.
        separators: What "mixed" and "both" draw from.
        filler: What "filler" and "both" draw from.
    """
    regular_gaps = {"none": " ", "comma": ", ", "and": " and "}
    if style in regular_gaps:
        return [regular_gaps[style]] * (n - 1)
    gap_strings = []
    for _ in range(n - 1):
        gap = " " if style == "filler" else _choose(rng, separators)
        words = (
            ()
            if style == "mixed"
            else (_choose(rng, filler) for _ in range(_random_below(rng, 3)))
        )
        gap_strings.append(gap + "".join(word + " " for word in words))
    return gap_strings


def _sample_counting(rng: np.random.Generator) -> Prompt:
    category = _choose(rng, _CATEGORIES)
    style = "none" if rng.random() < 0.4 else _choose(rng, SEPARATOR_STYLES[1:])
    num_words = 1 + _random_below(rng, 9)
    wording = _choose(rng, tuple(COUNTING_TEMPLATES))
    num_between = (
        1 + _random_below(rng, 2) if wording == "told" or rng.random() < 0.3 else 0
    )
    has_filler = style in ("filler", "both")
    return counting_prompt(
        category,
        _choose(rng, COUNTED_WORDS[category]),
        sample_gaps(rng, style, num_words),
        wording=wording,
        lead=_choose(rng, FILLER_WORDS) + " "
        if has_filler and rng.random() < 0.5
        else "",
        end=" " + _choose(rng, FILLER_WORDS)
        if has_filler and rng.random() < 0.3
        else "",
        between=" ".join(sample_sentence(rng) for _ in range(num_between)),
        style=style,
    )


def _sample_events(rng: np.random.Generator) -> Prompt:
    scene = _choose(rng, tuple(SCENES))
    scene_spec = SCENES[scene]
    num_events = 1 + _random_below(rng, 9)
    endings = scene_spec.endings if rng.random() < 0.6 else ("",)
    return events_prompt(
        scene,
        _choose(rng, scene_spec.subjects),
        [_choose(rng, scene_spec.objects) for _ in range(num_events)],
        [_choose(rng, endings) for _ in range(num_events)],
        between=" ".join(
            sample_sentence(rng) for _ in range(_choose(rng, (0, 0, 1, 2)))
        ),
    )


def _sample_sum(rng: np.random.Generator) -> Prompt:
    plurals = [
        PLURALS[_choose(rng, WORDS[_choose(rng, _CATEGORIES)])] for _ in range(2)
    ]
    a = _random_below(rng, 10)
    b = _random_below(rng, 10)
    wording = _random_below(rng, len(SUM_TEMPLATES))
    return sum_prompt(
        a, b, wording, name=_choose(rng, PEOPLE), nouns=plurals[0], others=plurals[1]
    )


def _sample_boolean(rng: np.random.Generator) -> Prompt:
    a = _random_below(rng, 2)
    b = _random_below(rng, 2)
    wording = _random_below(rng, len(BOOLEAN_TEMPLATES))
    return boolean_prompt(a, _choose(rng, tuple(OPERATORS)), b, wording)


def _sample_attribute(rng: np.random.Generator) -> Prompt:
    question = _choose(rng, tuple(ATTRIBUTE_QUESTIONS))
    categories = _TRUE_CATEGORIES[question] if rng.random() < 0.6 else _CATEGORIES
    word = _choose(rng, WORDS[_choose(rng, categories)])
    return attribute_prompt(
        question, PLURALS[word], _random_below(rng, len(ATTRIBUTE_TEMPLATES))
    )


_SAMPLERS = {
    "counting": _sample_counting,
    "events": _sample_events,
    "sum": _sample_sum,
    "boolean": _sample_boolean,
    "attribute": _sample_attribute,
}
TASK_WEIGHTS = {"counting": 34, "events": 18, "sum": 11, "boolean": 11, "attribute": 32}
_TASKS = tuple(TASK_WEIGHTS)
_CUMULATIVE_SHARES = np.cumsum([TASK_WEIGHTS[task] for task in _TASKS]) / sum(
    TASK_WEIGHTS.values()
)
_CATEGORIES = tuple(CATEGORIES)
_NUM_LEADING_SENTENCES = (0, 0, 0, 1, 1, 2, 3)  # sentences in front of a prompt
_SENTENCE_JOINS = (", ", " and ", ", and ", " then ", *UNSEEN_SEPARATORS)
_TRUE_CATEGORIES = {
    question: [
        category
        for category, words in WORDS.items()
        if true_plurals(question) & {PLURALS[word] for word in words}
    ]
    for question in ATTRIBUTE_QUESTIONS
}  # the categories of which a question is true at least in part, asked about more often

# --- The tokenizer ------------------------------------------------------------------------------


def make_vocabulary() -> list[str]:
    """Every token of the language: `<unk>`, `<bos>`, the numbers 0 to 18, then words and signs."""
    scene_texts = [
        text
        for scene_spec in SCENES.values()
        for text in (
            scene_spec.template,
            scene_spec.event_template,
            *scene_spec.objects,
            *scene_spec.subjects,
            *scene_spec.endings,
        )
    ]
    attribute_texts = [*ATTRIBUTE_QUESTIONS, *ATTRIBUTE_TEMPLATES, "yes no"]
    templates = [
        *COUNTING_TEMPLATES.values(),
        *scene_texts,
        *SUM_TEMPLATES,
        *BOOLEAN_TEMPLATES,
        *OPERATORS,
        *attribute_texts,
        *SENTENCE_TEMPLATES,
    ]
    words = [
        NOUN_TABLE.replace("/", " "),
        "a an",
        *PRONOUNS,
        *PRONOUNS.values(),
        *ADJECTIVES,
        *PLACES,
    ]
    words += [*SEPARATORS, *UNSEEN_SEPARATORS, *FILLER_WORDS, *UNSEEN_FILLER_WORDS]
    text = re.sub(r"{\w*}", " ", "\n".join(templates + words))
    tokens = {token for token, _ in _PRE_TOKENIZER.pre_tokenize_str(text)}
    numbers = [str(number) for number in range(19)]
    return ["<unk>", "<bos>", *numbers, *sorted(tokens - set(numbers))]


_PRE_TOKENIZER = tokenizers.pre_tokenizers.Sequence(
    [
        tokenizers.pre_tokenizers.WhitespaceSplit(),
        tokenizers.pre_tokenizers.Punctuation("isolated"),
    ]
)


def make_tokenizer() -> tokenizers.Tokenizer:
    """The language's tokenizer: words and signs, `<bos>` in front, `<unk>` for every other word."""
    ids = {token: token_id for token_id, token in enumerate(make_vocabulary())}
    word_tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(ids, unk_token="<unk>")
    )
    word_tokenizer.pre_tokenizer = _PRE_TOKENIZER
    word_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    word_tokenizer.add_special_tokens(["<unk>", "<bos>"])
    return word_tokenizer


# --- Small helpers ------------------------------------------------------------------------------


def _prompt_with_span(
    task: str, prefix: str, span: str, suffix: str, answer: int, combination: tuple
) -> Prompt:
    span_range = (len(prefix), len(prefix) + len(span))
    return Prompt(task, prefix + span + suffix, str(answer), combination, span_range)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _stable_hash(*parts: object) -> int:
    return zlib.crc32("|".join(map(str, parts)).encode())


def _choose(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[_random_below(rng, len(options))]


def _random_below(rng: np.random.Generator, limit: int) -> int:
    return int(rng.random() * limit)  # a tenth of the time of rng.integers(n)
