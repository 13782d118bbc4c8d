"""Small data sets, ways to train configurations, the plain loop that members are compared to,
counts of memory."""

import gc
import itertools
import math
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import reference
from gputune.data.dataset import Dataset, Fold
from gputune.engine import train as engine
from gputune.engine.mlp import StackedMLP
from gputune.modules.inspection import traits_of
from gputune.native.library import FOLDER
from gputune.population.population import Shape, complete, module_arguments, populations
from gputune.scoring.metrics import make_scoring

BACKEND = "eager"  # that of train_together; a test of all of them sets it
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

needs_compiled_code = pytest.mark.skipif(
    not any(FOLDER.glob("_float1.*")), reason="gputune was installed without a C compiler"
)


def grid(*axes, short):
    """The points of a grid, as parameters of a test; the points that are not in ``short`` are
    marked long.
    """
    points = itertools.product(*axes)
    return [pytest.param(*p, marks=[pytest.mark.long] * (p not in short)) for p in points]


class Net(torch.nn.Module):
    """A user's module."""

    def __init__(self, n_features, n_outputs, hidden=6):
        super().__init__()
        first = torch.nn.Linear(n_features, hidden)
        last = torch.nn.Linear(hidden, n_outputs)
        self.body = torch.nn.Sequential(first, torch.nn.Tanh(), last)

    def forward(self, x):
        return self.body(x)


class Linear(torch.nn.Linear):
    """A user's module, as small as they come."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def variant(base, forward, name="Variant"):
    """A class of modules like another, with a forward of its own: a function of the module and its
    inputs."""
    return type(name, (base,), {"forward": forward})


def make_data(
    task="multiclass", *, n=61, d=5, k=3, folds=2, dtype=torch.float64, weights=False, copies=True
):
    """A Dataset with folds of unequal length; every fold reads its own copy unless ``copies`` is
    false."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(folds if copies else 1, n, d, generator=g, dtype=torch.float64).to(dtype)
    position = torch.arange(n)
    cut = [
        Fold(train=position[position % folds != f], valid=position[position % folds == f])
        for f in range(folds)
    ]
    if task == "regression":
        target = torch.randn(n, generator=g, dtype=torch.float64)
        center = torch.linspace(0.1, 0.3, folds).double()
        scale = torch.linspace(1, 1.5, folds).double()
        y = ((target - center[:, None]) / scale[:, None]).to(dtype)
        k = 1
    else:
        k = 2 if task == "binary" else k
        target = y = torch.randint(k, (n,), generator=g)
        center = torch.zeros(folds).double()
        scale = torch.ones(folds).double()
    weights = torch.rand(folds, n, generator=g, dtype=torch.float64).to(dtype) if weights else None
    return Dataset(
        inputs=(x,),
        dtype=dtype,
        copies=tuple(range(folds)) if copies else (0,) * folds,
        y=y,
        weights=weights,
        folds=tuple(cut),
        present=None,
        center=center,
        scale=scale,
        n_outputs=k,
        task=task,
        target=target,
    )


def without_class_2(data):
    """The data, where fold 1 has no row of class 2 to learn from."""
    first, fold, *others = data.folds
    present = torch.ones(data.n_folds, 3, dtype=torch.bool)
    present[1, 2] = False
    fold = replace(fold, train=fold.train[data.y[fold.train] != 2])
    return replace(data, folds=(first, fold, *others), present=present)


shape_of = Shape.of


def data_of(rows, n_outputs, y=None):
    """Rows (n, ...) of ``n_outputs`` classes, all of one fold."""
    whole = torch.arange(len(rows))
    data = make_data(n=len(rows), k=n_outputs, folds=1, dtype=rows.dtype)
    y = whole % n_outputs if y is None else y
    return replace(data, inputs=(rows[None],), y=y, folds=(Fold(train=whole, valid=whole),))


def fill(*configs, optimizer="adamw"):
    return [complete(config, optimizer=optimizer, schedule="constant") for config in configs]


def scoring_of(data, name=None):
    """The scoring of that name; None: the usual one of the task."""
    return make_scoring(
        name, data.task, None if data.task == "regression" else np.arange(data.n_outputs)
    )


def train(network, data, configs, *, begin=None, alive=None, after_epoch=None, **training):
    """Train a chunk of these configurations, from where it was begun."""
    chunk = engine.BegunChunk(
        network.kind, tuple(range(len(configs))), tuple(configs), begin, alive
    )
    return engine.train(network, data, chunk, engine.Training(**training), after_epoch)


