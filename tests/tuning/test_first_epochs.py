"""With a timeout, all trials train their first epoch before any trial trains on."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

import gputune
from gputune.engine.checkpoint import Checkpoint, CheckpointFolder, Checkpointing
from gputune.engine.job import Outcome, RungOutcome
from gputune.engine.stop import Stop
from gputune.methods import first_epochs
from gputune.population.population import Population
from gputune.population.state import State
from gputune.study.claims import Claims
from gputune.study.store import Store
from gputune.tuning.context import Context
from gputune.types import Outputs

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
        self.checkpointing = lambda numbers: None
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
    recorded = SimpleNamespace(configs=[{}, {}, {}], trials=(), chunks={})
    first = first_epochs.train_first_epochs(context, recorded, plan, lambda chunk: False)
    assert first.plan.chunks == ()
    (said,) = context.said
    assert said.startswith("note: the time was over before 2 trials had trained for one epoch.")


@pytest.mark.parametrize("epoch", [None, 30])
@pytest.mark.parametrize("search", ["this", "other"])
def test_a_later_checkpoint_stays(tmp_path, epoch, search):
    """A lost worker or another process may have written the checkpoint, but a checkpoint of another
    search is replaced."""
    checkpointing = Checkpointing(CheckpointFolder(tmp_path, "this"), (7,), 0.0)
    curves = np.zeros((1, 1, 2))
    if epoch is not None:
        later = Checkpoint((7,), (0,), curves, State(epoch, ()), 1.0)
        CheckpointFolder(tmp_path, search).write(later, [{}])
    outcome = SimpleNamespace(
        alive=(0,), index=(0,), curves=curves, state=State(1, ()), seconds=1.0
    )
    plan = FewChunks((Population("mlp", (0,), ({},)),))
    first = first_epochs.FirstEpochs(None, plan, [{}], lambda chunk: True, unsaved=[outcome])
    assert first.keep_rest(checkpointing) == {0}
    (kept,) = checkpointing.folder.read({7: {}})
    assert kept.state.epoch == (30 if epoch and search == "this" else 1)


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
    monkeypatch.setattr(first_epochs, "pause_after", lambda writing: 0.0)


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


def test_outputs_after_the_first_epochs_stay_within_the_limit(monkeypatch):
    outputs = Outputs(1, np.zeros((60, 1), np.float32))
    monkeypatch.setattr("gputune.types.KEPT_BYTES", 2 * outputs.values.nbytes)
    first = first_epochs.FirstEpochs(None, None, [{}] * 4, lambda chunk: True)
    for i, score in enumerate([0.3, np.nan, 0.5, 0.4]):
        curves = np.full((1, 1, 2), score)
        held = {} if np.isnan(score) else {i: outputs}
        first.add(RungOutcome((i,), curves, 1, 1.0, State(1, ()), (0,), outputs=held))
    assert first.outputs.keys() == {2, 3}
    assert not any(outcome.outputs for outcome in first.outcomes)
    later = Outcome((2, 1), np.zeros((2, 4, 2)), 4, 1.0, outputs={1: outputs})
    assert first.completed(later).outputs.keys() == {1, 2}
    assert first.outputs.keys() == {3}


@pytest.mark.parametrize(("kind", "needed"), [("mlp", False), ("module", True)])
def test_the_estimate_of_a_module_is_not_trusted(monkeypatch, kind, needed):
    """The planner does not know the layers of a module, such as an LSTM over long sequences."""
    monkeypatch.setattr(first_epochs, "_ENOUGH_SHARE", 0.25)
    good_enough = SimpleNamespace(is_possible=False)
    stop = SimpleNamespace(deadline=time.monotonic() + 60)
    context = SimpleNamespace(stop=stop, epochs=30, good_enough=good_enough)
    chunks = tuple(Population(kind, (i,), ({},)) for i in range(2))
    plan = SimpleNamespace(
        chunks=chunks, at_once=1, workers=1, threads=1, seconds=1.5, state_bytes=0
    )
    assert first_epochs.are_needed(context, plan) == needed
