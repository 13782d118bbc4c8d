"""Members with different batch sizes train in one chunk: an epoch is cut at the borders of all
minibatches. Each member equals its own plain loop."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import reference
from gputune.modules.module import StackedModule
from gputune.population.pieces import PiecedBatches, make_batches
from problems import fill, largest_difference, make_data, module_loop, train_modules


class Net(nn.Module):
    """A small network whose rows do not affect each other."""

    def __init__(self, n_features, n_outputs, frozen=False):
        super().__init__()
        self.body = nn.Linear(n_features, 8).requires_grad_(not frozen)
        self.head = nn.Linear(8, n_outputs)

    def forward(self, x):
        return self.head(self.body(x).tanh())


OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "lr": 1e-2, "weight_decay": 0.1, "clip_norm": 0.2},
    "cosine": {"optimizer": "adamw", "lr": 1e-2, "schedule": "cosine", "weight_decay": 0.01},
}


def configs_of(name, sizes, **shared):
    """One configuration for each batch size, and one more of the last size."""
    rates = [{"batch_size": size} for size in sizes]
    last = {"batch_size": sizes[-1], "lr": OPTIMIZERS[name]["lr"] / 2}
    configs = [OPTIMIZERS[name] | shared | rate for rate in (*rates, last)]
    return fill(*configs)


def assert_equal_plain_loops(build, configs, data, epochs, **options):
    trained = train_modules(StackedModule, build, configs, data, epochs, **options)
    assert isinstance(trained.chunk.batches, PiecedBatches)
    for f in range(data.n_folds):
        for c, config in enumerate(configs):
            expected = module_loop(build, data, f, config, epochs)
            worst = largest_difference(trained.member(f, c), expected)
            assert worst < 1e-10, f"fold {f}, batch size {config['batch_size']}: {worst:.1e}"


@pytest.fixture(autouse=True)
def clipping_oracle(monkeypatch):
    """Plain loops clip the gradient of a whole minibatch, if the configuration says so."""
    plain = reference.make_optimizer

    def make_optimizer(module, config):
        optimizer = plain(module, config)
        norm = config["clip_norm"]

        def clip(*_):
            torch.nn.utils.clip_grad_norm_(module.parameters(), norm)

        if norm < math.inf:
            optimizer.register_step_pre_hook(clip)
        return optimizer

    monkeypatch.setattr(reference, "make_optimizer", make_optimizer)


@pytest.mark.parametrize("sizes", [(4, 8, 16), (4, 6, 16)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_members_of_different_batch_sizes_equal_plain_loops(name, sizes):
    data = make_data(n=100)  # two folds of 50 rows
    assert_equal_plain_loops(Net, configs_of(name, sizes), data, 2, backend="recorded")


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer": "rmsprop", "lr": 1e-3, "ema": 0.9},
        {"optimizer": "muon", "lr": 1e-2},
        {"optimizer": "nesterov", "lr": 0.05, "momentum": 0.9, "clip_norm": 0.2},
        {"optimizer": "schedulefree", "lr": 1e-2},
    ],
    ids=lambda values: values["optimizer"],
)
def test_members_equal_those_of_one_batch_size(values):
    data = make_data(n=60)
    configs = fill(*[values | {"batch_size": size} for size in (4, 6, 16)])
    trained = train_modules(StackedModule, Net, configs, data, 2)
    assert isinstance(trained.chunk.batches, PiecedBatches)
    for c, config in enumerate(configs):
        alone = train_modules(StackedModule, Net, [config], data, 2)
        assert largest_difference(trained.member(1, c), alone.member(1, 0)) < 1e-10


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("task", ["multiclass", "binary", "regression"])
def test_row_weights_and_folds_of_different_lengths_equal_plain_loops(task, weights, frozen):
    data = make_data(task, n=61, folds=3, weights=weights)
    assert len(set(data.train_lengths)) > 1
    configs = configs_of("adamw", (4, 7, 16, 64), module__frozen=frozen)
    assert_equal_plain_loops(Net, configs, data, 2, backend="recorded")


def test_a_minibatch_of_zero_weights_has_the_share_zero():
    data = make_data(n=24, folds=2, weights=True)
    data = replace(data, weights=torch.zeros_like(data.weights))
    batches = make_batches(data, [1, 2, 5], data.y[None], seed=0, exact=True)
    (part,) = batches.at(0, 1)
    assert torch.equal(part.share, torch.zeros(2, 3, 1, 1, dtype=torch.float64))


def test_huge_and_tiny_weights_keep_their_shares():
    data = make_data(n=24, folds=2, weights=True)
    weights = data.weights.clone()
    weights[:, ::2] *= 1e-30
    data = replace(data, weights=weights)
    assert_equal_plain_loops(Net, configs_of("sgd", (1, 2, 5)), data, 1, backend="eager")


def test_each_row_is_in_one_piece_and_no_piece_crosses_a_border():
    data = make_data(n=150, folds=3)
    batches = make_batches(data, [4, 6, 16], data.y[None], seed=0, exact=True)
    assert batches.borders.tolist()[:8] == [0, 4, 6, 8, 12, 16, 18, 20]
    assert batches.borders[-1] == 100
    assert batches.steps.tolist() == [[25, 17, 7]] * 3
    rows = [
        part.inputs[0].shape[1]
        for piece in range(len(batches.shapes))
        for part in batches.at(0, piece)
    ]
    assert sum(rows) == 100


def test_equal_batch_sizes_are_not_cut():
    data = make_data(n=20)
    for sizes in ([8, 8], [64, 100]):  # the larger sizes exceed the rows of a fold
        batches = make_batches(data, sizes, data.y[None], seed=0, exact=True)
        assert not isinstance(batches, PiecedBatches)
    assert not isinstance(
        make_batches(data, [4, 8], data.y[None], seed=0, exact=False), PiecedBatches
    )
