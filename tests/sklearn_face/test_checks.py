"""scikit-learn's own checks of the estimators and the searches: no excusing tags, no expected failures."""

import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

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
ESTIMATORS = [LogisticRegression(), MLPClassifier(**MLP), MLPRegressor(**MLP), NeuralNetClassifier(**NET, lr=0.05)]
OTHERS = [MLPClassifier(**MLP, alpha=1e-3), NeuralNetRegressor(**NET, lr=0.02)]


# scikit-learn 1.6 asks scipy for names that later releases have deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings(*WARNS)
@pytest.mark.cpu  # a GPU trains estimators in single precision, of which scikit-learn asks double
@checks_in_turn(ESTIMATORS, OTHERS, of=2)
def test_scikit_learns_check(estimator, check):
    check(estimator)


SHORT = COMMON | {"hidden_layer_sizes": (16,), "max_iter": 12}
CLASSIFIER, REGRESSOR = MLPClassifier(**SHORT), MLPRegressor(**SHORT)
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
