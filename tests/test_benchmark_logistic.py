"""The benchmark of the logistic regression in its smallest form: equal optimality before a time is shown."""

from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def logistic(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module("benchmark.studies.logistic")


def test_objectives_agree_before_times_are_shown(logistic, tmp_path, monkeypatch, capsys):
    machine = import_module("benchmark.report").describe_machine()
    row = logistic.compare("l2", 3)
    assert row.gputune_gap < 1e-7 and row.sklearn_gap < 1e-3 and row.score_difference < 1e-2
    text = logistic.markdown(machine, [row])
    assert "| l2 | 3 x 5 |" in text and "| both |" in text
    far = logistic.Row("l1", 3, 1.0, 9.0, 1e-3, 1e-4, 9e-4, 0.0)
    monkeypatch.setattr(logistic, "compare", lambda penalty, candidates: far)
    assert import_module("benchmark.__main__").main(["--logistic", "--out", str(tmp_path)]) == 1
    assert "NO SPEED" in capsys.readouterr().out and not list(tmp_path.iterdir())
