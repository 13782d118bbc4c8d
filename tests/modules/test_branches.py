"""Modules that branch on values of their rows or on random numbers train stacked, like plain loops."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.modules.failures import uneven_use
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from problems import Linear, fill, largest_difference, make_data, module_loop, train_modules


class Branching(nn.Module):
    """Dropout, in a layer that only some minibatches have."""

    def __init__(self, n_features, n_outputs, p=0.0):
        super().__init__()
        self.enter = nn.Linear(n_features, 8)
        self.drop = nn.Dropout(p)
        self.leave = nn.Linear(8, n_outputs)

    def forward(self, x):
        h = torch.tanh(self.enter(x))
        if bool(x[:, 0].max() > 1.5):
            h = self.drop(h) * 2
        return self.leave(self.drop(h))


class Switching(Linear):
    """A second layer, which no minibatch uses, or which only rare minibatches use."""

    def __init__(self, n_features, n_outputs, smallest=10.0):
        super().__init__(n_features, n_outputs)
        self.smallest = smallest
        self.other = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        outputs = super().forward(x)
        return outputs + self.other(x) if bool(x.max() > self.smallest) else outputs


class RandomDepth(Branching):
    """Leaves out a residual without parameters by a number that it draws."""

    def forward(self, x):
        h = torch.tanh(self.enter(x))
        if not self.training or torch.rand(()) < 0.5:
            h = h + torch.relu(h)
        return self.leave(self.drop(h))


CONFIGS = fill({"lr": 3e-3, "batch_size": 8, "weight_decay": 0.1}, {"lr": 1e-2, "batch_size": 8})


@pytest.mark.parametrize("build", [Branching, RandomDepth])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_members_that_branch_equal_plain_loops(build, p):
    data = make_data()
    configs = [config | {"module__p": p} for config in CONFIGS]
    traits = traits_of(build, configs[0], data)
    assert traits.branches and not traits.unstackable
    # the rows of a fold decide, or a number that all members draw
    assert traits.common_rows == (build is Branching)
    for backend in ("eager", "recorded"):
        trained = train_modules(StackedModule, build, configs, data, 3, backend=backend)
        for f in range(data.n_folds):
            for c, config in enumerate(configs):
                alone = module_loop(build, data, f, config, 3)
                assert largest_difference(trained.member(f, c), alone) < 1e-10


def test_the_minibatches_of_a_test_take_both_branches():
    data = make_data()
    largest = data.x[0, :, 0].split(8)
    branches = {bool(part.max() > 1.5) for part in largest}
    assert branches == {True, False}


def test_a_module_that_reads_no_value_keeps_separate_rows():
    traits = traits_of(Linear, CONFIGS[0], make_data())
    assert not traits.branches and not traits.common_rows


def test_a_parameter_that_no_minibatch_uses_stays_unchanged():
    data = make_data()
    traits = traits_of(Switching, CONFIGS[0], data)
    assert not traits.unstackable
    assert traits.unused == ("other.weight", "other.bias")
    trained = train_modules(StackedModule, Switching, CONFIGS, data, 3, backend="recorded")
    looped = train_modules(LoopedModule, Switching, CONFIGS, data, 3, backend="loop")
    assert largest_difference(trained.member(1, 0), looped.member(1, 0)) < 1e-10


def test_a_parameter_that_rare_minibatches_use_ends_stacked_training(monkeypatch):
    monkeypatch.delenv("GPUTUNE_STRICT_BACKENDS")
    X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[40, 1] = 20.0  # not among the tried rows
    y = torch.arange(60) % 3
    words = {"n_trials": 3, "cv": 2, "max_epochs": 4, "verbose": 0, "random_state": 0}
    words |= {"dtype": "float64", "workers": 1, "numbers": "none"}
    says = (
        "Switching trains one by one, because training with stacked members failed: Switching uses "
        "its parameter 'other.weight' only in some training steps."
    )
    with pytest.warns(RuntimeWarning, match=re.escape(says)):
        study = gputune.tune(Switching, X, y, **words)
    expected = gputune.tune(Switching, X, y, **words, backend="loop")
    np.testing.assert_array_equal(study.curves, expected.curves)


@pytest.mark.parametrize(
    ("one_by_one", "remedy"),
    [
        (False, "Choose backend='loop'."),
        (True, "Choose method='random', which trains each trial to the end."),
    ],
)
def test_the_remedy_for_a_trial_that_cannot_start_again(one_by_one, remedy):
    error = uneven_use("Net", "other.weight", one_by_one=one_by_one)
    assert str(error).endswith(
        f"Net uses its parameter 'other.weight' only in some training steps. {remedy}"
    )
