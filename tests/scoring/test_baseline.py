"""What needs no model is scored as scikit-learn's dummies are, and an accuracy that it makes high is remarked."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score

import gputune

HOW = {"n_trials": 1, "max_epochs": 1, "verbose": 0}
MOST, PRIOR = DummyClassifier(strategy="most_frequent"), DummyClassifier(strategy="prior")


@pytest.mark.parametrize(("load", "scoring", "dummy", "answer"), [
    (load_breast_cancer, None, MOST, "always 1"),
    (load_breast_cancer, "roc_auc", PRIOR, "the share of each class in the training rows"),
    (load_iris, "neg_log_loss", PRIOR, "the share of each class in the training rows"),
    (load_breast_cancer, "f1", DummyClassifier(strategy="constant", constant=1), "always 1"),
    (load_breast_cancer, "average_precision", PRIOR, "the share of each class in the training rows"),
    (load_iris, "f1_macro", MOST, "the share of each class in the training rows"),
    (load_diabetes, None, DummyRegressor(), "the mean of the training rows"),
    (load_diabetes, "neg_mean_absolute_error", DummyRegressor(), "the mean of the training rows"),
])  # fmt: skip
def test_it_is_what_a_dummy_scores(load, scoring, dummy, answer):
    X, y = load(return_X_y=True)
    folds = KFold if load is load_diabetes else StratifiedKFold
    cv = list(folds(3, shuffle=True, random_state=0).split(X, y))
    study = gputune.tune("mlp", X, y, cv=cv, scoring=scoring, **HOW)
    expected = cross_val_score(dummy, X, y, cv=cv, scoring=scoring).mean()
    assert study.record.baseline == {"answer": answer, "score": pytest.approx(expected, rel=1e-12)}


@pytest.mark.parametrize(("counts", "words"), [
    ((50, 50), None),
    ((99, 1), "always 'a' has an accuracy of 0.9900 already: balanced_accuracy, roc_auc"),
    ((80, 10, 10), "'a' has an accuracy of 0.8000 already: balanced_accuracy, f1_macro, roc_auc_ovr or neg_log"),
    ((40, 30, 30), None),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:y has classes with fewer rows")
def test_an_accuracy_is_remarked_where_one_class_makes_it(counts, words):
    y = np.repeat(list("abc")[: len(counts)], np.array(counts) * 2)
    study = gputune.tune("logistic", np.random.default_rng(0).normal(size=(len(y), 2)), y, cv=2, **HOW)
    found = [note for note in study.record.notes if "already" in note]
    assert len(found) == (words is not None) and all(words in note for note in found)
    for scoring in found[0].split("already: ")[1].split(" as ")[0].replace(" or ", ", ").split(", ") if found else ():
        positive = "b" if scoring == "average_precision" else None
        gputune.tune("logistic", np.zeros((len(y), 1)) + np.arange(len(y))[:, None], y, cv=2, scoring=scoring,
                     positive=positive, **HOW)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*train without rows of a class:UserWarning")
def test_a_class_is_named_only_where_it_is_the_answer_in_every_fold():
    X, y = np.random.default_rng(0).normal(size=(63, 2)), np.repeat(["a", "b", "c"], 21)
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
    study = gputune.tune("mlp", *load_iris(return_X_y=True), scoring=lambda estimator, X, y: 0.5, **HOW)
    assert study.record.baseline is None
