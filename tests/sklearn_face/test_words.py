"""The translation of estimators' parameters, and parameters of scikit-learn and skorch without a
meaning here.
"""

import inspect
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn import linear_model, model_selection, neural_network
from sklearn.base import clone
from sklearn.datasets import load_iris, make_regression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import gputune.sklearn
from face_modules import Net, OneNumber, PlainNet, Probabilities
from gputune.ground.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    NeuralNetClassifier,
    NeuralNetRegressor,
)
from gputune.sklearn.recipe import Patience

IRIS = load_iris(return_X_y=True)
LINE = [[0.0], [1.0]], [0.0, 1.0]


HOMES = {
    "dataset": {"SliceDict"},
    "descent": {"HypergradientSearchCV"},
    "halving": {"HalvingRandomSearchCV"},
    "logistic": {"LogisticRegression"},
    "mlp": {"MLPClassifier", "MLPRegressor"},
    "nested": {"NestedScores", "nested_cv"},
    "net": {"NeuralNet", "NeuralNetClassifier", "NeuralNetRegressor"},
    "search": {"GridSearchCV", "RandomizedSearchCV"},
}


def test_pickles_find_their_classes_where_they_were_written():
    homes = {name: getattr(gputune.sklearn, name).__module__ for name in gputune.sklearn.__all__}
    assert homes == {
        name: f"gputune.sklearn.{home}" for home, names in HOMES.items() for name in names
    }


def recipe(**params):
    return MLPClassifier(**params, random_state=0)._recipe(lambda: 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(MLPClassifier, neural_network.MLPClassifier), (MLPRegressor, neural_network.MLPRegressor)],
)
def test_the_defaults_are_scikit_learns(ours, theirs):
    extras = {"dropout": 0.0, "weight_decay": None, "device": "auto"}
    assert ours().get_params() == theirs().get_params() | extras
    assert (
        list(inspect.signature(ours).parameters)[:2]
        == list(inspect.signature(theirs).parameters)[:2]
    )
    r = recipe()
    expected = {
        "width": 100,
        "depth": 1,
        "lr": 1e-3,
        "optimizer": "adam",
        "batch_size": 200,
        "schedule": "constant",
    }
    assert r.config.items() >= expected.items()
    assert (r.epochs, r.seed, r.alpha, r.kind, r.patience) == (
        200,
        0,
        1e-4,
        "mlp",
        Patience(1e-4, 10),
    )
    r = recipe(
        hidden_layer_sizes=(64, 64, 64), learning_rate_init=0.03, max_iter=7, learning_rate="cosine"
    )
    assert (
        r.config.items() >= {"width": 64, "depth": 3, "lr": 0.03, "schedule": "cosine"}.items()
        and r.epochs == 7
    )


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
    assert recipe(alpha=0.6, batch_size=30).config_for(1000, 500.0)[
        "weight_decay"
    ] == pytest.approx(0.6 / 15)
    assert recipe(weight_decay=0, alpha=0.0, solver="sgd").alpha is None
    assert recipe(weight_decay=0.1).alpha is recipe(solver="adamw").alpha is None


