"""The frame of programs: flags from a Config's fields, each program in a namespace of its own."""

import dataclasses
import json
import subprocess
import sys
from typing import Literal

import pytest
from absl import flags

from continuous_lm.errors import InputError
from continuous_lm.experiments import PROGRAMS
from continuous_lm.experiments.common import program
from continuous_lm.experiments.durations import counting, inverse
from continuous_lm.experiments.studies import study
from tests.fixtures.programs import ENVIRONMENT, call_program, import_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(program.CheckedConfig):
    """Flags of a part."""

    steps: int = program.flag(5, help="Number of steps.", lower_bound=1)
    rate: float = program.flag(0.5, help="Rate of learning.", upper_bound=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(program.RunConfig):
    """Flags of an example."""

    word: str = program.flag("apple", help="A word to repeat.")
    count: int | None = program.flag(None, help="Number of words.", lower_bound=0)
    loud: bool = program.flag(False, help="Print in capitals.")
    kind: Literal["both", "mass"] = program.flag("both", help="Kind of change.")
    names: tuple[str, ...] = program.flag(("a", "b"), help="Names of things.")
    sizes: tuple[int, ...] | None = program.flag(None, help="Sizes of things.")
    texts: tuple[str, ...] = program.flag((), help="Texts to read.", repeated=True)
    cases: tuple[str, ...] = program.flag(
        (), help="Cases to run.", choices=["one", "two"]
    )
    part: Part = Part(steps=7)


def parsed(*arguments):
    return program.parse(Config, "example", arguments)


def test_flags_that_are_not_given_are_the_defaults_of_the_fields():
    expected = dataclasses.replace(Config(), output_dir="results/example")
    assert parsed() == expected
    assert parsed().part == Part(steps=7)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--word=pear"], "word", "pear"),
        (["--word", "a b"], "word", "a b"),
        (["--count=3"], "count", 3),
        (["--loud"], "loud", True),
        (["--noloud"], "loud", False),
        (["--kind=mass"], "kind", "mass"),
        (["--names=x,y,z"], "names", ("x", "y", "z")),
        (["--names="], "names", ()),
        (["--sizes=1,20"], "sizes", (1, 20)),
        (["--texts=a, b", "--texts=c"], "texts", ("a, b", "c")),
        (["--cases=two,one"], "cases", ("two", "one")),
        (["--steps=2", "--rate=1"], "part", Part(steps=2, rate=1.0)),
        (["--rate=0.25"], "part", Part(steps=7, rate=0.25)),
        (["--output_dir=here"], "output_dir", "here"),
    ],
)
def test_the_kind_of_a_flag_is_that_of_its_field(arguments, name, value):
    assert getattr(parsed(*arguments), name) == value


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--count=-1", "count"),
        ("--count=x", "count"),
        ("--count=1.5", "count"),
        ("--kind=times", "value should be one of <both|mass>"),
        ("--sizes=1,x", "--sizes is 1,x; each part must be an integer"),
        ("--cases=one,three", "--cases is 'three'; it must be of one, two"),
        ("--steps=0", "steps"),
        ("--rate=2", "rate"),
        ("--rate=nan", "rate"),
        ("--wordd=x", "Unknown command line flag 'wordd'. Did you mean: word"),
        ("word", "'word' is not a flag"),
    ],
)
def test_what_cannot_be_read_is_named(argument, message):
    with pytest.raises(InputError) as refused:
        parsed(argument)
    assert message in str(refused.value)


def test_values_are_checked_where_a_config_is_made():
    assert Config(names=["x"], sizes=[1]).names == ("x",)
    assert Config(part=Part(rate=1)).part.rate == 1.0
    with pytest.raises(InputError, match="--steps is 0; it must be at least 1"):
        Part(steps=0)
    with pytest.raises(InputError, match="--names is 'x'; it must be a list"):
        Config(names="x")
    with pytest.raises(InputError, match="--loud is 1; it must be a boolean"):
        Config(loud=1)


