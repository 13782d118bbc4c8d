"""Losses, training steps and augmentation: against PyTorch's own, and each refusal by name;
temperature scaling."""

import numpy as np
import pytest
import sklearn
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.fixes import parse_version
from torch import nn
from torch.nn import functional

from gputune.scoring.losses import best_temperature
from gputune.scoring.objective import Objective, make_objective
from refused import refused

G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 3, 7, 4, generator=G).double()
CODES = torch.randint(4, (2, 3, 7), generator=G)
VALUES = torch.randn(2, 3, 7, 2, generator=G).double()
Y = torch.randn(2, 1, 7, 2, generator=G).double()
LABELS = (Y > 0).double()


def rows_of(name, outputs, y, configs=({}, {}, {}), task="regression"):
    objective = make_objective(name, None, None, task)
    return objective.rows(outputs, y, objective.values(configs, outputs))


def expected(function, outputs, y, **options):
    """Return PyTorch's own loss of each row, (2, 3, 7)."""
    y = y.expand(2, 3, *y.shape[2:])
    rows = zip(outputs.flatten(0, 2).split(1), y.flatten(0, 2).split(1))
    return torch.stack([function(output, of_row, **options) for output, of_row in rows]).view(
        2, 3, 7
    )


@pytest.mark.parametrize(
    ("name", "function", "y", "config", "options"),
    [
        ("mse", functional.mse_loss, Y, {}, {}),
        ("mae", functional.l1_loss, Y, {}, {}),
        ("huber", functional.huber_loss, Y, {}, {}),
        ("huber", functional.huber_loss, Y, {"loss__delta": 0.3}, {"delta": 0.3}),
        ("bce", functional.binary_cross_entropy_with_logits, LABELS, {}, {}),
    ],
)
def test_named_losses_are_those_of_torch(name, function, y, config, options):
    task = "multilabel" if name == "bce" else "regression"
    found = rows_of(name, VALUES, y, [config] * 3, task)
    torch.testing.assert_close(found, expected(function, VALUES, y, **options))


def test_each_member_has_its_own_smoothing_which_leaves_out_absent_classes():
    smoothing = [0.0, 0.1, 0.4]
    found = rows_of(
        "cross_entropy",
        LOGITS,
        CODES,
        [{"loss__label_smoothing": s} for s in smoothing],
        "multiclass",
    )
    for c, value in enumerate(smoothing):
        one = expected(functional.cross_entropy, LOGITS, CODES, label_smoothing=value)
        torch.testing.assert_close(found[:, c], one[:, c])
    logits = LOGITS.clone()
    logits[..., 3] = -torch.inf
    codes = CODES.clamp_max(2)
    found = rows_of(
        "cross_entropy", logits, codes, [{"loss__label_smoothing": 0.2}] * 3, "multiclass"
    )
    three = rows_of(
        "cross_entropy", LOGITS[..., :3], codes, [{"loss__label_smoothing": 0.2}] * 3, "multiclass"
    )
    torch.testing.assert_close(found, three)


def test_quantiles_are_met_by_their_loss():
    y = torch.randn(2000, generator=G).double()
    at = torch.linspace(-2, 2, 401).double()
    loss = rows_of(
        "quantile",
        at[None, :, None, None].expand(1, 401, 2000, 1),
        y[None, None],
        [{"loss__q": 0.9}] * 401,
    )
    assert float(at[loss.mean(-1).argmin()]) == pytest.approx(float(y.quantile(0.9)), abs=0.02)


def test_a_loss_of_torch_gives_row_losses():
    objective = make_objective(nn.SmoothL1Loss, None, None, "regression")
    loss = objective.member_loss({"loss__beta": 0.5})
    found = loss(VALUES[0, 0], Y[0, 0])
    assert found.shape == (7,)
    torch.testing.assert_close(
        found.mean(), functional.smooth_l1_loss(VALUES[0, 0], Y[0, 0], beta=0.5)
    )


def test_a_step_sees_the_module_and_the_batch():
    objective = make_objective(
        None, lambda module, batch: module(batch[0]["a"]) * batch[1], None, "custom"
    )
    losses = objective.losses(
        nn.Identity(), [torch.tensor([2.0])], torch.tensor([3.0]), {}, names=("a",)
    )
    assert losses.tolist() == [6.0]


