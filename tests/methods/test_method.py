"""A search method is one file in ``gputune/methods/`` and its name in one table."""

import sys
from typing import Literal

import pytest
from sklearn.datasets import load_iris

import gputune
import gputune.methods
from gputune.tuning import method as table
from gputune.tuning.method import check_method, method_class, method_classes, method_from_json

X, y = load_iris(return_X_y=True)
QUICK = {
    "n_trials": 6,
    "max_epochs": 4,
    "cv": 2,
    "verbose": 0,
    "space": {"lr": [10**-power for power in range(1, 7)]},
}

TOY = '''
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gputune.methods.stopping import StoppingRule
from gputune.tuning.rules import STOPPING, Rule


@dataclass(frozen=True, kw_only=True)
class OddOnes(StoppingRule):
    """Stops the trials with odd numbers after some epochs."""

    name = "odd_ones"
    help = "the trials with odd numbers stop"
    flags: ClassVar[Mapping[str, Rule]] = {
        "stop_at": Rule("--stop-at <INT>", "Epochs of the odd trials", "", "2", "1..", group=STOPPING)
    }

    stop_at: int = 2

    def stops(self, max_epochs):
        return [self.stop_at]

    def trials_to_stop(self, epoch, curves, max_epochs):
        return {number for number in curves if number % 2}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A pruner in a file that joins the package, and in the table of names."""
    (tmp_path / "odd_ones.py").write_text(TOY)
    monkeypatch.setattr(gputune.methods, "__path__", [*gputune.methods.__path__, str(tmp_path)])
    names = Literal["random", "halving", "median", "hypergradient", "odd_ones"]
    monkeypatch.setattr(table, "MethodWord", names)
    yield
    table._CLASSES.pop("odd_ones", None)
    sys.modules.pop("gputune.methods.odd_ones", None)


def test_a_pruner_needs_its_file_and_its_name(toy, tmp_path):
    file = tmp_path / "study.db"
    study = gputune.tune("mlp", X, y, method="odd_ones", study=file, **QUICK)
    pruned = [trial.number for trial in study.trials if trial.state == "pruned"]
    assert pruned == [1, 3, 5]
    assert {trial.detail["rung"] for trial in study.trials if trial.number in pruned} == {2}
    assert study.record.method == {"name": "odd_ones", "stop_at": 2}
    again = gputune.Study.open(file)
    assert method_from_json(again.record.method) == method_class("odd_ones")(stop_at=2)
    assert again.best_model(X, y).predict(X[:3]).shape == (3,)


def test_a_pruner_ends_the_trials_of_an_own_loop(toy):
    def objective(params, report):
        for epoch in range(4):
            report(params["x"] + epoch)
        return params["x"] + 3

    study = gputune.search(
        objective,
        {"x": [1.0, 2.0, 3.0]},
        direction="maximize",
        method=method_class("odd_ones")(stop_at=1),
        max_epochs=4,
        n_trials=3,
        workers=1,
        verbose=0,
    )
    assert [trial.state for trial in study.trials] == ["complete", "pruned", "complete"]


def test_the_flags_of_a_method_are_in_the_table(toy):
    flags = method_classes()["odd_ones"].flags
    assert flags["stop_at"].name == "--stop-at"


def test_an_unknown_method_lists_all():
    with pytest.raises(gputune.InputError) as caught:
        check_method("halvin")
    message = str(caught.value)
    assert "'random', 'halving', 'median', 'pbt', 'hypergradient', 'tpe'" in message
    assert "gputune.Halving(...)" in message and "halving" in message.rpartition("?")[0]


@pytest.mark.parametrize("name", ["halving", "median", "hypergradient"])
def test_a_method_survives_its_json(name):
    method = check_method(name)
    assert method_from_json(method.to_json()) == method


REFILLED = gputune.OptunaSampler("tpe", batch=4, halving=gputune.Halving(min_epochs=1))


@pytest.mark.parametrize(
    ("method", "n_waiting"),
    [("halving", 5), ("median", 5), (gputune.PopulationBased(interval=2), 5), (REFILLED, 3)],
)
def test_one_chunk_begins_if_the_time_is_over_before_the_training(method, n_waiting, capsys):
    """Each chunk has one trial. The note counts the trials that have not begun."""
    options = QUICK | {"verbose": 1, "memory": "1KB", "workers": 1}
    study = gputune.tune("mlp", X, y, method=method, timeout=1e-9, **options)
    states = [trial.state for trial in study.trials]
    assert sorted(states) == ["stopped"] + ["waiting"] * n_waiting
    note = f"note: the time was over before {n_waiting} trials had trained for one epoch. These"
    assert capsys.readouterr().err.count(note) == 1
