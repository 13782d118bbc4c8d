"""The benchmark of Optuna's bridge in its smallest form: the same proposals with and without the bridge."""

from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bridge(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = import_module("benchmark.studies.optuna")
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
    main = import_module("benchmark.__main__").main
    for tpe, code in ((0.97, 1), (0.99, 0)):
        monkeypatch.setattr(
            bridge,
            "compare",
            lambda seed, batches, tpe=tpe: bridge.Row(seed, 0.98, tpe, 1.0, 2.0, 0.12, 0.06),
        )
        assert main(["--optuna", "--repeats", "3", "--out", str(tmp_path)]) == code
    (page,) = tmp_path.glob("optuna-*.md")
    text = page.read_text()
    assert "| median | 0.9800 | 0.9900 | 1.0, 2.0 | 2.00, 1.00 |" in text
