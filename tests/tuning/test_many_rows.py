"""Tables with many rows: the number of epochs, the patience, and the memory of a search."""

import sys

import numpy as np
import pytest

import gputune
from forked import Fork
from gputune.cli.main import main
from gputune.tuning import pipeline as setup
from gputune.tuning.choices import choose_model
from gputune.tuning.options import make_options
from gputune.tuning.pipeline import with_length
from gputune.tuning.session import checked_space
from problems import Linear

SCHEDULES = {"schedule": ["constant", "cosine"]}


@pytest.mark.parametrize(
    ("model", "n_rows", "options", "epochs", "patience"),
    [
        ("mlp", 50_000, {}, 50, None),
        ("mlp", 100_000, {}, 25, 7),
        ("mlp", 319_795, {}, 10, 3),
        ("mlp", 319_795, {"max_epochs": 60}, 60, 15),
        ("mlp", 319_795, {"patience": None}, 10, None),
        ("mlp", 319_795, {"patience": 8}, 10, 8),
        ("mlp", 319_795, {"schedule": "cosine"}, 10, None),
        ("mlp", 319_795, {"space": SCHEDULES}, 10, None),
        ("mlp", 319_795, {"epoch": "last"}, 10, None),
        ("mlp", 319_795, {"method": "halving"}, 10, None),
        ("logistic", 319_795, {}, 50, None),
        ("realmlp", 319_795, {}, 10, None),
        ("realmlp", 319_795, {"space": {"schedule": ["constant"]}}, 10, 3),
        (Linear, 319_795, {}, 50, None),
    ],
)
def test_the_defaults_of_epochs_and_patience_follow_from_the_rows(
    model, n_rows, options, epochs, patience
):
    """RealMLP has a schedule, and a module of the user's own may need any number of epochs."""
    choice = choose_model(model, None)
    given = make_options(**options)
    chosen, remarks = with_length(given, choice, checked_space(choice, given), n_rows)
    assert (chosen.training.max_epochs, chosen.training.patience) == (epochs, patience)
    changed = [name for name in ("at most", "without a better") if name in str(remarks)]
    expected = {
        "at most": epochs != 50 and "max_epochs" not in options,
        "without a better": patience is not None and "patience" not in options,
    }
    assert changed == [name for name, shown in expected.items() if shown]


RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 3))
Y = np.where(X[:, 0] + 0.1 * RNG.normal(size=200) > 0, "yes", "no")


def test_a_study_says_how_long_its_trials_train_and_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "LARGE_TABLE", 50)
    options = {"n_trials": 2, "cv": 2, "study": tmp_path / "study.db"}
    study = gputune.tune("mlp", X, Y, **options)
    assert (study.record.max_epochs, study.record.patience) == (12, 3)
    notes = [
        "200 rows: trials train for at most 12 epochs, because an epoch has more steps than one of "
        "50 rows, for which the default is 50 epochs",
        "200 rows: a trial ends after 3 epochs without a better mean score, the default patience of "
        "a large table",
    ]
    assert [note for note in study.record.notes if "rows:" in note] == notes
    said = capsys.readouterr().err
    assert all(f"note: {note}" in said for note in notes)
    # The same call continues the study, and the study's own numbers train the model.
    again = gputune.tune("mlp", X, Y, **options, verbose=0)
    assert [trial.score for trial in again.trials] == [trial.score for trial in study.trials]
    assert again.best_model().predict(X[:5]).shape == (5,)


def test_a_dry_run_shows_the_epochs_of_a_large_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "LARGE_TABLE", 50)
    table = tmp_path / "table.csv"
    rows = [f"{a},{b},{y}" for (a, b, _), y in zip(X, Y)]
    table.write_text("\n".join(["a,b,y", *rows]))
    main(["tune", str(table), "--target", "y", "--test-size", "0", "--trials", "2", "--dry-run"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "x 12 epochs" in shown
    assert "200 rows: trials train for at most 12 epochs" in shown
    assert "at most, because trials may end early" in shown


# 17 columns as in heart_2020: four numbers, the others texts of few levels.
SCRIPT = """
import os, sys
from pathlib import Path
import numpy as np
import pandas as pd
import gputune

rng = np.random.default_rng(0)
n = int(sys.argv[1])
columns = {f"number{j}": rng.normal(size=n) for j in range(4)}
for j, levels in enumerate((2, 2, 2, 2, 2, 13, 6, 4, 2, 5, 2, 2, 2)):
    columns[f"text{j}"] = np.array([f"level {i}" for i in range(levels)])[rng.integers(levels, size=n)]
y = np.where(columns["number0"] + rng.normal(size=n) > 1, "Yes", "No")
gputune.tune(
    "realmlp", pd.DataFrame(columns), y, n_trials=8, cv=3, max_epochs=1, scoring="roc_auc",
    random_state=0, workers=2, verbose=0,
)
processes = [os.getpid()]
for thread in Path("/proc/self/task").iterdir():
    processes += (thread / "children").read_text().split()
for process in processes:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):  # in KiB
            print(int(line.split()[1]) >> 10)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_realmlps_of_320_000_rows_in_three_folds_take_less_than_4_gib():
    """Peaks of resident memory of both processes; pages that they share count twice."""
    out, err = Fork(SCRIPT, 320_000).communicate()
    assert err == ""
    peaks = [int(line) for line in out.split()]
    assert len(peaks) >= 2
    assert sum(peaks) < 4 << 10, peaks
