"""The scores on the device equal scikit-learn's on the same outputs."""

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.metrics import get_scorer

from gputune.data.target_transform import FittedTransform
from gputune.scoring import scores
from gputune.scoring.estimators import fitted
from gputune.scoring.metrics import loss_scoring, make_scoring
from gputune.scoring.objective import make_objective
from problems import make_data, scoring_of
from refused import refused


def random_outputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def logits_and_labels(k, *, ties=False, rows=40):
    g = torch.Generator().manual_seed(k)
    logits = torch.randn(3, rows, k, generator=g, dtype=torch.float64)
    if ties:
        logits = (logits * 2).round() / 2
    return logits, torch.randint(k, (rows,), generator=g)


def assert_those_of_scikit_learn(task, outputs, y, classes=None):
    nothing = np.zeros((len(y), 1))
    for name, score in scores.OF_TASK[task].items():
        expected = [
            get_scorer(name)(fitted(one, classes, nothing, nothing), nothing, y.numpy())
            for one in outputs
        ]
        if name == "neg_log_loss":  # the scorer of two classes rounds 1 - p
            expected = [-metrics.log_loss(y, one.softmax(-1)) for one in outputs]
        np.testing.assert_allclose(
            score(outputs, y), expected, rtol=1e-12, atol=1e-12, err_msg=name
        )


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("ties", [False, True])
# 300 saturates the softmax, which then ties rows of unlike margins
@pytest.mark.parametrize("size", [1, 300])
def test_classification_scores_equal_scikit_learn(k, ties, size):
    logits, y = logits_and_labels(k, ties=ties)
    assert_those_of_scikit_learn(
        "binary" if k == 2 else "multiclass", logits * size, y, np.arange(k)
    )


def test_classes_that_do_not_occur_are_treated_as_scikit_learn_does():
    logits, y = logits_and_labels(4)
    y = y.clamp_max(2)
    guess = logits[0].argmax(-1).numpy()
    # scikit-learn warns of predicted classes that y lacks
    with warnings.catch_warnings(action="ignore"):
        assert scores.balanced_accuracy(logits, y)[0].item() == metrics.balanced_accuracy_score(
            y, guess
        )
    f1 = metrics.f1_score(y, guess, average="macro")
    assert scores.CLASSIFICATION["f1_macro"](logits, y)[0].item() == pytest.approx(f1, abs=1e-12)
    assert scores.roc_auc_ovr(logits, y).isnan().all()


def test_log_loss_is_held_from_infinity():
    logits = torch.tensor([[[0.0, 1e4]]], dtype=torch.float64)
    expected = -metrics.log_loss([0], [[0.0, 1.0]], labels=[0, 1])
    assert scores.neg_log_loss(logits, torch.tensor([0])).item() == pytest.approx(expected)


def test_regression_scores_equal_scikit_learn():
    outputs = random_outputs(3, 30, 1)
    y = random_outputs(30, seed=1)
    assert_those_of_scikit_learn("regression", outputs, y)


# the mean of three or seven times 0.1 is not 0.1
@pytest.mark.parametrize("value", [0.1, 1.0, 3.3, 1e-200])
def test_r2_of_a_constant_target_and_of_one_row(value):
    y = torch.full((7,), value, dtype=torch.float64)
    outputs = torch.stack([y, y + 1])[..., None]
    assert scores.r2(outputs, y).tolist() == [1.0, 0.0]
    assert scores.r2(outputs[:, :1], y[:1]).isnan().all()


@pytest.mark.parametrize("name", ["roc_auc", "average_precision", "roc_auc_ovr"])
def test_equal_rows_tie_whatever_the_last_bits_of_their_outputs(name):
    data = make_data("multiclass" if name == "roc_auc_ovr" else "binary")
    rows = data.folds[0].valid
    x = data.x.clone()
    x[0, rows] = x[0, rows[torch.arange(len(rows)) % 5]]
    data = replace(data, inputs=(x,))
    outputs = random_outputs(2, 5, data.n_outputs)[:, torch.arange(len(rows)) % 5]
    noisy = outputs + 1e-15 * random_outputs(*outputs.shape, seed=1)
    scoring = scoring_of(data, name)
    assert (noisy[:, 5:] != noisy[:, :-5]).any()
    assert scoring(data, 0, noisy).tolist() == scoring(data, 0, outputs).tolist()


NAMED = np.array(["no", "yes"])


