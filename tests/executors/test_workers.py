"""Worker processes: lost workers, their errors, and their effect on the rest of the process."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from scipy.stats import loguniform
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import gputune
from forked import Fork
from gputune.engine.job import Failure, Job
from gputune.executors import executor, processes
from gputune.executors.executor import WorkerProgress
from gputune.executors.processes import to_arrays
from gputune.ground.files import scratch_folder
from gputune.ground.within_epoch import Running
from gputune.modules.recorder import CpuRecorder
from gputune.population.population import Population
from gputune.report.facts import states_text
from gputune.scoring.metrics import make_scoring
from problems import fill, make_data

HERE = os.getpid()
ORDERS = {"folder": ""}  # travels with the code: files there say what a worker shall do


class Odd(Exception):
    """An error that cannot be read again once it is pickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Net(torch.nn.Linear):
    """A network that follows the orders in a folder in its worker; files named once are followed
    once.
    """

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        if os.getpid() != HERE and ORDERS["folder"]:
            for order in Path(ORDERS["folder"]).iterdir():
                obey(order)
        return super().forward(x)


def obey(order):
    if order.name.startswith("once"):
        order.unlink()
    if "exit" in order.name:
        os._exit(7)
    if "kill" in order.name:
        os.kill(os.getpid(), signal.SIGKILL)
    raise Odd("this", "that")


# So little memory makes every trial a chunk of its own; the first is given to the worker before
# this process takes one.
SEARCH = {
    "space": {"lr": loguniform(1e-3, 0.1)},
    "n_trials": 2,
    "include_default": False,
    "cv": 2,
    "max_epochs": 2,
    "memory": 1024,
    "verbose": 0,
}


@pytest.fixture
def orders(tmp_path, monkeypatch):
    folder = tmp_path / "orders"
    folder.mkdir()
    monkeypatch.setitem(ORDERS, "folder", str(folder))
    return folder


def search(model=Net, **more):
    X, y = load_iris(return_X_y=True)
    return gputune.tune(model, X, y, **{**SEARCH, "workers": 2, **more})


def scores(study):
    return [(t.state, t.fold_scores) for t in study.trials]


def test_joblib_works_after_a_search_and_during_one(tmp_path):
    search()
    X, y = load_iris(return_X_y=True)
    assert len(cross_val_score(LogisticRegression(max_iter=1000), X, y, cv=2, n_jobs=2)) == 2

    def waits(begun, end):
        begun.touch()
        deadline = time.monotonic() + 120
        while not end.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return end.exists()

    begun = tmp_path / "begun"
    end = tmp_path / "end"
    found = []
    calls = [delayed(waits)(begun, end)] * 2
    thread = threading.Thread(target=lambda: found.extend(Parallel(n_jobs=2)(calls)))
    thread.start()
    while not begun.exists():
        time.sleep(0.01)
    assert [t.state for t in search().trials] == ["complete"] * 2
    end.touch()
    thread.join()
    assert found == [True, True]