REFUSED = [
    ({"weight_decay": 0.1, "alpha": 0.1}, "weight_decay=0.1 and alpha=0.1 set the same penalty"),
    (
        {"solver": "adamw", "alpha": 0.1},
        "alpha=0.1 is an L2 penalty, but solver='adamw' uses a decoupled",
    ),
    ({"hidden_layer_sizes": (3.5,)}, "hidden_layer_sizes must be the size of one layer or a tuple"),
    ({"solver": ["adam"]}, "'solver' parameter of MLPRegressor must be a str among"),
    ({"activation": "sine"}, "'activation' parameter of MLPRegressor must be a str among"),
    ({"learning_rate": "step"}, "'learning_rate' parameter"),
    ({"max_iter": 0}, "'max_iter' parameter"),
    ({"momentum": 1}, "momentum must be a number in"),
    ({"dropout": 1}, "'dropout' parameter"),
    ({"weight_decay": -1}, "'weight_decay' parameter"),
    ({"device": "tpu"}, "device must be 'auto' or a device"),
    (
        {"solver": "lbfgs", "dropout": 0.5},
        "dropout=0.5 is supported only by gputune's training, but solver='lbfgs' needs scikit-le",
    ),
    (
        {"activation": "logistic", "weight_decay": 0.5},
        "weight_decay=0.5 is supported only by gputune's training, but activation='logistic'",
    ),
    (
        {"warm_start": True, "activation": "gelu"},
        "activation='gelu' is supported only by gputune's training, but warm_start=True",
    ),
    (
        {"shuffle": False, "device": "cuda"},
        "device='cuda' is supported only by gputune's training, but shuffle=False",
    ),
    (
        {"early_stopping": True, "solver": "adamw"},
        "solver='adamw' is supported only by gputune's training, but early_stopping=True",
    ),
    (
        {"solver": "sgd", "learning_rate": "one_cycle", "loss": "poisson"},
        "but loss='poisson' needs",
    ),
]


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
        return (
            MLPRegressor(hidden_layer_sizes=4, max_iter=1, random_state=state)
            .fit(*LINE)
            .predict([[0.5]])
        )

    state = np.random.RandomState(3)
    first = fitted(state)
    second = fitted(state)
    assert fitted(np.random.RandomState(3)) == first != second
    np.random.seed(5)
    fresh = fitted(None)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    fitted(0)
    # an integer takes nothing from the global state
    assert (np.random.get_state()[1] == before).all()
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
    plain = make().fit(*IRIS)
    said = make(**harmless).fit(*IRIS)
    np.testing.assert_array_equal(said.predict_proba(IRIS[0]), plain.predict_proba(IRIS[0]))
    assert {name: clone(said).get_params()[name] for name in harmless} == harmless


NO_COUNTERPART = [
    (MLPClassifier, "width depth lr max_epochs optimizer schedule"),
    (MLPRegressor, "width depth lr max_epochs optimizer schedule"),
    (LogisticRegression, "multi_class optimizer lr max_epochs weight_decay"),
    (
        NeuralNetClassifier,
        "warm_start iterator_train__shuffle optimizer__nesterov optimizer__lr learning_rate_init "
        "max_iter solver alpha weight_decay momentum",
    ),
]


@pytest.mark.parametrize(("kind", "words"), NO_COUNTERPART)
def test_words_without_a_counterpart_are_refused(kind, words):
    first = [Net] if kind is NeuralNetClassifier else []
    assert set(words.split()) == set(kind._refused)
    for name, remedy in kind._refused.items():
        error = re.escape(f"{kind.__name__} has no parameter {name!r}. {remedy}")
        with pytest.raises(InputError, match=error):
            kind(*first, **{name: 1})
        with pytest.raises(InputError, match=error):
            kind(*first).set_params(**{name: 1})


class Tokens(Net):
    def __init__(self, vocabulary, n_features, n_outputs):
        super().__init__(n_features, n_outputs)


def test_what_a_module_lacks_and_a_search_gives_too_much_is_named():
    with pytest.raises(
        InputError, match=r"requires 'vocabulary', .* Pass module__vocabulary=\.\.\., give it"
    ):
        NeuralNetClassifier(Tokens).fit(*IRIS)
    with pytest.raises(
        InputError, match="MLPClassifier has no parameter 'lr'. Pass learning_rate_init"
    ):
        GridSearchCV(mlp(), {"lr": [1e-3, 1e-4]}, cv=2).fit(*IRIS)


def test_every_parameter_of_scikit_learns_is_ours_or_refused():
    theirs = (
        neural_network.MLPClassifier,
        neural_network.MLPRegressor,
        linear_model.LogisticRegression,
    )
    for ours, other in zip((MLPClassifier, MLPRegressor, LogisticRegression), theirs):
        assert other().get_params().keys() <= ours().get_params().keys() | ours._refused.keys()


def test_a_misspelt_parameter_is_named_as_of_the_class():
    with pytest.raises(
        TypeError, match=r"^MLPClassifier has no parameter 'alhpa'. Did you mean 'alpha'\?$"
    ):
        MLPClassifier(alhpa=3)
    with pytest.raises(TypeError, match=r"^LogisticRegression has no parameter 'ftrs'.$"):
        LogisticRegression(ftrs=3)


