"""A search that was killed or stopped goes on from its checkpoints, and ends as one that never was,
bit for bit."""

import itertools
import os
import re
import signal
import time
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from scipy.stats import loguniform
from sklearn.datasets import load_iris

import gputune
from forked import Fork
from gputune.callbacks import Callback, StopSearch
from gputune.engine import job as chunks
from gputune.engine.checkpoint import CheckpointFolder
from gputune.engine.compiled import CompiledChunk
from gputune.engine.stacked import StackedChunk
from gputune.study.store import Store
from refused import refused

COMPILED = {
    "lr": loguniform(1e-4, 0.1),
    "batch_size": [8, 16],
    "width": [8, 16],
    "dropout": [0.0, 0.1],
    "optimizer": ["adamw", "sgd"],
}
SPACE = COMPILED | {"optimizer": ["adamw", "sgd", "adamhd"]}  # adamhd is not compiled
COMMON = {"space": SPACE, "n_trials": 8, "cv": 2, "max_epochs": 27, "verbose": 0, "workers": 1}
IRIS = load_iris(return_X_y=True)


def tune(**more):
    return gputune.tune("mlp", *IRIS, **{**COMMON, **more})


METHODS = {
    "random": {},
    "halving": {"method": gputune.Halving(min_epochs=3), "space": COMPILED},
    "brackets": {"method": gputune.Halving(min_epochs=1, brackets=3), "space": COMPILED},
    "median": {"method": gputune.Median(min_epochs=3, every=4), "space": COMPILED},
}


@pytest.fixture(scope="module")
def counted():
    """The searches that nothing stops, and the epochs that each of them trains."""

    def count(call):
        with pytest.MonkeyPatch.context() as patch:
            total = Dies(patch)
            return tune(**call), total.epochs

    return {name: count(call) for name, call in METHODS.items()}


@pytest.fixture(scope="module")
def whole(counted):
    return {name: study for name, (study, _) in counted.items()}


def assert_same(found, whole):
    assert found.curves.tobytes() == whole.curves.tobytes()
    for a, b in zip(found.trials, whole.trials, strict=True):
        for name in ("params", "state", "score", "fold_scores", "best_epoch", "detail"):
            assert repr(getattr(a, name)) == repr(getattr(b, name))  # nan is nan


class Dies:
    """Counts trained ``epochs`` and ``trials``, and loses the process at the n-th epoch of all
    chunks.
    """

    def __init__(self, monkeypatch, at=None):
        self.epochs = 0
        self.at = at
        self.trials = set()
        advance = chunks._Watch.__call__

        def watched(watch, trained):
            self.epochs += 1
            if (checkpointing := watch.job.checkpointing) is not None:
                self.trials |= {checkpointing.numbers[i] for i in watch.chunk.index}
            over = advance(watch, trained)
            if self.epochs == self.at:
                raise RuntimeError("lost")
            return over

        monkeypatch.setattr(chunks._Watch, "__call__", watched)


