"""A prediction without a model is scored like scikit-learn's dummies, and a high accuracy of it is
reported.
"""

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import (
    d2_pinball_score,
    fbeta_score,
    get_scorer,
    make_scorer,
    mean_pinball_loss,
    mean_tweedie_deviance,
)
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score

import gputune
from gputune.scoring.baseline import _constants, best_constant
from gputune.scoring.metrics import make_scoring

HOW = {"n_trials": 1, "max_epochs": 1, "verbose": 0}
MOST = DummyClassifier(strategy="most_frequent")
PRIOR = DummyClassifier(strategy="prior")


@pytest.mark.parametrize(
    ("load", "scoring", "dummy", "answer"),
    [
        (load_breast_cancer, None, MOST, "always 1"),
        (load_breast_cancer, "roc_auc", PRIOR, "the share of each class in the training rows"),
        (load_iris, "neg_log_loss", PRIOR, "the share of each class in the training rows"),
        (load_breast_cancer, "f1", DummyClassifier(strategy="constant", constant=1), "always 1"),
        (
            load_breast_cancer,
            "average_precision",
            PRIOR,
            "the share of each class in the training rows",
        ),
        (load_iris, "f1_macro", MOST, "the share of each class in the training rows"),
        (load_diabetes, None, DummyRegressor(), "the mean of the training rows"),
        (
            load_diabetes,
            "neg_mean_absolute_error",
            DummyRegressor(strategy="median"),
            "the median of the training rows",
        ),
    ],
)
def test_it_is_what_a_dummy_scores(load, scoring, dummy, answer):
    X, y = load(return_X_y=True)
    folds = KFold if load is load_diabetes else StratifiedKFold
    cv = list(folds(3, shuffle=True, random_state=0).split(X, y))
    study = gputune.tune("mlp", X, y, cv=cv, scoring=scoring, **HOW)
    expected = cross_val_score(dummy, X, y, cv=cv, scoring=scoring).mean()
    assert study.record.baseline == {"answer": answer, "score": pytest.approx(expected, rel=1e-12)}


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((50, 50), None),
        ((99, 1), "always 'a' has an accuracy of 0.9900 already: balanced_accuracy, roc_auc"),
        (
            (80, 10, 10),
            "'a' has an accuracy of 0.8000 already: balanced_accuracy, f1_macro, roc_auc_ovr or "
            "neg_log",
        ),
        ((40, 30, 30), None),
    ],
)
@pytest.mark.filterwarnings("ignore:y has classes with fewer rows")
def test_an_accuracy_is_remarked_where_one_class_makes_it(counts, words):
    y = np.repeat(list("abc")[: len(counts)], np.array(counts) * 2)
    study = gputune.tune(
        "logistic", np.random.default_rng(0).normal(size=(len(y), 2)), y, cv=2, **HOW
    )
    found = [note for note in study.record.notes if "already" in note]
    assert len(found) == (words is not None) and all(words in note for note in found)
    for scoring in (
        found[0].split("already: ")[1].split(" as ")[0].replace(" or ", ", ").split(", ")
        if found
        else ()
    ):
        positive = "b" if scoring == "average_precision" else None
        gputune.tune(
            "logistic",
            np.zeros((len(y), 1)) + np.arange(len(y))[:, None],
            y,
            cv=2,
            scoring=scoring,
            positive=positive,
            **HOW,
        )


@pytest.mark.filterwarnings("ignore:.*train without rows of a class:UserWarning")
def test_a_class_is_named_only_where_it_is_the_answer_in_every_fold():
    X = np.random.default_rng(0).normal(size=(63, 2))
    y = np.repeat(["a", "b", "c"], 21)
    for cv, answer in (KFold(3), "the most frequent class of the training rows"), (3, "always 'a'"):
        found = gputune.tune("mlp", X, y, cv=cv, **HOW).record.baseline
        # of sorted rows a fold trains on two classes and is scored on the third
        assert found == {"answer": answer, "score": pytest.approx(1 / 3 if cv == 3 else 0)}