class Wider(MLPClassifier):
    """A user's estimator, with a constructor of its own."""

    def __init__(self, factor=1, tol=0.1):
        super().__init__(hidden_layer_sizes=8 * factor, max_iter=1)
        self.factor = factor
        self.tol = tol


def test_a_subclass_may_have_words_of_its_own():
    assert Wider(factor=2, tol=1.0).set_params(tol=0.5).hidden_layer_sizes == 16
    with pytest.raises(TypeError, match="Wider has no parameter 'alpha'"):
        Wider(alpha=1.0)


def net_recipe(**params):
    return NeuralNetClassifier(**{"module": Net, **params})._recipe(lambda: 1)


def test_parameters_of_the_module_are_parameters_of_the_estimator():
    net = NeuralNetClassifier(Net, module__hidden=5, optimizer__weight_decay=0.1)
    assert net.get_params()["module__hidden"] == 5
    assert net.set_params(module__dropout=0.5, optimizer__momentum=0.9, lr=0.2) is net
    expected = {"module__hidden": 5, "module__dropout": 0.5, "optimizer__momentum": 0.9, "lr": 0.2}
    copy = clone(net)
    for estimator in (net, copy, pickle.loads(pickle.dumps(net))):
        assert {k: estimator.get_params()[k] for k in expected} == expected
    copy.set_params(module__hidden=9)
    assert net.get_params()["module__hidden"] == 5
    assert "module__hidden=5" in repr(net)
    with pytest.raises(ValueError, match="Invalid parameter 'nesterov'"):
        net.set_params(nesterov=True)
    with pytest.raises(TypeError, match="NeuralNetClassifier has no parameter 'hidden'.*module__"):
        NeuralNetClassifier(Net, hidden=3).fit(*IRIS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_epoch", "Did you mean 'max_epochs'?"),
        ("hidden", "Write the argument of the module as module__hidden."),
        ("hiden", "Did you mean 'module__hidden'?"),
        ("xyz", "Arguments of the module are written module__*."),
    ],
)
def test_a_wrong_parameter_of_a_net_names_the_right_one(name, hint):
    net = NeuralNetClassifier(Net)
    with pytest.raises(ValueError, match=f"Invalid parameter '{name}' .*{re.escape(hint)}$"):
        GridSearchCV(net, {name: [1, 2]}).fit(*IRIS)
    with pytest.raises(TypeError, match=f"no parameter '{name}'. {re.escape(hint)}$"):
        NeuralNetClassifier(Net, **{name: 1}).fit(*IRIS)


def test_a_wrong_argument_of_a_module_in_a_grid_is_said_in_one_sentence():
    said = r"^All the 4 fits failed. The first one raised InputError: module__hiden is not an arg"
    with pytest.raises(ValueError, match=rf"{said}.* Did you mean 'module__hidden'\?$"):
        GridSearchCV(NeuralNetClassifier(Net), {"module__hiden": [1, 2]}, cv=2).fit(*IRIS)


def test_a_wrong_parameter_of_an_mlp_names_the_right_one():
    with pytest.raises(ValueError, match="Invalid parameter 'alhpa' .*Did you mean 'alpha'"):
        mlp().set_params(alhpa=3)


def test_the_defaults_are_skorchs():
    r = net_recipe()
    expected = {
        "lr": 0.01,
        "batch_size": 128,
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
    }
    assert {k: r.config[k] for k in expected} == expected
    assert r.epochs == 10


@pytest.mark.parametrize(
    ("optimizer", "word", "decay"),
    [
        (torch.optim.SGD, "sgd", 0),
        (torch.optim.Adam, "adam", 0),
        (torch.optim.AdamW, "adamw", 0.01),
        ("nesterov", "nesterov", 0),
        (torch.optim.RAdam, "RAdam", 0),
        ("NAdam", "NAdam", 0),
    ],
)
def test_an_optimizer_is_a_word_or_a_class(optimizer, word, decay):
    config = net_recipe(optimizer=optimizer).config
    assert (config["optimizer"], config["weight_decay"]) == (word, decay)
    assert (
        net_recipe(optimizer=optimizer, optimizer__weight_decay=0.3).config["weight_decay"] == 0.3
    )


