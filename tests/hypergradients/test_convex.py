"""hypergradient() at the minimum of the logistic regression."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression as Sklearn
from sklearn.metrics import log_loss
from torch import nn
from torch.nn.functional import cross_entropy

import gputune
from gputune.errors import DivergedError, InputError
from gputune.models import MLP, LogisticRegression


def rows(classes=3):
    X, y = load_iris(return_X_y=True)
    X, y = X[y < classes], y[y < classes]
    X = torch.as_tensor(X[:, :2] - X[:, :2].mean(0))
    y = torch.as_tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = [(X[i], y[i]) for i in order.split(20)]
    return parts[:-2], (torch.cat([x for x, _ in parts[-2:]]), torch.cat([y for _, y in parts[-2:]]))


def differentiate(C=1.0, classes=3, *, module=None, loss=cross_entropy, batches=None, valid=None, **options):
    given = rows(classes)
    return gputune.hypergradient(
        LogisticRegression(2, classes) if module is None else module,
        loss,
        given[0] if batches is None else batches,
        given[1] if valid is None else valid,
        **{"hyperparameters": {"C": C}, "optimizer": "exact", **options},
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("C", [0.03, 1.0, 30.0])
def test_the_derivative_equals_differences_of_scikit_learns_solutions(C, classes):
    batches, valid = rows(classes)
    X, y = (torch.cat(part).numpy() for part in zip(*batches))

    def loss(C):
        model = Sklearn(C=C, tol=1e-10, max_iter=1000, solver="newton-cholesky").fit(X, y)
        return log_loss(valid[1], model.predict_proba(valid[0].numpy()), labels=range(classes))

    found, h = differentiate(C, classes), 1e-3
    slope = (loss(C * math.exp(h)) - loss(C * math.exp(-h))) / (2 * h)
    assert found.value == pytest.approx(loss(C), rel=1e-6)
    assert float(found.log_gradient["C"]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert float(found.gradient["C"]) * C == pytest.approx(float(found.log_gradient["C"]))
    assert found.mode == "implicit"


def test_the_parameters_are_those_of_the_minimum():
    found, (batches, valid) = differentiate(1.0), rows()
    module = LogisticRegression(2, 3).double()
    module.load_state_dict(found.parameters)
    assert cross_entropy(module(valid[0]), valid[1]).item() == pytest.approx(found.value, rel=1e-12)
    total = sum(cross_entropy(module(x), y, reduction="sum") for x, y in batches)
    objective = total + (module.layers[0].weight ** 2).sum() / 2
    slopes = torch.autograd.grad(objective, list(module.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6


def test_the_loss_may_be_a_module():
    assert differentiate().value == differentiate(loss=nn.CrossEntropyLoss()).value


@pytest.mark.parametrize("C", [0, -1.0, math.inf, math.nan, [1.0, 2.0], "much"])
def test_a_c_that_is_no_positive_number(C):
    with pytest.raises(InputError, match=r"hyperparameters\['C'\] must be one finite number > 0, got "):
        differentiate(C)


@pytest.mark.parametrize("hyperparameters", [{"lr": 0.1}, {"C": 1.0, "lr": 0.1}, {}])
def test_another_hyperparameter(hyperparameters):
    with pytest.raises(InputError, match="optimizer='exact' has C alone, got"):
        differentiate(1.0, hyperparameters=hyperparameters)


def test_minibatches_that_are_no_tensors():
    batches, valid = rows()
    for arrays in (
        {"batches": [(x.numpy(), y.numpy()) for x, y in batches]},
        {"valid": (valid[0].numpy(), valid[1])},
    ):
        with pytest.raises(
            InputError, match="needs tensors, got another kind of x or y; make them with torch.from_"
        ):
            differentiate(**arrays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": MLP(2, 3)}, r"minimum of a convex problem: .* got MLP; train it with another optimizer"),
        (
            {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
            "loss must be torch.nn.functional.cross_entropy",
        ),
        ({"module": LogisticRegression(2, 2)}, r"y must be class codes 0 \.\. 1, one integer a row"),
        ({"batches": [(x, y.double()) for x, y in rows()[0]]}, "y must be class codes"),
    ],
)
def test_what_is_not_that_convex_problem(options, message):
    with pytest.raises(InputError, match=message):
        differentiate(**options)


def test_a_problem_without_a_minimum_within_reach():
    x = torch.as_tensor(np.linspace(-1, 1, 20))[:, None]
    pair = (x, (x[:, 0] > 0).long())
    with pytest.raises(DivergedError, match="no minimum that could be reached; choose a smaller C"):
        differentiate(1e300, module=LogisticRegression(1, 2), batches=[pair], valid=pair)
