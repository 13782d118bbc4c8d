"""Training that ends where its loss stalls, and what is left to scikit-learn's own fit."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn import neural_network
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gputune.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    HalvingRandomSearchCV,
    HypergradientSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
)
from gputune.sklearn.dataset import as_dense

X, Y = load_iris(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
QUICK = MLPClassifier((8,), learning_rate_init=0.05, tol=0.02, n_iter_no_change=3, max_iter=60, random_state=0)
DIABETES = load_diabetes(return_X_y=True)


def stopped_at(losses, tol, patience):
    """The epoch at which scikit-learn's rule ends: written out, one epoch after another."""
    best, stalled = np.inf, 0
    for epoch, loss in enumerate(losses, 1):
        stalled = stalled + 1 if loss > best - tol else 0
        best = min(best, loss)
        if stalled > patience:
            return epoch
    return len(losses)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_training_ends_where_the_loss_of_the_training_rows_stalls(weighted):
    weights = np.random.default_rng(0).integers(0, 3, len(X)).astype(float) if weighted else None
    losses = []
    for epochs in range(1, QUICK.max_iter + 1):
        model = clone(QUICK).set_params(n_iter_no_change=np.inf, max_iter=epochs).fit(X, Y, weights)
        chance = model.predict_proba(X)[np.arange(len(Y)), Y]
        losses.append(-np.average(np.log(chance), weights=weights))
        assert model.loss_curve_ == [] and model.n_iter_ == epochs
        if stopped_at(losses, 0.02, 3) < epochs:
            break
    fitted = clone(QUICK).fit(X, Y, weights)
    assert fitted.n_iter_ == stopped_at(losses, 0.02, 3) == len(fitted.loss_curve_) < QUICK.max_iter
    np.testing.assert_allclose(fitted.loss_curve_, losses[: fitted.n_iter_], rtol=1e-9)
    assert fitted.loss_ == fitted.loss_curve_[-1] and fitted.best_loss_ == min(fitted.loss_curve_)
    assert fitted.t_ == fitted.n_iter_ * len(X)
    plain = clone(QUICK).set_params(n_iter_no_change=np.inf, max_iter=fitted.n_iter_).fit(X, Y, weights)
    for coefs, expected in zip(fitted.coefs_ + fitted.intercepts_, plain.coefs_ + plain.intercepts_):
        np.testing.assert_allclose(coefs, expected, rtol=1e-9)


@pytest.mark.parametrize("estimator", [QUICK, MLPRegressor(**QUICK.get_params(), loss="squared_error")])
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_members_end_each_by_themselves(estimator):
    data = (X, Y) if isinstance(estimator, MLPClassifier) else DIABETES
    grid = {"learning_rate_init": [0.001, 0.1], "tol": [0.0, 0.05]}
    search = GridSearchCV(estimator, grid, cv=KFold(3, shuffle=True, random_state=0)).fit(*data)
    ends, folds = set(), [search.cv_results_[f"split{f}_test_score"] for f in range(3)]
    for params, *scores in zip(search.cv_results_["params"], *folds):
        alone = clone(estimator).set_params(**params)
        np.testing.assert_allclose(cross_val_score(alone, *data, cv=search.cv), scores, rtol=1e-9)
        ends.add(alone.fit(*data).n_iter_)
    assert len(ends) > 2


def test_rungs_and_descents_go_to_their_last_epoch():
    impatient = clone(QUICK).set_params(tol=100.0, n_iter_no_change=1, max_iter=8)
    options, rates = {"cv": 3, "refit": False}, {"learning_rate_init": [0.05, 0.001]}
    rung = {"n_candidates": 2, "min_resources": 8, "scoring": "neg_log_loss", "random_state": 0}
    halving = HalvingRandomSearchCV(impatient, rates, **rung, **options)
    descent = HypergradientSearchCV(impatient, rates, n_iter=2, outer_steps=1, random_state=0, **options)
    endless = clone(impatient).set_params(n_iter_no_change=np.inf)
    whole = GridSearchCV(endless, rates, scoring="neg_log_loss", **options).fit(X, Y)
    for search in (halving.fit(X, Y), descent.fit(X, Y)):
        for params, score in zip(search.cv_results_["params"][:2], search.cv_results_["mean_test_score"]):
            place = rates["learning_rate_init"].index(params["learning_rate_init"])
            assert score == pytest.approx(whole.cv_results_["mean_test_score"][place])


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_a_regression_stalls_by_half_the_standardised_error():
    features, target = DIABETES
    fitted = MLPRegressor(max_iter=3, random_state=0).fit(features, target)
    error = (fitted.predict(features) - target) / fitted.target_scale_
    assert fitted.loss_ == pytest.approx((error**2).mean() / 2)
    module = fitted.module_(torch.from_numpy(features)).detach().numpy()[:, 0]
    np.testing.assert_allclose(fitted.predict(features), module * fitted.target_scale_ + fitted.target_mean_)


