"""Optimizers, clipping and averages of stacked members, and of members one by one, equal a plain
PyTorch loop."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import problems
import reference
from gputune.ground.seeding import stream, stream_seed
from gputune.modules.construction import hidden_sides
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.optimizers.classes import CLASSES
from gputune.population.population import is_plain, populations
from problems import (
    fill,
    largest_difference,
    make_data,
    rows_of,
    scoring_of,
    shape_of,
    train,
    train_together,
)

NEW = ("rmsprop", "lion", "muon", "schedulefree")
TOLERANCE = 1e-10


class Lion(torch.optim.Optimizer):
    """Program 1 of Chen et al. (2023)."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w].setdefault("m", torch.zeros_like(w))
                update = (0.9 * m + 0.1 * w.grad).sign() + group["weight_decay"] * w
                w -= group["lr"] * update
                m.mul_(0.99).add_(w.grad, alpha=0.01)


class Muon(torch.optim.Optimizer):
    """torch's Muon in the precision of the parameters; torch computes its products in bfloat16."""

    def __init__(self, params, lr, weight_decay, momentum):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w].setdefault("m", torch.zeros_like(w))
                m.lerp_(w.grad, 1 - group["momentum"])
                x = w.grad.lerp(m, group["momentum"]).flatten(1)
                x = x / x.norm().clamp_min(1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
                w.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(w.shape[0], w[0].numel()))
                w.sub_(x.view_as(w), alpha=group["lr"] * scale)


class ScheduleFree(torch.optim.Optimizer):
    """Algorithm 1 of Defazio et al. (2024), written with x, y and z; ``average`` puts x in the
    place of y."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for y in group["params"]:
                state = self.state[y]
                if not state:
                    state |= {
                        "x": y.clone(),
                        "z": y.clone(),
                        "v": torch.zeros_like(y),
                        "t": 0,
                        "sum": 0.0,
                    }
                state["t"] += 1
                corrected = 1 - 0.999 ** state["t"]
                state["v"].mul_(0.999).addcmul_(y.grad, y.grad, value=0.001)
                rate = group["lr"] * math.sqrt(corrected)
                state["z"] -= rate * (
                    y.grad / (state["v"].sqrt() + 1e-8) + group["weight_decay"] * y
                )
                state["sum"] += corrected
                state["x"].lerp_(state["z"], corrected / state["sum"])
                y.copy_(0.1 * state["z"] + 0.9 * state["x"])

    @torch.no_grad()
    def average(self):
        for w, state in self.state.items():
            w.copy_(state["x"])


def make_optimizers(module, config):
    lr = config["lr"]
    decay = config["weight_decay"]
    momentum = config["momentum"]
    name = config["optimizer"]
    params = list(module.parameters())
    if name == "rmsprop":
        return [torch.optim.RMSprop(params, lr=lr, momentum=momentum, weight_decay=decay)]
    if name == "lion":
        return [Lion(params, lr, decay)]
    if name == "schedulefree":
        return [ScheduleFree(params, lr, decay)]
    if name == "muon":
        matrices = [w for w in params if w.dim() > 1][1:-1]
        rest = [w for w in params if not any(w is m for m in matrices)]
        adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=decay)
        return [adamw, *([Muon(matrices, lr, decay, momentum)] if matrices else [])]
    return [reference.make_optimizer(module, config)]


def plain_loop(module, data, fold, config, epochs):
    """Train a plain module in the usual way, and return the weights to score."""
    x, y, _ = rows_of(data, fold)
    n = len(x)
    size = min(config["batch_size"], len(x))
    optimizers = make_optimizers(module, config)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config["ema"]))
    module.train()
    for epoch in range(epochs):
        for rows in torch.randperm(n, generator=stream(0, "rows", n, epoch)).split(size):
            loss = reference.minibatch_loss(
                module(x[rows]), y[rows], torch.ones(len(rows), dtype=x.dtype)
            )
            module.zero_grad()
            loss.backward()
            if config["clip_norm"] < math.inf:
                torch.nn.utils.clip_grad_norm_(module.parameters(), config["clip_norm"])
            for optimizer in optimizers:
                optimizer.step()
            averaged.update_parameters(module)
    if isinstance(optimizers[0], ScheduleFree):
        optimizers[0].average()
        return module
    return averaged.module if config["ema"] else module


def plain_mlp(data, config):
    from gputune.models import MLP

    module = MLP(
        data.n_features,
        data.n_outputs,
        width=config["width"],
        depth=config["depth"],
        activation="tanh",
    )
    return reference.start(module.double(), 0)


def unlike(optimizer, *more):
    """Members with different values; some of them clip or average."""
    rows = [
        {"lr": 3e-3, "batch_size": 20, "weight_decay": 0.1, "momentum": 0.3},
        {"lr": 1e-2, "batch_size": 17, "weight_decay": 0.0, "clip_norm": 0.2},
        {"lr": 1e-2, "batch_size": 17, "weight_decay": 0.01, "clip_norm": 0.7, "momentum": 0.6},
        {"lr": 2e-2, "batch_size": 20, "ema": 0.8},
        {"lr": 2e-2, "batch_size": 20, "ema": 0.3, "clip_norm": 0.1},
    ]
    less = {"ema": 0.0} if optimizer == "schedulefree" else {}  # which is an average itself
    return fill(
        *(row | common | less for row in rows for common in (more or ({},))), optimizer=optimizer
    )


COMPILED = [
    pytest.param(name, "compiled", marks=problems.needs_compiled_code)
    for name in ("sgd", "nesterov", "adam", "adamw")
]


@pytest.mark.parametrize(
    ("optimizer", "backend"), [*((name, "eager") for name in (*NEW, "sgd", "adamw")), *COMPILED]
)
def test_members_of_a_network_equal_a_plain_loop(optimizer, backend, monkeypatch):
    monkeypatch.setattr(problems, "BACKEND", backend)
    data = make_data(folds=2)
    sizes = (
        {"width": 5, "depth": 3, "activation": "tanh"},
        {"width": 16, "depth": 1, "activation": "tanh"},
    )
    configs = unlike(optimizer, *sizes)
    together, _ = train_together(data, configs, epochs=6)
    for i, config in enumerate(configs):  # each in one fold: the plain loops take the time
        alone = plain_loop(plain_mlp(data, config), data, i % 2, config, epochs=6)
        assert largest_difference(together[i % 2, i], alone) <= TOLERANCE, config


class Net(nn.Module):
    """A convolution between others, a matrix that is higher than wide, and statistics over
    minibatches."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        # BatchNorm would make its slope rounding alone
        self.first = nn.Conv1d(1, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Conv1d(3, 4, 3, padding=1)
        self.third = nn.Linear(4, 7)
        self.last = nn.Linear(7, n_outputs)

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x[:, None])))
        return self.last(torch.tanh(self.third(torch.tanh(self.second(x)).mean(-1))))


