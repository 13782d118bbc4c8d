"""All at once = one after the other, and the words for it."""

import itertools
import time

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris, make_regression
from sklearn.neural_network import MLPClassifier as Theirs

import reference
from face_modules import Net
from gputune.errors import DivergedError, InputError
from gputune.population.population import complete
from gputune.sklearn import LogisticRegression, MLPClassifier, MLPRegressor, NeuralNetClassifier, NeuralNetRegressor
from gputune.sklearn.base import check_rows
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
    {"alpha": 0.5, "batch_size": 32, "solver": "sgd", "learning_rate_init": 0.05, "learning_rate": "cosine"},
    {"solver": "adamwhd", "random_state": 7},
]
NETS = [{}, {"module__hidden": 5}, {"batch_size": 16, "optimizer": "adam"}, {"module__dropout": 0.3, "lr": 0.1}]


def unequal_folds(n, folds=3):
    """Training rows in no order, of lengths that differ by more than one."""
    order = np.random.default_rng(0).permutation(n)
    parts = np.split(order, [n // 2, n // 2 + n // 5])
    return [np.concatenate(parts[:f] + parts[f + 1 :]) for f in range(folds)]


def together(estimator, spaces, X, y, folds, sample_weight=None, **options):
    candidates = [clone(estimator).set_params(**params) for params in spaces]
    return Fits(candidates, check_rows(clone(estimator), X, y, sample_weight), folds, **options)


def predictions(estimator, X):
    return estimator.predict_proba(X) if hasattr(estimator, "predict_proba") else estimator.predict(X)


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
    folds = unequal_folds(len(X)) if spaces is not PENALTIES else [np.arange(150), np.arange(100), np.arange(50)]
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
            np.testing.assert_allclose(predictions(member, X), predictions(alone, X), rtol=tolerance, atol=tolerance)
            assert member.get_params() == alone.get_params() and member.n_features_in_ == alone.n_features_in_
            # Rounding may decide whether the last step of a solution is still needed.
            np.testing.assert_allclose(member.n_iter_, alone.n_iter_, rtol=0, atol=spaces is PENALTIES)


def test_single_precision_stays_single_and_together_is_alone():
    X, y = IRIS[0].astype(np.float32), IRIS[1]
    estimator = MLPClassifier(hidden_layer_sizes=(12, 12), max_iter=5, random_state=3)
    folds = unequal_folds(len(X))
    fits = together(estimator, [{}, {"alpha": 0.01}], X, y, folds)
    for f, train in enumerate(folds):
        member, alone = fits.estimator(f, 1), clone(estimator).set_params(alpha=0.01).fit(X[train], y[train])
        assert next(member.module_.parameters()).dtype == torch.float32
        np.testing.assert_allclose(member.predict_proba(X), alone.predict_proba(X), atol=1e-5)
        assert member.predict_proba(X).dtype == np.float32


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_a_fit_is_the_plain_loop():
    X, y = NUMBERS
    weights = np.random.default_rng(1).uniform(0, 2, len(X))
    common = {"batch_size": 40, "weight_decay": 0.1}
    own = {"hidden_layer_sizes": (12, 7), "learning_rate_init": 0.01, "solver": "adam"}
    fitted = MLPRegressor(max_iter=6, random_state=3, **own, **common).fit(X, y, sample_weight=weights)
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
    common = {"hidden_layer_sizes": 8, "activation": "tanh", "solver": "sgd", "momentum": 0.0, "alpha": 30.0}
    start, step = (
        MLPClassifier(**common, batch_size=150, learning_rate_init=lr, max_iter=1, random_state=0).fit(X, y).module_
        for lr in (1e-14, 0.1)
    )
    theirs = Theirs(**common, batch_size=150, learning_rate_init=0.1, random_state=0)
    theirs.partial_fit(X, y, classes=np.unique(y))
    for layer, coef, intercept in zip(start.layers, theirs.coefs_, theirs.intercepts_):
        coef[:], intercept[:] = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
    theirs.partial_fit(X, y)
    for layer, coef in zip(step.layers, theirs.coefs_):
        np.testing.assert_allclose(layer.weight.detach().numpy().T, coef, rtol=1e-9, atol=1e-12)


QUICK = MLPClassifier((8, 8), max_iter=2, random_state=0)


def test_a_fold_that_lacks_a_class_has_a_network_without_it():
    X, y = IRIS
    fits = together(QUICK, [{}], X, y, [np.arange(100), np.arange(150)])
    member, alone = fits.estimator(0, 0), clone(QUICK).fit(X[:100], y[:100])
    assert member.classes_.tolist() == [0, 1] and fits.estimator(1, 0).classes_.tolist() == [0, 1, 2]
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


def test_folds_that_cannot_be_trained_on_fail_alone():
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


def test_a_candidate_that_is_refused_fails_alone():
    X, y = IRIS
    spaces = [{"solver": "lbfgs"}, {}, {"hidden_layer_sizes": "wide"}]
    fits = together(QUICK, spaces, X, y, unequal_folds(150))
    for fold in range(3):
        assert fits.error(fold, 1) is None
        assert isinstance(fits.error(fold, 0), InputError) and "solver" in str(fits.error(fold, 0))
        assert "'hidden_layer_sizes' parameter of MLPClassifier must be" in str(fits.error(fold, 2))


def test_a_diverged_fit_is_an_arithmetic_error_with_a_remedy():
    wild = MLPClassifier((8, 8), learning_rate_init=1e30, solver="sgd", max_iter=50, random_state=0)
    error = r"with nesterov and a learning rate of 1e\+30: .*smaller rate, or scale the inputs"
    with pytest.raises(DivergedError, match=error):
        wild.fit(*IRIS)
    assert issubclass(DivergedError, ArithmeticError)


@pytest.mark.parametrize(
    ("estimator", "rate"),
    [
        (MLPRegressor(hidden_layer_sizes=8, max_iter=4, solver="sgd", batch_size=16), "learning_rate_init"),
        (NeuralNetRegressor(Net, max_epochs=4, batch_size=16), "lr"),
    ],
    ids=["mlp", "module"],
)
def test_a_diverged_member_leaves_the_others_as_they_were(estimator, rate):
    estimator.set_params(random_state=0)
    X, y = NUMBERS
    wild = X.copy()
    wild[0] = 1e200  # in the training rows of two folds
    folds, rates = unequal_folds(len(X)), [{rate: 0.01}, {rate: 0.02}]
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
        np.testing.assert_array_equal(member.predict_proba(X), here.estimator(*place).predict_proba(X))


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
