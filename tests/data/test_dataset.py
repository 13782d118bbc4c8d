"""Each fold's copy of X and its targets come from its own training rows, and equal copies are kept
once."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import KFold

import gputune
from gputune.data import scaling
from gputune.data.arrays import as_arrays, fit_channels
from gputune.data.columns import fit_layout
from gputune.data.dataset import ScorerRows, first_equal, make_dataset
from gputune.data.encode import fit_statistics, transform
from gputune.data.table import as_table
from gputune.data.target import check_target
from gputune.data.weights import check_weights

N = 60


def table():
    g = np.random.default_rng(0)
    a = g.normal(5, 3, N)
    b = np.where(g.random(N) < 0.2, np.nan, g.lognormal(size=N))
    return pd.DataFrame({"a": a, "b": b, "c": g.choice(["x", "y", "z"], N)})


def labels():
    return np.array(["no", "yes", "perhaps"])[np.random.default_rng(1).integers(0, 3, N)]


FOLDS = list(KFold(3).split(np.zeros(N)))


def build(
    X=None, y=None, folds=FOLDS, *, numbers="standard", dtype=torch.float64, layout=None, **weights
):
    X = as_table(table()) if X is None else X
    layout = layout or fit_layout(X)
    raw = layout.raw(X)
    target = check_target(labels() if y is None else y, n_rows=N)
    statistics = [fit_statistics(raw, layout, train, numbers=numbers) for train, _ in folds]
    weights = check_weights(weights.get("sample_weight"), weights.get("class_weight"), target)
    like = torch.empty(0, dtype=dtype)
    return make_dataset(raw, statistics, target, folds, weights=weights, like=like), statistics


def test_shapes_and_types():
    data, statistics = build(dtype=torch.float32)
    assert (data.n_folds, data.n_rows, data.n_features, data.n_outputs, data.task) == (
        3,
        N,
        6,
        3,
        "multiclass",
    )
    assert (data.x.shape, data.copies, len(statistics)) == ((3, N, 6), (0, 1, 2), 3)
    assert (data.dtype, data.device, data.weights, data.present) == (
        torch.float32,
        torch.device("cpu"),
        None,
        None,
    )
    assert (data.center.tolist(), data.scale.tolist()) == ([0, 0, 0], [1, 1, 1])
    assert data.center.dtype == data.scale.dtype == torch.float64
    rows = [part for fold in data.folds for part in (fold.train, fold.valid)]
    assert {part.dtype for part in (data.y, data.target, *rows)} == {torch.int64}


@pytest.mark.parametrize("numbers", ["standard", "robust", "quantile", "piecewise", "none"])
def test_a_fold_reads_what_its_own_rows_fit(numbers):
    data, statistics = build(numbers=numbers)
    layout = fit_layout(as_table(table()))
    raw = layout.raw(as_table(table()))
    for f, (train, _) in enumerate(FOLDS):
        expected = transform(raw, fit_statistics(raw, layout, train, numbers=numbers))
        np.testing.assert_array_equal(data.x[data.copies[f]].numpy(), expected)
        np.testing.assert_array_equal(transform(raw, statistics[f]), expected)


def test_equal_copies_are_kept_once():
    X = as_table(table().drop(columns="b"))
    assert build(X, numbers="none")[0].copies == (0, 0, 0)
    assert build(X)[0].copies == (0, 1, 2)
    # Where values are missing, what fills them differs from fold to fold.
    assert build(numbers="none")[0].copies == (0, 1, 2)
    one, two = KFold(2).split(np.zeros(N))
    data, _ = build(folds=[one, one, two, one])
    assert (data.copies, len(data.x)) == ((0, 0, 1, 0), 2) and not torch.equal(*data.x)


APART = [(numbers, 3, False) for numbers in ("none", "robust", "quantile", "piecewise")]


@pytest.mark.parametrize(
    ("numbers", "copies", "tensor"), [("standard", 1, False), ("standard", 1, True), *APART]
)
def test_folds_of_a_large_table_share_one_copy_where_an_affine_map_lies_between(
    numbers, copies, tensor, monkeypatch
):
    X = table()[["a", "b"]].assign(t=1e9 + np.arange(N)) if tensor else table()
    X = torch.from_numpy(X.to_numpy()) if tensor else as_table(X)
    own, _ = build(X, numbers=numbers)
    monkeypatch.setattr(scaling, "SHARED_BEYOND", own.input_bytes)
    assert len(build(X, numbers=numbers)[0].x) == 3
    monkeypatch.setattr(scaling, "SHARED_BEYOND", own.input_bytes - 1)
    monkeypatch.setattr(scaling, "_BLOCK", 7)
    shared, _ = build(X, numbers=numbers)
    assert shared.input_bytes * 3 == own.input_bytes * copies
    for fold in range(3):
        ((one,), (other,)) = (data.rows(fold, torch.arange(N)) for data in (shared, own))
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        assert fold or torch.equal(one, other)


@pytest.mark.parametrize("tensor", [False, True])
def test_folds_share_no_copy_of_numbers_that_are_clipped(tensor, monkeypatch):
    X = table()[["a", "b"]].to_numpy(copy=True)
    X[0, 0] = 1e9  # beyond the limits of the two folds that do not train on it
    monkeypatch.setattr(scaling, "SHARED_BEYOND", 0)
    data, _ = build(torch.from_numpy(X) if tensor else as_table(X))
    assert data.copies == (0, 1, 2) and data.x[:, 0, 0].abs().max() == 20


def test_rounding_limits_no_training_row_of_a_tensor_far_from_0():
    X = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)) + 1e6
    X[5] += 500  # 45 standard deviations
    statistics = fit_statistics(X, fit_layout(X), np.arange(2000))
    assert (
        scaling.limited_features(X, [statistics])
        == []
        != scaling.limited_features(X * 2, [statistics])
    )


@pytest.mark.parametrize("model", ["mlp", "logistic"])
def test_a_search_on_one_copy_is_that_on_copies(model, monkeypatch):
    options = {"n_trials": 2, "cv": 3, "scoring": "neg_log_loss", "dtype": "float64", "verbose": 0}
    options |= {"max_epochs": 3, "class_weight": "balanced"} if model == "mlp" else {}
    own = []
    shared = []
    for beyond, found in ((scaling.SHARED_BEYOND, own), (0, shared)):
        monkeypatch.setattr(scaling, "SHARED_BEYOND", beyond)
        study = gputune.tune(model, table(), labels(), **options)
        found += [study.curves, study.best_model().predict_proba(table())]
    for one, other in zip(own, shared):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_regression_is_standardised_by_the_training_rows():
    y = np.random.default_rng(2).lognormal(3, 1, N)
    data, _ = build(y=y)
    assert (data.task, data.n_outputs, data.present, data.y.shape) == (
        "regression",
        1,
        None,
        (3, N),
    )
    np.testing.assert_array_equal(data.target.numpy(), y)
    for f, fold in enumerate(data.folds):
        train = data.y[f, fold.train]
        assert abs(train.mean()) < 1e-12 and abs(train.std(correction=0) - 1) < 1e-12
    np.testing.assert_allclose(
        (data.y * data.scale[:, None] + data.center[:, None]).numpy(), [y] * 3
    )
    # constant in the training rows of the last fold
    data, _ = build(y=np.r_[np.full(40, 0.1), np.arange(20.0)])
    assert data.scale[2] == 1
    np.testing.assert_allclose(data.y[2, :40].numpy(), 0, atol=1e-15)


def test_classes_without_training_rows_are_marked():
    data, _ = build(y=np.array(["a", "b", "c"])[np.arange(N) // 20])
    assert data.present.tolist() == [[False, True, True], [True, False, True], [True, True, False]]


def test_weights_are_one_row_a_fold():
    assert build(sample_weight=np.ones(N))[0].weights is None
    data, _ = build(sample_weight=np.arange(N), class_weight={"yes": 2}, dtype=torch.float32)
    expected = np.arange(N) * np.where(labels() == "yes", 2, 1)
    np.testing.assert_array_equal(data.weights.numpy(), [expected] * 3)
    assert data.weights.dtype == torch.float64
    balanced = build(class_weight="balanced")[0]
    for f, fold in enumerate(balanced.folds):
        weights = balanced.weights[f, fold.train]
        codes = balanced.y[fold.train]
        sums = torch.stack([weights[codes == k].sum() for k in range(3)])
        torch.testing.assert_close(sums, sums.mean().expand(3))
    assert not torch.equal(balanced.weights[0], balanced.weights[1])
    y = np.repeat([0, 1, 0, 1], [20, 20, 10, 10])
    folds = [(np.arange(40), np.arange(40, 60)), (np.arange(10, 60), np.arange(10))]
    weights = build(y=y, folds=folds, class_weight="balanced")[0].weights
    assert (weights == 1).all(1).tolist() == [True, False]


@pytest.mark.parametrize("numbers", ["standard", "quantile", "none"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_no_leakage(numbers, task):
    """Other values in a fold's validation rows change no training row, statistic, target or weight
    of that fold."""
    y = labels() if task == "classification" else np.random.default_rng(3).normal(size=N)
    options = {"numbers": numbers, "class_weight": "balanced" if task == "classification" else None}
    folds = list(KFold(3, shuffle=True, random_state=0).split(np.zeros(N)))
    layout = fit_layout(as_table(table()))
    g = np.random.default_rng(4)
    for f, (train, valid) in enumerate(folds):
        other = table()
        other.loc[valid, "a"] = g.normal(1e4, 1e4, len(valid))
        other.loc[valid, "b"] = np.where(g.random(len(valid)) < 0.5, np.nan, -1e4)
        other.loc[valid, "c"] = g.choice(["x", "unseen"], len(valid))
        y_other = y.copy()
        y_other[valid] = g.permutation(y[valid])
        if task == "regression":
            y_other[valid] += 1e3
        (before, s), (after, t) = (
            build(as_table(X), labels, folds, layout=layout, **options)
            for X, labels in ((table(), y), (other, y_other))
        )
        assert t[f].to_json() == s[f].to_json()
        assert torch.equal(after.x[after.copies[f], train], before.x[before.copies[f], train])
        assert (after.center[f], after.scale[f]) == (before.center[f], before.scale[f])
        assert torch.equal(after.targets(f)[train], before.targets(f)[train])
        if task == "classification":
            assert torch.equal(after.weights[f, train], before.weights[f, train])
        # The change is seen where it was made.
        assert not torch.equal(after.x[after.copies[f], valid], before.x[before.copies[f], valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_found_at_their_first_place(dtype, monkeypatch):
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (60, 3))).to(dtype)
    rows[rows == 0] *= -1.0  # -0.0 is equal to 0.0
    rows[::2] = rows[::2].abs()
    values = rows.numpy()
    expected = [int((values == row).all(1).argmax()) for row in values]
    assert first_equal(rows).tolist() == expected
    assert first_equal(torch.eye(5, dtype=dtype)) is None
    monkeypatch.setattr("gputune.data.dataset._ODD", 0)  # every row has one key
    assert first_equal(torch.eye(5, dtype=dtype)) is None
    assert first_equal(torch.eye(3, dtype=dtype)[[0, 1, 0]]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["classes", "numbers", "column", "labels"])
def test_rows_of_arrays_that_are_not_gathered_train_as_their_copies(kind):
    g = np.random.default_rng(0)
    numbers = g.random((N, 2))
    y = {
        "classes": np.arange(N) % 3,
        "numbers": numbers[:, 0],
        "column": numbers[:, :1],
        "labels": 1 * (numbers > 0.5),
    }
    y = y[kind]
    X = {"image": g.random((2 * N, 2, 3, 3), np.float32), "ids": np.arange(2 * N)}
    kept = g.permutation(2 * N)[:N]
    target = replace(check_target(y, n_rows=N), standardize=kind != "column")
    found = []
    weights = check_weights(g.random(N), "balanced" if kind == "classes" else None, target)
    for arrays in (as_arrays(X).select(kept), as_arrays({name: x[kept] for name, x in X.items()})):
        statistics = fit_channels(arrays, [train for train, _ in FOLDS], "standard")
        data = make_dataset(arrays, statistics, target, FOLDS, weights=weights, like=torch.empty(0))
        for f, fold in enumerate(data.folds):
            for rows in (fold.train, fold.valid):
                found.append(
                    [
                        *data.rows(f, rows),
                        data.targets(f)[rows],
                        data.target[rows],
                        data.weights[f, rows],
                    ]
                )
            found[-1] += map(torch.from_numpy, ScorerRows(arrays, None).rows(fold).values())
    lazy = found[: len(found) // 2]
    copied = found[len(found) // 2 :]
    assert all(torch.equal(a, b) for x, y in zip(lazy, copied) for a, b in zip(x, y, strict=True))
    if kind == "column":
        assert data.y.shape == (1, N, 1)
