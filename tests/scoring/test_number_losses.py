"""Losses of numbers by name: built-in models train on them in every backend as a plain loop
does."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_pinball_loss
from torch import nn
from torch.nn import functional

import gputune
import problems
import reference
from command_line import output, refusal, write_table
from gputune.engine.mlp import StackedMLP
from gputune.ground.errors import InputError
from gputune.scoring.losses import LOSSES, number_slope_, parse_loss
from problems import fill, largest_difference, make_data, shape_of

PLAIN = {
    ("mae", 0.0): lambda output, y: (output - y).abs(),
    ("huber", 0.3): lambda output, y: functional.huber_loss(output, y, reduction="none", delta=0.3),
    ("quantile", 0.9): lambda output, y: torch.where(
        y > output, 0.9 * (y - output), 0.1 * (output - y)
    ),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3))
Y = X @ [1.0, 2.0, 3.0] + RNG.exponential(2.0, 120)
HOW = {"n_trials": 2, "max_epochs": 3, "cv": 2, "verbose": 0}


@pytest.mark.parametrize("backend", ["eager", "recorded", "compiled"])
@pytest.mark.parametrize(("loss", "number"), PLAIN)
def test_members_equal_a_plain_loop(loss, number, backend, monkeypatch):
    data = make_data(n=60, task="regression", weights=True)
    configs = fill(
        {"width": 9, "batch_size": 16},
        {"width": 5, "batch_size": 16, "lr": 1e-2},
        optimizer="adamw",
    )
    network = StackedMLP("mlp", configs, shape_of(data), seed=0, loss=loss, loss_number=number)
    trained = problems.train(network, data, configs, seed=0, epochs=3, horizon=3, backend=backend)

    def minibatch_loss(output, y, weights):
        return (weights * PLAIN[loss, number](output.view(len(y)), y)).sum() / weights.sum()

    monkeypatch.setattr(reference, "minibatch_loss", minibatch_loss)
    for f in range(data.n_folds):
        x, y, weights = problems.rows_of(data, f)
        for c, config in enumerate(configs):
            plain = reference.train_mlp(x, y, config, n_outputs=1, epochs=3, weights=weights)
            assert largest_difference(trained.member(f, c), plain) < 1e-10


@pytest.mark.parametrize(("loss", "number"), PLAIN)
def test_the_slope_is_that_of_autograd_also_where_the_output_is_the_target(loss, number):
    outputs = torch.tensor([[-1.0], [0.0], [0.5]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    arguments = {
        name: torch.tensor([[number]], dtype=torch.float64) for name in LOSSES[loss].arguments
    }
    LOSSES[loss].rows(outputs[None], y[None], **arguments).sum().backward()
    slope = number_slope_(outputs.detach().clone(), y[:, None], 1.0, loss=loss, number=number)
    torch.testing.assert_close(slope, outputs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "name", "scoring"),
    [
        ("mse", "", "r2"),
        ("squared_error", "", "r2"),
        ("mae", "mae", "neg_mean_absolute_error"),
        ("absolute_error", "mae", "neg_mean_absolute_error"),
        ("huber", "huber", "neg_mean_absolute_error"),
        ("huber:0.5", "huber:0.5", "neg_mean_absolute_error"),
        ("quantile:0.9", "quantile:0.9", "neg_mean_pinball_loss"),
    ],
)
def test_the_default_score_follows_the_loss(loss, name, scoring):
    study = gputune.tune("mlp", X, Y, loss=loss, **{**HOW, "n_trials": 1, "max_epochs": 1})
    assert (study.record.objective, study.record.scoring) == (name, scoring)
    assert study.best_model().predict(X).shape == (120,)


@pytest.mark.parametrize(
    "loss",
    [
        *(pytest.param(loss, marks=pytest.mark.long) for loss in ("mae", "huber:0.5")),
        "quantile:0.9",
    ],
)
def test_realmlp_takes_them_too(loss):
    study = gputune.tune("realmlp", X, Y, loss=loss, **{**HOW, "n_trials": 1, "max_epochs": 1})
    assert study.record.objective == loss and np.isfinite(study.best_score)


def test_modules_on_absolute_errors_are_ranked_by_them_and_a_given_score_stays():
    once = {**HOW, "n_trials": 1, "max_epochs": 1}
    for loss in (nn.L1Loss, nn.HuberLoss(), "mae"):
        study = gputune.tune(gputune.models.MLP, X.astype("float32"), Y, loss=loss, **once)
        assert study.record.scoring == "neg_mean_absolute_error"
    assert gputune.tune("mlp", X, Y, loss="mae", scoring="r2", **once).record.scoring == "r2"


def test_the_pinball_score_is_scikit_learns():
    cv = [(np.arange(60), np.arange(60, 120))]
    study = gputune.tune("mlp", X, Y, loss="quantile:0.9", **{**HOW, "cv": cv, "n_trials": 1})
    predicted = study.oof_predictions()[60:]
    assert study.best_score == pytest.approx(
        -mean_pinball_loss(Y[60:], predicted, alpha=0.9), rel=1e-5
    )
    level = np.quantile(Y[:60], 0.9, method="averaged_inverted_cdf")
    expected = -mean_pinball_loss(Y[60:], np.full(60, level), alpha=0.9)
    baseline = study.record.baseline
    assert baseline == {
        "answer": "the 0.9 quantile of the training rows",
        "score": pytest.approx(expected),
    }


def test_quantiles_lie_where_they_should():
    y = RNG.exponential(2.0, 120)
    how = {**HOW, "n_trials": 1, "max_epochs": 40, "space": {"lr": [0.05]}, "optimizer": "adamw"}
    for level in (0.1, 0.9):
        study = gputune.tune("logistic", X, y, loss=f"quantile:{level}", epoch="last", **how)
        assert np.mean(y < study.best_model().predict(X)) == pytest.approx(level, abs=0.08)


def test_a_descent_differentiates_them():
    study = gputune.tune(
        "mlp",
        X,
        Y,
        loss="mae",
        method=gputune.Hypergradient(outer_steps=2),
        **{**HOW, "n_trials": 1},
    )
    assert np.isfinite(study.best_score) and len(study.trials) > 1


def test_words_that_name_no_loss_are_refused():
    assert parse_loss("quantile:0.9") == ("quantile", {"q": 0.9}) and parse_loss("l1") == (
        "mae",
        {},
    )
    for loss, message in {
        "quantile:1.5": r"q of 'quantile' must be a number in \(0, 1\), got '1.5'",
        "huber:x": "delta of 'huber' must be a number",
        "mae:2": "'mae' takes no number. Say loss='mae'",
        "median": "loss must be one of",
        nn.L1Loss: "loss must be 'mse', 'mae', 'huber' or 'quantile' for model='mlp'",
    }.items():
        with pytest.raises(InputError, match=message):
            gputune.tune("mlp", X, Y, loss=loss, **HOW)
    with pytest.raises(InputError, match="loss='mae' does not fit a binary target"):
        gputune.tune("mlp", X, Y > 0, loss="mae", **HOW)
    with pytest.raises(
        InputError, match="loss='bce' does not fit model='mlp'. Choose 'cross_entropy'"
    ):
        gputune.tune("mlp", X, Y > 0, loss="bce", **HOW)


def test_the_command_line_takes_them_and_scores_held_out_rows(tmp_path):
    table = write_table(tmp_path / "t.csv", 60, price=RNG.exponential(2.0, 60).round(4).tolist())
    call = [
        "tune",
        table,
        "--target",
        "price",
        "--trials",
        2,
        "--epochs",
        2,
        "--cv",
        2,
        "--workers",
        1,
    ]
    text = " ".join(output(*call, "--loss", "quantile:0.8", "--out", tmp_path / "o").split())
    assert (
        "Scores mean_pinball_loss" in text
        and "the 0.8 quantile of the training rows on the same folds" in text
    )
    assert "mean_pinball_loss" in output("evaluate", tmp_path / "o" / "model", table)
    output("resume", tmp_path / "o", "--trials", 3)
    assert "takes no number" in refusal(*call, "--loss", "mae:3", "--out", tmp_path / "p")
