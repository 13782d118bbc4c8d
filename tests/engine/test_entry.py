"""Work with torch in a program that has set its modes, and in one that ends meanwhile."""

import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_iris

import gputune
from problems import Linear

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
def test_the_default_device_of_a_program_is_left_alone(tmp_path, model):
    X, y = load_iris(return_X_y=True)
    options = {"space": {"C": [1.0]} if model == "logistic" else {"lr": [1e-2]}, "n_trials": 1, "cv": 2,
               "max_epochs": 2, "workers": 1, "verbose": 0}  # fmt: skip
    plain = gputune.tune(model, X, y, **options)
    torch.set_default_device("meta")
    try:
        found = gputune.tune(model, X, y, **options)
        tuned = found.best_model()
        tuned.save(tmp_path / "model")
        again = gputune.load_model(tmp_path / "model", module=Linear if model is Linear else None)
        assert found.best_score == plain.best_score
        assert (again.predict(X) == plain.best_model().predict(X)).all()
        assert torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_device(None)