@pytest.mark.parametrize(("share", "constant"), [(0.5, 0), (0.01, 1)])
def test_an_empty_column_and_rare_positives_change_no_words(share, constant):
    y = np.where(np.arange(400) < 400 * share, "yes", "no")
    X = np.column_stack([np.random.default_rng(0).normal(size=400), np.full(400, float(constant))])
    record = gputune.tune("mlp", X, y, cv=2, scoring="f1", positive="yes", **HOW).record
    best = 2 * share / (1 + share)  # of 'yes' for all rows
    assert record.baseline == {"answer": "always 'yes'", "score": pytest.approx(best)}
    assert not any("accuracy" in note or "edge" in note for note in record.notes)


def test_a_scorer_of_the_users_own_has_none():
    study = gputune.tune(
        "mlp", *load_iris(return_X_y=True), scoring=lambda estimator, X, y: 0.5, **HOW
    )
    assert study.record.baseline is None


SKEWED = np.random.default_rng(0).exponential(2.0, size=81) + 0.1
BY_SCORE = {
    "r2": "the mean of the training rows",
    "explained_variance": "the mean of the training rows",
    "neg_mean_squared_error": "the mean of the training rows",
    "neg_root_mean_squared_error": "the mean of the training rows",
    "neg_mean_poisson_deviance": "the mean of the training rows",
    "neg_mean_gamma_deviance": "the mean of the training rows",
    "neg_mean_absolute_error": "the median of the training rows",
    "d2_absolute_error_score": "the median of the training rows",
    "neg_median_absolute_error": "the middle of the shortest interval with half of the training rows",
    "neg_mean_absolute_percentage_error": "the median of the training rows weighted by 1/|y|",
    "neg_mean_squared_log_error": "exp(mean(log(1 + y))) - 1 of the training rows",
    "neg_root_mean_squared_log_error": "exp(mean(log(1 + y))) - 1 of the training rows",
    "neg_max_error": "the middle between the smallest and the largest of the training rows",
    make_scorer(
        mean_pinball_loss, alpha=0.9, greater_is_better=False
    ): "the 0.9 quantile of the training rows",
    make_scorer(d2_pinball_score, alpha=0.2): "the 0.2 quantile of the training rows",
    make_scorer(
        mean_tweedie_deviance, power=1.5, greater_is_better=False
    ): "the mean of the training rows",
}


FACTORS = np.array([0.95, 0.99, 0.999, 1.001, 1.01, 1.05])


@pytest.mark.parametrize("scoring", BY_SCORE)
def test_no_constant_scores_better_on_the_training_rows(scoring):
    best = best_constant(
        make_scoring(scoring, "regression", None), "regression", torch.from_numpy(SKEWED)
    )
    assert best.answer == BY_SCORE[scoring]
    scorer = get_scorer(scoring)

    def score(constant):
        predictions = np.full(len(SKEWED), constant)
        return scorer._sign * scorer._score_func(SKEWED, predictions, **scorer._kwargs)

    # A coarse grid over all rows finds another optimum, a fine one around the constant a better one.
    constant = best.outputs.item()
    constants = [*np.linspace(SKEWED.min(), SKEWED.max(), 60), *(constant * FACTORS)]
    assert score(constant) >= max(map(score, constants)) - 1e-12


@pytest.mark.parametrize("transform", [None, "log"])
@pytest.mark.parametrize(
    ("scoring", "fit"),
    [
        ("neg_mean_absolute_error", np.median),
        ("neg_mean_squared_log_error", lambda y: np.expm1(np.log1p(y).mean())),
    ],
)
def test_each_fold_has_the_constant_of_its_training_rows(scoring, fit, transform):
    X = np.random.default_rng(1).normal(size=(len(SKEWED), 2))
    cv = list(KFold(3).split(X))
    study = gputune.tune(
        "mlp", X, SKEWED, cv=cv, scoring=scoring, target_transform=transform, **HOW
    )
    scores = []
    for train, valid in cv:
        dummy = DummyRegressor(strategy="constant", constant=fit(SKEWED[train])).fit(X, SKEWED)
        scores.append(get_scorer(scoring)(dummy, X[valid], SKEWED[valid]))
    assert study.record.baseline == {
        "answer": BY_SCORE[scoring],
        "score": pytest.approx(np.mean(scores), rel=1e-12),
    }


