"""The benchmark's grid and its growth in a tiny form; no time is asserted."""

import json
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module("benchmark.studies.grid")


@pytest.fixture
def small(grid, monkeypatch):
    """The command with two cells of two trials and less."""
    for name, value in (("TRIALS", (1,)), ("WIDTHS", (16,)), ("BATCH_SIZES", (256,)), ("GROWTH", 2)):
        monkeypatch.setattr(grid, name, value)
    command = ["--grid", "--engines", "torch", "--trials", "2", "--epochs", "2", "--out"]
    return lambda out: import_module("benchmark.__main__").main([*command, str(out)])


def test_every_trial_of_a_cell_has_its_width_and_batch_size(grid):
    work = grid.cell_work(3, 64, 16, 2)
    assert [(t["width"], t["batch_size"]) for t in work.trials] == [(64, 16)] * 3
    assert len({t["lr"] for t in work.trials}) == 3 and work.epochs == 2


def test_the_report_is_written(grid, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "AGREEMENT", 1.0)  # six steps are too few for scores to agree
    growth = import_module("benchmark.studies.big")
    monkeypatch.setattr(growth, "in_fresh_process", lambda *case: growth.Growth(*case, 0.5, 300.0, 310.0))
    assert small(tmp_path) == 0
    (numbers,), (page,) = tmp_path.glob("grid-*.json"), tmp_path.glob("grid-*.md")
    whole = json.loads(numbers.read_text())
    assert [(c["trials"], c["width"], c["batch_size"]) for c in whole["cells"]] == [
        (1, 16, 256),
        (2, 16, 256),
    ]
    cases = [(g["trials"], g["folds"], g["epochs"]) for g in whole["growth"]]
    assert cases == [(2, 5, 2), (4, 5, 2), (2, 10, 2), (2, 5, 4)]
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert re.search(r"^\| width \| batch size \| 1 trial \| 2 trials \|$", text, re.M)
    assert re.search(r"^\| 16 \| 256 \| \S+x\S*, \S+x\S* \| \S+x\S*, \S+x\S* \|$", text, re.M)
    assert "| 2 | 10 | 2 | 40 | 0.50 | 12500 | 310 | 10 |" in text


@pytest.mark.long
def test_a_search_is_measured_in_a_fresh_process(grid):
    found = import_module("benchmark.studies.big").in_fresh_process(2, 3, 1)
    assert (found.trials, found.folds, found.epochs, found.work) == (2, 3, 1, 6)
    assert found.peak >= found.before > 50 and found.seconds > 0


@pytest.mark.long
def test_no_speed_is_shown_where_the_scores_differ(grid, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "AGREEMENT", -1.0)
    assert small(tmp_path) == 1
    assert "NO SPEED: the mean accuracies over the cells differ by more than" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_cells_that_gputune_loses_are_shown(grid):
    measured = import_module("benchmark.measure").Measured
    work = grid.cell_work(1, 512, 16, 2)
    scores = np.full((1, 1, 5), 0.9)
    own = measured("gputune", (4.0,), scores, (0.0,), (3.0,), rival=False)
    cell = grid._cell(work, [measured("PyTorch loop", (2.0,), scores, (0.0,), (0.0,)), own])
    assert cell["ratio"] == {"PyTorch loop": 0.5} and cell["ratio_compiled"] == {"PyTorch loop": 2.0}
    assert grid._ratios([cell], "PyTorch loop", 512, 16, 1) == "**0.50x**, 2.00x"
    assert grid._lost([cell], "PyTorch loop") == (
        "gputune is slower in 1 of 1 cells: 1 trial of width 512, batch size 16."
    )
