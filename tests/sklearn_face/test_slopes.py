"""The slopes of a search's fits beside finite differences of the validation loss, taken with scikit-learn by hand."""

import time

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from face_modules import Net
from gputune.sklearn import LogisticRegression, MLPClassifier, MLPRegressor, NeuralNetClassifier
from gputune.sklearn.descent import DescentRun
from gputune.sklearn.recipe import Training
from gputune.sklearn.record import fits_of
from gputune.sklearn.replay import with_hook
from gputune.sklearn.slopes import slopes_of

X, Y = load_iris(return_X_y=True)
X = (X - X.mean(0)) / X.std(0)
DATA = {
    "iris": (X[:-7], Y[:-7]),  # folds of unlike sizes
    "cancer": (lambda x, y: ((x - x.mean(0)) / x.std(0), y))(*load_breast_cancer(return_X_y=True)),
    "diabetes": load_diabetes(return_X_y=True),
}
MLP = MLPClassifier(hidden_layer_sizes=(6,), activation="tanh", max_iter=4, batch_size=24, random_state=0)
SGD = clone(MLP).set_params(solver="sgd", nesterovs_momentum=False, momentum=0.0, learning_rate_init=0.2)
REGRESSOR = MLPRegressor(hidden_layer_sizes=(6, 6), activation="tanh", max_iter=3, batch_size=64, random_state=0)
WEIGHTS = np.random.default_rng(0).uniform(0.2, 2.0, len(Y))


def slopes(estimator, points, names, *, X=X, y=Y, cv=3, weights=None, params=None, **how):
    """Return the derivatives of each point of an estimator, and the fits."""
    run = DescentRun(with_hook(estimator, "auto"), cv)
    run.fit_params = params or ({} if weights is None else {"sample_weight": weights})
    fits = fits_of(run.record(points, X, y, run.split(X, y, {})))
    run.train(points, fits)
    found = slopes_of(fits, names, how.pop("mode", "exact"), Training(**how))
    return [found.get(trial) for trial in range(len(points))], fits


def slope_by_hand(estimator, params, step=1e-5, *, X=X, y=Y, weights=None):
    """Return the finite difference of the mean validation loss in the logarithm of the only parameter."""
    splits = list(StratifiedKFold(3).split(X, y))
    ((name, value),) = params.items()
    up, down = (
        np.mean([loss_by_hand(estimator, {name: value * np.exp(h)}, *s, X=X, y=y, weights=weights) for s in splits])
        for h in (step, -step)
    )
    return (up - down) / (2 * step)


def loss_by_hand(estimator, params, train, test, *, X=X, y=Y, weights=None):
    given = {} if weights is None else {"sample_weight": weights[train]}
    fitted = clone(estimator).set_params(**params).fit(X[train], y[train], **given)
    if is_classifier(estimator):
        return log_loss(y[test], fitted.predict_proba(X[test]))
    return mean_squared_error(y[test], fitted.predict(X[test]))


@pytest.mark.cpu  # a GPU trains estimators in single precision
@pytest.mark.parametrize(
    ("estimator", "name", "word", "value", "data"),
    [
        (MLP, "lr", "learning_rate_init", 0.01, "iris"),
        (MLP, "lr", "learning_rate_init", 0.01, "cancer"),
        (clone(MLP).set_params(learning_rate="cosine"), "weight_decay", "weight_decay", 0.5, "iris"),
        (MLP, "weight_decay", "alpha", 2.0, "iris"),
        (clone(SGD).set_params(learning_rate_init=0.1), "weight_decay", "alpha", 0.5, "cancer"),
        (SGD, "momentum", "momentum", 0.7, "iris"),
        (clone(MLP).set_params(solver="sgd", learning_rate_init=0.05), "lr", "learning_rate_init", 0.05, "cancer"),
        (REGRESSOR, "lr", "learning_rate_init", 0.01, "diabetes"),
        (LogisticRegression(tol=1e-12), "C", "C", 0.4, "iris"),
        (LogisticRegression(tol=1e-12, class_weight="balanced"), "C", "C", 0.05, "cancer"),
    ],
)  # fmt: skip
def test_slopes_are_those_of_finite_differences(estimator, name, word, value, data):
    X, y = DATA[data]
    (found,), _ = slopes(estimator, [{word: value}], (name,), X=X, y=y)
    splitter = StratifiedKFold(3) if is_classifier(estimator) else KFold(3)
    splits, h = list(splitter.split(X, y)), 1e-3 if name == "C" else 1e-4

    def mean_loss(step):
        return np.mean([loss_by_hand(estimator, {word: value * np.exp(step)}, *s, X=X, y=y) for s in splits])

    # Four points, so that what is left of the third derivative does not show.
    near, far = (mean_loss(k * h) - mean_loss(-k * h) for k in (1, 2))
    assert found.losses.mean() == pytest.approx(mean_loss(0), rel=1e-9)
    assert value * found.slopes[name].mean() == pytest.approx((8 * near - far) / (12 * h), rel=1e-6)
    assert found.slopes[name].shape == (3, 1, 1) and found.ratios.shape == (3,)


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_training_is_weighted_and_the_loss_is_not():
    (found,), _ = slopes(MLP, [{"learning_rate_init": 0.02}], ("lr",), weights=WEIGHTS)
    expected = slope_by_hand(MLP, {"learning_rate_init": 0.02}, weights=WEIGHTS)
    assert 0.02 * found.slopes["lr"].mean() == pytest.approx(expected, rel=1e-6)


def assert_close(one, other):
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-10)
    for name, table in other.slopes.items():
        np.testing.assert_allclose(one.slopes[name], table, rtol=1e-8)


