"""Errors of the disk and of shared memory are reported with the place and a remedy."""

from pathlib import Path

import joblib
import pytest
from sklearn.datasets import load_iris

import gputune
from gputune.executors import processes

SPACE = {"lr": [0.001, 0.01, 0.1, 0.3]}
COMMON = {"n_trials": 4, "max_epochs": 2, "cv": 2, "memory": 1024, "workers": 2, "verbose": 0}


def full(*_arguments, **_options):
    raise OSError(28, "No space left on device")


def read_only(*_arguments):
    raise OSError(30, "Read-only file system")


def objective(params, report):
    return params["lr"]


def tune():
    X, y = load_iris(return_X_y=True)
    gputune.tune("mlp", X[::5], y[::5], space=SPACE, **COMMON)


def search():
    gputune.search(objective, SPACE, direction="maximize", n_trials=4, workers=2, verbose=0)


@pytest.mark.parametrize("run", [tune, search])
def test_shared_memory_that_is_read_only(monkeypatch, run):
    monkeypatch.setattr(processes, "single_worker", read_only)
    says = r"worker processes cannot be started \(Read-only file system\); make it writable, or choose workers=1.*shm"
    with pytest.raises(OSError, match=says):
        run()


def test_a_full_folder_of_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    says = r"for the worker processes cannot be written \(No space left on device\); free some space there, set TMPDIR"
    with monkeypatch.context() as patch:
        patch.setattr(joblib, "dump", full)
        with pytest.raises(OSError, match=f"the data {says}.*{tmp_path.name}"):
            tune()
    write = Path.write_bytes

    def full_for_the_task(path, content):
        return full() if path.name == "task.pkl" else write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_for_the_task)
        with pytest.raises(OSError, match=f"the objective {says}.*{tmp_path.name}"):
            search()
