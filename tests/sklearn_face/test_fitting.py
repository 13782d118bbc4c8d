"""Joint fits equal separate fits; training ends if its loss stalls; the other cases use
scikit-learn's own fit.
"""

import itertools
import time
from functools import partial

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn import neural_network
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_diabetes, load_iris, make_regression
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier as Theirs
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import reference
from face_modules import Net
from gputune.ground.errors import DivergedError, InputError
from gputune.population.population import complete
from gputune.sklearn import (
    GridSearchCV,
    HalvingRandomSearchCV,
    HypergradientSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
    NeuralNetRegressor,
)
from gputune.sklearn.base import check_rows
from gputune.sklearn.dataset import as_dense
from searches import Fits

IRIS = load_iris(return_X_y=True)
NUMBERS = make_regression(97, 5, noise=3.0, random_state=0)
MIXED = [
    {},
    {"hidden_layer_sizes": (20, 20), "learning_rate_init": 0.01},
    {"hidden_layer_sizes": (20, 20), "batch_size": 32, "dropout": 0.2},
    {"hidden_layer_sizes": (20, 20), "batch_size": 17, "solver": "sgd", "learning_rate_init": 0.1},
    {"hidden_layer_sizes": (128,), "activation": "tanh", "max_iter": 3},
    {"hidden_layer_sizes": (20, 7), "dropout": 0.2},
    {"alpha": 1.0, "learning_rate_init": 0.01},
    {
        "alpha": 0.5,
        "batch_size": 32,
        "solver": "sgd",
        "learning_rate_init": 0.05,
        "learning_rate": "cosine",
    },
    {"solver": "adamwhd", "random_state": 7},
]
NETS = [
    {},
    {"module__hidden": 5},
    {"batch_size": 16, "optimizer": "adam"},
    {"module__dropout": 0.3, "lr": 0.1},
]