def lose(at, call):
    """Make a call that loses its process at the n-th epoch, with a checkpoint at every epoch."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="lost"):
        # An interval of twenty writes would leave most epochs out here, where an epoch takes
        # milliseconds.
        patch.setattr("gputune.engine.checkpoint._WRITING_SHARE", 0)
        Dies(patch, at)
        tune(**call, checkpoint_seconds=1e-9)


@pytest.mark.parametrize(
    ("method", "at"),
    [
        pytest.param(
            method,
            at,
            marks=() if at != 7 and method in ("random", "brackets") else pytest.mark.long,
        )
        for method in METHODS
        for at in (1, 7, 30)
    ],
)
def test_a_lost_search_ends_as_one_that_was_not(counted, tmp_path, monkeypatch, method, at):
    whole, epochs = counted[method]
    call = {**METHODS[method], "study": tmp_path / "s.db"}
    lose(at, call)
    kept = sorted((tmp_path / "s.db.state").glob("*"))
    first_rung = (method, at) == ("brackets", 1)  # nothing is kept of a chunk's last epoch
    assert (kept or first_rung) and all(file.suffix == ".safetensors" for file in kept)
    again = Dies(monkeypatch)
    assert_same(tune(**call), whole)
    assert again.epochs <= epochs - (at - 1 if method == "random" else not first_rung)
    assert not (tmp_path / "s.db.state").exists()


@pytest.mark.parametrize("method", ["halving", pytest.param("median", marks=pytest.mark.long)])
def test_an_eager_one_agrees_to_rounding_and_trains_no_finished_trial(
    tmp_path, monkeypatch, method
):
    call = {**METHODS[method], "backend": "eager", "space": SPACE}
    whole = tune(**call)
    lose(45, call | {"study": tmp_path / "s.db"})
    states = {trial.number: trial.state for trial in gputune.Study.open(tmp_path / "s.db").trials}
    waiting = {number for number, state in states.items() if state == "waiting"}
    again = Dies(monkeypatch)
    found = tune(**call, study=tmp_path / "s.db")
    assert again.trials == waiting < states.keys()
    np.testing.assert_allclose(found.curves, whole.curves, atol=2e-6)
    assert [trial.state for trial in found.trials] == [trial.state for trial in whole.trials]


def told_time(monkeypatch, *, epoch, writing):
    """Let only training and writing move the clock, by fixed seconds per epoch and checkpoint."""
    now = [0.0]

    def taking(seconds, work):
        def run(*arguments):
            now[0] += seconds
            return work(*arguments)

        return run

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for kind in (StackedChunk, CompiledChunk):
        monkeypatch.setattr(kind, "advance", taking(epoch, kind.advance))
    monkeypatch.setattr(CheckpointFolder, "write", taking(writing, CheckpointFolder.write))


@pytest.mark.parametrize(
    ("method", "writing"),
    [("random", 1.0), ("halving", 0.0), pytest.param("halving", 1.0, marks=pytest.mark.long)],
)
def test_no_more_is_repeated_than_the_time_between_two_checkpoints(
    tmp_path, monkeypatch, method, writing
):
    """Lost after any epoch of one second: a checkpoint is due after 7 seconds, or 20 times the
    seconds of writing.
    """
    memory = {"random": 800_000, "halving": 200_000}[method]  # chunks of 27 epochs, or of 3 to 18
    call = {
        **METHODS[method],
        "space": {"lr": loguniform(1e-4, 0.1), "width": [8, 20]},
        "cv": 3,
        "n_trials": 6,
    }
    call |= {"checkpoint_seconds": 7.0, "backend": "eager", "memory": memory}
    # The plan of a GPU trains three members first, to measure them.
    monkeypatch.setattr("gputune.tuning.context.measure_need", lambda *work, **options: None)
    with monkeypatch.context() as patch:
        total = Dies(patch)
        tune(**call)
    repeated = []
    for at in range(1, total.epochs, 97 if method == "random" else 47):
        epochs = 0
        for death in (at, None):
            with monkeypatch.context() as patch:
                told_time(patch, epoch=1.0, writing=writing)
                run = Dies(patch, death)
                with suppress(RuntimeError):
                    tune(study=tmp_path / f"{at}.db", **call)
                epochs += run.epochs
        repeated.append(epochs - total.epochs)
    # chunks whose states are written one after the other
    together = {"random": 1, "halving": 2}[method]
    assert 0 < max(repeated) <= max(7, 20 * writing * together) + 1


@pytest.mark.parametrize(
    "method", ["random", pytest.param("halving", marks=pytest.mark.long), "brackets", "median"]
)
def test_a_stopped_trial_continues_from_where_it_was(whole, tmp_path, monkeypatch, method):
    epochs = [0]
    found = []
    advance = chunks._Watch.__call__

    def watched(watch, trained):
        epochs[0] += 1
        if epochs[0] % 13 == 0:
            watch.job.stop.ask()
        return advance(watch, trained)

    monkeypatch.setattr(chunks._Watch, "__call__", watched)
    while not found or {"stopped", "waiting"} & {trial.state for trial in found[-1].trials}:
        found.append(tune(**METHODS[method], study=tmp_path / "s.db"))
        stopped = "stopped" in {trial.state for trial in found[-1].trials}
        assert (tmp_path / "s.db.state").exists() == stopped
    assert 3 <= len(found) < 40
    assert_same(found[-1], whole[method])


@pytest.mark.cpu  # on a GPU it agrees to rounding
def test_a_chunk_of_which_a_trial_has_diverged_continues(tmp_path):
    space = {"lr": [1e-3, 1e-2, 1e30, 3e-2], "width": [8], "batch_size": [8, 16]}
    call = {"space": space, "task": "regression", "optimizer": "sgd"}
    whole = tune(**call)
    assert "failed" in {t.state for t in whole.trials}
    lose(12, call | {"study": tmp_path / "s.db"})
    assert_same(tune(study=tmp_path / "s.db", **call), whole)


def test_a_foreign_checkpoint_is_ignored_and_all_trained_again(whole, tmp_path):
    path = tmp_path / "s.db"
    tune(timeout=1e-9, random_state=1, study=path)
    assert list((tmp_path / "s.db.state").iterdir())
    path.unlink()
    with pytest.warns(UserWarning, match="belongs to a different search"):
        found = tune(study=path)
    assert_same(found, whole["random"])


@pytest.mark.parametrize(
    "method", [gputune.Halving(min_epochs=1), gputune.Median(min_epochs=1, every=2)]
)
def test_none_is_left_of_trials_that_ended_before_the_last_stop(tmp_path, method):
    """The first call's file has a whole chunk; the second call trains the trials that the first
    rung left of it.
    """
    space = {"lr": [1e-4, 1e-3, 1e-2, 1e-1, 3e-4, 3e-3], "width": [8]}
    call = {
        "space": space,
        "n_trials": 6,
        "include_default": False,
        "max_epochs": 9,
        "method": method,
    }
    call["study"] = tmp_path / "s.db"
    for at in (3, 2):
        lose(at, call)
    assert list((tmp_path / "s.db.state").glob("*.safetensors"))
    tune(**call)
    assert [place.name for place in tmp_path.iterdir()] == ["s.db"]


def two_plans(tmp_path, monkeypatch, **more):
    """Stop a search with one thread, and then with two more trials and two threads.

    Each stop comes after one epoch. Returns the study and the arguments of the calls.
    """

    class Cut(Callback):
        def on_epoch(self, curves):
            raise StopSearch

    monkeypatch.setattr("gputune.engine.plan._THREADS_PAY", 0)
    call = {"space": {"lr": loguniform(1e-4, 0.1)}, "max_epochs": 3, "study": tmp_path / "s.db"}
    for n_cores, n_trials in ((1, 2), (2, 4)):
        monkeypatch.setattr("gputune.engine.plan.cores", lambda n_cores=n_cores: n_cores)
        cut = tune(**call, **more, n_trials=n_trials, callbacks=[Cut()])
    with Store.open(tmp_path / "s.db") as store:
        assert [chunk.threads for chunk in store.plan()] == [1, 2]
    return cut, call


def test_a_search_with_new_trials_continues_with_another_number_of_threads(tmp_path, monkeypatch):
    """Another machine, for example. The new trials then have a plan of their own."""
    cut, call = two_plans(tmp_path, monkeypatch)
    assert {trial.state for trial in cut.trials} == {"stopped"}
    found = tune(**call, n_trials=4)
    assert {trial.state for trial in found.trials} == {"complete"}


def test_trials_of_all_plans_train_for_one_epoch_first(tmp_path, monkeypatch):
    monkeypatch.setattr("gputune.methods.training._ENOUGH_SHARE", 0)
    cut, _ = two_plans(tmp_path, monkeypatch, timeout=1000)
    # The search ends after the first epoch of the second plan, before the first plan continues.
    assert np.isfinite(cut.curves).all(2).sum(1).tolist() == [1, 1, 1, 1]


def test_what_continues_from_a_checkpoint_is_said(tmp_path, capsys):
    call = {"study": tmp_path / "s.db", "verbose": 1}
    cut = tune(timeout=1e-9, **call)
    assert "can continue" not in capsys.readouterr().err
    tune(**call)
    stopped = sum(trial.state == "stopped" for trial in cut.trials)
    assert re.search(
        rf"^{stopped} trials? can continue from where training was stopped$",
        capsys.readouterr().err,
        re.M,
    )


def test_what_cannot_be_used_goes_with_the_last_trial(tmp_path):
    path = tmp_path / "s.db"
    state = tmp_path / "s.db.state"
    tune(timeout=1e-9, study=path)
    (state / "7-0123456789abcdef.tmp").touch()
    (state / "8-0123456789abcdef.safetensors").write_bytes(b"torn")
    (state / "mine.txt").touch()
    with pytest.warns(UserWarning, match="is damaged"):
        tune(study=path)
    assert [place.name for place in state.iterdir()] == ["mine.txt"]


def test_a_file_in_the_place_of_the_folder_costs_only_the_checkpoints(whole, tmp_path, monkeypatch):
    (tmp_path / "s.db.state").touch()
    monkeypatch.setattr("gputune.engine.checkpoint._WRITING_SHARE", 0)
    with pytest.warns(UserWarning, match="No checkpoint could be written"):
        found = tune(study=tmp_path / "s.db", checkpoint_seconds=1e-9)
    assert_same(found, whole["random"])


def test_a_process_that_goes_to_another_folder_keeps_its_study(whole, tmp_path, monkeypatch):
    class Goes(Callback):
        def on_epoch(self, curves):
            monkeypatch.chdir(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gputune.engine.checkpoint._WRITING_SHARE", 0)
    assert_same(tune(study="s.db", checkpoint_seconds=1e-9, callbacks=[Goes()]), whole["random"])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert sorted(place.name for place in tmp_path.iterdir()) == ["elsewhere", "s.db"]


def test_without_a_study_there_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune(timeout=1e-9, checkpoint_seconds=1e-9)
    assert list(tmp_path.iterdir()) == []
    with refused("checkpoint_seconds must be a number of seconds above 0, got 0"):
        tune(checkpoint_seconds=0)


# Its scorer waits in the middle of a process's first trial, whose state is kept by then, until
# there is a file "go on".
SCRIPT = """
import pathlib, time
import gputune
from sklearn.datasets import load_iris

