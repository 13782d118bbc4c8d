"""Searches in processes of their own, on one study file: started, killed, and compared bit for
bit."""

import numpy as np

import gputune
from forked import Fork

# So little memory makes every trial a chunk of its own.
SEARCH = """
import sys, gputune
from scipy.stats import loguniform
from sklearn.datasets import load_iris
n_trials, options = int(sys.argv[1]), eval(sys.argv[2])
X, y = load_iris(return_X_y=True)
common = {"space": {"lr": loguniform(1e-4, 0.1), "width": [4, 8]}, "max_epochs": 1, "cv": 2, "memory": 1024}
options = {**common, "workers": 1, "verbose": 0, "n_trials": n_trials, "include_default": False, **options}
study = gputune.tune("mlp", X[::5], y[::5], **options)
print(len(study.trials), sum(t.state == "complete" for t in study.trials))
"""


def start(n_trials, *, first="", **options):
    """Start a search with further options of ``tune``; many tiny trials in chunks of one.
    ``first``: code before it."""
    return Fork(first + SEARCH, n_trials, repr(options))


def finish(process):
    """Return the output of a process; it must have ended with 0, with an empty standard error."""
    out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), err
    return out


def table(path):
    """Every trial of a study but its times, in a form that compares bits."""
    study = gputune.Study.open(path)
    return [
        (
            *(t.number, t.params, t.origin, t.state, t.best_epoch),
            np.array([t.score, *t.fold_scores]).tobytes(),
            curve.tobytes(),
        )
        for t, curve in zip(study.trials, study.curves)
    ]


def done(path):
    """The number of trials with a result that stays."""
    return (
        sum(t.state == "complete" for t in gputune.Study.open(path).trials) if path.exists() else 0
    )
