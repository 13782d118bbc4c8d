"""A user's module, stacked, equals its plain training; modules that no loop could train are refused
by name.
"""

import threading
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.data.dataset import Fold
from gputune.ground import seeding
from gputune.ground.errors import InputError
from gputune.modules.construction import build_module
from gputune.modules.inspection import inspect_module, traits_of
from gputune.modules.module import StackedModule
from gputune.modules.module_trial import ModuleTrial
from gputune.population.population import Shape, populations
from problems import (
    Linear,
    data_of,
    fill,
    largest_difference,
    make_data,
    module_loop,
    shape_of,
    train_modules,
    variant,
)

ROWS = torch.linspace(-1, 1, 12).view(4, 3)


class Residual(nn.Module):
    """Layer norm, a residual, two dropouts: the parts that ordinary modules have."""

    def __init__(self, n_features, n_outputs, hidden=6, p=0.0):
        super().__init__()
        self.enter = nn.Linear(n_features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.leave = nn.Linear(hidden, n_outputs)
        self.drop = nn.Dropout(p)
        self.other = nn.Dropout(p / 2)
        self.register_buffer("shift", torch.full((hidden,), 0.1))

    def forward(self, x):
        h = self.drop(torch.tanh(self.norm(self.enter(x)))) + self.shift
        return self.leave(h + self.other(torch.relu(self.inner(h))))


class Flat(Linear):
    """Returns (rows,) for one output, and has a parameter that is not trained."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.frozen = nn.Parameter(torch.ones(n_features), requires_grad=False)

    def forward(self, x):
        return super().forward(x * self.frozen).squeeze(-1)


class WithBatchNorm(nn.Module):
    """Running statistics of rows and of channels; ``words`` go to the first."""

    def __init__(self, n_features, n_outputs, **words):
        super().__init__()
        self.enter = nn.Sequential(
            nn.Linear(n_features, 6, bias=False), nn.BatchNorm1d(6, **words), nn.Tanh()
        )
        self.inner = nn.Sequential(
            nn.Conv1d(1, 2, 3, bias=False), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, n_outputs)
        )

    def forward(self, x):
        return self.inner(self.enter(x)[:, None])


class Counting(Linear):
    """Buffers that count, and that are replaced."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(n_features))

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return super().forward(x - self.mean)


# Rows depend on each other.
Mixing = variant(Linear, lambda self, x: Linear.forward(self, x - x.mean(0)))


class Reminding(nn.Module):
    """One layer under two names, an activation kept in ``self``, and a tensor that depends on a
    parameter."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter = nn.Linear(n_features, 6)
        self.inner = nn.Linear(6, 6)
        self.again = self.inner
        self.leave = nn.Linear(6, n_outputs)
        self.twice = 2 * self.enter.weight
        self.kept = {}

    def forward(self, x):
        self.hidden = self.kept["hidden"] = torch.tanh(self.inner(self.enter(x)))
        return self.leave(self.again(self.hidden))


def lazy(n_features, n_outputs):
    return nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Dropout(0.2), nn.LazyLinear(n_outputs))


def materialised(n_features, n_outputs):
    module = lazy(n_features, n_outputs).eval()
    module(torch.zeros(1, n_features))
    return module


def scripted(n_features, n_outputs):
    return torch.jit.script(
        nn.Sequential(nn.Linear(n_features, 4), nn.Tanh(), nn.Linear(4, n_outputs))
    )


def with_folds(n, *ends):
    """Data with folds that have this number of training rows."""
    folds = make_data(n=n, folds=len(ends))
    rows = torch.arange(n)
    return replace(
        folds, folds=tuple(Fold(train=rows[:end], valid=rows[end : end + 9]) for end in ends)
    )


def sizes_of(optimizer):
    """Two networks of one shape, one of another minibatch size, one of another shape."""
    four = ((1e-3, 16, 6), (1e-2, 16, 6), (1e-3, 20, 6), (1e-2, 500, 9))
    return [
        {"optimizer": optimizer, "lr": lr, "batch_size": size, "module__hidden": h}
        for lr, size, h in four
    ]


TWO = [{"batch_size": 16}, {"batch_size": 16, "lr": 0.1}]
NORMS = {
    "adamw": {},
    "nesterov": {"momentum": None},
    "adam": {"affine": False},
    "sgd": {"momentum": 0.3, "eps": 1e-2},
}
CASES = {
    **{
        f"{o}, weights {w}": (Residual, make_data(weights=w), sizes_of(o), 6)
        for o in ("sgd", "adamw")
        for w in (0, 1)
    },
    "two dropouts": (
        Residual,
        make_data(),
        [{**two, "module__p": 0.5} for two in (*TWO, {"batch_size": 7})],
        5,
    ),
    "one output and frozen parameters": (Flat, make_data("regression"), TWO, 5),
    **{
        f"batch norm, {words}": (
            partial(WithBatchNorm, **words),
            make_data(weights=True),
            [
                {"optimizer": o, "lr": lr, "batch_size": size}
                for lr, size in ((1e-3, 16), (1e-2, 7), (3e-3, 500))
            ],
            6,
        )
        for o, words in NORMS.items()
    },
    "batch norm without running statistics": (
        partial(WithBatchNorm, track_running_stats=False),
        make_data(),
        TWO,
        5,
    ),
    "a last minibatch of one row": (
        WithBatchNorm,
        with_folds(120, 33, 40),
        [{"batch_size": 16}],
        4,
    ),
    "folds of very unlike length": (
        partial(Residual, p=0.2),
        with_folds(120, 20, 55, 100),
        [{"batch_size": 8, "lr": 0.01}],
        4,
    ),
    "buffers that count": (Counting, make_data(), TWO, 3),
    "rows that mix": (Mixing, make_data(), TWO, 3),
    "scripted": (scripted, make_data(), TWO, 2),
    "shared": (Reminding, make_data(), TWO, 3),
    "lazy": (lazy, make_data(), TWO, 3),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", CASES)
def test_a_member_equals_its_plain_loop(name):
    build, data, configs, epochs = CASES[name]
    plain = materialised if build is lazy else build
    seen = 0
    configs = fill(*configs)
    for population in populations(configs, "module", rows=max(len(f.train) for f in data.folds)):
        traits = traits_of(build, population.configs[0], data)
        assert not traits.unstackable and bool(traits.changing) == (
            name.startswith(("batch", "buffers", "a last"))
        )
        assert traits.alone == (
            name not in ("rows that mix", "batch norm without running statistics")
        )
        trained = train_modules(StackedModule, build, population.configs, data, epochs)
        for c, config in enumerate(population.configs):
            for f, fold in enumerate(data.folds):
                # it is left out
                if name == "a last minibatch of one row" and len(fold.train) % 16 == 1:
                    steps = epochs * (len(fold.train) // 16)
                    assert trained.member(f, c).enter[1].num_batches_tracked == steps
                else:
                    alone = module_loop(plain, data, f, config, epochs)
                    assert largest_difference(trained.member(f, c), alone) <= (
                        1e-9 if traits.changing else 1e-10
                    )
                seen += 1
    assert seen == len(configs) * data.n_folds


def test_minibatches_of_one_row_are_refused_where_statistics_need_two():
    X = torch.randn(20, 3)
    y = torch.arange(20) % 2
    with pytest.raises(
        InputError, match="WithBatchNorm cannot train on minibatches of one row.*batch_size=1 gives"
    ):
        gputune.tune(
            WithBatchNorm,
            X,
            y,
            space={"batch_size": [1]},
            n_trials=1,
            cv=2,
            max_epochs=1,
            verbose=0,
        )


class Averaged(Linear):
    """Frozen weights follow trained ones, a layer is used in evaluation alone, a buffer is
    complex."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.slow = nn.Linear(n_features, n_outputs).requires_grad_(False)
        self.slow.load_state_dict({"weight": self.weight, "bias": self.bias})
        self.late = nn.Linear(n_outputs, n_outputs)
        self.register_buffer(
            "turns", torch.polar(torch.ones(n_features), torch.arange(n_features).float())
        )

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.slow.weight.mul_(0.9).add_(self.weight, alpha=0.1)
                self.slow.bias.mul_(0.9).add_(self.bias, alpha=0.1)
        x = super().forward((x * self.turns).imag) + self.slow(x)
        return x if self.training else self.late(x)


def test_frozen_weights_that_follow_unused_ones_and_complex_buffers_are_those_of_the_plain_loop():
    data = make_data()
    configs = fill(*TWO)
    traits = traits_of(Averaged, configs[0], data)
    assert traits.changing == ("slow.weight", "slow.bias") and traits.unused == (
        "late.weight",
        "late.bias",
    )
    assert not traits.unstackable

    def plain(**sizes):  # the oracle's conversion leaves imaginary parts out
        module = Averaged(**sizes)
        turns = module.turns
        _ = delattr(module, "turns")
        module.turns = turns.to(torch.complex128)
        return module

    together = train_modules(StackedModule, Averaged, configs, data, 3)
    for c, config in enumerate(configs):
        alone = module_loop(plain, data, 1, config, 3)
        for (name, found), expected in zip(
            together.member(1, c).named_parameters(), alone.parameters()
        ):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, msg=name)


