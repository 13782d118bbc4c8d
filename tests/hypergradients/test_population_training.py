"""A population as an inner training: its members are those that plain training gives, and each has its own slope."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from gputune.engine.job import train_chunk
from gputune.engine.mlp import StackedMLP
from gputune.engine.train import train
from gputune.errors import InputError
from gputune.hypergradients.chunk import HypergradientJob, PopulationTraining, inner_problem
from gputune.hypergradients.inner import InnerProblem
from gputune.hypergradients.modes import forward, reverse
from gputune.modules.inspection import traits_of
from gputune.modules.module import StackedModule
from gputune.population.population import Population
from problems import fill, grid, largest_difference, make_data, shape_of, train_together

TASKS = ["multiclass", "binary", "regression"]
OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw"]


class Net(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=6):
        super().__init__()
        self.first = nn.Linear(n_features, hidden)
        self.last = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def unlike(optimizer, **common):
    """Three trials of one population that share nothing else: widths, batch sizes, rates, decays."""
    rows = ((8, 16, 0.01, 0.1), (13, 10, 0.03, 0.02), (16, 12, 0.02, 0.01))
    return fill(
        *(
            {"optimizer": optimizer, "width": w, "batch_size": b, "lr": lr, "weight_decay": wd,
             "activation": "tanh", **common}
            for w, b, lr, wd in rows
        )
    )  # fmt: skip


def tables(configs, folds, *, segments=1):
    """Hyperparameters (P, S, 1) of configurations, members fold-major."""
    found = {
        name: torch.tensor([float(c[name]) for c in configs] * folds, dtype=torch.float64)[:, None, None]
        for name in ("lr", "momentum", "weight_decay")
    }
    found["lr"] = found["lr"].expand(-1, segments, -1) * torch.linspace(1, 1.5, segments)[:, None].double()
    found |= {
        name: torch.full((len(configs) * folds, 1, 1), v, dtype=torch.float64)
        for name, v in (("beta1", 0.9), ("beta2", 0.99))
    }
    return found


def population(data, configs, *, epochs=3):
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    return PopulationTraining(network, data, configs, seed=0, epochs=epochs)


SCHEDULES = ["constant", "cosine"]
FEW = [(task, name, SCHEDULES[(i + j) % 2]) for i, task in enumerate(TASKS) for j, name in enumerate(OPTIMIZERS)]


@pytest.mark.parametrize(("task", "optimizer", "schedule"), grid(TASKS, OPTIMIZERS, SCHEDULES, short=FEW))
def test_members_equal_those_of_plain_training(task, optimizer, schedule):
    data = make_data(task, weights=True, folds=3)
    configs = unlike(optimizer, dropout=0.1, schedule=schedule)
    training = population(data, configs)
    values = tables(configs, data.n_folds)
    values["beta2"][:] = 0.999
    weights = InnerProblem(training, optimizer, values).train()
    expected, _ = train_together(data, configs, epochs=3)
    for f, c in itertools.product(range(data.n_folds), range(len(configs))):
        assert largest_difference(training.member(weights, f, c), expected[f, c]) <= 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_member_has_the_slope_that_it_has_alone(optimizer):
    """Law 2 and law 3 for hypergradients: neighbours and padding change nothing."""
    data, configs = make_data(folds=3), unlike(optimizer)
    together = reverse(
        InnerProblem(population(data, configs), optimizer, tables(configs, 3, segments=2)), ("lr", "weight_decay")
    )
    for c, config in enumerate(configs):
        alone = reverse(
            InnerProblem(population(data, [config]), optimizer, tables([config], 3, segments=2)), ("lr", "weight_decay")
        )
        for name in ("lr", "weight_decay"):
            found = together.gradients[name].view(3, 3, -1)[:, c]
            torch.testing.assert_close(found, alone.gradients[name].view(3, -1), rtol=1e-11, atol=1e-15)
        torch.testing.assert_close(together.value.view(3, 3)[:, c], alone.value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_forward_equals_reverse_with_members_of_unlike_length(optimizer):
    data, configs = make_data(weights=True, folds=3), unlike(optimizer)
    training = population(data, configs)
    assert len(set(training.totals.tolist())) > 1
    values = tables(configs, 3, segments=3)
    found = [mode(InnerProblem(training, optimizer, values), ("lr", "weight_decay")) for mode in (forward, reverse)]
    found.append(reverse(InnerProblem(training, optimizer, values), ("lr", "weight_decay"), checkpoint=True))
    for other in found[1:]:
        for name in ("lr", "weight_decay"):
            scale = float(found[0].gradients[name].abs().max())
            torch.testing.assert_close(other.gradients[name], found[0].gradients[name], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("task", TASKS)
def test_slopes_equal_finite_differences(task):
    data, configs = make_data(task, folds=3), unlike("adam")
    training, values, h = population(data, configs), tables(configs, 3, segments=2), 1e-5
    found = reverse(InnerProblem(training, "adam", values), ("lr",))
    for s in range(2):
        ends = []
        for sign in (1, -1):
            moved = values["lr"].clone()
            moved[:, s] *= torch.exp(torch.tensor(sign * h, dtype=torch.float64))
            ends.append(training.validation(InnerProblem(training, "adam", {**values, "lr": moved}).train()))
        slope = (ends[0] - ends[1]) / (2 * h)
        log_slope = (found.gradients["lr"] * values["lr"])[:, s, 0]
        assert ((log_slope - slope).abs() <= 1e-6 * slope.abs() + 1e-9).all()


def test_padded_units_have_no_slope_of_nan():
    """A unit that is padding has gradient and squares of zero, where the root's slope would be infinite."""
    data, configs = (make_data(folds=3), fill({"optimizer": "adam", "width": 3}, {"optimizer": "adam", "width": 16}))
    for mode in (forward, reverse):
        found = mode(InnerProblem(population(data, configs), "adam", tables(configs, 3)), ("lr", "beta1", "beta2"))
        for table in found.gradients.values():
            assert table.isfinite().all() and table.abs().min() > 0


