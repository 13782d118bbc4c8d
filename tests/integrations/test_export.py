"""A tuned model as one file: results of onnxruntime and torch.export equal the model's own
predictions.
"""

import json
import re
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris
from torch import nn

import gputune
from command_line import run
from gputune.ground.errors import MissingExtraError
from gputune.models import MLP
from refused import refused
from study_models import make_model, rows

LONG = pytest.mark.long
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FRAME = pd.DataFrame(rows(60))
NUMBERS = FRAME.drop(columns="city")
OTHERS = pd.DataFrame(
    {
        "member": [1.0, 0.0, np.nan, 1.0],
        "income": [-50.0, 1e5, 3000.0, 2500.0],
        "age": [np.nan, 39.5, 1e3, -1e3],
        "city": ["Oslo", "Bonn", "Lima", "Rome"],
    }
)
"""Rows that training never saw: columns in another order, a missing boolean, far numbers, an
unknown level."""


def outputs(path, inputs):
    """Run an exported file on inputs by name; return its outputs as arrays, and its description."""
    if path.suffix == ".onnx":
        session = ort.InferenceSession(path)
        return session.run(None, inputs), json.loads(
            session.get_modelmeta().custom_metadata_map["gputune.json"]
        )
    extra = {"gputune.json": ""}
    found = torch.export.load(path, extra_files=extra).module()(*map(torch.tensor, inputs.values()))
    arrays = [f.numpy() for f in (found if isinstance(found, tuple) else (found,))]
    return arrays, json.loads(extra["gputune.json"])


class Remembering(nn.Module):
    """One layer under two names; keeps activations in an attribute and in containers."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.a = nn.Linear(n_features, n_features)
        self.last = nn.Linear(n_features, n_outputs)
        self.b = self.a
        self.kept = {}
        self.log = []

    def forward(self, x):
        self.hidden = self.kept["hidden"] = torch.tanh(self.a(x))
        self.log.append(self.hidden)
        return self.last(self.b(self.hidden))


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=LONG), ".pt2"])
def test_a_module_that_keeps_activations(tmp_path, suffix):
    spec = {"kind": "module", "kwargs": {}, "import": "nowhere:Remembering"}
    model = make_model(NUMBERS, module=Remembering, spec=spec)
    model.module(torch.zeros(2, len(model.layout.feature_names)))  # what it keeps now has a graph
    check(model, tmp_path / f"model{suffix}", NUMBERS)
    assert model.module.hidden.requires_grad or model.module.log
    model.save(tmp_path / "saved")
    again = gputune.load_model(tmp_path / "saved", module=Remembering)
    np.testing.assert_array_equal(again.predict_proba(NUMBERS), model.predict_proba(NUMBERS))
    assert again.module.b is again.module.a


def check(model, path, X):
    """Export, which leaves the model as it was, and compare predictions for all rows and for
    one."""
    model.module.train()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    model.export(path)
    assert model.module.training
    for name, value in model.module.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    for part in (X, X[:1]):
        found, known = outputs(path, {"X": model.encoded(part)})
        if model.classes is None:
            (values,) = found
            assert values.shape == (len(part),) and values.dtype == np.float64
            np.testing.assert_allclose(
                values, model.predict(part), rtol=1e-5, atol=1e-5 * model.scale
            )
        else:
            label, probabilities = found
            np.testing.assert_allclose(probabilities, model.predict_proba(part), atol=1e-5)
            assert np.array(known["classes"])[label].tolist() == model.predict(part).tolist()
    return known


class Net(nn.Module):
    """A user's module with a normalization that is no linear map, and one value a row for a
    regression."""

    def __init__(self, n_features, n_outputs, hidden=8):
        super().__init__()
        layers = (
            nn.Linear(n_features, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, n_outputs),
        )
        self.body = nn.Sequential(*layers)
        self.single = n_outputs == 1

    def forward(self, x):
        output = self.body(x)
        return output[:, 0] if self.single else output


class Branching(nn.Linear):
    """A module with a path that depends on the data, which no export can follow."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Counting(Branching):
    """A module that makes a Python number of the number of rows."""

    def forward(self, x):
        return nn.Linear.forward(self, x.view(len(x), -1))


