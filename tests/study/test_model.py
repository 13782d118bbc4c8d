"""A tuned model predicts labels in their own type and values in original units, from any kind of rows."""

import numpy as np
import pandas
import polars
import pytest
import torch
from torch import nn

from gputune.data.encode import transform
from gputune.data.table import as_table
from gputune.errors import InputWarning
from gputune.study import model as model_file
from refused import refused
from study_models import make_model, rows


@pytest.fixture
def frame():
    return pandas.DataFrame(rows())


def encoded(model, X):
    return torch.tensor(transform(model.layout.raw(as_table(X)), model.statistics)).to(model.dtype)


def test_probabilities_are_the_softmax_of_the_logits_and_labels_their_largest(frame):
    model = make_model(frame, classes=("a", "b", "c"))
    with torch.no_grad():
        logits = model.module(encoded(model, frame)).double().numpy()
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = model.predict_proba(frame)
    assert got.shape == (30, 3) and got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert model.predict(frame).tolist() == [("a", "b", "c")[k] for k in logits.argmax(1)]


class Positional(nn.Module):
    """Outputs whose last bits tell where a row stands, as those of a matrix product do."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        return self.layer(x) * (1 + 2.0**-52 * torch.arange(len(x), dtype=x.dtype)[:, None])


def test_equal_rows_have_equal_probabilities():
    X = np.random.default_rng(0).normal(size=(5, 3))[np.arange(20) % 5]
    model = make_model(X, module=Positional, dtype=torch.float64)
    logits = model.module(encoded(model, X))
    assert (logits[5:10] != logits[:5]).any()
    assert len(np.unique(model.predict_proba(X), axis=0)) == 5


def test_values_are_in_original_units(frame):
    model = make_model(frame, classes=None)
    with torch.no_grad():
        wanted = model.module(encoded(model, frame)).double().numpy()[:, 0] * 10 + 100
    got = model.predict(frame)
    assert got.shape == (30,) and got.dtype == np.float64
    np.testing.assert_array_equal(got, wanted)
    with refused("predict_proba needs a model of classes, and this is a regression; use predict"):
        model.predict_proba(frame)


@pytest.mark.parametrize("classes", [("no", "yes"), (1, 7), (False, True), (0.5, 2.0)])
def test_labels_have_their_own_type(frame, classes):
    got = make_model(frame, classes=classes).predict(frame)
    assert got.dtype == np.array(classes).dtype and set(got.tolist()) <= set(classes)


def test_every_kind_of_rows_gives_the_same(frame, tmp_path):
    model = make_model(frame)
    wanted = model.predict_proba(frame)
    polars.DataFrame(rows()).with_columns(polars.col("age").fill_nan(None)).write_csv(tmp_path / "rows.csv")
    polars.DataFrame(rows()).write_parquet(tmp_path / "rows.parquet")
    for X in (
        as_table(frame),
        polars.DataFrame(rows()),
        frame[["member", "city", "income", "age"]],  # columns are found by name
        tmp_path / "rows.csv",
        str(tmp_path / "rows.parquet"),
    ):
        np.testing.assert_array_equal(model.predict_proba(X), wanted)


@pytest.mark.parametrize("numbers", ["standard", "quantile"])
def test_a_tensor_is_predicted_as_the_array_that_it_holds(numbers):
    X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    model = make_model(X, numbers=numbers)
    wanted = model.predict_proba(X)
    for tensor in (torch.tensor(X), torch.tensor(X, dtype=torch.float64).requires_grad_()):
        np.testing.assert_array_equal(model.predict_proba(tensor), wanted)
    with refused("X must be two-dimensional"):
        model.predict(torch.tensor(1.0))
    for row in (X[0], torch.tensor(X[0])):
        with refused(r"got shape \(3,\); one row is X.reshape\(1, -1\), of a data frame frame.iloc\[\[0\]\]"):
            model.predict(row)
    with refused(r"has no column 'x2'"):
        model.predict(torch.ones(4, 2))


def test_unknown_levels_and_missing_values_are_predicted(frame):
    model = make_model(frame)
    odd = frame.head(4).assign(city=["Ur", None, "Oslo", ""], age=[np.nan, 1e6, 30.0, 40.0])
    said = "X has categories that were not there in training, .*: column 'city': '', 'Ur'"
    with pytest.warns(InputWarning, match=said) as warned:
        got = model.predict_proba(odd)
    assert len(warned) == 1 and warned[0].filename == __file__ and np.isfinite(got).all()
    np.testing.assert_allclose(got[2], model.predict_proba(odd.iloc[[2]])[0], rtol=1e-6)


def test_missing_columns_are_named_and_extra_ones_ignored(frame):
    model = make_model(frame)
    with refused(r"has no column 'city'"):
        model.predict(frame.drop(columns="city"))
    with pytest.warns(UserWarning, match="columns that the model does not read: 'note'"):
        got = model.predict(frame.assign(note="late"))
    np.testing.assert_array_equal(got, model.predict(frame))


def test_the_targets_own_column_is_ignored_without_a_warning(frame):
    model = make_model(frame)
    np.testing.assert_array_equal(model.predict(frame.assign(outcome="yes")), model.predict(frame))
    with refused("has no column 'age', 'income', 'city', 'member'"):
        model.predict(frame.assign(outcome="yes")[["outcome"]])


def test_many_rows_are_predicted_in_batches_of_bounded_size(frame, monkeypatch):
    model = make_model(frame, dtype=torch.float64)
    wanted = model.predict_proba(frame)
    sizes = []
    model.module.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    monkeypatch.setattr(model_file, "ROWS", 7)
    np.testing.assert_allclose(model.predict_proba(frame), wanted, rtol=1e-12)
    assert sizes == [7, 7, 7, 7, 2]
    sizes.clear()
    monkeypatch.setattr(model_file, "NUMBERS", 3 * len(model.layout.feature_names))
    assert len(model.predict(frame)) == 30 and sizes == [3] * 10
    monkeypatch.setattr(model_file, "NUMBERS", 1)  # wider than the bound: one row at a time
    assert len(model.predict(frame.head(2))) == 2


class Net(nn.Module):
    """A user's module with dropout whose result is what ``shape`` makes of (n, K)."""

    shape = staticmethod(lambda output: output)

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.linear, self.drop = nn.Linear(n_features, n_outputs), nn.Dropout(0.5)

    def forward(self, x):
        return self.shape(self.drop(self.linear(x)))


