import pickle
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris, make_regression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from face_modules import Net, OneNumber, PlainNet, Probabilities
from gputune.errors import InputError
from gputune.sklearn import NeuralNetClassifier, NeuralNetRegressor

IRIS = load_iris(return_X_y=True)


def recipe(**params):
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


def test_the_defaults_are_skorchs():
    r = recipe()
    expected = {"lr": 0.01, "batch_size": 128, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
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
    config = recipe(optimizer=optimizer).config
    assert (config["optimizer"], config["weight_decay"]) == (word, decay)
    assert recipe(optimizer=optimizer, optimizer__weight_decay=0.3).config["weight_decay"] == 0.3


def test_a_plain_module_of_skorch_is_built_with_its_own_arguments():
    fitted = NeuralNetClassifier(PlainNet, module__hidden=6, max_epochs=2).fit(*IRIS)
    assert fitted.module_.layers[0].out_features == 6
    X, y = make_regression(40, 7, random_state=0)
    net = NeuralNetRegressor(PlainNet, module__inputs=7, module__outputs=1, lr=0.1, max_epochs=60, random_state=0)
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
    X, y = IRIS[0], np.where(IRIS[1] == 0, "setosa", "other")
    made = NeuralNetClassifier(OneNumber, criterion=criterion, lr=0.1, max_epochs=20, random_state=0).fit(X, y)
    assert made.score(X, y) == 1
    logits = made.module_(torch.as_tensor(X)).detach().numpy()
    np.testing.assert_allclose(made.predict_proba(X)[:, 1], 1 / (1 + np.exp(-logits)), rtol=1e-6)
    two = clone(made).set_params(module=PlainNet, module__outputs=1)
    assert GridSearchCV(two, {"module__hidden": [3, 4]}, cv=2, scoring="roc_auc").fit(X, y).best_score_ == 1


def make_net(n_features, n_outputs, hidden=4):
    return nn.Sequential(nn.Linear(n_features, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs))


@pytest.mark.parametrize("build", [make_net, partial(make_net, hidden=5)])
def test_a_function_that_makes_modules_is_a_module(build):
    net = NeuralNetClassifier(build, max_epochs=20, lr=0.05, module__hidden=6, random_state=0).fit(*IRIS)
    assert net.score(*IRIS) > 0.6 and net.module_[0].out_features == 6
    assert clone(net).fit(*IRIS).score(*IRIS) == pickle.loads(pickle.dumps(net)).score(*IRIS)


REFUSED = [
    ({"module": Net(4, 3)}, "module must be the class, not an instance.*pass Net"),
    ({"module": "Net"}, "module must be a torch.nn.Module class, or a function .*, got 'Net'"),
    ({"module": dict}, "module must be a torch.nn.Module class, .*got <class 'dict'>"),
    ({"module": lambda n_outputs: n_outputs}, "module: <lambda> must return a torch.nn.Module, got int"),
    ({"module": Probabilities}, "module: Probabilities returns probabilities.*leave out the softmax"),
    ({"module": PlainNet, "module__outputs": 5}, r"module: PlainNet must return a tensor of shape \(rows, 3\)"),
    ({"module": PlainNet, "module__inputs": 5}, "module: the forward of PlainNet.*raised"),
    ({"module__width": 5}, r"module__width is no argument of Net\(n_features, n_outputs, hidden=16"),
    ({"module__n_features": 5}, "module__n_features is given by the data"),
    ({"optimizer": torch.optim.LBFGS}, "optimizer cannot be torch.optim.LBFGS"),
    ({"optimizer": "Rprop", "optimizer__weight_decay": 0.1}, "optimizer__weight_decay=0.1: 'Rprop' has none"),
    ({"optimizer": "RAdam", "optimizer__beta": 0.1}, "^optimizer__beta is no hyperparameter .*optimizer__betas"),
    ({"optimizer": "lamb"}, "got 'lamb'"),
    ({"optimizer": "adam", "optimizer__momentum": 0.9}, "'adam' has none"),
    ({"criterion": nn.NLLLoss, "module": Probabilities}, "leave out the softmax"),
    ({"criterion": "hinge"}, "criterion must be one of 'cross_entropy', .*got 'hinge'"),
    ({"criterion": 3}, "criterion must be one of .*got 3"),
    ({"criterion": "huber"}, "criterion='huber' does not fit a multiclass target; choose 'cross_entropy'"),
    ({"criterion__delta": 1}, "^criterion__delta is none of criterion='cross_entropy', which takes label_smoo"),
    ({"criterion": nn.CrossEntropyLoss, "criterion__label_smoothing": 2}, "^criterion__label_smoothing must be"),
    ({"criterion": nn.CrossEntropyLoss(), "criterion__label_smoothing": 0.1}, "the loss is an instance of CrossEnt"),
    ({"criterion": nn.NLLLoss, "criterion__delta": 1}, "^criterion__delta is no argument of the loss .*NLLLoss"),
    ({"criterion": lambda outputs, y: outputs}, r"the loss .*lambda.* must return row losses of shape \(rows,\)"),
    ({"lr": 0}, "lr must be"),
    ({"batch_size": -1}, "batch_size must be"),
    ({"max_epochs": 0}, "max_epochs must be"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "message"), REFUSED, ids=[message for _, message in REFUSED])
@pytest.mark.filterwarnings("ignore::gputune.InputWarning")
def test_what_cannot_be_trained_is_refused_by_name(params, message):
    with pytest.raises(InputError, match=message):
        NeuralNetClassifier(**{"module": Net, **params}).fit(*IRIS)


def test_a_class_of_torch_optim_is_fitted_and_searched_with_its_arguments():
    net = NeuralNetClassifier(Net, optimizer=torch.optim.RAdam, lr=0.05, max_epochs=2, random_state=0)
    space = {"optimizer": [torch.optim.RAdam, "NAdam"], "optimizer__betas": [(0.8, 0.9), (0.9, 0.999)]}
    search = GridSearchCV(net, space, cv=2).fit(*IRIS)
    again = clone(net).set_params(**search.best_params_).fit(*IRIS)
    torch.testing.assert_close(again.module_.first.weight, search.best_estimator_.module_.first.weight)
    assert not torch.equal(again.module_.first.weight, clone(net).fit(*IRIS).module_.first.weight)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_a_search_over_a_pipeline_reaches_the_modules_arguments():
    pipeline = make_pipeline(StandardScaler(), NeuralNetClassifier(Net, max_epochs=2, random_state=0))
    space = {"neuralnetclassifier__module__hidden": [3, 9], "neuralnetclassifier__optimizer__momentum": [0.5]}
    best = GridSearchCV(pipeline, space, cv=2).fit(*IRIS).best_estimator_
    net = best[-1]
    assert net.module_.first.out_features == net.get_params()["module__hidden"]
    assert net.optimizer__momentum == 0.5 and "module__hidden" in best._repr_html_()
