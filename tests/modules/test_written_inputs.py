"""A forward, loss, step, augmentation or score that writes into its arguments changes nothing
outside of its call.
"""

import functools
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import make_scorer
from sklearn.model_selection import ShuffleSplit
from torch import nn
from torch.nn import functional

import gputune
from face_modules import Scaled, ScaledInPlace
from gputune.engine import choice
from gputune.modules.inspection import traits_of
from gputune.modules.module import StackedModule
from gputune.sklearn import NeuralNetClassifier
from gputune.study.model import load_model
from problems import data_of, fill, shape_of, variant

pytestmark = pytest.mark.cpu

G = torch.Generator().manual_seed(0)
# no table: rows come to the module as they are
X = torch.randn(64, 1, 4, generator=G, dtype=torch.float64)
Y = (X[:, 0, 0] > 0).long() + (X[:, 0, 1] > 1)
SEARCH = {
    "cv": 2,
    "workers": 1,
    "verbose": 0,
    "dtype": "float64",
    "max_epochs": 3,
    "scoring": "neg_log_loss",
}


class Net(nn.Module):
    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.enter = nn.Linear(n_features, 5)
        self.leave = nn.Linear(5, n_outputs)

    def forward(self, x):
        return self.leave(torch.tanh(self.enter(x.flatten(1))))


def forward_of(change):
    """A module that changes its input first."""
    return variant(Net, lambda self, x: Net.forward(self, change(self, x)))


def halves(x):
    x.flatten()[::2] *= 2
    return x


def with_weight(module, x):
    x[:, 0, 0] = module.enter.weight[0, 0]
    return x


# What writes, and the same written out of place.
FORWARDS = {
    "scaled": (lambda m, x: x.mul_(1.5), lambda m, x: x * 1.5),
    # few numbers change
    "bounded": (lambda m, x: x.clamp_(-2.5, 2.5), lambda m, x: x.clamp(-2.5, 2.5)),
    "through a view": (lambda m, x: halves(x), lambda m, x: halves(x.clone())),
    "out=": (lambda m, x: torch.mul(x, 1.5, out=x), lambda m, x: x * 1.5),
    "by data": (lambda m, x: (x.data.mul_(1.5), x)[1], lambda m, x: x * 1.5),
    "by numpy": (
        lambda m, x: (np.multiply(x.numpy(), 1.5, out=x.numpy()), x)[1],
        lambda m, x: x * 1.5,
    ),
    "a layer in place": (lambda m, x: nn.ReLU(inplace=True)(x), lambda m, x: x.relu()),
    "dropout in place": (
        lambda m, x: functional.dropout(x, 0.3, m.training, inplace=True),
        lambda m, x: functional.dropout(x, 0.3, m.training),
    ),
    "a parameter": (with_weight, lambda m, x: with_weight(m, x.clone())),
    "in evaluation": (
        lambda m, x: x if m.training else x.mul_(1.5),
        lambda m, x: x if m.training else x * 1.5,
    ),
    "in training": (
        lambda m, x: x.mul_(1.5) if m.training else x,
        lambda m, x: x * 1.5 if m.training else x,
    ),
    "at some rows": (
        lambda m, x: x.mul_(3) if x.sum() > -5 else x,
        lambda m, x: x * 3 if x.sum() > -5 else x,
    ),
    "with draws": (
        lambda m, x: (
            x.mul_(1.5).add_(torch.rand(x.shape, dtype=x.dtype)) if m.training else x.mul_(1.5)
        ),
        lambda m, x: x * 1.5 + torch.rand(x.shape, dtype=x.dtype) if m.training else x * 1.5,
    ),
}


def step_that_writes(module, batch):
    x, y = batch
    return functional.cross_entropy(module(x.mul_(1.5)), y.clamp_(0, 1))


def step(module, batch):
    return functional.cross_entropy(module(batch[0] * 1.5), batch[1].clamp(0, 1))


def loss_that_writes(outputs, y):
    outputs.mul_(1)
    return functional.cross_entropy(outputs, y.clamp_(0, 1), reduction="none")


def loss(outputs, y):
    return functional.cross_entropy(outputs, y.clamp(0, 1), reduction="none")


def score_that_writes(outputs, y):
    score = -functional.cross_entropy(outputs, y)
    outputs.zero_()
    y.zero_()
    return score


def scorer_that_writes(y, guess):
    score = (y == guess).mean()
    y[:] = 0
    guess[:] = 0
    return score


