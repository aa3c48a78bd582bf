"""The GPU check on a CPU: all rows appear, and failed, hanging or crashed checks are reported."""

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.analysis import sweep
from continuous_lm.experiments.gpu import (
    attention_checks,
    gpu_check,
    isolated_checks,
    model_checks,
)
from continuous_lm.experiments.gpu.attention_checks import (
    CASES,
    FORMS,
    TINY_SIZES,
    Form,
    Options,
)
from continuous_lm.experiments.gpu.isolated_checks import FAILED, OK, UNSUPPORTED, Check
from continuous_lm.models import generation
from tests.continuous_lm.attention.test_pallas import gpu
from tests.fixtures.programs import ENVIRONMENT, REPOSITORY_ROOT, run_program

PROGRAM = "gpu_check"

# --- The program ----------------------------------------------------------------------------------

FIRST, OTHERS = ("attention", "generation"), ("sweep", "training", "benchmark")
ROWS = {  # what each section's rows begin with
    "attention": [
        *(f"{form}: " for form in FORMS if form != "auto"),
        "furthest from each other: ",
        *(
            f"{form}, 32 tokens, "
            for form in ("pallas", "cudnn", "blocked")
            for _ in range(2)
        ),
    ],
    "sweep": [
        *["apples, float32: "] * 3,
        *["apples, bfloat16: "] * 2,
        "seconds of 5 points",
    ],
    "generation": ["apples, float32: ", *["text of a large model"] * 2],
    "training": [*["one step: "] * 2, *["training: "] * 2],
    "benchmark": [
        *["256 tokens, bf16, "] * 2,
        "256 x 64, batch 32",
        "256 tokens: attention beside flex_attention",
    ],
}


def test_without_a_gpu_it_ends_in_one_line(tmp_path):
    status, out, err = run_program(tmp_path, PROGRAM, f"--output_dir={tmp_path}")
    assert (status, out) == (1, "")
    assert err.startswith("error: no GPU: JAX ")
    assert err.count("\n") == 1
    assert "--allow_cpu" in err