def test_the_chunk_of_a_lost_worker_is_handed_out_again(orders):
    alone = scores(search(workers=1))
    (orders / "once exit").touch()
    with pytest.warns(
        UserWarning,
        match="a worker process was lost while it trained 1 trial, which another worker trains "
        "again: it ended itself with exit code 7, as os._exit does.",
    ):
        assert scores(search()) == alone
    for pool in processes.idle:  # workers that are killed while nobody needs them
        for process in list(pool._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        pool._executor_manager_thread.join()
    assert scores(search()) == alone


class Epochs(gputune.callbacks.Callback):
    """Keeps the curves that it is told."""

    heard = ()

    def on_epoch(self, curves):
        self.heard += (curves,)


def test_epochs_of_worker_processes_are_reported():
    epochs = Epochs()
    study = search(callbacks=[epochs])
    assert sum(curves[..., 0].size for curves in epochs.heard) == study.curves[..., 0].size


class Branching(Net):
    """Its members cannot be stacked."""

    def forward(self, x):
        return super().forward(x * 2 if x.mean() > 3 else x)


@pytest.mark.cpu
def test_halving_of_what_trains_one_by_one_gives_the_scores_of_one_process():
    words = {
        "space": {"lr": [1e-3, 1e-2, 1e-1]},
        "n_trials": 3,
        "method": "halving",
        "max_epochs": 4,
    }
    assert scores(search(Branching, **words)) == scores(search(Branching, **words, workers=1))


def test_a_chunk_that_ends_every_worker_is_given_up(orders, monkeypatch):
    monkeypatch.setattr(executor, "MAX_LOST_WORKERS", 2)
    (orders / "kill").touch()
    with pytest.warns(
        UserWarning, match="SIGKILL ended it. The system sends this signal if memory has run out"
    ):
        study = search()
    (failed,) = (t for t in study.trials if t.state == "failed")
    reason = failed.detail["reason"]
    assert reason.startswith(
        "its chunk of 1 trial has lost 2 worker processes one after the other, the last"
    )
    assert (
        "use fewer workers, which leaves more memory to each, or a smaller model, which takes less"
        in reason
    )
    assert sorted(t.state for t in study.trials) == ["complete", "failed"]
    assert states_text(study) == "1 complete, 1 that lost their workers"
    alone = replace(study, trials=[failed], curves=study.curves[:1])
    assert alone.failure_message().endswith(f"gputune gave up some of 1 trial: {reason}")


@pytest.mark.parametrize(("fits", "kind"), [(True, RuntimeError), (False, MemoryError)])
def test_without_a_place_for_failures_a_trial_that_cannot_be_trained_is_an_error(fits, kind):
    with pytest.raises(kind, match="lost 3 workers"):
        raise Failure((0,), "lost 3 workers", fits).error()


def test_an_error_that_cannot_be_pickled_is_named(orders):
    (orders / "raise").touch()
    with pytest.raises(
        RuntimeError, match="Odd .which cannot be pickled. in a worker process: this and that"
    ):
        search()


KILLED = """
import os, signal, tempfile
import gputune
from gputune.executors import worker
from gputune.study.ledger import Ledger
from sklearn.datasets import load_iris

tempfile.tempdir = None  # read TMPDIR
worker.IDLE_SECONDS = 10**6
Ledger.finish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
X, y = load_iris(return_X_y=True)
gputune.tune("mlp", X, y, space={"lr": [1e-3, 1e-2]}, n_trials=2, cv=2, max_epochs=2, memory=1024, workers=2)
"""


def test_a_killed_process_leaves_no_workers_and_its_data_to_the_next_sweep(tmp_path):
    process = Fork(KILLED, TMPDIR=str(tmp_path))
    process.communicate()  # the workers have the pipe too
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("gputune-*/data.joblib")] == ["data.joblib"]
    with scratch_folder(tmp_path) as own:
        assert list(tmp_path.glob("gputune-*")) == [own]


SILENT = """
import os, sys
from pathlib import Path
import gputune
from sklearn.datasets import load_iris

sys.stdout = sys.stderr = None  # as an interpreter has them that finds both closed
os.close(1)
os.close(2)
X, y = load_iris(return_X_y=True)
study = gputune.tune("mlp", X, y, space={"lr": [1e-3, 1e-2]}, n_trials=2, cv=2, max_epochs=2, memory=1024, workers=2)
Path(sys.argv[1]).write_text(" ".join(trial.state for trial in study.trials))
"""


def test_a_search_needs_no_standard_output_or_error(tmp_path):
    assert Fork(SILENT, tmp_path / "states").wait() == 0
    assert (tmp_path / "states").read_text() == "complete complete"


def test_a_worker_records_the_steps_of_like_chunks_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getppid", os.getpid)  # this process is the worker
    monkeypatch.setattr(CpuRecorder, "repays", 1)
    recorded = []
    capture = CpuRecorder.capture
    monkeypatch.setattr(
        CpuRecorder, "capture", lambda self, *step: recorded.append(self) or capture(self, *step)
    )
    data = make_data()
    path = str(tmp_path / "data")
    numbers = []
    scoring = make_scoring(None, data.task, np.arange(3))
    job = Job(seed=0, epochs=2, horizon=2, scoring=scoring, module_class=Net, backend="recorded")
    joblib.dump(to_arrays(data), path)
    sent = processes.pickle_job(job)
    progress = tmp_path / "progress"
    WorkerProgress.create(progress, 1)
    for rate in (1e-3, 1e-2):
        chunk = Population("module", (0,), tuple(fill({"batch_size": 9, "lr": rate})))
        before = len(recorded)
        (outcome,) = processes._run_in_worker(sent, path, progress, chunk, torch.device("cpu"))
        numbers.append(len(recorded) - before)
        assert np.array_equal(outcome.curves, job.run(data, chunk).curves)
        assert WorkerProgress.open(progress).running() == Running(epochs=2)
    assert numbers[0] > 0 and numbers[1] == 0


@pytest.mark.parametrize(
    ("hidden", "workers", "trials", "gpus"),
    [
        ("", None, 9, ["0", "1"]),
        ("", 3, 9, ["0", "1", "0"]),
        ("", None, 1, ["0"]),
        ("3, GPU-a, 7", None, 9, ["3", "GPU-a"]),
    ],
)
def test_each_worker_of_a_loop_has_a_gpu(hidden, workers, trials, gpus, monkeypatch):
    """Of two that torch has, by the names under which it has them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert [
        each["CUDA_VISIBLE_DEVICES"] for each in processes.environments(workers, trials)
    ] == gpus