OPTIONS = {
    "step": ({"training_step": step_that_writes}, {"training_step": step}),
    "loss": ({"loss": loss_that_writes}, {"loss": loss}),
    "loss as the score": (
        {"loss": loss_that_writes, "scoring": "neg_loss"},
        {"loss": loss, "scoring": "neg_loss"},
    ),
    "augment": ({"augment": lambda x, g: x.mul_(1.5)}, {"augment": lambda x, g: x * 1.5}),
    "score": (
        {"scoring": score_that_writes},
        {"scoring": lambda outputs, y: -functional.cross_entropy(outputs, y)},
    ),
    "scorer": ({"scoring": make_scorer(scorer_that_writes)}, {"scoring": "accuracy"}),
}
CASES = {
    **{name: [(forward_of(one), {}) for one in pair] for name, pair in FORWARDS.items()},
    **{name: [(Net, one) for one in pair] for name, pair in OPTIONS.items()},
}
CASES["scaled, and score"] = [
    (forward_of(change), options)
    for change, options in zip(FORWARDS["scaled"], OPTIONS["score"], strict=True)
]
SHORT = ("scaled, and score", "in evaluation", "at some rows")


def search(model, options, trials=2, rows=X, **more):
    space = {"lr": [1e-3, 1e-2][:trials], "batch_size": [16]}
    return gputune.tune(
        model, rows, Y, **{**SEARCH, "n_trials": trials, "space": space, **options, **more}
    )


@pytest.fixture
def all_tried(monkeypatch):
    """Plan as for a large search, which uses compiled code if it is available."""
    monkeypatch.setattr(choice, "WORTH_SECONDS", 0)
    monkeypatch.setattr(choice, "CODED_SHARE", -np.inf)
    monkeypatch.setattr(
        choice, "_seconds", lambda job, data, chunk, backend: 2.0 if backend == "loop" else 1.0
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in CASES]
)
def test_scores_are_those_of_what_writes_nothing(all_tried, name):
    (writes, options), (plain, others) = CASES[name]
    rows = X.clone()
    expected = search(plain, others, backend="loop").curves
    for backend in ("loop", "eager", "recorded", "auto"):
        for trials in (1, 2):  # of one member the rows are its own, of several they are shared
            found = search(writes, options, trials, rows, backend=backend).curves
            np.testing.assert_allclose(
                found, expected[:trials], rtol=0, atol=1e-10, err_msg=backend
            )
            assert torch.equal(rows, X)


# The trial calls of a module have at most 31 rows. These cases write into more rows only.
MANY = torch.randn(400, 5, generator=G, dtype=torch.float64)
CODES = (MANY[:, 0] + 0.3 * MANY[:, 1] > 0).long()


def in_place(x):
    return x.mul_(1.5)


def in_new_memory(x):
    return x * 1.5


def beyond(rows, change, training=None):
    """Return a change of an input that happens for more than some rows, in one mode or in both."""

    def changed(module, x):
        fits = training is None or module.training == training
        return change(x) if len(x) > rows and fits else x

    return changed


def of_a_medium_size(change):
    return lambda module, x: change(x) if 40 < len(x) < 100 else x


def with_dropout(change):
    def changed(module, x):
        return functional.dropout(change(x) if len(x) > 40 else x, 0.3, module.training)

    return changed


def emptied_late(write):
    """Return a change that empties the rows after they have been read."""

    def changed(module, x):
        if write and len(x) > 40:
            rows = x.clone()
            x.zero_()
            return rows
        return x

    return changed


def after_another_write(x):
    """Write the same into all members' rows, which PyTorch allows, and then scale them."""
    sums = x.sum(1, keepdim=True)
    x[:, 0] = 0.5
    return x.mul_(1.5) + sums


def after_another_change(x):
    fixed = torch.cat([torch.full_like(x[:, :1], 0.5), x[:, 1:]], 1)
    return fixed * 1.5 + x.sum(1, keepdim=True)


FORWARDS_ON_MANY_ROWS = {
    "both modes": (beyond(40, in_place), beyond(40, in_new_memory)),
    "training": (beyond(40, in_place, True), beyond(40, in_new_memory, True)),
    "evaluation": (beyond(40, in_place, False), beyond(40, in_new_memory, False)),
    "more than a minibatch": (beyond(100, in_place), beyond(100, in_new_memory)),
    "a medium size": (of_a_medium_size(in_place), of_a_medium_size(in_new_memory)),
    "with draws": (with_dropout(in_place), with_dropout(in_new_memory)),
    "in silence": (emptied_late(True), emptied_late(False)),
    "two writes": (beyond(40, after_another_write), beyond(40, after_another_change)),
}


def step_on_many_rows(change):
    def step(module, batch):
        x, y = batch
        return functional.cross_entropy(module(change(x) if len(x) > 40 else x), y)

    return step


def loss_on_many_rows(outputs, y):
    if len(y) > 40:
        outputs.mul_(1)
        y = y.clamp_(0, 0)
    return functional.cross_entropy(outputs, y, reduction="none")


