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


def differentiate(C, classes=3, **options):
    batches, valid = rows(classes)
    module = LogisticRegression(2, classes)
    return gputune.hypergradient(
        module,
        cross_entropy,
        batches,
        valid,
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
    batches, valid = rows()
    one, other = (
        gputune.hypergradient(
            LogisticRegression(2, 3), loss, batches, valid, hyperparameters={"C": 1.0}, optimizer="exact"
        )
        for loss in (cross_entropy, nn.CrossEntropyLoss())
    )
    assert one.value == other.value


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
    arrays = [(x.numpy(), y.numpy()) for x, y in batches]
    for pairs, held in ((arrays, valid), (batches, (valid[0].numpy(), valid[1]))):
        with pytest.raises(
            InputError, match="needs tensors, got another kind of x or y; make them with torch.from_"
        ):
            gputune.hypergradient(
                LogisticRegression(2, 3),
                cross_entropy,
                pairs,
                held,
                hyperparameters={"C": 1.0},
                optimizer="exact",
            )


def test_what_is_not_that_convex_problem():
    batches, valid = rows()
    common = {"hyperparameters": {"C": 1.0}, "optimizer": "exact"}
    with pytest.raises(
        InputError, match=r"minimum of a convex problem: .* got MLP; train it with another optimizer"
    ):
        gputune.hypergradient(MLP(2, 3), cross_entropy, batches, valid, **common)
    with pytest.raises(InputError, match="loss must be torch.nn.functional.cross_entropy"):
        gputune.hypergradient(
            LogisticRegression(2, 3), nn.CrossEntropyLoss(label_smoothing=0.1), batches, valid, **common
        )
    with pytest.raises(InputError, match=r"y must be class codes 0 \.\. 1, one integer a row"):
        gputune.hypergradient(LogisticRegression(2, 2), cross_entropy, batches, valid, **common)
    with pytest.raises(InputError, match="y must be class codes"):
        gputune.hypergradient(
            LogisticRegression(2, 3), cross_entropy, [(x, y.double()) for x, y in batches], valid, **common
        )


def test_a_problem_without_a_minimum_within_reach():
    x = torch.as_tensor(np.linspace(-1, 1, 20))[:, None]
    with pytest.raises(DivergedError, match="no minimum that could be reached; choose a smaller C"):
        gputune.hypergradient(
            LogisticRegression(1, 2), cross_entropy, [(x, (x[:, 0] > 0).long())], (x, (x[:, 0] > 0).long()),
            hyperparameters={"C": 1e300}, optimizer="exact",
        )  # fmt: skip
