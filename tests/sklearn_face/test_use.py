"""The estimators inside scikit-learn: pipelines, cross-validation, ensembles, searches, copies."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import VotingClassifier, VotingRegressor
from sklearn.model_selection import check_cv, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import gputune.sklearn as face
from face_modules import Net
from gputune.sklearn import LogisticRegression, MLPClassifier, MLPRegressor, NeuralNetClassifier, NeuralNetRegressor

IRIS = load_iris(return_X_y=True)
DIABETES = load_diabetes(return_X_y=True)
CLASSIFIERS = [
    LogisticRegression(),
    MLPClassifier(hidden_layer_sizes=(16,), learning_rate_init=0.05, max_iter=30, random_state=0),
    NeuralNetClassifier(Net, optimizer="adam", lr=0.05, max_epochs=30, random_state=0),
]
REGRESSORS = [
    MLPRegressor(hidden_layer_sizes=(16,), learning_rate_init=0.01, max_iter=30, random_state=0),
    NeuralNetRegressor(Net, lr=0.1, max_epochs=30, random_state=0),
]
each = pytest.mark.parametrize("estimator", CLASSIFIERS + REGRESSORS, ids=lambda e: type(e).__name__)
each_classifier = pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda e: type(e).__name__)


def data_for(estimator):
    return IRIS if hasattr(estimator, "predict_proba") else DIABETES


def test_the_public_names():
    assert face.__all__ == sorted(face.__all__)
    searches = {"GridSearchCV", "HalvingRandomSearchCV", "HypergradientSearchCV", "RandomizedSearchCV"}
    searches |= {"NestedScores", "NeuralNet", "SliceDict", "nested_cv"}
    assert {type(e).__name__ for e in CLASSIFIERS + REGRESSORS} | searches == set(face.__all__)


@each
def test_names_of_features_are_kept_and_checked_also_by_copies(estimator):
    X, y = data_for(estimator)
    frame = pd.DataFrame(X, columns=[f"x{i}" for i in range(X.shape[1])])
    fitted = clone(estimator).fit(frame, y)
    assert fitted.feature_names_in_.tolist() == list(frame.columns)
    for other in (fitted, pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        np.testing.assert_array_equal(other.predict(frame), fitted.predict(frame))
        assert other.get_params() == fitted.get_params()
        with pytest.raises(ValueError, match="feature names should match"):
            other.predict(frame.rename(columns={"x0": "other"}))
    assert not hasattr(clone(fitted), "n_features_in_")


@each_classifier
def test_labels_keep_their_type(estimator):
    X, codes = IRIS
    labels = np.array(["setosa", "versicolor", "virginica"])[codes]
    fitted = clone(estimator).fit(X, labels)
    assert fitted.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    np.testing.assert_array_equal(fitted.predict(X), fitted.classes_[fitted.predict_proba(X).argmax(1)])
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(X)), fitted.predict_proba(X), rtol=1e-9)


@each_classifier
def test_ensembles_and_calibration(estimator):
    X, y = IRIS
    votes = VotingClassifier([("one", estimator), ("two", LogisticRegression())], voting="soft")
    assert votes.fit(X, y).score(X, y) > 0.9
    weights = np.ones(len(y))
    calibrated = CalibratedClassifierCV(estimator, cv=3).fit(X, y, sample_weight=weights)
    assert calibrated.score(X, y) > 0.9


def test_an_ensemble_of_regressors():
    pair = VotingRegressor([(type(e).__name__, e) for e in REGRESSORS])
    assert make_pipeline(StandardScaler(), pair).fit(*DIABETES).score(*DIABETES) > 0.4


@pytest.mark.parametrize("estimator", [CLASSIFIERS[0], REGRESSORS[0]], ids=["classifier", "regressor"])
def test_sample_weights_are_routed(estimator):
    X, y = data_for(estimator)
    weights = np.random.default_rng(0).uniform(0.1, 2, len(y)) ** 4
    splits = list(check_cv(3, y, classifier=is_classifier(estimator)).split(X, y))
    with sklearn.config_context(enable_metadata_routing=True):
        asking = clone(estimator).set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
        routed = cross_validate(asking, X, y, cv=splits, params={"sample_weight": weights}, return_estimator=True)
    for (train, _), found in zip(splits, routed["estimator"]):
        by_hand = clone(estimator).fit(X[train], y[train], sample_weight=weights[train])
        unweighted = clone(estimator).fit(X[train], y[train])
        predict = "predict_proba" if y is IRIS[1] else "predict"
        np.testing.assert_array_equal(getattr(found, predict)(X), getattr(by_hand, predict)(X))
        assert not np.allclose(getattr(found, predict)(X), getattr(unweighted, predict)(X), rtol=1e-3)
