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
    }
    assert {k: r.config[k] for k in expected} == expected
    assert (r.epochs, r.seed, r.alpha, r.kind) == (50, 0, None, "mlp")


def test_scikit_learns_words_mean_the_same():
    r = recipe(hidden_layer_sizes=(64, 64, 64), learning_rate_init=0.03, max_iter=7, solver="adam")
    own = recipe(width=64, depth=3, lr=0.03, max_epochs=7, optimizer="adam")
    assert r == own


@pytest.mark.parametrize("sizes", [32, (32,), [32], np.array([32])])
def test_one_layer_may_be_written_as_scikit_learn_writes_it(sizes):
    assert recipe(hidden_layer_sizes=sizes) == recipe(width=32, depth=1)


def test_scikit_learns_sgd_has_nesterovs_momentum():
    config = recipe(solver="sgd").config
    assert (config["optimizer"], config["momentum"]) == ("nesterov", 0.9)
    assert recipe(solver="sgd", momentum=0.5).config["momentum"] == 0.5


def test_alpha_is_an_l2_penalty_of_a_minibatch():
    r = recipe(alpha=0.6)
    assert r.config["optimizer"] == "adam"
    assert r.config_for(120, 120.0)["weight_decay"] == pytest.approx(
        0.6 / 120
    )  # batch_size="auto" is all rows
    assert r.config_for(1000, 1000.0)["weight_decay"] == pytest.approx(0.6 / 200)
    assert recipe(alpha=0.6, batch_size=30).config_for(1000, 500.0)["weight_decay"] == pytest.approx(0.6 / 15)


def test_two_words_that_agree_are_one():
    assert recipe(lr=0.1, learning_rate_init=0.1) == recipe(lr=0.1)
    assert recipe(width=8, depth=2, hidden_layer_sizes=(8, 8)) == recipe(width=8, depth=2)
    assert recipe(weight_decay=0, alpha=0.0, optimizer="sgd").alpha == 0


REFUSED = [
    (
        {"lr": 0.1, "learning_rate_init": 0.2},
        "lr=0.1 and learning_rate_init=0.2 say the same thing and differ",
    ),
    ({"max_epochs": 3, "max_iter": 4}, "max_epochs=3 and max_iter=4 say the same"),
    ({"width": 128, "hidden_layer_sizes": 64}, "width=128 and hidden_layer_sizes=64 say the same"),
    ({"depth": 1, "hidden_layer_sizes": (64, 64)}, r"depth=1 and hidden_layer_sizes=\(64, 64\) say the same"),
    ({"optimizer": "sgd", "solver": "sgd"}, "'sgd' is the optimizer 'nesterov'"),
    ({"weight_decay": 0.1, "alpha": 0.1}, "weight_decay=0.1 and alpha=0.1 are two penalties"),
    ({"optimizer": "adamw", "alpha": 0.1}, "alpha=0.1 is an L2 penalty, and the decay of optimizer='adamw'"),
    ({"hidden_layer_sizes": (64, 32)}, r"equal layers, got \(64, 32\).*NeuralNetClassifier"),
    ({"hidden_layer_sizes": ()}, "LogisticRegression"),
    ({"hidden_layer_sizes": (3.5,)}, "hidden_layer_sizes must be one layer's size or a tuple"),
    ({"solver": "lbfgs"}, "solver must be one of sgd, adam, got 'lbfgs'"),
    ({"solver": ["adam"]}, "solver must be one of"),
    ({"activation": "logistic"}, "use 'tanh'"),
    ({"activation": "identity"}, "LogisticRegression"),
    ({"activation": "sine"}, "activation must be one of relu"),
    ({"max_iter": 0}, "max_iter must be an integer >= 1, got 0"),
    ({"max_epochs": 2.5}, "max_epochs must be an integer >= 1, got 2.5"),
    ({"learning_rate_init": -1}, "learning_rate_init must be a finite number > 0"),
    ({"alpha": -1}, "alpha must be a finite number >= 0"),
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
        return (
            MLPRegressor(width=4, max_epochs=1, random_state=state)
            .fit([[0.0], [1.0]], [0.0, 1.0])
            .predict([[0.5]])
        )

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
