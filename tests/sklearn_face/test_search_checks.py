"""scikit-learn's own checks of the searches, all of them: no excusing tags, no expected failures."""

import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

from gputune.sklearn import (
    GridSearchCV,
    HalvingRandomSearchCV,
    HypergradientSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    RandomizedSearchCV,
)
from searches import checks_in_turn

MLP = {"hidden_layer_sizes": (16,), "max_iter": 12, "batch_size": 32, "random_state": 0}
CLASSIFIER, REGRESSOR = MLPClassifier(**MLP), MLPRegressor(**MLP)
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
OTHERS = [
    GridSearchCV(PIPELINE, PENALTIES, cv=2),
    RandomizedSearchCV(REGRESSOR, RATES, n_iter=2, cv=2, random_state=0),
    HalvingRandomSearchCV(CLASSIFIER, RATES, n_candidates=3, min_resources=3, cv=2, random_state=0),
    HypergradientSearchCV(CLASSIFIER, RATES, **DESCENT, random_state=0),
    HypergradientSearchCV(REGRESSOR, RATES, **DESCENT, random_state=0),
]


# The checks hand over data with a NaN in one fold, of which a search warns before its refit raises.
@pytest.mark.filterwarnings("ignore")
@checks_in_turn(SEARCHES, OTHERS)
def test_scikit_learns_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize("search", SEARCHES + OTHERS, ids=lambda s: type(s).__name__)
def test_no_tag_excuses_anything(search):
    tags = get_tags(search)
    assert not (tags.no_validation or tags.non_deterministic or tags._skip_test)
    assert not (tags.classifier_tags or tags.regressor_tags).poor_score
