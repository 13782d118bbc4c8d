"""The scores on the device equal scikit-learn's on the same outputs."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics

from gputune.engine import scores
from gputune.engine.scoring import make_scoring
from gputune.errors import InputError
from problems import make_data


def logits_and_labels(k, *, ties=False, rows=40):
    g = torch.Generator().manual_seed(k)
    logits = torch.randn(3, rows, k, generator=g, dtype=torch.float64)
    if ties:
        logits = (logits * 2).round() / 2
    return logits, torch.randint(k, (rows,), generator=g)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "size", [1, 300]
)  # 300 saturates the softmax, which then ties rows of unlike margins
def test_classification_scores_equal_scikit_learn(k, ties, size):
    logits, y = logits_and_labels(k, ties=ties)
    logits = logits * size
    p = logits.softmax(-1).numpy()
    for c in range(3):
        guess = logits[c].argmax(-1).numpy()
        expected = {
            "accuracy": metrics.accuracy_score(y, guess),
            "balanced_accuracy": metrics.balanced_accuracy_score(y, guess),
            "neg_log_loss": -metrics.log_loss(y, p[c]),
            "f1_macro": metrics.f1_score(y, guess, average="macro"),
        }
        if k > 2:
            expected["roc_auc_ovr"] = metrics.roc_auc_score(y, p[c], multi_class="ovr")
        for name, value in expected.items():
            assert scores.CLASSIFICATION[name](logits, y)[c].item() == pytest.approx(value, abs=1e-12), name
        if k == 2:
            auc = metrics.roc_auc_score(y, p[c, :, 1])
            assert scores.roc_auc(logits, y)[c].item() == pytest.approx(auc, abs=1e-12)


def test_classes_that_do_not_occur_are_treated_as_scikit_learn_does():
    logits, y = logits_and_labels(4)
    y = y.clamp_max(2)
    guess = logits[0].argmax(-1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes that y lacks
        assert scores.balanced_accuracy(logits, y)[0].item() == metrics.balanced_accuracy_score(y, guess)
    f1 = metrics.f1_score(y, guess, average="macro")
    assert scores.f1_macro(logits, y)[0].item() == pytest.approx(f1, abs=1e-12)
    assert scores.roc_auc_ovr(logits, y).isnan().all()


def test_log_loss_is_held_from_infinity():
    logits = torch.tensor([[[0.0, 1e4]]], dtype=torch.float64)
    expected = -metrics.log_loss([0], [[0.0, 1.0]], labels=[0, 1])
    assert scores.neg_log_loss(logits, torch.tensor([0])).item() == pytest.approx(expected)


def test_regression_scores_equal_scikit_learn():
    g = torch.Generator().manual_seed(0)
    outputs, y = torch.randn(3, 30, 1, generator=g).double(), torch.randn(30, generator=g).double()
    for c in range(3):
        guess = outputs[c, :, 0].numpy()
        expected = {
            "r2": metrics.r2_score(y, guess),
            "neg_mean_squared_error": -metrics.mean_squared_error(y, guess),
            "neg_root_mean_squared_error": -metrics.root_mean_squared_error(y, guess),
            "neg_mean_absolute_error": -metrics.mean_absolute_error(y, guess),
        }
        assert set(expected) == set(scores.REGRESSION)
        for name, value in expected.items():
            assert scores.REGRESSION[name](outputs, y)[c].item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("value", [0.1, 1.0, 3.3, 1e-200])  # the mean of three or seven times 0.1 is not 0.1
def test_r2_of_a_constant_target_and_of_one_row(value):
    y = torch.full((7,), value, dtype=torch.float64)
    outputs = torch.stack([y, y + 1])[..., None]
    assert scores.r2(outputs, y).tolist() == [1.0, 0.0]
    assert scores.r2(outputs[:, :1], y[:1]).isnan().all()


@pytest.mark.parametrize("name", ["roc_auc", "average_precision", "neg_log_loss"])
def test_scores_are_of_probabilities_in_double_precision_as_a_model_gives_them(name):
    data = make_data("binary")
    rows = data.folds[0].valid
    logits = 30 * torch.randn(1, len(rows), 2, generator=torch.Generator().manual_seed(0))
    p, y = logits[0].double().softmax(-1).numpy(), data.target[rows].numpy()
    expected = {
        "roc_auc": metrics.roc_auc_score(y, p[:, 1]),
        "average_precision": metrics.average_precision_score(y, p[:, 1]),
        "neg_log_loss": -metrics.log_loss(y, p),
    }[name]
    found = make_scoring(name, "binary", np.arange(2))(data, 0, logits)
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["roc_auc", "average_precision", "roc_auc_ovr"])
def test_equal_rows_tie_whatever_the_last_bits_of_their_outputs(name):
    data = make_data("multiclass" if name == "roc_auc_ovr" else "binary")
    rows = data.folds[0].valid
    x = data.x.clone()
    x[0, rows] = x[0, rows[torch.arange(len(rows)) % 5]]
    data = replace(data, x=x)
    outputs = torch.randn(2, 5, data.n_outputs, generator=torch.Generator().manual_seed(0)).double()
    outputs = outputs[:, torch.arange(len(rows)) % 5]
    noisy = outputs + 1e-15 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    scoring = make_scoring(name, data.task, np.arange(data.n_outputs))
    assert (noisy[:, 5:] != noisy[:, :-5]).any()
    assert scoring(data, 0, noisy).tolist() == scoring(data, 0, outputs).tolist()


@pytest.mark.parametrize("name", ["f1_weighted", "f1", "neg_brier_score", "average_precision"])
def test_any_scikit_learn_scorer_works_on_text_labels(name):
    data = make_data("binary")
    rows = data.folds[1].valid
    outputs = torch.randn(2, len(rows), 2, generator=torch.Generator().manual_seed(0)).double()
    found = make_scoring(name, "binary", np.array(["no", "yes"]))(data, 1, outputs)
    y, p, guess = data.target[rows].numpy(), outputs[0].softmax(-1).numpy(), outputs[0].argmax(-1).numpy()
    expected = {
        "f1_weighted": metrics.f1_score(y, guess, average="weighted"),
        "f1": metrics.f1_score(y, guess),
        "neg_brier_score": -metrics.brier_score_loss(y, p[:, 1]),
        "average_precision": metrics.average_precision_score(y, p[:, 1]),
    }[name]
    assert found[0].item() == pytest.approx(expected, abs=1e-12)


def test_a_scorer_that_does_not_fit_is_an_error_with_its_reason():
    data = make_data()
    outputs = torch.zeros(1, len(data.folds[0].valid), 3)
    with pytest.raises(InputError, match="scoring='f1' raised ValueError on fold 0: Target is multiclass"):
        make_scoring("f1", "multiclass", np.arange(3))(data, 0, outputs)


def test_a_regression_scorer_sees_original_units():
    data = make_data("regression")
    rows = data.folds[2].valid
    outputs = torch.randn(2, len(rows), 1, generator=torch.Generator().manual_seed(0)).double()
    guess = outputs[0, :, 0].numpy() * float(data.scale[2]) + float(data.center[2])
    for name in ("neg_median_absolute_error", "neg_root_mean_squared_error"):
        found = make_scoring(name, "regression", None)(data, 2, outputs)
        metric = {"neg_median_absolute_error": metrics.median_absolute_error}.get(
            name, metrics.root_mean_squared_error
        )
        assert found[0].item() == pytest.approx(-metric(data.target[rows].numpy(), guess))


def test_outputs_that_are_not_finite_score_nan():
    data = make_data()
    outputs = torch.zeros(2, len(data.folds[0].valid), 3)
    outputs[1, 0, 0] = torch.nan
    for name in ("accuracy", "neg_log_loss", "f1_weighted"):
        found = make_scoring(name, "multiclass", np.arange(3))(data, 0, outputs)
        assert found[0].isfinite() and found[1].isnan()


@pytest.mark.parametrize(
    ("scoring", "task", "message"),
    [
        ("acuracy", "binary", "got 'acuracy'. Did you mean 'accuracy'?"),
        ("r2", "binary", "scoring='r2' does not fit a binary task"),
        ("accuracy", "regression", "does not fit a regression task; choose for example r2"),
        ("roc_auc", "multiclass", "choose 'roc_auc_ovr'"),
        (3, "binary", r"scoring is a scikit-learn scorer name or a callable\(estimator, X, y\), got 3"),
    ],
)
def test_bad_scoring_is_named(scoring, task, message):
    with pytest.raises(InputError, match=message):
        make_scoring(scoring, task, np.array([0, 1]))


def test_the_default_scoring():
    assert make_scoring(None, "multiclass", np.arange(3)).name == "accuracy"
    assert make_scoring(None, "regression", None).name == "r2"
