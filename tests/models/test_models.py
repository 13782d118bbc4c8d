"""The models to begin from: what they give, what they refuse, and that they are searched and loaded by name."""

import inspect

import numpy as np
import pytest
import torch

import gputune
from gputune.models import CNN, GRU, MLP, LogisticRegression, RealMLP
from refused import refused

IMAGES = np.random.default_rng(0).normal(size=(40, 2, 8, 6)).astype(np.float32)
IDS = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (40, 6)))
LABELS = np.arange(40) % 2
SEARCH = {"n_trials": 1, "cv": 2, "max_epochs": 1, "verbose": 0, "workers": 1}


@pytest.mark.parametrize("model", [CNN, GRU, MLP, LogisticRegression])
def test_a_model_is_an_example_of_less_than_60_lines(model):
    assert len(inspect.getsource(inspect.getmodule(model)).splitlines()) < 60


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (CNN((2, 8, 6), 3, channels=4), (2, 8, 6)),
        (CNN((8, 8), 3, depth=3, dropout=0.5), (8, 8)),
        (GRU((7, 2), 3, layers=2), (7, 2)),
        (MLP(5, 3, width=7, depth=3, activation="tanh"), (5,)),
        (MLP(5, 3, width=(7, 2)), (5,)),
        (LogisticRegression(5, 3), (5,)),
    ],
)
def test_outputs_have_one_row_a_row(model, shape):
    assert model(torch.randn(4, *shape)).shape == (4, 3)
    assert model.double()(torch.randn(4, *shape).double()).dtype == torch.float64


def test_bytes_and_token_ids_are_taken_as_they_are():
    pictures = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    net = CNN((3, 8, 8), 2).eval()
    torch.testing.assert_close(net(pictures), net(pictures.float()))
    assert GRU((6,), 2, n_tokens=5)(IDS.int()).shape == (40, 2)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (MLP, {"n_features": 3, "width": 0}, "width must be at least 1, got width=0"),
        (MLP, {"n_features": 3, "width": (4, 0)}, "width must be at least 1, got width=0"),
        (MLP, {"n_features": 3, "depth": -1}, "depth must be at least 0"),
        (MLP, {"n_features": 3, "activation": "sigmoid"}, "activation must be one of .*, got 'sigmoid'"),
        (MLP, {"n_features": 3, "dropout": 1.0}, r"dropout is a probability in \[0, 1\)"),
        (LogisticRegression, {"n_features": -1}, "n_features must be at least 0"),
        (CNN, {"input_shape": (64,)}, r"a CNN takes images, .*got rows of shape \(64,\): reshape X"),
        (CNN, {"input_shape": (8, 8, 3)}, "images of 4 x 4 or more, got 8 x 3: .*check the order of the axes"),
        (CNN, {"input_shape": (8, 8), "channels": 0}, "channels must be at least 1"),
        (GRU, {"input_shape": (1, 2, 3)}, r"a GRU takes sequences, .*got rows of shape \(1, 2, 3\)"),
        (GRU, {"input_shape": (6,)}, "need n_tokens, the largest id plus 1"),
        (GRU, {"input_shape": (6, 2), "n_tokens": 5}, "and numbers, .*, none"),
        (
            RealMLP,
            {"n_features": 3, "activation": "tanh"},
            "activation must be auto, selu, mish, relu, silu, got 'tanh'",
        ),
        (RealMLP, {"n_features": 3, "embedding": "pwl"}, "embedding must be one of pbld, plr, pl, none, got 'pwl'"),
        (RealMLP, {"n_features": 3, "waves": 1}, "waves must be at least 2, got waves=1"),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(n_outputs=2, **arguments)


def test_they_are_searched_by_name_and_loaded_without_trust(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    study = gputune.tune("cnn", IMAGES, LABELS, **SEARCH)
    assert study.best_params.keys() == {"lr", "batch_size", "weight_decay", "module__channels"}
    model = study.best_model()
    model.save(tmp_path / "model")
    again = gputune.load_model(tmp_path / "model")
    assert type(again.module) is CNN
    np.testing.assert_array_equal(again.predict_proba(IMAGES), model.predict_proba(IMAGES))


@pytest.mark.cpu  # the simulated device has no cuDNN
def test_token_ids_are_an_integer_tensor():
    space = {"lr": [0.01], "module__n_tokens": [5], "module__hidden": [4]}
    assert gputune.tune("gru", IDS, LABELS, space=space, **SEARCH).best_score > 0
    with refused("The numbers of a table are scaled"):
        gputune.tune("gru", IDS.numpy(), LABELS, space=space, **SEARCH)
    with refused("X has the id 4 in row 0, and the embedding .* has 3 places"):
        gputune.tune("gru", IDS, LABELS, space={"module__n_tokens": [3]}, **SEARCH)
