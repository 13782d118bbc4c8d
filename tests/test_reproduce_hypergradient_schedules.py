"""The comparison of learning-rate schedules with constant rates, in a small form: its work, its table, its files."""

import json
import math
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import gputune

SCRIPTS = Path(__file__).parents[1] / "scripts" / "reproduce"
SEARCHES = ["descent, 10 rates", "descent, 1 rate", "random, 1 rate, 10 draws", "random, 1 rate, 24 draws"]


@pytest.fixture(scope="module")
def script():
    """The script, imported as Python does when it is run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield import_module("hypergradient_schedules")


@pytest.fixture(scope="module")
def results(script):
    return script.run(script.split_of(0), draws=(10, 24), outer_steps=3)


def test_every_fold_trains_twenty_steps_an_epoch(script):
    one, other = script.split_of(0), script.split_of(1)
    for split in (one, other):
        assert split.X.shape == (1600, 64) and split.X_out.shape == (197, 64)
        assert [len(train) for train, _ in split.folds] == [1280] * 5  # 20 steps of 64 rows
        assert (split.X.min(), split.X.max()) == (0, 1)
        counts = np.bincount(split.y), np.bincount(split.y_out)
        assert np.abs(counts[0] / 1600 - counts[1] / 197).max() < 0.005
    assert not np.array_equal(one.X_out, other.X_out)


@pytest.mark.long
def test_the_schedules_beat_every_draw(results):
    assert [r.search for r in results] == SEARCHES
    schedules, one_rate, *drawn = results
    assert schedules.loss < min(r.loss for r in drawn)
    assert schedules.loss < one_rate.loss
    assert np.array(schedules.rates).shape == (5, 2) and isinstance(one_rate.rates, float)
    assert [r.trials for r in drawn] == [10, 24]
    assert schedules.trials <= 3 * 4 and one_rate.trials <= 3 * 4
    for r in results:
        assert np.min(r.rates) >= 1e-5 and np.max(r.rates) <= 1
        assert len(r.held_out) == 197 and 0.02 < r.held_out_loss < 0.5


@pytest.mark.long
def test_few_draws_are_the_first_of_many(script, results):
    few, many = results[2:]
    assert many.loss <= few.loss
    assert few.loss == few.groups[0] and many.groups == (many.loss,) and len(few.groups) == 2
    split = script.split_of(0)
    study = gputune.tune(
        "mlp", split.X, split.y, space={"lr": script.loguniform(script.LOW, script.HIGH), **script.NETWORK},
        n_trials=10, include_default=False, cv=split.folds, numbers="none", optimizer="adam", max_epochs=5,
        epoch="last", scoring="neg_log_loss", verbose=0,
    )  # fmt: skip
    assert -study.best_score == pytest.approx(few.loss, rel=1e-5)
    chances = study.best_model().predict_proba(split.X_out)
    loss = -np.log(chances[np.arange(197), split.y_out]).mean()
    assert loss == pytest.approx(few.held_out_loss, rel=1e-3)


def test_the_table_and_the_files_hold_the_numbers(script, results, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "run", lambda split, *, draws, outer_steps: results)
    out = tmp_path / "new" / "folder"
    assert script.main(["--splits", "2", "--draws", "24", "--out", str(out)]) == 0
    page = (out / "table.md").read_text()
    assert page in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    table = [row for row in rows if len(row) == 8 and row[0] in "01"]
    assert [row[1] for row in table] == 2 * SEARCHES
    for row, r in zip(table, 2 * results):
        assert row[2] == f"{r.trials} x 5"
        assert [float(row[i]) for i in (4, 5, 6)] == pytest.approx(
            [r.loss, r.std_error, r.held_out_loss], abs=1e-4
        )
    compared = {tuple(row[:2]): row[2:] for row in rows if len(row) == 7 and row[0] in SEARCHES}
    assert len(compared) == 3 + 2
    in_folds, wins, held_out, held_out_wins, clear = compared[SEARCHES[0], SEARCHES[3]]
    gap = results[0].loss - results[3].loss
    assert (in_folds, wins) == (f"{gap:+.4f} ({gap:+.4f} to {gap:+.4f})", "2 of 2")
    gaps = results[0].held_out - results[3].held_out
    assert float(held_out.split()[0]) == pytest.approx(gaps.mean(), abs=1e-4)
    assert held_out_wins == f"{2 * (gaps.mean() < 0)} of 2"
    assert (clear != "0, 0") == (abs(gaps.mean()) > 2 * gaps.std(ddof=1) / math.sqrt(197))
    assert len(re.findall(r"^- split \d: first layer (?:\S+, ){4}\S+; second layer", page, re.M)) == 2
    whole = json.loads((out / "results.json").read_text())
    assert [(r["split"], r["search"]) for r in whole["results"]] == [(s, n) for s in (0, 1) for n in SEARCHES]
    assert whole["results"][0]["held_out_loss"] == results[0].held_out_loss
    assert math.isclose(np.mean(whole["results"][3]["held_out"]), results[3].held_out_loss)
    assert whole["machine"]["versions"]["torch"]


def test_a_bad_option_is_named(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--splits", "0"])
    assert stopped.value.code == 2
    assert "argument --splits: must be an integer of at least 1, got 0" in capsys.readouterr().err
