"""The small language of the embedded model: its words, its tasks, its prompts and its tokenizer.

Everything that the model ever reads is made here from the tables below, by a seeded sampler:

    rng = numpy.random.default_rng(0)
    prompt = sample(rng)                        # a Prompt: text, answer, counted span, ...
    prompt = sample(rng, "sum", held_out=True)  # one that training never shows

Tasks (`MIXTURE` says how often training asks each):
    counting   how many times a category is mentioned in a sentence of one repeated word
    events     how many things somebody bought, saw, found, or how many steps a tutorial takes
    sum        the sum of two one-digit numbers; every answer, 0 to 18, is one token
    boolean    AND, OR, NAND, NOR, XOR of two truth values
    attribute  yes/no facts about plurals, true in the tables below

*Held-out combinations.* Each prompt names the combination that it asks about: (word, repetitions,
style of separators) for counting, (scene, subject, repetitions) for events, (fact, wording) for the
rest. A stable hash splits them before training. A fact can't be inferred, so it is held out in one
of its wordings at most: held-out accuracy of facts is about wordings, not about new facts.

*Words for tests.* The last two words of each category, `UNSEEN_SEPARATORS` and `UNSEEN_FILLER` are
in the language, but training never puts them inside a counted span.

Durations are no part of the language: training knows ordinary tokens alone.
"""

import dataclasses
import re
import zlib

import numpy as np
import tokenizers

from continuous_lm.experiments.apples.language import (
    _NOUNS,
    ADJECTIVES,
    ATTRIBUTE_WORDINGS,
    ATTRIBUTES,
    BOOLEANS,
    CATEGORIES,
    COUNTED_WORDS,
    COUNTING,
    FILLER,
    OPERATORS,
    PEOPLE,
    PLACES,
    PLURALS,
    PRONOUNS,
    SCENES,
    SENTENCES,
    SEPARATORS,
    STYLES,
    SUMS,
    UNSEEN_FILLER,
    UNSEEN_SEPARATORS,
    WORDS,
)

# --- Words --------------------------------------------------------------------------------------

# --- Templates ----------------------------------------------------------------------------------

# --- Prompts ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question of the small language.

    Attributes:
        task: Its name, one of `MIXTURE`.
        text: What the model reads. The answer is the next token.
        answer: The answer, one token.
        combination: What is asked, by which training and held-out prompts are split.
        span: The characters [start, end) of `text` that hold what is counted (in a sum, the first
            number), or None.
    """

    task: str
    text: str
    answer: str
    combination: tuple
    span: tuple[int, int] | None = None

    @property
    def held_out(self) -> bool:
        """Whether training never shows this prompt's combination."""
        return held_out(self.task, self.combination)

    def after(self, text: str) -> "Prompt":
        """The same prompt after other text."""
        span = self.span and (self.span[0] + len(text), self.span[1] + len(text))
        return dataclasses.replace(self, text=text + self.text, span=span)


def held_out(task: str, combination: tuple) -> bool:
    """Whether `combination` is kept from training: about one in ten, by a hash of its text.

    The last entry of a fact's combination is its wording's number. A fact is kept from training in
    one wording at most.
    """
    if task in ("counting", "events"):
        return _hash(task, *combination) % 10 == 0
    *fact, wording = combination
    return _hash(task, *fact) % 12 == wording


def counting(
    category: str,
    word: str,
    gaps: list[str],
    *,
    wording="times",
    lead="",
    end="",
    between="",
    style="",
) -> Prompt:
    """Asks how often `category` is mentioned in a sentence of `word` len(gaps) + 1 times.

    Args:
        category: A category, such as "fruit".
        word: The repeated word.
        gaps: What stands between its occurrences, spaces included.
        wording: A key of `COUNTING`; "times" and "listed" are the paper's.
        lead: Text inside the quotes before the words, outside the counted span.
        end: Text inside the quotes after the words, outside the counted span.
        between: Sentences between the quotes and the question's end.
        style: The separators' name in the prompt's combination.
    """
    span = "".join(word + gap for gap in gaps) + word
    before, after = COUNTING[wording].split("{span}")
    fields = dict(
        between=between and between + " ",
        a_category=f"{_article(category)} {category}",
        categories=CATEGORIES.get(category, category + "s"),
    )
    before, after = before.format(**fields) + lead, end + after.format(**fields)
    return _spanned("counting", before, span, after, len(gaps) + 1, (word, len(gaps) + 1, style))


