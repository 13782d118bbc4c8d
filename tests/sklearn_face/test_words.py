"""What the parameters of estimators mean to the engine, and words of scikit-learn and skorch that mean nothing here."""

import inspect
import re

import numpy as np
import pytest
from sklearn import linear_model, neural_network
from sklearn.base import clone
from sklearn.datasets import load_iris

from face_modules import Net
from gputune.errors import InputError
from gputune.sklearn import GridSearchCV, LogisticRegression, MLPClassifier, MLPRegressor, NeuralNetClassifier
from gputune.sklearn.recipe import Patience

IRIS = load_iris(return_X_y=True)
LINE = [[0.0], [1.0]], [0.0, 1.0]


def recipe(**params):
    return MLPClassifier(**params, random_state=0)._recipe(lambda: 1)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(MLPClassifier, neural_network.MLPClassifier), (MLPRegressor, neural_network.MLPRegressor)]
)
def test_the_defaults_are_scikit_learns(ours, theirs):
    extras = {"dropout": 0.0, "weight_decay": None, "device": "auto"}
    assert ours().get_params() == theirs().get_params() | extras
    assert list(inspect.signature(ours).parameters)[:2] == list(inspect.signature(theirs).parameters)[:2]
    r = recipe()
    expected = {"width": 100, "depth": 1, "lr": 1e-3, "optimizer": "adam", "batch_size": 200, "schedule": "constant"}
    assert r.config.items() >= expected.items()
    assert (r.epochs, r.seed, r.alpha, r.kind, r.patience) == (200, 0, 1e-4, "mlp", Patience(1e-4, 10))


def test_scikit_learns_words_are_understood():
    r = recipe(hidden_layer_sizes=(64, 64, 64), learning_rate_init=0.03, max_iter=7, learning_rate="cosine")
    words = ("width", "depth", "lr", "schedule")
    assert [r.config[word] for word in words] == [64, 3, 0.03, "cosine"] and r.epochs == 7


@pytest.mark.parametrize("sizes", [32, [32], np.array([32])])
def test_one_layer_may_be_written_as_scikit_learn_writes_it(sizes):
    assert recipe(hidden_layer_sizes=sizes) == recipe(hidden_layer_sizes=(32,))


@pytest.mark.parametrize(
    ("params", "optimizer", "momentum"),
    [
        ({"solver": "sgd"}, "nesterov", 0.9),
        ({"solver": "sgd", "momentum": 0.5}, "nesterov", 0.5),
        ({"solver": "sgd", "nesterovs_momentum": False}, "sgd", 0.9),
        ({"solver": "sgdhd"}, "nesterovhd", 0.9),
        ({"solver": "sgdhd", "nesterovs_momentum": np.False_, "momentum": 0}, "sgdhd", 0),
        ({"solver": "adam", "momentum": 0.5}, "adam", 0),
        ({"solver": "adamwhd"}, "adamwhd", 0),
        ({"learning_rate": "invscaling"}, "adam", 0),  # which is for "sgd" alone
    ],
)
def test_a_solver_has_scikit_learns_momentum(params, optimizer, momentum):
    config = recipe(**params).config
    assert (config["optimizer"], config["momentum"]) == (optimizer, momentum)


def test_alpha_is_an_l2_penalty_of_a_minibatch():
    r = recipe(alpha=0.6)
    # batch_size="auto" is all rows where they are few
    assert r.config_for(120, 120.0)["weight_decay"] == pytest.approx(0.6 / 120)
    assert r.config_for(1000, 1000.0)["weight_decay"] == pytest.approx(0.6 / 200)
    assert recipe(alpha=0.6, batch_size=30).config_for(1000, 500.0)["weight_decay"] == pytest.approx(0.6 / 15)
    assert recipe(weight_decay=0, alpha=0.0, solver="sgd").alpha is None
    assert recipe(weight_decay=0.1).alpha is recipe(solver="adamw").alpha is None


