import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression as Theirs
from sklearn.preprocessing import StandardScaler

import gputune
from gputune.sklearn import GridSearchCV, LogisticRegression
from searches import Callback

IRIS = load_iris(return_X_y=True)


def scaled(data, rows=None):
    X, y = data
    return StandardScaler().fit_transform(X)[:rows], y[:rows]


CANCER = scaled(load_breast_cancer(return_X_y=True))
DIGITS = scaled(load_digits(return_X_y=True), 300)
TIGHT = {"solver": "newton-cg", "tol": 1e-10, "max_iter": 10000}


def same(own, theirs, X):
    for name in ("coef_", "intercept_"):
        np.testing.assert_allclose(getattr(own, name), getattr(theirs, name), rtol=1e-6, atol=1e-6)
        assert getattr(own, name).shape == getattr(theirs, name).shape
    for method in ("predict_proba", "decision_function"):
        np.testing.assert_allclose(
            getattr(own, method)(X), getattr(theirs, method)(X), rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(own.predict(X), theirs.predict(X))
    np.testing.assert_array_equal(own.classes_, theirs.classes_)


@pytest.mark.parametrize("data", [IRIS, CANCER, DIGITS], ids=["iris", "cancer", "digits"])
@pytest.mark.parametrize(
    "params", [{}, {"C": 0.01}, {"C": 30.0}, {"fit_intercept": False}, {"class_weight": "balanced"}]
)
def test_the_solution_is_scikit_learns(data, params):
    X, y = data
    same(LogisticRegression(**params).fit(X, y), Theirs(**params, **TIGHT).fit(X, y), X)


@pytest.mark.parametrize("class_weight", [None, {0: 2.0, 1: 0.5, 2: 1.0}])
def test_weights_count_as_in_scikit_learn(class_weight):
    X, y = IRIS
    weights = np.random.default_rng(0).uniform(0, 3, len(y))
    own = LogisticRegression(class_weight=class_weight)
    theirs = Theirs(class_weight=class_weight, **TIGHT)
    same(own.fit(X, y, sample_weight=weights), theirs.fit(X, y, sample_weight=weights), X)


def test_balanced_classes_count_the_weights_of_their_rows():
    X, y = IRIS
    weights = np.where(y == 0, 3.0, 1.0)
    own = LogisticRegression(class_weight="balanced").fit(X, y, sample_weight=weights)
    even = LogisticRegression(class_weight={0: 5 / 9, 1: 5 / 3, 2: 5 / 3}).fit(
        X, y, sample_weight=weights
    )
    np.testing.assert_allclose(own.coef_, even.coef_, rtol=1e-8, atol=1e-10)


def test_the_older_word_for_the_penalty(monkeypatch):
    X, y = CANCER
    lasso = LogisticRegression(l1_ratio=1.0, C=0.1).fit(X, y)
    np.testing.assert_array_equal(
        LogisticRegression(penalty="l1", C=0.1).fit(X, y).coef_, lasso.coef_
    )
    assert (lasso.coef_ == 0).mean() > 0.5
    ridge = LogisticRegression(C=0.1).fit(X, y)
    np.testing.assert_array_equal(
        LogisticRegression(penalty="l2", C=0.1).fit(X, y).coef_, ridge.coef_
    )
    net, word = (
        LogisticRegression(l1_ratio=0.5, penalty=p).fit(X, y) for p in ("auto", "elasticnet")
    )
    np.testing.assert_array_equal(word.coef_, net.coef_)
    # the default before scikit-learn 1.8
    monkeypatch.setattr("gputune.sklearn.logistic._PENALTY", "l2")
    np.testing.assert_array_equal(
        LogisticRegression(l1_ratio=0.5, penalty="l2").fit(X, y).coef_, net.coef_
    )
    # Without a penalty, what can be separated has no optimum.
    X, y = make_classification(200, 5, flip_y=0.4, random_state=0)
    free = LogisticRegression(C=np.inf).fit(X, y)
    none = LogisticRegression(penalty=None).fit(X, y)
    np.testing.assert_array_equal(none.coef_, free.coef_)
    with pytest.warns(
        UserWarning, match="penalty=None will ignore the C and l1_ratio parameters, got C=3.0"
    ):
        LogisticRegression(C=3.0, penalty=None).fit(X, y)


def test_it_warns_where_it_did_not_converge():
    with pytest.warns(
        ConvergenceWarning, match="did not converge in 1 Newton steps .*tol=1e-10"
    ) as caught:
        LogisticRegression(max_iter=1).fit(*CANCER)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("params", [{"C": 0.1}, {"C": 0.01, "dual": True, "tol": 0.1}], ids=str)
def test_liblinear_is_scikit_learns_own_fit(params):
    own, theirs = (
        kind(solver="liblinear", random_state=0, **params) for kind in (LogisticRegression, Theirs)
    )
    X, y = CANCER
    np.testing.assert_array_equal(own.fit(X, y).predict_proba(X), theirs.fit(X, y).predict_proba(X))
    np.testing.assert_array_equal(own.predict_log_proba(X), theirs.predict_log_proba(X))


@pytest.mark.skipif(not hasattr(LogisticRegression, "set_callbacks"), reason="since 1.9")
def test_callbacks_of_its_own_hear_of_the_fit():
    callback = Callback()
    LogisticRegression().set_callbacks(callback).fit(*CANCER)
    assert callback.heard


REFUSED = [
    ({"C": 0}, "The 'C' parameter of LogisticRegression must be"),
    ({"l1_ratio": 2}, "The 'l1_ratio' parameter"),
    ({"penalty": "l3"}, "The 'penalty' parameter .* Got 'l3'"),
    (
        {"penalty": "l1", "l1_ratio": 0.5},
        "penalty='l1' contradicts l1_ratio=0.5",
    ),
    ({"class_weight": "even"}, "The 'class_weight' parameter"),
    ({"class_weight": {0: 1.0, 9: 1.0}}, "are not in class_weight"),
    ({"class_weight": {0: -1.0, 1: 1.0, 2: 1.0}}, "must give no row a negative weight"),
    ({"fit_intercept": "no"}, "The 'fit_intercept' parameter"),
    ({"tol": 0}, "The 'tol' parameter"),
    ({"max_iter": -1}, "The 'max_iter' parameter"),
    ({"device": "tpu"}, "device must be"),
    ({"solver": "newton"}, "The 'solver' parameter of LogisticRegression must be a str among"),
]


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=[str(params) for params, _ in REFUSED])
def test_what_cannot_be_meant_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        LogisticRegression(**params).fit(*IRIS)


def test_one_of_two_classes_whose_rows_weigh_nothing_is_never_predicted():
    X = IRIS[0][:100]
    y = IRIS[1][:100]
    two = LogisticRegression().fit(X, y, sample_weight=(y == 1).astype(float))
    assert (two.predict(X) == 1).all()
    np.testing.assert_array_equal(two.predict_log_proba(X[:2]), [[-np.inf, 0]] * 2)


@pytest.mark.parametrize("size", [1e25, 1e160])
def test_one_huge_value_ends_no_search(size):
    X, y = load_iris(return_X_y=True)
    X[7, 2] = size
    search = GridSearchCV(LogisticRegression(), {"C": [1e-60, 1.0]}, cv=3, error_score="raise").fit(
        X, y
    )
    assert search.best_score_ > 0.9
    study = gputune.tune("logistic", X, y, numbers="none", n_trials=1, cv=3, verbose=0)
    assert study.best_score > 0.9
