"""Data sets of the studies: read from files in the paper's format, or made of the small language.

Each record becomes a prompt and what is varied about it (`Task`). Studies and their fields:

    counting   word, category, category_with_article, repetitions
    tutorials  sentence (the whole prompt, its steps as "- ..." lines), num_sentences
    sums       template with {item_1} and {item_2}, fields (their values and others'), shrink_1
    words      options (two words), questions (kind -> a question with {}), four to a record

The made ones are drawn with a fixed seed, and a model of the small language can spell them.
"""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import continuous_lm as clm
from continuous_lm.errors import about
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.apples.language import (
    ATTRIBUTES,
    PEOPLE,
    PLURALS,
    SCENES,
    SUMS,
    WORDS,
)
from continuous_lm.experiments.durations.prompt_sweeps import SLOT
from continuous_lm.io.atomic_files import check_regular

KINDS = ("both", "neither", "first", "second")
LARGEST = 10**9  # number of a sum
_FIELDS: Mapping[str, Mapping[str, type]] = {
    "counting": {
        "word": str, "category": str, "category_with_article": str, "repetitions": int,
    },
    "tutorials": {"sentence": str, "num_sentences": int},
    "sums": {"template": str, "fields": dict, "shrink_1": bool},
    "words": {"options": list, "questions": dict},
}  # fmt: skip
STUDIES = tuple(_FIELDS)


@dataclasses.dataclass(frozen=True)
class Task:
    """What one record asks.

    Attributes:
      prompt: the text; with a slot for the phrases, if there are any.
      about: the record's fields, kept with the results.
      characters: of the prompt that shrink, [begin, end), or
      phrases: that turn into each other.
    """

    prompt: str
    about: Mapping[str, Any]
    characters: tuple[int, int] | None = None
    phrases: tuple[str, str] | None = None


def read(study: str, path: pathlib.Path) -> list[Task]:
    """The tasks of a data file: a JSON list of records.

    Raises:
      clm.InputError: naming the file, the record and the field.
    """
    try:
        check_regular(path)
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise clm.InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise clm.InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise clm.InputError(f"{path} must hold a JSON list of records")
    found = []
    for number, record in enumerate(records):
        with about(f"{path}, record {number}"):
            _check(study, record)
            found += tasks(study, record)
    return found


def made(study: str, count: int = 200) -> list[Task]:
    """The tasks of the data set that is made of the small language."""
    return [task for record in _MADE[study](count) for task in tasks(study, record)]


def tasks(study: str, record: Mapping[str, Any]) -> list[Task]:
    """What a record asks: one task, or one for each of its questions."""
    match study:
        case "counting":
            words = " ".join([record["word"]] * record["repetitions"])
            before = 'Question: In the sentence "'
            after = f'", how many times is {record["category_with_article"]} mentioned?'
            after += " Reply with a single-digit number\nAnswer: "
            kept = {name: record[name] for name in _FIELDS[study]}
            return [Task(before + words + after, kept, (len(before), len(before) + len(words)))]
        case "tutorials":
            text = record["sentence"]
            begin, end = _steps(text)
            return [Task(text, {"num_sentences": record["num_sentences"]}, (begin, end))]
        case "sums":
            return [_sum(record)]
    return [
        Task(
            f"Question: {question.replace('{}', SLOT)} (yes/no)\nAnswer:",
            {"options": record["options"], "kind": kind, "question": question},
            phrases=tuple(record["options"]),
        )
        for kind, question in record["questions"].items()
    ]


def _steps(text: str) -> tuple[int, int]:
    """The lines that begin with "- ", up to the question; (0, 0) where there are none."""
    found = re.search(r"^- .*?(?=\n\nQuestion:)", text, re.DOTALL | re.MULTILINE)
    return found.span() if found else (0, 0)


def _sum(record: Mapping[str, Any]) -> Task:
    fields = {name: str(value) for name, value in record["fields"].items()}
    shrinks = "item_1" if record["shrink_1"] else "item_2"
    pieces = re.split(r"\{(\w+)\}", record["template"])  # text, field, text, ..., text
    text, characters = "", (0, 0)
    for piece, field in itertools.zip_longest(pieces[::2], pieces[1::2]):
        text += piece
        if field == shrinks:
            characters = len(text), len(text) + len(fields[field])
        text += fields.get(field, "")
    about = {name: record["fields"][name] for name in ("item_1", "item_2")}
    return Task(text, {**about, "shrink_1": record["shrink_1"]}, characters)


