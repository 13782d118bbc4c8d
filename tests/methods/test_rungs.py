"""Successive halving and the median rule, through the public tune() and the command line."""

import math
from functools import partial

import numpy as np
import pytest
from safetensors import SafetensorError
from scipy.stats import loguniform
from sklearn.datasets import load_diabetes, load_iris

import gputune
from command_line import FAST, run
from gputune.callbacks import Callback, StopSearch
from gputune.engine.checkpoint import StateCache
from gputune.methods import paused
from gputune.methods.rungs import with_divergence
from gputune.study.store import Store
from gputune.tuning.method import method_from_json
from gputune.tuning.trainer import Trainer
from moments import time_is_over
from refused import refused

SPACE = {
    "lr": loguniform(1e-4, 0.1),
    "batch_size": [8, 16, 32],
    "width": [8, 16, 20],
    "dropout": [0.0, 0.1],
}
HALVING = gputune.Halving(min_epochs=1)
MEDIAN = gputune.Median(min_epochs=2, every=3)
tune = partial(gputune.tune, max_epochs=9, cv=3, verbose=0, workers=1)
many = partial(tune, "mlp", *load_iris(return_X_y=True), space=SPACE, n_trials=27)


@pytest.fixture(scope="module")
def full():
    return many()


@pytest.fixture(scope="module")
def halved():
    return many(method=HALVING)


@pytest.fixture(scope="module")
def median():
    return many(method=MEDIAN)


def lengths(study):
    return np.isfinite(study.curves).all(2).sum(1)


def assert_begins_as(full, study, atol=2e-6):
    """Every curve is that of the full search up to where it ends, and every trial says where that
    is."""
    assert [t.params for t in full.trials] == [t.params for t in study.trials]
    for a, b, trial, length in zip(full.curves, study.curves, study.trials, lengths(study)):
        np.testing.assert_allclose(b[:length], a[:length], atol=atol)
        assert np.isnan(b[length:]).all()
        assert trial.detail == ({} if length == 9 else {"rung": length})
        assert trial.state == ("complete" if length == 9 else "pruned")


def test_halving_keeps_the_best_fold_means_of_each_rung(full, halved):
    assert_begins_as(full, halved)
    assert np.bincount(lengths(halved)).tolist() == [0, 18, 0, 6, 0, 0, 0, 0, 0, 3]
    assert halved.spent == (18 + 6 * 3 + 3 * 9, 27 * 9)
    alive = np.arange(27)
    for rung, stays in ((1, 9), (3, 3)):
        means = full.curves[alive, rung - 1].mean(1)
        alive = alive[np.sort(np.argsort(-means, kind="stable")[:stays])]
        assert set(alive) == set(np.flatnonzero(lengths(halved) > rung))
    # A pruned trial is never best while one is complete.
    assert [trial.state for trial in halved.ranking()] == ["complete"] * 3 + ["pruned"] * 24
    assert halved.best_trial.state == "complete"
    assert halved.best_model().predict(load_iris().data).shape == (150,)


def test_the_median_decides_as_the_rule_on_the_full_curves(full, median):
    assert_begins_as(full, median)
    ended = dict.fromkeys(range(27), 9)
    for epoch in (2, 5, 8):
        curves = {n: full.curves[n, : min(9, ended[n])] for n in range(27)}
        for number in MEDIAN.trials_to_stop(epoch, curves, 9):
            ended[number] = min(ended[number], epoch)
    assert lengths(median).tolist() == list(ended.values())
    assert 2 < list(ended.values()).count(9) < 27
    assert (
        median.best_trial.state == "complete"
        and median.spent[0] == sum(ended.values()) < median.spent[1]
    )
    # which is less mild
    assert lengths(median).sum() > lengths(many(method=gputune.Halving(min_epochs=2))).sum()
    assert {t.state for t in many(method="median", n_trials=3).trials} == {"complete"}


def test_brackets_share_the_run():
    method = gputune.Halving(min_epochs=1, brackets=3)
    ends = lengths(many(n_trials=31, method=method))
    found = np.bincount(ends, minlength=10)
    brackets = method.brackets_of(31, 9)
    assert found[1] and found[3] and found[9] and found.sum() == 31
    assert all(length == 9 for length, bracket in zip(ends, brackets) if bracket == 2)
    assert not any(length == 1 for length, bracket in zip(ends, brackets) if bracket == 1)


