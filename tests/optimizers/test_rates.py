"""Rates of some parameters and of dropout, their schedules and beta2: each member equals a plain
PyTorch loop."""

import itertools
import math

import pytest
import torch
from torch import nn

import gputune
from gputune.ground.seeding import stream, stream_seed
from gputune.models import Dropout
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.optimizers.update import factor_of
from problems import Net, fill, largest_difference, make_data, rows_of, shape_of, train
from refused import refused

EPOCHS = 6


class Scaled(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_features))
        self.enter = nn.Linear(n_features, 7)
        self.leave = nn.Linear(7, n_outputs)
        self.drop = Dropout()

    def forward(self, x):
        return self.leave(self.drop(torch.relu(self.enter(x * self.scale))))


CONFIGS = fill(
    {"batch_size": 16, "lr": 0.03, "beta2": 0.95, "lr_factor__scale": 6.0, "schedule": "coslog4"},
    {
        "batch_size": 16,
        "lr": 0.01,
        "lr_factor__bias": 0.1,
        "weight_decay_factor__bias": 0.0,
        "weight_decay": 0.5,
        "weight_decay_schedule": "flat_cos",
        "dropout": 0.3,
        "dropout_schedule": "flat_cos",
    },
)


def flat_cos(t):
    return 1.0 if t < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * t - 1)))


def plain_loop(x, y, config):
    """One member with groups of parameters; the loop sets their rates before every step, as PyTorch
    users do.
    """
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(0, "module"))
        module = Scaled(x.shape[1], 3).to(x.dtype).train()
    groups = [{"params": [w], "name": name.split(".")} for name, w in module.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config["beta2"]))
    total = EPOCHS * math.ceil(len(x) / 16)
    done = 0
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x), generator=stream(0, "rows", len(x), epoch))
        for step, rows in enumerate(order.split(16)):
            t = done / total
            waves = (1 - math.cos(2 * math.pi * math.log2(1 + 15 * t))) / 2
            for group in optimizer.param_groups:
                lr, decay = (
                    math.prod(config.get(f"{word}__{part}", 1.0) for part in group["name"])
                    for word in ("lr_factor", "weight_decay_factor")
                )
                group["lr"] = lr * config["lr"] * (waves if config["schedule"] == "coslog4" else 1)
                later = flat_cos(t) if config["weight_decay_schedule"] == "flat_cos" else 1
                group["weight_decay"] = decay * config["weight_decay"] * later
            module.drop.rate.fill_(config["dropout"] * flat_cos(t))
            with torch.random.fork_rng():
                torch.manual_seed(stream_seed(0, "dropout", epoch, step))
                loss = nn.functional.cross_entropy(module(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    return module


@pytest.mark.parametrize("kind", [StackedModule, LoopedModule])
@pytest.mark.parametrize("backend", ["eager", "recorded"])
def test_members_equal_a_plain_loop(kind, backend):
    data = make_data()
    traits = traits_of(Scaled, CONFIGS[0], data)
    network = kind(Scaled, CONFIGS, shape_of(data), seed=0, traits=traits)
    trained = train(network, data, CONFIGS, seed=0, epochs=EPOCHS, horizon=EPOCHS, backend=backend)
    for c, config in enumerate(CONFIGS):
        x, y, _ = rows_of(data, 1)
        assert largest_difference(trained.member(1, c), plain_loop(x, y, config)) <= 1e-8


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "muon", "schedulefree"])
def test_factors_of_all_parameters_are_those_of_the_rates(optimizer):
    """A factor on every parameter is a factor on the rate: also in rules that have none of their
    own."""
    data = make_data()
    values = {"batch_size": 61, "momentum": 0.5, "beta2": 0.9}
    (config,) = fill({**values, "lr": 0.01, "weight_decay": 0.2}, optimizer=optimizer)
    halves = [
        {f"lr_factor__{part}": 0.5, f"weight_decay_factor__{part}": 2}
        for part in ("weight", "bias")
    ]
    (other,) = fill(
        {**values, "lr": 0.02, "weight_decay": 0.1, **halves[0], **halves[1]}, optimizer=optimizer
    )
    members = []
    for kind, each in itertools.product((StackedModule, LoopedModule), (config, other)):
        network = kind(Net, [each], shape_of(data), seed=0, traits=traits_of(Net, each, data))
        members.append(train(network, data, [each], seed=0, epochs=4, horizon=4).member(0, 0))
    assert all(largest_difference(member, members[0]) <= 1e-10 for member in members[1:])


def test_a_factor_is_the_product_of_those_that_are_named():
    config = {"lr_factor__first": 0.5, "lr_factor__bias": 0.1, "weight_decay_factor__bias": 3.0}
    assert factor_of(config, ("lr_factor__",), "body.first.bias") == pytest.approx(0.05)
    assert factor_of(config, ("lr_factor__",), "body.biases") == 1


@pytest.mark.parametrize(
    ("method", "space", "message"),
    [
        (
            "random",
            {"lr_factor__scale": 2.0},
            r"space\['lr_factor__scale'\] must contain a part of a parameter's dotted name in Net. The "
            "parts are 0",
        ),
        (
            "random",
            {"lr_factor__bias": -1},
            "'lr_factor__bias'] must be a finite number >= 0, got -1",
        ),
        (
            "random",
            {"dropout": 0.1},
            r"space\['dropout'\] is the rate of gputune.models.Dropout, which Net does not contain. Use",
        ),
        (
            "random",
            {"lr_factor__bias": 0.1, "optimizer": "adamhd"},
            "optimizer='adamhd' adapts its learning rate and does not",
        ),
        (
            "hypergradient",
            {"lr_factor__bias": 0.1},
            "lr_factor__bias=0.1, which trial 0 has. Leave it out",
        ),
    ],
)
def test_rates_that_cannot_be(iris, method, space, message):
    words = {"space": space, "method": method, "include_default": False}
    with refused(message):
        gputune.tune(Net, *iris, n_trials=1, cv=2, max_epochs=1, verbose=0, **words)


def test_dropout_is_that_of_torch_in_law():
    torch.manual_seed(0)
    layer = Dropout(0.25)
    kept = layer(torch.ones(4000)) > 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    assert float(layer(torch.ones(40)).max()) == pytest.approx(1 / 0.75)
    assert torch.equal(layer.eval()(torch.ones(4)), torch.ones(4))
    with pytest.raises(ValueError, match=r"dropout is a probability in \[0, 1\), got p=1"):
        Dropout(1)