USERS = {"module": Net, "classes": None, "numbers": "none", "dtype": torch.float64}


@pytest.mark.parametrize(
    ("frame", "options", "suffix"),
    [
        pytest.param(NUMBERS, {}, ".onnx", marks=LONG),
        pytest.param(NUMBERS, {}, ".pt2", marks=LONG),
        (NUMBERS, {"numbers": "quantile", "classes": None}, ".onnx"),
        (FRAME, {"numbers": "robust"}, ".onnx"),
        pytest.param(NUMBERS, {"numbers": "quantile", "classes": None}, ".pt2", marks=LONG),
        pytest.param(NUMBERS, {"numbers": "piecewise"}, ".onnx", marks=LONG),
        (FRAME, {"numbers": "piecewise"}, ".pt2"),
        pytest.param(FRAME, USERS, ".onnx", marks=LONG),
        (FRAME, USERS, ".pt2"),
    ],
)
@pytest.mark.filterwarnings("ignore:X has categories that the training data did not")
def test_predictions_are_the_models_own(frame, options, suffix, tmp_path):
    model = make_model(frame, **options)
    others = OTHERS[list(frame.columns[::-1])]
    if options.get("numbers") == "robust":
        others = others.assign(income=[1e30, -1e160, np.finfo(np.float64).max, 2500.0])
    known = check(model, tmp_path / f"model{suffix}", others)
    assert known["inputs"] == ("features" if "city" in frame else "columns")
    names = model.layout.feature_names if "city" in frame else frame.columns
    assert known["names"] == list(names) and known["target"] == "outcome"


@pytest.mark.parametrize("activation", ["gelu", pytest.param("silu", marks=LONG)])
def test_activations_in_double(activation, tmp_path):
    module = partial(MLP, width=8, depth=2, activation=activation, dropout=0.2)
    check(
        make_model(NUMBERS, module=module, dtype=torch.float64),
        tmp_path / "model.onnx",
        OTHERS.drop(columns="city"),
    )


@pytest.mark.parametrize("model", ["mlp", pytest.param("logistic", marks=LONG)])
def test_a_tuned_model_and_the_solved_logistic_regression(model, tmp_path):
    X, y = load_breast_cancer(return_X_y=True)
    labels = np.array(["malignant", "benign"])[y]
    study = gputune.tune(model, X, labels, n_trials=2, cv=2, max_epochs=2, verbose=0, workers=1)
    calibrated = study.best_model(calibrate=True)
    assert calibrated.temperature != 1
    known = check(calibrated, tmp_path / "model.onnx", X)
    assert known["names"] == [f"x{i}" for i in range(30)] and known["classes"] == [
        "benign",
        "malignant",
    ]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branching, ".*torch.export must be able to trace"),
        (Counting, "its forward.* fixes the number"),
    ],
)
def test_a_module_that_cannot_be_traced(module, reason, suffix, tmp_path, capfd):
    path = tmp_path / f"model{suffix}"
    with refused(f"{module.__name__} cannot be exported to {suffix}: {reason}"):
        make_model(NUMBERS, module=module).export(path)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:X has categories that the training data did not")
def test_encoded_rows_are_columns_or_features_and_what_is_refused(tmp_path, monkeypatch):
    model = make_model(NUMBERS)
    mixed = make_model(FRAME)
    others = OTHERS.drop(columns="city")
    np.testing.assert_array_equal(
        model.encoded(others), others[["age", "income", "member"]].to_numpy()
    )
    assert mixed.encoded(OTHERS).shape == (4, len(mixed.layout.feature_names))
    with refused("X has no column 'age'"):
        model.encoded(others.drop(columns="age"))
    with refused(r"export\(path='.*model.pt'\) must end in .onnx or .pt2"):
        model.export(tmp_path / "model.pt")
    there = tmp_path / "there.onnx"
    there.write_text("mine")
    with refused("there.onnx'\\) exists already"):
        model.export(there)
    assert there.read_text() == "mine"
    with refused("existing folder, but '.*nowhere' does not exist"):
        model.export(tmp_path / "nowhere" / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r'.model.onnx.\) needs onnxscript.*"\.\[onnx\]"'):
        model.export(tmp_path / "model.onnx")
    model.export(tmp_path / "model.pt2")


