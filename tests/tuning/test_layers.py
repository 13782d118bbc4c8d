"""Searches over MLPs in which each hidden layer has its own width, activation and dropout rate."""

import numpy as np
import pytest
import torch
from scipy.stats import loguniform

import gputune
from refused import refused

SPACE = {
    "lr": loguniform(1e-3, 1e-1),
    "width": [(16, 8), (4, 12), 8],
    "activation": [("relu", "tanh"), "tanh"],
    "dropout": [(0.0, 0.3), (0.2, 0.0), 0.1],
}
OPTIONS = {"n_trials": 6, "max_epochs": 3, "cv": 2, "verbose": 0, "random_state": 1}


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    X = generator.normal(size=(60, 4))
    return X, (X[:, 0] * X[:, 1] > 0).astype(int)


@pytest.fixture(scope="module")
def stored(rows, tmp_path_factory):
    file = str(tmp_path_factory.mktemp("layers") / "study.db")
    return file, gputune.tune("mlp", *rows, space=SPACE, study=file, **OPTIONS)


def test_a_stored_search_has_the_same_tuples(stored):
    file, study = stored
    reopened = gputune.Study.open(file)
    assert [trial.params for trial in reopened.trials] == [trial.params for trial in study.trials]
    tuples = [trial.params["dropout"] for trial in study.trials]
    assert any(isinstance(rates, tuple) for rates in tuples)
    assert "depth" not in study.best_params


@pytest.mark.parametrize("method", ["tpe", "population", "halving"])
def test_other_methods_search_them_too(method, rows):
    chosen = {
        "tpe": "tpe",
        "population": gputune.PopulationBased(interval=1),
        "halving": gputune.Halving(),
    }[method]
    study = gputune.tune("mlp", *rows, space=SPACE, method=chosen, **OPTIONS)
    assert np.isfinite(study.best_score)
    for trial in study.trials:
        assert trial.params["dropout"] in SPACE["dropout"]
        assert trial.params["width"] in SPACE["width"]


def test_a_saved_model_has_the_layers_of_its_trial(rows, tmp_path):
    X, y = rows
    params = {"lr": 0.03, "width": (16, 8), "activation": ("tanh", "relu"), "dropout": (0.0, 0.3)}
    options = {**OPTIONS, "n_trials": 0, "include": [params]}
    chosen = gputune.tune("mlp", X, y, space=SPACE, **options)
    assert chosen.best_params == params
    model = chosen.best_model()
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    module = loaded.module
    assert [layer.out_features for layer in module.layers] == [16, 8, 2]
    assert [type(activation).__name__ for activation in module.activations] == ["Tanh", "ReLU"]
    assert [dropout.p for dropout in module.dropouts] == [0.0, 0.3]


def test_only_the_built_in_mlp_has_a_rate_for_each_layer(rows):
    class Net(torch.nn.Module):
        def __init__(self, n_features, n_outputs):
            super().__init__()
            self.layer = torch.nn.Linear(n_features, n_outputs)
            self.drop = gputune.models.Dropout()

        def forward(self, x):
            return self.layer(self.drop(x))

    with refused(
        r"space\['dropout'\] must have no tuples, because only the built-in MLP has a value for "
        r"each layer, got \(0\.1, 0\.2\)\. Give it numbers, or make it an argument of your module: "
        "'module__dropout'"
    ):
        gputune.tune(Net, *rows, space={"dropout": [(0.1, 0.2), 0.3]}, **OPTIONS)
    with refused("must have no tuples, because only the built-in MLP"):
        gputune.tune(Net, *rows, include=[{"dropout": (0.1, 0.2)}], **OPTIONS)