def events(
    scene: str, subject: str, objects: list[str], tails: list[str] | None = None, *, between=""
) -> Prompt:
    """Asks how many events there were: one for each of `objects`, in `SCENES[scene]`.

    Args:
        scene: A key of `SCENES`; shop, zoo and beach are the paper's.
        subject: Who (in a tutorial, its title).
        objects: What each event is about.
        tails: Endings of the events; none by default.
        between: Sentences between the events and the question.
    """
    told = SCENES[scene]
    they = PRONOUNS.get(subject, "")
    span = told.separator.join(
        told.event.format(they=they, object=thing, tail=tail)
        for thing, tail in zip(objects, tails or [""] * len(objects), strict=True)
    )
    before, after = told.template.split("{span}")
    fields = dict(name=subject, between=between and between + " ")
    combination = (scene, subject, len(objects))
    return _spanned(
        "events", before.format(**fields), span, after.format(**fields), len(objects), combination
    )


def total(
    a: int, b: int, wording: int = 0, *, name="Alice", nouns="apples", others="pears"
) -> Prompt:
    """Asks for a + b; wording 0 is the paper's."""
    before, after = SUMS[wording].split("{a}")
    fields = dict(a=a, b=b, name=name, nouns=nouns, others=others)
    return _spanned(
        "sum", before.format(**fields), str(a), after.format(**fields), a + b, (a, b, wording)
    )


def boolean(a: int, operator: str, b: int, wording: int = 0) -> Prompt:
    """Asks for the truth value of `a operator b`; wording 0 is the paper's."""
    text = BOOLEANS[wording].format(a=a, op=operator, b=b)
    return Prompt("boolean", text, str(OPERATORS[operator](a, b)), (a, operator, b, wording))


def attribute(question: str, plural: str, wording: int = 0) -> Prompt:
    """Asks a yes/no question of `ATTRIBUTES` about a plural; wording 0 is the paper's."""
    text = ATTRIBUTE_WORDINGS[wording].format(question=question.format(plural))
    answer = "yes" if plural in true_of(question) else "no"
    return Prompt("attribute", text, answer, (question, plural, wording))


def true_of(question: str) -> frozenset[str]:
    """The plurals of which a question of `ATTRIBUTES` is true."""
    plurals = {CATEGORIES[c]: [PLURALS[w] for w in words] for c, words in WORDS.items()}
    return frozenset(p for name in ATTRIBUTES[question].split() for p in plurals.get(name, [name]))


# --- The sampler --------------------------------------------------------------------------------


def sample(rng: np.random.Generator, task: str | None = None, held_out: bool = False) -> Prompt:
    """Draws a prompt.

    Args:
        rng: The source of chance; the same state gives the same prompt.
        task: A task of `MIXTURE`; drawn from the mixture by default.
        held_out: Whether to draw from the combinations that are kept from training (True) or from
            those that training shows (False).
    """
    if task is None:
        task = _TASKS[np.searchsorted(_SHARES, rng.random(), side="right")]
    while True:
        prompt = _SAMPLERS[task](rng)
        if prompt.held_out == held_out:
            return prompt.after("".join(sentence(rng) + " " for _ in range(_pick(rng, _FRONT))))


def sentence(rng: np.random.Generator) -> str:
    """Draws a sentence of filler."""
    nouns = [_pick(rng, WORDS[_pick(rng, _CATEGORIES)]) for _ in range(2)]
    return _pick(rng, SENTENCES).format(
        name=_pick(rng, PEOPLE),
        friend=_pick(rng, PEOPLE),
        adjective=_pick(rng, ADJECTIVES),
        also=_pick(rng, ADJECTIVES),
        join=_pick(rng, _JOINS),
        place=_pick(rng, PLACES),
        digit=_below(rng, 10),
        noun=nouns[0],
        nouns=PLURALS[nouns[0]],
        others=PLURALS[nouns[1]],
    )


def gaps(
    rng: np.random.Generator, style: str, n: int, separators=SEPARATORS, filler=FILLER
) -> list[str]:
    """Draws what stands between `n` words: n - 1 strings, spaces included.

    Args:
        rng: The source of chance.
        style: One of `STYLES`: "none", "comma" and "and" are regular; "mixed" draws each separator;
            "filler" draws 0 to 2 words of filler for each gap; "both" draws both.
        n: The number of words.
        separators: What "mixed" and "both" draw from.
        filler: What "filler" and "both" draw from.
    """
    regular = {"none": " ", "comma": ", ", "and": " and "}
    if style in regular:
        return [regular[style]] * (n - 1)
    drawn = []
    for _ in range(n - 1):
        gap = " " if style == "filler" else _pick(rng, separators)
        words = () if style == "mixed" else (_pick(rng, filler) for _ in range(_below(rng, 3)))
        drawn.append(gap + "".join(word + " " for word in words))
    return drawn


def _sample_counting(rng):
    category = _pick(rng, _CATEGORIES)
    style = "none" if rng.random() < 0.4 else _pick(rng, STYLES[1:])
    n = 1 + _below(rng, 9)
    wording = _pick(rng, tuple(COUNTING))
    between = 1 + _below(rng, 2) if wording == "told" or rng.random() < 0.3 else 0
    ragged = style in ("filler", "both")
    return counting(
        category,
        _pick(rng, COUNTED_WORDS[category]),
        gaps(rng, style, n),
        wording=wording,
        lead=_pick(rng, FILLER) + " " if ragged and rng.random() < 0.5 else "",
        end=" " + _pick(rng, FILLER) if ragged and rng.random() < 0.3 else "",
        between=" ".join(sentence(rng) for _ in range(between)),
        style=style,
    )