ONE_BY_ONE = [(LoopedModule, name, {}) for name in CLASSES] + [
    (LoopedModule, "Adagrad", {"optimizer__initial_accumulator_value": 0.1}),
    (
        LoopedModule,
        "RAdam",
        {"optimizer__betas": [0.8, 0.99], "optimizer__decoupled_weight_decay": True},
    ),
]


@pytest.mark.parametrize(
    ("kind", "optimizer", "more"),
    [
        *itertools.product([StackedModule], [*NEW, "adamw", "adam"], [{}]),
        *(
            pytest.param(LoopedModule, name, {}, marks=pytest.mark.long)
            for name in (*NEW, "adamw", "adam")
        ),
        *ONE_BY_ONE,
    ],
)
def test_members_of_a_module_equal_a_plain_loop(kind, optimizer, more):
    data = make_data(n=40, folds=2)
    configs = unlike(optimizer, more)
    # of those alone: one clips, one averages as well
    configs = configs if kind is StackedModule else configs[1::3]
    traits = traits_of(Net, configs[0], data)
    for population in populations(configs, "module", rows=20):
        members = list(population.configs)
        network = kind(Net, members, shape_of(data), seed=0, traits=traits)
        trained = train(network, data, members, seed=0, epochs=6, horizon=6)
        for c, config in enumerate(members):
            with torch.random.fork_rng():
                torch.manual_seed(stream_seed(0, "module"))
                plain = Net(data.n_features, data.n_outputs).double()
            alone = plain_loop(plain, data, 1, config, epochs=6)
            assert largest_difference(trained.member(1, c), alone) <= TOLERANCE, config


def test_hidden_matrices_are_neither_first_nor_last_nor_embeddings():
    module = Net(5, 3)
    assert hidden_sides(module, dict(module.named_parameters())) == {
        "second.weight": 9,
        "third.weight": 7,
    }
    words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2))
    assert hidden_sides(words, dict(words.named_parameters())) == {"1.weight": 6}


def test_the_steps_of_muon_are_those_of_torch_but_for_its_rounding():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.eye(6, 4) + 0.1) for _ in range(2))
    one = Muon([ours], 0.02, 0.1, 0.95)
    other = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        for w, optimizer in ((ours, one), (theirs, other)):
            w.grad = (w.detach() - torch.arange(24.0).view(6, 4).sin()) ** 3
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


MORE = [pytest.param(name, marks=[pytest.mark.long] * (n > 1)) for n, name in enumerate(CLASSES)]


@pytest.mark.parametrize("optimizer", [*NEW, "adamw", "sgdhd", *MORE])
def test_an_average_and_moments_continue_from_a_state(optimizer):
    data = make_data()
    rows = [{"lr": lr, "ema": 0.7, "clip_norm": 0.5, "batch_size": 16} for lr in (1e-3, 3e-3, 1e30)]
    rows = [row | ({"hypergrad_lr": 0.01} if optimizer == "sgdhd" else {}) for row in rows]
    configs = fill(*rows, optimizer=optimizer)
    (population,) = populations(configs, "module", rows=30)
    words = {"seed": 0, "horizon": 6, "scoring": scoring_of(data, "neg_log_loss")}

    def run(kind, **more):
        network = kind(problems.Linear, configs, shape_of(data), seed=0)
        return train(network, data, population.configs, **(words | more))

    for kind, backend in ((LoopedModule, "eager"), (StackedModule, "recorded"))[
        : 1 + (optimizer not in CLASSES)
    ]:
        whole = run(kind, epochs=6, backend=backend)
        half = run(kind, epochs=3, backend=backend)
        rest = run(kind, epochs=6, backend=backend, begin=half.state, alive=half.alive)
        assert rest.alive == whole.alive
        np.testing.assert_allclose(
            rest.curves[list(rest.alive), 3:], whole.curves[list(rest.alive), 3:]
        )


def test_what_clips_or_averages_is_not_plain():
    plain, clipped, averaged = fill({}, {"clip_norm": 1.0}, {"ema": 0.9})
    assert is_plain(plain) and not is_plain(clipped) and not is_plain(averaged)
