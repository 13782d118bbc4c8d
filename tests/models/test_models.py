"""The ready-made models: their outputs, their errors, and search and loading by name.

RealMLP: its published form, its start from the data, its recipe, and its way through a search to an
    export.
"""

import ast
import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gputune
from gputune.data.columns import fit_layout
from gputune.data.table import as_table
from gputune.ground.seeding import stream_seed
from gputune.models import CNN, GRU, MLP, LogisticRegression, RealMLP
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.population.population import module_arguments
from gputune.spaces.config import legal_keys
from gputune.spaces.named import named_space
from gputune.spaces.random import draw
from gputune.spaces.space import check_space
from gputune.study.export import encoded
from problems import Linear, fill, largest_difference, make_data, rows_of, shape_of, train
from refused import refused

IMAGES = np.random.default_rng(0).normal(size=(40, 2, 8, 6)).astype(np.float32)
IDS = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (40, 6)))
LABELS = np.arange(40) % 2
SEARCH = {"cv": 2, "verbose": 0, "workers": 1}
ONE = {"n_trials": 1, "max_epochs": 1, **SEARCH}


@pytest.mark.parametrize("model", [CNN, GRU, MLP, LogisticRegression])
def test_the_code_of_a_model_is_an_example_that_fits_a_page(model):
    source = inspect.getsource(inspect.getmodule(model))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    lines = len(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    assert lines < 70


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (CNN((2, 8, 6), 3, channels=4), (2, 8, 6)),
        (CNN((8, 8), 3, depth=3, dropout=0.5), (8, 8)),
        (CNN((1, 9), 3), (1, 9)),
        (CNN((5, 9), 3, depth=3, spatial_dims=1), (5, 9)),
        (CNN((1, 4, 9), 3), (1, 4, 9)),
        (GRU((7, 2), 3, layers=2), (7, 2)),
        (MLP(5, 3, width=7, depth=3, activation="tanh"), (5,)),
        (MLP(5, 3, width=(7, 2)), (5,)),
        (MLP(5, 3, width=7, activation=("relu", "tanh", "silu"), dropout=(0.0, 0.5, 0.1)), (5,)),
        (LogisticRegression(5, 3), (5,)),
    ],
)
def test_outputs_have_one_row_a_row(model, shape):
    assert model(torch.randn(4, *shape)).shape == (4, 3)
    assert model.double()(torch.randn(4, *shape).double()).dtype == torch.float64


def test_each_hidden_layer_of_an_mlp_has_its_own_activation_and_dropout():
    model = MLP(5, 3, width=(8, 4), activation=("relu", "tanh"), dropout=(0.0, 0.9)).double()
    x = torch.randn(6, 5).double()
    first, second, last = model.layers
    hidden = second(first(x).relu()).tanh()
    torch.testing.assert_close(model.eval()(x), last(hidden), rtol=0, atol=0)
    torch.manual_seed(0)
    kept = model.train().dropouts[1](hidden)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), last(kept), rtol=0, atol=0)
    assert (kept == 0).any()


def test_bytes_and_token_ids_are_taken_as_they_are():
    pictures = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    net = CNN((3, 8, 8), 2).eval()
    torch.testing.assert_close(net(pictures), net(pictures.float()))
    assert GRU((6,), 2, n_tokens=5)(IDS.int()).shape == (40, 2)


