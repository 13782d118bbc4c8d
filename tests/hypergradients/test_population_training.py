"""A population as an inner training: its members are those that plain training gives, and each has its own slope."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from gputune.engine.job import train_chunk
from gputune.engine.mlp import StackedMLP
from gputune.hypergradients.chunk import HypergradientJob, PopulationTraining, inner_problem
from gputune.hypergradients.inner import InnerProblem
from gputune.hypergradients.modes import differences, forward, reverse
from gputune.modules.inspection import traits_of
from gputune.population.population import Population
from problems import Net, fill, grid, largest_difference, make_data, shape_of, train_together
from refused import refused

TASKS = ["multiclass", "binary", "regression"]
OPTIMIZERS = ["sgd", "nesterov", "adam", "adamw"]


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


def problem(data, configs, *, segments=1):
    """A population's training of three epochs, at rates that rise from segment to segment."""
    network = StackedMLP("mlp", configs, shape_of(data), seed=0)
    training = PopulationTraining(network, data, configs, seed=0, epochs=3)
    rising = [{**c, "lr": (c["lr"] * np.linspace(1, 1.5, segments)).tolist()} for c in configs]
    job = HypergradientJob(seed=0, epochs=3, horizon=3, segments=segments)
    return InnerProblem(training, configs[0]["optimizer"], job.tables(training, rising))


SCHEDULES = ["constant", "cosine"]
FEW = [(task, name, SCHEDULES[(i + j) % 2]) for i, task in enumerate(TASKS) for j, name in enumerate(OPTIMIZERS)]


@pytest.mark.parametrize(("task", "optimizer", "schedule"), grid(TASKS, OPTIMIZERS, SCHEDULES, short=FEW))
def test_members_equal_those_of_plain_training(task, optimizer, schedule):
    data = make_data(task, weights=True, folds=3)
    configs = unlike(optimizer, dropout=0.1, schedule=schedule)
    inner = problem(data, configs)
    weights, (expected, _) = inner.train(), train_together(data, configs, epochs=3)
    for f, c in itertools.product(range(data.n_folds), range(len(configs))):
        assert largest_difference(inner.training.member(weights, f, c), expected[f, c]) <= 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_member_has_the_slope_that_it_has_alone(optimizer):
    """All modes agree, and neighbours, members of other lengths and padding change nothing (law 2 and law 3)."""
    data, configs, names = make_data(weights=True, folds=3), unlike(optimizer), ("lr", "weight_decay")
    configs[1]["schedule"] = "cosine"
    whole = problem(data, configs, segments=2)
    assert len(set(whole.training.totals.tolist())) > 1
    modes = reverse, partial(reverse, checkpoint=True), forward
    first, *others = found = [mode(whole, names) for mode in modes]
    for name, other in itertools.product(names, others):
        bound = 1e-12 * float(first.gradients[name].abs().max())
        torch.testing.assert_close(other.gradients[name], first.gradients[name], rtol=0, atol=bound)
    for mode, together in zip(modes, found):
        for c, config in enumerate(configs):
            alone = mode(problem(data, [config], segments=2), names)
            for name in names:
                own = together.gradients[name].view(3, 3, -1)[:, c]
                torch.testing.assert_close(own, alone.gradients[name].view(3, -1), rtol=1e-11, atol=1e-15)
            torch.testing.assert_close(together.value.view(3, 3)[:, c], alone.value, rtol=1e-12, atol=0)
            torch.testing.assert_close(together.ratio.view(3, 3)[:, c], alone.ratio)


@pytest.mark.parametrize("task", TASKS)
def test_slopes_equal_finite_differences(task):
    inner = problem(make_data(task, folds=3), unlike("adam", schedule="cosine"), segments=2)
    found, expected = reverse(inner, ("lr",)), differences(inner, ("lr",), width=1e-5)
    for a, b in zip(found.gradients["lr"].flatten(), expected.gradients["lr"].flatten()):
        assert a == pytest.approx(float(b), rel=1e-6, abs=1e-7)


def test_padded_units_have_no_slope_of_nan():
    """A unit that is padding has gradient and squares of zero, where the root's slope would be infinite."""
    data, configs = (make_data(folds=3), fill({"optimizer": "adam", "width": 3}, {"optimizer": "adam", "width": 16}))
    for mode in (forward, reverse):
        found = mode(problem(data, configs), ("lr", "beta1", "beta2"))
        for table in found.gradients.values():
            assert table.isfinite().all() and table.abs().min() > 0


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


def module_problem(kind, data, *configs):
    """A module's job and chunk, and its training for two epochs at the hyperparameters of the configurations."""
    chunk = Population("module", tuple(range(len(configs))), tuple(fill(*configs)))
    traits = {chunk.arguments: traits_of(kind, chunk.configs[0], data)}
    job = HypergradientJob(seed=0, epochs=2, horizon=2, module_class=kind, traits=traits, backend="eager")
    return job, chunk, inner_problem(job, data, chunk)


@pytest.mark.parametrize(
    ("kind", "layers", "kept"),
    [(Net, 2, 0), (Sequence, 2, 0), (WithLSTM, 2, 0), (Convolution, 3, 7), (partial(Convolution, momentum=None), 3, 7)],
)
def test_modules_are_differentiated_twice(kind, layers, kept):
    """They are those of plain training; forward and reverse agree, and their slope is that of central differences."""
    data, optimizer = make_data(folds=3, weights=kind is Net), "adamw" if kind is Net else "sgd"
    config = {"optimizer": optimizer, "lr": 0.3, "batch_size": 16}
    job, chunk, inner = module_problem(kind, data, config, config | {"lr": 0.1})
    assert (inner.training.kept, int(inner.training.layer.max()) + 1) == (kept, layers)
    weights, plain = inner.train(), train_chunk(job, data, chunk)
    for f, c in itertools.product(range(3), range(2)):
        assert largest_difference(inner.training.member(weights, f, c), plain.member(f, c)) <= 1e-12
    a, b = (mode(inner, ("lr",)).gradients["lr"] for mode in (forward, reverse))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(b, differences(inner, ("lr",), width=1e-5).gradients["lr"], rtol=1e-5, atol=1e-9)


class Counting(Net):
    """Remembers how often it was called."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + self.training
        return super().forward(x)


def test_other_state_is_refused():
    with refused("model: its 'calls' changes in training, and is no known function"):
        module_problem(Counting, make_data(folds=3), {"batch_size": 16})


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
    found = reverse(problem(data, unlike("adam")), ("lr",))
    assert found.value.isfinite().all() and found.gradients["lr"].isfinite().all()