ratios = metrics.class_likelihood_ratios
OF_A_CLASS = {
    "f1": lambda y, guess, p, label: metrics.f1_score(y, guess, pos_label=label),
    "precision": lambda y, guess, p, label: metrics.precision_score(y, guess, pos_label=label),
    "recall": lambda y, guess, p, label: metrics.recall_score(y, guess, pos_label=label),
    "jaccard": lambda y, guess, p, label: metrics.jaccard_score(y, guess, pos_label=label),
    "average_precision": lambda y, guess, p, label: metrics.average_precision_score(
        y, p[:, 1], pos_label=label
    ),
    "positive_likelihood_ratio": lambda y, guess, p, label: ratios(y == label, guess == label)[0],
    "neg_negative_likelihood_ratio": lambda y, guess, p, label: (
        -ratios(y == label, guess == label)[1]
    ),
}
OF_NO_CLASS = {
    "f1_weighted": lambda y, guess, p, label: metrics.f1_score(y, guess, average="weighted"),
    "neg_brier_score": lambda y, guess, p, label: (
        -metrics.brier_score_loss(y, p[:, 1], pos_label=label)
    ),
    "matthews_corrcoef": lambda y, guess, p, label: metrics.matthews_corrcoef(y, guess),
    "roc_auc": lambda y, guess, p, label: metrics.roc_auc_score(y == label, p[:, 1]),
    "neg_log_loss": lambda y, guess, p, label: -metrics.log_loss(y == label, p),
}


@pytest.mark.parametrize(
    ("name", "code"),
    [*[(n, code) for n in OF_A_CLASS for code in (0, 1)], *[(n, None) for n in OF_NO_CLASS]],
)
@pytest.mark.parametrize("size", [1, 30])
def test_a_score_on_text_labels_is_of_the_class_that_was_asked_for_and_of_probabilities_in_double(
    name, code, size
):
    data = make_data("binary")
    rows = data.folds[1].valid
    label = 1 if code is None else code
    outputs = size * random_outputs(2, len(rows), 2).float()
    scoring = make_scoring(name, "binary", NAMED, None if code is None else NAMED[code])
    assert scoring.positive == code
    y = NAMED[data.target[rows].numpy()]
    guess = NAMED[outputs[0].argmax(-1).numpy()]
    p = outputs[0].double().softmax(-1)[:, [1 - label, label]].numpy()
    expected = (OF_A_CLASS | OF_NO_CLASS)[name](y, guess, p, NAMED[label])
    assert scoring(data, 1, outputs)[0].item() == pytest.approx(expected, abs=1e-12)
    if code is not None:
        with refused(rf"scoring='{name}' is a score of one class.*positive='no' or positive='yes'"):
            make_scoring(name, "binary", NAMED)


def test_these_are_all_scores_of_one_class_that_scikit_learn_has():
    table = {*scores.CLASSIFICATION, *scores.REGRESSION, "roc_auc"}  # none of these is
    others = {
        n: make_scoring(n, "binary", np.arange(2)) for n in {*metrics.get_scorer_names()} - table
    }
    assert {name for name, one in others.items() if one.positive is not None} == set(OF_A_CLASS)


def test_the_larger_of_two_usual_classes_is_positive_and_another_may_be_given_as_text():
    for classes in ([0, 1], [-1, 1], [False, True], [0.0, 1.0]):
        assert make_scoring("f1", "binary", np.array(classes)).positive == 1
        assert make_scoring("f1", "binary", np.array(classes), classes[0]).positive == 0
    for classes, text in (
        ([0, 1], "0"),
        ([False, True], "false"),
        ([2.0, 1.0], "2"),
        ([2.5, 1.5], "2.5"),
    ):
        assert make_scoring("recall", "binary", np.array(classes), text).positive == 0


METRICS = [
    (metrics.mean_squared_error, "'neg_mean_squared_error'"),
    (metrics.r2_score, "'r2'"),
    (metrics.f1_score, "'f1'"),
    (metrics.accuracy_score, "'accuracy'"),
    (metrics.fbeta_score, r"sklearn.metrics.make_scorer\(fbeta_score, "),
    (partial(metrics.f1_score, average="macro"), r"sklearn.metrics.make_scorer\(f1_score, "),
]


