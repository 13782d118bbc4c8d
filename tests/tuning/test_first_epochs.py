"""With a timeout, all trials train their first epoch before any trial trains on."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

import gputune
from gputune.engine.checkpoint import CheckpointFolder, Checkpointing
from gputune.engine.stop import Stop
from gputune.methods import first_epochs
from gputune.population.population import Population
from gputune.population.state import State
from gputune.tuning.context import Context

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
    monkeypatch.setattr(first_epochs, "_ENOUGH_SHARE", 0)


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


@dataclass(frozen=True)
class FewChunks:
    """A plan of chunks of one trial each."""

    chunks: tuple[Population, ...]
    workers: int = 1


class StoppedSearch:
    """The context of a search whose time is over before any chunk has begun, except chunks that
    another process has claimed."""

    tell_trials_without_score = Context.tell_trials_without_score

    def __init__(self):
        self.said = []
        self.trainer = self
        self.progress = SimpleNamespace(advance=None, say=self.said.append)
        self.stop = Stop()

    def job(self, kind, **fields):
        return None

    def train(self, job, plan, *, progress, claim):
        assert not claim(plan.chunks[0])
        yield from ()

    def is_over(self):
        return True


def test_trials_of_another_process_are_not_counted_as_left():
    context = StoppedSearch()
    plan = FewChunks(tuple(Population("mlp", (i,), ({},)) for i in range(3)))
    recorded = SimpleNamespace(configs=[{}, {}, {}])
    first = first_epochs.train_first_epochs(context, recorded, plan, lambda chunk: False)
    assert first.plan.chunks == ()
    (said,) = context.said
    assert said.startswith("note: the time was over before 2 trials had trained for one epoch.")


@pytest.mark.parametrize(("has_begun", "exists"), [(True, True), (True, False), (False, True)])
def test_the_checkpoint_of_a_lost_worker_stays(tmp_path, has_begun, exists):
    """Unless the chunk has not trained further: then the file is of an earlier search."""
    folder = CheckpointFolder(tmp_path, "search")
    checkpointing = Checkpointing(folder, (7,), 0.0)
    later = folder.path([7])
    if exists:
        later.write_bytes(b"epoch 30")
    outcome = SimpleNamespace(
        alive=(0,), index=(0,), curves=np.zeros((1, 1, 2)), state=State(1, {}), seconds=1.0
    )
    first = first_epochs.FirstEpochs(None, None, [{}], [outcome])
    if has_begun:
        assert first.begin(Population("mlp", (0,), ({},)))
    first.keep_rest(checkpointing)
    assert later.exists()
    assert (later.read_bytes() == b"epoch 30") == (has_begun and exists)
