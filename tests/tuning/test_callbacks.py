"""Callbacks of tune(): their events and the order of these; no callback can lose results."""

import numpy as np
import optuna
import pytest
from sklearn.datasets import load_iris

import gputune
from gputune.callbacks import Callback, StopSearch
from gputune.ground.errors import InputError
from gputune.study.ledger import Ledger
from gputune.study.store import Store
from study_rows import candidates, result

X, Y = load_iris(return_X_y=True)
FAST = {"max_epochs": 3, "cv": 3, "verbose": 0, "workers": 1}
SPACE = {"lr": [1e-3, 3e-3, 1e-2, 3e-2], "width": [8, 16], "batch_size": [16, 32]}


class Listener(Callback):
    """Keeps everything it is told."""

    def __init__(self):
        self.starts = []
        self.epochs = []
        self.batches = []
        self.ends = []
        self.on_study_start = self.starts.append
        self.on_epoch = self.epochs.append
        self.on_trials_end = self.batches.append
        self.on_study_end = self.ends.append

    @property
    def trials(self):
        return sorted(
            (trial for batch in self.batches for trial in batch.trials), key=lambda t: t.number
        )


def tune(*callbacks, **options):
    return gputune.tune(
        "mlp", X, Y, callbacks=callbacks, **{"space": SPACE, "n_trials": 7, **FAST, **options}
    )


METHODS = {
    "random": "random",
    "halving": gputune.Halving(min_epochs=1),
    "median": gputune.Median(every=1),
    "hypergradient": gputune.Hypergradient(outer_steps=2),
    "optuna": gputune.OptunaSampler(optuna.samplers.RandomSampler(seed=0), batch=3),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tells_the_same_four_moments(method):
    listener = Listener()
    study = tune(listener, method=METHODS[method], n_trials=2 if method == "hypergradient" else 6)
    (start,), (end,) = listener.starts, listener.ends
    assert start.meta["model"] == "mlp" and all(trial.state == "waiting" for trial in start.trials)
    assert [t.params for t in end.trials] == [t.params for t in study.trials]
    for told, trial in zip(listener.trials, study.trials, strict=True):
        for name in ("number", "score", "origin", "state"):
            assert getattr(told, name) == getattr(trial, name)
    for batch in listener.batches:
        for trial, curve in zip(batch.trials, batch.curves):
            np.testing.assert_array_equal(curve, study.curves[trial.number][: len(curve)])
    if method != "hypergradient":  # whose line search scores points that it does not keep
        assert (
            sum(curves.shape[0] * curves.shape[1] for curves in listener.epochs) == study.spent[0]
        )
    assert all(curves.ndim == 3 and curves.shape[2] == 3 for curves in listener.epochs)


def test_epochs_of_the_solver():
    solved = Listener()
    gputune.tune("logistic", X, Y, n_trials=4, callbacks=[solved], **FAST)
    assert len(solved.trials) == 4 and [curves.shape for curves in solved.epochs] == [(4, 1, 3)]


def test_a_callback_ends_the_search_and_nothing_finished_is_lost():
    class Content(Callback):
        def on_epoch(self, curves):
            raise StopSearch

    study = tune(Content(), n_trials=4, workers=1)
    assert {trial.state for trial in study.trials} <= {"stopped", "waiting"}
    assert {trial.best_epoch for trial in study.trials if trial.state == "stopped"} == {1}


def test_what_a_callback_does_to_a_curve_is_its_own_affair():
    class Vandal(Callback):
        def on_epoch(self, curves):
            curves[:] = 7.0

    np.testing.assert_array_equal(tune(Vandal()).curves, tune().curves)


@pytest.mark.parametrize("moment", ["on_study_start", "on_epoch", "on_trials_end", "on_study_end"])
def test_one_that_raises_loses_nothing_and_is_not_called_again(moment, tmp_path):
    calls = []

    class Broken(Callback):
        pass

    def fail(self, *given):
        calls.append(moment)
        raise RuntimeError("no such server")

    setattr(Broken, moment, fail)
    other = Listener()
    path = tmp_path / "study.db"
    with pytest.warns(
        UserWarning,
        match=rf"Broken\.{moment} raised RuntimeError: no such server. Broken is not called again",
    ):
        study = tune(Broken(), other, study=path)
    assert (len(calls), len(other.trials), len(other.ends)) == (1, 7, 1)
    np.testing.assert_array_equal(study.curves, tune().curves)
    assert all(trial.state == "complete" for trial in gputune.Study.open(path).trials)


def test_trials_are_in_the_file_before_a_callback_receives_them(tmp_path):
    path = tmp_path / "study.db"
    listener = Listener()
    seen = []

    class Reader(Callback):
        def on_trials_end(self, trials):
            kept = {t.number: t.score for t in gputune.Study.open(path).trials}
            seen.extend(kept[t.number] == t.score for t in trials.trials)

    tune(Reader(), listener, study=path)
    assert seen == [True] * 7
    assert listener.starts[0].file == listener.ends[0].file == path
    assert listener.batches[0].file is None  # which holds more than these trials


def test_what_was_told_or_is_of_another_process_is_not_told_again(tmp_path):
    path = tmp_path / "study.db"
    heard = []
    with Store.create(path, {}) as store, Store.open(path) as other:
        ledger = Ledger(store)
        ledger.add(candidates(range(4)))
        ledger.on_finish = lambda rows: heard.append([(c.number, r.score) for c, r in rows])
        other.finish([result(3, score=0.9)])
        ledger.refresh()
        ledger.finish([result(0, score=0.5), result(1, score=0.6)])
        ledger.finish([result(1, score=0.6), result(2, score=0.7)])
        ledger.finish([result(2, score=0.7), result(3, score=0.9)])
    assert heard == [[(0, 0.5), (1, 0.6)], [(2, 0.7)]]


def test_ctrl_c_in_a_callback_stops_the_search_and_keeps_what_is_done(tmp_path):
    path = tmp_path / "study.db"
    listener = Listener()
    wide = [{"width": 128}]  # a population of its own, so that there is more than one chunk

    class Stop(Callback):
        def on_trials_end(self, trials):
            raise KeyboardInterrupt

    with pytest.raises(gputune.SearchInterrupted, match="The results are kept in"):
        tune(listener, Stop(), study=path, include=wide)
    (end,) = listener.ends
    done = [t.number for t in gputune.Study.open(path).trials if t.state == "complete"]
    assert 0 < len(done) < 8
    assert done == [t.number for t in end.trials if t.state == "complete"]
    again = Listener()
    study = tune(again, study=path, include=wide)
    assert [t.number for t in again.starts[0].trials if t.state == "complete"] == done
    assert sorted(done + [t.number for t in again.trials]) == [t.number for t in study.trials]


@pytest.mark.parametrize("callbacks", [print, [print], [Listener], Listener(), None, "tensorboard"])
def test_what_is_no_callback_is_refused(callbacks):
    with pytest.raises(InputError, match="callbacks must be a list of gputune.callbacks.Callback"):
        gputune.tune("mlp", X, Y, callbacks=callbacks, **FAST)
