"""A user's module, stacked, equals its plain training; what cannot be stacked is refused by name."""

import dataclasses
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import gputune
import reference
from gputune import seeding
from gputune.data.dataset import Fold
from gputune.engine.train import train
from gputune.errors import InputError
from gputune.modules.construction import build_module
from gputune.modules.inspection import inspect_module, traits_of
from gputune.modules.module import StackedModule
from gputune.modules.module_trial import ModuleTrial
from gputune.population.network import Shape
from gputune.population.population import populations
from problems import data_of, fill, largest_difference, make_data, rows_of, shape_of

ROWS = torch.linspace(-1, 1, 12).view(4, 3)


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


def assert_module_equals_plain_loop(build, data, configs, *, epochs, plain=None, within=1e-10):
    seen = 0
    for population in populations(configs, "module", rows=max(len(f.train) for f in data.folds)):
        traits = traits_of(build, population.configs[0], data)
        network = StackedModule(build, population.configs, shape_of(data), seed=0, traits=traits)
        trained = train(network, data, population.configs, seed=0, epochs=epochs, horizon=epochs)
        for c, config in enumerate(population.configs):
            words = {k.removeprefix("module__"): v for k, v in config.items() if k.startswith("module__")}
            for f in range(data.n_folds):
                x, y, weights = rows_of(data, f)
                alone = reference.train_module(
                    partial(plain or build, n_features=data.n_features, n_outputs=data.n_outputs, **words),
                    x, y, config, epochs=epochs, weights=weights,
                )  # fmt: skip
                assert largest_difference(trained.member(f, c), alone) <= within
                seen += 1
    assert seen == len(configs) * data.n_folds


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_module_equals_its_plain_loop(optimizer, weights):
    data = make_data(weights=weights)
    configs = fill(
        *(
            {"optimizer": optimizer, "lr": lr, "batch_size": size, "module__hidden": hidden}
            for lr, size, hidden in ((1e-3, 16, 6), (1e-2, 16, 6), (1e-3, 20, 6), (1e-2, 500, 9))
        )
    )
    assert_module_equals_plain_loop(Residual, data, configs, epochs=6)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_two_dropouts_equal_the_plain_modules_run(p):
    configs = fill(*({"batch_size": size, "module__p": p, "lr": lr} for lr, size in ((1e-3, 16), (1e-2, 7))))
    assert_module_equals_plain_loop(Residual, make_data(), configs, epochs=5)


def test_one_output_frozen_parameters_and_regression():
    configs = fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    assert_module_equals_plain_loop(Flat, make_data("regression"), configs, epochs=5)


class WithBatchNorm(nn.Module):
    """Running statistics of rows and of channels; ``words`` go to the first."""

    def __init__(self, n_features, n_outputs, **words):
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(n_features, 6, bias=False), nn.BatchNorm1d(6, **words), nn.Tanh())
        self.inner = nn.Sequential(
            nn.Conv1d(1, 2, 3, bias=False), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, n_outputs)
        )

    def forward(self, x):
        return self.inner(self.enter(x)[:, None])


NORMS = ({}, {"momentum": None}, {"affine": False}, {"momentum": 0.3, "eps": 1e-2})


@pytest.mark.parametrize("words, optimizer", [*zip(NORMS, ["adamw", "nesterov", "adamw", "adamw"])])
def test_batch_norm_equals_the_plain_loop(words, optimizer):
    data = make_data(weights=True)
    build = partial(WithBatchNorm, **words)
    rates = ((1e-3, 16), (1e-2, 7), (3e-3, 500))
    configs = fill(*({"optimizer": optimizer, "lr": lr, "batch_size": b} for lr, b in rates))
    assert traits_of(build, configs[0], data).changing
    assert_module_equals_plain_loop(build, data, configs, epochs=6, within=1e-9)


def test_batch_norm_without_running_statistics_scores_all_rows_at_once():
    data, configs = make_data(), fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    build = partial(WithBatchNorm, track_running_stats=False)
    traits = traits_of(build, configs[0], data)
    assert not traits.alone and len(traits.changing) == 3
    assert_module_equals_plain_loop(build, data, configs, epochs=5, within=1e-9)


