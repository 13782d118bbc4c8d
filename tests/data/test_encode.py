"""The layout comes from X alone, statistics from the training rows alone, and one transform applies
both.

Piecewise-linear encoding equals its definition, bin by bin; normal scores in torch are those of
NumPy and scipy.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import ndtri
from sklearn.preprocessing import QuantileTransformer, RobustScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier

import gputune
from gputune.data import encode
from gputune.data.columns import N_BINS, Layout, fit_layout
from gputune.data.encode import Statistics, bin_edges, bins_between, fit_statistics, transform
from gputune.data.scaling import joined_statistics
from gputune.data.table import Table, as_table
from gputune.ground.types import NUMBERS
from refused import refused

N = 200
TRAIN = np.arange(1, N, 2)


def frame():
    g = np.random.default_rng(0)
    n = np.arange(N)
    return pd.DataFrame(
        {
            "age": np.where(n % 7 == 0, np.nan, g.normal(40, 10, N)),
            "city": pd.Series(g.choice(["Bonn", "Ulm", "Kiel"], N)).mask(n % 11 == 0),
            "member": g.random(N) < 0.3,
            "joined": pd.to_datetime("2019-12-01")
            + pd.to_timedelta(g.integers(0, 400, N), unit="D"),
            "income": g.lognormal(size=N),
        }
    )


def fit(X):
    """The layout of X, and its features before any statistics."""
    X = X if isinstance(X, torch.Tensor) else as_table(X)
    layout = fit_layout(X)
    return layout, layout.raw(X)


def test_features_of_a_mixed_frame():
    table = as_table(frame())
    layout, raw = fit(table)
    levels = "city=Bonn city=Kiel city=Ulm city=(missing)"
    dates = "joined.days joined.month joined.day joined.weekday"
    assert layout.feature_names == tuple(
        f"age age=(missing) {levels} member {dates} income".split()
    )
    assert layout.numeric.tolist() == [True, *[False] * 6, *[True] * 5]
    assert (raw.dtype, raw.shape) == (np.float64, (N, 12))
    np.testing.assert_array_equal(raw[:, 0], table.column("age"))
    np.testing.assert_array_equal(raw[:, 1], np.isnan(table.column("age")))
    np.testing.assert_array_equal(raw[:, 2:6].sum(1), np.ones(N))
    np.testing.assert_array_equal(raw[:, 5] == 1, [value is None for value in table.column("city")])
    dates = frame()["joined"].dt
    for j, part in enumerate([dates.month, dates.day, dates.day_of_week]):
        np.testing.assert_array_equal(raw[:, 8 + j], part)
    assert raw[0, 7] == (frame()["joined"][0] - pd.Timestamp("1970-01-01")).days


@pytest.mark.parametrize("ways", [NUMBERS, NUMBERS[::-1]])
def test_inputs_side_by_side_are_those_of_each_way_to_prepare_numbers(ways):
    layout, raw = fit(frame())
    parts = [
        fit_statistics(raw, layout, TRAIN, numbers=way, target=np.arange(N) // 2 % 2)
        for way in ways
    ]
    written = json.dumps(joined_statistics(parts).to_json(), allow_nan=False)
    x = transform(raw, Statistics.from_json(json.loads(written)))
    np.testing.assert_array_equal(
        x, np.concatenate([transform(raw, part) for part in parts], axis=1)
    )


@pytest.mark.parametrize("numbers", ["standard", "robust", "quantile", "piecewise", "none"])
def test_layout_and_statistics_survive_json_bit_for_bit(numbers):
    layout, raw = fit(frame())
    statistics = fit_statistics(raw, layout, TRAIN, numbers=numbers)
    written = json.loads(json.dumps([layout.to_json(), statistics.to_json()], allow_nan=False))
    x = transform(raw, statistics)
    assert Layout.from_json(written[0]) == layout and np.isfinite(x).all()
    assert transform(raw, Statistics.from_json(written[1])).tobytes() == x.tobytes()


def test_standard_numbers_equal_scikit_learns_and_none_only_fills():
    layout, raw = fit(frame())
    numeric = layout.numeric
    x = transform(raw, fit_statistics(raw, layout, TRAIN))
    expected = StandardScaler().fit(raw[TRAIN]).transform(raw)
    filled = np.where(np.isnan(raw), 0.0, expected)  # the mean, standardised
    np.testing.assert_allclose(x[:, numeric], filled[:, numeric], rtol=0, atol=1e-13)
    np.testing.assert_array_equal(x[:, ~numeric], raw[:, ~numeric])
    given = raw.copy()
    x = transform(raw, fit_statistics(raw, layout, TRAIN, numbers="none"))
    np.testing.assert_allclose(
        x, np.where(np.isnan(raw), np.nanmean(raw[TRAIN, 0]), raw), rtol=1e-15
    )
    np.testing.assert_array_equal(raw, given)  # nothing is changed that was given


@pytest.mark.parametrize("n", [7, 200, 3000])
def test_quantile_numbers_equal_scikit_learns(n):
    g = np.random.default_rng(1)
    columns = [
        g.normal(size=n),
        g.integers(0, 4, n),
        g.lognormal(size=n),
        np.round(g.normal(size=n), 1),
    ]
    values = np.stack(columns, axis=1).astype(float)
    values[::5, 0] = np.nan
    layout, raw = fit(values)
    train = np.arange(n)[: -n // 3]
    x = transform(raw, fit_statistics(raw, layout, train, numbers="quantile"))
    part = raw[train]
    mean = np.where(np.isnan(part), 0, part).sum(0) / (~np.isnan(part)).sum(0)
    filled = np.where(np.isnan(raw), mean, raw)
    how = {"n_quantiles": min(1000, len(train)), "output_distribution": "normal", "subsample": None}
    expected = QuantileTransformer(**how).fit(part).transform(filled)
    np.testing.assert_allclose(x[:, layout.numeric], expected[:, layout.numeric], rtol=0, atol=1e-9)


def test_quantiles_of_tiny_numbers_and_of_a_column_constant_in_the_rows():
    values = np.stack([np.linspace(0, 1e-8, 50), np.arange(50) // 40], axis=1)
    x = transform(values, fit_statistics(values, fit(values)[0], np.arange(40), numbers="quantile"))
    assert (np.diff(x[:40, 0]) > 0).all()
    np.testing.assert_array_equal(x[:, 1], values[:, 1])


def test_robust_numbers_are_clipped_smoothly_after_scikit_learns_robust_scale():
    values = np.random.default_rng(0).lognormal(sigma=2, size=(60, 4))
    # equal quartiles: half the range instead
    values[:, 1] = np.where(np.arange(60) % 10, 5.0, values[:, 1])
    values[:40, 2] = 7.0  # constant in the training rows: only centred
    values[::7, 3] = np.nan
    (layout, raw), train = fit(values), np.arange(40)
    statistics = fit_statistics(raw, layout, train, numbers="robust")
    x = transform(raw, statistics)
    scaled = (
        RobustScaler()
        .fit(raw[train])
        .transform(np.where(np.isnan(raw), np.nanmean(raw[train], 0), raw))
    )
    scaled[:, 1] *= 2 / np.ptp(values[train, 1])
    expected = np.where(layout.numeric, scaled / np.sqrt(1 + (scaled / 3) ** 2), raw)
    np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-12)
    largest = np.finfo(np.float64).max
    far = np.array([1e30, 1e160, -1e160, largest, -largest])[:, None] * np.ones(raw.shape[1])
    x = transform(far, statistics)
    np.testing.assert_allclose(
        x[:, layout.numeric], 3 * np.sign(far)[:, layout.numeric], rtol=1e-15
    )


@pytest.mark.parametrize(
    ("numbers", "dtype", "far"),
    [
        ("standard", None, np.finfo(np.float64).max),
        ("piecewise", None, 1.3e300),
        ("standard", torch.float64, 1e300),
        ("standard", torch.float32, 1e38),
    ],
)
def test_a_number_whose_square_overflows_is_scaled_as_a_smaller_one(numbers, dtype, far):
    values = np.random.default_rng(0).normal(size=(60, 2))
    values[7, 1] = far

    def inputs(values, rows):
        given = values if dtype is None else torch.tensor(values, dtype=dtype)
        statistics = fit_statistics(given, fit_layout(as_table(values)), rows, numbers=numbers)
        return np.asarray(transform(given, statistics))

    smaller = np.where(values == far, 1e12, values)
    for rows in (np.arange(60), np.arange(8, 60)):  # with that number, and without
        np.testing.assert_allclose(
            inputs(values, rows), inputs(smaller, rows), rtol=1e-5, atol=1e-6
        )


def test_a_column_constant_or_missing_in_the_training_rows():
    constant = np.full(30, 1e6 + 0.1)
    missing = np.full(30, np.nan)
    values = np.stack([np.r_[constant, 5, 6], np.r_[missing, 5, 6], np.arange(32)], axis=1)
    for X in (values, torch.tensor(values)):
        layout, raw = fit(X)
        statistics = fit_statistics(raw, layout, np.arange(30))
        assert statistics.scale[:3].tolist() == [1, 1, 1]
        x = np.asarray(transform(raw, statistics))
        np.testing.assert_allclose(x[:30, 0], 0, atol=1e-9)
        assert x[0, 1] == 0 and np.isfinite(x).all()


def test_a_tensor_gives_the_numbers_of_an_array():
    values = np.random.default_rng(2).normal(3, 2, (60, 4))
    values[::7, 1] = np.nan
    values[:, 2] = 1.0
    (layout, array), (of_tensor, tensor) = fit(values), fit(torch.tensor(values))
    assert of_tensor == layout
    known = tensor[:, [0, 3]].contiguous()
    assert fit(known)[1].data_ptr() == known.data_ptr()  # it is not copied before the transform
    for numbers in ("standard", "none"):
        expected, x = (
            transform(raw, fit_statistics(raw, layout, TRAIN[:30], numbers=numbers))
            for raw in (array, tensor)
        )
        assert isinstance(x, torch.Tensor)
        np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-13)


SINGLE = torch.float32
DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("given", "used"),
    [
        *[(t, SINGLE) for t in (torch.float16, torch.bfloat16, SINGLE)],
        *[(t, DOUBLE) for t in (DOUBLE, torch.int32, torch.bool)],
    ],
)
def test_tensor_types(given, used):
    X = torch.arange(8).reshape(4, 2)
    layout, raw = fit(X > 2 if given == torch.bool else X.to(given))
    assert transform(raw, fit_statistics(raw, layout, np.arange(3))).dtype == used


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_stays_on_its_gpu():
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[::6, 1] = torch.nan
    (layout, raw), (on_cpu, plain) = fit(values.cuda()), fit(values)
    x = transform(raw, fit_statistics(raw, layout, np.arange(30)))
    assert layout == on_cpu and x.is_cuda
    expected = transform(plain, fit_statistics(plain, layout, np.arange(30)))
    torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-13)


KEPT = np.array([[0.0, 1, np.nan, np.nan, 5], [0, 2, 3, np.nan, 6], [0, 4, 5, np.nan, 7]])


@pytest.mark.parametrize("X", [as_table(KEPT), torch.tensor(KEPT)])
def test_columns_that_are_kept_are_one_feature_each(X):
    layout = fit_layout(X, columns="keep")
    assert layout.feature_names == layout.inputs == tuple(f"x{j}" for j in range(5))
    assert layout.notes == (
        "Column 'x2': missing values become the mean of the training rows.",
        "Column 'x3': missing values are all 0.",
    )
    raw = layout.raw(X)
    found = np.asarray(transform(raw, fit_statistics(raw, layout, np.arange(3), numbers="none")))
    np.testing.assert_array_equal(found, [[0, 1, 4, 0, 5], [0, 2, 3, 0, 6], [0, 4, 5, 0, 7]])
    assert fit_layout(X).feature_names == ("x1", "x2", "x2=(missing)", "x4")
    # whose difference overflows: a warning is an error here
    ends = np.array([[-1.7e308], [1.7e308]])
    assert (
        fit_layout(
            as_table(ends) if isinstance(X, Table) else torch.tensor(ends), columns="keep"
        ).notes
        == ()
    )


def test_text_and_dates_that_are_kept_become_features_as_ever():
    layout = fit_layout(as_table(np.arange(60.0).reshape(30, 2)), columns="keep")
    assert layout.notes == (
        "Columns 'x0', 'x1': counts the rows. Leave the column out if it is only an identifier.",
    )
    day = pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03"])
    frame = pd.DataFrame(
        {"flag": [True] * 3, "site": [*"aba"], "same": [*"aaa"], "id": [*"pqr"], "day": day}
    )
    kept, dropped = (fit_layout(as_table(frame), columns=how) for how in ("keep", "drop-constant"))
    assert kept.feature_names == ("flag", *dropped.feature_names)
    assert "Column 'id': left out, text with all 3 values distinct." in kept.notes


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.zeros(3), r"two-dimensional .*\(3,\)"),
        (torch.tensor(1.0), r"two-dimensional .*got shape \(\). One value is X.reshape\(1, 1\)"),
        (torch.zeros(0, 3), r"at least one row and column, got shape \(0, 3\)"),
        (torch.zeros(2, 2, dtype=torch.complex64), "real numbers"),
        (torch.eye(2).to_sparse(), "sparse tensor"),
        (torch.zeros(2, 2, device="meta"), "X is on the device 'meta', which holds no values"),
        (torch.eye(2).to(torch.float8_e4m3fn), r"floats of 16 bits or more, .* Pass X.half\(\)"),
        (torch.tensor([[0.0, 1.0], [1.0, torch.inf]]), "Column 'x1' has an infinite value"),
        (torch.ones(3, 2), "no usable column. Columns 'x0', 'x1': left out, constant"),
        (as_table([[1], [1]]), r"X has no usable column\. Column 'x0': left out, constant."),
    ],
)
def test_what_has_no_layout(X, message):
    with refused(message):
        fit_layout(X)


@pytest.mark.parametrize("numbers", ["quantile", "robust", "piecewise"])
def test_tensors_have_no_quantiles_and_no_text(numbers):
    layout, raw = fit(torch.arange(6.0).reshape(3, 2))
    with refused(
        f"numbers='{numbers}' does not support tensors. Pass a NumPy array, or use "
        "numbers='standard' and a space without other values of numbers."
    ):
        fit_statistics(raw, layout, np.arange(3), numbers=numbers)
    with refused(
        "numbers must be one of 'standard', .*'piecewise', 'piecewise-tree', 'none', got 'log'"
    ):
        fit_statistics(raw, layout, np.arange(3), numbers="log")
    texts = np.array([["a", 1.0], ["b", 2.0], ["a", 3.0], ["b", 4.0]], dtype=object)
    with refused("is a tensor of numbers, but the columns 'x0' are categories or dates"):
        fit(texts)[0].raw(raw)


def test_columns_are_found_by_name_whatever_their_order():
    table = frame()
    layout, expected = fit(table)
    # whatever the order of rows
    assert fit_layout(as_table(table.sample(frac=1, random_state=3))) == layout
    np.testing.assert_array_equal(layout.raw(as_table(table[table.columns[::-1]])), expected)
    with refused(
        "X has no columns 'age', 'income', got .*The model reads the columns 'age', 'city'"
    ):
        layout.raw(as_table(table.drop(columns=["age", "income"])))
    with pytest.warns(UserWarning, match="does not read: 'a', 'b'") as caught:
        more = layout.raw(as_table(table.assign(a=1, b=2)))
    assert len(caught) == 1
    np.testing.assert_array_equal(more, expected)


@pytest.mark.parametrize("read", [as_table, torch.from_numpy])
def test_columns_without_names_are_as_many_as_in_training(read):
    X = np.random.default_rng(0).normal(size=(9, 4))
    layout = fit_layout(read(X[:, :3]))
    with refused("X must have 3 columns as in training, or column names, got 4 columns"):
        layout.raw(read(X))
    with refused("X must have 3 columns as in training, got 2 columns"):
        layout.raw(read(X[:, :2]))


def test_left_out_columns_are_named_and_need_not_be_there_again():
    n = 120
    table = pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(n)],
            "row": np.arange(n),
            "same": 3,
            "word": "x",
            "empty": np.nan,
            "x": np.random.default_rng(0).normal(size=n),
        }
    )
    layout = fit_layout(as_table(table))
    assert layout.feature_names == ("row", "x")
    assert layout.notes == (
        "Column 'id': left out, text with all 120 values distinct.",
        "Column 'row': counts the rows. Leave the column out if it is only an identifier.",
        "Columns 'same', 'word': left out, constant.",
        "Column 'empty': left out, all values missing.",
    )
    assert layout.raw(as_table(table[["x", "row"]])).shape == (n, 2)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        (np.delete(np.arange(100), range(0, 100, 5)), True),  # some rows are held out
        (np.arange(100)[::-1], False),
        (np.arange(100) * 3, False),
        (np.arange(100) / 2, False),
        (np.repeat(np.arange(50), 2), False),
        (np.arange(20), False),
    ],
)
def test_a_column_that_counts_the_rows(values, counts):
    notes = fit(pd.DataFrame({"row": values}))[0].notes
    assert any("counts the rows" in note for note in notes) == counts


@pytest.mark.parametrize(
    ("numbers", "tensor"), [("standard", False), ("standard", True), ("piecewise", False)]
)
def test_numbers_beyond_20_standard_deviations_and_all_training_rows_count_as_the_farther_of_the_two(
    numbers, tensor
):
    raw = np.random.default_rng(0).normal(5, 2, (500, 2))
    raw[7, 1] = 1e4  # 22 standard deviations, among the training rows
    end = raw.mean(0) + 20 * raw.std(0)
    given = torch.from_numpy(raw).float() if tensor else raw
    layout = fit_layout(given if tensor else as_table(raw))
    statistics = fit_statistics(given, layout, np.arange(500), numbers=numbers)
    far = np.array([[1e30, 0.0], end, [0, 1e30], raw[7]])
    x = np.asarray(transform(torch.from_numpy(far).float() if tensor else far, statistics))
    first, second = np.split(x, 2, axis=1)
    np.testing.assert_allclose(first[0], first[1], rtol=1e-6)
    np.testing.assert_allclose(second[2], second[3], rtol=2e-6)
    if numbers == "standard":  # that of scikit-learn on all training rows
        np.testing.assert_allclose(first[1], 20, rtol=1e-6)
        own = np.asarray(transform(given, statistics))
        np.testing.assert_allclose(
            own, StandardScaler().fit_transform(raw), rtol=0, atol=1e-5 if tensor else 1e-12
        )
        assert tensor or own[7, 1] > 22


RNG = np.random.default_rng(0)
MIXED = pd.DataFrame(
    {"a": [*RNG.normal(size=99), np.nan], "c": ["red", "blue"] * 50, "b": RNG.random(100)}
)


def encoded(x, edges):
    """The definition of arXiv:2203.05556, equation 1, of one number."""
    features = [0.0] * N_BINS
    for t, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
        is_first = t == 0
        is_last = t == len(edges) - 2
        if x < low and not is_first:
            features[t] = 0.0
        elif x >= high and not is_last:
            features[t] = 1.0
        else:
            features[t] = (x - low) / (high - low)
    return features


@pytest.mark.parametrize(
    "values", [RNG.normal(size=200), RNG.integers(0, 3, 50), [0.0, 1.0], [5.0, 5.0]]
)
def test_a_column_is_the_definition_of_each_of_its_numbers(values):
    edges = bin_edges(np.array(values, float))
    low, width, least, most = bins_between(edges)
    for x in [*values[:20], -9.0, 9.0]:
        np.testing.assert_allclose(
            np.clip((x - low) / width, least, most), encoded(x, edges), atol=1e-12
        )


def test_a_tree_cuts_where_classes_change():
    x = np.sort(1e9 + RNG.random(320))
    y = (x > x[100]).astype(int) + (x > x[200])
    edges = bin_edges(x, y)
    assert len(edges) == 4 and (edges[0], edges[-1]) == (x[0], x[-1])
    assert x[100] < edges[1] < x[101] and x[200] < edges[2] < x[201]
    tree = (
        DecisionTreeClassifier(max_leaf_nodes=N_BINS, min_samples_leaf=5)
        .fit(x[:, None] - 1e9, y)
        .tree_
    )
    np.testing.assert_allclose(
        edges[1:-1] - 1e9, np.sort(tree.threshold[tree.children_left >= 0]), atol=1e-6
    )
    assert len(bin_edges(x, x[:, None] + 0.0)) == N_BINS + 1
    assert bin_edges(np.ones(5), np.arange(5.0)).tolist() == [1.0]


@pytest.mark.parametrize("numbers", ["piecewise", "piecewise-tree"])
def test_features_of_a_table_and_what_is_missing(numbers):
    table = as_table(MIXED)
    layout = fit_layout(table)
    target = RNG.integers(0, 2, 100)
    raw = layout.raw(table)
    train = np.arange(1, 100)
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
    layout, (train, valid) = fit_layout(as_table(MIXED)), np.split(RNG.permutation(100), [70])
    y = (MIXED.b + 0.3 * RNG.normal(size=100)).to_numpy()
    raw = layout.raw(as_table(MIXED))
    how = {
        "cv": [(train, valid)],
        "n_trials": 2,
        "max_epochs": 3,
        "verbose": 0,
        "dtype": "float64",
        "workers": 1,
    }
    for numbers in ("piecewise", "piecewise-tree"):
        x = transform(raw, fit_statistics(raw, layout, train, numbers=numbers, target=y))
        study = gputune.tune("mlp", MIXED, y, numbers=numbers, **how)
        plain = gputune.tune("mlp", x, y, numbers="none", columns="keep", **how)
        np.testing.assert_allclose(study.curves, plain.curves, rtol=1e-9)
    model = gputune.tune("realmlp", MIXED, y, numbers="piecewise", **how).best_model()
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(MIXED), model.predict(MIXED))


def test_the_normal_deviate_is_scipys():
    p = np.concatenate(
        [np.logspace(-7, -0.31, 500), 1 - np.logspace(-7, -0.31, 500), [0.075, 0.925, 0.5]]
    )
    np.testing.assert_allclose(
        encode.normal_deviate(torch.tensor(p)).numpy(), ndtri(p), rtol=1e-12, atol=1e-15
    )
    ends = encode.normal_deviate(torch.tensor([0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends, [-5.199337582605575, 5.199337582605575], rtol=1e-9)


@pytest.mark.parametrize("rows", [2, 3, 40, 2500])
def test_the_scores_are_those_of_numpy(rows):
    rng = np.random.default_rng(rows)
    columns = [
        rng.normal(size=rows),
        rng.lognormal(8, 3, rows),
        rng.integers(0, 4, rows),
        1e-9 * rng.normal(size=rows),
    ]
    part = np.stack(columns, axis=1)
    part[0] = 17.0, 3.0, 0.0, 1e-9
    part[1] = -2.0, 5.0, 3.0, -1e-9
    fitted = encode.fit_quantiles(part)
    beyond = np.stack([part.min(0) - 1, part.max(0) + 1, part.mean(0), np.full(4, 0.5)])
    values = np.concatenate([part, beyond, fitted, (fitted[1:] + fitted[:-1]) / 2])
    expected = np.stack(
        [encode.normal_scores(values[:, j], fitted[:, j]) for j in range(4)], axis=1
    )
    found = encode.normal_scores_of(torch.tensor(values), torch.tensor(fitted)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
