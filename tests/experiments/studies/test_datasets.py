"""Data sets of the studies: generated tasks are right, and errors name bad files."""

import collections
import copy
import json
import os
import pathlib

import pytest

import continuous_lm as clm
from continuous_lm.experiments.apples import prompts
from continuous_lm.experiments.apples.language import WORDS
from continuous_lm.experiments.durations import prompt_sweeps
from continuous_lm.experiments.studies import analysis, datasets
from tests.fixtures.programs import call_program

PROGRAM = "study"
PAPER = pathlib.Path(__file__).parents[4] / "shared" / "data" / "paper"


@pytest.fixture(scope="module")
def tasks_by_study():
    return {study: datasets.generate_tasks(study) for study in datasets.STUDIES}


# --- Made of the small language ---------------------------------------------------------------


@pytest.mark.parametrize("study", datasets.STUDIES)
def test_two_hundred_tasks_that_are_always_the_same(tasks_by_study, study):
    tasks = tasks_by_study[study]
    assert len(tasks) == 200
    assert tasks == datasets.generate_tasks(study)
    assert (
        len({(t.prompt, t.character_span, t.phrases) for t in tasks}) > 150
    )  # sums may be alike


def texts(task):
    if task.phrases is None:
        return [task.prompt]
    return [task.prompt.replace(prompt_sweeps.SLOT, phrase) for phrase in task.phrases]


@pytest.mark.parametrize("study", datasets.STUDIES)
def test_the_small_language_spells_every_made_prompt(tasks_by_study, study):
    tokenizer = prompts.make_tokenizer()
    for task in tasks_by_study[study]:
        for text in texts(task):
            clm.tokenization.encode(tokenizer, text)  # raises for words without tokens


@pytest.mark.parametrize("study", datasets.STUDIES)
def test_the_analysis_takes_what_every_made_task_is_about(tasks_by_study, study):
    for task in tasks_by_study[study]:
        analysis.STUDY_SPECS[study].check_fields(task.fields)


def varied(task):
    return task.prompt[slice(*task.character_span)]


def test_counted_words(tasks_by_study):
    for task in tasks_by_study["counting"]:
        word, category, n = (
            task.fields[k] for k in ("word", "category", "repetitions")
        )
        assert varied(task).split() == [word] * n
        assert word in WORDS[category]
        assert (
            f"many times is {task.fields['category_with_article']} mentioned?"
            in task.prompt
        )
    assert {task.fields["repetitions"] for task in tasks_by_study["counting"]} == {
        2,
        3,
        4,
        5,
        6,
    }


def test_counted_steps(tasks_by_study):
    for task in tasks_by_study["tutorials"]:
        assert_steps(task)
    assert {task.fields["num_sentences"] for task in tasks_by_study["tutorials"]} == {
        2,
        3,
        4,
        5,
        6,
        7,
    }


def assert_steps(task):
    """Steps, all of them and nothing else, are what shrinks."""
    steps = varied(task).splitlines()
    assert len(steps) == task.fields["num_sentences"]
    assert all(step.startswith("- ") for step in steps)
    before, after = (
        task.prompt[: task.character_span[0]],
        task.prompt[task.character_span[1] :],
    )
    assert before.endswith("\n")
    assert after.startswith("\n\nQuestion:")
    assert "\n- " not in before[:-1] + after


def assert_number(task):
    """The number that shrinks, and the other beside it, are in the prompt once each."""
    shrunk, other = (
        ("item_1", "item_2") if task.fields["shrink_1"] else ("item_2", "item_1")
    )
    assert varied(task) == str(task.fields[shrunk])
    around = (
        task.prompt[: task.character_span[0]] + task.prompt[task.character_span[1] :]
    )
    assert str(task.fields[other]) in around
    assert "{" not in task.prompt


def test_summed_numbers(tasks_by_study):
    for task in tasks_by_study["sums"]:
        assert_number(task)
        assert {task.fields["item_1"], task.fields["item_2"]} <= set(range(1, 10))
    assert {task.fields["shrink_1"] for task in tasks_by_study["sums"]} == {True, False}


def test_questions_are_true_of_the_words_that_their_kind_names(tasks_by_study):
    kinds = collections.Counter(task.fields["kind"] for task in tasks_by_study["words"])
    assert kinds == dict.fromkeys(datasets.QUESTION_KINDS, 50)
    holds = {"both": (1, 1), "neither": (0, 0), "first": (1, 0), "second": (0, 1)}
    for task in tasks_by_study["words"]:
        true = [
            p in prompts.true_plurals(task.fields["question"]) for p in task.phrases
        ]
        assert tuple(true) == holds[task.fields["kind"]], task
        assert list(task.phrases) == task.fields["options"]
    assert len({task.phrases for task in tasks_by_study["words"]}) == 50


