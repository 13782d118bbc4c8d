"""Small tables, a module in a file, and one command of gputune in this process."""

import contextlib
import io
from unittest import mock

import numpy as np

from gputune.cli.main import main
from gputune.tuning.progress import Progress

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs))

    def forward(self, x):
        return self.body(x)
"""
"""A user's module, as a file has it."""

FAST = ["--trials", "3", "--epochs", "2", "--cv", "2", "--workers", "1"]


def run(*arguments, out=None, loud=False):
    """Return exit code, standard output and standard error of a command; of its progress only where
    it is ``loud``."""
    out = out or io.StringIO()
    err = io.StringIO()
    say = Progress.say if loud else lambda progress, text, once=False: None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(Progress, "say", say),
    ):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def output(*arguments, **how):
    """Return the standard output of a command that succeeds and has no more to say."""
    code, out, err = run(*arguments, **how)
    assert (code, err) == (0, "")
    return out


def refusal(*arguments):
    """Return the standard error of a command that is refused."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    return err


def write_table(path, n_rows=40, *, seed=0, **columns):
    """Write a CSV of numbers a and b, a text c, and the further columns (lists of n_rows)."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n_rows)).round(3)
    columns = {"a": a, "b": b, "c": rng.choice(["red", "blue"], n_rows), **columns}
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values()))]
    path.write_text("\n".join(lines) + "\n")
    return path


def kinds(n_rows=40):
    """Return a text target with two classes."""
    return ["ant" if i % 2 else "bee" for i in range(n_rows)]


def searched(folder, *options, target="kind", n_rows=40, warnings="", **columns):
    """Search on a table; return its file, the folder of study and model, and the output."""
    table = write_table(folder / "t.csv", n_rows, **columns or {"kind": kinds(n_rows)})
    code, out, err = run("tune", table, "--target", target, "--out", folder / "o", *FAST, *options)
    assert (code, err) == (0, warnings)
    return table, folder / "o", out