def test_the_command(tmp_path):
    X, y = load_iris(return_X_y=True)
    model = gputune.tune(
        "mlp", X, y, n_trials=1, cv=2, max_epochs=2, verbose=0, workers=1
    ).best_model()
    model.save(tmp_path / "model")
    code, out, err = run("export", tmp_path / "model", "--out", tmp_path / "iris.pt2")
    assert (code, err) == (0, "")
    assert (
        "takes X, float64, a row of 4 columns for each prediction; gives label and probabilities"
        in out
    )
    (label, _), _ = outputs(tmp_path / "iris.pt2", {"X": X})
    assert label.tolist() == model.predict(X).tolist()
    (tmp_path / "net.py").write_text("from torch import nn\n\n\nclass Net(nn.Module):\n    pass\n")
    for folder, out, more, words in (
        ("model", "iris.pt2", [], "error: --out .*iris.pt2 exists already"),
        (
            "model",
            "o.pt2",
            ["--module", f"{tmp_path / 'net.py'}:Net"],
            "--module must be left out, because '.*built-in 'mlp'",
        ),
        ("nothing", "o.pt2", [], "there is no model folder"),
    ):
        code, _, err = run("export", tmp_path / folder, "--out", tmp_path / out, *more)
        assert code == 2 and re.search(words, err)


class Two(nn.Module):
    """An image and numbers beside it."""

    def __init__(self, n_outputs):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4 + 2, n_outputs)

    def forward(self, image, meta):
        seen = self.body(image.to(self.last.weight.dtype)).mean((2, 3))
        return self.last(torch.cat([seen, meta], 1))


RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (40, 3, 6, 6)).astype(np.uint8)
STEPS = RNG.normal(3, 2, (40, 5, 2)).astype(np.float32)
META = RNG.normal(size=(40, 2))
IDS = torch.from_numpy(RNG.integers(0, 5, (40, 6)))
LABELS = np.stack([np.arange(40) % 2, np.arange(40) // 2 % 2], 1)
TOKENS = {"lr": [0.01], "module__n_tokens": [5]}
SIGNALS = {"lr": [0.01], "module__spatial_dims": [1]}


CASES = [
    ("cnn", IMAGES, LABELS[:, 0], ["X"], {"numbers": "standard"}),
    ("cnn", STEPS.transpose(0, 2, 1), LABELS[:, 0], ["X"], {"space": SIGNALS}),
    ("gru", IDS, LABELS[:, 0], ["X"], {"space": TOKENS}),
    ("gru", STEPS, META, ["X"], {"numbers": "standard"}),
    (Two, {"image": IMAGES, "meta": META}, LABELS, ["image", "meta"], {}),
    (Two, (IMAGES, META), META[:, 0], ["X0", "X1"], {"numbers": "standard"}),
]


@pytest.mark.parametrize(
    ("case", "suffix"),
    [  # the simulated device has no cuDNN
        pytest.param(
            case,
            suffix,
            marks=[LONG] * (n in (1, 3) or (suffix == ".onnx") != (n == 5))
            + [pytest.mark.cpu] * (case[0] == "gru"),
        )
        for n, case in enumerate(CASES)
        for suffix in (".onnx", ".pt2")
    ],
)
def test_images_and_sequences(case, suffix, tmp_path):
    module, X, y, names, options = case
    path = tmp_path / f"model{suffix}"
    model = gputune.tune(
        module, X, y, n_trials=1, cv=2, max_epochs=1, verbose=0, workers=1, **options
    ).best_model()
    model.export(path)
    encoded = model.encoded(X)
    parts = (
        [*encoded.values()]
        if isinstance(encoded, dict)
        else encoded
        if isinstance(encoded, tuple)
        else [encoded]
    )
    expected = model.predict(X) if model.task == "regression" else model.predict_proba(X)
    for n in (40, 1):
        (*_, found), _ = outputs(path, dict(zip(names, [part[:n] for part in parts])))
        np.testing.assert_allclose(found, expected[:n], rtol=1e-5, atol=1e-5)
