"""A user's functions are identified by their source and their captured values."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

import gputune
from gputune.ground.errors import option
from gputune.study.code import digest_of_code
from gputune.study.ledger import differences
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
        self._power = power
        self.itself = [self]

    def forward(self, outputs, y):
        return powered(self._power)(outputs, y)


def reading(power, what):
    """The loss, or a module of it, in a file that has set the power."""
    file = {"POWER": power, "torch": torch, "CALLS": power, "__name__": "file"}
    text = (
        "def loss(o, y):\n global CALLS\n CALLS += 1\n return [abs(a - b) ** POWER for a, b in "
        "zip(o, y)]\n"
    )
    exec(
        text + "class Loss(torch.nn.Module):\n def forward(self, o, y): return (o - y) ** POWER",
        file,
    )
    return file[what]


B = torch.tensor([1.0, 2.0])
PAIRS = {
    "a closure": (lambda: powered(2), lambda: powered(3)),
    "a tensor": (lambda: powered(2, torch.ones(2)), lambda: powered(2, torch.zeros(2))),
    "a lambda": (
        lambda: lambda o, y: o - y,
        lambda: lambda o, y: y - o,
    ),
    "a weight": (lambda: nn.CrossEntropyLoss(weight=B), lambda: nn.CrossEntropyLoss(weight=B + 1)),
    "a word": (nn.CrossEntropyLoss, lambda: nn.CrossEntropyLoss(reduction="sum")),
    "a class": (lambda: nn.L1Loss, lambda: nn.MSELoss),
    "a function of torch's": (lambda: functional.mse_loss, lambda: functional.logsigmoid),
    "a partial": (lambda: functools.partial(powered, 2), lambda: functools.partial(powered, 3)),
    "a module": (lambda: Powered(2), lambda: Powered(3)),
    "a module's value": (lambda: reading(2, "loss"), lambda: reading(B, "loss")),
    "that of a class": (lambda: reading(2, "Loss")(), lambda: reading(3, "Loss")()),
    "a method": (lambda: Powered(2).forward, lambda: Powered(3).forward),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_values_that_do_the_same_have_one_digest(pair):
    one, other = pair
    assert digest_of_code(one()) == digest_of_code(one()) != digest_of_code(other())


class Net(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


MAKE = {
    "loss": powered,
    "training_step": lambda power: lambda module, batch: powered(power)(module(batch[0]), batch[1]),
    "augment": lambda power: lambda x, generator: x * power,
}


@pytest.mark.parametrize("argument", MAKE)
def test_a_study_does_not_continue_with_other_code(argument, tmp_path):
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    make = MAKE[argument]
    how = {"space": {"lr": [0.1, 0.01]}, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    call = functools.partial(gputune.tune, Net, X, X[:, 0], **how, study=tmp_path / "study.db")
    call(n_trials=1, **{argument: make(2)})
    with refused(
        rf"differs from this call in: {argument} \(its code or its values have changed\)\. Pass"
    ):
        call(n_trials=2, **{argument: make(3)})
    assert len(call(n_trials=2, **{argument: make(2)}).trials) == 2


def test_changed_code_of_a_module_is_another_search():
    # Of an imported class; the table of the study would mix two models.
    there, here = (
        SearchRecord(spec={"kind": "module", "import": "net:Net", "sha256": digest})
        for digest in "ab"
    )
    assert differences(there, here) == [
        f"{option('model')} (its code has changed)"
    ] and not differences(there, there)