@pytest.mark.parametrize(
    ("scoring", "classes", "positive", "message"),
    [
        ("acuracy", NAMED, None, "got 'acuracy'. Did you mean 'accuracy'?"),
        (
            "r2",
            NAMED,
            None,
            "scoring='r2' does not fit a binary task. .* neg_log_loss, roc_auc, f1",
        ),
        ("accuracy", None, None, "does not fit a regression task. Choose for example r2"),
        *[
            ("f1", classes, None, "scoring='f1' does not fit a .* task. Choose for ex")
            for classes in (None, [*"abc"])
        ],
        ("roc_auc", [*"abc"], None, "Choose 'roc_auc_ovr'"),
        (
            3,
            NAMED,
            None,
            r"callable\(estimator, X, y\) or \(outputs, y\), or a list or dict of these, got 3",
        ),
        *[
            (metric, NAMED, None, rf"y_pred\), not a scorer. Give scoring={words}")
            for metric, words in METRICS
        ],
        ("f1", [1, 2], None, r"Choose the positive class: positive=1 or positive=2"),
        ("f1", ["0", "1"], None, "positive='0' or positive='1'"),
        (
            "f1",
            NAMED,
            "Yes",
            r"positive must be one of the classes 'no' and 'yes', got 'Yes'. Did you mean 'yes'\?",
        ),
        ("f1", ["0", "1"], 1, "one of the classes '0' and '1', got 1"),
        ("f1", [0, 1], [0, 1], r"got \[0, 1\]"),
        (
            "f1_macro",
            [*"abc"],
            "a",
            r"positive='a' needs a target of two classes, got a multiclass",
        ),
        ("r2", None, 1, "positive=1 .* got a regression task. Leave it out"),
        ("accuracy", NAMED, "no", "scoring='accuracy' has no positive class. Leave it out"),
        ("f1_macro", NAMED, "no", "scoring='f1_macro' has no positive class"),
        (
            "roc_auc",
            NAMED,
            "no",
            "scoring='roc_auc' has no positive class, because the score is the same for both classes. Leave",
        ),
        ("neg_brier_score", NAMED, "no", "scoring='neg_brier_score' has no positive class"),
        (None, NAMED, "no", "scoring='accuracy' has no positive class"),
        (
            metrics.make_scorer(metrics.f1_score),
            NAMED,
            "no",
            "has no positive class. Leave it out",
        ),
    ],
)
def test_bad_scoring_or_a_bad_positive_class_is_named(scoring, classes, positive, message):
    task = "regression" if classes is None else "binary" if len(classes) == 2 else "multiclass"
    with refused(message):
        make_scoring(scoring, task, None if classes is None else np.array(classes), positive)


def test_a_loss_is_of_the_target_that_a_fold_trains_on():
    data = make_data("regression")
    mse = make_objective("mse", None, None, "regression")
    scoring = make_scoring("neg_loss", "regression", None, objective=mse)
    for f, fold in enumerate(data.folds):
        outputs = random_outputs(2, len(fold.valid), 1)
        expected = -(outputs[..., 0] - data.y[f, fold.valid]).square().mean(1)
        torch.testing.assert_close(scoring(data, f, outputs), expected)


def test_a_loss_is_of_no_class():
    for task, classes, message in (
        ("binary", NAMED, "has no positive class"),
        ("regression", None, "got a regr"),
    ):
        with refused(message):
            loss_scoring(task, classes, "no")


def test_a_scorer_that_does_not_fit_is_an_error_with_its_reason():
    data = make_data()
    outputs = torch.zeros(1, len(data.folds[0].valid), 3)
    numbers = make_data("regression")
    name = "neg_mean_squared_log_error"
    with refused(f"scoring='{name}' raised ValueError on fold 0: .*fits the task"):
        scoring_of(numbers, name)(numbers, 0, outputs[..., :1])
    own = make_scoring(lambda estimator, X, y: y["nope"], "multiclass", np.arange(3))
    with refused("raised IndexError on fold 0: .* calls scorer.estimator, X, y., with X in"):
        own(data, 0, outputs)


def test_a_regression_scorer_sees_original_units():
    data = make_data("regression", folds=3)
    rows = data.folds[2].valid
    outputs = random_outputs(2, len(rows), 1)
    guess = outputs[0, :, 0].numpy() * float(data.scale[2]) + float(data.center[2])
    for name in ("median_absolute_error", "root_mean_squared_error"):
        found = scoring_of(data, f"neg_{name}")(data, 2, outputs)
        assert found[0].item() == pytest.approx(
            -getattr(metrics, name)(data.target[rows].numpy(), guess)
        )


def test_outputs_that_are_not_finite_score_nan():
    data = make_data()
    outputs = torch.zeros(2, len(data.folds[0].valid), 3)
    outputs[1, 0, 0] = torch.nan
    for name in ("accuracy", "neg_log_loss", "f1_weighted"):
        found = scoring_of(data, name)(data, 0, outputs)
        assert found[0].isfinite() and found[1].isnan()
    # exp(1000) overflows
    data = replace(make_data("regression"), transforms=(FittedTransform("log"),) * 2)
    outputs = (
        torch.tensor([0.0, 1000]).double()[:, None, None].expand(2, len(data.folds[0].valid), 1)
    )
    for name in ("r2", "explained_variance"):
        found = scoring_of(data, name)(data, 0, outputs)
        assert found[0].isfinite() and found[1].isnan()
