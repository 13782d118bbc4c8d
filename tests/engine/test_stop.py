"""When training ends: as this process and as a worker's copy see it, and where a trial's score
stalls.

And work with torch in a program that has set its modes, and in one that ends meanwhile.
"""

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import gputune
from gputune.engine.stop import Stop
from problems import Linear, Net
from refused import refused

SEARCH = {
    "space": {"lr": [1e-4, 3e-3, 0.1, 0.5], "batch_size": [16, 32]},
    "n_trials": 6,
    "max_epochs": 12,
    "cv": 3,
    "verbose": 0,
    "workers": 1,
}


def test_a_deadline_passes_in_copies_too():
    for stop in (
        Stop(time.monotonic() - 1),
        pickle.loads(pickle.dumps(Stop(time.monotonic() - 1))),
    ):
        assert stop.is_over()
    assert not Stop().is_over() and not Stop(time.monotonic() + 60).is_over()


def test_a_copy_receives_requests_of_this_process(tmp_path, monkeypatch):
    # as in a worker of this process
    monkeypatch.setattr("os.getppid", lambda: __import__("os").getpid())
    stop = Stop()
    with stop.shared_with_workers(tmp_path / "stop"):
        copy = pickle.loads(pickle.dumps(stop))
        assert not copy.is_over()
        stop.ask()
        assert copy.is_over() and stop.is_over()
    with stop.shared_with_workers(tmp_path / "later"):
        assert pickle.loads(pickle.dumps(Stop())).is_over() is False
        assert (tmp_path / "later").exists()  # what was asked before there were workers


def test_a_copy_whose_parent_has_died_is_over_and_a_folder_that_is_gone_is_no_error(tmp_path):
    assert pickle.loads(pickle.dumps(Stop())).is_over()  # the parent of this process never made it
    stop = Stop()
    with stop.shared_with_workers(tmp_path / "gone" / "stop"):
        stop.ask()
    assert stop.is_over()


@pytest.mark.parametrize(
    ("model", "backend"), [("mlp", "auto"), ("mlp", "eager"), (Net, "stacked"), (Net, "loop")]
)
def test_a_trial_ends_where_a_plain_loop_over_its_curve_ends_it(model, backend, iris):
    full, short = (
        gputune.tune(model, *iris, patience=patience, backend=backend, **SEARCH)
        for patience in (None, 3)
    )
    lengths = []
    for trial, curve, of_full in zip(short.trials, short.curves, full.curves, strict=True):
        best = -np.inf
        at = 0
        epoch = 0
        for epoch, mean in enumerate(of_full.mean(1), 1):
            if mean > best:
                best = mean
                at = epoch
            if epoch - at == 3:
                break
        lengths.append(epoch)
        np.testing.assert_allclose(curve[:epoch], of_full[:epoch], atol=1e-6)
        assert np.isnan(curve[epoch:]).all()
        assert (trial.state, trial.best_epoch) == ("complete", at) and np.isclose(trial.score, best)
    assert min(lengths) < 12 and len({*lengths}) > 1 and short.spent[0] == sum(lengths)


def test_a_diverged_trial_fails_and_a_search_continues_only_with_the_same_patience(iris, tmp_path):
    search = {**SEARCH, "space": {"lr": [1e-3, 1e30]}, "n_trials": 2, "optimizer": "sgd"}
    study = gputune.tune("mlp", *iris, patience=2, study=tmp_path / "s.db", **search)
    assert sorted(trial.state for trial in study.trials) == ["complete", "failed"]
    again = gputune.tune("mlp", *iris, patience=2, study=tmp_path / "s.db", **search)
    np.testing.assert_array_equal(again.curves, study.curves)
    with refused(r"differs from this call in: patience \(2 in the study, None now\)"):
        gputune.tune("mlp", *iris, study=tmp_path / "s.db", **search)


@pytest.mark.parametrize("when", [1, 5])
def test_a_search_cut_short_continues_to_the_same_ends(iris, tmp_path, when):
    whole = gputune.tune("mlp", *iris, patience=3, **SEARCH)
    stops = StopAfter(when)
    cut = gputune.tune(
        "mlp",
        *iris,
        patience=3,
        study=tmp_path / "s.db",
        callbacks=[stops],
        checkpoint_seconds=1e-9,
        **SEARCH,
    )
    assert "stopped" in {trial.state for trial in cut.trials}
    again = gputune.tune("mlp", *iris, patience=3, study=tmp_path / "s.db", **SEARCH)
    np.testing.assert_allclose(again.curves, whole.curves, atol=1e-6)
    assert [t.best_epoch for t in again.trials] == [t.best_epoch for t in whole.trials]


class StopAfter(gputune.callbacks.Callback):
    """Ends a search after this number of epochs."""

    def __init__(self, epochs):
        self.left = epochs

    def on_epoch(self, curves):
        self.left -= 1
        if self.left == 0:
            raise gputune.callbacks.StopSearch


ENDS = """
import sys, threading
import gputune

begun = threading.Event()

class Begun(gputune.callbacks.Callback):
    def on_epoch(self, curves):
        begun.set()

def search():
    gputune.tune("mlp", [[0.0], [1.0]] * 9, [0, 1] * 9, n_trials=2, cv=2, max_epochs=10**6, workers=1, verbose=0,
                 backend="eager", study=sys.argv[1], callbacks=[Begun()])
    print("this thread goes on")

threading.Thread(target=search, daemon=True).start()
begun.wait()
"""


def test_a_process_that_ends_waits_for_the_epoch_of_a_daemon_thread(tmp_path):
    command = [sys.executable, "-P", "-c", ENDS, str(tmp_path / "study.db")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert "stopped" in {trial.state for trial in gputune.Study.open(tmp_path / "study.db").trials}


@pytest.mark.parametrize("model", ["mlp", "logistic", Linear])
def test_the_default_device_of_a_program_is_left_unchanged(tmp_path, model, iris):
    options = {
        "space": {"C": [1.0]} if model == "logistic" else {"lr": [1e-2]},
        "n_trials": 1,
        "cv": 2,
        "max_epochs": 2,
        "workers": 1,
        "verbose": 0,
    }
    plain = gputune.tune(model, *iris, **options)
    torch.set_default_device("meta")
    try:
        found = gputune.tune(model, *iris, **options)
        tuned = found.best_model()
        tuned.save(tmp_path / "model")
        again = gputune.load_model(tmp_path / "model", module=Linear if model is Linear else None)
        assert found.best_score == plain.best_score
        assert (again.predict(iris[0]) == plain.best_model().predict(iris[0])).all()
        assert torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_device(None)
