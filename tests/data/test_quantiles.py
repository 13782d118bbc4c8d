"""Piecewise-linear encoding equals its definition, bin by bin; normal scores in torch are those of NumPy and scipy."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import ndtri
from sklearn.tree import DecisionTreeClassifier

import gputune
from gputune.data import encode
from gputune.data.columns import N_BINS, fit_layout
from gputune.data.encode import bin_edges, bins_between, fit_statistics, transform
from gputune.data.table import as_table

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame({"a": [*RNG.normal(size=99), np.nan], "c": ["red", "blue"] * 50, "b": RNG.random(100)})


def encoded(x, edges):
    """The definition of arXiv:2203.05556, equation 1, of one number."""
    features = [0.0] * N_BINS
    for t, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
        is_first, is_last = t == 0, t == len(edges) - 2
        if x < low and not is_first:
            features[t] = 0.0
        elif x >= high and not is_last:
            features[t] = 1.0
        else:
            features[t] = (x - low) / (high - low)
    return features


@pytest.mark.parametrize("values", [RNG.normal(size=200), RNG.integers(0, 3, 50), [0.0, 1.0], [5.0, 5.0]])
def test_a_column_is_the_definition_of_each_of_its_numbers(values):
    edges = bin_edges(np.array(values, float))
    low, width, least, most = bins_between(edges)
    for x in [*values[:20], -9.0, 9.0]:
        np.testing.assert_allclose(np.clip((x - low) / width, least, most), encoded(x, edges), atol=1e-12)


def test_a_tree_cuts_where_classes_change():
    x = np.sort(1e9 + RNG.random(320))
    y = (x > x[100]).astype(int) + (x > x[200])
    edges = bin_edges(x, y)
    assert len(edges) == 4 and (edges[0], edges[-1]) == (x[0], x[-1])
    assert x[100] < edges[1] < x[101] and x[200] < edges[2] < x[201]
    tree = DecisionTreeClassifier(max_leaf_nodes=N_BINS, min_samples_leaf=5).fit(x[:, None] - 1e9, y).tree_
    np.testing.assert_allclose(edges[1:-1] - 1e9, np.sort(tree.threshold[tree.children_left >= 0]), atol=1e-6)
    assert len(bin_edges(x, x[:, None] + 0.0)) == N_BINS + 1
    assert bin_edges(np.ones(5), np.arange(5.0)).tolist() == [1.0]


@pytest.mark.parametrize("numbers", ["piecewise", "piecewise-tree"])
def test_features_of_a_table_and_what_is_missing(numbers):
    table = as_table(FRAME)
    layout, target = fit_layout(table), RNG.integers(0, 2, 100)
    raw, train = layout.raw(table), np.arange(1, 100)
    statistics = fit_statistics(raw, layout, train, numbers=numbers, target=target)
    x = transform(raw, statistics)
    assert layout.widths(numbers) == [N_BINS + 1, 2, N_BINS] and x.shape == (100, 35)
    assert layout.groups(statistics.places) == (*[0] * N_BINS, 1, 2, 2, *[0] * N_BINS)
    known = raw[1:99, 0]
    edges = bin_edges(known) if numbers == "piecewise" else bin_edges(known, target[1:99])
    np.testing.assert_allclose(x[0, :N_BINS], encoded(raw[0, 0], edges), atol=1e-12)
    np.testing.assert_allclose(x[99, :N_BINS], encoded(known.mean(), edges), atol=1e-12)
    np.testing.assert_array_equal(x[:, N_BINS : N_BINS + 3], raw[:, 1:4])
    other = np.where(np.arange(100) == 0, 1 - target, target)  # of a row that is not for training
    again = fit_statistics(raw, layout, train, numbers=numbers, target=other)
    np.testing.assert_array_equal(transform(raw, again), x)


def test_a_search_is_that_on_encoded_rows_and_its_model_is_saved(tmp_path):
    layout, (train, valid) = fit_layout(as_table(FRAME)), np.split(RNG.permutation(100), [70])
    y = (FRAME.b + 0.3 * RNG.normal(size=100)).to_numpy()
    raw = layout.raw(as_table(FRAME))
    how = {"cv": [(train, valid)], "n_trials": 2, "max_epochs": 3, "verbose": 0, "dtype": "float64", "workers": 1}
    for numbers in ("piecewise", "piecewise-tree"):
        x = transform(raw, fit_statistics(raw, layout, train, numbers=numbers, target=y))
        study = gputune.tune("mlp", FRAME, y, numbers=numbers, **how)
        plain = gputune.tune("mlp", x, y, numbers="none", columns="keep", **how)
        np.testing.assert_allclose(study.curves, plain.curves, rtol=1e-9)
    model = gputune.tune("realmlp", FRAME, y, numbers="piecewise", **how).best_model()
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(FRAME), model.predict(FRAME))


def test_the_normal_deviate_is_scipys():
    p = np.concatenate([np.logspace(-7, -0.31, 500), 1 - np.logspace(-7, -0.31, 500), [0.075, 0.925, 0.5]])
    np.testing.assert_allclose(encode.normal_deviate(torch.tensor(p)).numpy(), ndtri(p), rtol=1e-12, atol=1e-15)
    ends = encode.normal_deviate(torch.tensor([0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends, [-5.199337582605575, 5.199337582605575], rtol=1e-9)


@pytest.mark.parametrize("rows", [2, 3, 40, 2500])
def test_the_scores_are_those_of_numpy(rows):
    rng = np.random.default_rng(rows)
    columns = [rng.normal(size=rows), rng.lognormal(8, 3, rows), rng.integers(0, 4, rows), 1e-9 * rng.normal(size=rows)]
    part = np.stack(columns, axis=1)
    part[0] = 17.0, 3.0, 0.0, 1e-9
    part[1] = -2.0, 5.0, 3.0, -1e-9
    fitted = encode.fit_quantiles(part)
    beyond = np.stack([part.min(0) - 1, part.max(0) + 1, part.mean(0), np.full(4, 0.5)])
    values = np.concatenate([part, beyond, fitted, (fitted[1:] + fitted[:-1]) / 2])
    expected = np.stack([encode.normal_scores(values[:, j], fitted[:, j]) for j in range(4)], axis=1)
    found = encode.normal_scores_of(torch.tensor(values), torch.tensor(fitted)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
