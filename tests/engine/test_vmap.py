"""A user's module, stacked, equals its plain training; what cannot be stacked is refused by name."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

import reference
from gputune.data.dataset import Fold
from gputune.engine.population import populations
from gputune.engine.train import train
from gputune.engine.vmap import StackedModule, check_module
from gputune.errors import InputError
from problems import fill, largest_difference, make_data, rows_of, shape_of


class Residual(nn.Module):
    """Layer norm, a residual, two dropouts: the parts that ordinary modules have."""

    def __init__(self, n_features, n_outputs, hidden=6, p=0.0):
        super().__init__()
        self.enter = nn.Linear(n_features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.leave = nn.Linear(hidden, n_outputs)
        self.drop, self.other = nn.Dropout(p), nn.Dropout(p / 2)
        self.register_buffer("shift", torch.full((hidden,), 0.1))

    def forward(self, x):
        h = self.drop(torch.tanh(self.norm(self.enter(x)))) + self.shift
        return self.leave(h + self.other(torch.relu(self.inner(h))))


class Flat(nn.Module):
    """Returns (rows,) for one output, and has a parameter that is not trained."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.frozen = nn.Parameter(torch.ones(n_features), requires_grad=False)

    def forward(self, x):
        return self.layer(x * self.frozen).squeeze(-1)


def assert_module_equals_plain_loop(build, data, configs, *, epochs):
    seen = 0
    for population in populations(configs, "module", rows=max(len(f.train) for f in data.folds)):
        network = StackedModule(build, population.configs, shape_of(data), seed=0)
        trained = train(network, data, population.configs, seed=0, epochs=epochs, horizon=epochs)
        for c, config in enumerate(population.configs):
            words = {k.removeprefix("module__"): v for k, v in config.items() if k.startswith("module__")}
            for f in range(data.n_folds):
                x, y, weights = rows_of(data, f)
                alone = reference.train_module(
                    partial(build, n_features=data.n_features, n_outputs=data.n_outputs, **words),
                    x, y, config, epochs=epochs, weights=weights,
                )  # fmt: skip
                assert largest_difference(trained.member(f, c), alone) <= 1e-10
                seen += 1
    assert seen == len(configs) * data.n_folds


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_module_equals_its_plain_loop(optimizer, weights):
    data = make_data(weights=weights)
    configs = fill(
        *(
            {"optimizer": optimizer, "lr": lr, "batch_size": size, "module__hidden": hidden}
            for lr in (1e-3, 1e-2)
            for size, hidden in ((16, 6), (20, 6), (500, 9))
        )
    )
    assert_module_equals_plain_loop(Residual, data, configs, epochs=6)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_two_dropouts_equal_the_plain_modules_run(p):
    configs = fill(
        *({"batch_size": size, "module__p": p, "lr": lr} for lr in (1e-3, 1e-2) for size in (16, 7))
    )
    assert_module_equals_plain_loop(Residual, make_data(), configs, epochs=5)


def test_one_output_frozen_parameters_and_regression():
    configs = fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    assert_module_equals_plain_loop(Flat, make_data("regression"), configs, epochs=5)


class WithBatchNorm(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, 4), nn.BatchNorm1d(4), nn.Linear(4, n_outputs))

    def forward(self, x):
        return self.body(x)


class WithBranch(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.gate = Gate()
        self.layer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return self.layer(self.gate(x))


class Gate(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counting(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.layer(x)


class TooFew(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs + 1)


class NoOutputs(nn.Linear):
    def __init__(self, n_features):
        super().__init__(n_features, 1)


class Broken(nn.Linear):
    def __init__(self, n_features, n_outputs, size=1):
        super().__init__(n_features, n_outputs)
        raise RuntimeError("no such size")


class WrongInput(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.inner = nn.Linear(n_features + 1, n_outputs)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("module_class", "message"),
    [
        (WithBatchNorm, r"submodule 'body.1' \(BatchNorm1d\).*use nn.LayerNorm"),
        (WithBranch, r"submodule 'gate'.*cannot be stacked.*torch.where"),
        (Counting, "buffer 'seen' of Counting changes in training"),
        (TooFew, r"must return a tensor of shape \(rows, 2\), got \(4, 3\)"),
        (NoOutputs, "must accept the keyword n_outputs"),
        (Broken, "raised RuntimeError: no such size"),
        (WrongInput, r"forward of WrongInput \(submodule 'inner'\) raised RuntimeError"),
    ],
)
def test_what_cannot_be_stacked_is_refused_by_name(module_class, message):
    (config,) = fill({})
    with pytest.raises(InputError, match=message):
        check_module(module_class, config, n_features=3, n_outputs=2, dtype=torch.float32)


def test_an_unknown_module_argument_is_named():
    (config,) = fill({"module__size": 3})
    with pytest.raises(InputError, match="module__size is no argument of Residual"):
        check_module(Residual, config, n_features=3, n_outputs=2, dtype=torch.float32)


def test_a_good_module_passes():
    (config,) = fill({"module__p": 0.5})
    check_module(Residual, config, n_features=3, n_outputs=2, dtype=torch.float32)


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov"])
def test_folds_of_very_unlike_length(optimizer):
    data = make_data(n=120)
    rows = torch.arange(120)
    folds = tuple(Fold(train=rows[:n], valid=rows[n : n + 20]) for n in (20, 55, 100))
    data = dataclasses.replace(data, folds=folds)
    configs = fill({"batch_size": 8, "optimizer": optimizer, "lr": 0.01, "module__p": 0.2})
    assert_module_equals_plain_loop(Residual, data, configs, epochs=30)


class Mixing(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Frozen(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.requires_grad_(False)


class Detached(Mixing):
    def forward(self, x):
        return nn.Linear.forward(self, x).detach()


@pytest.mark.parametrize(
    ("module_class", "message"),
    [
        (Mixing, "treat every row by itself"),
        (Frozen, "Frozen has nothing to train"),
        (Detached, "Detached has nothing to train"),
    ],
)
def test_what_cannot_be_trained_alone_is_refused(module_class, message):
    (config,) = fill({})
    with pytest.raises(InputError, match=message):
        check_module(module_class, config, n_features=3, n_outputs=2, dtype=torch.float32)