@pytest.mark.parametrize(
    "params",
    [
        *({"solver": "lbfgs"}, {"solver": "sgd", "learning_rate": "adaptive"}, {"activation": "logistic"}),
        *({"hidden_layer_sizes": ()}, {"shuffle": False}, {"warm_start": True}, {"early_stopping": True}),
        *({"beta_1": 0.8}, {"beta_2": 0.99}, {"epsilon": 1e-7}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_gputune_does_not_train_is_scikit_learns_own_fit(params):
    common = {"max_iter": 12, "random_state": 0} | params
    ours, theirs = MLPClassifier(**common).fit(X, Y), neural_network.MLPClassifier(**common).fit(X, Y)
    np.testing.assert_array_equal(ours.predict_proba(X), theirs.predict_proba(X))
    assert not hasattr(ours, "module_") and ours.n_iter_ == theirs.n_iter_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_search_says_which_candidates_it_does_not_train(scaled):
    estimator = clone(QUICK).set_params(max_iter=5)
    grid = {"solver": ["adam", "lbfgs", "sgd"], "hidden_layer_sizes": [(4,), (8,)]}
    if scaled:
        estimator = make_pipeline(StandardScaler(), estimator)
        grid = {f"mlpclassifier__{name}": values for name, values in grid.items()}
    search = GridSearchCV(estimator, grid, cv=3)
    with pytest.warns(UserWarning, match=r"2 of 6 candidates .* one by one, because .* not train solver='lbfgs'\."):
        search.fit(X, Y)
    results = search.cv_results_
    for params, score in zip(results["params"], results["mean_test_score"]):
        assert cross_val_score(clone(estimator).set_params(**params), X, Y, cv=3).mean() == pytest.approx(score)
    lbfgs = np.array(["lbfgs" in params.values() for params in results["params"]])
    assert (results["std_fit_time"][lbfgs] > 0).all() and (results["std_fit_time"][~lbfgs] == 0).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_targets_that_gputune_does_not_train_are_scikit_learns():
    several = np.stack([DIABETES[1], -DIABETES[1]], 1)
    regressor = MLPRegressor(max_iter=3, random_state=0)
    assert regressor.fit(DIABETES[0], several).predict(DIABETES[0]).shape == several.shape
    labels = np.stack([Y == 0, Y > 0], 1).astype(int)
    assert clone(QUICK).fit(X, labels).predict(X).shape == labels.shape
    assert set(clone(QUICK).fit(X, np.ones(len(X))).predict(X)) == {1.0}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_partial_fit_goes_on_from_what_gputune_trained():
    fitted = clone(QUICK).fit(X, Y)
    before, epochs = fitted.loss_, len(fitted.loss_curve_)
    for _ in range(20):
        fitted.partial_fit(X, Y)
    assert fitted.loss_ < before and len(fitted.loss_curve_) == epochs + 20 and not hasattr(fitted, "module_")
    assert not hasattr(MLPClassifier(solver="adamw"), "partial_fit")
    with pytest.raises(InputError, match="dropout=0.5 is gputune's own, and partial_fit is left to scikit-learn's"):
        MLPClassifier(dropout=0.5).partial_fit(X, Y, classes=[0, 1, 2])


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("target", [Y, Y > 0])
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_the_module_and_the_coefficients_give_the_same(activation, target):
    fitted = clone(QUICK).set_params(activation=activation, hidden_layer_sizes=(8, 8)).fit(X, target)
    logits = fitted.module_(torch.from_numpy(X))
    np.testing.assert_allclose(fitted.predict_proba(X), logits.softmax(1).detach().numpy(), rtol=1e-9, atol=1e-12)
    assert fitted.coefs_[-1].shape == (8, 3 if target is Y else 1)


@pytest.mark.parametrize(
    "estimator", [QUICK, LogisticRegression(), NeuralNetClassifier(lambda: torch.nn.Linear(4, 3), random_state=0)]
)
def test_sparse_x_is_what_it_is_as_an_array(estimator):
    dense = clone(estimator).fit(X, Y).predict_proba(X)
    np.testing.assert_allclose(clone(estimator).fit(csr_array(X), Y).predict_proba(csr_array(X)), dense, rtol=1e-9)


def test_sparse_x_that_memory_does_not_hold_is_refused():
    with pytest.raises(InputError, match="a sparse matrix of 4000 rows and 1000000000000000 columns, which takes 3.2e"):
        as_dense(csr_array((4000, 10**15)))
