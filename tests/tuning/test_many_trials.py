"""``n_trials`` may be far more than there is time for."""

import time

import pytest
from scipy.stats import loguniform, uniform

import gputune

# Drawing one trial of this space takes some milliseconds, so few are drawn within the timeout.
WIDE = {name: uniform(0, 1) for name in ("x", *map(str, range(40)))}


def search(space=WIDE, **options):
    common = {"direction": "maximize", "n_trials": 10**9, "workers": 1, "verbose": 1}
    return gputune.search(lambda params, report: params["x"], space, **{**common, **options})


def tune(**options):
    space = {"lr": loguniform(1e-4, 1e-1)}
    common = {"n_trials": 10**9, "max_epochs": 1, "cv": 2, "workers": 1, "verbose": 1}
    return gputune.tune("mlp", "sklearn:iris", space=space, **{**common, **options})


@pytest.mark.parametrize("run", [search, pytest.param(tune, marks=pytest.mark.long)])
def test_trials_are_drawn_for_a_small_part_of_the_timeout(tmp_path, capsys, run):
    begin = time.monotonic()
    study = run(timeout=0.1, study=tmp_path / "study.db")
    assert time.monotonic() - begin < 30  # on a busy machine; to draw all would take hours
    n_drawn = len(study.trials)
    assert 1 <= n_drawn < 10**6
    says = (
        f"note: {n_drawn} of 1000000000 configurations were drawn. The others repeat one of these, "
        "or there was no time"
    )
    assert says in capsys.readouterr().err
    again = run(timeout=0.1, study=tmp_path / "study.db")
    assert len(again.trials) > n_drawn
    params = [trial.params for trial in again.trials]
    assert params[:n_drawn] == [trial.params for trial in study.trials]


def test_without_a_timeout_all_trials_are_drawn():
    assert len(search({"x": uniform(0, 1)}, n_trials=30, verbose=0).trials) == 30
