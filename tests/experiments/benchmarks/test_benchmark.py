"""The benchmark: its figures are exact on ways whose time is known, and every case runs."""

import json
import math
import sys

import numpy as np
import pytest

import continuous_lm as clm
from continuous_lm.experiments.benchmarks import (
    baselines,
    benchmark,
    sweep_cases,
    timing,
)
from continuous_lm.experiments.benchmarks.timing import Row, Target
from continuous_lm.experiments.densities import density_training
from tests.fixtures import tiny


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances only during the measured calls, not during pauses."""

    class Clock:
        now = 0.0

        def way(self, *selected):
            """One that takes so many seconds, call by call."""
            left = iter(selected)

            def run():
                self.now += next(left)

            return run

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    return clock


# --- Figures --------------------------------------------------------------------------------------


def test_the_first_round_warms_up(clock):
    ways = {"a": clock.way(9.0, 1.0, 2.0), "b": clock.way(7.0, 4.0, 5.0)}
    assert timing.time_in_turns(ways, 2) == {"a": [1.0, 2.0], "b": [4.0, 5.0]}


def test_warm_ways_are_measured_at_once(clock):
    assert timing.time_in_turns({"a": clock.way(1.0, 2.0)}, 2, is_warm=True) == {
        "a": [1.0, 2.0]
    }


def test_ways_take_turns_there_and_back():
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "abc"}
    timing.time_in_turns(ways, 2)
    assert "".join(order) == "abccbaabc"


def test_ratios_are_those_of_each_round():
    row = timing.speedup_row(
        "", ours=[1.0, 10.0, 2.0], theirs=[2.0, 50.0, 6.0], minimum=3.0
    )
    assert (row.low, row.value, row.high) == (2.0, 3.0, 5.0)
    assert (row.ours, row.theirs, row.unit) == (
        2.0,
        6.0,
        "s",
    )  # 6 / 2 would be 3 as well, but
    row = timing.speedup_row(
        "", ours=[1.0, 10.0, 4.0], theirs=[4.0, 20.0, 4.0], minimum=3.0
    )
    assert (row.value, row.ours, row.theirs) == (2.0, 4.0, 4.0)  # not of the medians
    assert row.is_met is False


def test_what_ours_takes_more():
    row = timing.cost_ratio_row(
        "", ours=[3.0, 8.0], theirs=[2.0, 4.0], maximum=1.75, unit="B"
    )
    assert (row.low, row.value, row.high, row.unit) == (1.5, 1.75, 2.0, "B")
    assert row.is_met


@pytest.mark.parametrize(
    ("target", "met", "missed", "words"),
    [
        (Target(minimum=1.2), 1.2, 1.199, ">= 1.2"),
        (Target(maximum=0.3), 0.3, 0.301, "<= 0.3"),
    ],
)
def test_targets(target, met, missed, words):
    assert target.is_met(met)
    assert not target.is_met(missed)
    assert str(target) == words


def test_what_has_no_target_or_value_is_neither_met_nor_missed():
    assert timing.median_row("", [1.0]).is_met is None
    assert Row("", target=Target(minimum=1.0)).is_met is None


def test_quantities():
    shown = [
        timing.format_quantity(*q)
        for q in ((0.0123, "s"), (12.3, "s"), (2.02e8, "B"), (3.0, ""))
    ]
    assert shown == ["12.3 ms", "12.3 s", "202 MB", "3"]


def test_the_table_says_what_is_missed():
    rows = [
        timing.speedup_row("slow", [2.0], [1.0], 1.0),
        timing.speedup_row("fast", [1.0], [2.0], 1.0, "a note"),
        Row("absent", note="no GPU: not measured"),
    ]
    head, _, *lines = (
        timing.rows_table("name", "caption", rows).as_text().splitlines()[2:]
    )
    assert head.split()[:2] == ["figure", "value"]
    assert ["MISSED" in line for line in lines] == [True, False, False]
    assert lines[1].split() == "fast 2 2 to 2 >= 1 yes 1 s 2 s a note".split()
    assert "no GPU: not measured" in lines[2]


def test_results_that_differ_are_not_timed():
    expected = np.array([0.0, 10.0])
    timing.require_close("it", expected + 9e-4, expected, 1e-4)
    for wrong in (expected + 1.1e-3, expected * np.nan):
        with pytest.raises(clm.InputError, match=r"it: the results differ by"):
            timing.require_close("it", wrong, expected, 1e-4)


# --- Cases ----------------------------------------------------------------------------------------


def works(quick, repeats):
    yield timing.speedup_row("figure", [1.0] * repeats, [0.5] * repeats, 1.0)


def fails(quick, repeats):
    yield from works(quick, repeats)
    raise ValueError("out of ideas")


def test_a_case_that_fails_is_named_and_the_others_go_on(capsys):
    actual = benchmark.run_cases({"bad": fails, "good": works}, quick=False, repeats=2)
    assert benchmark.failed_cases(actual) == ["bad"]
    assert [row.what for row in actual["bad"]] == ["figure", "failed"]
    assert "out of ideas" in actual["bad"][1].note
    assert actual["good"][0].is_met is False
    assert "MISSED" in capsys.readouterr().out


def test_tiny_sizes_have_no_targets(capsys):
    (row,) = benchmark.run_cases({"good": works}, quick=True, repeats=1)["good"]
    assert (row.value, row.target, row.is_met) == (0.5, None, None)
    assert json.dumps(row.as_json())


def test_cases_are_known_by_name():
    assert list(benchmark.select_cases(["load", "sweep"])) == ["load", "sweep"]
    with pytest.raises(clm.InputError, match="'swep' is not known; known are sweep, "):
        benchmark.select_cases(["load", "swep"])


def test_absent_peers_are_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert (
        baselines.why_missing("faiss")
        == "faiss is not installed: pip install -e '.[peers]'"
    )
    rows = list(benchmark.CASES["nearest"](True, 1))
    absent = [row for row in rows if "faiss" in row.what]
    assert absent
    assert all(
        row.value is None and row.note == baselines.why_missing("faiss")
        for row in absent
    )
    assert all(row.value for row in rows if row not in absent)


# --- The peers do the same ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A model in transformers, a sweep, and what ours says of it."""
    pytest.importorskip("torch", reason="a peer")
    pytest.importorskip("transformers", reason="a peer")
    folder = tiny.save(tmp_path_factory.mktemp("model"))
    lm = clm.load(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, lm.config.vocab_size, 9)
    durations = np.ones((5, 9), np.float32)
    durations[:, 3:] = rng.uniform(0.1, 2.0, (5, 6))
    groups = [[i] for i in range(lm.config.vocab_size)]
    ours = clm.sweep.probabilities(lm, groups, tokens=tokens, durations=durations)
    assert np.abs(ours - ours[:1]).max() > 1e-2  # durations matter
    return baselines.load_causal_lm(folder), (tokens, durations), ours


