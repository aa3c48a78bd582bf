"""Recipes: their steps fit together, and those that are done are skipped."""

import importlib
import os
import pathlib

import pytest

import continuous_lm as clm
from continuous_lm.experiments import PROGRAMS
from continuous_lm.experiments.common import program
from continuous_lm.experiments.durations import counting
from continuous_lm.experiments.recipes import recipe, steps

FOLDER = pathlib.Path("somewhere")
INPUT_FLAGS = ("model", "models", "codec", "tokenizer", "table_from", "trunk")


def make_recipe(name, folder=FOLDER):
    return recipe.RECIPES[name](steps.Settings(folder, ("text.txt",)))


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_steps_are_programs_that_read_what_earlier_steps_wrote(name):
    written = []
    for step in make_recipe(name).steps:
        module = importlib.import_module(
            f"continuous_lm.experiments.{PROGRAMS[step.program].module}"
        )
        assert type(step.config) is module.Config
        values = program.flag_values(step.config)
        for flag in INPUT_FLAGS:
            value = values.get(flag)
            for folder in value if isinstance(value, list) else [value]:
                assert folder is None or pathlib.Path(folder) in written, step
        assert values.get("data", ["text.txt"]) == ["text.txt"]
        assert step.folder not in written
        assert step.folder == FOLDER or FOLDER in step.folder.parents
        written.append(step.folder)
    assert len(written) >= 4


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_each_says_command_time_and_numbers(name):
    text = importlib.import_module(f"continuous_lm.experiments.recipes.{name}").__doc__
    assert f"recipe --name={name} " in text
    assert "Time: " in text
    assert "Expected" in text or "Numbers: none" in text
    target = text.split("make ")[1].split()[0]
    makefile = pathlib.Path(__file__).parents[3] / "Makefile"
    assert f"\n{target}: $(VENV)" in makefile.read_text()


def run(folder, data, **flags):
    """Runs two steps; for each whether it was skipped."""
    configs = [
        counting.Config(points=2, output_dir=str(folder / "a"), **flags),
        counting.Config(points=3, output_dir=str(folder / "b")),
    ]
    all_steps = [steps.Step("counting", config) for config in configs]
    return [outcome.was_skipped for outcome in steps.run_steps(all_steps, data)]


@pytest.mark.slow
def test_steps_that_are_done_are_skipped(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    os.utime(text, (1e9, 1e9))
    assert run(tmp_path, [text]) == [False, False]
    capsys.readouterr()
    assert run(tmp_path, [text]) == [True, True]
    assert capsys.readouterr().out.count("skipped, its results are there") == 2
    # Other flags, and with them all later steps.
    assert run(tmp_path, [text], repetitions=3) == [False, False]
    assert run(tmp_path, [text], repetitions=3) == [True, True]
    (tmp_path / "b" / "counting.json").unlink()
    assert run(tmp_path, [text], repetitions=3) == [True, False]
    os.utime(text)  # another text
    os.utime(tmp_path / "a" / "counting.json", (1e9, 1e9))
    assert run(tmp_path, [text], repetitions=3) == [False, False]


def test_a_step_that_fails_ends_the_recipe(tmp_path, monkeypatch):
    """And nothing is installed."""

    class Failure(program.Result):
        exit_status = 1

    monkeypatch.setattr(counting, "run", lambda config: Failure())
    all_steps = [
        steps.Step("counting", counting.Config(output_dir=str(tmp_path / name)))
        for name in "ab"
    ]

    def finish():
        raise AssertionError

    monkeypatch.setitem(
        recipe.RECIPES, "calm", lambda settings: steps.Recipe(all_steps, finish)
    )
    result = recipe.run(recipe.Config(name="calm", output_dir=str(tmp_path)))
    assert len(result.outcomes) == 1
    assert result.exit_status == 1
    assert "counting ended the recipe" in result.summary()


def test_an_error_names_the_step(tmp_path):
    config = counting.Config(model="nowhere", output_dir=str(tmp_path / "a"))
    with pytest.raises(clm.InputError, match=r"counting: .*nowhere"):
        list(steps.run_steps([steps.Step("counting", config)], []))


def test_the_name_of_a_recipe_is_needed():
    with pytest.raises(clm.InputError, match="--name is missing: one of calm"):
        recipe.run(recipe.Config())
    with pytest.raises(clm.InputError, match="--output_dir is missing"):
        recipe.run(recipe.Config(name="calm"))
    config = program.parse(recipe.Config, "recipe", ["--name=calm"])
    assert config.output_dir == "results/calm"
    with pytest.raises(clm.InputError, match="--name is 'calms'"):
        recipe.Config(name="calms")
