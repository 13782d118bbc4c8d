"""Draws from generators of Python and NumPy are found by their states, and such modules train one
by one."""

import random

import numpy as np
import pytest
import sklearn.utils
import torch
from scipy import stats
from torch import nn

import gputune
from gputune.modules.inspection import inspect_module
from gputune.modules.module_trial import ModuleTrial
from problems import Linear, fill, make_data, variant

NUMPY = np.random.default_rng(0)
PYTHON = random.Random(0)
TORCH = torch.Generator()


class Holds(Linear):
    """Has generators of its own, as attributes and in a dict."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.own = np.random.default_rng(1)
        self.several = {"a": random.Random(1)}


DRAWING = {
    "Python's random": lambda self, x: x * random.random(),
    "numpy.random": lambda self, x: x * sklearn.utils.shuffle([1.0, 2.0])[0] * stats.norm.rvs(),
    "a numpy.random.Generator of its own": lambda self, x: x * self.own.normal(),
    "a random.Random of its own": lambda self, x: x * self.several["a"].random(),
    "a torch.Generator of its own": lambda self, x: x * torch.rand(5, generator=TORCH),
}


@pytest.mark.parametrize("source", DRAWING)
def test_draws_outside_of_torch_are_found_by_the_states_of_generators(source):
    inner = DRAWING[source]
    module = variant(Holds, lambda self, x: Linear.forward(self, inner(self, x)))
    traits = inspect_module(ModuleTrial(module, *fill({}), make_data()))
    assert traits.unstackable.startswith(f"it draws from {source}, and a stacked")
    assert traits.host_draws and traits.draws and traits.evaluation_draws


@pytest.mark.parametrize("generator", [NUMPY, PYTHON], ids=["NumPy", "Python"])
def test_a_generator_of_the_file_is_found(generator):
    name = "NUMPY" if generator is NUMPY else "PYTHON"
    module = variant(Linear, lambda self, x: Linear.forward(self, x * globals()[name].random()))
    traits = inspect_module(ModuleTrial(module, *fill({}), make_data()))
    assert "of its own, and a stacked" in traits.unstackable


def test_draws_from_torch_only_train_stacked():
    module = variant(Holds, lambda self, x: Linear.forward(self, x + torch.randn_like(x)))
    traits = inspect_module(ModuleTrial(module, *fill({}), make_data()))
    assert not traits.unstackable and not traits.host_draws


class LayerDrop(nn.Module):
    """Leaves its second layer out in 2% of the steps. Its forwards on the rows of a minibatch are
    counted."""

    calls = 0

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.first = nn.Linear(n_features, 8)
        self.second = nn.Linear(8, 8)
        self.last = nn.Linear(8, n_outputs)

    def forward(self, x):
        LayerDrop.calls += self.training and len(x) == 16
        h = torch.tanh(self.first(x))
        is_left_out = self.training and random.random() < 0.02
        return self.last(h if is_left_out else h + self.second(h))


def search(model, **more):
    X = torch.linspace(-1, 1, 64 * 3).reshape(64, 3).sin()
    options = {
        "n_trials": 2,
        "max_epochs": 2,
        "cv": 2,
        "verbose": 0,
        "space": {"batch_size": [16], "lr": [1e-2, 1e-3]},
    }
    return gputune.tune(model, X, (X.sum(1) > 0).long(), **{**options, **more})


@pytest.mark.cpu  # on a GPU, gputune also measures the memory of a few steps
@pytest.mark.parametrize("seed", range(12))
def test_a_layer_that_is_left_out_by_a_rare_draw_is_left_out_in_each_step(seed):
    random.seed(seed)
    LayerDrop.calls = 0
    before = random.getstate()
    study = search(LayerDrop, random_state=seed)
    assert LayerDrop.calls == 2 * 2 * 2 * 2  # trials, folds, epochs, minibatches
    assert any("draws from Python's random" in note for note in study.record.notes)
    assert random.getstate() == before


class Noisy(Linear):
    """Draws from all generators that gputune seeds, when it is made and in each forward in
    training."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.weight.data += random.random() + np.random.rand()

    def forward(self, x):
        noise = random.random() + np.random.rand() + torch.rand(()) if self.training else 0.0
        return super().forward(x + noise)


def test_draws_from_python_and_numpy_follow_the_seed_of_the_search():
    curves = []
    for seed in range(2):
        random.seed(seed)
        np.random.seed(seed)
        curves.append(search(Noisy, scoring="neg_log_loss").curves)
    np.testing.assert_array_equal(*curves)
    assert (search(Noisy, scoring="neg_log_loss", random_state=1).curves != curves[0]).all()