def test_the_papers_procedure_gives_ours(swept):
    model, sweep, ours = swept
    np.testing.assert_allclose(baselines.paper_sweep(model, *sweep), ours, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_batched_pytorch_gives_ours(swept, batch_size, prefix):
    model, sweep, ours = swept
    batched = baselines.BatchedLlama(model)
    actual = batched.sweep(*sweep, batch_size=batch_size, prefix=prefix)
    np.testing.assert_allclose(actual, ours, atol=1e-5)


def test_batched_pytorch_in_bfloat16_is_near(swept):
    model, sweep, ours = swept
    actual = baselines.BatchedLlama(model, "bfloat16").sweep(*sweep, batch_size=5)
    np.testing.assert_allclose(actual, ours, atol=0.05)


def test_the_papers_mask_is_the_logarithm_of_durations():
    torch = pytest.importorskip("torch", reason="a peer")
    d = [0.5, 2.0, 0.25]
    expected = np.where(np.tri(3), np.log(d), -np.inf)
    mask = baselines.paper_mask(torch.cumsum(torch.tensor(d), 0))
    np.testing.assert_allclose(mask[0, 0].numpy(), expected)


# --- Counted operations ---------------------------------------------------------------------------


def test_operations_are_those_of_the_products_that_a_sweep_needs():
    config = density_training.trunk_config(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4
    )
    # 4 tokens, the first of them shared by 3 points. Each passes the first projections once; 1 + 3
    # times 3 the rest of the first layer and the keys and values of the second, of which 3 remain.
    query, key_value, others = 32 * 32, 2 * 32 * 32, 32 * 32 + 3 * 32 * config.mlp_size
    weights = (
        4 * (query + key_value)
        + 10 * (others + key_value)
        + 3 * (query + others + 32 * 64)
    )
    # Half of the pairs in the first layer, one query each in the second; scores and values.
    attention = 2 * 32 * ((1 + 3 * 15) / 2 + 3 * 4)
    actual = sweep_cases.count_sweep_flops(config, num_points=3, length=4)
    assert math.isclose(actual, 2 * (weights + attention))


# --- All of it ------------------------------------------------------------------------------------


def holds(megabytes):
    return lambda: np.ones(int(megabytes * 1e6 / 8))


def dies():
    raise ValueError("on purpose")


@pytest.mark.slow
def test_a_fresh_process_says_its_memory():
    actual = timing.measure_in_process(holds, 200)
    assert 0 < actual.seconds < 10
    if sys.platform == "linux":
        assert 0.99 < actual.memory_bytes / 200e6 < 1.1
    with pytest.raises(clm.InputError, match="the process that measures dies failed"):
        timing.measure_in_process(dies)


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.CASES)
def test_every_case_runs(name):
    rows = list(benchmark.CASES[name](True, 1))
    assert rows
    for row in rows:
        assert row.note if row.value is None else math.isfinite(row.value)
        assert json.dumps(row.as_json(), allow_nan=False)


@pytest.mark.slow
def test_the_program_writes_its_figures(tmp_path, capsys):
    config = benchmark.Config(
        quick=True, repeats=1, cases=("import", "attention"), output_dir=str(tmp_path)
    )
    result = benchmark.run(config)
    assert result.exit_status == 0
    assert result.summary() == "all cases ended"
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(written["cases"]) == ["import", "attention"]
    assert written["run"]["flags"]["quick"] is True
    shown = capsys.readouterr().out
    assert all(
        row["what"] in shown for rows in written["cases"].values() for row in rows
    )
    assert (tmp_path / "attention.md").exists()


def test_a_failed_case_ends_the_program_with_status_1(capsys):
    rows = benchmark.run_cases({"bad": fails}, quick=True, repeats=1)
    result = benchmark.Result(rows)
    assert result.exit_status == 1
    assert "bad" in result.summary()


def test_unknown_cases_are_refused_before_anything_is_measured():
    with pytest.raises(clm.InputError, match="'swep' is not known"):
        benchmark.Config(cases=("swep",))