def test_augmentation_draws_the_same_for_each_fold():
    objective = Objective(
        "mse", augment=lambda x, generator: x + torch.rand(x.shape, generator=generator)
    )
    x = torch.zeros(2, 3, 4)
    (first,) = objective.augmented([x], None, 0, (0, 0))
    (again,), (later,) = (
        objective.augmented([x], None, 0, (0, 0)),
        objective.augmented([x], None, 0, (0, 1)),
    )
    assert (
        torch.equal(first[0], first[1])
        and torch.equal(first, again)
        and not torch.equal(first, later)
    )
    learned = nn.Parameter(torch.tensor(2.0))  # by which a minibatch may be changed where it lies
    (found,) = Objective("mse", augment=lambda x, generator: x.mul_(learned)).augmented(
        [x + 1], None, 0, (0, 0)
    )
    assert found.requires_grad and torch.equal(found, x + 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, None, None, "regression"), "loss must be one of 'cross_entropy', .* got 3"),
        (("mze", None, None, "regression"), "loss must be one of .* got 'mze'"),
        (
            ("mse", None, None, "binary"),
            "loss='mse' does not fit a binary target. Choose 'cross_entropy'",
        ),
        (("mse", None, None, "custom"), "does not fit a custom target. Choose your own loss"),
        ((None, None, None, "custom"), "A custom target has no default loss"),
        (("mse", print, None, "regression"), "training_step returns the loss itself"),
        (
            (nn.MSELoss(), None, None, "multiclass"),
            "MSELoss is a loss for numbers.*task='regression'.*loss='cross_entropy'",
        ),
        (
            (nn.L1Loss, None, None, "binary"),
            "L1Loss is a loss for numbers, .* loss='cross_entropy' or 'bce'",
        ),
        ((None, 3, None, "regression"), "training_step must be a function, got 3"),
        ((None, None, "flip", "regression"), "augment must be a function, got 'flip'"),
    ],
)
def test_what_is_no_objective_is_refused(arguments, message):
    with refused(message):
        make_objective(*arguments)


@pytest.mark.parametrize(
    ("loss", "step", "config", "message"),
    [
        ("huber", None, {"loss__delta": 0}, r"loss__delta must be a number in \(0, inf\), got 0"),
        (
            "huber",
            None,
            {"loss__q": 0.5},
            "loss__q is not an argument of loss='huber', which takes delta",
        ),
        (
            "mse",
            None,
            {"loss__q": 0.5},
            "loss__q is not an argument of loss='mse', which takes no numbers",
        ),
        (
            nn.HuberLoss,
            None,
            {"loss__q": 0.5},
            r"loss__q is not an argument of the loss torch.nn.*HuberLoss\(",
        ),
        (
            nn.HuberLoss(),
            None,
            {"loss__delta": 0.5},
            "delta has no effect, .* Pass loss=HuberLoss",
        ),
        (
            lambda outputs, y: outputs,
            None,
            {"loss__q": 0.5},
            "loss__q is not an argument of the loss",
        ),
        (None, print, {"loss__q": 0.5}, "loss__q has no effect, because training_step"),
    ],
)
def test_numbers_that_a_loss_does_not_take_are_refused(loss, step, config, message):
    with refused(message):
        make_objective(loss, step, None, "regression").check(config)


@pytest.mark.parametrize(
    ("change", "found"), [(lambda x: x[:, :2], r"\(3, 2\)"), (print, "'NoneType'")]
)
def test_augmentation_of_another_shape_is_refused(change, found):
    with refused(
        rf"augment must return inputs of the same shapes as it receives, \[\(3, 4\)\], got \[{found}\]"
    ):
        Objective("mse", augment=lambda x, generator: change(x)).augmented(
            [torch.zeros(2, 3, 4)], None, 0, (0, 0)
        )


def test_augmentation_returns_inputs_by_name_in_any_order():
    def augment(x, generator):
        return {"b": x["b"] + 1, "a": x["a"]}

    inputs = [torch.zeros(2, 3), torch.zeros(2, 4)]
    a, b = Objective("mse", augment=augment).augmented(inputs, ("a", "b"), 0, (0, 0))
    assert a.shape == (2, 3) and (b == 1).all() and b.shape == (2, 4)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_no_temperature_of_a_grid_has_a_smaller_loss(classes, factor):
    logits = torch.tensor(RNG.normal(size=(400, classes)))
    target = torch.tensor([RNG.choice(classes, p=p) for p in logits.softmax(1).numpy()])
    found = best_temperature(factor * logits, target)
    grid = factor * torch.logspace(-1, 1, 400).double()
    losses = [
        float(functional.cross_entropy(factor * logits / t, target))
        for t in (found, *grid.tolist())
    ]
    assert losses[0] <= min(losses[1:]) + 1e-12 and 0.6 < found / factor < 1.6


@pytest.mark.skipif(
    parse_version(sklearn.__version__) < parse_version("1.8"), reason="scikit-learn has none"
)
def test_it_is_that_of_scikit_learn():
    y = RNG.integers(0, 3, 300)
    X = np.eye(3)[y] + RNG.normal(size=(300, 3))
    model = LogisticRegression(C=1e3).fit(X[:60], y[:60])
    theirs = CalibratedClassifierCV(
        FrozenEstimator(model), method="temperature", cv=2, ensemble=False
    ).fit(X, y)
    logits = torch.tensor(model.decision_function(X))
    found = best_temperature(logits, torch.tensor(y))
    np.testing.assert_allclose((logits / found).softmax(1), theirs.predict_proba(X), atol=1e-5)
    # Where every row is right the loss would fall for ever.
    assert best_temperature(torch.eye(3).double(), torch.arange(3)) == 1