@pytest.mark.parametrize("shape", [(1, 12), (3, 12)])
def test_a_network_for_sequences_is_made_of_the_layers_of_torch(shape):
    torch.manual_seed(0)
    model = CNN(shape, 2, channels=4, depth=2, spatial_dims=1).double()
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((shape[0], 4), (4, 8)):
        convolution = nn.Conv1d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(2)]
    last = nn.Linear(8, 2)
    plain = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), last).double()
    x = torch.randn(5, *shape).double()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (MLP, {"n_features": 3, "width": 0}, "width must be at least 1, got width=0"),
        (MLP, {"n_features": 3, "width": (4, 0)}, "width must be at least 1, got width=0"),
        (MLP, {"n_features": 3, "depth": -1}, "depth must be at least 0"),
        (
            MLP,
            {"n_features": 3, "activation": "sigmoid"},
            "activation must be one of .*, got 'sigmoid'",
        ),
        (MLP, {"n_features": 3, "dropout": 1.0}, r"dropout is a probability in \[0, 1\)"),
        (MLP, {"n_features": 3, "dropout": (0.5, 1.0)}, r"dropout is a probability in \[0, 1\)"),
        (MLP, {"n_features": 3, "activation": ("relu", "swish")}, "activation must be one of .*"),
        (
            MLP,
            {"n_features": 3, "width": (8, 4), "dropout": (0.1, 0.2, 0.3)},
            "All sequences must have one value for each hidden layer, but width has 2, dropout has 3",
        ),
        (LogisticRegression, {"n_features": -1}, "n_features must be at least 0"),
        (
            CNN,
            {"input_shape": (64,)},
            r"a CNN takes images, .* or sequences, .*, got rows of shape \(64,\) and "
            r"spatial_dims=None: reshape X, for example to \(rows, 1, length\)",
        ),
        (
            CNN,
            {"input_shape": (3, 8, 8), "spatial_dims": 1},
            r"got rows of shape \(3, 8, 8\) and spatial_dims=1: reshape X",
        ),
        (
            CNN,
            {"input_shape": (3, 8), "spatial_dims": 3},
            "spatial_dims must be 1, 2 or None, got spatial_dims=3",
        ),
        (
            CNN,
            {"input_shape": (3, 40)},
            "images of 4 x 4 or more, got 3 x 40: .*need spatial_dims=1 if they have several",
        ),
        (
            CNN,
            {"input_shape": (40, 3), "spatial_dims": 1},
            r"depth=2 halves the length 2 times, .* sequences of 4 or more, got 3: lower depth, or "
            r"check the order of the axes. Sequences are \(channels, length\)",
        ),
        (
            CNN,
            {"input_shape": (8, 8, 3)},
            "images of 4 x 4 or more, got 8 x 3: .*check the order of the axes",
        ),
        (CNN, {"input_shape": (8, 8), "channels": 0}, "channels must be at least 1"),
        (
            GRU,
            {"input_shape": (1, 2, 3)},
            r"a GRU takes sequences, .*got rows of shape \(1, 2, 3\)",
        ),
        (GRU, {"input_shape": (6,)}, "need n_tokens, the largest id plus 1"),
        (GRU, {"input_shape": (6, 2), "n_tokens": 5}, "and sequences .* need n_tokens=None"),
        (
            RealMLP,
            {"n_features": 3, "activation": "tanh"},
            "activation must be auto, selu, mish, relu, silu, got 'tanh'",
        ),
        (
            RealMLP,
            {"n_features": 3, "embedding": "pwl"},
            "embedding must be one of pbld, plr, pl, none, got 'pwl'",
        ),
        (RealMLP, {"n_features": 3, "waves": 1}, "waves must be at least 2, got waves=1"),
        (
            RealMLP,
            {"n_features": 3, "waves": 3, "embedding": "plr"},
            "waves must be even for the embedding 'plr', got 3",
        ),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(n_outputs=2, **arguments)


def test_they_are_searched_by_name_and_loaded_without_trust(tmp_path, forget_code):
    study = gputune.tune("cnn", IMAGES, LABELS, **ONE)
    assert study.best_params.keys() == {"lr", "batch_size", "weight_decay", "module__channels"}
    model = study.best_model()
    model.save(tmp_path / "model")
    forget_code()
    again = gputune.load_model(tmp_path / "model")
    assert type(again.module) is CNN
    np.testing.assert_array_equal(again.predict_proba(IMAGES), model.predict_proba(IMAGES))


@pytest.mark.parametrize("channels", [1, 2])
def test_sequences_are_searched_saved_and_loaded(tmp_path, channels):
    sequences = IMAGES.reshape(40, 2, 48)[:, :channels]
    space = {"lr": [0.01], "module__channels": [4], "module__depth": [3]}
    if channels > 1:
        space["module__spatial_dims"] = [1]
    model = gputune.tune("cnn", sequences, LABELS, space=space, **ONE).best_model()
    assert isinstance(model.module.blocks[0][0], nn.Conv1d)
    model.save(tmp_path / "model")
    again = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_proba(sequences), model.predict_proba(sequences))


