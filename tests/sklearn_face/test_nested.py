"""Nested cross-validation beside the loop by hand."""

import warnings

import numpy as np
import pytest
import sklearn
from scipy.stats import loguniform, randint
from sklearn import model_selection
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.metrics import get_scorer
from sklearn.model_selection import GroupKFold, KFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from gputune.ground.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    HalvingRandomSearchCV,
    HypergradientSearchCV,
    LogisticRegression,
    MLPClassifier,
    RandomizedSearchCV,
    nested_cv,
)

X, Y = load_iris(return_X_y=True)
MLP = MLPClassifier(max_iter=3, hidden_layer_sizes=(16,), random_state=0)
PENALTIES = {"C": loguniform(1e-2, 10)}
RATES = {"hidden_layer_sizes": randint(4, 30), "learning_rate_init": loguniform(1e-3, 1e-1)}
PIPELINE = make_pipeline(StandardScaler(), MLP)
SEARCHES = [
    RandomizedSearchCV(MLP, RATES, n_iter=3, cv=3, random_state=1),
    RandomizedSearchCV(LogisticRegression(), PENALTIES, n_iter=2, cv=3, random_state=0),
    GridSearchCV(PIPELINE, {"mlpclassifier__learning_rate_init": [0.001, 0.02, 0.1]}, cv=3),
]
ONE_RATE = {"learning_rate_init": [0.1]}


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "scoring", ["neg_log_loss", pytest.param("accuracy", marks=pytest.mark.long)]
)
def test_it_is_the_loop_by_hand(search, scoring, training):
    search.set_params(scoring=scoring)
    found = nested_cv(search, X, Y, outer=3)
    candidates = len(found.searches[0].cv_results_["params"])
    inner = found.searches[0].n_splits_
    assert [call[:2] for call in training] == [(candidates, inner)] * 3
    by_hand = cross_validate(search, X, Y, cv=3, return_estimator=True)
    np.testing.assert_allclose(found.scores, by_hand["test_score"], atol=1e-6)
    text = repr(found)
    assert text.startswith(f"NestedScores({found.scores.mean():.4f} ± ")
    assert " over 3 outer folds: " in text and len(text) < 80
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
    np.testing.assert_allclose(
        found.scores, model_selection.cross_val_score(search, X, Y, cv=outer)
    )
    again = nested_cv(search, X.tolist(), Y.tolist(), outer=outer.split(X))
    np.testing.assert_array_equal(again.scores, found.scores)


GROUPS = np.arange(150) % 7
WEIGHTS = np.random.default_rng(0).uniform(0.1, 5, 150)


@pytest.mark.parametrize("params", [None, {"groups": GROUPS}], ids=["outer", "outer and inner"])
def test_groups_split_outer_folds_and_as_params_inner_ones(params):
    outer = GroupKFold(3)
    inner = 3 if params is None else GroupKFold(4)
    search = clone(SEARCHES[1]).set_params(cv=inner, scoring="neg_log_loss")
    found = nested_cv(search, X, Y, outer=outer, groups=GROUPS, params=params)
    given = {"cv": outer, "groups": GROUPS, "params": params, "return_estimator": True}
    by_hand = cross_validate(search, X, Y, **given, error_score="raise")
    np.testing.assert_allclose(found.scores, by_hand["test_score"], atol=1e-8)
    for name in ("split0_test_score", "mean_test_score"):
        mine, theirs = (
            [s.cv_results_[name] for s in some] for some in (found.searches, by_hand["estimator"])
        )
        np.testing.assert_allclose(mine, theirs, atol=1e-8)


@pytest.mark.parametrize(
    ("search", "word"),
    [(SEARCHES[1], "sample_weight"), (SEARCHES[2], "mlpclassifier__sample_weight")],
)
def test_sample_weight_reaches_every_fit(search, word, training):
    search = clone(search).set_params(scoring="neg_log_loss")
    found = nested_cv(search, X, Y, outer=3, params={word: WEIGHTS})
    assert [call[:2] for call in training] == [
        (len(found.searches[0].cv_results_["params"]), 3)
    ] * 3
    weighted, unweighted = (
        cross_val_score(search, X, Y, cv=3, params=params) for params in ({word: WEIGHTS}, {})
    )
    np.testing.assert_allclose(found.scores, weighted, atol=1e-6)
    assert np.abs(weighted - unweighted).max() > 1e-3


def test_metadata_is_routed_as_in_cross_val_score():
    with sklearn.config_context(enable_metadata_routing=True):
        logistic = LogisticRegression().set_fit_request(sample_weight=True)
        loss = get_scorer("neg_log_loss").set_score_request(sample_weight=True)
        search = GridSearchCV(logistic, {"C": [0.01, 1.0]}, cv=GroupKFold(4), scoring=loss)
        params = {"sample_weight": WEIGHTS, "groups": GROUPS}
        found = nested_cv(search, X, Y, outer=GroupKFold(3), params=params)
        by_hand = cross_val_score(
            search, X, Y, cv=GroupKFold(3), params=params, error_score="raise"
        )
        np.testing.assert_allclose(found.scores, by_hand, atol=1e-8)
        with pytest.raises(ValueError, match="`groups` can only be passed if metadata routing"):
            nested_cv(search, X, Y, groups=GROUPS)
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            nested_cv(
                GridSearchCV(LogisticRegression(), {"C": [1.0]}),
                X,
                Y,
                params={"sample_weight": WEIGHTS},
            )


def test_what_a_scorer_cannot_weigh_is_warned_of_once_a_fit():
    def own(estimator, X, y):
        return estimator.score(X, y)

    search = GridSearchCV(LogisticRegression(), {"C": [1.0]}, scoring=own, cv=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cross_val_score(search, X, Y, cv=3, params={"sample_weight": WEIGHTS})
        theirs = len(caught)
        nested_cv(search, X, Y, outer=3, params={"sample_weight": WEIGHTS})
    assert len(caught) == 2 * theirs


def test_a_search_without_a_seed_draws_again_in_every_fold(training):
    np.random.seed(0)
    search = RandomizedSearchCV(LogisticRegression(), PENALTIES, n_iter=2, cv=2)
    found = nested_cv(search, X, Y, outer=3)
    assert (
        len({params["C"] for params in found.best_params}) == 3
        and [call[:2] for call in training] == [(2, 2)] * 3
    )
    found.searches[0].fit(X, Y)  # draws and trains again
    assert len(training) == 4


def test_rows_that_are_wrong_fail_where_they_are():
    wrong = X.copy()
    wrong[0, 0] = np.nan
    search = GridSearchCV(MLP, ONE_RATE, cv=2)
    with pytest.raises(ValueError, match="Input X contains NaN"):
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
        (
            HypergradientSearchCV(MLP, {}),
            "must be a RandomizedSearchCV or a GridSearchCV of gputune",
        ),
        (HalvingRandomSearchCV(MLP, ONE_RATE), "must be a RandomizedSearchCV or a GridSearchCV"),
        (
            model_selection.GridSearchCV(MLP, ONE_RATE),
            "must be a RandomizedSearchCV or a GridSearchCV",
        ),
        (GridSearchCV(MLP, ONE_RATE, refit=False), "got refit=False. Set refit"),
        (
            GridSearchCV(MLP, ONE_RATE, study="study.db"),
            "must have study=None.*got study='study.db'",
        ),
    ],
)
def test_what_cannot_be_nested_is_refused(search, error):
    with pytest.raises(InputError, match=error):
        nested_cv(search, X, Y)
