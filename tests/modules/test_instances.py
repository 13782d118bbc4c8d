"""Errors about the argument that should be a module: instances of every kind, and builders with
their own defaults.
"""

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.sklearn import NeuralNetClassifier
from refused import refused

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

ROWS = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
CLASSES = np.arange(30) % 3
OPTIONS = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0}


def tune(model):
    return gputune.tune(model, ROWS, CLASSES, **OPTIONS)


class Net(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return self.layer(x)


class Depends(Net):
    """Needs an argument that the data do not give."""

    def __init__(self, block, n_outputs):
        super().__init__(block, n_outputs)


SEQUENTIAL = nn.Sequential(nn.Linear(3, 3))
INSTANCES = {
    "Sequential": (
        SEQUENTIAL,
        r"function that creates .* instance of nn.Sequential, .* return nn.Sequential\(\.\.\.\)",
    ),
    "a layer of PyTorch": (
        nn.Linear(3, 3),
        r"instance of nn.Linear, .* return nn.Linear\(\.\.\.\)",
    ),
    "DataParallel": (
        nn.DataParallel(Net(3, 3)),
        r"instance of nn.DataParallel, .*: return nn.DataParallel\(\.\.\.\)",
    ),
    "a class with other arguments": (
        Depends(3, 3),
        r"instance of Depends, .* return Depends\(\.\.\.\)",
    ),
    "a class that the data build": (
        Net(3, 3),
        "a class, not an instance, .*. Pass Net. To start .* weights",
    ),
    "torch.compile": (
        torch.compile(Net(3, 3), backend="eager"),
        "a class, not an instance, .*. Pass Net",
    ),
    "torch.compile of Sequential": (
        torch.compile(SEQUENTIAL, backend="eager"),
        "not an instance of nn.Sequential",
    ),
}


@pytest.mark.parametrize("kind", INSTANCES)
def test_an_instance_is_refused_with_a_remedy_that_works(kind):
    instance, words = INSTANCES[kind]
    with refused(f"^model must be .*{words}"):
        tune(instance)
    with refused(f"^module must be .*{words}.* Arguments of the module are written module__"):
        NeuralNetClassifier(instance).fit(ROWS, CLASSES)


def test_a_scripted_instance_is_refused_with_a_function_that_scripts():
    with refused(r"instance of RecursiveScriptModule, .* return torch.jit.script\(\.\.\.\)"):
        tune(torch.jit.script(Net(3, 3)))


def test_a_function_that_returns_the_instance_trains_copies_of_it():
    before = SEQUENTIAL[0].weight.detach().clone()
    study = gputune.tune(lambda: SEQUENTIAL, ROWS, CLASSES, space={"lr": [1e-9]}, **OPTIONS)
    torch.testing.assert_close(study.best_model().module[0].weight, before)
    assert torch.equal(SEQUENTIAL[0].weight, before)


class Vision(nn.Module):
    """Takes its number of classes as models of torchvision and timm do."""

    def __init__(self, width=8, num_classes=1000):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, x):
        return self.layers(x)


def vision(**kwargs):
    return Vision(**kwargs)


class OneOutput(nn.Module):
    def __init__(self, n_features, n_outputs=1):
        super().__init__()
        self.layer = nn.Linear(n_features, 1)

    def forward(self, x):
        return self.layer(x)


def test_no_advice_to_set_what_gputune_passes():
    with pytest.raises(gputune.InputError) as error:
        tune(OneOutput)
    assert "n_outputs=1" not in str(error.value) and "module__" not in str(error.value)


def test_the_default_that_gives_the_wrong_number_of_outputs_is_named():
    with refused(
        r"got \(\d+, 1000\).* Vision has num_classes=1000 by default. Set module__num_classes=3 in the space"
    ):
        tune(Vision)
    with refused(
        r"got \(\d+, 1000\).* has num_classes=1000 by default. Pass module__num_classes=3\."
    ):
        NeuralNetClassifier(Vision, max_epochs=1).fit(ROWS, CLASSES)
    study = gputune.tune(Vision, ROWS, CLASSES, space={"module__num_classes": [3]}, **OPTIONS)
    assert (
        NeuralNetClassifier(Vision, module__num_classes=3, max_epochs=1).fit(ROWS, CLASSES).n_iter_
        == 1
    )
    assert study.best_model().predict_proba(ROWS).shape == (30, 3)


def test_a_function_of_any_keyword_that_refuses_the_sizes_is_told_to_be_wrapped():
    with refused(r"vision accepts any keyword .*: def make\(n_outputs\): return vision\(\.\.\.\)"):
        tune(vision)
