"""With a timeout, all trials train their first epoch before any trial trains on."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

import gputune
from gputune.engine.checkpoint import CheckpointFolder
from gputune.methods import training
from gputune.population.population import Population
from gputune.study.claims import Claims
from gputune.study.store import Store

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
Y = np.where(X[:, 0] + 0.5 * RNG.normal(size=60) > 0, "yes", "no")
# One trial in each chunk. The rate of the last trial is so large that it diverges.
OPTIONS = {
    "space": {"lr": [1e-4, 1e-3, 1e-2, 1e30]},
    "n_trials": 4,
    "max_epochs": 4,
    "cv": 2,
    "scoring": "neg_log_loss",
    "memory": "1KB",
}


class StopAfter(gputune.callbacks.Callback):
    """Ends the search after some epochs of any trial."""

    def __init__(self, epochs):
        self.left = epochs

    def on_epoch(self, _curves):
        self.left -= 1
        if self.left == 0:
            raise gputune.callbacks.StopSearch


@pytest.fixture(autouse=True)
def needed(monkeypatch):
    monkeypatch.setattr(training, "_ENOUGH_SHARE", 0)


def tune(**more):
    return gputune.tune("mlp", X, Y, optimizer="sgd", **{"workers": 1, **OPTIONS, **more})


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_results_are_the_same_as_without_a_timeout(workers, capsys):
    study = tune(timeout=1000, workers=workers)
    assert "all trials train for one epoch first" in capsys.readouterr().err
    expected = tune(verbose=0, workers=workers)
    assert "one epoch first" not in capsys.readouterr().err
    np.testing.assert_array_equal(study.curves, expected.curves)
    states = [trial.state for trial in study.trials]
    assert states == [trial.state for trial in expected.trials]
    mine = study.ensemble().predict_proba(X)
    np.testing.assert_array_equal(mine, expected.ensemble().predict_proba(X))


def test_all_trials_have_a_score_when_the_time_is_over(tmp_path):
    """The fifth epoch is the second one of the first trial. The study then continues."""
    path = tmp_path / "study.db"
    cut = tune(timeout=1000, callbacks=[StopAfter(5)], study=path, verbose=0)
    n_epochs = sorted(int(np.isfinite(curve[:, 0]).sum()) for curve in cut.curves)
    assert n_epochs[1:] == [1, 1, 2]
    finite = [trial for trial in cut.trials if trial.state != "failed"]
    assert {trial.state for trial in finite} == {"stopped"}
    assert all(np.isfinite(trial.score) for trial in finite)
    whole = tune(study=path, verbose=0)
    np.testing.assert_array_equal(whole.curves, tune(verbose=0).curves)


def test_time_that_is_over_after_the_first_epochs(tmp_path, capsys):
    path = tmp_path / "study.db"
    cut = tune(timeout=1000, callbacks=[StopAfter(4)], study=path)
    assert {trial.state for trial in cut.trials} <= {"stopped", "failed"}
    assert np.isnan(cut.curves[:, 1:]).all()
    capsys.readouterr()
    whole = tune(study=path)
    n_stopped = [trial.state for trial in cut.trials].count("stopped")
    assert (
        f"{n_stopped} trials can continue from where training was stopped"
        in capsys.readouterr().err
    )
    np.testing.assert_array_equal(whole.curves, tune(verbose=0).curves)


def test_a_timeout_within_the_first_epochs_tells_how_many_trials_have_no_score(capsys):
    cut = tune(timeout=0.001)
    assert [trial.state for trial in cut.trials].count("waiting") == 3
    told = capsys.readouterr().err
    assert "note: the time was over before 3 trials had trained for one epoch. These trials" in told
    assert "have no score. Choose a longer timeout, or fewer trials or folds." in told
    tune(timeout=1000, callbacks=[StopAfter(1)])
    assert "the time was over" not in capsys.readouterr().err


class AtEpoch(gputune.callbacks.Callback):
    """Calls functions after some epochs of any trial, by the number of these epochs."""

    def __init__(self, calls):
        self.calls = calls
        self.epoch = 0

    def on_epoch(self, _curves):
        self.epoch += 1
        if self.epoch in self.calls:
            self.calls[self.epoch]()


# No trial diverges, and each first epoch is followed by a checkpoint.
SAVED = {"space": {"lr": [1e-4, 1e-3, 1e-2, 1e-1]}, "checkpoint_seconds": 1e-6, "verbose": 0}


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(training, "pause_after", lambda writing: 0.0)


@pytest.mark.usefixtures("at_once")
def test_a_kill_within_the_first_epochs_loses_at_most_one_interval(tmp_path):
    n_files = []

    def look():
        n_files.append(len(list((tmp_path / "study.db.state").glob("*.safetensors"))))

    look_twice = AtEpoch({3: look, 5: look})
    tune(timeout=1000, study=tmp_path / "study.db", callbacks=[look_twice], **SAVED)
    assert n_files == [2, 4]


@pytest.mark.usefixtures("at_once")
def test_another_process_continues_trials_after_their_first_epoch(tmp_path):
    path = tmp_path / "study.db"
    others = []
    taken = []

    def take():
        others.append(Claims(path))
        with Store.open(path) as store:
            taken.extend(chunk.number for chunk in store.plan() if others[0].take(chunk))

    # This process trains chunk 2, and chunk 3 has not begun when the other process takes it.
    calls = {3: take, 6: lambda: others[0].close()}
    study = tune(timeout=1000, study=path, callbacks=[AtEpoch(calls)], **SAVED)
    assert taken == [0, 1, 3]
    np.testing.assert_array_equal(study.curves, tune(**SAVED).curves)


def test_a_checkpoint_of_another_process_is_read_after_the_claim(tmp_path, monkeypatch):
    """The other process trains further after this process has read the checkpoints."""
    options = {**SAVED, "n_trials": 1, "max_epochs": 8}
    expected = tune(**options)
    options["study"] = tmp_path / "study.db"
    tune(callbacks=[StopAfter(1)], **options)
    read = CheckpointFolder.read
    early = []

    def read_early(*args):
        early.extend(read(*args))
        return list(early)

    monkeypatch.setattr(CheckpointFolder, "read", read_early)
    tune(callbacks=[StopAfter(2)], **options)
    assert [checkpoint.state.epoch for checkpoint in early] == [1]
    monkeypatch.setattr(CheckpointFolder, "read", lambda *_: early)
    cut = tune(callbacks=[StopAfter(1)], **options)
    assert np.isfinite(cut.curves[0, :, 0]).sum() == 4
    monkeypatch.undo()
    np.testing.assert_array_equal(tune(**options).curves, expected.curves)


@pytest.mark.parametrize(("kind", "needed"), [("mlp", False), ("module", True)])
def test_the_estimate_of_a_module_is_not_trusted(monkeypatch, kind, needed):
    """The planner does not know the layers of a module, such as an LSTM over long sequences."""
    monkeypatch.setattr(training, "_ENOUGH_SHARE", 0.25)
    good_enough = SimpleNamespace(is_possible=False)
    stop = SimpleNamespace(deadline=time.monotonic() + 60)
    context = SimpleNamespace(stop=stop, epochs=30, good_enough=good_enough)
    chunks = tuple(Population(kind, (i,), ({},)) for i in range(2))
    plan = SimpleNamespace(
        chunks=chunks, at_once=1, workers=1, threads=1, seconds=1.5, state_bytes=0
    )
    assert training._need_first_epochs(context, plan) == needed