def test_a_last_minibatch_of_one_row_is_left_out_where_statistics_need_two():
    data = make_data(n=120)
    rows = torch.arange(120)
    folds = tuple(Fold(train=rows[:n], valid=rows[n : n + 9]) for n in (33, 40))
    data = dataclasses.replace(data, folds=folds, copies=(0, 1))
    (config,) = fill({"batch_size": 16})
    traits = traits_of(WithBatchNorm, config, data)
    assert traits.least_rows == 2
    network = StackedModule(WithBatchNorm, [config], shape_of(data), seed=0, traits=traits)
    trained = train(network, data, [config], seed=0, epochs=4, horizon=4)
    assert [trained.member(f, 0).enter[1].num_batches_tracked for f in (0, 1)] == [8, 12]
    alone = reference.train_module(
        partial(WithBatchNorm, n_features=5, n_outputs=3), *rows_of(data, 1)[:2], config, epochs=4
    )
    assert largest_difference(trained.member(1, 0), alone) <= 1e-9


def test_minibatches_of_one_row_are_refused_where_statistics_need_two():
    X, y = torch.randn(20, 3), torch.arange(20) % 2
    with pytest.raises(InputError, match="WithBatchNorm cannot train on a minibatch of one row.*batch_size=1 gives"):
        gputune.tune(WithBatchNorm, X, y, space={"batch_size": [1]}, n_trials=1, cv=2, max_epochs=1, verbose=0)


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
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(n_features))

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.layer(x - self.mean)


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
        (TooFew, r"must return a tensor of shape \(rows, 2\), got \(4, 3\)"),
        (NoOutputs, r"got \(4, 1\) for 4 rows; its last layer must have n_outputs outputs"),
        (Broken, "raised RuntimeError: no such size"),
        (WrongInput, r"forward of WrongInput \(submodule 'inner'\) raised RuntimeError"),
    ],
)
def test_what_no_loop_would_train_is_refused_by_name(module_class, message):
    (config,) = fill({})
    with pytest.raises(InputError, match=message):
        inspect_module(ModuleTrial(module_class, config, data_of(ROWS, 2)))


def test_an_unknown_module_argument_is_named():
    (config,) = fill({"module__size": 3})
    with pytest.raises(InputError, match="module__size is no argument of Residual"):
        inspect_module(ModuleTrial(Residual, config, data_of(ROWS, 2)))


def test_folds_of_very_unlike_length():
    data = make_data(n=120, folds=3)
    rows = torch.arange(120)
    folds = tuple(Fold(train=rows[:n], valid=rows[n : n + 20]) for n in (20, 55, 100))
    data = dataclasses.replace(data, folds=folds)
    configs = fill({"batch_size": 8, "lr": 0.01, "module__p": 0.2})
    assert_module_equals_plain_loop(Residual, data, configs, epochs=4)


