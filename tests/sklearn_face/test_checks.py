"""scikit-learn's own checks of estimators and searches, without excuses or expected failures, and
its other tools."""

import copy

import numpy as np
import pytest
import sklearn
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import VotingClassifier, VotingRegressor
from sklearn.model_selection import KFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

import gputune.sklearn as face
from face_modules import Net
from gputune.sklearn import (
    GridSearchCV,
    HalvingRandomSearchCV,
    HypergradientSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
    NeuralNetRegressor,
    RandomizedSearchCV,
)
from searches import checks_in_turn

COMMON = {"batch_size": 32, "random_state": 0}
MLP = COMMON | {"hidden_layer_sizes": (16,), "learning_rate_init": 0.05, "max_iter": 15}
NET = COMMON | {"module": Net, "module__hidden": 16, "optimizer": "adam", "max_epochs": 15}
# Where scikit-learn's own fit takes over: for labels, for one class, in partial_fit.
WARNS = ("ignore:Got `batch_size` less than 1", "ignore:Stochastic Optimizer")
# One of each class of which the others are a spelling or a sibling.
ESTIMATORS = [
    LogisticRegression(),
    MLPClassifier(**MLP),
    MLPRegressor(**MLP),
    NeuralNetClassifier(**NET, lr=0.05),
]
OTHERS = [MLPClassifier(**MLP, alpha=1e-3), NeuralNetRegressor(**NET, lr=0.02)]


# scikit-learn 1.6 asks scipy for names that later releases have deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings(*WARNS)
@pytest.mark.cpu  # a GPU trains estimators in single precision, of which scikit-learn asks double
@checks_in_turn(ESTIMATORS, OTHERS, of=2)
def test_scikit_learns_check(estimator, check):
    check(estimator)


SHORT = COMMON | {"hidden_layer_sizes": (16,), "max_iter": 12}
CLASSIFIER = MLPClassifier(**SHORT)
REGRESSOR = MLPRegressor(**SHORT)
PIPELINE = make_pipeline(StandardScaler(), LogisticRegression())
# No distribution, whose address would be in the names of the tests.
RATES = {"learning_rate_init": [0.01, 0.02, 0.05]}
PENALTIES = {"logisticregression__C": [0.5, 2.0]}
DESCENT = {"n_iter": 1, "outer_steps": 1, "cv": 2}
# One of each way to search, of which the others are siblings.
SEARCHES = [
    RandomizedSearchCV(CLASSIFIER, RATES, n_iter=2, cv=2, random_state=0),
    HalvingRandomSearchCV(REGRESSOR, RATES, n_candidates=3, min_resources=3, cv=2, random_state=0),
    HypergradientSearchCV(PIPELINE, {"logisticregression__C": [0.5]}, **DESCENT),
]
OTHER_SEARCHES = [
    GridSearchCV(PIPELINE, PENALTIES, cv=2),
    RandomizedSearchCV(REGRESSOR, RATES, n_iter=2, cv=2, random_state=0),
    HalvingRandomSearchCV(CLASSIFIER, RATES, n_candidates=3, min_resources=3, cv=2, random_state=0),
    HypergradientSearchCV(CLASSIFIER, RATES, **DESCENT, random_state=0),
    HypergradientSearchCV(REGRESSOR, RATES, **DESCENT, random_state=0),
]


# The checks hand over data with a NaN in one fold, of which a search warns before its refit raises.
@pytest.mark.filterwarnings("ignore")
@checks_in_turn(SEARCHES, OTHER_SEARCHES)
def test_scikit_learns_check_of_a_search(estimator, check):
    check(estimator)


EVERYTHING = ESTIMATORS + OTHERS + SEARCHES + OTHER_SEARCHES


@pytest.mark.parametrize("estimator", EVERYTHING, ids=lambda e: type(e).__name__)
def test_no_tag_excuses_anything(estimator):
    tags = get_tags(estimator)
    assert not (tags.no_validation or tags.non_deterministic or tags._skip_test)
    assert not (tags.classifier_tags or tags.regressor_tags).poor_score


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


def test_the_public_names():
    assert face.__all__ == sorted(face.__all__)
    checked = {type(estimator).__name__ for estimator in EVERYTHING}
    assert checked | {"NestedScores", "NeuralNet", "SliceDict", "nested_cv"} == set(face.__all__)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_a_deep_copy_of_a_fitted_one_predicts_the_same(estimator):
    X, y = IRIS
    fitted = clone(estimator).fit(X, y)
    np.testing.assert_array_equal(copy.deepcopy(fitted).predict(X), fitted.predict(X))


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda e: type(e).__name__)
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


@pytest.mark.parametrize(
    "estimator", [CLASSIFIERS[0], REGRESSORS[0]], ids=["classifier", "regressor"]
)
def test_sample_weights_are_routed(estimator):
    X, y = IRIS if is_classifier(estimator) else DIABETES
    weights = np.random.default_rng(0).uniform(0.1, 2, len(y)) ** 4
    splits = list(KFold(3, shuffle=True, random_state=0).split(X, y))
    predict = "predict_proba" if y is IRIS[1] else "predict"
    with sklearn.config_context(enable_metadata_routing=True):
        asking = (
            clone(estimator)
            .set_fit_request(sample_weight=True)
            .set_score_request(sample_weight=False)
        )
        scores = cross_validate(
            asking, X, y, cv=splits, params={"sample_weight": weights}, return_estimator=True
        )
    for (train, _), found in zip(splits, scores["estimator"]):
        by_hand = clone(estimator).fit(X[train], y[train], sample_weight=weights[train])
        unweighted = clone(estimator).fit(X[train], y[train])
        routed, weighted, plain = (
            getattr(model, predict)(X) for model in (found, by_hand, unweighted)
        )
        np.testing.assert_array_equal(routed, weighted)
        assert not np.allclose(routed, plain, rtol=1e-3)