def test_a_plain_module_of_skorch_is_built_with_its_own_arguments():
    fitted = NeuralNetClassifier(PlainNet, module__hidden=6, max_epochs=2).fit(*IRIS)
    assert fitted.module_.layers[0].out_features == 6
    X, y = make_regression(40, 7, random_state=0)
    net = NeuralNetRegressor(
        PlainNet, module__inputs=7, module__outputs=1, lr=0.1, max_epochs=60, random_state=0
    )
    assert net.fit(X, y).score(X, y) > 0.9
    assert NeuralNetRegressor(OneNumber, lr=0.3, max_epochs=60).fit(X, y).score(X, y) > 0.99


@pytest.mark.parametrize(
    ("estimator", "criterion", "loss"),
    [
        (NeuralNetClassifier, nn.CrossEntropyLoss, "cross_entropy"),
        (NeuralNetClassifier, nn.CrossEntropyLoss(), "cross_entropy"),
        (NeuralNetRegressor, nn.MSELoss(), "mse"),
    ],
)
def test_a_class_of_torch_with_its_defaults_is_the_loss_of_its_name(estimator, criterion, loss):
    assert estimator(Net, criterion=criterion)._recipe(lambda: 1).loss == loss


@pytest.mark.parametrize("criterion", [None, "bce", nn.BCEWithLogitsLoss])
@pytest.mark.cpu  # a GPU trains estimators in single precision
def test_one_logit_tells_two_classes_apart(criterion):
    X = IRIS[0]
    y = np.where(IRIS[1] == 0, "setosa", "other")
    made = NeuralNetClassifier(
        OneNumber, criterion=criterion, lr=0.1, max_epochs=20, random_state=0
    ).fit(X, y)
    assert made.score(X, y) == 1
    logits = made.module_(torch.as_tensor(X)).detach().numpy()
    np.testing.assert_allclose(made.predict_proba(X)[:, 1], 1 / (1 + np.exp(-logits)), rtol=1e-6)
    two = clone(made).set_params(module=PlainNet, module__outputs=1)
    assert (
        model_selection.GridSearchCV(two, {"module__hidden": [3, 4]}, cv=2, scoring="roc_auc")
        .fit(X, y)
        .best_score_
        == 1
    )


def make_net(n_features, n_outputs, hidden=4):
    return nn.Sequential(nn.Linear(n_features, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs))


@pytest.mark.parametrize("build", [make_net, partial(make_net, hidden=5)])
def test_a_function_that_makes_modules_is_a_module(build):
    net = NeuralNetClassifier(build, max_epochs=20, lr=0.05, module__hidden=6, random_state=0).fit(
        *IRIS
    )
    assert net.score(*IRIS) > 0.6 and net.module_[0].out_features == 6
    assert clone(net).fit(*IRIS).score(*IRIS) == pickle.loads(pickle.dumps(net)).score(*IRIS)


