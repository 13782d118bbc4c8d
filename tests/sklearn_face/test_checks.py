"""scikit-learn's own checks, all of them: no excusing tags, no expected failures."""

import pytest
from sklearn.utils import get_tags

from face_modules import Net
from gputune.sklearn import LogisticRegression, MLPClassifier, MLPRegressor, NeuralNetClassifier, NeuralNetRegressor
from searches import checks_in_turn

MLP = {
    "hidden_layer_sizes": (16,), "learning_rate_init": 0.05, "max_iter": 15, "batch_size": 32, "random_state": 0,
}  # fmt: skip
NET = {
    "module": Net, "module__hidden": 16, "optimizer": "adam", "max_epochs": 15, "batch_size": 32,
    "random_state": 0,
}  # fmt: skip
# Where scikit-learn's own fit takes over: for labels, for one class, in partial_fit.
WARNS = ("ignore:Got `batch_size` less than 1", "ignore:Stochastic Optimizer")
# One of each class of which the others are a spelling or a sibling.
ESTIMATORS = [LogisticRegression(), MLPClassifier(**MLP), MLPRegressor(**MLP), NeuralNetClassifier(**NET, lr=0.05)]
OTHERS = [MLPClassifier(**MLP, alpha=1e-3), NeuralNetRegressor(**NET, lr=0.02)]  # fmt: skip


# scikit-learn 1.6 asks scipy for names that later releases have deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings(*WARNS)
@pytest.mark.cpu  # a GPU trains estimators in single precision, of which scikit-learn asks double
@checks_in_turn(ESTIMATORS, OTHERS, of=2)
def test_scikit_learns_check(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS + OTHERS, ids=lambda e: type(e).__name__)
def test_no_tag_excuses_anything(estimator):
    tags = get_tags(estimator)
    assert not (tags.no_validation or tags.non_deterministic or tags._skip_test)
    kind = tags.classifier_tags or tags.regressor_tags
    assert not kind.poor_score
