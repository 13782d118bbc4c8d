"""Searches over pipelines: transformers are fitted per fold, and once where candidates have them in common."""

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from scipy.stats import loguniform
from sklearn import model_selection
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import FitFailedWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.metrics import get_scorer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, OneHotEncoder, StandardScaler

from gputune.sklearn import GridSearchCV, LogisticRegression, MLPClassifier, RandomizedSearchCV
from searches import OPTIONS, SCORES, CountingScaler, X, Y, both_random

MLP = MLPClassifier(hidden_layer_sizes=(8,), max_iter=4, batch_size=32, random_state=0)
RATES = {"mlpclassifier__learning_rate_init": loguniform(1e-3, 1e-1)}


def test_scores_are_those_of_scikit_learns_search(training):
    pipeline = make_pipeline(StandardScaler(), PCA(3), MLP)
    space = RATES | {"mlpclassifier__hidden_layer_sizes": [4, 8, 20]}
    ours, _, theirs, _ = both_random(pipeline, space, scoring=SCORES, refit="neg_log_loss", return_train_score=True)
    assert training == [(4, 3, (300, 3))]  # the training rows of all folds, one after the other
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-9)


def test_a_searched_transformer_is_fitted_once_for_each_of_its_parameters(scaler_fits, training):
    pipeline = make_pipeline(CountingScaler(), MLP)
    space = {"countingscaler__shift": [0.0, 1.0], "mlpclassifier__learning_rate_init": [0.01, 0.02, 0.1]}
    ours, *_ = both_random(pipeline, space, n_iter=6)
    assert scaler_fits == [100] * 6 + [150] + [100] * 18 + [150]  # each fold, and the refit; scikit-learn's each fit
    assert ours.best_estimator_[0].mean_ == pytest.approx(X.mean(0) + ours.best_params_["countingscaler__shift"])
    assert sorted(training) == [(3, 3, (300, 4))] * 2


@pytest.mark.parametrize(
    ("steps", "space"),
    [
        ([StandardScaler()], {"standardscaler": [MinMaxScaler(), "passthrough", StandardScaler()]}),
        ([FunctionTransformer(lambda x: 2 * x)], {}),
        ([SelectFromModel(LogisticRegression())], {"selectfrommodel__estimator__C": [0.1, 1.0]}),
        ([Pipeline([("inner", StandardScaler())]), PCA()], {"pca__n_components": [2, 3]}),
        ([OneHotEncoder(handle_unknown="ignore", sparse_output=False)], {}),
        (["passthrough"], {}),
    ],
    ids=["whole step", "lambda", "a model of gputune inside", "pipeline inside", "unlike columns", "no step"],
)
def test_what_a_step_may_be(steps, space):
    pipeline = make_pipeline(*(s if isinstance(s, str) else clone(s) for s in steps), MLP)
    _, said, *_ = both_random(pipeline, RATES | space)
    assert said == []


def test_names_and_the_memory_of_the_user(tmp_path):
    frame = pd.DataFrame(X, columns=list("abcd"))
    memory = joblib.Memory(tmp_path, verbose=0)
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), MLP, memory=memory)
    ours, *_ = both_random(pipeline, RATES, X=frame)
    assert ours.best_estimator_.memory.location == memory.location and pipeline.memory is memory
    assert ours.best_estimator_[-1].feature_names_in_.tolist() == list("abcd")


@pytest.mark.parametrize("memory", [None, "cache-folder"])
def test_a_mistake_shows_the_pipeline_as_the_user_wrote_it(memory):
    pipeline = make_pipeline(StandardScaler(), MLP, memory=memory)
    messages = []
    for search in (GridSearchCV, model_selection.GridSearchCV):
        with pytest.raises(ValueError) as found:
            search(pipeline, {"mlp__learning_rate_init": [0.1]}, cv=3).fit(X, Y)
        messages.append(str(found.value))
    assert messages[0] == messages[1] and "Invalid parameter 'mlp' for estimator Pipeline" in messages[0]


def test_parameters_of_fit_reach_their_steps():
    weights = np.random.default_rng(0).uniform(0.1, 2, len(Y)) ** 3
    pipeline = make_pipeline(StandardScaler(), MLP)
    given = {"mlpclassifier__sample_weight": weights, "standardscaler__sample_weight": weights}
    ours, *_ = both_random(pipeline, RATES, fit_params=given)
    plain = RandomizedSearchCV(pipeline, RATES, **OPTIONS).fit(X, Y)
    assert not np.allclose(ours.cv_results_["mean_test_score"], plain.cv_results_["mean_test_score"])
    with sklearn.config_context(enable_metadata_routing=True):
        asking = make_pipeline(
            StandardScaler().set_fit_request(sample_weight=True), clone(MLP).set_fit_request(sample_weight=True)
        )
        accuracy = get_scorer("accuracy").set_score_request(sample_weight=False)
        routed, *_ = both_random(asking, RATES, fit_params={"sample_weight": weights}, scoring=lambda: accuracy)
    np.testing.assert_allclose(routed.cv_results_["mean_test_score"], ours.cv_results_["mean_test_score"])


def test_a_step_that_fails_is_a_failed_fit(training):
    pipeline = make_pipeline(PCA(), clone(MLP).set_params(solver="sgd"))
    space = {"pca__n_components": [2, 30], "mlpclassifier__learning_rate_init": [0.1, 1e300]}
    _, said, _, said_by_theirs = both_random(pipeline, space)
    (failed,) = [message for kind, message in said if kind is FitFailedWarning]
    assert "9 fits failed out of a total of 12" in failed
    assert "6 fits failed with the following error" in failed and "n_components=30" in failed
    assert [kind for kind, _ in said] == [kind for kind, _ in said_by_theirs]
    assert training == [(2, 3, (300, 2))]


@pytest.mark.parametrize("name", ["mlpclassifier__bogus", "bogus__learning_rate_init"])
def test_an_unknown_parameter_is_an_error_before_anything_is_fitted(name, scaler_fits):
    pipeline = make_pipeline(CountingScaler(), MLP)
    with pytest.raises(ValueError, match="Invalid parameter 'bogus'"):
        RandomizedSearchCV(pipeline, [RATES, {name: [1]}], n_iter=9, cv=3, random_state=0).fit(X, Y)
    assert scaler_fits == []


@pytest.mark.parametrize(("step", "values"), [("mlpclassifier", [MLP, LogisticRegression()]), ("memory", [None])])
def test_a_search_over_the_last_step_itself_is_left_to_scikit_learn(step, values):
    pipeline = make_pipeline(StandardScaler(), MLP)
    _, said, *_ = both_random(pipeline, {step: values, "standardscaler__with_mean": [True, False]}, n_iter=2)
    ((kind, message),) = said
    assert kind is UserWarning and f"{step!r} is searched" in message


def test_a_pipeline_of_another_kind_is_left_to_scikit_learn():
    class Other(Pipeline):
        def fit(self, X, y=None, **params):
            return super().fit(X, y, **params)

    other = Other([("scale", StandardScaler()), ("mlpclassifier", MLP)])
    with pytest.warns(UserWarning, match="Other fits its steps in a way of its own"):
        RandomizedSearchCV(other, RATES, n_iter=2, cv=2).fit(X, Y)
