"""DataFrames and arrays become the same table; other inputs are refused by name."""

import sys

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy.sparse import csr_array, csr_matrix
from torch.utils.data import DataLoader, Subset, TensorDataset

from gputune.data.source import read_source
from gputune.data.table import Table, as_rows, as_table, checked_table, select_rows, split_target
from refused import refused


def same(a, b):
    assert (a.names, a.kinds) == (b.names, b.kinds)
    for x, y in zip(a.columns, b.columns):
        np.testing.assert_array_equal(x, y)


class CountedName(str):
    """A name that counts how often it is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountedName.compared += 1
        return str.__eq__(self, other)


def test_a_wide_table_is_looked_through_once():
    names = [CountedName(f"column {j}") for j in range(1000)]
    table = checked_table(names, [("number", np.zeros(2))] * len(names))
    for name in names:
        table.column(name), table.kind(name)
    assert CountedName.compared < 10 * len(names)  # each with each: 1,000,000


def test_pandas_types():
    zone = pd.to_datetime(["2020-01-01", None, "2020-01-02"]).tz_localize("Europe/Berlin")
    of_types = {
        "Int64": (pd.array([1, None, 3], dtype="Int64"), "number", [1, np.nan, 3]),
        "boolean": (pd.array([True, None, False], dtype="boolean"), "boolean", [1, np.nan, 0]),
        "string": (pd.array(["a", None, "b"], dtype="string"), "category", ["a", None, "b"]),
        "str": (pd.Series(["a", None, "b"], dtype="str"), "category", ["a", None, "b"]),
        "category": (
            pd.Categorical(["a", None, "b"], categories=["b", "a", "z"]),
            "category",
            ["a", None, "b"],
        ),
        "codes": (pd.Categorical([1.0, None, 2.0]), "category", ["1", None, "2"]),
        "mixed": (pd.Series([1, "a", None], dtype=object), "category", ["1", "a", None]),
        "numbers": (pd.Series([1, 2.5, None], dtype=object), "number", [1, 2.5, np.nan]),
        "zone": (zone, "date", [1577833200, np.nan, 1577919600]),
        "delta": (pd.to_timedelta(["1s", None, "1h"]), "number", [1, np.nan, 3600]),
        "arrow": (pd.array([1, None, 3], dtype="int64[pyarrow]"), "number", [1, np.nan, 3]),
        "nothing": (pd.Series([None, None, None], dtype=object), "category", [None, None, None]),
        "interval": (
            pd.cut([1, 5, 9], 2),
            "category",
            ["(0.992, 5.0]", "(0.992, 5.0]", "(5.0, 9.0]"],
        ),
    }
    table = as_table(pd.DataFrame({name: column for name, (column, _, _) in of_types.items()}))
    for name, (_, kind, values) in of_types.items():
        assert (name, table.kind(name)) == (name, kind)
        expected = np.array(values, dtype=object if kind == "category" else float)
        np.testing.assert_array_equal(table.column(name), expected)


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_equal_texts_of_a_column_are_one_object(frame):
    texts = ["a long text", "another", None] * 4
    (column,) = as_table(frame({"a": texts})).columns
    assert column.tolist() == texts
    assert len({id(text) for text in column}) == 3


def test_polars_types():
    columns = {
        "category": pl.Series(["a", None], dtype=pl.Categorical),
        "enum": pl.Series(["a", None], dtype=pl.Enum(["a", "b"])),
        "date": pl.Series(["2020-01-01", None]).str.to_date(),
        "decimal": pl.Series(["1.5", None]).cast(pl.Decimal(10, 2)),
        "null": pl.Series([None, None]),
    }
    table = as_table(pl.DataFrame(columns))
    assert table.kinds == ("category", "category", "date", "number", "number")
    np.testing.assert_array_equal(table.column("decimal"), [1.5, np.nan])


def test_arrays_and_lists():
    values = np.arange(6).reshape(3, 2)
    table = as_table(values)
    assert (
        as_table(table) is table
        and table.names == ("x0", "x1")
        and table.kinds == ("number", "number")
    )
    texts = values.astype(str)
    for X in (values.tolist(), texts, [list(row) for row in texts], torch.tensor(values)):
        same(table, as_table(X))
    assert as_table(values > 2).kinds == ("boolean", "boolean")
    assert as_table([[1, "a", None], [2.5, "b", True]]).kinds == ("number", "category", "boolean")
    before = table.columns[0].copy()
    values[:] = 7  # columns are copies
    np.testing.assert_array_equal(table.columns[0], before)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (csr_matrix(np.eye(3)), "sparse matrix"),
        (csr_array(np.eye(3)), "sparse matrix"),
        (
            np.zeros((2, 2, 2)),
            r"two-dimensional .*\(2, 2, 2\). Pass X.reshape\(len\(X\), -1\). A module",
        ),
        (
            [np.zeros((3, 2)), np.zeros((3, 4))],
            r"X is a list of 2 inputs with the shapes \(3, 2\), \(3, 4\).*hstack\(X\)",
        ),
        (
            (torch.zeros(3, 2), torch.zeros(3)),
            r"X is a tuple of 2 inputs with the shapes \(3, 2\), \(3,\)",
        ),
        (
            {"a": np.zeros((3, 2))},
            r"X is a dict. Pass one table .*pandas.DataFrame\(X\).*hstack\(list\(X.values",
        ),
        (
            TensorDataset(torch.zeros(3, 2)),
            "X is a TensorDataset, a torch Dataset. Pass its tensors: X, y = dataset.tensors",
        ),
        (
            DataLoader(TensorDataset(torch.zeros(3, 2))),
            "X is a DataLoader, .*batch_size in the space",
        ),
        (
            Subset(TensorDataset(torch.zeros(3, 2)), [0]),
            "X is a Subset, a torch Dataset. Pass all its rows",
        ),
        ([[10**400], [1]], "Column 'x0' holds an integer that is larger than any float"),
        (np.zeros(3), r"two-dimensional .*\(3,\)"),
        (None, "X must be a DataFrame, an array with two axes or a list of lists, got None"),
        (2.5, "got 2.5"),
        (pd.Series([1, 2]), "two-dimensional"),
        ([1, 2], "two-dimensional"),
        (
            [torch.ones(2), torch.ones(3)],
            r"rows of different shapes.*torch.nn.utils.rnn.pad_sequence",
        ),
        ([[1, 2], [1]], "row 1 has \\(1,\\).* In a table, fill the shorter rows with None"),
        (np.zeros((0, 3)), "no rows"),
        (np.zeros((3, 0)), "no columns"),
        (pd.DataFrame(), "no columns"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "Column names must differ"),
        (pd.DataFrame([[1, 2]], columns=["1", 1]), "Column names must differ"),
        (pl.DataFrame({"a": [1]}).lazy(), "lazy frame"),
        (
            np.array([[1.0, np.inf]]),
            "Column 'x1' has an infinite value in row 0. Clip it, or leave it empty.$",
        ),
        (
            pd.DataFrame({"price": [1.0, -np.inf]}),
            r"'price' has an infinite value in row 1 \(the first row is row 0\). ",
        ),
        (np.zeros((2, 2), dtype=complex), "Column 'x0' holds complex128"),
        (pd.DataFrame({"a": [[1], [2]]}), "Column 'a' holds list"),
        (np.zeros(2, dtype=[("a", float)]), "structured array"),
        (np.ma.masked_array(np.zeros((2, 2)), mask=np.eye(2)), "masked array"),
    ],
)
def test_what_is_no_table(X, message):
    with refused(message):
        as_table(X)


def test_large_arrays_are_read_column_by_column():
    """With calls of Python that depend on the columns alone, not on the rows."""
    values = np.random.default_rng(0).normal(size=(10_000, 5))
    as_table(values[:10])
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    table = as_table(values)
    sys.setprofile(None)
    assert len(calls) < 5_000
    np.testing.assert_array_equal(table.column("x4"), values[:, 4])


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        ([1, 2], "i", [1, 2]),
        ([1.5, 2.0], "f", [1.5, 2.0]),
        ([True, False], "b", [True, False]),
        (["a", "b"], "O", ["a", "b"]),
        (["a", None], "O", ["a", None]),
        ([1, None], "f", [1, np.nan]),
    ],
)
def test_the_target_is_a_plain_array(column, kind, values):
    rest, y = split_target(as_table(pl.DataFrame({"x": [1, 2], "y": column})), "y")
    assert rest.names == ("x",)
    assert y.dtype.kind == kind
    np.testing.assert_array_equal(y, np.array(values, dtype=y.dtype))


def test_bad_targets():
    table = as_table(pd.DataFrame({"income": [1, 2], "when": pd.to_datetime(["2020-01-01"] * 2)}))
    with refused(r"target must be a column .*Did you mean 'income'. The columns are 'income'"):
        split_target(table, "incme")
    with refused(r"target must be a column .*The columns are 'income', 'when'"):
        split_target(table, "zzz")
    with refused("'when' holds dates"):
        split_target(table, "when")
    with refused("only column"):
        split_target(Table(("y",), ("number",), (np.zeros(2),)), "y")
    with refused("groups='team' is the only column of the table. Add columns to predict"):
        read_source(pd.DataFrame({"team": [1, 2]}), [0, 1], "team")


def test_rows_stay_what_the_user_gave():
    rows = [[1.0, 2.0, "x"], [3.0, 4.0, "y"], [5.0, 6.0, "z"]]
    order = np.array([2, 0])
    array = np.array(rows, dtype=object)
    assert as_rows(array, ()) is array
    assert select_rows(as_rows(rows, ()), order).tolist() == [rows[2], rows[0]]
    pandas = pd.DataFrame(rows, columns=["a", 7, "c"], index=[10, 20, 30])
    assert as_rows(pandas, ("a", "7", "c")) is pandas
    part = select_rows(as_rows(pandas, ("a", "7")), order)
    assert (
        list(part) == ["a", 7]
        and part.index.tolist() == [30, 10]
        and part[7].tolist() == [6.0, 2.0]
    )
    polars = pl.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    assert select_rows(as_rows(polars, ("b",)), order).to_dict(as_series=False) == {"b": ["z", "x"]}
    arrow = polars.to_arrow()
    assert select_rows(as_rows(arrow, ("a",)), order).to_pydict() == {"a": [3, 1]}