class Mixing(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Frozen(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.requires_grad_(False)


class Averaged(nn.Linear):
    """Frozen weights follow trained ones, a layer is used in evaluation alone, a buffer is complex."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.slow = nn.Linear(n_features, n_outputs).requires_grad_(False)
        self.slow.load_state_dict({"weight": self.weight, "bias": self.bias})
        self.late = nn.Linear(n_outputs, n_outputs)
        self.register_buffer("turns", torch.polar(torch.ones(n_features), torch.arange(n_features).float()))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.slow.weight.mul_(0.9).add_(self.weight, alpha=0.1)
                self.slow.bias.mul_(0.9).add_(self.bias, alpha=0.1)
        x = super().forward((x * self.turns).imag) + self.slow(x)
        return x if self.training else self.late(x)


def test_frozen_weights_that_follow_unused_ones_and_complex_buffers_are_those_of_the_plain_loop():
    data, configs = make_data(), fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    traits = traits_of(Averaged, configs[0], data)
    assert traits.changing == ("slow.weight", "slow.bias") and traits.unused == ("late.weight", "late.bias")
    assert not traits.unstackable

    def plain(**sizes):  # the oracle's conversion leaves imaginary parts out
        module = Averaged(**sizes)
        turns, _ = module.turns, delattr(module, "turns")
        module.turns = turns.to(torch.complex128)
        return module

    network = StackedModule(Averaged, configs, shape_of(data), seed=0, traits=traits)
    together = train(network, data, configs, seed=0, epochs=3, horizon=3)
    for c, config in enumerate(configs):
        x, y, _ = rows_of(data, 1)
        sizes = {"n_features": data.n_features, "n_outputs": data.n_outputs}
        alone = reference.train_module(partial(plain, **sizes), x, y, config, epochs=3)
        for (name, found), expected in zip(together.member(1, c).named_parameters(), alone.parameters()):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_module_equals_the_plain_loop():
    def scripted(n_features, n_outputs):
        return torch.jit.script(nn.Sequential(nn.Linear(n_features, 4), nn.Tanh(), nn.Linear(4, n_outputs)))

    data, configs = make_data(), fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    assert not traits_of(scripted, configs[0], data).unstackable
    assert_module_equals_plain_loop(scripted, data, configs, epochs=2)


def test_rows_that_mix_equal_the_plain_loop():
    data, configs = make_data(), fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    assert not traits_of(Mixing, configs[0], data).alone
    assert_module_equals_plain_loop(Mixing, data, configs, epochs=3)


def test_a_buffer_that_counts_equals_the_plain_loop():
    data, configs = make_data(), fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    assert_module_equals_plain_loop(Counting, data, configs, epochs=3)


class Detached(Mixing):
    def forward(self, x):
        return nn.Linear.forward(self, x).detach()


@pytest.mark.parametrize(
    ("module_class", "message"), [(Frozen, "Frozen has nothing to train"), (Detached, "Detached has nothing to train")]
)
def test_what_cannot_be_trained_alone_is_refused(module_class, message):
    (config,) = fill({})
    with pytest.raises(InputError, match=message):
        inspect_module(ModuleTrial(module_class, config, data_of(ROWS, 2)))


class Reminding(nn.Module):
    """One layer under two names, an activation kept in ``self``, and a tensor that depends on a parameter."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter, self.inner = nn.Linear(n_features, 6), nn.Linear(6, 6)
        self.again, self.leave = self.inner, nn.Linear(6, n_outputs)
        self.twice, self.kept = 2 * self.enter.weight, {}

    def forward(self, x):
        self.hidden = self.kept["hidden"] = torch.tanh(self.inner(self.enter(x)))
        return self.leave(self.again(self.hidden))


class Lazy(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.body = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Dropout(0.2), nn.LazyLinear(n_outputs))

    def forward(self, x):
        return self.body(x)


def materialised(n_features, n_outputs):
    module = Lazy(n_features, n_outputs).eval()
    module(torch.zeros(1, n_features))
    return module


@pytest.mark.parametrize(("build", "plain"), [(Reminding, Reminding), (Lazy, materialised)])
def test_shared_and_lazy_submodules_equal_the_plain_loop(build, plain):
    data = make_data()
    configs = fill({"batch_size": 16}, {"batch_size": 16, "lr": 0.1})
    assert_module_equals_plain_loop(build, data, configs, epochs=3, plain=plain)
    inspect_module(ModuleTrial(build, configs[0], data_of(data.example(8)[0][0].float(), data.n_outputs)))


def test_a_lazy_module_draws_what_a_plain_one_draws():
    class Plain(Lazy):
        def __init__(self, n_features, n_outputs):
            super().__init__(n_features, n_outputs)
            self.body[0], self.body[3] = nn.Linear(n_features, 6), nn.Linear(6, n_outputs)

    lazy, plain = (build_module(kind, {}, Shape(3, 2), seed=1) for kind in (Lazy, Plain))
    assert largest_difference(lazy, plain) == 0 and lazy.training and type(lazy.body[0]) is nn.Linear


class Coded(nn.Module):
    """An embedding of the first column, and the logarithm of the others."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.code, self.last = nn.Embedding(5, 4), nn.Linear(3 + n_features, n_outputs)

    def forward(self, x):
        return self.last(torch.cat([self.code(x[:, 0].long()), x[:, 1:].log()], 1))


def test_a_module_is_tried_on_rows_of_the_data():
    (config,) = fill({})
    rows = torch.tensor([[0.0, 1, 2], [4, 1, 3], [2, 5, 1], [1, 1, 7]])
    assert inspect_module(ModuleTrial(Coded, config, data_of(rows, 2))).parameters == 5 * 4 + 2 * 6 + 2
    # NaN says nothing about stacking.
    inspect_module(ModuleTrial(Coded, config, data_of(rows - torch.tensor([0.0, 3, 0]), 2)))
    with pytest.raises(InputError, match=r"submodule 'code'\) raised IndexError: index out of range"):
        inspect_module(ModuleTrial(Coded, config, data_of(rows + 3, 2)))


def test_a_code_that_the_tried_rows_have_not_is_named():
    network = StackedModule(Coded, fill({}), Shape(2, 2), seed=0)
    params = network.blocks.views(network.start())
    assert network.outputs(params, 0, [torch.tensor([[4.0, 1.0]])]).shape == (1, 1, 2)
    with pytest.raises(InputError, match=r"Coded raised IndexError: index out of range.*a place for every code"):
        network.outputs(params, 0, [torch.tensor([[5.0, 1.0]])])


@pytest.mark.parametrize("module_class", [WrongInput, Broken, TooFew])
def test_what_became_of_the_columns_is_said_with_shapes(module_class):
    (config,) = fill({})
    with pytest.raises(InputError, match=r"\. Of the 4 columns$"):
        inspect_module(ModuleTrial(module_class, config, data_of(ROWS, 2), columns=" Of the 4 columns"))


def test_the_default_dtype_changes_no_start():
    expected = build_module(Residual, {}, Shape(3, 2), seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        found = build_module(Residual, {}, Shape(3, 2), seed=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert largest_difference(found, expected) == 0 and found.enter.weight.dtype == torch.float32


class Attention(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter, self.leave = nn.Linear(1, 4), nn.Linear(4, n_outputs)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        return self.leave(self.encoder(self.enter(x[..., None])).mean(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_has_a_derivative_in_evaluation_too():
    network = StackedModule(Attention, fill({}, {}), shape_of(make_data()), seed=0)
    first = network.blocks.views(network.start())
    params = {name: w[0].requires_grad_() for name, w in first.items()}
    x = make_data().x[0, :5]
    network.differentiable(params, [x.expand(2, *x.shape)], None).sum().backward()
    module = network.member(first, 0, 0).requires_grad_()
    module(x).sum().backward()
    for name, own in module.named_parameters():
        torch.testing.assert_close(params[name].grad[1], own.grad)


class Contended:
    """A lock that says when a thread must wait for it."""

    def __init__(self):
        self.lock, self.waited_for = threading.RLock(), threading.Event()

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
                other = threading.Thread(target=lambda: others.append(build(False)) or contended.waited_for.set())
                other.start()
                others.append(other)
                assert contended.waited_for.wait(60)
            super().__init__(n_features, n_outputs)

    def build(interrupt):
        return build_module(Interrupted, {"interrupt": interrupt}, Shape(3, 2), seed=1)

    before, expected, found = torch.get_rng_state(), build(False), build(True)
    others[0].join()
    assert largest_difference(found, expected) == largest_difference(others[1], expected) == 0
    assert torch.equal(torch.get_rng_state(), before)


class Normed(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(n_features, n_outputs))

    def forward(self, x):
        return self.last(x)


def test_nothing_is_said_of_operations_that_are_slow_stacked():
    X, y = np.random.default_rng(0).normal(size=(40, 3)).astype("float32"), np.arange(40) % 2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gputune.tune(Normed, X, y, n_trials=2, max_epochs=1, cv=2, verbose=0, backend="stacked")
    assert not [warning for warning in said if "performance drop" in str(warning.message)]
