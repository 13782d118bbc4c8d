"""Words that scripts of scikit-learn and skorch have: taken where they change nothing, refused with what to do."""

import numpy as np
import pytest
from sklearn import linear_model, neural_network
from sklearn.base import clone
from sklearn.datasets import load_iris

from face_modules import Net
from gputune.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
    NeuralNetRegressor,
)

X, Y = load_iris(return_X_y=True)


def mlp(**params):
    return MLPClassifier((8,), max_iter=2, random_state=0, **params)


def net(**params):
    return NeuralNetClassifier(Net, max_epochs=2, random_state=0, **params)


@pytest.mark.parametrize(
    ("make", "harmless"),
    [
        (mlp, {"verbose": 10, "shuffle": True, "early_stopping": False, "warm_start": False}),
        (mlp, {"verbose": True, "shuffle": np.True_}),
        (LogisticRegression, {"solver": "lbfgs", "n_jobs": -1, "verbose": 1, "warm_start": True}),
        (LogisticRegression, {"solver": "saga"}),
        (net, {"verbose": 1, "train_split": None}),
        (net, {"train_split": False, "callbacks": []}),
    ],
)
def test_words_that_change_nothing_are_taken(make, harmless):
    plain, said = make().fit(X, Y), make(**harmless).fit(X, Y)
    np.testing.assert_array_equal(said.predict_proba(X), plain.predict_proba(X))
    assert {name: clone(said).get_params()[name] for name in harmless} == harmless


@pytest.mark.parametrize(
    ("make", "params", "error"),
    [
        (LogisticRegression, {"solver": "newton"}, "The 'solver' parameter of LogisticRegression must be a str among"),
        (net, {"train_split": 5}, "NeuralNetClassifier has no train_split=5: every row is trained on"),
        (net, {"callbacks": [print]}, "has no callbacks=.*: an estimator calls none; leave them out"),
    ],
)  # fmt: skip
def test_values_that_would_change_the_result_are_refused(make, params, error):
    estimator = make(**params)  # as everywhere in scikit-learn, ``fit`` is who looks
    with pytest.raises(ValueError, match=error):
        estimator.fit(X, Y)


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        (MLPClassifier, "width", r"no parameter 'width': give hidden_layer_sizes, \(64, 64\) for two layers"),
        (MLPClassifier, "depth", "give hidden_layer_sizes"),
        (MLPRegressor, "lr", "give learning_rate_init"),
        (MLPClassifier, "max_epochs", "give max_iter"),
        (MLPClassifier, "optimizer", "give solver"),
        (MLPClassifier, "schedule", "give learning_rate"),
        (LogisticRegression, "weight_decay", "give C, the inverse strength"),
        (LogisticRegression, "optimizer", "the objective has one solution"),
        (LogisticRegression, "multi_class", r"one softmax; leave it out, or use sklearn.multiclass"),
        (NeuralNetClassifier, "warm_start", "fit always begins anew; train longer with max_epochs"),
        (NeuralNetRegressor, "iterator_train__shuffle", "NeuralNetRegressor has no parameter 'iterator_tr"),
        (NeuralNetClassifier, "optimizer__lr", "give lr"),
        (NeuralNetClassifier, "optimizer__nesterov", "give optimizer='nesterov'"),
        (NeuralNetClassifier, "learning_rate_init", "give lr"),
        (NeuralNetRegressor, "max_iter", "give max_epochs"),
        (NeuralNetClassifier, "solver", "give optimizer"),
        (NeuralNetClassifier, "alpha", "give optimizer__weight_decay"),
        (NeuralNetClassifier, "momentum", "give optimizer__momentum"),
    ],
)  # fmt: skip
def test_words_without_a_counterpart_are_refused(kind, name, error):
    first = [Net] if "NeuralNet" in kind.__name__ else []
    with pytest.raises(InputError, match=error):
        kind(*first, **{name: 1})
    with pytest.raises(InputError, match=error):
        kind(*first).set_params(**{name: 1})


class Tokens(Net):
    def __init__(self, vocabulary, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def test_what_a_module_lacks_is_asked_for_as_a_parameter():
    with pytest.raises(InputError, match=r"asks for 'vocabulary', .*: pass module__vocabulary=\.\.\., give it"):
        NeuralNetClassifier(Tokens).fit(X, Y)


def test_a_search_over_such_a_word_says_so():
    with pytest.raises(InputError, match="MLPClassifier has no parameter 'lr': give learning_rate_init"):
        GridSearchCV(mlp(), {"lr": [1e-3, 1e-4]}, cv=2).fit(X, Y)


def test_every_parameter_of_scikit_learns_is_ours_or_refused():
    pairs = [
        (MLPClassifier, neural_network.MLPClassifier),
        (MLPRegressor, neural_network.MLPRegressor),
        (LogisticRegression, linear_model.LogisticRegression),
    ]
    for ours, theirs in pairs:
        known = {*ours().get_params(), *ours._refused}
        assert set(theirs().get_params()) <= known


def test_a_misspelt_parameter_is_named_as_of_the_class():
    with pytest.raises(TypeError, match=r"^MLPClassifier has no parameter 'alhpa'. Did you mean 'alpha'\?$"):
        MLPClassifier(alhpa=3)
    with pytest.raises(TypeError, match=r"^LogisticRegression has no parameter 'ftrs'.$"):
        LogisticRegression(ftrs=3)


class Wider(MLPClassifier):
    """A user's estimator, with a constructor of its own."""

    def __init__(self, factor=1, tol=0.1):
        super().__init__(hidden_layer_sizes=8 * factor, max_iter=1)
        self.factor, self.tol = factor, tol


def test_a_subclass_may_have_words_of_its_own():
    assert Wider(factor=2, tol=1.0).set_params(tol=0.5).hidden_layer_sizes == 16
    with pytest.raises(TypeError, match="Wider has no parameter 'alpha'"):
        Wider(alpha=1.0)