def test_a_module_that_was_trained_on_predicts_without_dropout_and_without_gradients(frame):
    model = make_model(frame, module=Net)
    wanted = model.predict_proba(frame)
    model.module.train()
    np.testing.assert_array_equal(model.predict_proba(frame), wanted)
    assert all(p.grad is None for p in model.module.parameters())


def test_a_regression_module_may_return_one_value_a_row(frame):
    wanted = make_model(frame, classes=None, module=Net).predict(frame)
    flat = type("Flat", (Net,), {"shape": staticmethod(lambda output: output[:, 0])})
    np.testing.assert_array_equal(make_model(frame, classes=None, module=flat).predict(frame), wanted)


@pytest.mark.parametrize(
    ("shape", "classes", "got"),
    [
        (lambda output: output[:, [0, 1, 1]], ("a", "b"), r"\(30, 3\)"),
        (lambda output: output.T, None, r"\(1, 30\)"),
        (lambda output: {"output": None}, None, "NoneType"),
    ],
)
def test_a_module_with_another_output_is_named(frame, shape, classes, got):
    odd = type("Odd", (Net,), {"shape": staticmethod(shape)})
    model = make_model(frame, classes=classes, module=odd)
    with refused(rf"Odd must return a tensor of shape \(30, [12]\), got {got}; correct"):
        model.predict(frame)


@pytest.mark.parametrize("several", [lambda *heads: heads, lambda a, b: {"outputs": a, "mean": b}])
def test_of_several_heads_the_first_predicts(frame, several):
    heads = type("Heads", (Net,), {"shape": staticmethod(lambda output: several(output, output.mean()))})
    expected = make_model(frame, module=Net).predict(frame)
    np.testing.assert_array_equal(make_model(frame, module=heads).predict(frame), expected)


def test_repr(frame):
    assert repr(make_model(frame)) == "TunedModel(MLP, 2 classes, 'outcome' from 4 columns)"
    assert repr(make_model(frame, classes=None)) == "TunedModel(MLP, regression, 'outcome' from 4 columns)"


def test_numbers_too_large_to_compute_with_are_clipped_as_in_training_or_told_with_their_row(frame):
    frame.loc[[2, 29], "income"] = 1e39, 1e30
    learned = frame.assign(income=rows()["income"])
    for numbers in ("standard", "piecewise", "none"):
        model = make_model(learned, classes=None, numbers=numbers)
        if numbers != "none":
            first, last = model.predict(frame.assign(age=40.0, city="Rome", member=True))[[2, 29]]
            assert np.isclose(first, last)
    with refused(r"column 'income' has a number of size 1e\+39 in row 2, too large for the float32 in which"):
        model.predict(frame)