def test_company_changes_nothing():
    points = [
        {"learning_rate_init": 0.01},
        {"learning_rate_init": 0.1, "solver": "sgd", "weight_decay": 0.1},
        {"alpha": 1.0, "batch_size": 50, "hidden_layer_sizes": (20, 20)},
        {"alpha": 0.1, "max_iter": 2},
        {"random_state": 1, "dropout": 0.3},
    ]
    data = {"X": DATA["iris"][0], "y": DATA["iris"][1]}
    together, _ = slopes(MLP, points, ("lr", "weight_decay"), **data)
    for point, found in zip(points, together):
        (alone,), _ = slopes(MLP, [point], ("lr", "weight_decay"), **data)
        assert_close(found, alone)
    penalties = [{"C": 0.1}, {"C": 2.0, "l1_ratio": 0.5}, {"C": 1.0, "class_weight": "balanced"}]
    for point, found in zip(penalties, slopes(LogisticRegression(), penalties, ("C",), **data)[0]):
        assert_close(found, slopes(LogisticRegression(), [point], ("C",), **data)[0][0])


@pytest.mark.parametrize(
    ("last", "weights"), [(MLP, WEIGHTS), (LogisticRegression(), None)], ids=["weighted mlp", "logistic"]
)
def test_a_pipeline_is_its_last_step_on_transformed_rows(last, weights):
    name, word = ("lr", "learning_rate_init") if last is MLP else ("C", "C")
    prefix = type(last).__name__.lower() + "__"
    pipeline = make_pipeline("passthrough", StandardScaler(), last)
    params = {} if weights is None else {prefix + "sample_weight": weights}
    found, _ = slopes(pipeline, [{prefix + word: value} for value in (0.01, 0.1)], (name,), params=params)
    for fold, (train, test) in enumerate(StratifiedKFold(3).split(X, Y)):
        scaled = StandardScaler().fit(X[train]).transform(X)
        by_hand, _ = slopes(last, [{word: 0.01}, {word: 0.1}], (name,), X=scaled, cv=[(train, test)], weights=weights)
        for trial, one in enumerate(by_hand):
            assert found[trial].losses[fold] == pytest.approx(one.losses[0], rel=1e-10)
            np.testing.assert_allclose(found[trial].slopes[name][fold], one.slopes[name][0], rtol=1e-8)


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_folds_whose_transformers_give_unlike_columns():
    levels = np.array([[i % 5 if i < 100 else i % 9] for i in range(150)], dtype=float)
    pipeline = make_pipeline(OneHotEncoder(handle_unknown="ignore", sparse_output=False), MLP)
    splits = list(KFold(3).split(levels))
    y = np.arange(150) % 3
    (found,), fits = slopes(pipeline, [{"mlpclassifier__learning_rate_init": 0.05}], ("lr",), X=levels, y=y, cv=splits)
    assert {fit.train.rows.X.parts[0].shape[1] for fit in fits} == {5, 9}
    for fold, (train, test) in enumerate(splits):
        expected = loss_by_hand(pipeline, {"mlpclassifier__learning_rate_init": 0.05}, train, test, X=levels, y=y)
        assert found.losses[fold] == pytest.approx(expected, rel=1e-10)


@pytest.mark.cpu  # a GPU trains estimators in single precision
@pytest.mark.parametrize("random_state", [None, np.random.RandomState(0)], ids=["none", "generator"])
def test_the_training_is_the_one_that_was_made(random_state):
    fresh = clone(MLP).set_params(random_state=random_state)
    (found,), fits = slopes(fresh, [{"learning_rate_init": 0.02}], ("lr",))
    for fit, loss in zip(fits, found.losses):
        fitted = clone(fresh)
        fit.finish(fitted)
        rows = fit.valid.index
        assert loss == pytest.approx(log_loss(Y[rows], fitted.predict_proba(X[rows])), rel=1e-9)


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_modules_of_the_user():
    net = NeuralNetClassifier(Net, optimizer="adam", max_epochs=2, batch_size=32, random_state=0)
    (found,), fits = slopes(net, [{"module__hidden": 5, "optimizer__weight_decay": 0.1}], ("lr", "weight_decay"))
    assert set(found.slopes) == {"lr", "weight_decay"} and np.isfinite(found.losses).all()
    fitted = clone(net)
    fits[0].finish(fitted)
    test = fits[0].valid.index
    assert found.losses[0] == pytest.approx(log_loss(Y[test], fitted.predict_proba(X[test])), rel=1e-9)


def test_wide_differences_look_at_the_same_loss():
    (near,), _ = slopes(MLP, [{"learning_rate_init": 0.01}], ("lr",))
    (wide,), _ = slopes(MLP, [{"learning_rate_init": 0.01}], ("lr",), mode="differences")
    np.testing.assert_allclose(wide.losses, near.losses, rtol=1e-9)
    np.testing.assert_allclose(wide.slopes["lr"], near.slopes["lr"], rtol=0.2)
    assert (wide.slopes["lr"] != near.slopes["lr"]).all()


def test_what_the_deadline_cuts_short_has_no_slopes():
    (found,), _ = slopes(MLP, [{"learning_rate_init": 0.01}], ("lr",), deadline=time.monotonic() - 1)
    assert found is None


@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_a_kink_of_units_that_only_pad_is_no_missing_derivative():
    # The padding's inputs are exactly 0.
    relu = clone(SGD).set_params(activation="relu", hidden_layer_sizes=(7, 7), learning_rate_init=0.05)
    (found,), _ = slopes(relu, [{}], ("lr",))
    expected = slope_by_hand(relu, {"learning_rate_init": 0.05}, 1e-7)
    assert 0.05 * found.slopes["lr"].mean() == pytest.approx(expected, rel=1e-5)