def test_a_record_holds_every_flag_of_the_config():
    config = Config(word="pear", texts=("a", "b"), part=Part(rate=0.1))
    run_record = program.record(config)
    assert run_record["flags"] == {
        "cases": [],
        "compilation_cache": None,
        "count": None,
        "kind": "both",
        "loud": False,
        "names": ["a", "b"],
        "output_dir": None,
        "rate": 0.1,
        "sizes": None,
        "steps": 5,
        "texts": ["a", "b"],
        "word": "pear",
    }
    assert run_record["num_processes"] == 1
    assert json.loads(json.dumps(run_record)) == run_record


def test_help_lists_the_flags_of_the_program_alone(tmp_path):
    text = program.help_text(Config, "example")
    assert "Flags of an example:" in text
    assert text.index("Flags of an example:") < text.index("Flags of every program:")
    assert "Flags of a part:" in text
    assert "(default: '7')" in text
    assert "--mesh" not in text
    for arguments in (["--help"], ["--points=x", "-h"]):
        status, stdout, _ = call_program(tmp_path, "counting", *arguments)
        assert status == 0
        assert "--repetitions" in stdout
        assert "Counting: as repeated words last less" in stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_has_a_config_with_a_help_for_each_flag(name):
    module = import_program(name)
    text = program.help_text(module.Config, name)
    assert (module.__doc__ or "").splitlines()[0] in text
    for field, _ in program._all_flags(module.Config):
        assert f"--{field.name}:" in text or f"--[no]{field.name}:" in text
        assert len(field.description.help.split()) >= 2, field.name
    module.Config()


def test_programs_with_flags_of_the_same_name_live_in_one_process(tmp_path):
    """`seed`, `span`, `prompt` and `steps` are of several programs, and none is a global flag."""
    before = set(flags.FLAGS)
    one = program.parse(inverse.Config, "inverse", ["--span=apple", "--seed=3"])
    other = program.parse(counting.Config, "counting", ["--span=x", "--prompt=x"])
    assert (one.span, other.span) == ("apple", "x")
    assert one.prompt != other.prompt
    for name in ("counting", "study"):
        arguments = ["--points=2", "--batch_size=2", f"--output_dir={name}"]
        extra = ["--limit=1"] if name == "study" else ["--repetitions=2"]
        status, _, stderr = call_program(tmp_path, name, *arguments, *extra)
        assert status == 0, stderr
    assert set(flags.FLAGS) == before


def test_a_config_in_process_and_the_command_line_give_the_same(tmp_path):
    values = {"points": 3, "word": "cat", "output_dir": tmp_path / "one"}
    result = counting.run(counting.Config(**values))
    arguments = ["--points=3", "--word=cat", "--output_dir=two"]
    status, stdout, _ = call_program(tmp_path, "counting", *arguments)
    assert status == 0
    assert stdout == f"{result.summary()}\n\nResults: two\n"
    one, two = (
        json.loads((tmp_path / name / "counting.json").read_text())
        for name in ("one", "two")
    )
    assert one["curves"] == two["curves"] == result.curves.as_json()
    assert one["run"]["flags"].keys() == two["run"]["flags"].keys()


def test_the_default_folder_is_that_of_the_program():
    assert program.parse(study.Config, "study", ["--study=sums"]).output_dir == (
        "results/study/sums"
    )
    assert counting.Config().output_dir is None


NOTEBOOK = """
from continuous_lm.experiments.durations import counting
result = counting.run(counting.Config(points=8))
print([answer_range.answer for answer_range in result.curves.ranges])
"""


@pytest.mark.slow
def test_a_notebook_runs_a_program(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "['1', '2', '3', '4']\n", ended.stderr
    assert not list(tmp_path.iterdir())


def test_flags_are_finite():
    with pytest.raises(InputError, match="--margin is inf; it must be fin"):
        program.parse(inverse.Config, "inverse", ["--margin=inf"])
