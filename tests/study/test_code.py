"""Functions of the user's own are known again by their source and by what they hold."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.study.code import digest_of_code
from gputune.study.ledger import _differences
from gputune.study.record import SearchRecord
from refused import refused


def powered(power, scale=None):
    scale = torch.ones(1) if scale is None else scale

    def loss(outputs, y):
        return scale.to(outputs) * (outputs[:, 0] - y).abs() ** power

    return loss


class Powered(nn.Module):
    def __init__(self, power):
        super().__init__()
        self._power, self.itself = power, [self]

    def forward(self, outputs, y):
        return powered(self._power)(outputs, y)


def reading(power, what):
    """The loss, or a module of it, in a file that has set the power."""
    file = {"POWER": power, "torch": torch, "CALLS": power, "__name__": "file"}
    text = "def loss(o, y):\n global CALLS\n CALLS += 1\n return [abs(a - b) ** POWER for a, b in zip(o, y)]\n"
    exec(text + "class Loss(torch.nn.Module):\n def forward(self, o, y): return (o - y) ** POWER", file)
    return file[what]


B = torch.tensor([1.0, 2.0])
# fmt: off
LAMBDAS = [lambda o, y: o - y, lambda o, y: y - o, lambda o, y: (lambda z: z + 1)(o), lambda o, y: (lambda z: z + 2)(o)]
# fmt: on
PAIRS = {
    "a closure": (lambda: powered(2), lambda: powered(3)),
    "a tensor": (lambda: powered(2, torch.ones(2)), lambda: powered(2, torch.zeros(2))),
    "a lambda": (lambda: lambda o, y: o - y, lambda: lambda o, y: y - o),
    "lambdas of a line": (lambda: LAMBDAS[0], lambda: LAMBDAS[1]),
    "inner lambdas": (lambda: LAMBDAS[2], lambda: LAMBDAS[3]),
    "a weight": (lambda: nn.CrossEntropyLoss(weight=B), lambda: nn.CrossEntropyLoss(weight=B + 1)),
    "a word": (nn.CrossEntropyLoss, lambda: nn.CrossEntropyLoss(reduction="sum")),
    "a class": (lambda: nn.L1Loss, lambda: nn.MSELoss),
    "a function of torch's": (lambda: functional.mse_loss, lambda: functional.logsigmoid),
    "a partial": (lambda: functools.partial(powered, 2), lambda: functools.partial(powered, 3)),
    "a module": (lambda: Powered(2), lambda: Powered(3)),
    "a module's value": (lambda: reading(2, "loss"), lambda: reading(B, "loss")),
    "that of a class": (lambda: reading(2, "Loss")(), lambda: reading(3, "Loss")()),
    "a method": (lambda: Powered(2).forward, lambda: Powered(3).forward),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_values_that_do_the_same_have_one_digest(pair):
    one, other = pair
    assert digest_of_code(one()) == digest_of_code(one()) != digest_of_code(other())


class Net(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def stepped(of):
    return lambda module, batch: of(module(batch[0]), batch[1])


def test_a_value_that_a_function_sets_itself_is_no_other_code():
    one = reading(2, "loss")
    before = digest_of_code(one)
    one([1], [2])
    assert one.__globals__["CALLS"] == 3 and digest_of_code(one) == before


@pytest.mark.parametrize("argument", ["loss", "training_step", "augment"])
def test_a_study_does_not_go_on_with_other_code(argument, tmp_path, monkeypatch):
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    make = {
        "loss": powered,
        "training_step": lambda power: stepped(powered(power)),
        "augment": lambda power: lambda x, generator: x * power,
    }[argument]
    how = {"space": {"lr": [0.1, 0.01]}, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    call = functools.partial(gputune.tune, Net, X, X[:, 0], **how, study=tmp_path / "study.db")
    call(n_trials=1, **{argument: make(2)})
    with refused(rf"differs from this call in: {argument} \(its code or its values have changed\)\. Give"):
        call(n_trials=2, **{argument: make(3)})
    assert len(call(n_trials=2, **{argument: make(2)}).trials) == 2


def test_a_study_of_an_earlier_version_goes_on_unchecked():
    here = SearchRecord(objective="the:loss", code={"loss": "a"})
    assert not _differences(SearchRecord(objective="the:loss", absent=frozenset({"code"})), here)
    assert _differences(SearchRecord(objective="the:loss", code={"loss": "b"}), here)