def test_a_table_is_reshaped_for_the_network():
    with refused(r"got rows of shape \(12,\).*reshape X, for example to \(rows, 1, length\)"):
        gputune.tune("cnn", IMAGES[:, 0, :2].reshape(40, 12), LABELS, **ONE)


@pytest.mark.cpu  # the simulated device has no cuDNN
def test_token_ids_are_an_integer_tensor():
    space = {"lr": [0.01], "module__n_tokens": [5], "module__hidden": [4]}
    assert gputune.tune("gru", IDS, LABELS, space=space, **ONE).best_score > 0
    with refused("gputune scales the numeric columns of a table"):
        gputune.tune("gru", IDS.numpy(), LABELS, space=space, **ONE)
    with refused("X has the id 4 in row 0, but the embedding .* has 3 entries"):
        gputune.tune("gru", IDS, LABELS, space={"module__n_tokens": [3]}, **ONE)


TWO = {"max_epochs": 2, **SEARCH}
SMALL = {"module__width": [8], "module__depth": [2]}
ROWS = np.random.default_rng(0)
TABLE = pd.DataFrame(
    {
        "size": ROWS.lognormal(size=60),
        "age": np.where(np.arange(60) % 9, ROWS.normal(size=60), np.nan),
        "town": ROWS.choice(list("abcdefghijkl"), 60),
        "sunny": ROWS.random(60) < 0.5,
    }
)
PRICE = TABLE["size"].to_numpy() + TABLE["sunny"].to_numpy()


def written_out(module, x):
    """The published network in evaluation mode, one unit's sum after the other: PBLD, scale, NTP,
    parametric mish."""
    e = module.embedding
    h = []
    for j in range(x.shape[1]):
        waves = torch.cos(2 * math.pi * x[:, j, None] * e.frequency[j] + e.phase[j])
        h += [waves @ e.weight[j] + e.offset[j], x[:, j, None]]
    h = torch.cat(h, 1) * module.scale
    for name, slope in zip(("first", "1"), module.slopes):
        layer = module.layers[name]
        h = h @ layer.weight.T / h.shape[1] ** 0.5 + layer.bias
        h = h + slope * (h * torch.tanh(nn.functional.softplus(h)) - h)
    last = module.layers["last"]
    return h @ last.weight.T / h.shape[1] ** 0.5 + last.bias


def test_it_is_the_published_network():
    torch.manual_seed(0)
    module = RealMLP(3, 1, width=6, depth=2).double().eval()
    with torch.no_grad():
        for w in module.parameters():
            w += 0.1 * torch.randn_like(w)
    x = torch.randn(9, 3).double()
    torch.testing.assert_close(module(x), written_out(module, x))
    module.low.fill_(-0.1)
    least = [float(module.train(mode)(x).detach().min()) for mode in (False, True)]
    assert least[0] == pytest.approx(-0.1) and least[1] < -0.1


@pytest.mark.parametrize("embedding", ["plr", "pl", "none"])
def test_large_categories_are_embedded_and_other_flags_stay(embedding):
    layout = fit_layout(as_table(TABLE), min_count=1)
    groups = layout.feature_groups
    assert groups == (0, 0, 1, *[2] * 12, 3)  # size; age and where it is missing; town; sunny
    module = RealMLP(len(groups), 2, feature_groups=groups, embedding=embedding, category_size=5)
    numbers = 2 if embedding == "none" else 2 * 4
    assert module.scale.shape == (numbers + 2 + 5,)
    assert module(torch.randn(4, len(groups))).shape == (4, 2)
    assert RealMLP(len(groups), 2, feature_groups=groups, one_hot=12).scale.shape == (2 * 4 + 14,)


def test_the_start_gives_every_layer_a_variance_of_1_and_kinks_among_the_rows():
    torch.manual_seed(0)
    x = 100 * torch.rand(500, 4)
    module = RealMLP(4, 1, width=32, depth=2)
    module.start_from(x, y := torch.randn(500))
    assert (float(module.low), float(module.high)) == (float(y.min()), float(y.max()))
    seen = []
    for layer in module.layers.values():
        layer.register_forward_hook(lambda _layer, _x, h: seen.append(h.detach()))
    module(x)
    for h in seen:
        torch.testing.assert_close(
            h.std(0, correction=0), torch.ones(h.shape[1]), rtol=1e-4, atol=0
        )
        assert ((h.amin(0) <= 0) & (h.amax(0) >= 0)).all()