@pytest.mark.parametrize(
    "scoring", [one for one in BY_SCORE if isinstance(one, str) and "max" not in one]
)
def test_a_weight_counts_as_so_many_rows(scoring):
    weights = torch.arange(len(SKEWED)) % 3
    y = torch.from_numpy(SKEWED)
    (constant, *_) = reversed(
        _constants(make_scoring(scoring, "regression", None), "regression", None, 1)
    )
    torch.testing.assert_close(
        constant.fit(y, weights.double()), constant.fit(y.repeat_interleave(weights), None)
    )


def test_weights_are_tried_next_to_equal_ones():
    y = np.repeat([0.0, 1.0], 30)
    X = np.random.default_rng(0).normal(size=(60, 2))
    cv = [(np.arange(0, 60, 2), np.arange(31, 60, 2))]  # validated on ones only
    how = {"cv": cv, "scoring": "neg_mean_squared_error", "task": "regression"}
    weighted = gputune.tune(
        "mlp", X, y, sample_weight=np.where(y, 3.0, 1.0), **how, **HOW
    ).record.baseline
    assert weighted == {
        "answer": "the mean of the training rows, by their weights",
        "score": pytest.approx(-1 / 16),
    }
    equal = gputune.tune(
        "mlp", X, y, sample_weight=np.where(y, 1.0, 3.0), **how, **HOW
    ).record.baseline
    assert equal == {"answer": "the mean of the training rows", "score": pytest.approx(-1 / 4)}


LABELS = np.array([[1, 1, 0]] * 5 + [[1, 0, 0]] * 4 + [[0, 1, 0]] * 3 + [[0, 0, 1]])


@pytest.mark.parametrize(
    ("scoring", "answer", "constant"),
    [
        ("accuracy", "the most frequent set of labels in the training rows", [1, 1, 0]),
        ("f1_macro", "always the 3 most frequent labels of the training rows", [1, 1, 1]),
        ("f1_micro", "the most frequent set of labels in the training rows", [1, 1, 0]),
        ("recall_samples", "always the 3 most frequent labels of the training rows", [1, 1, 1]),
    ],
)
def test_of_several_labels_the_best_set_is_the_answer(scoring, answer, constant):
    how = make_scoring(scoring, "multilabel", None, n_labels=3)
    best = best_constant(how, "multilabel", torch.from_numpy(LABELS).double())
    assert ((best.outputs > 0).int().tolist()) == constant
    scorer = get_scorer(scoring)
    scores = {}
    for labels in itertools.product((0, 1), repeat=3):
        predicted = np.tile(labels, (len(LABELS), 1))
        scores[labels] = scorer._score_func(LABELS, predicted, **scorer._kwargs)
    assert scores[tuple(constant)] == max(scores.values())
    assert best.answer == answer


def test_a_metric_of_scikit_learn_with_arguments_has_one():
    X, y = load_breast_cancer(return_X_y=True)
    scorer = make_scorer(fbeta_score, beta=2, pos_label=0)
    found = gputune.tune("mlp", X, y, cv=3, scoring=scorer, **HOW).record.baseline
    share = (y == 0).mean()
    assert found == {
        "answer": "always 0",
        "score": pytest.approx(5 * share / (4 * share + 1), abs=1e-3),
    }


def test_the_constant_of_training_rows_is_scored_on_others():
    y = torch.tensor([0, 0, 0, 1, 2])
    others = torch.tensor([0, 1, 1, 0])
    classes = np.array(["a", "b", "c"])
    scoring = make_scoring("accuracy", "multiclass", classes)
    best = best_constant(scoring, "multiclass", y, classes=classes)
    assert best.answer == "always 'a'"
    assert scoring.on_rows(best.outputs.expand(4, -1), others) == 0.5
    assert (
        best_constant(make_scoring(lambda outputs, y: 0.5, "multiclass", classes), "multiclass", y)
        is None
    )