def test_a_trial_that_a_repair_has_lost_moves_no_other_into_another_bracket():
    """The first rung judges the trials of the first bracket, by their numbers and not by their
    positions.
    """
    method = gputune.Halving(min_epochs=1, brackets=3)
    kept = [n for n in range(13) if n != 3]
    away = method.trials_to_stop(1, {n: np.full((1, 2), float(n)) for n in kept}, 9)
    first = [n for n in kept if method.brackets_of(13, 9)[n] == 0]
    assert away == set(first[: -(len(first) // 3)]) and first != [
        n for n, bracket in zip(kept, method.brackets_of(12, 9)) if bracket == 0
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamwhd"])
def test_every_optimizer_continues_from_its_state(optimizer):
    space = {"lr": loguniform(1e-3, 0.1), "width": [8]}
    search = partial(many, space=space, n_trials=8, dtype="float64", optimizer=optimizer)
    assert_begins_as(search(), search(method="halving"), atol=1e-9)


def test_processes_give_what_one_process_gives(halved):
    np.testing.assert_allclose(many(method=HALVING, workers=2).curves, halved.curves, atol=2e-6)


def test_a_trial_that_diverges_leaves_and_is_failed():
    space = {"lr": [1e-3, 1e-2, 1e4, 3e-3, 1e-1, 1e5], "width": [8]}
    data = load_diabetes(return_X_y=True)
    study = tune("mlp", *data, space=space, n_trials=6, optimizer="sgd", method="halving")
    states = {trial.params["lr"]: trial.state for trial in study.trials}
    assert states[1e4] == states[1e5] == "failed"
    assert math.isfinite(study.best_score)


class Cut(Callback):
    """Ends the search after some epochs of any chunk."""

    def __init__(self, epochs):
        self.left = epochs

    def on_epoch(self, curves):
        self.left -= 1
        if self.left == 0:
            raise StopSearch


def test_a_trial_that_diverges_counts_at_the_next_rung_in_any_chunk(tmp_path):
    """Three of the nine trials diverge, in a chunk of their own or together with other trials."""
    X = np.random.default_rng(0).normal(size=(100, 5))
    space = {"lr": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 1e12, 1e13, 1e14], "width": [8]}
    search = partial(
        tune,
        "mlp",
        X,
        X @ np.arange(5.0),
        space=space,
        n_trials=9,
        include_default=False,
        optimizer="sgd",
        method=gputune.Halving(min_epochs=3),
        task="regression",
    )
    states = [trial.state for trial in search().trials]
    assert sorted(states) == ["complete"] * 3 + ["failed"] * 3 + ["pruned"] * 3
    assert [trial.state for trial in search(memory="1KB").trials] == states
    search(study=tmp_path / "study.db", callbacks=[Cut(2)])
    assert [trial.state for trial in search(study=tmp_path / "study.db").trials] == states


def test_a_diverged_trial_does_not_count_at_a_rung_that_it_has_not_reached():
    curve = np.array([[1.0, 1.0], [1.0, math.nan]])
    expected = [[1.0, 1.0], [math.nan] * 2, [math.nan] * 2]
    np.testing.assert_array_equal(with_divergence(curve, [1, 3, 9]), expected)
    np.testing.assert_array_equal(with_divergence(curve[:1], [1, 3, 9]), curve[:1])


def test_waiting_states_may_lie_in_files(halved, monkeypatch):
    parked = []

    class Small(StateCache):
        def __init__(self, limit):
            super().__init__(3000)
            parked.append(self)

        def close(self):
            assert self.folder is not None and not self.states
            super().close()

    monkeypatch.setattr(paused, "StateCache", Small)
    np.testing.assert_allclose(many(method=HALVING).curves, halved.curves, atol=2e-6)
    assert parked[0].size == 0


def test_a_full_disk_where_states_wait_is_named(iris, monkeypatch):
    def full(*arguments, **more):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("gputune.engine.checkpoint.save_file", full)
    with pytest.raises(
        OSError, match=r"The states .* do not fit into .*No space left.* set TMPDIR to"
    ):
        tune("mlp", *iris, n_trials=4, method="halving", memory=1000)


def test_a_halved_search_grows(tmp_path):
    search = partial(many, method=HALVING, study=tmp_path / "s.db")
    runs = []
    train = Trainer.train

    def interrupted(*arguments, **rest):
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return train(*arguments, **rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train", interrupted)
        search(n_trials=8)
    study = search(n_trials=21)
    assert len(study.trials) == 21 and {t.state for t in study.trials} == {"pruned", "complete"}


def test_any_result_that_was_lost_comes_back(tmp_path):
    """As after a repair, which may leave out a trial that left at a rung while all that stayed are
    kept."""
    # one shape: all train in one company
    space = {"lr": loguniform(1e-4, 0.1), "width": [8]}
    path = tmp_path / "s.db"
    search = partial(
        many, space=space, n_trials=8, include_default=False, method=HALVING, study=path
    )
    whole = search()
    assert {t.state for t in whole.trials} == {"pruned", "complete"}
    for trial in whole.trials:
        with Store.open(path) as store:
            store._connection.execute("DELETE FROM results WHERE number = ?", (trial.number,))
        again = search()
        np.testing.assert_array_equal(again.curves, whole.curves)
        assert [t.state for t in again.trials] == [t.state for t in whole.trials]


def test_a_timeout_scores_what_was_trained(iris, monkeypatch):
    time_is_over(monkeypatch, 20)
    study = tune("mlp", *iris, n_trials=4, method="halving", timeout=600, max_epochs=100)
    states = {trial.state for trial in study.trials}
    assert "stopped" in states and states <= {"stopped", "pruned", "waiting"}
    assert study.spent[1] == 4 * 100  # not the epochs that the longest came to
    assert math.isfinite(study.best_score)


@pytest.mark.parametrize(
    ("model", "method", "words"),
    [
        (
            "logistic",
            "halving",
            "method='halving' compares trials while they train, but the solved",
        ),
        ("logistic", "median", "method='median' compares trials while they train, but the solved"),
        (
            "mlp",
            gputune.Halving(min_epochs=20),
            r"Halving\(min_epochs=...\) must be below max_epochs=9, got 20",
        ),
        ("mlp", gputune.Hypergradient(segments=1000), "must be at most the number of steps"),
    ],
)
def test_a_refused_call_leaves_no_study(iris, tmp_path, model, method, words):
    with refused(words):
        tune(model, *iris, method=method, n_trials=2, study=tmp_path / "s.db")
    assert not (tmp_path / "s.db").exists()


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            "halving",
            gputune.Halving(min_epochs=3),
            r"\(min_epochs=None in the study, min_epochs=3 now\)",
        ),
        (
            MEDIAN,
            "median",
            r"\(min_epochs=2, every=3 in the study, min_epochs=None, every=None now\)",
        ),
    ],
)
def test_a_study_keeps_the_options_of_its_method(iris, tmp_path, first, second, words):
    assert method_from_json(MEDIAN.to_json()) == MEDIAN
    search = partial(tune, "mlp", *iris, n_trials=2, study=tmp_path / "s.db")
    search(method=first)
    with refused(f"in: method {words}"):
        search(method=second)


@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_trials_with_and_without_momentum_continue_among_any_trials(backend):
    """Those without have no buffer for it, also where a rung leaves them beside one that has."""
    X = np.random.default_rng(0).normal(size=(90, 4))
    space = {
        "lr": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
        "momentum": [0.0, 0.9],
        "width": [8],
        "batch_size": [16],
    }
    how = {"optimizer": "sgd", "n_trials": 9, "method": "halving", "backend": backend}
    study = tune("mlp", X, X[:, 0] > 0, space=space, **how)
    assert {trial.state for trial in study.trials} == {"complete", "pruned"}


def test_the_command_says_what_the_median_spent(tmp_path):
    options = "--trials 13 --epochs 6 --method median --min-epochs 2 --every 1".split()
    code, out, err = run("tune", "sklearn:iris", *FAST, *options, "--out", tmp_path)
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    study = gputune.Study.open(tmp_path / "study.db")
    spent, full = study.spent
    assert study.meta["method"] == {"name": "median", "min_epochs": 2, "every": 1, "min_trials": 5}
    assert "Median of 13 trials these were pruned: " in said
    assert f"{spent} of {full} trial-epochs were trained ({spent / full:.0%})" in said
