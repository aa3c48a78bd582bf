import json
import subprocess

import pytest

from tests import type_completeness


def symbol(name, is_known, is_exported=True):
    return {"name": name, "isTypeKnown": is_known, "isExported": is_exported}


REPORT = {
    "completenessScore": 0.5,
    "symbols": [
        symbol("continuous_lm.load", True),
        symbol("continuous_lm.save", False),
        symbol("continuous_lm._hidden", False, is_exported=False),
        symbol("continuous_lm.experiments.apples.x", False),
        symbol("continuous_lm.axes.place", False),
    ],
}


def run(monkeypatch, report, limit, tmp_path, *flags):
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"unknown": limit}))
    monkeypatch.setattr(type_completeness, "RECORD", record)
    monkeypatch.setattr(type_completeness, "verify_types", lambda: report)
    monkeypatch.setattr("sys.argv", ["type_completeness", *flags])
    type_completeness.main()
    return json.loads(record.read_text())["unknown"]


def test_more_names_without_types_are_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="There were 1"):
        run(monkeypatch, REPORT, 1, tmp_path)
    shown = capsys.readouterr().out
    assert "no known type: continuous_lm.axes.place\n" in shown
    assert "_hidden" not in shown
    assert "apples" not in shown


def test_fewer_pass_and_can_be_stored(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, REPORT, 2, tmp_path) == 2
    assert run(monkeypatch, REPORT, 3, tmp_path) == 3
    assert "store that by --write" in capsys.readouterr().out
    assert run(monkeypatch, REPORT, 3, tmp_path, "--write") == 2


def test_without_pyright_nothing_is_checked(monkeypatch, tmp_path, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "no node")
    monkeypatch.setattr(type_completeness, "run_pyright", lambda *arguments: failed)
    assert type_completeness.verify_types() is None
    run(monkeypatch, None, 0, tmp_path)
    assert "skipped" in capsys.readouterr().out