REFUSED_NETS = [
    ({"module": Net(4, 3)}, "module must be a class, not an instance.*Pass Net"),
    ({"module": "Net"}, "module must be a torch.nn.Module class, or a function .*, got 'Net'"),
    ({"module": dict}, "module must be a torch.nn.Module class, .*got <class 'dict'>"),
    (
        {"module": lambda n_outputs: n_outputs},
        "<lambda> must return a torch.nn.Module, got int",
    ),
    (
        {"module": Probabilities, "criterion": "cross_entropy"},
        "module must return logits, but Probabilities returns probabilities.*Leave out the softmax",
    ),
    (
        {"module": PlainNet, "module__outputs": 5},
        r"PlainNet must return a tensor of shape \(rows, 3\)",
    ),
    ({"module": PlainNet, "module__inputs": 5}, "forward pass of PlainNet.*raised"),
    (
        {"module__width": 5},
        r"module__width is not an argument of Net\(n_features, n_outputs, hidden=16",
    ),
    ({"module__n_features": 5}, "module__n_features is set by the data"),
    ({"optimizer": torch.optim.LBFGS}, "optimizer cannot be torch.optim.LBFGS"),
    (
        {"optimizer": "Rprop", "optimizer__weight_decay": 0.1},
        "'Rprop' has no weight decay, got 0.1",
    ),
    (
        {"optimizer": "RAdam", "optimizer__beta": 0.1},
        "^optimizer__beta is not a hyperparameter .*optimizer__betas",
    ),
    (
        {"optimizer": "RAdam", "optimizer__weight_deacy": 0.1},
        "which has lr, .*, optimizer__weight_decay, .*mean 'optimizer__weight_decay'",
    ),
    ({"optimizer": "lamb"}, "got 'lamb'"),
    ({"optimizer": "adam", "optimizer__momentum": 0.9}, "'adam' has no momentum, got 0.9"),
    (
        {"criterion": nn.NLLLoss(weight=torch.ones(3)), "module": Probabilities},
        "criterion=torch.nn.CrossEntropyLoss, without the softmax",
    ),
    ({"criterion": "hinge"}, "criterion must be one of 'cross_entropy', .*got 'hinge'"),
    ({"criterion": 3}, "criterion must be one of .*got 3"),
    (
        {"criterion": "huber"},
        "criterion='huber' does not fit a multiclass target. Choose 'cross_entropy'",
    ),
    (
        {"criterion__delta": 1},
        "^criterion__delta is not an argument of criterion='cross_entropy', which takes label_smoo",
    ),
    (
        {"criterion": nn.CrossEntropyLoss, "criterion__label_smoothing": 2},
        "^criterion__label_smoothing must be",
    ),
    (
        {"criterion": nn.CrossEntropyLoss(), "criterion__label_smoothing": 0.1},
        "the loss is an instance of CrossEnt",
    ),
    (
        {"criterion": nn.NLLLoss, "criterion__delta": 1},
        "^criterion__delta is not an argument of the loss .*NLLLoss",
    ),
    (
        {"criterion": lambda outputs, y: outputs},
        r"the loss .*lambda.* must return row losses of shape \(rows,\)",
    ),
    ({"lr": 0}, "lr must be"),
    ({"batch_size": -1}, "batch_size must be"),
    ({"max_epochs": 0}, "max_epochs must be"),
    (
        {"train_split": 5},
        "NeuralNetClassifier does not support train_split=5. gputune trains on every row",
    ),
    (
        {"callbacks": [print]},
        "does not support callbacks=.* gputune calls no callbacks here. Leave callbacks",
    ),
]


@pytest.mark.parametrize(
    ("params", "message"), REFUSED_NETS, ids=[message for _, message in REFUSED_NETS]
)
@pytest.mark.filterwarnings("ignore::gputune.InputWarning")
def test_what_cannot_be_trained_is_refused_by_name(params, message):
    with pytest.raises(InputError, match=message):
        NeuralNetClassifier(**{"module": Net, **params}).fit(*IRIS)


def test_a_class_of_torch_optim_is_fitted_and_searched_with_its_arguments():
    net = NeuralNetClassifier(
        Net, optimizer=torch.optim.RAdam, lr=0.05, max_epochs=2, random_state=0
    )
    space = {
        "optimizer": [torch.optim.RAdam, "NAdam"],
        "optimizer__betas": [(0.8, 0.9), (0.9, 0.999)],
    }
    search = model_selection.GridSearchCV(net, space, cv=2).fit(*IRIS)
    again = clone(net).set_params(**search.best_params_).fit(*IRIS)
    torch.testing.assert_close(
        again.module_.first.weight, search.best_estimator_.module_.first.weight
    )
    assert not torch.equal(again.module_.first.weight, clone(net).fit(*IRIS).module_.first.weight)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_a_search_over_a_pipeline_reaches_the_modules_arguments():
    pipeline = make_pipeline(
        StandardScaler(), NeuralNetClassifier(Net, max_epochs=2, random_state=0)
    )
    space = {
        "neuralnetclassifier__module__hidden": [3, 9],
        "neuralnetclassifier__optimizer__momentum": [0.5],
    }
    best = model_selection.GridSearchCV(pipeline, space, cv=2).fit(*IRIS).best_estimator_
    net = best[-1]
    assert net.module_.first.out_features == net.get_params()["module__hidden"]
    assert net.optimizer__momentum == 0.5 and "module__hidden" in best._repr_html_()