def unequal_folds(n, folds=3):
    """Training rows in no order, of lengths that differ by more than one."""
    order = np.random.default_rng(0).permutation(n)
    parts = np.split(order, [n // 2, n // 2 + n // 5])
    return [np.concatenate(parts[:f] + parts[f + 1 :]) for f in range(folds)]


def together(estimator, spaces, X, y, folds, sample_weight=None, **options):
    candidates = [clone(estimator).set_params(**params) for params in spaces]
    return Fits(candidates, check_rows(clone(estimator), X, y, sample_weight), folds, **options)


def predictions(estimator, X):
    return (
        estimator.predict_proba(X) if hasattr(estimator, "predict_proba") else estimator.predict(X)
    )


PENALTIES = [
    {},
    {"C": 0.1},
    {"C": 0.1, "l1_ratio": 0.7},
    {"fit_intercept": False},
    {"class_weight": "balanced", "C": 5.0},
    {"tol": 1e-12},
    {"class_weight": {0: 1.0, 9: 1.0}},
]


@pytest.mark.parametrize(
    ("estimator", "spaces", "weighted"),
    [
        (MLPClassifier(hidden_layer_sizes=(12, 12), max_iter=5, random_state=3), MIXED, True),
        (MLPRegressor(hidden_layer_sizes=(12, 12), max_iter=5, random_state=3), MIXED, False),
        (NeuralNetClassifier(Net, lr=0.02, max_epochs=4, random_state=3), NETS, False),
        (NeuralNetRegressor(Net, lr=0.02, max_epochs=4, random_state=3), NETS, True),
        (LogisticRegression(), PENALTIES, True),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_together_is_what_fit_gives_alone(estimator, spaces, weighted):
    X, y = IRIS if hasattr(estimator, "predict_proba") else NUMBERS
    weights = np.random.default_rng(1).uniform(0, 2, len(X)) if weighted else None
    tolerance = 1e-6 if spaces is PENALTIES else 1e-9
    folds = (
        unequal_folds(len(X))
        if spaces is not PENALTIES
        else [np.arange(150), np.arange(100), np.arange(50)]
    )
    fits = together(estimator, spaces, X, y, folds, weights)
    for f, train in enumerate(folds):
        for i, params in enumerate(spaces):
            own = None if weights is None else weights[train]
            alone = clone(estimator).set_params(**params)
            try:
                alone.fit(X[train], y[train], sample_weight=own)
            except ValueError as error:
                assert type(fits.error(f, i)) is type(error) and str(fits.error(f, i)) == str(error)
                continue
            member = fits.estimator(f, i)
            np.testing.assert_allclose(
                predictions(member, X), predictions(alone, X), rtol=tolerance, atol=tolerance
            )
            assert (
                member.get_params() == alone.get_params()
                and member.n_features_in_ == alone.n_features_in_
            )
            # Rounding may decide whether the last step of a solution is still needed.
            np.testing.assert_allclose(
                member.n_iter_, alone.n_iter_, rtol=0, atol=spaces is PENALTIES
            )


def test_single_precision_stays_single_and_together_is_alone():
    X = IRIS[0].astype(np.float32)
    y = IRIS[1]
    estimator = MLPClassifier(hidden_layer_sizes=(12, 12), max_iter=5, random_state=3)
    folds = unequal_folds(len(X))
    fits = together(estimator, [{}, {"alpha": 0.01}], X, y, folds)
    for f, train in enumerate(folds):
        member = fits.estimator(f, 1)
        alone = clone(estimator).set_params(alpha=0.01).fit(X[train], y[train])
        assert next(member.module_.parameters()).dtype == torch.float32
        np.testing.assert_allclose(member.predict_proba(X), alone.predict_proba(X), atol=1e-5)
        assert member.predict_proba(X).dtype == np.float32


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_a_fit_is_the_plain_loop():
    X, y = NUMBERS
    weights = np.random.default_rng(1).uniform(0, 2, len(X))
    common = {"batch_size": 40, "weight_decay": 0.1}
    own = {"hidden_layer_sizes": (12, 7), "learning_rate_init": 0.01, "solver": "adam"}
    fitted = MLPRegressor(max_iter=6, random_state=3, **own, **common).fit(
        X, y, sample_weight=weights
    )
    engine = common | {"width": (12, 7), "lr": 0.01, "optimizer": "adam"}
    mean = np.average(y, weights=weights)
    scale = np.sqrt(np.average((y - mean) ** 2, weights=weights))
    plain = reference.train_mlp(
        torch.from_numpy(X),
        torch.from_numpy((y - mean) / scale),
        complete(engine, optimizer="adam", schedule="constant"),
        n_outputs=1,
        seed=3,
        epochs=6,
        weights=torch.from_numpy(weights),
    )
    with torch.no_grad():
        expected = plain(torch.from_numpy(X)).numpy()[:, 0] * scale + mean
    np.testing.assert_allclose(fitted.predict(X), expected, rtol=1e-9)
    assert (fitted.target_mean_, fitted.target_scale_) == pytest.approx((mean, scale))


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_alpha_decays_the_weights_as_scikit_learns():
    X, y = IRIS
    common = {
        "hidden_layer_sizes": 8,
        "activation": "tanh",
        "solver": "sgd",
        "momentum": 0.0,
        "alpha": 30.0,
    }
    start, step = (
        MLPClassifier(**common, batch_size=150, learning_rate_init=lr, max_iter=1, random_state=0)
        .fit(X, y)
        .module_
        for lr in (1e-14, 0.1)
    )
    theirs = Theirs(**common, batch_size=150, learning_rate_init=0.1, random_state=0)
    theirs.partial_fit(X, y, classes=np.unique(y))
    for layer, coef, intercept in zip(start.layers, theirs.coefs_, theirs.intercepts_):
        coef[:] = layer.weight.detach().numpy().T
        intercept[:] = layer.bias.detach().numpy()
    theirs.partial_fit(X, y)
    for layer, coef in zip(step.layers, theirs.coefs_):
        np.testing.assert_allclose(layer.weight.detach().numpy().T, coef, rtol=1e-9, atol=1e-12)


QUICK = MLPClassifier((8, 8), max_iter=2, random_state=0)


def test_a_fold_that_lacks_a_class_has_a_network_without_it():
    X, y = IRIS
    fits = together(QUICK, [{}], X, y, [np.arange(100), np.arange(150)])
    member = fits.estimator(0, 0)
    alone = clone(QUICK).fit(X[:100], y[:100])
    assert member.classes_.tolist() == [0, 1] and fits.estimator(1, 0).classes_.tolist() == [
        0,
        1,
        2,
    ]
    np.testing.assert_allclose(member.predict_proba(X), alone.predict_proba(X), rtol=1e-9)


def test_a_class_whose_rows_weigh_nothing_is_never_predicted():
    X, y = IRIS
    for estimator in (clone(QUICK), NeuralNetClassifier(Net, max_epochs=2), LogisticRegression()):
        fitted = estimator.fit(X, y, sample_weight=(y != 1).astype(float))
        assert fitted.classes_.tolist() == [0, 1, 2]
        assert (fitted.predict_proba(X)[:, 1] == 0).all()
        np.testing.assert_allclose(fitted.predict_proba(X).sum(1), 1)
        assert set(fitted.predict(X)) <= {0, 2}
        assert getattr(fitted, "loss_", 0) < 1  # nor do its rows count where the loss is watched


def test_folds_that_cannot_be_trained_on_fail_by_themselves():
    X, y = IRIS
    weights = np.ones(150)
    weights[:60] = 0
    folds = [np.arange(150), np.arange(100, 150), np.arange(60), np.arange(0)]
    fits = together(QUICK, [{}, {"learning_rate_init": 0.1}], X, y, folds, weights)
    messages = ["at least 2 classes, got 1 class: 2", "sample_weight must be above 0", "no rows"]
    assert fits.error(0, 0) is None and fits.error(0, 1) is None
    for fold, message in enumerate(messages, start=1):
        for trial in (0, 1):
            assert isinstance(fits.error(fold, trial), ValueError)
            with pytest.raises(ValueError, match=message):
                fits.estimator(fold, trial)


def test_a_candidate_that_is_refused_fails_by_itself():
    X, y = IRIS
    spaces = [{"solver": "lbfgs"}, {}, {"hidden_layer_sizes": "wide"}]
    fits = together(QUICK, spaces, X, y, unequal_folds(150))
    for fold in range(3):
        assert fits.error(fold, 1) is None
        assert isinstance(fits.error(fold, 0), InputError) and "solver" in str(fits.error(fold, 0))
        assert "'hidden_layer_sizes' parameter of MLPClassifier must be" in str(fits.error(fold, 2))


def test_a_diverged_fit_is_an_arithmetic_error_with_a_remedy():
    wild = MLPClassifier((8, 8), learning_rate_init=1e30, solver="sgd", max_iter=50, random_state=0)
    error = r"with nesterov and a learning rate of 1e\+30: .*Use a smaller learning rate, or scale the inputs"
    with pytest.raises(DivergedError, match=error):
        wild.fit(*IRIS)
    assert issubclass(DivergedError, ArithmeticError)


@pytest.mark.parametrize(
    ("estimator", "rate"),
    [
        (
            MLPRegressor(hidden_layer_sizes=8, max_iter=4, solver="sgd", batch_size=16),
            "learning_rate_init",
        ),
        (NeuralNetRegressor(Net, max_epochs=4, batch_size=16), "lr"),
    ],
    ids=["mlp", "module"],
)
def test_a_diverged_member_leaves_the_others_as_they_were(estimator, rate):
    estimator.set_params(random_state=0)
    X, y = NUMBERS
    wild = X.copy()
    wild[0] = 1e200  # in the training rows of two folds
    folds = unequal_folds(len(X))
    rates = [{rate: 0.01}, {rate: 0.02}]
    with_row = [f for f in range(3) if 0 in folds[f]]
    tame, mad = (together(estimator, rates, rows, y, folds) for rows in (X, wild))
    for fold, trial in itertools.product(range(3), range(2)):
        if fold in with_row:
            assert isinstance(mad.error(fold, trial), DivergedError)
        else:
            own, other = (fits.estimator(fold, trial).module_.state_dict() for fits in (tame, mad))
            assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.cpu  # one process drives a GPU
def test_other_processes_train_the_same():
    X, y = IRIS
    estimator = NeuralNetClassifier(Net, max_epochs=3, random_state=0)
    spaces = [{"module__hidden": h} for h in (3, 4, 5)]
    folds = unequal_folds(150)
    here, there = (together(estimator, spaces, X, y, folds, workers=workers) for workers in (1, 2))
    for place in itertools.product(range(3), range(3)):
        member = there.estimator(*place)
        assert type(member.module_) is Net
        np.testing.assert_array_equal(
            member.predict_proba(X), here.estimator(*place).predict_proba(X)
        )


def test_what_has_not_ended_in_time_is_no_fit():
    X, y = IRIS
    spaces = [{"max_iter": 1}, {"max_iter": 2}, {"max_iter": 2, "hidden_layer_sizes": (128,)}]
    fits = together(QUICK, spaces, X, y, unequal_folds(150), deadline=time.monotonic() - 1)
    assert fits.error(0, 0) is None  # a chunk that runs ends its epoch
    assert all(isinstance(fits.error(f, i), TimeoutError) for f in range(3) for i in (1, 2))


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_the_module_is_plain_and_the_users_own():
    X, y = IRIS
    fitted = NeuralNetClassifier(Net, module__hidden=5, module__dropout=0.5, max_epochs=1).fit(X, y)
    assert type(fitted.module_) is Net and fitted.module_.first.out_features == 5
    assert not fitted.module_.training
    with torch.no_grad():
        logits = fitted.module_(torch.from_numpy(X))
    fitted.module_.train()  # what the user does with it draws no dropout in a prediction
    np.testing.assert_allclose(fitted.predict_proba(X), logits.softmax(1).numpy(), rtol=1e-12)


X, Y = load_iris(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
PATIENT = MLPClassifier(
    (8,), learning_rate_init=0.05, tol=0.02, n_iter_no_change=3, max_iter=60, random_state=0
)
DIABETES = load_diabetes(return_X_y=True)


def stopped_at(losses, tol, patience):
    """The epoch at which scikit-learn's rule ends: written out, one epoch after another."""
    best = np.inf
    stalled = 0
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
    for epochs in range(1, PATIENT.max_iter + 1):
        model = (
            clone(PATIENT).set_params(n_iter_no_change=np.inf, max_iter=epochs).fit(X, Y, weights)
        )
        chance = model.predict_proba(X)[np.arange(len(Y)), Y]
        losses.append(-np.average(np.log(chance), weights=weights))
        assert model.loss_curve_ == [] and model.n_iter_ == epochs
        if stopped_at(losses, 0.02, 3) < epochs:
            break
    fitted = clone(PATIENT).fit(X, Y, weights)
    assert (
        fitted.n_iter_ == stopped_at(losses, 0.02, 3) == len(fitted.loss_curve_) < PATIENT.max_iter
    )
    np.testing.assert_allclose(fitted.loss_curve_, losses[: fitted.n_iter_], rtol=1e-9)
    assert fitted.loss_ == fitted.loss_curve_[-1] and fitted.best_loss_ == min(fitted.loss_curve_)
    assert fitted.t_ == fitted.n_iter_ * len(X)
    plain = (
        clone(PATIENT)
        .set_params(n_iter_no_change=np.inf, max_iter=fitted.n_iter_)
        .fit(X, Y, weights)
    )
    for coefs, expected in zip(
        fitted.coefs_ + fitted.intercepts_, plain.coefs_ + plain.intercepts_
    ):
        np.testing.assert_allclose(coefs, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "estimator", [PATIENT, MLPRegressor(**PATIENT.get_params(), loss="squared_error")]
)
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_members_end_each_by_themselves(estimator):
    data = (X, Y) if isinstance(estimator, MLPClassifier) else DIABETES
    grid = {"learning_rate_init": [0.001, 0.1], "tol": [0.0, 0.05]}
    search = GridSearchCV(estimator, grid, cv=KFold(3, shuffle=True, random_state=0)).fit(*data)
    ends = set()
    folds = [search.cv_results_[f"split{f}_test_score"] for f in range(3)]
    for params, *scores in zip(search.cv_results_["params"], *folds):
        alone = clone(estimator).set_params(**params)
        np.testing.assert_allclose(cross_val_score(alone, *data, cv=search.cv), scores, rtol=1e-9)
        ends.add(alone.fit(*data).n_iter_)
    assert len(ends) > 2


def test_rungs_and_descents_go_to_their_last_epoch():
    impatient = clone(PATIENT).set_params(tol=100.0, n_iter_no_change=1, max_iter=8)
    options = {"cv": 3, "refit": False}
    rates = {"learning_rate_init": [0.05, 0.001]}
    rung = {"n_candidates": 2, "min_resources": 8, "scoring": "neg_log_loss", "random_state": 0}
    halving = HalvingRandomSearchCV(impatient, rates, **rung, **options)
    descent = HypergradientSearchCV(
        impatient, rates, n_iter=2, outer_steps=1, random_state=0, **options
    )
    endless = clone(impatient).set_params(n_iter_no_change=np.inf)
    whole = GridSearchCV(endless, rates, scoring="neg_log_loss", **options).fit(X, Y)
    for search in (halving.fit(X, Y), descent.fit(X, Y)):
        for params, score in zip(
            search.cv_results_["params"][:2], search.cv_results_["mean_test_score"]
        ):
            place = rates["learning_rate_init"].index(params["learning_rate_init"])
            assert score == pytest.approx(whole.cv_results_["mean_test_score"][place])


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_a_regression_stalls_by_half_the_standardised_error():
    features, target = DIABETES
    fitted = MLPRegressor(max_iter=3, random_state=0).fit(features, target)
    error = (fitted.predict(features) - target) / fitted.target_scale_
    assert fitted.loss_ == pytest.approx((error**2).mean() / 2)
    module = fitted.module_(torch.from_numpy(features)).detach().numpy()[:, 0]
    np.testing.assert_allclose(
        fitted.predict(features), module * fitted.target_scale_ + fitted.target_mean_
    )


@pytest.mark.parametrize(
    "params",
    [
        *(
            {"solver": "lbfgs"},
            {"solver": "sgd", "learning_rate": "adaptive"},
            {"activation": "logistic"},
        ),
        *(
            {"hidden_layer_sizes": ()},
            {"shuffle": False},
            {"warm_start": True},
            {"early_stopping": True},
        ),
        *({"beta_1": 0.8}, {"beta_2": 0.99}, {"epsilon": 1e-7}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_gputune_does_not_train_is_scikit_learns_own_fit(params):
    common = {"max_iter": 12, "random_state": 0} | params
    ours = MLPClassifier(**common).fit(X, Y)
    theirs = neural_network.MLPClassifier(**common).fit(X, Y)
    np.testing.assert_array_equal(ours.predict_proba(X), theirs.predict_proba(X))
    assert not hasattr(ours, "module_") and ours.n_iter_ == theirs.n_iter_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_search_says_which_candidates_it_does_not_train(scaled):
    estimator = clone(PATIENT).set_params(max_iter=5)
    grid = {"solver": ["adam", "lbfgs", "sgd"], "hidden_layer_sizes": [(4,), (8,)]}
    if scaled:
        estimator = make_pipeline(StandardScaler(), estimator)
        grid = {f"mlpclassifier__{name}": values for name, values in grid.items()}
    search = GridSearchCV(estimator, grid, cv=3)
    with pytest.warns(
        UserWarning, match=r"2 of 6 candidates .* one by one, because .* not train solver='lbfgs'\."
    ):
        search.fit(X, Y)
    results = search.cv_results_
    for params, score in zip(results["params"], results["mean_test_score"]):
        assert cross_val_score(
            clone(estimator).set_params(**params), X, Y, cv=3
        ).mean() == pytest.approx(score)
    lbfgs = np.array(["lbfgs" in params.values() for params in results["params"]])
    assert (results["std_fit_time"][lbfgs] > 0).all() and (
        results["std_fit_time"][~lbfgs] == 0
    ).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_targets_that_gputune_does_not_train_are_scikit_learns():
    several = np.stack([DIABETES[1], -DIABETES[1]], 1)
    regressor = MLPRegressor(max_iter=3, random_state=0)
    assert regressor.fit(DIABETES[0], several).predict(DIABETES[0]).shape == several.shape
    labels = np.stack([Y == 0, Y > 0], 1).astype(int)
    assert clone(PATIENT).fit(X, labels).predict(X).shape == labels.shape
    assert set(clone(PATIENT).fit(X, np.ones(len(X))).predict(X)) == {1.0}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_partial_fit_continues_a_training_of_gputune():
    fitted = clone(PATIENT).fit(X, Y)
    before = fitted.loss_
    epochs = len(fitted.loss_curve_)
    for _ in range(20):
        fitted.partial_fit(X, Y)
    assert (
        fitted.loss_ < before
        and len(fitted.loss_curve_) == epochs + 20
        and not hasattr(fitted, "module_")
    )
    assert not hasattr(MLPClassifier(solver="adamw"), "partial_fit")
    with pytest.raises(
        InputError,
        match="dropout=0.5 is supported only by gputune's training, but partial_fit needs",
    ):
        MLPClassifier(dropout=0.5).partial_fit(X, Y, classes=[0, 1, 2])


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("target", [Y, Y > 0])
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_the_module_and_the_coefficients_give_the_same(activation, target):
    fitted = (
        clone(PATIENT).set_params(activation=activation, hidden_layer_sizes=(8, 8)).fit(X, target)
    )
    logits = fitted.module_(torch.from_numpy(X))
    np.testing.assert_allclose(
        fitted.predict_proba(X), logits.softmax(1).detach().numpy(), rtol=1e-9, atol=1e-12
    )
    assert fitted.coefs_[-1].shape == (8, 3 if target is Y else 1)


@pytest.mark.parametrize(
    "estimator",
    [
        PATIENT,
        LogisticRegression(),
        NeuralNetClassifier(lambda: torch.nn.Linear(4, 3), random_state=0),
    ],
)
def test_sparse_x_is_what_it_is_as_an_array(estimator):
    dense = clone(estimator).fit(X, Y).predict_proba(X)
    np.testing.assert_allclose(
        clone(estimator).fit(csr_array(X), Y).predict_proba(csr_array(X)), dense, rtol=1e-9
    )


def test_sparse_x_that_memory_does_not_hold_is_refused():
    with pytest.raises(
        InputError,
        match="a sparse matrix of 4000 rows and 1000000000000000 columns.* needs 3.2e",
    ):
        as_dense(csr_array((4000, 10**15)))


class Softmax(nn.Module):
    """A module that ends with an activation which the user passes, as in skorch's examples."""

    def __init__(self, last=None, hidden=6):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3))
        self.last = last or nn.Identity()

    def forward(self, x):
        return self.last(self.layers(x))


SCALED = (StandardScaler().fit_transform(IRIS[0]), IRIS[1])
PLAIN = {"lr": 0.1, "max_epochs": 15, "random_state": 0, "device": "cpu"}


@pytest.mark.parametrize("criterion", [None, nn.NLLLoss, nn.NLLLoss()])
def test_a_module_with_a_softmax_is_the_module_without(criterion):
    logits = NeuralNetClassifier(Softmax, **PLAIN).fit(*SCALED)
    builder = partial(Softmax, nn.Softmax(dim=-1))
    net = NeuralNetClassifier(builder, criterion=criterion, **PLAIN).fit(*SCALED)
    X = SCALED[0]
    np.testing.assert_allclose(net.predict_proba(X), logits.predict_proba(X), atol=1e-10)
    np.testing.assert_allclose(net.predict_log_proba(X), logits.predict_log_proba(X), atol=1e-8)
    assert (net.predict(X) == logits.predict(X)).all() and net.score(*SCALED) > 0.8
    with torch.no_grad():  # module_ is the user's module
        outputs = net.module_(torch.from_numpy(X))
    np.testing.assert_allclose(outputs, net.predict_proba(X), atol=1e-12)


def test_a_softmax_fits_together_as_alone():
    net = NeuralNetClassifier(Softmax, module__last=nn.Softmax(dim=-1), **PLAIN)
    space = {"module__hidden": [4, 6], "lr": [0.1, 0.3]}
    search = GridSearchCV(net, space, cv=3).fit(*SCALED)
    for params, score in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        alone = cross_val_score(clone(net).set_params(**params), *SCALED, cv=3)
        assert score == pytest.approx(alone.mean())


def test_no_hook_stays_on_a_part_that_is_the_users():
    """Otherwise a clone would copy the hook, and the next fit would fail."""
    last = nn.Softmax(dim=-1)
    net = NeuralNetClassifier(partial(Softmax, last), **PLAIN).fit(*SCALED)
    assert not last._forward_hooks and not last._forward_pre_hooks
    CalibratedClassifierCV(net, cv=2).fit(*SCALED)


def test_a_softmax_has_no_hypergradient():
    net = NeuralNetClassifier(Softmax, module__last=nn.Softmax(dim=-1), **PLAIN)
    with pytest.raises(InputError, match="module must return logits, but Softmax returns prob"):
        HypergradientSearchCV(net, {"lr": [0.1, 0.2]}, n_iter=2, cv=2).fit(*SCALED)