def same_loss_on_many_rows(outputs, y):
    codes = y.clamp(0, 0) if len(y) > 40 else y
    return functional.cross_entropy(outputs, codes, reduction="none")


def score_on_many_rows(outputs, y):
    score = -functional.cross_entropy(outputs, y)
    if len(y) > 40:
        outputs.zero_()
        y.zero_()
    return score


def scorer_on_many_rows(y, guess):
    score = (y == guess).mean()
    if len(y) > 40:
        y[:] = 0
        guess[:] = 0
    return score


def augment_many_rows(change):
    return lambda x, generator: change(x) if len(x) > 40 else x


OPTIONS_ON_MANY_ROWS = {
    "step": [{"training_step": step_on_many_rows(f)} for f in (in_place, in_new_memory)],
    "loss": [{"loss": loss_on_many_rows}, {"loss": same_loss_on_many_rows}],
    "augment": [{"augment": augment_many_rows(f)} for f in (in_place, in_new_memory)],
    "score": [
        {"scoring": score_on_many_rows},
        {"scoring": lambda outputs, y: -functional.cross_entropy(outputs, y)},
    ],
    "scorer": [{"scoring": make_scorer(scorer_on_many_rows)}, {"scoring": "accuracy"}],
}
CASES_ON_MANY_ROWS = {
    **{name: [(forward_of(f), {}) for f in pair] for name, pair in FORWARDS_ON_MANY_ROWS.items()},
    **{name: [(Net, one) for one in pair] for name, pair in OPTIONS_ON_MANY_ROWS.items()},
}
SHORT_ON_MANY_ROWS = ("both modes", "in silence")


@functools.cache
def expected_of_three_trials(folds):
    """Return the curves of the plain module on many rows; the test that takes them has four cases."""
    return search_many_rows(Net, {}, 3, backend="loop", cv=cv_of(folds)).curves


def cv_of(folds):
    return 3 if folds == 3 else ShuffleSplit(1, test_size=0.3, random_state=0)


def search_many_rows(model, options, trials, **more):
    space = {"lr": [1e-3, 3e-3, 1e-2][:trials], "batch_size": [64]}
    given = {**SEARCH, "cv": 3, "n_trials": trials, "space": space, **options, **more}
    return gputune.tune(model, MANY.numpy(), CODES.numpy(), **given)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in SHORT_ON_MANY_ROWS else pytest.mark.long)
        for n in CASES_ON_MANY_ROWS
    ],
)
def test_writes_into_more_rows_than_were_tried_are_met(name):
    (writes, options), (plain, others) = CASES_ON_MANY_ROWS[name]
    expected = search_many_rows(plain, others, 3, backend="loop").curves
    backends = ("eager", "loop") if name in SHORT_ON_MANY_ROWS else ("loop", "eager", "recorded")
    for backend in backends:
        for trials in (1, 3):  # members that share their rows, and one that has them alone
            found = search_many_rows(writes, options, trials, backend=backend).curves
            np.testing.assert_allclose(
                found, expected[:trials], rtol=0, atol=1e-10, err_msg=f"{backend}, {trials}"
            )


@pytest.mark.long
@pytest.mark.parametrize("name", CASES_ON_MANY_ROWS)
def test_writes_into_more_rows_in_compiled_code_and_on_one_fold(all_tried, name):
    (writes, options), (plain, others) = CASES_ON_MANY_ROWS[name]
    for more in ({}, {"cv": ShuffleSplit(1, test_size=0.3, random_state=0)}):
        for trials in (1, 3):
            found = search_many_rows(writes, options, trials, **more).curves
            expected = search_many_rows(plain, others, trials, backend="loop", **more).curves
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


CALLS = []
"""The numbers of rows of calls with many rows."""


def writes_in_the_second_epoch(write):
    """Return a change that no earlier call with the same shapes has shown."""

    def changed(module, x):
        rows = x.clone()
        if len(x) > 40:
            CALLS.append(len(x))
            if len(CALLS) > 7:
                write(x)
        return rows

    return changed


@pytest.mark.parametrize("write", [torch.Tensor.zero_, lambda x: x.mul_(2)], ids=["set", "scaled"])
@pytest.mark.parametrize("folds", [1, 3])
def test_a_module_that_begins_to_write_in_the_middle_gets_copies(write, folds):
    expected = expected_of_three_trials(folds)
    writes = forward_of(writes_in_the_second_epoch(write))
    for trials in (1, 3):
        CALLS.clear()
        found = search_many_rows(writes, {}, trials, backend="eager", cv=cv_of(folds)).curves
        assert len(CALLS) > 7
        np.testing.assert_allclose(found, expected[:trials], rtol=0, atol=1e-10)


WRITES = ScaledInPlace
PLAIN = Scaled