def train_together(data, configs, *, kind="mlp", seed=0, epochs=3, horizon=None, scoring=None):
    """Train complete configurations in their populations; return member(f, i) -> module and the
    curves."""
    found = {}
    curves = np.full((len(configs), epochs, data.n_splits), np.nan)
    rows = max(len(fold.train) for fold in data.folds)
    for population in populations(configs, kind, rows=rows):
        network = StackedMLP(kind, population.configs, shape_of(data), seed=seed)
        options = {"seed": seed, "epochs": epochs, "horizon": horizon or epochs, "scoring": scoring}
        trained = train(network, data, population.configs, backend=BACKEND, **options)
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


def module_loop(build, data, fold, config, epochs):
    """The module that a plain loop trains on a fold."""
    x, y, weights = rows_of(data, fold)
    sizes = {"n_features": data.n_features, "n_outputs": data.n_outputs}
    build = partial(build, **sizes, **module_arguments(config))
    return reference.train_module(build, x, y, config, epochs=epochs, weights=weights)


def train_modules(kind, build, configs, data, epochs, *, objective=None, coded=False, **words):
    """Members of a user's module, trained stacked or one by one: ``kind``. ``coded`` says that
    compiled code is faster."""
    traits = replace(traits_of(build, configs[0], data, objective=objective), coded=coded)
    network = kind(build, configs, shape_of(data), seed=0, traits=traits, objective=objective)
    return train(
        network, data, configs, **{"seed": 0, "epochs": epochs, "horizon": epochs, **words}
    )


def largest_difference(module, other):
    """max |difference| / max |reference| over the tensors of two plain modules, the second being
    the reference."""
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


_TRAINED = {}  # the slow loop trains a member once, whatever it is compared to


def plain_loop(data, fold, config, epochs, horizon=None):
    """The oracle's network for one member."""
    x, y, weights = rows_of(data, fold)
    rows = [None if part is None else part.numpy().tobytes() for part in (x, y, weights)]
    key = (*rows, x.dtype, repr(sorted(config.items())), epochs, horizon)
    if key not in _TRAINED:
        options = {"epochs": epochs, "max_epochs": horizon, "weights": weights}
        _TRAINED[key] = reference.train_mlp(x, y, config, n_outputs=data.n_outputs, **options)
    return _TRAINED[key]


def assert_equals_plain_loop(data, configs, *, kind="mlp", epochs, horizon=None):
    """Assert that every member trained together with all others is the network that is trained
    alone."""
    together, _ = train_together(data, configs, kind=kind, epochs=epochs, horizon=horizon)
    for (f, i), member in together.items():
        config = configs[i] if kind == "mlp" else {**configs[i], "depth": 0, "dropout": 0.0}
        worst = largest_difference(member, plain_loop(data, f, config, epochs, horizon))
        if kind == "mlp" and data.dtype == torch.float32 and not worst <= TOLERANCE[data.dtype]:
            worst = up_to_a_kink(data, configs, f, i, epochs=epochs, horizon=horizon)
        assert worst <= TOLERANCE[data.dtype], f"fold {f}, {configs[i]}: {worst:.1e}"
    assert len(together) == data.n_folds * len(configs)


def up_to_a_kink(data, configs, fold, trial, *, epochs, horizon):
    """The largest difference up to the epoch after which rounding puts a row on the other side of a
    relu; inf without.

    Which side it falls on is then the machine's choice, and Adam makes much of it (1.5e-8 beside
    zero was seen). To be sure of it, an epoch is one step: of a whole fold.
    """
    x, _, _ = rows_of(data, fold)
    if configs[trial]["activation"] != "relu" or configs[trial]["batch_size"] < len(x):
        return math.inf
    worst = 0.0
    for epoch in range(1, epochs):
        together, _ = train_together(data, configs, epochs=epoch, horizon=horizon or epochs)
        alone = plain_loop(data, fold, configs[trial], epoch, horizon or epochs)
        worst = max(worst, largest_difference(together[fold, trial], alone))
        a = x
        b = x
        for one, other in zip(together[fold, trial].layers[:-1], alone.layers[:-1]):
            a = one(a)
            b = other(b)
            if ((a > 0) != (b > 0)).any() and (a - b).abs().max() < 1e-5:
                return worst
            a = a.relu()
            b = b.relu()
        if not worst <= TOLERANCE[data.dtype]:
            break
    return math.inf


class _Allocated(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live, graphs included."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        # what is read before it is made was there before
        for tensor in tree_leaves((arguments, keywords)):
            if isinstance(tensor, torch.Tensor):
                self.known[tensor.untyped_storage()] = True
        result = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage()) not in self.known
            ):
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(work):
    """The most bytes of tensors that were alive at once during a call, in addition to its
    arguments.
    """
    with _Allocated() as allocated:
        work()
    return allocated.peak


def living_tensors():
    """The number of tensors that Python still holds when all that it can collect is gone."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
