"""Data sets of the studies: from files in the paper's format, or made from the small language.

Each record becomes one or more tasks: a prompt and the change of its inputs (`Task`). Studies and
their fields:

    counting   word, category, category_with_article, repetitions
    tutorials  sentence (the whole prompt, its steps as "- ..." lines), num_sentences
    sums       template with {item_1} and {item_2}, fields (their values and others'), shrink_1
    words      options (two words), questions (kind -> a question with {}), four to a record

Data sets from the small language have a fixed seed, and its models have all their words.
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
    ATTRIBUTE_QUESTIONS,
    PEOPLE,
    PLURALS,
    SCENES,
    SUM_TEMPLATES,
    WORDS,
)
from continuous_lm.experiments.durations.prompt_sweeps import SLOT
from continuous_lm.io.atomic_files import check_regular_file

QUESTION_KINDS = ("both", "neither", "first", "second")
MAX_ADDEND = 10**9  # of a sum
_RECORD_FIELDS: Mapping[str, Mapping[str, type]] = {
    "counting": {
        "word": str, "category": str, "category_with_article": str, "repetitions": int,
    },
    "tutorials": {"sentence": str, "num_sentences": int},
    "sums": {"template": str, "fields": dict, "shrink_1": bool},
    "words": {"options": list, "questions": dict},
}  # fmt: skip
STUDIES = tuple(_RECORD_FIELDS)


@dataclasses.dataclass(frozen=True)
class Task:
    """One prompt of a record, and the change of its inputs.

    Attributes:
      prompt: the text, with a slot for the phrases if there are any.
      fields: the record's fields, stored with the results.
      character_span: characters [begin, end) of the prompt that shrink; None with `phrases`.
      phrases: the two phrases to interpolate between; None with `character_span`.
    """

    prompt: str
    fields: Mapping[str, Any]
    character_span: tuple[int, int] | None = None
    phrases: tuple[str, str] | None = None


def read_tasks(study: str, path: pathlib.Path) -> list[Task]:
    """The tasks of a data file: a JSON list of records.

    Raises:
      clm.InputError: naming the file, the record and the field.
    """
    try:
        check_regular_file(path)
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise clm.InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise clm.InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise clm.InputError(f"{path} must hold a JSON list of records")
    tasks_in_file = []
    for record_index, record in enumerate(records):
        with about(f"{path}, record {record_index}"):
            _check_record(study, record)
            tasks_in_file += make_tasks(study, record)
    return tasks_in_file


def generate_tasks(study: str, num_records: int = 200) -> list[Task]:
    """The tasks of the data set that is made of the small language."""
    return [
        task
        for record in _RECORD_GENERATORS[study](num_records)
        for task in make_tasks(study, record)
    ]


def make_tasks(study: str, record: Mapping[str, Any]) -> list[Task]:
    """Make the tasks of a record: one, or one for each of its questions."""
    match study:
        case "counting":
            words = " ".join([record["word"]] * record["repetitions"])
            prefix = 'Question: In the sentence "'
            suffix = (
                f'", how many times is {record["category_with_article"]} mentioned?'
            )
            suffix += " Reply with a single-digit number\nAnswer: "
            kept_fields = {name: record[name] for name in _RECORD_FIELDS[study]}
            return [
                Task(
                    prefix + words + suffix,
                    kept_fields,
                    (len(prefix), len(prefix) + len(words)),
                )
            ]
        case "tutorials":
            text = record["sentence"]
            begin, end = _find_steps(text)
            return [
                Task(text, {"num_sentences": record["num_sentences"]}, (begin, end))
            ]
        case "sums":
            return [_make_sum_task(record)]
    return [
        Task(
            f"Question: {question.replace('{}', SLOT)} (yes/no)\nAnswer:",
            {"options": record["options"], "kind": kind, "question": question},
            phrases=tuple(record["options"]),
        )
        for kind, question in record["questions"].items()
    ]


def _find_steps(text: str) -> tuple[int, int]:
    """The lines that begin with "- ", up to the question; (0, 0) where there are none."""
    steps_match = re.search(r"^- .*?(?=\n\nQuestion:)", text, re.DOTALL | re.MULTILINE)
    return steps_match.span() if steps_match else (0, 0)


def _make_sum_task(record: Mapping[str, Any]) -> Task:
    fields = {name: str(value) for name, value in record["fields"].items()}
    shrinking_field = "item_1" if record["shrink_1"] else "item_2"
    template_parts = re.split(
        r"\{(\w+)\}", record["template"]
    )  # text, field, text, ..., text
    text, character_span = "", (0, 0)
    for template_part, field in itertools.zip_longest(
        template_parts[::2], template_parts[1::2]
    ):
        text += template_part
        if field == shrinking_field:
            character_span = len(text), len(text) + len(fields[field])
        text += fields.get(field, "")
    kept_fields = {name: record["fields"][name] for name in ("item_1", "item_2")}
    return Task(text, {**kept_fields, "shrink_1": record["shrink_1"]}, character_span)


def _check_record(study: str, record: Any) -> None:
    """Raise InputError for a record with a missing or invalid field."""
    if not isinstance(record, dict):
        raise clm.InputError(f"it is {record!r:.40}; it must be an object")
    for name, expected_type in _RECORD_FIELDS[study].items():
        if name not in record:
            raise clm.InputError(f"field {name} is missing")
        if type(record[name]) is not expected_type:
            raise clm.InputError(
                f"field {name} is {record[name]!r:.60}, no {expected_type.__name__}"
            )
    _RECORD_CHECKS[study](record)


def _check_counting(record: Mapping[str, Any]) -> None:
    _check_count(record, "repetitions")
    if not record["word"].strip():
        raise clm.InputError("field word is empty")


def _check_tutorial(record: Mapping[str, Any]) -> None:
    _check_count(record, "num_sentences")
    if _find_steps(record["sentence"]) == (0, 0):
        raise clm.InputError('field sentence has no "- " steps before its question')


def _check_count(record: Mapping[str, Any], name: str) -> None:
    """A count that one digit can answer."""
    if not 1 <= record[name] <= 9:
        raise clm.InputError(f"field {name} is {record[name]}; only 1 to 9")


def _check_sum(record: Mapping[str, Any]) -> None:
    fields = record["fields"]
    template_fields = set(re.findall(r"\{(\w+)\}", record["template"]))
    for name in sorted({"item_1", "item_2", *template_fields}):
        if name not in fields or name not in template_fields:
            incomplete_field = "fields" if name not in fields else "template"
            raise clm.InputError(f"field {incomplete_field} has no {name}")
    for name in ("item_1", "item_2"):
        if type(fields[name]) is not int or not 0 <= fields[name] <= MAX_ADDEND:
            raise clm.InputError(
                f"field {name} is {fields[name]!r:.40}; it must be a whole number,"
                f" {MAX_ADDEND} at most"
            )
        if record["template"].count(f"{{{name}}}") > 1:
            raise clm.InputError(f"field template has {name} more than once")


def _check_words(record: Mapping[str, Any]) -> None:
    options = record["options"]
    if len(options) != 2 or not all(isinstance(word, str) and word for word in options):
        raise clm.InputError(f"field options is {options!r:.60}; it must be two words")
    if not record["questions"]:
        raise clm.InputError("field questions is empty")
    for kind, question in record["questions"].items():
        if kind not in QUESTION_KINDS:
            raise clm.InputError(
                f"question {kind!r:.40} is of no kind; {', '.join(QUESTION_KINDS)}"
            )
        if not isinstance(question, str) or question.count("{}") != 1:
            raise clm.InputError(f"question {kind} must hold {{}} once")


_RECORD_CHECKS = {
    "counting": _check_counting,
    "tutorials": _check_tutorial,
    "sums": _check_sum,
    "words": _check_words,
}


# --- Made of the small language ---------------------------------------------------------------


def _generate_counting(num_records: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    choices = [
        (word, category, repetitions)
        for category, words in WORDS.items()
        for word in words
        for repetitions in range(2, 7)
    ]
    for i in rng.permutation(len(choices))[:num_records]:
        word, category, repetitions = choices[i]
        article = "an" if category[0] in "aeiou" else "a"
        yield {
            "word": word,
            "category": category,
            "category_with_article": f"{article} {category}",
            "repetitions": repetitions,
        }


def _generate_tutorials(num_records: int) -> Iterator[dict[str, Any]]:
    rng, scene = np.random.default_rng(1), SCENES["tutorial"]
    for _ in range(num_records):
        num_steps = int(rng.integers(2, 8))
        steps = [
            str(step) for step in rng.choice(scene.objects, num_steps, replace=False)
        ]
        prompt = prompts.events_prompt(
            "tutorial", str(rng.choice(scene.subjects)), steps
        )
        yield {"sentence": prompt.text, "num_sentences": num_steps}


def _generate_sums(num_records: int) -> Iterator[dict[str, Any]]:
    """One-digit sums: the small language has no other."""
    rng = np.random.default_rng(2)
    templates = [
        t.replace("{a}", "{item_1}").replace("{b}", "{item_2}") for t in SUM_TEMPLATES
    ]
    plurals = [PLURALS[word] for words in WORDS.values() for word in words]
    for _ in range(num_records):
        template = str(rng.choice(templates))
        nouns, others = rng.choice(plurals, 2, replace=False).tolist()
        values = {"name": str(rng.choice(PEOPLE)), "nouns": nouns, "others": others}
        fields: dict[str, Any] = {
            k: v for k, v in values.items() if f"{{{k}}}" in template
        }
        first, second = rng.integers(1, 10, 2).tolist()
        fields |= {"item_1": first, "item_2": second}
        yield {
            "template": template,
            "fields": fields,
            "shrink_1": bool(rng.random() < 0.5),
        }


def _generate_words(num_records: int) -> Iterator[dict[str, Any]]:
    """Pairs of words with a question that is true of both, of neither, of either alone."""
    rng = np.random.default_rng(3)
    plurals_by_question = {
        question: prompts.true_plurals(question) for question in ATTRIBUTE_QUESTIONS
    }
    plurals = [PLURALS[word] for words in WORDS.values() for word in words]
    pairs = list(itertools.permutations(plurals, 2))
    truths_by_kind = {"both": (True, True), "neither": (False, False)}
    truths_by_kind |= {"first": (True, False), "second": (False, True)}
    num_remaining = num_records // len(QUESTION_KINDS)
    for i in rng.permutation(len(pairs)):
        first, second = pairs[i]
        questions_by_kind = {
            kind: [
                q
                for q, true_plurals in plurals_by_question.items()
                if ((first in true_plurals), (second in true_plurals))
                == required_truths
            ]
            for kind, required_truths in truths_by_kind.items()
        }
        if num_remaining and all(questions_by_kind.values()):
            num_remaining -= 1
            questions = {
                kind: str(rng.choice(kind_questions))
                for kind, kind_questions in questions_by_kind.items()
            }
            yield {"options": [first, second], "questions": questions}


_RECORD_GENERATORS = {
    "counting": _generate_counting,
    "tutorials": _generate_tutorials,
    "sums": _generate_sums,
    "words": _generate_words,
}