# --- The paper's files ------------------------------------------------------------------------


def paper(study, name):
    path = PAPER / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    tasks = datasets.read_tasks(study, path)
    for task in tasks:
        analysis.STUDY_SPECS[study].check_fields(task.fields)
    return tasks, json.loads(path.read_text(encoding="utf-8"))


def test_words_of_the_paper():
    tasks, records = paper("counting", "words_with_repetitions")
    assert len(tasks) == len(records) == 200
    for task, record in zip(tasks, records, strict=True):
        assert task.fields == record
        assert varied(task) == " ".join([record["word"]] * record["repetitions"])


def test_tutorials_of_the_paper():
    tasks, _ = paper("tutorials", "counting_events_seq")
    assert len(tasks) == 200
    for task in tasks:
        assert_steps(task)


def test_sums_of_the_paper():
    tasks, _ = paper("sums", "sums")
    assert len(tasks) == 200
    for task in tasks:
        assert_number(task)


def test_pairs_of_the_paper():
    tasks, records = paper("words", "embedding_filtered")
    assert len(tasks) == 4 * len(records) >= 200
    for i, task in enumerate(tasks):
        assert list(task.phrases) == records[i // 4]["options"]
        assert (
            task.fields["question"] == records[i // 4]["questions"][task.fields["kind"]]
        )
        assert task.prompt.count(prompt_sweeps.SLOT) == 1


# --- Bad files --------------------------------------------------------------------------------

GOOD = {
    "counting": {
        "word": "apple",
        "category": "fruit",
        "category_with_article": "a fruit",
        "repetitions": 3,
    },
    "tutorials": {
        "sentence": "Tutorial: How to eat - well\n\n- Cook.\n- Eat.\n\nQuestion: How many steps?",
        "num_sentences": 2,
    },
    "sums": {
        "template": "{name} has {item_1} and {item_2}. {name} has ",
        "fields": {"name": "Mia", "item_1": 82, "item_2": 38},
        "shrink_1": False,
    },
    "words": {
        "options": ["cats", "dogs"],
        "questions": {"both": "Are {} pets?", "first": "Do {} purr?"},
    },
}


def store(folder, content):
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_good_records(tmp_path):
    for study, record in GOOD.items():
        assert datasets.read_tasks(study, store(tmp_path, [record])), study
    (tutorial,) = datasets.read_tasks("tutorials", store(tmp_path, [GOOD["tutorials"]]))
    assert_steps(tutorial)  # in spite of the "- " in its title
    (total,) = datasets.read_tasks("sums", store(tmp_path, [GOOD["sums"]]))
    assert total.prompt == "Mia has 82 and 38. Mia has "
    assert varied(total) == "38"


FILES = {
    "not JSON": ("[{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "a number too long to read": ("[" + "1" * 5000 + "]", "not valid JSON"),
    "an object": ({"records": []}, "a JSON list"),
    "an empty list": ([], "a JSON list"),
    "text": ('"records"', "a JSON list"),
    "null": ("null", "a JSON list"),
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_is_no_list_of_records(tmp_path, case):
    content, culprit = FILES[case]
    path = store(tmp_path, content)
    for study in datasets.STUDIES:
        refused(study, path, culprit)


def test_file_that_cannot_be_read(tmp_path):
    refused("sums", tmp_path / "nowhere.json", "cannot be read")
    refused("sums", tmp_path, "cannot be read")
    (tmp_path / "latin.json").write_bytes(b'["\xff"]')
    refused("sums", tmp_path / "latin.json", "not valid JSON")
    os.mkfifo(tmp_path / "pipe.json")  # would be waited for
    refused("sums", tmp_path / "pipe.json", "cannot be read")


def refused(study, path, *culprits):
    with pytest.raises(clm.InputError) as error:
        datasets.read_tasks(study, path)
    for culprit in (str(path), *culprits):
        assert culprit in str(error.value)


# study -> dotted field, its value, and what must be named beside the record.
RECORDS = [
    ("counting", "repetitions", 0, "repetitions"),
    ("counting", "repetitions", 10, "repetitions"),
    ("counting", "repetitions", -1, "repetitions"),
    ("counting", "repetitions", True, "repetitions"),
    ("counting", "repetitions", 3.0, "repetitions"),
    ("counting", "word", "", "word"),
    ("counting", "word", " \n", "word"),
    ("tutorials", "num_sentences", 0, "num_sentences"),
    ("tutorials", "num_sentences", 10, "num_sentences"),
    ("tutorials", "num_sentences", False, "num_sentences"),
    ("tutorials", "sentence", "", "sentence"),
    ("tutorials", "sentence", "- Cook.\n- Eat.", "sentence"),
    ("tutorials", "sentence", "How to eat\n\nQuestion: How many steps?", "sentence"),
    ("tutorials", "sentence", "How to eat - well\n\nQuestion: How many?", "sentence"),
    ("tutorials", "sentence", "How?\n\nQuestion: How many steps?\n- Eat.", "sentence"),
    ("sums", "template", "{item_1} things", "item_2"),
    ("sums", "template", "{item_1}, {item_2}, {item_1}", "item_1"),
    ("sums", "template", "{item_1} {item_2} {nouns}", "nouns"),
    ("sums", "template", "", "template"),
    ("sums", "fields", {}, "item_1"),
    ("sums", "fields.item_1", -1, "item_1"),
    ("sums", "fields.item_2", True, "item_2"),
    ("sums", "fields.item_2", "3", "item_2"),
    ("sums", "fields.item_2", 3.5, "item_2"),
    ("sums", "fields.item_2", None, "item_2"),
    ("sums", "fields.item_2", 10**10, "item_2"),
    ("sums", "shrink_1", 1, "shrink_1"),
    ("words", "options", ["cats"], "options"),
    ("words", "options", [], "options"),
    ("words", "options", ["cats", "dogs", "cows"], "options"),
    ("words", "options", ["cats", ""], "options"),
    ("words", "options", ["cats", 3], "options"),
    ("words", "questions", {}, "questions"),
    ("words", "questions.all", "Are {} pets?", "'all'"),
    ("words", "questions.both", "Are they pets?", "both"),
    ("words", "questions.both", "Are {} like {}?", "both"),
    ("words", "questions.both", None, "both"),
]


@pytest.mark.parametrize(("study", "field", "value", "named"), RECORDS)
def test_record_that_cannot_be_used(tmp_path, study, field, value, named):
    bad = copy.deepcopy(GOOD[study])
    *outer, last = field.split(".")
    (bad[outer[0]] if outer else bad)[last] = value
    refused(study, store(tmp_path, [GOOD[study], bad]), "record 1", named)


@pytest.mark.parametrize(
    ("study", "field"), [(s, name) for s, r in GOOD.items() for name in r]
)
def test_field_that_is_missing_or_of_another_type(tmp_path, study, field):
    less = {name: value for name, value in GOOD[study].items() if name != field}
    refused(study, store(tmp_path, [less]), "record 0", field, "missing")
    for value in (None, {"a": 1} if isinstance(GOOD[study][field], list) else ["a"]):
        refused(study, store(tmp_path, [less | {field: value}]), "record 0", field)


@pytest.mark.parametrize("record", [None, "apple", 3, ["word", "apple"]])
def test_record_that_is_no_object(tmp_path, record):
    for study in datasets.STUDIES:
        refused(study, store(tmp_path, [GOOD[study], record]), "record 1", "object")


# --- Through the program ----------------------------------------------------------------------


def run(cwd, *arguments):
    return call_program(cwd, PROGRAM, *arguments)


@pytest.mark.parametrize(
    ("study", "content", "culprits"),
    [
        ("counting", "[{", ["data.json", "not valid JSON"]),
        ("counting", {}, ["data.json", "a JSON list"]),
        (
            "counting",
            [GOOD["counting"] | {"repetitions": 10}],
            ["record 0", "repetitions"],
        ),
        ("tutorials", [GOOD["tutorials"], {}], ["data.json, record 1", "sentence"]),
        ("sums", [GOOD["counting"]], ["record 0", "template"]),
        ("words", [GOOD["words"], 3], ["record 1", "object"]),
    ],
)
def test_the_program_ends_with_one_line_and_writes_nothing(
    tmp_path, study, content, culprits
):
    path = store(tmp_path, content)
    status, stdout, stderr = run(
        tmp_path, f"--study={study}", f"--data={path}", "--output_dir=out/deep"
    )
    assert status != 0
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for culprit in culprits:
        assert culprit in stderr
    assert list(tmp_path.iterdir()) == [path]
