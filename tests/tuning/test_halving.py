"""Successive halving, through the public tune()."""

import math

import numpy as np
import pytest
from safetensors import SafetensorError
from scipy.stats import loguniform
from sklearn.datasets import load_diabetes, load_iris

import gputune
from gputune.engine.checkpoint import StateCache
from gputune.errors import InputError
from gputune.study.store import Store
from gputune.tuning import rungs
from gputune.tuning.trainer import Trainer
from moments import time_is_over

FAST = {"max_epochs": 9, "cv": 3, "verbose": 0, "workers": 1}
SPACE = {"lr": loguniform(1e-4, 0.1), "batch_size": [8, 16, 32], "width": [8, 16, 20], "dropout": [0.0, 0.1]}


@pytest.fixture(scope="module")
def both(iris):
    """The same trials searched in full and by halving."""
    return tuple(
        gputune.tune("mlp", *iris, space=SPACE, n_trials=27, method=method, **FAST)
        for method in ("random", gputune.Halving(min_epochs=1))
    )


def lengths(study):
    return np.isfinite(study.curves).all(2).sum(1)


def assert_begins_as(full, halved, atol=2e-6):
    """Every curve is that of the full search up to where it ends."""
    for a, b, length in zip(full.curves, halved.curves, lengths(halved)):
        np.testing.assert_allclose(b[:length], a[:length], atol=atol)
        assert np.isnan(b[length:]).all()


def test_the_trials_leave_at_the_rungs(both):
    _, halved = both
    assert [t.state for t in halved.trials].count("complete") == 3
    assert np.bincount(lengths(halved)).tolist() == [0, 18, 0, 6, 0, 0, 0, 0, 0, 3]
    for trial, length in zip(halved.trials, lengths(halved)):
        assert trial.detail == ({} if length == 9 else {"rung": length})
        assert (trial.state == "pruned") == (length < 9)
    assert halved.spent == (18 + 6 * 3 + 3 * 9, 27 * 9)


def test_curves_are_those_of_the_full_search(both):
    full, halved = both
    assert [t.params for t in full.trials] == [t.params for t in halved.trials]
    assert_begins_as(full, halved)


def test_each_rung_keeps_the_best_fold_means(both):
    full, halved = both
    alive = np.arange(27)
    for rung, stays in ((1, 9), (3, 3)):
        means = full.curves[alive, rung - 1].mean(1)
        alive = alive[np.sort(np.argsort(-means, kind="stable")[:stays])]
        assert set(alive) == set(np.flatnonzero(lengths(halved) > rung))


def test_a_pruned_trial_is_never_best_while_one_is_complete(both):
    _, halved = both
    assert halved.best_trial.state == "complete"
    states = [trial.state for trial in halved.ranking()]
    assert states == ["complete"] * 3 + ["pruned"] * 24
    assert halved.best_model().predict(load_iris().data).shape == (150,)


def test_brackets_share_the_run(iris):
    method = gputune.Halving(min_epochs=1, brackets=3)
    study = gputune.tune("mlp", *iris, space=SPACE, n_trials=31, method=method, **FAST)
    found = np.bincount(lengths(study), minlength=10)
    assert found[1] and found[3] and found[9] and found.sum() == 31
    brackets = gputune.Halving(min_epochs=1, brackets=3).brackets_of(31, 9)
    assert all(length == 9 for length, b in zip(lengths(study), brackets) if b == 2)
    assert not any(length == 1 for length, b in zip(lengths(study), brackets) if b == 1)