def as_given(kind):
    """Rows as a user has them, in memory that torch shares, and a copy of them."""
    return (X.clone(), X.clone()) if kind == "tensor" else (X.numpy().copy(), X.numpy().copy())


@pytest.mark.parametrize("kind", [pytest.param("tensor", marks=pytest.mark.long), "array"])
def test_predictions_leave_the_rows_of_the_caller_as_they_are(kind):
    (rows, before), study, other = as_given(kind), search(WRITES, {}), search(PLAIN, {})
    model = study.best_model()
    expected = other.best_model().predict_proba(X)
    for _ in range(2):
        np.testing.assert_allclose(model.predict_proba(rows), expected, rtol=0, atol=1e-10)
    assert model.score(rows, Y) == other.best_model().score(X, Y)
    together = [one.ensemble(size=3).predict_proba(rows) for one in (study, other)]
    np.testing.assert_allclose(*together, rtol=0, atol=1e-10)
    assert np.array_equal(rows, before)


def emptied(module, x):
    outputs = Net.forward(module, x)
    if not module.training:
        x.zero_()
    return outputs


def test_which_rows_of_a_table_are_equal_is_known_before_the_forward():
    """Equal rows have equal predictions, and here the forward makes all rows equal."""
    rows = X[:, 0].float().numpy()
    options = {"dtype": "float32", "n_trials": 1, "columns": "keep"}
    with warnings.catch_warnings(action="ignore"):
        found = [
            gputune.tune(m, rows, Y.numpy(), **{**SEARCH, **options})
            for m in (variant(Net, emptied), Net)
        ]
    np.testing.assert_array_equal(*(study.best_model().predict_proba(rows) for study in found))


@pytest.mark.long
def test_an_exported_model_leaves_its_rows_as_they_are(tmp_path):
    study = search(WRITES, {})
    model = study.best_model()
    model.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    rows = X.clone()
    for _ in range(2):
        np.testing.assert_allclose(program(rows)[1], model.predict_proba(X), rtol=0, atol=1e-10)
    assert torch.equal(rows, X)


@pytest.mark.long
def test_members_in_other_processes_and_a_saved_model_too(tmp_path):
    found = search(WRITES, {}, workers=2, memory="1KB")
    expected = search(PLAIN, {}, backend="loop")
    np.testing.assert_allclose(found.curves, expected.curves, rtol=0, atol=1e-10)
    found.best_model().save(tmp_path / "model")
    probabilities = expected.best_model().predict_proba(X)
    rows = X.clone()
    loaded = load_model(tmp_path / "model").predict_proba(rows)
    np.testing.assert_allclose(loaded, probabilities, rtol=0, atol=1e-10)
    assert torch.equal(rows, X)


def test_the_estimators_leave_their_rows_as_they_are():
    rows = X.numpy().copy()
    before = X.numpy().copy()
    found = []
    for module in (WRITES, PLAIN):
        net = NeuralNetClassifier(module, max_epochs=3, random_state=0)
        found.append([net.fit(rows, Y.numpy()).predict_proba(rows) for _ in range(2)])
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-10)
    assert np.array_equal(rows, before)


def test_a_hypergradient_leaves_its_minibatches_as_they_are():
    def squares(outputs, y):
        y.mul_(2)
        return functional.mse_loss(outputs, y)

    found = []
    module = nn.Linear(4, 1).double()
    pairs = [
        (X[begin : begin + 8, 0].clone(), X[begin : begin + 8, 0, :1].clone())
        for begin in range(0, 32, 8)
    ]
    for changes, loss in (
        (nn.ReLU(inplace=True), squares),
        (nn.ReLU(), lambda outputs, y: functional.mse_loss(outputs, 2 * y)),
    ):
        given = [(x.clone(), y.clone()) for x, y in pairs]
        result = gputune.hypergradient(
            nn.Sequential(changes, module),
            loss,
            given[1:],
            given[0],
            hyperparameters={"lr": 0.1},
            optimizer="sgd",
            mode="reverse",
            seed=0,
        )
        found.append((result.value, float(result.gradient["lr"])))
        for one, other in zip(given, pairs):
            assert all(map(torch.equal, one, other))
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.mark.parametrize("name", FORWARDS)
def test_rows_are_copied_only_for_what_writes(name):
    """A module that cannot be stacked also gets copies, because it may write at some rows only."""
    data = data_of(X.repeat(2, 1, 1)[:100], 3)
    (config,) = fill({"lr": 0.01, "batch_size": 16})
    for writes, forward in zip((True, False), FORWARDS[name]):
        module = forward_of(forward)
        traits = traits_of(module, config, data)
        network = StackedModule(module, [config], shape_of(data), seed=0, traits=traits)
        assert traits.writes == writes
        assert network.objective.copies == (traits.writes or bool(traits.unstackable))