BARE = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
from continuous_lm.experiments.gpu import attention_checks, gpu_check, model_checks
"""


def test_it_needs_what_the_makefile_says_alone():
    """`make gpu` installs nothing: other dependencies may be absent."""
    makefile = (REPOSITORY_ROOT / "Makefile").read_text()
    needed = re.search(r"^needs := (.*)$", makefile, re.MULTILINE)[1].split()
    absent = {"matplotlib", "jinja2", "grain", "orbax", "chex", "tensorboardX"}
    assert absent.isdisjoint(needed)
    command = [sys.executable, "-c", BARE, *sorted(absent)]
    subprocess.run(command, env=ENVIRONMENT, check=True)


def test_unknown_sections_are_refused():
    with pytest.raises(
        clm.InputError,
        match=r"^--sections: 'atention' is not known; known are attention, ",
    ):
        gpu_check.Config(sections=("atention",))


@pytest.mark.slow
@pytest.mark.parametrize("sections", [FIRST, OTHERS])
def test_every_row_is_there(tmp_path, capsys, monkeypatch, sections):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = gpu_check.Config(
        allow_cpu=True, sections=sections, output_dir=str(tmp_path)
    )
    result = gpu_check.run(config)
    out = capsys.readouterr().out
    assert result.exit_status == 0, out
    assert out.startswith("cpu: figures mean nothing")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written["sections"]) == list(sections)
    summary = result.summary()
    for name in sections:
        rows, begins = written["sections"][name], ROWS[name]
        assert len(rows) == len(begins), rows
        for row, begin in zip(rows, begins, strict=True):
            assert row["what"].startswith(begin)
            assert row["verdict"] != FAILED
            assert row["value"] is not None or row["note"]
            assert row["what"] in out  # at once
            assert row["what"] in summary  # and in the table
        assert (tmp_path / f"{name}.log").exists()
    last_line = summary.splitlines()[-1]
    assert last_line == written["summary"]
    assert " / FAILED 0 / " in last_line
    assert last_line in (tmp_path / "gpu.txt").read_text()


def test_examples():
    result = doctest.testmod(gpu_check)
    assert result.attempted
    assert not result.failed


def test_a_failed_row_ends_the_program_with_status_1():
    rows = {"one": [Check("it", OK)], "two": [Check("that", FAILED)]}
    assert gpu_check.Result(rows, "a card", 1.0).exit_status == 1
    assert gpu_check.Result({"one": rows["one"]}, "a card", 1.0).exit_status == 0


# --- What goes wrong ------------------------------------------------------------------------------


def works(tiny):
    yield Check("it works", OK, 1.0)


def fails(tiny):
    yield from works(tiny)
    raise ValueError("out of\nideas")


def hangs(tiny):
    time.sleep(600)
    yield from works(tiny)


def dies(tiny):
    yield from works(tiny)
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.slow
def test_a_section_that_fails_hangs_or_dies_costs_its_own_rows_alone(tmp_path, capfd):
    runs = {"fails": (fails, 60.0), "dies": (dies, 60.0), "works": (works, 60.0)}
    sections = {name: gpu_check.Section(*run) for name, run in runs.items()}
    rows = gpu_check.run_sections(sections, True, tmp_path, "a card")
    assert [[check.verdict for check in rows[name]] for name in rows] == [
        [OK, FAILED],
        [OK, FAILED],
        [OK],
    ]
    assert rows["fails"][1].note == "ValueError: out of ideas"
    assert "out of" in (tmp_path / "fails.log").read_text()
    assert rows["dies"][1].note == "the process was ended by SIGSEGV; see dies.log"
    begin = time.monotonic()
    (late,) = isolated_checks.run_in_process(hangs, True, 2.0, tmp_path / "hangs.log")
    assert time.monotonic() - begin < 30
    assert late.verdict == FAILED
    assert late.note.startswith("stopped after 2 s")
    assert gpu_check.summarize(rows).startswith("passed 3 / FAILED 2 / not run 0 / ")
    assert capfd.readouterr().out.count("a card") == 5


def test_a_wrong_form_is_found_and_the_others_go_on():
    def wrong(q, k, v, d, options):  # a gradient alone, and that of few durations
        y = FORMS["dense"].attend(q, k, v, d, options)
        return y + 0.1 * jnp.sum(d[:, :3] - jax.lax.stop_gradient(d[:, :3]))

    def broken(q, k, v, d, options):
        raise RuntimeError("no such kernel")

    forms = {
        "dense": FORMS["dense"],
        "wrong": Form(wrong),
        "broken": Form(broken),
        "again": FORMS["dense"],
    }
    rows = list(
        attention_checks.check_case(
            "plain", CASES["plain"], "float32", TINY_SIZES, forms
        )
    )
    assert [row.verdict for row in rows] == [OK, FAILED, FAILED, OK, FAILED]
    assert rows[1].value > 1e-3
    assert rows[2].note == "RuntimeError: no such kernel"
    assert "wrong" in rows[4].note


def test_what_is_not_a_number_fails():
    check = isolated_checks.check_against_target(
        "it", float("nan"), isolated_checks.Target(maximum=1.0)
    )
    assert (check.verdict, check.value) == (FAILED, None)
    assert check.note == "it is nan"


# --- The reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped, zeros", "grouped, zeros, capped, window"])
def test_the_reference_is_the_dense_form_in_float64(name):
    case = CASES[name]
    options = case.options(TINY_SIZES)
    with jax.enable_x64(True):
        arrays = [
            jnp.asarray(x, jnp.float64)
            for x in attention_checks.random_inputs(case, "float32", TINY_SIZES)
        ]
        actual = attention_checks.value_and_gradients(FORMS["dense"], options)(*arrays)
        exact = attention_checks.float64_reference(
            [np.asarray(x) for x in arrays], options
        )
        assert (
            max(
                attention_checks.relative_errors([np.asarray(x) for x in actual], exact)
            )
            < 1e-13
        )


def test_forms_say_what_they_do_not_take():
    name = "grouped, zeros, capped, window"
    forms = {form: FORMS[form] for form in ("splash", "channels of keys", "cudnn")}
    rows = list(
        attention_checks.check_case(name, CASES[name], "bfloat16", TINY_SIZES, forms)
    )
    assert [row.verdict for row in rows] == [UNSUPPORTED] * 3
    assert rows[2].note == "cuDNN has no soft-capping"


# --- Programs for GPUs, made without one ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["pallas", "blocked", "dense"])
def test_attention_is_lowered_for_gpus(form, dtype):
    case = CASES["grouped, zeros, capped, window"]
    arrays = attention_checks.random_inputs(case, dtype, attention_checks.Sizes())
    run = attention_checks.value_and_gradients(
        FORMS[form], Options(softcap=2.0, window=70.0)
    )
    with gpu():
        text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = [
        line
        for line in text.splitlines()
        if "custom_call @" in line and "triton" in line
    ]
    assert len(calls) == (3 if form == "pallas" else 0)


class Lowered(Exception):
    """Instead of a run."""


@pytest.mark.parametrize(
    ("module", "function", "check"),
    [
        (
            sweep,
            "_group_probabilities",
            lambda: model_checks.check_apples_float32(np.ones(4, np.float32)),
        ),
        (generation, "_decode_loop", model_checks.check_greedy_tokens),
    ],
)
def test_models_are_lowered_for_gpus(monkeypatch, module, function, check):
    compiled = getattr(module, function)

    def lowered(*arguments):
        text = compiled.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        raise Lowered(text)

    monkeypatch.setattr(module, function, lowered)
    with pytest.raises(Lowered, match="stablehlo"):
        list(check())