def broken(n_features, n_outputs):
    raise RuntimeError("no such size")


def frozen(n_features, n_outputs):
    return nn.Linear(n_features, n_outputs).requires_grad_(False)


def wrong_input(n_features, n_outputs):
    return nn.Sequential(nn.Linear(n_features + 1, n_outputs))


@pytest.mark.parametrize(
    ("build", "more", "message"),
    [
        (
            lambda n_features, n_outputs: nn.Linear(n_features, n_outputs + 1),
            {},
            r"must return a tensor of shape \(rows, 2\), got \(4, 3\).*\. Of the 4 columns$",
        ),
        (
            lambda n_features: nn.Linear(n_features, 1),
            {},
            r"got \(4, 1\) for 4 rows\. Its last layer must have n_outputs outputs",
        ),
        (broken, {}, r"raised RuntimeError: no such size.*\. Of the 4 columns$"),
        (
            wrong_input,
            {},
            r"forward pass of wrong_input \(submodule '0'\) raised RuntimeError.*\. Of the 4 columns$",
        ),
        (Residual, {"module__size": 3}, "module__size is not an argument of Residual"),
        (frozen, {}, "frozen has nothing to train"),
        (
            variant(Linear, lambda self, x: Linear.forward(self, x).detach()),
            {},
            "Variant has nothing to train",
        ),
    ],
)
def test_what_no_loop_would_train_is_refused_by_name(build, more, message):
    with pytest.raises(InputError, match=message):
        inspect_module(
            ModuleTrial(build, *fill(more), data_of(ROWS, 2), columns=" Of the 4 columns")
        )


