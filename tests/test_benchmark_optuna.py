"""The benchmark of Optuna's bridge in its smallest form: the same proposals with and without the bridge."""

from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
MACHINE = {
    "cpu": "one",
    "cores": 1,
    "card": None,
    "date": "today",
    "commit": "c",
    "python": "3",
    "versions": {},
}


@pytest.fixture
def bridge(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = import_module("benchmark_optuna")
    monkeypatch.setattr(module, "EPOCHS", 1)
    monkeypatch.setattr(module, "BATCH", 6)
    return module


def test_optuna_alone_proposes_the_same(bridge):
    row = bridge.compare(0, 2)
    assert row.random_best > 0.5 and row.tpe_best > 0.5
    assert 0 < row.bridge_seconds < row.tpe_seconds and row.alone_seconds > 0
    study = bridge.search(0, "random", 2)
    with pytest.raises(AssertionError, match="proposed something else"):
        bridge.alone(0, study)


def test_it_ends_in_1_where_random_search_is_better(bridge, tmp_path, monkeypatch):
    for tpe, code in ((0.97, 1), (0.99, 0)):
        monkeypatch.setattr(
            bridge,
            "compare",
            lambda seed, batches, tpe=tpe: bridge.Row(seed, 0.98, tpe, 1.0, 2.0, 0.12, 0.06),
        )
        assert bridge.run_optuna(tmp_path, MACHINE, seeds=3, batches=10) == code
    text = (tmp_path / "optuna-one-1-cores.md").read_text()
    assert "| median | 0.9800 | 0.9900 | 1.0, 2.0 | 2.00, 1.00 |" in text
