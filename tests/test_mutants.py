"""The table of mutants fits the code: each makes one change, and names tests that are there."""

import ast
import json
import re

from tests import mutants

TABLE = mutants.read_table()


def test_there_are_enough_and_no_two_are_alike():
    assert len(TABLE) >= 60
    assert len({mutant.id for mutant in TABLE}) == len(TABLE)
    assert len({(mutant.file, mutant.replacement) for mutant in TABLE}) == len(TABLE)


def statement(source, line):
    """The outermost statement that holds a line, without comments and layout."""
    (actual,) = (
        node
        for node in ast.parse(source).body
        if node.lineno <= line <= node.end_lineno
    )
    return ast.dump(actual)


def test_each_changes_the_program_in_one_place():
    for mutant in TABLE:
        assert "\n" not in mutant.text + mutant.replacement, mutant.id
        source = (mutants.ROOT / mutant.file).read_text()
        created = mutant.made_in(source)
        pairs = enumerate(zip(created, source, strict=False))
        first_difference = next(i for i, (new, old) in pairs if new != old)
        line = source[:first_difference].count("\n") + 1
        assert statement(created, line) != statement(source, line), mutant.id


def test_each_names_tests_that_are_there():
    for mutant in TABLE:
        assert mutant.tests, mutant.id
        for test in mutant.tests:
            file, _, name = test.partition("::")
            text = (mutants.ROOT / file).read_text()
            function = re.escape(name.partition("[")[0])
            assert not name or re.search(rf"^def {function}\(", text, re.MULTILINE), (
                test
            )


def test_the_record_is_of_this_table():
    record = json.loads(mutants.RECORD.read_text())
    assert set(record["survivors"]) <= {mutant.id for mutant in TABLE}
    assert record["killed"] + len(record["survivors"]) == record["of"] == len(TABLE)