def test_a_lazy_module_draws_what_a_plain_one_draws():
    def plain(n_features, n_outputs):
        return nn.Sequential(
            nn.Linear(n_features, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, n_outputs)
        )

    found, expected = (build_module(build, {}, Shape(3, 2), seed=1) for build in (lazy, plain))
    assert (
        largest_difference(found, expected) == 0 and found.training and type(found[0]) is nn.Linear
    )


class Coded(nn.Module):
    """An embedding of the first column, and the logarithm of the others."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.code = nn.Embedding(5, 4)
        self.last = nn.Linear(3 + n_features, n_outputs)

    def forward(self, x):
        return self.last(torch.cat([self.code(x[:, 0].long()), x[:, 1:].log()], 1))


def test_a_module_is_tried_on_rows_of_the_data():
    (config,) = fill({})
    rows = torch.tensor([[0.0, 1, 2], [4, 1, 3], [2, 5, 1], [1, 1, 7]])
    assert (
        inspect_module(ModuleTrial(Coded, config, data_of(rows, 2))).parameters == 5 * 4 + 2 * 6 + 2
    )
    # NaN says nothing about stacking.
    inspect_module(ModuleTrial(Coded, config, data_of(rows - torch.tensor([0.0, 3, 0]), 2)))
    with pytest.raises(
        InputError, match=r"submodule 'code'\) raised IndexError: index out of range"
    ):
        inspect_module(ModuleTrial(Coded, config, data_of(rows + 3, 2)))


def test_a_code_that_the_tried_rows_have_not_is_named():
    network = StackedModule(Coded, fill({}), Shape(2, 2), seed=0)
    params = network.blocks.views(network.start())
    assert network.outputs(params, 0, [torch.tensor([[4.0, 1.0]])]).shape == (1, 1, 2)
    with pytest.raises(
        InputError, match=r"Coded raised IndexError: index out of range.*an entry for every code"
    ):
        network.outputs(params, 0, [torch.tensor([[5.0, 1.0]])])


def test_the_default_dtype_changes_no_start():
    expected = build_module(Residual, {}, Shape(3, 2), seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        found = build_module(Residual, {}, Shape(3, 2), seed=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert largest_difference(found, expected) == 0 and found.enter.weight.dtype == torch.float32


def attention(n_features, n_outputs):
    """Columns that attend to each other."""
    attend = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (-1, 1)), nn.Linear(1, 4), attend, nn.Flatten(), nn.LazyLinear(n_outputs)
    )


def test_attention_has_a_derivative_in_evaluation_too():
    data = make_data()
    network = StackedModule(attention, fill({}, {}), shape_of(data), seed=0)
    first = network.blocks.views(network.start())
    params = {name: w[0].requires_grad_() for name, w in first.items()}
    x = data.x[0, :5]
    network.differentiable(params, [x.expand(2, *x.shape)], None).sum().backward()
    module = network.member(first, 0, 0).requires_grad_()
    module(x).sum().backward()
    for name, own in module.named_parameters():
        torch.testing.assert_close(params[name].grad[1], own.grad)


class Contended:
    """A lock that says when a thread must wait for it."""

    def __init__(self):
        self.lock = threading.RLock()
        self.waited_for = threading.Event()

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waited_for.set()
            self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_threads_take_turns_at_the_generator(monkeypatch):
    contended = Contended()
    monkeypatch.setattr(seeding, "GLOBAL_DRAWS", contended)
    others = []

    class Interrupted(nn.Linear):
        """Begins to draw when another thread has built a module too, or waits for its turn to."""

        def __init__(self, n_features, n_outputs, interrupt=True):
            if interrupt and not others:
                other = threading.Thread(
                    target=lambda: others.append(build(False)) or contended.waited_for.set()
                )
                other.start()
                others.append(other)
                assert contended.waited_for.wait(60)
            super().__init__(n_features, n_outputs)

    def build(interrupt):
        return build_module(Interrupted, {"interrupt": interrupt}, Shape(3, 2), seed=1)

    before = torch.get_rng_state()
    expected = build(False)
    found = build(True)
    others[0].join()
    assert largest_difference(found, expected) == largest_difference(others[1], expected) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_said_of_operations_that_are_slow_stacked():
    def normed(n_features, n_outputs):
        return nn.utils.parametrizations.weight_norm(nn.Linear(n_features, n_outputs))

    X = torch.randn(40, 3)
    y = np.arange(40) % 2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gputune.tune(normed, X, y, n_trials=2, max_epochs=1, cv=2, verbose=0, backend="stacked")
    assert not [warning for warning in said if "performance drop" in str(warning.message)]
