"""Small data sets and one way to train a list of configurations, shared by the tests of the engine."""

import gc

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.mlp import StackedMLP
from gputune.engine.network import Shape
from gputune.engine.population import complete, populations
from gputune.engine.train import train

BACKEND = "eager"  # that of train_together; a test of all of them sets it


class Linear(torch.nn.Linear):
    """A user's module, as small as they come."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def make_data(task="multiclass", *, n=61, d=5, k=3, folds=3, dtype=torch.float64, weights=False, copies=True):
    """A Dataset with folds of unequal length; every fold reads its own copy unless ``copies`` is false."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(folds if copies else 1, n, d, generator=g, dtype=torch.float64).to(dtype)
    position = torch.arange(n)
    cut = [
        Fold(train=position[position % folds != f], valid=position[position % folds == f])
        for f in range(folds)
    ]
    if task == "regression":
        target = torch.randn(n, generator=g, dtype=torch.float64)
        center, scale = torch.linspace(0.1, 0.3, folds).double(), torch.linspace(1, 1.5, folds).double()
        y, k = ((target - center[:, None]) / scale[:, None]).to(dtype), 1
    else:
        k = 2 if task == "binary" else k
        target = y = torch.randint(k, (n,), generator=g)
        center, scale = torch.zeros(folds).double(), torch.ones(folds).double()
    return Dataset(
        inputs=(x,),
        dtype=dtype,
        copies=tuple(range(folds)) if copies else (0,) * folds,
        y=y,
        weights=torch.rand(folds, n, generator=g, dtype=torch.float64).to(dtype) if weights else None,
        folds=tuple(cut),
        present=None,
        center=center,
        scale=scale,
        n_outputs=k,
        task=task,
        target=target,
    )


def shape_of(data):
    return Shape(
        data.n_folds,
        data.n_features,
        data.n_outputs,
        data.dtype,
        data.device,
        data.task == "regression",
        data.present,
    )


def fill(*configs, optimizer="adamw"):
    return [complete(config, optimizer=optimizer, schedule="constant") for config in configs]


def train_together(data, configs, *, kind="mlp", seed=0, epochs=3, horizon=None, scoring=None, groups=True):
    """Train complete configurations in their populations; return member(f, i) -> module and the curves."""
    found, curves = {}, np.full((len(configs), epochs, data.n_folds), np.nan)
    rows = max(len(fold.train) for fold in data.folds)
    for population in populations(configs, kind, rows=rows):
        network = StackedMLP(kind, population.configs, shape_of(data), seed=seed)
        trained = train(
            network,
            data,
            population.configs,
            seed=seed,
            epochs=epochs,
            horizon=horizon or epochs,
            scoring=scoring,
            backend=BACKEND,
        )
        curves[list(population.index)] = trained.curves
        for c in trained.alive:
            for f in range(data.n_folds):
                found[f, population.index[c]] = trained.member(f, c)
    return found, curves


def rows_of(data, fold):
    """Training rows and targets of one fold, as the plain loop reads them."""
    rows = data.folds[fold].train
    y = data.y[fold] if data.task == "regression" else data.y
    weights = None if data.weights is None else data.weights[fold, rows]
    return data.x[data.copies[fold], rows], y[rows], weights


def largest_difference(module, other):
    """max |difference| / max |reference| over the tensors of two plain modules, the second being the reference."""
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def living_tensors():
    """The number of tensors that Python still holds when all that it can collect is gone."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