@pytest.mark.parametrize("kind", [StackedModule, LoopedModule])
def test_each_fold_begins_from_its_own_rows_as_a_plain_loop_would(kind):
    data = make_data("regression")
    configs = fill({"batch_size": 16, "lr": 0.01}, {"batch_size": 16, "lr": 0.03})
    network = kind(
        RealMLP, configs, shape_of(data), seed=3, traits=traits_of(RealMLP, configs[0], data)
    )
    begun = train(network, data, configs, seed=3, epochs=0, horizon=1)
    for fold in range(data.n_folds):
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(3, "module"))
            plain = RealMLP(data.n_features, 1).double()
            torch.manual_seed(stream_seed(3, "start_from"))
            plain.start_from(*rows_of(data, fold)[:2])
        for c in range(2):
            assert largest_difference(begun.member(fold, c), plain) <= 1e-12


class Clumsy(Linear):
    def start_from(self, x, y):
        raise KeyError("nothing")


class Calm(Clumsy):
    start_from = None


def test_a_start_that_fails_is_named_and_one_that_a_class_gives_up_is_none(iris):
    with refused(
        r"Clumsy.start_from\(rows, y\) raised KeyError: 'nothing'. Correct it, or leave it out"
    ):
        gputune.tune(Clumsy, *iris, n_trials=1, **TWO)
    assert gputune.tune(Calm, *iris, n_trials=1, **TWO).best_score > 0


def test_a_search_by_name_from_its_recipe_to_a_loaded_model(tmp_path):
    study = gputune.tune(
        "realmlp", TABLE, PRICE, n_trials=2, space=SMALL | {"lr": [0.1, 0.2]}, **TWO
    )
    assert study.trials[0].params == {"lr": 0.2, "module__depth": 2, "module__width": 8}
    assert study.meta["numbers"] == "robust" and study.meta["columns"] == "drop-constant"
    model = study.best_model()
    assert model.predict(TABLE).max() <= PRICE.max() + 1e-4
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(TABLE), model.predict(TABLE))


@pytest.mark.long
def test_it_is_exported(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = gputune.tune("realmlp", TABLE, PRICE, n_trials=1, space=SMALL, **TWO).best_model()
    model.export(tmp_path / "model.onnx")
    rows = encoded(model, as_table(TABLE))
    (found,) = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"X": rows})
    np.testing.assert_allclose(found.ravel(), model.predict(TABLE), rtol=1e-5, atol=1e-5)


def test_its_recipe_is_that_of_the_paper():
    y = np.arange(60) % 3
    params = gputune.tune("realmlp", TABLE, y, **ONE).trials[0].params
    assert params == {
        "dropout": 0.15,
        "loss__label_smoothing": 0.1,
        "lr": 0.04,
        "module__activation": "selu",
        "module__depth": 3,
        "module__embedding": "pbld",
        "module__scaling": True,
        "module__sigma": 0.1,
        "module__width": 256,
        "weight_decay": 0.02,
    }


@pytest.mark.parametrize("name", ["realmlp", "realmlp-large", "realmlp-tabarena"])
@pytest.mark.parametrize("goal", ["numbers", "classes"])
def test_a_space_has_a_name(name, goal):
    keys = legal_keys("module", "adamw")
    drawn = draw(check_space(named_space(name, goal), keys=keys, module=True), 20, 0)
    assert all(("loss__label_smoothing" in config) == (goal == "classes") for config in drawn)
    for config in drawn:
        RealMLP(3, 1, **module_arguments(config))


def test_a_space_that_has_no_name_here():
    with refused(
        "a list of dicts, or one of mlp, realmlp, .*got 'realmpl'. Did you mean 'realmlp'"
    ):
        gputune.tune("realmlp", TABLE, PRICE, space="realmpl", **TWO)


def test_the_text_of_a_dropout_shows_its_rate():
    assert repr(gputune.models.Dropout(0.3)) == "Dropout(p=0.3)"
    stacked = gputune.models.Dropout()
    stacked.rate = torch.zeros(4, 1, 1)
    assert repr(stacked) == "Dropout(p=(4, 1, 1))"
    assert repr(gputune.models.Dropout().to("meta")) == "Dropout(p=())"
