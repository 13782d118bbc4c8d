"""What the parameters of an MLP mean to the engine."""

import numpy as np
import pytest

from gputune.errors import InputError
from gputune.sklearn import MLPClassifier, MLPRegressor


def recipe(**params):
    return MLPClassifier(**params, random_state=0)._recipe(lambda: 1)


def test_the_defaults_are_those_of_tune():
    r = recipe()
    expected = {
        "width": 128,
        "depth": 2,
        "lr": 1e-3,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "batch_size": 200,
        "schedule": "constant",
    }
    assert {k: r.config[k] for k in expected} == expected
    assert (r.epochs, r.seed, r.alpha, r.kind) == (50, 0, None, "mlp")


def test_scikit_learns_words_are_understood():
    r = recipe(hidden_layer_sizes=(64, 64, 64), learning_rate_init=0.03, max_iter=7, learning_rate="cosine")
    assert {k: r.config[k] for k in ("width", "depth", "lr", "schedule")} == {
        "width": 64, "depth": 3, "lr": 0.03, "schedule": "cosine",
    }  # fmt: skip
    assert r.epochs == 7


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
        ({"alpha": 0.1}, "adam", 0),
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
    assert recipe(weight_decay=0, alpha=0.0, solver="sgd").alpha == 0


REFUSED = [
    ({"weight_decay": 0.1, "alpha": 0.1}, "weight_decay=0.1 and alpha=0.1 are two penalties"),
    ({"solver": "adamw", "alpha": 0.1}, "alpha=0.1 is an L2 penalty, and the decay of solver='adamw'"),
    ({"hidden_layer_sizes": (64, 32)}, r"equal layers, got \(64, 32\).*NeuralNetClassifier"),
    ({"hidden_layer_sizes": ()}, "LogisticRegression"),
    ({"hidden_layer_sizes": (3.5,)}, "hidden_layer_sizes must be one layer's size or a tuple"),
    ({"solver": "lbfgs"}, "solver must be one of sgd, adam, adamw, .* got 'lbfgs': there is no line search"),
    ({"solver": ["adam"]}, "solver must be one of"),
    ({"solver": "nesterov"}, "got 'nesterov': 'sgd' has Nesterov's momentum"),
    ({"solver": "sgd", "nesterovs_momentum": "no"}, "nesterovs_momentum must be True or False, got 'no'"),
    ({"activation": "logistic"}, "use 'tanh'"),
    ({"activation": "identity"}, "LogisticRegression"),
    ({"activation": "sine"}, "activation must be one of relu"),
    (
        {"learning_rate": "invscaling"},
        "'invscaling' is not among constant, .*: use 'cosine', or a solver",
    ),
    ({"learning_rate": "step"}, "learning_rate must be one of constant, cosine, linear"),
    ({"max_iter": 0}, "max_iter must be an integer >= 1, got 0"),
    ({"max_iter": 2.5}, "max_iter must be an integer >= 1, got 2.5"),
    ({"learning_rate_init": -1}, "learning_rate_init must be a finite number > 0"),
    ({"alpha": -1}, "alpha must be a finite number >= 0"),
    ({"momentum": 1}, "momentum must be a number in"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1"),
    ({"dropout": 1}, "dropout must be a number in"),
    ({"device": "tpu"}, "device must be 'auto' or one"),
]


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=[str(params) for params, _ in REFUSED])
def test_what_cannot_be_meant_is_refused(params, message):
    with pytest.raises(InputError, match=message):
        MLPRegressor(**params).fit([[0.0], [1.0]], [0.0, 1.0])


@pytest.mark.parametrize("state", ["zero", 2**32, np.random.default_rng(0)])
def test_a_random_state_is_what_scikit_learn_takes(state):
    with pytest.raises(ValueError):
        MLPRegressor(random_state=state).fit([[0.0], [1.0]], [0.0, 1.0])


def test_random_states_draw_as_in_scikit_learn():
    def fitted(state):
        model = MLPRegressor((4, 4), max_iter=1, random_state=state).fit([[0.0], [1.0]], [0.0, 1.0])
        return model.predict([[0.5]])

    state = np.random.RandomState(3)
    first, second = fitted(state), fitted(state)
    assert first != second
    assert fitted(np.random.RandomState(3)) == first
    np.random.seed(5)
    fresh = fitted(None)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    fitted(0)
    assert (np.random.get_state()[1] == before).all()  # an integer takes nothing from the global state
    assert fitted(None) == fresh
