"""A tuned model predicts from any kind of rows; for scikit-learn it is an estimator that is fitted
already."""

import re

import matplotlib
import numpy as np
import pandas
import polars
import pytest
import torch
from sklearn.base import is_classifier, is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_diabetes
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import partial_dependence, permutation_importance
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, r2_score
from sklearn.utils.validation import check_is_fitted
from torch import nn

import gputune
from gputune.data.encode import transform
from gputune.data.table import as_table
from gputune.ground.errors import InputWarning
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
    """Outputs with last bits that depend on a row's position, like a matrix product's."""

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
    assert repr(model) == "TunedModel(MLP, regression, 'outcome' from 4 columns)"
    assert repr(make_model(frame)) == "TunedModel(MLP, 2 classes, 'outcome' from 4 columns)"
    with refused(
        "predict_proba needs a model that predicts classes, but this model is a regression. Use "
        "predict"
    ):
        model.predict_proba(frame)


def test_every_kind_of_rows_gives_the_same(frame, tmp_path):
    model = make_model(frame)
    wanted = model.predict_proba(frame)
    polars.DataFrame(rows()).with_columns(polars.col("age").fill_nan(None)).write_csv(
        tmp_path / "rows.csv"
    )
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
        with refused(
            r"got shape \(3,\). One row is X.reshape\(1, -1\), or frame.iloc\[\[0\]\] of a DataFrame"
        ):
            model.predict(row)
    with refused(r"must have \d columns as in training, got \d column"):
        model.predict(torch.ones(4, 2))


def test_unknown_levels_and_missing_values_are_predicted(frame):
    model = make_model(frame)
    odd = frame.head(4).assign(city=["Ur", None, "Oslo", ""], age=[np.nan, 1e6, 30.0, 40.0])
    said = (
        "X has categories that the training data did not have.* for them: column 'city': '', 'Ur'"
    )
    with pytest.warns(InputWarning, match=said) as warned:
        got = model.predict_proba(odd)
    assert len(warned) == 1 and warned[0].filename == __file__ and np.isfinite(got).all()
    np.testing.assert_allclose(got[2], model.predict_proba(odd.iloc[[2]])[0], rtol=1e-6)


def test_missing_columns_are_named_and_others_ignored(frame):
    model = make_model(frame)
    with refused(r"has no column 'city'"):
        model.predict(frame.drop(columns="city"))
    with refused("has no columns 'age', 'income', 'city', 'member'"):
        model.predict(frame.assign(outcome="yes")[["outcome"]])
    with pytest.warns(UserWarning, match="columns that the model does not read: 'note'"):
        got = model.predict(frame.assign(note="late"))
    np.testing.assert_array_equal(got, model.predict(frame))
    # its target, without a warning
    np.testing.assert_array_equal(model.predict(frame.assign(outcome="yes")), got)


class Net(nn.Module):
    """A user's module with dropout; ``shape`` gives its result (n, K) another form."""

    shape = staticmethod(lambda output: output)

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.linear = nn.Linear(n_features, n_outputs)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.shape(self.drop(self.linear(x)))


def test_many_rows_are_predicted_in_batches_of_bounded_size_without_dropout_and_gradients(
    frame, monkeypatch
):
    model = make_model(frame, module=Net)
    wanted = model.predict_proba(frame)
    model.module.train()
    np.testing.assert_array_equal(model.predict_proba(frame), wanted)
    assert all(p.grad is None for p in model.module.parameters())
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


@pytest.mark.parametrize(
    ("shape", "classes", "got"),
    [
        (lambda output: output[:, 0], None, None),  # one value a row
        # of several heads the first predicts
        (lambda output: (output, output.mean()), ("no", "yes"), None),
        (lambda output: {"outputs": output, "mean": output.mean()}, ("no", "yes"), None),
        (lambda output: output[:, [0, 1, 1]], ("a", "b"), r"\(30, 3\)"),
        (lambda output: output.T, None, r"\(1, 30\)"),
        (lambda output: {"output": None}, None, "NoneType"),
    ],
)
def test_a_module_may_return_more_than_its_outputs_and_one_with_others_is_named(
    frame, shape, classes, got
):
    model = make_model(
        frame, classes=classes, module=type("Odd", (Net,), {"shape": staticmethod(shape)})
    )
    if got is None:
        expected = make_model(frame, classes=classes, module=Net).predict(frame)
        np.testing.assert_array_equal(model.predict(frame), expected)
        return
    with refused(rf"Odd must return a tensor of shape \(30, [12]\), got {got}\. Correct"):
        model.predict(frame)


def test_numbers_too_large_to_compute_with_are_clipped_as_in_training_or_told_with_their_row(frame):
    frame.loc[[2, 29], "income"] = 1e39, 1e30
    learned = frame.assign(income=rows()["income"])
    for numbers in ("standard", "piecewise", "none"):
        model = make_model(learned, classes=None, numbers=numbers)
        if numbers != "none":
            first, last = model.predict(frame.assign(age=40.0, city="Rome", member=True))[[2, 29]]
            assert np.isclose(first, last)
    with refused(
        r"column 'income' has a number of size 1e\+39 in row 2, too large for the float32 in which"
    ):
        model.predict(frame)