def test_a_trial_that_a_repair_has_lost_moves_no_other_into_another_bracket():
    """At the first rung those of the first bracket are judged, by their numbers and not by their places."""
    method, kept = gputune.Halving(min_epochs=1, brackets=3), [n for n in range(13) if n != 3]
    away = method.trials_to_stop(1, {n: np.full((1, 2), float(n)) for n in kept}, 9)
    first = [n for n in kept if method.brackets_of(13, 9)[n] == 0]
    assert away == set(first[: -(len(first) // 3)]) and first != [
        n for n, bracket in zip(kept, method.brackets_of(12, 9)) if bracket == 0
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamwhd"])
def test_every_optimizer_goes_on_from_its_state(iris, optimizer):
    common = {"space": {"lr": loguniform(1e-3, 0.1), "width": [8]}, "n_trials": 8, "dtype": "float64", **FAST}
    full, halved = (gputune.tune("mlp", *iris, method=m, optimizer=optimizer, **common) for m in ("random", "halving"))
    assert_begins_as(full, halved, atol=1e-9)


def test_processes_give_what_one_process_gives(iris, both):
    two = gputune.tune(
        "mlp", *iris, space=SPACE, n_trials=27, method=gputune.Halving(min_epochs=1), **{**FAST, "workers": 2}
    )
    np.testing.assert_allclose(two.curves, both[1].curves, atol=2e-6)


def test_a_trial_that_diverges_leaves_and_is_failed():
    X, y = load_diabetes(return_X_y=True)
    space = {"lr": [1e-3, 1e-2, 1e4, 3e-3, 1e-1, 1e5], "width": [8]}
    study = gputune.tune("mlp", X, y, space=space, n_trials=6, optimizer="sgd", method="halving", **FAST)
    states = {trial.params["lr"]: trial.state for trial in study.trials}
    assert states[1e4] == states[1e5] == "failed"
    assert math.isfinite(study.best_score)


def test_waiting_states_may_lie_in_files(iris, both, monkeypatch):
    parked = []

    class Small(StateCache):
        def __init__(self, limit):
            super().__init__(3000)
            parked.append(self)

        def close(self):
            assert self.folder is not None and not self.states
            super().close()

    monkeypatch.setattr(rungs, "StateCache", Small)
    study = gputune.tune("mlp", *iris, space=SPACE, n_trials=27, method=gputune.Halving(min_epochs=1), **FAST)
    np.testing.assert_allclose(study.curves, both[1].curves, atol=2e-6)
    assert parked[0].size == 0


def test_a_full_disk_where_states_wait_is_named(iris, monkeypatch):
    def full(*arguments, **more):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("gputune.engine.checkpoint.save_file", full)
    with pytest.raises(OSError, match=r"no room for the states .* takes no more .*No space left.* let TMPDIR name"):
        gputune.tune("mlp", *iris, n_trials=4, method="halving", memory=1000, **FAST)


def test_a_halved_search_grows(iris, tmp_path):
    common = {"space": SPACE, "method": gputune.Halving(min_epochs=1), "study": tmp_path / "s.db", **FAST}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", stopping_at(2))
        with pytest.raises(KeyboardInterrupt):
            gputune.tune("mlp", *iris, n_trials=8, **common)
    study = gputune.tune("mlp", *iris, n_trials=21, **common)
    assert len(study.trials) == 21 and {t.state for t in study.trials} == {"pruned", "complete"}


def stopping_at(number):
    """Return a ``Trainer.train`` whose so many-th call is interrupted."""
    runs, train = [], Trainer.train

    def interrupted(*arguments, **rest):
        runs.append(1)
        if len(runs) == number:
            raise KeyboardInterrupt
        return train(*arguments, **rest)

    return interrupted


def test_any_result_that_was_lost_comes_back(iris, tmp_path):
    """As after a repair, which may leave out a trial that left at a rung while all that stayed are kept."""
    space = {"lr": loguniform(1e-4, 0.1), "width": [8]}  # one shape, so that all train in one company
    common = {"space": space, "n_trials": 8, "include_default": False, "study": tmp_path / "s.db", **FAST}
    options = {"method": gputune.Halving(min_epochs=1), **common}
    whole = gputune.tune("mlp", *iris, **options)
    assert {t.state for t in whole.trials} == {"pruned", "complete"}
    for trial in whole.trials:
        with Store.open(options["study"]) as store:
            store._connection.execute("DELETE FROM results WHERE number = ?", (trial.number,))
        again = gputune.tune("mlp", *iris, **options)
        np.testing.assert_array_equal(again.curves, whole.curves)
        assert [t.state for t in again.trials] == [t.state for t in whole.trials]


def test_a_timeout_scores_what_was_trained(iris, monkeypatch):
    time_is_over(monkeypatch, 20)
    study = gputune.tune("mlp", *iris, n_trials=4, method="halving", timeout=600, **{**FAST, "max_epochs": 100})
    states = {trial.state for trial in study.trials}
    assert "stopped" in states and states <= {"stopped", "pruned", "waiting"}
    assert study.spent[1] == 4 * 100  # not the epochs that the longest came to
    assert math.isfinite(study.best_score)


def test_the_solved_logistic_regression_is_refused(iris):
    with pytest.raises(InputError, match="method='halving' judges trials while they train, and the solved"):
        gputune.tune("logistic", *iris, method="halving", verbose=0)


def test_too_few_epochs_are_named(iris):
    with pytest.raises(InputError, match=r"Halving\(min_epochs=...\) must be below max_epochs=9, got 20"):
        gputune.tune("mlp", *iris, method=gputune.Halving(min_epochs=20), n_trials=2, **FAST)


def test_a_refused_call_leaves_no_study(iris, tmp_path):
    path = tmp_path / "s.db"
    for method in (gputune.Halving(min_epochs=20), gputune.Hypergradient(segments=1000)):
        with pytest.raises(InputError):
            gputune.tune("mlp", *iris, method=method, n_trials=2, study=path, **FAST)
        assert not path.exists()
    gputune.tune("mlp", *iris, method="halving", n_trials=2, study=path, **FAST)
    with pytest.raises(InputError, match=r"in: method \(min_epochs=None there, min_epochs=3 here\)"):
        gputune.tune("mlp", *iris, method=gputune.Halving(min_epochs=3), n_trials=2, study=path, **FAST)


@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_trials_with_and_without_momentum_go_on_in_any_company(backend):
    """Those without have no buffer for it, also where a rung leaves them beside one that has."""
    X = np.random.default_rng(0).normal(size=(90, 4))
    space = {"lr": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3], "momentum": [0.0, 0.9], "width": [8], "batch_size": [16]}
    options = {"optimizer": "sgd", "n_trials": 9, "cv": 3, "max_epochs": 9, "workers": 1, "verbose": 0}
    study = gputune.tune("mlp", X, X[:, 0] > 0, space=space, method="halving", backend=backend, **options)
    assert {trial.state for trial in study.trials} == {"complete", "pruned"}
