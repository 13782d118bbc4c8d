"""gputune check --module: the backend of a module, the reason, and the time of a step in each way."""

import json

import numpy as np
import pytest

from command_line import run
from gputune.engine import choice

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, n_features, n_outputs, width=8):
        super().__init__()
        self.first = nn.Linear(n_features, width)
        self.last = nn.Linear(width, n_outputs)

    def hidden(self, x):
        return torch.relu(self.first(x))

    def forward(self, x):
        return self.last(self.hidden(x))


class MatrixExp(Net):
    def hidden(self, x):
        return torch.linalg.matrix_exp(self.first(x)[:, :4].reshape(-1, 2, 2)).flatten(1).repeat(1, 2)


class Reader(Net):
    def hidden(self, x):
        h = self.first(x)
        return h * float(h.detach().abs().sum() > 0)


class Nan(Net):
    def forward(self, x):
        return super().forward(x) / 0


class Vocabulary(Net):
    def __init__(self, n_features, n_outputs, vocab):
        super().__init__(n_features, n_outputs)
"""

TIMES = {"loop": 1e-3, "recorded": 1e-4, "eager": 2e-4}


@pytest.fixture
def module(tmp_path):
    """Return a function that returns the argument --module for a class."""
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return lambda name: f"--module={path}:{name}"


@pytest.fixture
def known_times(monkeypatch):
    """No backend is timed, except for compiled code."""
    monkeypatch.setattr(choice, "_seconds", lambda job, data, chunk, backend: TIMES[backend])
    monkeypatch.setattr("gputune.check.module._PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("gputune.check.module._IN_TURN_SECONDS", 0.0)


@pytest.mark.cpu
def test_all_ways_of_a_module_are_timed(module, monkeypatch):
    monkeypatch.setattr("gputune.check.module._PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("gputune.check.module._IN_TURN_SECONDS", 0.1)
    code, out, err = run("check", module("Net"), "--json")
    assert code == 0, err
    found = json.loads(out)
    times = found["milliseconds"]
    assert list(times) == ["compiled", "recorded", "eager", "loop", "plain loop"]
    assert all(0 < value < 100 for value in times.values())
    fastest = min(("compiled", "recorded", "loop"), key=times.__getitem__)
    assert found["backend"] == fastest == "compiled"
    assert (found["reason"], found["reasons"]) == ("", {})


@pytest.mark.cpu
def test_the_reason_names_the_first_operation_without_c_code(module, known_times):
    code, out, err = run("check", module("MatrixExp"), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["backend"] == "recorded"
    reason = "compiled code cannot train this module: aten.linalg_matrix_exp has no C code"
    assert (found["reason"], found["reasons"]) == (reason, {"compiled": reason})
    times = found["milliseconds"]
    assert times.pop("plain loop") > 0
    assert times == pytest.approx({name: 1e3 * value for name, value in TIMES.items()})


@pytest.mark.cpu
def test_the_loop_and_the_plain_loop_are_timed_in_turn(module, known_times, monkeypatch):
    times = iter([8.0])
    monkeypatch.setattr(choice, "_seconds", lambda job, data, chunk, backend: next(times, 2.0))
    monkeypatch.setattr("gputune.check.module._IN_TURN_SECONDS", 0.001)
    code, out, err = run("check", module("Reader"), "--json")
    assert code == 0, err
    assert json.loads(out)["milliseconds"]["loop"] == 2000


@pytest.mark.cpu
def test_a_module_that_cannot_be_stacked_trains_in_a_loop(module, known_times, tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 3)).round(3)
    lines = [",".join(map(str, row)) for row in rows.tolist()]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,y", *lines]))
    values = ("--target", "y", "--set", "module__width=4", "batch_size=16")
    code, out, err = run("check", module("Reader"), tmp_path / "rows.csv", *values)
    assert code == 0, err
    first, *_, last = out.splitlines()
    assert first.startswith("Reader with 17 parameters, 60 rows in 5 folds, batch size 16, ")
    assert "\nloop " in out and "\nplain loop " in out and "\nrecorded " not in out
    assert "as_tensor" in last or ".item()" in last
    assert last.startswith("Reader trains in a long search with: loop (its members cannot be")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--module=mlp"], "--module must be a module, FILE.py:NAME, got 'mlp'"),
        (["--target=y"], "--target is for the check of your own module"),
        (["rows.csv"], "FILE is for the check of your own module"),
        (["--set", "lr=1"], "--set is for the check of your own module"),
        (["Net", "--target=y"], "--target is a column of a file"),
        (
            ["--module=net.py"],
            "--module must be a module, FILE.py:NAME, got 'net.py'. Write the file and the name",
        ),
        (["Net", "--set", "ch=4"], "error: --set must have only the keys "),
        (["Net", "--set", "lr=-1"], "error: lr must be "),
        (["Vocabulary"], "Put module__vocab=... into --set, or give it a default."),
        (["Nan"], "error: --module: Nan() returns outputs that are not finite"),
        (["Nan"], "If inputs are too large, --set numbers=standard scales them."),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message, module):
    typed = [module(word) if word.isalpha() else word for word in arguments]
    code, _, err = run("check", *typed)
    assert code == 2 and message in err