HOW = {"n_trials": 3, "max_epochs": 5, "cv": 2, "verbose": 0, "workers": 1}
DIABETES = load_diabetes(return_X_y=True)


@pytest.fixture(scope="module")
def study(iris):
    return gputune.tune("mlp", iris[0], np.array(["a", "b", "c"])[iris[1]], **HOW)


@pytest.fixture(scope="module")
def model(study):
    return study.best_model()


@pytest.fixture(scope="module")
def priced():
    """A model of numbers."""
    return gputune.tune("mlp", *DIABETES, **HOW).best_model()


def test_it_scores_as_estimators_do_what_a_search_reads(model, priced, iris):
    X = iris[0]
    y = np.array(["a", "b", "c"])[iris[1]]
    weights = np.arange(150)
    score = accuracy_score(y, model.predict(X))
    worth = r2_score(DIABETES[1], priced.predict(DIABETES[0]))
    assert model.score(X, y, weights) == accuracy_score(y, model.predict(X), sample_weight=weights)
    assert {model.score(X, labels) for labels in (y, y.tolist(), pandas.Series(y), y[:, None])} == {
        score
    }
    odd = np.where(np.arange(150) < 10, "new", y)
    assert model.score(X, odd) == accuracy_score(odd, model.predict(X))
    as_column = torch.as_tensor(DIABETES[1])[:, None]
    assert priced.score(*DIABETES) == priced.score(DIABETES[0], as_column) == worth
    text = [f"${value:,.2f}" for value in 1000 * DIABETES[1]]
    assert priced.score(DIABETES[0], text) == r2_score(
        1000 * DIABETES[1], priced.predict(DIABETES[0])
    )
    for one, inputs, bad, message in (
        (
            model,
            X,
            iris[1],
            "y has no class of the model: it holds '0', '1', '2', but .* 'a', 'b', 'c'",
        ),
        (model, X, [None, *y[1:]], r"y has 1 missing value \(the first in row 0\)"),
        (model, X, y[:9], r"one label per row of X, got shape \(9,\) and 150 rows"),
        (priced, DIABETES[0], [None, *DIABETES[1][1:]], "y has 1 missing value"),
        (priced, DIABETES[0], ["dear", *text[1:]], "needs numbers in y, got text such as 'dear'"),
    ):
        with refused(message):
            one.score(inputs, bad)


def test_it_scores_a_file_by_the_name_of_its_target(iris, priced, tmp_path):
    rows = pandas.DataFrame(iris[0], columns=["a", "b", "c", "d"])
    rows["kind"] = np.array(["x", "y", "z"])[iris[1]]
    path = tmp_path / "iris.csv"
    rows.to_csv(path, index=False)
    model = gputune.tune("mlp", path, "kind", **HOW).best_model()
    expected = model.score(rows.drop(columns="kind"), rows["kind"])
    assert expected > 0.3
    assert model.score(path, "kind") == model.score(str(path), "kind") == expected
    assert model.score(rows, "kind") == expected
    with refused("kinds"):
        model.score(path, "kinds")
    arrays = tmp_path / "prices.npz"
    np.savez(arrays, x=DIABETES[0], price=DIABETES[1])
    assert priced.score(arrays, "price") == priced.score(*DIABETES)


def test_scikit_learn_explains_and_calibrates_it_but_does_not_fit_it(model, priced, iris):
    X = iris[0]
    y = np.array(["a", "b", "c"])[iris[1]]
    check_is_fitted(model)
    assert model.classes_.tolist() == ["a", "b", "c"] and is_classifier(model)
    assert is_regressor(priced) and not hasattr(priced, "classes_")
    assert permutation_importance(model, X, y, n_repeats=2).importances.shape == (4, 2)
    assert permutation_importance(priced, *DIABETES, n_repeats=2).importances.shape == (10, 2)
    assert partial_dependence(priced, DIABETES[0], [2], grid_resolution=3)["average"].shape == (
        1,
        3,
    )
    with matplotlib.rc_context({"backend": "agg"}):
        assert ConfusionMatrixDisplay.from_estimator(model, X, y).confusion_matrix.sum() == 150
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1)
    with refused(r"already fitted. Wrap the model in sklearn\.frozen\.FrozenEstimator"):
        model.fit(X, y)


def test_a_trial_of_a_number_is_trained_as_the_best_is(study, model, iris):
    best = study.best_trial
    other = study.ranking()[-1]
    again = study.best_model(trial=best.number)
    np.testing.assert_array_equal(again.predict_proba(iris[0]), model.predict_proba(iris[0]))
    model = study.best_model(trial=np.int64(other.number))
    assert model.info["params"] == model.params == other.params
    # The text of info shows the digests of the training rows in a few words.
    assert re.search(r"'row_sample': <\d+ row digests>", str(model.info))
    for trial in (3, -1, True, "0", 1.0):
        with refused("must be the number of a trial that has a score, for example"):
            study.best_model(trial=trial)