def _sample_events(rng):
    scene = _pick(rng, tuple(SCENES))
    told, n = SCENES[scene], 1 + _below(rng, 9)
    tails = told.tails if rng.random() < 0.6 else ("",)
    return events(
        scene,
        _pick(rng, told.subjects),
        [_pick(rng, told.objects) for _ in range(n)],
        [_pick(rng, tails) for _ in range(n)],
        between=" ".join(sentence(rng) for _ in range(_pick(rng, (0, 0, 1, 2)))),
    )


def _sample_sum(rng):
    plurals = [PLURALS[_pick(rng, WORDS[_pick(rng, _CATEGORIES)])] for _ in range(2)]
    a, b, wording = (_below(rng, k) for k in (10, 10, len(SUMS)))
    return total(a, b, wording, name=_pick(rng, PEOPLE), nouns=plurals[0], others=plurals[1])


def _sample_boolean(rng):
    a, b, wording = (_below(rng, k) for k in (2, 2, len(BOOLEANS)))
    return boolean(a, _pick(rng, tuple(OPERATORS)), b, wording)


def _sample_attribute(rng):
    question = _pick(rng, tuple(ATTRIBUTES))
    categories = _TELLING[question] if rng.random() < 0.6 else _CATEGORIES
    word = _pick(rng, WORDS[_pick(rng, categories)])
    return attribute(question, PLURALS[word], _below(rng, len(ATTRIBUTE_WORDINGS)))


_SAMPLERS = {
    "counting": _sample_counting,
    "events": _sample_events,
    "sum": _sample_sum,
    "boolean": _sample_boolean,
    "attribute": _sample_attribute,
}
MIXTURE = {"counting": 34, "events": 18, "sum": 11, "boolean": 11, "attribute": 32}
_TASKS = tuple(MIXTURE)
_SHARES = np.cumsum([MIXTURE[task] for task in _TASKS]) / sum(MIXTURE.values())
_CATEGORIES = tuple(CATEGORIES)
_FRONT = (0, 0, 0, 1, 1, 2, 3)  # sentences in front of a prompt
_JOINS = (", ", " and ", ", and ", " then ", *UNSEEN_SEPARATORS)
_TELLING = {
    question: [
        category
        for category, words in WORDS.items()
        if true_of(question) & {PLURALS[word] for word in words}
    ]
    for question in ATTRIBUTES
}  # the categories of which a question is true at least in part, asked about more often

# --- The tokenizer ------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every token of the language: `<unk>`, `<bos>`, the numbers 0 to 18, then words and signs."""
    scenes = [
        text
        for s in SCENES.values()
        for text in (s.template, s.event, *s.objects, *s.subjects, *s.tails)
    ]
    facts = [*ATTRIBUTES, *ATTRIBUTE_WORDINGS, "yes no"]
    templates = [*COUNTING.values(), *scenes, *SUMS, *BOOLEANS, *OPERATORS, *facts, *SENTENCES]
    words = [_NOUNS.replace("/", " "), "a an", *PRONOUNS, *PRONOUNS.values(), *ADJECTIVES, *PLACES]
    words += [*SEPARATORS, *UNSEEN_SEPARATORS, *FILLER, *UNSEEN_FILLER]
    text = re.sub(r"{\w*}", " ", "\n".join(templates + words))
    tokens = {token for token, _ in _PRE_TOKENIZER.pre_tokenize_str(text)}
    numbers = [str(number) for number in range(19)]
    return ["<unk>", "<bos>", *numbers, *sorted(tokens - set(numbers))]


_PRE_TOKENIZER = tokenizers.pre_tokenizers.Sequence(
    [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation("isolated")]
)


def tokenizer() -> tokenizers.Tokenizer:
    """The language's tokenizer: words and signs, `<bos>` in front, `<unk>` for every other word."""
    ids = {token: number for number, token in enumerate(vocabulary())}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = _PRE_TOKENIZER
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    words.add_special_tokens(["<unk>", "<bos>"])
    return words


# --- Small helpers ------------------------------------------------------------------------------


def _spanned(task, before, span, after, answer, combination) -> Prompt:
    place = (len(before), len(before) + len(span))
    return Prompt(task, before + span + after, str(answer), combination, place)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _hash(*parts) -> int:
    return zlib.crc32("|".join(map(str, parts)).encode())


def _pick(rng: np.random.Generator, options):
    return options[_below(rng, len(options))]


def _below(rng: np.random.Generator, n: int) -> int:
    return int(rng.random() * n)  # a tenth of the time of rng.integers(n)
