"""The module and the scorer of the cluster tests: they travel as code, and can end their worker."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

import problems

HERE = os.getpid()
FORWARDS = [0]  # of a worker: what a module counts in itself is put back after every call
ORDERS = {"folder": ""}
"""Travels with the code: a folder whose files ask workers for something in the middle of a chunk.

``once`` and ``always`` to die, ``full once`` and ``full`` to run out of memory.
"""


class Net(nn.Module):
    """A perceptron; with six hidden units it obeys the orders."""

    def __init__(self, n_features, n_outputs, hidden):
        super().__init__()
        self.hidden = hidden
        self.inner = nn.Linear(n_features, hidden)
        self.outer = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        FORWARDS[0] += self.hidden == 6
        if self.hidden == 6 and FORWARDS[0] > 5 and os.getpid() != HERE and ORDERS["folder"]:
            obey(Path(ORDERS["folder"]))
        return self.outer(torch.relu(self.inner(x)))


def obey(folder):
    """Follow the order in a file; the first process that sees ``once`` removes it."""
    if (folder / "full").exists():
        raise MemoryError("no room")
    with suppress(FileNotFoundError):
        (folder / "full once").unlink()
        raise MemoryError("no room")
    try:
        (folder / "once").unlink()
    except FileNotFoundError:
        if not (folder / "always").exists():
            return
    os.kill(os.getpid(), signal.SIGKILL)


def share_right(estimator, X, y):
    """Accuracy, by hand, of the rows from the last to the first."""
    return float((estimator.predict(X[::-1])[::-1] == y).mean())


def fails_there(estimator, X, y):
    """Fail in a worker."""
    if os.getpid() != HERE:
        raise ValueError("no score for such rows")
    return 0.0


def lacks_a_module(estimator, X, y):
    """Need a module that only this process finds."""
    return float(problems.shape_of is not None)