def _check(study: str, record: Any) -> None:
    """Refuses a record that lacks a field, or has one that cannot be used."""
    if not isinstance(record, dict):
        raise clm.InputError(f"it is {record!r:.40}; it must be an object")
    for name, kind in _FIELDS[study].items():
        if name not in record:
            raise clm.InputError(f"field {name} is missing")
        if type(record[name]) is not kind:
            raise clm.InputError(f"field {name} is {record[name]!r:.60}, no {kind.__name__}")
    fields = record.get("fields", {})
    match study:
        case "counting" if not 1 <= record["repetitions"] <= 9:
            raise clm.InputError(f"field repetitions is {record['repetitions']}; only 1 to 9")
        case "counting" if not record["word"].strip():
            raise clm.InputError("field word is empty")
        case "tutorials" if not 1 <= record["num_sentences"] <= 9:
            raise clm.InputError(f"field num_sentences is {record['num_sentences']}; only 1 to 9")
        case "tutorials" if _steps(record["sentence"]) == (0, 0):
            raise clm.InputError('field sentence has no "- " steps before its question')
        case "sums":
            used = set(re.findall(r"\{(\w+)\}", record["template"]))
            for name in sorted({"item_1", "item_2", *used}):
                if name not in fields or name not in used:
                    where = "fields" if name not in fields else "template"
                    raise clm.InputError(f"field {where} has no {name}")
            for name in ("item_1", "item_2"):
                if type(fields[name]) is not int or not 0 <= fields[name] <= LARGEST:
                    raise clm.InputError(
                        f"field {name} is {fields[name]!r:.40}; it must be a whole number,"
                        f" {LARGEST} at most"
                    )
                if record["template"].count(f"{{{name}}}") > 1:
                    raise clm.InputError(f"field template has {name} more than once")
        case "words":
            options, questions = record["options"], record["questions"]
            if len(options) != 2 or not all(isinstance(o, str) and o for o in options):
                raise clm.InputError(f"field options is {options!r:.60}; it must be two words")
            if not questions:
                raise clm.InputError("field questions is empty")
            for kind, question in questions.items():
                if kind not in KINDS:
                    raise clm.InputError(f"question {kind!r:.40} is of no kind; {', '.join(KINDS)}")
                if not isinstance(question, str) or question.count("{}") != 1:
                    raise clm.InputError(f"question {kind} must hold {{}} once")


# --- Made of the small language ---------------------------------------------------------------


def _counting(count: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    choices = [
        (word, category, n)
        for category, words in WORDS.items()
        for word in words
        for n in range(2, 7)
    ]
    for i in rng.permutation(len(choices))[:count]:
        word, category, n = choices[i]
        article = "an" if category[0] in "aeiou" else "a"
        yield {
            "word": word,
            "category": category,
            "category_with_article": f"{article} {category}",
            "repetitions": n,
        }


def _tutorials(count: int) -> Iterator[dict[str, Any]]:
    rng, scene = np.random.default_rng(1), SCENES["tutorial"]
    for _ in range(count):
        n = int(rng.integers(2, 8))
        steps = [str(step) for step in rng.choice(scene.objects, n, replace=False)]
        prompt = prompts.events("tutorial", str(rng.choice(scene.subjects)), steps)
        yield {"sentence": prompt.text, "num_sentences": n}


def _sums(count: int) -> Iterator[dict[str, Any]]:
    """One-digit sums: the small language has no other."""
    rng = np.random.default_rng(2)
    templates = [t.replace("{a}", "{item_1}").replace("{b}", "{item_2}") for t in SUMS]
    plurals = [PLURALS[word] for words in WORDS.values() for word in words]
    for _ in range(count):
        template = str(rng.choice(templates))
        nouns, others = (str(noun) for noun in rng.choice(plurals, 2, replace=False))
        values = {"name": str(rng.choice(PEOPLE)), "nouns": nouns, "others": others}
        fields: dict[str, Any] = {k: v for k, v in values.items() if f"{{{k}}}" in template}
        first, second = (int(number) for number in rng.integers(1, 10, 2))
        fields |= {"item_1": first, "item_2": second}
        yield {"template": template, "fields": fields, "shrink_1": bool(rng.random() < 0.5)}


def _words(count: int) -> Iterator[dict[str, Any]]:
    """Pairs of words with a question that is true of both, of neither, of either alone."""
    rng = np.random.default_rng(3)
    truths = {question: prompts.true_of(question) for question in ATTRIBUTES}
    plurals = [PLURALS[word] for words in WORDS.values() for word in words]
    pairs = list(itertools.permutations(plurals, 2))
    wanted = {"both": (True, True), "neither": (False, False)}
    wanted |= {"first": (True, False), "second": (False, True)}
    left = count // len(KINDS)
    for i in rng.permutation(len(pairs)):
        first, second = pairs[i]
        asked = {
            kind: [q for q, true in truths.items() if ((first in true), (second in true)) == holds]
            for kind, holds in wanted.items()
        }
        if left and all(asked.values()):
            left -= 1
            questions = {kind: str(rng.choice(options)) for kind, options in asked.items()}
            yield {"options": [first, second], "questions": questions}


_MADE = {"counting": _counting, "tutorials": _tutorials, "sums": _sums, "words": _words}
