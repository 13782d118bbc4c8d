"""Nested cross-validation beside the loop by hand."""

import numpy as np
import pytest
from scipy.stats import loguniform, randint
from sklearn import model_selection
from sklearn.datasets import load_iris
from sklearn.model_selection import KFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from gputune.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    HalvingRandomSearchCV,
    LogisticRegression,
    MLPClassifier,
    RandomizedSearchCV,
    nested_cv,
    tape,
)

X, Y = load_iris(return_X_y=True)
MLP = MLPClassifier(max_epochs=5, depth=1, random_state=0)
SEARCHES = [
    RandomizedSearchCV(
        MLP, {"width": randint(4, 30), "lr": loguniform(1e-3, 1e-1)}, n_iter=5, cv=3, random_state=1
    ),
    RandomizedSearchCV(LogisticRegression(), {"C": loguniform(1e-2, 10)}, n_iter=4, random_state=0),
    GridSearchCV(make_pipeline(StandardScaler(), MLP), {"mlpclassifier__lr": [0.001, 0.02, 0.1]}, cv=3),
]


@pytest.fixture
def training(monkeypatch):
    calls = []
    fit_together = tape.fit_together

    def counted(candidates, rows, folds, **options):
        calls.append((len(candidates), len(folds)))
        return fit_together(candidates, rows, folds, **options)

    monkeypatch.setattr(tape, "fit_together", counted)
    return calls


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("scoring", ["neg_log_loss", "accuracy"])
def test_it_is_the_loop_by_hand(search, scoring, training):
    search.set_params(scoring=scoring)
    found = nested_cv(search, X, Y, outer=4)
    candidates, inner = len(found.searches[0].cv_results_["params"]), found.searches[0].n_splits_
    assert training == [(candidates, 4 * inner)]  # one population
    by_hand = cross_validate(search, X, Y, cv=4, return_estimator=True)
    np.testing.assert_allclose(found.scores, by_hand["test_score"], atol=1e-6)
    assert list(found.best_params) == [each.best_params_ for each in by_hand["estimator"]]
    for mine, theirs, best in zip(found.searches, by_hand["estimator"], found.best_scores):
        assert mine.cv_results_["params"] == theirs.cv_results_["params"]
        for name in (f"split{fold}_test_score" for fold in range(inner)):
            np.testing.assert_allclose(mine.cv_results_[name], theirs.cv_results_[name], atol=1e-6)
        assert best == pytest.approx(theirs.best_score_, abs=1e-6)
    assert not hasattr(search, "cv_results_")


def test_outer_folds_are_any_that_scikit_learn_takes():
    search = SEARCHES[1]
    outer = KFold(3, shuffle=True, random_state=0)
    found = nested_cv(search, X, Y, outer=outer)
    np.testing.assert_allclose(found.scores, model_selection.cross_val_score(search, X, Y, cv=outer))
    again = nested_cv(search, X.tolist(), Y.tolist(), outer=outer.split(X))
    np.testing.assert_array_equal(again.scores, found.scores)


def test_a_search_without_a_seed_draws_anew_in_every_fold(training):
    np.random.seed(0)
    search = RandomizedSearchCV(LogisticRegression(), {"C": loguniform(1e-2, 10)}, n_iter=2, cv=2)
    found = nested_cv(search, X, Y, outer=3)
    assert len({params["C"] for params in found.best_params}) == 3 and training == [(2, 2)] * 3


def test_rows_that_are_wrong_fail_where_they_are():
    wrong = X.copy()
    wrong[0, 0] = np.nan
    search = GridSearchCV(MLP, {"lr": [0.1]}, cv=2)
    with pytest.raises(ValueError, match="Input X contains NaN"), pytest.warns():
        nested_cv(search, wrong, Y, outer=2)


def test_other_estimators_are_left_to_scikit_learn():
    search = GridSearchCV(SVC(), {"C": [0.1, 1.0]})
    with pytest.warns(UserWarning, match="one by one") as caught:
        found = nested_cv(search, X, Y, outer=3)
    theirs = model_selection.GridSearchCV(SVC(), {"C": [0.1, 1.0]})
    np.testing.assert_allclose(found.scores, model_selection.cross_val_score(theirs, X, Y, cv=3))
    assert len(caught) == 3


@pytest.mark.parametrize(
    ("search", "error"),
    [
        (HalvingRandomSearchCV(MLP, {"lr": [0.1]}), "must be a RandomizedSearchCV or a GridSearchCV"),
        (model_selection.GridSearchCV(MLP, {"lr": [0.1]}), "must be a RandomizedSearchCV or a GridSearchCV"),
        (GridSearchCV(MLP, {"lr": [0.1]}, refit=False), "got refit=False; set refit"),
        (GridSearchCV(MLP, {"lr": [0.1]}, study="study.db"), "study='study.db' keeps one; set study=None"),
    ],
)
def test_what_cannot_be_nested_is_refused(search, error):
    with pytest.raises(InputError, match=error):
        nested_cv(search, X, Y)