REFUSED = [
    ({"weight_decay": 0.1, "alpha": 0.1}, "weight_decay=0.1 and alpha=0.1 are two penalties"),
    ({"solver": "adamw", "alpha": 0.1}, "alpha=0.1 is an L2 penalty, and the decay of solver='adamw'"),
    ({"hidden_layer_sizes": (3.5,)}, "hidden_layer_sizes must be one layer's size or a tuple"),
    ({"solver": ["adam"]}, "'solver' parameter of MLPRegressor must be a str among"),
    ({"activation": "sine"}, "'activation' parameter of MLPRegressor must be a str among"),
    ({"learning_rate": "step"}, "'learning_rate' parameter"),
    ({"max_iter": 0}, "'max_iter' parameter"),
    ({"momentum": 1}, "momentum must be a number in"),
    ({"dropout": 1}, "'dropout' parameter"),
    ({"weight_decay": -1}, "'weight_decay' parameter"),
    ({"device": "tpu"}, "device must be 'auto' or one"),
    ({"solver": "lbfgs", "dropout": 0.5}, "dropout=0.5 is gputune's own, and solver='lbfgs' is left to scikit-le"),
    ({"activation": "logistic", "weight_decay": 0.5}, "weight_decay=0.5 is gputune's own, and activation='logistic'"),
    ({"warm_start": True, "activation": "gelu"}, "activation='gelu' is gputune's own, and warm_start=True"),
    ({"shuffle": False, "device": "cuda"}, "device='cuda' is gputune's own, and shuffle=False"),
    ({"early_stopping": True, "solver": "adamw"}, "solver='adamw' is gputune's own, and early_stopping=True"),
    ({"solver": "sgd", "learning_rate": "one_cycle", "loss": "poisson"}, "and loss='poisson' is left to"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=[str(params) for params, _ in REFUSED])
def test_what_cannot_be_meant_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        MLPRegressor(**params).fit(*LINE)


@pytest.mark.parametrize("state", ["zero", 2**32, np.random.default_rng(0)])
def test_a_random_state_is_what_scikit_learn_takes(state):
    with pytest.raises(ValueError):
        MLPRegressor(random_state=state).fit(*LINE)


def test_random_states_draw_as_in_scikit_learn():
    def fitted(state):
        return MLPRegressor(hidden_layer_sizes=4, max_iter=1, random_state=state).fit(*LINE).predict([[0.5]])

    state = np.random.RandomState(3)
    first, second = fitted(state), fitted(state)
    assert fitted(np.random.RandomState(3)) == first != second
    np.random.seed(5)
    fresh = fitted(None)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    fitted(0)
    assert (np.random.get_state()[1] == before).all()  # an integer takes nothing from the global state
    assert fitted(None) == fresh


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
    plain, said = make().fit(*IRIS), make(**harmless).fit(*IRIS)
    np.testing.assert_array_equal(said.predict_proba(IRIS[0]), plain.predict_proba(IRIS[0]))
    assert {name: clone(said).get_params()[name] for name in harmless} == harmless


@pytest.mark.parametrize(
    ("estimator", "error"),
    [
        (LogisticRegression(solver="newton"), "The 'solver' parameter of LogisticRegression must be a str among"),
        (net(train_split=5), "NeuralNetClassifier has no train_split=5: every row is trained on"),
        (net(callbacks=[print]), "has no callbacks=.*: an estimator calls none; leave them out"),
    ],
)
def test_values_that_would_change_the_result_are_refused_by_fit(estimator, error):
    with pytest.raises(ValueError, match=error):
        estimator.fit(*IRIS)


NO_COUNTERPART = [
    (MLPClassifier, "width depth lr max_epochs optimizer schedule"),
    (MLPRegressor, "width depth lr max_epochs optimizer schedule"),
    (LogisticRegression, "multi_class optimizer lr max_epochs weight_decay"),
    (
        NeuralNetClassifier,
        "warm_start iterator_train__shuffle optimizer__nesterov optimizer__lr learning_rate_init max_iter solver alpha "
        "weight_decay momentum",
    ),
]


@pytest.mark.parametrize(("kind", "words"), NO_COUNTERPART)
def test_words_without_a_counterpart_are_refused(kind, words):
    first = [Net] if kind is NeuralNetClassifier else []
    assert set(words.split()) == set(kind._refused)
    for name, remedy in kind._refused.items():
        error = re.escape(f"{kind.__name__} has no parameter {name!r}: {remedy}.")
        with pytest.raises(InputError, match=error):
            kind(*first, **{name: 1})
        with pytest.raises(InputError, match=error):
            kind(*first).set_params(**{name: 1})


class Tokens(Net):
    def __init__(self, vocabulary, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def test_what_a_module_lacks_and_a_search_gives_too_much_is_named():
    with pytest.raises(InputError, match=r"asks for 'vocabulary', .*: pass module__vocabulary=\.\.\., give it"):
        NeuralNetClassifier(Tokens).fit(*IRIS)
    with pytest.raises(InputError, match="MLPClassifier has no parameter 'lr': give learning_rate_init"):
        GridSearchCV(mlp(), {"lr": [1e-3, 1e-4]}, cv=2).fit(*IRIS)


def test_every_parameter_of_scikit_learns_is_ours_or_refused():
    theirs = neural_network.MLPClassifier, neural_network.MLPRegressor, linear_model.LogisticRegression
    for ours, other in zip((MLPClassifier, MLPRegressor, LogisticRegression), theirs):
        assert other().get_params().keys() <= ours().get_params().keys() | ours._refused.keys()


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
