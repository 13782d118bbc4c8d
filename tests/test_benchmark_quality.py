"""Time to quality in a tiny form: every search gets the same candidates, and is judged by the same scores."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.datasets import load_iris

SCRIPTS = Path(__file__).parents[1] / "scripts"

SEARCHES = (
    "gputune, random",
    "gputune, halving",
    "Optuna, random",
    "Optuna, successive halving pruner",
    "scikit-learn, RandomizedSearchCV",
    "scikit-learn, HalvingRandomSearchCV",
)


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module("benchmark.studies.quality")


@pytest.fixture
def work(quality):
    """Iris with three candidates and three epochs."""
    X, y = load_iris(return_X_y=True)
    return quality.split(X.astype(np.float32), y, seed=0, trials=3, epochs=3)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # those of other projects are not ours
@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_tells_of_every_candidate(quality, work, name):
    package, search = quality.SEARCHES[name]
    pytest.importorskip(package)
    work, _ = work
    events = search(work, 1)
    assert {event.candidate for event in events} == {0, 1, 2}
    assert all(event.seconds > 0 and 0 <= event.score <= 1 for event in events)
    assert [e.seconds for e in events] == sorted(e.seconds for e in events)


def scores_of(events):
    """Scores by candidate, in the order of time."""
    found = {}
    for event in events:
        found.setdefault(event.candidate, []).append(event.score)
    return found


@pytest.mark.long
def test_scores_of_gputune_are_fold_means_of_the_last_epoch(quality, work):
    work, _ = work
    scores = import_module("benchmark.engines.gputune").train(work).scores.mean(1)
    found = scores_of(quality.SEARCHES["gputune, random"][1](work, 1))
    assert found == {c: [pytest.approx(scores[c])] for c in range(3)}


@pytest.mark.long
def test_scores_of_scikit_learn_are_fold_means_of_its_rungs(quality, work):
    work, _ = work
    folds = import_module("benchmark.work").standardised(work)
    fit = import_module("benchmark.engines.sklearn").fit

    def mean(candidate, epochs):
        return pytest.approx(np.mean([fit(fold, work.trials[candidate], epochs) for fold in folds]))

    found = scores_of(quality.SEARCHES["scikit-learn, RandomizedSearchCV"][1](work, 1))
    assert found == {c: [mean(c, 3)] for c in range(3)}
    halved = scores_of(quality.SEARCHES["scikit-learn, HalvingRandomSearchCV"][1](work, 1))
    best = max(halved, key=lambda c: halved[c][0])
    assert halved == {c: [mean(c, 1), *([mean(c, 3)] if c == best else [])] for c in range(3)}


@pytest.mark.long
def test_scores_of_optuna_are_those_of_the_loop(quality, work):
    pytest.importorskip("optuna")
    work, _ = work
    work = replace(work, folds=work.folds[:1])  # of several, the loops take turns and draw other orders
    (fold,) = import_module("benchmark.work").standardised(work)
    fit = import_module("benchmark.engines.torch").fit
    found = scores_of(quality.SEARCHES["Optuna, random"][1](work, 1))
    assert found == {c: [fit(fold, work.trials[c], epochs) for epochs in (1, 2, 3)] for c in range(3)}


@pytest.mark.parametrize(("pruned", "heard"), [(False, 3 * 3), (True, 3 + 2)])
def test_optuna_tells_of_every_epoch_that_was_trained(quality, work, pruned, heard, monkeypatch):
    optuna = pytest.importorskip("optuna")
    module = import_module("benchmark.engines.optuna")
    monkeypatch.setattr(module, "accuracy", lambda network, fold: 0.5)
    # The first goes on to the end, the two others leave after their first epoch, the only one that is a rung.
    ends = iter([False, True, True])
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: pruned and next(ends))
    work, _ = work
    assert len(module.search("halving" if pruned else "random", work, 1)) == heard


def test_scores_of_several_processes_are_put_together(quality):
    lines = [(11.0, 7, 1, 0.5), (12.0, 8, 1, 0.9), (13.0, 7, 1, 0.7), (14.0, 7, 3, 0.8), (15.0, 8, 1, 0.1)]
    events = import_module("benchmark.engines.sklearn")._of_all_folds(lines, 2, 10.0)
    assert [(e.seconds, e.candidate, round(e.score, 6)) for e in events] == [(3.0, 7, 0.6), (5.0, 8, 0.5)]


def test_the_rows_are_split_once_and_the_choice_is_judged_by_the_others(quality, work):
    work, held_out = work
    assert len(work.X) == 112 and len(held_out.rows[2]) == 38 and len(work.folds) == 3
    np.testing.assert_allclose(held_out.rows[0].mean(0), 0, atol=1e-5)
    first = held_out(1)
    assert first == import_module("benchmark.engines.torch").fit(held_out.rows, work.trials[1], 3)
    held_out.rows = None  # it is not computed again
    assert held_out(1) == first


def test_a_large_table_is_sampled(quality, monkeypatch):
    monkeypatch.setattr(quality, "ROWS", 80)
    X, y = load_iris(return_X_y=True)
    work, held_out = quality.split(X, y, seed=1, trials=2, epochs=1)
    assert len(work.X) == 60 and len(held_out.rows[2]) == 20


def test_the_choice_is_the_best_so_far(quality):
    event = quality.Event
    events = [
        event(3.0, 1, 0.8),
        event(1.0, 0, 0.5),
        event(2.0, 2, 0.4),
        event(4.0, 1, 0.9),
        event(5.0, 3, 0.9),
    ]
    points = quality.choices(events, lambda candidate: candidate / 10)
    assert points == (quality.Point(1.0, 0, 0.0), quality.Point(3.0, 1, 0.1))
    curve = quality.Curve("digits", 0, "x", points, 9.0)
    assert (curve.time_to(0.0), curve.time_to(0.05), curve.time_to(0.2)) == (1.0, 3.0, float("inf"))


def test_seeds_that_do_not_reach_a_level_count_as_infinite(quality):
    def curve(seconds, held_out):
        return quality.Curve("digits", 0, "x", (quality.Point(seconds, 0, held_out),), 9.0)

    curves = [curve(1.0, 0.96), curve(2.0, 0.97), curve(4.0, 0.95)]
    assert quality._time(0.95, curves) == "2.00"
    assert quality._time(0.96, curves) == "2.00 (2 of 3)"
    assert quality._time(0.97, curves) == "not reached (1 of 3)"


def test_texts_become_columns_of_zeros_and_ones(quality):
    frame = pl.DataFrame({"age": [1, None, 3], "job": ["a", "b", None]})
    np.testing.assert_array_equal(quality.numbers(frame), [[1, 1, 0, 0], [0, 0, 1, 0], [3, 0, 0, 1]])


def test_the_report_is_written(quality, monkeypatch, tmp_path, capsys):
    def search(work, cores):
        return [quality.Event(0.25, 1, 0.6), quality.Event(0.5, 2, 0.7)]

    chosen = dict.fromkeys(("A", "B"), ("sklearn", search)) | {"C": ("no_such_package", None)}
    monkeypatch.setattr(quality, "SEARCHES", chosen)
    monkeypatch.setattr(quality, "tables", lambda adult: {"digits": load_iris(return_X_y=True)})
    main = import_module("benchmark.__main__")
    monkeypatch.setattr(quality, "TRIALS", 3)
    assert main.main(["--quality", "--epochs", "2", "--repeats", "2", "--out", str(tmp_path)]) == 0
    (numbers,), (page,) = tmp_path.glob("quality-*.json"), tmp_path.glob("quality-*.md")
    whole = json.loads(numbers.read_text())
    assert [(c["search"], c["seed"]) for c in whole["curves"]] == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    assert [p["candidate"] for p in whole["curves"][0]["points"]] == [1, 2]
    assert whole["curves"][0]["points"] == whole["curves"][2]["points"]
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert "## digits, 2 seeds" in text and "| C: not installed |" in text
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len(set(rows)) == 1