def test_a_users_module_equals_its_plain_training():
    data = make_data("multiclass", weights=True, folds=3)
    configs = fill({"optimizer": "adamw", "lr": 0.02, "batch_size": 10}, {"optimizer": "adamw", "batch_size": 10})
    network = StackedModule(Net, configs, shape_of(data), seed=0)
    training = PopulationTraining(network, data, configs, seed=0, epochs=3)
    values = tables(configs, 3)
    values["beta2"][:] = 0.999
    weights = InnerProblem(training, "adamw", values).train()
    plain = train(network, data, configs, seed=0, epochs=3, horizon=3)
    for f, c in itertools.product(range(3), range(2)):
        assert largest_difference(training.member(weights, f, c), plain.member(f, c)) <= 1e-12
    assert training.layer.tolist() == [0] * (6 * 5 + 6) + [1] * (3 * 6 + 3)
    a, b = (mode(InnerProblem(training, "adamw", values), ("lr",)).gradients["lr"] for mode in (forward, reverse))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


class Sequence(nn.Module):
    kind = nn.GRU

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.cell, self.leave = self.kind(1, 3, batch_first=True), nn.Linear(3, n_outputs)

    def forward(self, x):
        return self.leave(self.cell(x[..., None])[0][:, -1])


class WithLSTM(Sequence):
    kind = nn.LSTM


class Convolution(nn.Sequential):
    def __init__(self, n_features, n_outputs, **options):
        first = nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3, **options), nn.Tanh()
        super().__init__(*first, nn.Dropout(0.1), nn.Flatten(), nn.Linear(3 * (n_features - 2), n_outputs))


@pytest.mark.parametrize("kind", [Sequence, WithLSTM, Convolution, partial(Convolution, momentum=None)])
def test_modules_are_differentiated_twice(kind):
    """They are those of plain training; forward and reverse agree, and their slope is that of central differences."""
    data, configs = make_data(folds=3), fill({"optimizer": "sgd", "lr": 0.3, "batch_size": 16})
    chunk = Population("module", (0,), tuple(configs))
    traits = {chunk.arguments: traits_of(kind, configs[0], data)}
    job = HypergradientJob(seed=0, epochs=2, horizon=2, module_class=kind, traits=traits, backend="eager")
    training, values = inner_problem(job, data, chunk).training, tables(configs, 3)
    assert training.kept == (7 if traits[chunk.arguments].changing else 0)
    problem = InnerProblem(training, "sgd", values)
    weights, plain = problem.train(), train_chunk(job, data, chunk)
    for f in range(3):
        assert largest_difference(training.member(weights, f, 0), plain.member(f, 0)) <= 1e-12
    a, b = (mode(problem, ("lr",)).gradients["lr"] for mode in (forward, reverse))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    h, ends = 1e-5, []
    for sign in (1, -1):
        moved = {**values, "lr": values["lr"] + sign * h}
        ends.append(training.validation(InnerProblem(training, "sgd", moved).train()))
    torch.testing.assert_close(b.sum((1, 2)), (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-9)


class Counting(Net):
    """Remembers how often it was called."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + self.training
        return super().forward(x)


def test_other_state_is_refused():
    data, configs = make_data(folds=3), fill({"batch_size": 16})
    chunk = Population("module", (0,), tuple(configs))
    traits = {chunk.arguments: traits_of(Counting, configs[0], data)}
    job = HypergradientJob(seed=0, epochs=2, horizon=2, module_class=Counting, traits=traits)
    with pytest.raises(InputError, match="model: its 'calls' changes in training, and is no known function"):
        inner_problem(job, data, chunk)


def test_a_class_that_a_fold_has_not_trained_on():
    """Its outputs take no part: the losses of the other rows, and all slopes, stay finite."""
    data = make_data("multiclass", folds=3)
    present = torch.ones(3, 3, dtype=torch.bool)
    present[0, 2] = False
    folds = tuple(
        type(fold)(
            fold.train[data.y[fold.train] != 2] if f == 0 else fold.train,
            fold.valid[data.y[fold.valid] != 2] if f == 0 else fold.valid,
        )
        for f, fold in enumerate(data.folds)
    )
    data = type(data)(**{**data.__dict__, "present": present, "folds": folds})
    configs = unlike("adam")
    found = reverse(InnerProblem(population(data, configs), "adam", tables(configs, 3)), ("lr",))
    assert found.value.isfinite().all() and found.gradients["lr"].isfinite().all()