def share_right(estimator, X, y):
    share_right.calls = getattr(share_right, "calls", 0) + 1
    while share_right.calls > 30 and not (FOLDER / "go on").exists():
        time.sleep(0.01)
    return float((estimator.predict(X) == y).mean())

CALL = dict(space={"lr": [1e-4, 1e-3, 1e-2], "width": [8, 40]}, n_trials=6, include_default=False, cv=3,
    max_epochs=15, verbose=0, memory="1KB", scoring=share_right)
X, y = load_iris(return_X_y=True)
study = gputune.tune("mlp", X, y, **CALL, workers=2, study=FOLDER / "s.db", checkpoint_seconds=1e-9)
"""


def test_a_killed_search_with_workers_continues(tmp_path):
    script = f"import pathlib\nFOLDER = pathlib.Path({str(tmp_path)!r})\n{SCRIPT}"
    process = Fork(script)
    state = tmp_path / "s.db.state"
    while len(list(state.glob("*.safetensors"))) < 2:  # one of each process
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "go on").touch()
    names = {"__name__": "__main__"}
    exec(script, names)
    assert not state.exists()
    assert_same(
        gputune.Study.open(tmp_path / "s.db"),
        gputune.tune("mlp", *IRIS, workers=1, **names["CALL"]),
    )


def test_a_clock_that_jumps_changes_nothing(whole, tmp_path, monkeypatch):
    """The time of day goes back and forth by years: deadlines, checkpoints and claims do not read
    it."""
    jumps = itertools.cycle([0.0, 4e9, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    call = {**METHODS["halving"], "study": tmp_path / "s.db", "timeout": 600.0}
    lose(20, call)
    assert_same(tune(**call), whole["halving"])


def test_equal_class_weights_resume_a_search(tmp_path):
    y = (IRIS[1] == 2).astype(int)
    path = tmp_path / "study.db"
    options = {"cv": 2, "n_trials": 1, "max_epochs": 1, "verbose": 0, "workers": 1}
    call = partial(gputune.tune, "mlp", IRIS[0], y, study=path, **options)
    study = call(class_weight={0: 1, 1: 5})
    assert study.record.class_weight == "{0: 1.0, 1: 5.0}"
    for equal in ({1: 5, 0: 1}, {0: 1.0, 1: np.float64(5)}, {1: 5}):
        assert call(class_weight=equal).trials == study.trials
    with refused(r"differs from this call in: class_weight \('{0: 1.0, 1: 5.0}' in"):
        call(class_weight={0: 1, 1: 4})
    with refused(r"class_weight \('{0: 1.0, 1: 5.0}' in the study, None now\)"):
        call()
