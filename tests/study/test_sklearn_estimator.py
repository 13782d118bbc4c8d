"""A tuned model is an estimator that is fitted already: what scikit-learn does with one works, fitting apart."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import is_classifier, is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_diabetes, load_iris
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import partial_dependence, permutation_importance
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, r2_score
from sklearn.utils.validation import check_is_fitted

import gputune

HOW = {"n_trials": 3, "max_epochs": 5, "cv": 2, "verbose": 0}
IRIS, DIABETES = load_iris(return_X_y=True), load_diabetes(return_X_y=True)


@pytest.fixture(scope="module")
def study():
    return gputune.tune("mlp", IRIS[0], np.array(["a", "b", "c"])[IRIS[1]], **HOW)


@pytest.fixture(scope="module")
def model(study):
    return study.best_model()


def test_it_scores_as_estimators_do(model):
    X, y = IRIS[0], np.array(["a", "b", "c"])[IRIS[1]]
    weights = np.arange(150)
    assert model.score(X, y) == accuracy_score(y, model.predict(X))
    assert model.score(X, y, weights) == accuracy_score(y, model.predict(X), sample_weight=weights)
    assert model.classes_.tolist() == ["a", "b", "c"] and is_classifier(model)
    check_is_fitted(model)


def test_of_numbers_too():
    model = gputune.tune("mlp", *DIABETES, **HOW).best_model()
    assert model.score(*DIABETES) == r2_score(DIABETES[1], model.predict(DIABETES[0])) and is_regressor(model)
    assert permutation_importance(model, *DIABETES, n_repeats=2).importances.shape == (10, 2)
    assert partial_dependence(model, DIABETES[0], [2], grid_resolution=3)["average"].shape == (1, 3)
    assert not hasattr(model, "classes_")


def test_it_scores_what_a_search_reads(model):
    X, y = IRIS[0], np.array(["a", "b", "c"])[IRIS[1]]
    odd = np.where(np.arange(150) < 10, "new", y)
    assert model.score(X, odd) == accuracy_score(odd, model.predict(X))
    assert model.score(X, y.tolist()) == model.score(X, pd.Series(y)) == model.score(X, y[:, None])
    priced = gputune.tune("mlp", *DIABETES, **HOW).best_model()
    numbers = torch.as_tensor(DIABETES[1])[:, None]
    assert priced.score(DIABETES[0], numbers) == priced.score(*DIABETES)
    text = [f"${value:,.2f}" for value in 1000 * DIABETES[1]]
    assert priced.score(DIABETES[0], text) == r2_score(1000 * DIABETES[1], priced.predict(DIABETES[0]))
    for one, rows, bad, message in (
        (model, X, IRIS[1], "y has no class that the model knows: it holds '0', '1', '2', and .* 'a', 'b', 'c'"),
        (model, X, [None, *y[1:]], r"y has 1 missing value \(the first in row 0\)"),
        (model, X, y[:9], r"one label a row of X, got shape \(9,\) and 150 rows"),
        (priced, DIABETES[0], [None, *DIABETES[1][1:]], "y has 1 missing value"),
        (priced, DIABETES[0], ["dear", *text[1:]], "needs numbers in y, got text such as 'dear'"),
    ):
        with pytest.raises(gputune.InputError, match=message):
            one.score(rows, bad)


def test_scikit_learn_explains_and_calibrates_it(model):
    X, y = IRIS[0], np.array(["a", "b", "c"])[IRIS[1]]
    assert permutation_importance(model, X, y, n_repeats=2).importances.shape == (4, 2)
    with matplotlib.rc_context({"backend": "agg"}):
        assert ConfusionMatrixDisplay.from_estimator(model, X, y).confusion_matrix.sum() == 150
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1)


def test_it_is_not_fitted_again(model):
    with pytest.raises(gputune.InputError, match=r"fitted already: wrap it in sklearn\.frozen\.FrozenEstimator"):
        model.fit(*IRIS)


def test_a_trial_of_a_number_is_trained_as_the_best_is(study, model):
    best, other = study.best_trial, study.ranking()[-1]
    again = study.best_model(trial=best.number)
    np.testing.assert_array_equal(again.predict_proba(IRIS[0]), model.predict_proba(IRIS[0]))
    assert study.best_model(trial=np.int64(other.number)).info["params"] == other.params


@pytest.mark.parametrize("trial", [3, -1, True, "0", 1.0])
def test_a_number_of_no_trial_is_refused(study, trial):
    with pytest.raises(gputune.InputError, match="must be the number of a trial that has a score, for example"):
        study.best_model(trial=trial)
