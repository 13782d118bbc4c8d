"""Files, frames and arrays become the same table, and what cannot be one is refused by name."""

import gzip
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy.sparse import csr_array, csr_matrix
from torch.utils.data import DataLoader, Subset, TensorDataset

from gputune.data import table as table_module
from gputune.data.kinds import parse_text
from gputune.data.table import BUNDLED, Table, as_rows, as_table, read_table, select_rows, split_target
from gputune.errors import InputError

CSV = """age,city,member,joined,score
31,Bonn,true,2021-02-03,1.5
,Ulm,false,,2e1
54,NA,True,2020-12-31,?
"""


def write(folder, text, name="t.csv"):
    path = folder / name
    path.write_text(text)
    return path


def kinds(table):
    return dict(zip(table.names, table.kinds))


def same(a, b):
    assert a.names == b.names
    assert a.kinds == b.kinds
    for x, y in zip(a.columns, b.columns):
        np.testing.assert_array_equal(x, y)


def test_csv_columns_get_kinds_and_missing_values(tmp_path):
    table = read_table(write(tmp_path, CSV))
    assert len(table) == 3
    assert kinds(table) == {
        "age": "number",
        "city": "category",
        "member": "boolean",
        "joined": "date",
        "score": "number",
    }
    np.testing.assert_array_equal(table.column("age"), [31, np.nan, 54])
    assert table.column("city").tolist() == ["Bonn", "Ulm", None]
    np.testing.assert_array_equal(table.column("member"), [1, 0, 1])
    np.testing.assert_array_equal(table.column("joined") / 86400, [18661, np.nan, 18627])
    np.testing.assert_array_equal(table.column("score"), [1.5, 20, np.nan])
    assert {c.dtype for c, k in zip(table.columns, table.kinds) if k != "category"} == {np.dtype("float64")}


@pytest.mark.parametrize("name", ["t.tsv", "t.csv.gz", "t.tsv.gz", "T.CSV", "semicolon.csv"])
def test_text_files_read_alike(tmp_path, name):
    separator = "\t" if ".tsv" in name else ";" if "semicolon" in name else ","
    text = CSV.replace(",", separator)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    same(read_table(path), read_table(write(tmp_path, CSV, "plain.csv")))


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_where_semicolons_separate_commas_belong_to_the_values(tmp_path, name):
    text = "size;price\n" + "".join(f"{i},5;{i},25\n" for i in range(30))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    table = read_table(tmp_path / name)
    assert kinds(table) == {"size": "category", "price": "category"}
    assert table.column("price")[1] == "1,25"


def test_blanks_around_fields_are_no_part_of_them(tmp_path):
    table = read_table(write(tmp_path, "a, b, c\n 1, x, ?\n 2, y, 4\n"))
    assert kinds(table) == {"a": "number", "b": "category", "c": "number"}
    assert table.column("b").tolist() == ["x", "y"]
    np.testing.assert_array_equal(table.column("c"), [np.nan, 4])


@pytest.mark.parametrize("short", [0, 500])  # rows up to which a column is read value by value
def test_every_column_of_text_reads_as_its_values_do_one_by_one(monkeypatch, tmp_path, short):
    monkeypatch.setattr(table_module, "_SHORT", short)
    odd = ["1_0", "1e5", "+1", ".5", "-0", " 7 ", "nan", "?", "0x10", "true", "1d5", "2020-01-02"]
    for extra in ("3", "", "false", "x"):
        columns = [[text, extra] for text in odd]
        lines = [",".join(f"c{j}" for j in range(len(columns))), *(",".join(row) for row in zip(*columns))]
        table = read_table(write(tmp_path, "\n".join([*lines, "1," * (len(columns) - 1) + "1"])))
        for j, (text, other) in enumerate(columns):
            kind, values = parse_text(np.array([text, other, "1"], dtype=object))
            assert (text, other, table.kinds[j]) == (text, other, kind)
            np.testing.assert_array_equal(table.columns[j], values)


def test_compact_iso_dates_of_a_file(tmp_path):
    table = read_table(write(tmp_path, "sold,price\n20141013T000000,1\n20141209T120000,2\n"))
    assert table.kinds == ("date", "number")
    np.testing.assert_array_equal(table.column("sold"), [1413158400, 1418126400])


def test_a_late_text_makes_a_long_column_of_numbers_a_category(tmp_path):
    table = read_table(write(tmp_path, "a,b\n" + "1,2\n" * 20000 + "abc,2\n"))
    assert kinds(table) == {"a": "category", "b": "number"}


def test_dates_are_iso_8601_since_other_orders_are_a_guess(tmp_path):
    table = read_table(
        write(tmp_path, "t,c,d\n2020-01-01T06:00:00,1/2/2020,2020/1/2\n1969-12-31 23:59:59Z,1/2/2020,\n")
    )
    assert table.kinds[:2] == ("date", "category")
    np.testing.assert_array_equal(table.column("t"), [1577858400, -1])


def test_empty_lines_at_the_end_are_no_rows(tmp_path):
    table = read_table(write(tmp_path, "a,b\n1,\n,\n3,4\n\n,\n\n"))
    np.testing.assert_array_equal(table.column("a"), [1, np.nan, 3])


def test_parquet_keeps_types(tmp_path):
    frame = pl.DataFrame({"a": [1, None], "b": ["1", "2"], "c": [True, None]})
    frame.write_parquet(tmp_path / "t.parquet")
    table = read_table(str(tmp_path / "t.parquet"))
    assert table.kinds == ("number", "category", "boolean")
    same(table, as_table(frame))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_sets(name):
    table = read_table(f"sklearn:{name}")
    X, y = split_target(table, "target")
    assert (
        len(X)
        == len(y)
        == {"iris": 150, "digits": 1797, "wine": 178, "breast_cancer": 569, "diabetes": 442}[name]
    )
    assert y.dtype.kind == {"diabetes": "i", "digits": "i"}.get(name, "O")
    assert "target" not in X.names
    if name == "iris":
        assert set(y) == {"setosa", "versicolor", "virginica"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "is empty; a header line"),
        ("t.csv", "a,b\n", "no rows"),
        ("t.csv", "a,b,a\n1,2,3\n", "more than one 'a'"),
        ("t.csv", "a,b\n1,inf\n", "column 'b' has an infinite value in row 0"),
        ("t.csv", "a,b\n1,2\n1,2,3\n", "could not be read as a text table"),
        ("t.parquet", "nothing", "could not be read as Parquet"),
        ("t.xlsx", "a", "a table is read from .csv"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_table(write(tmp_path, text, name))


class CountedName(str):
    """A name that counts how often it is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountedName.compared += 1
        return str.__eq__(self, other)


def test_a_wide_table_is_looked_through_once():
    names = [CountedName(f"column {j}") for j in range(1000)]
    table = table_module._checked(names, [("number", np.zeros(2))] * len(names))
    for name in names:
        table.column(name), table.kind(name)
    assert CountedName.compared < 10 * len(names)  # each with each: 1,000,000


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "endless.csv").symlink_to("/dev/zero")
    for name in ("pipe.csv", "endless.csv"):
        with pytest.raises(InputError, match=f"{name}' is a pipe or a device and no file; write its rows"):
            read_table(tmp_path / name)


def test_a_packed_file_is_unpacked_as_far_as_there_is_memory(monkeypatch, tmp_path):
    class Counting(gzip.GzipFile):
        unpacked = 0

        def read(self, size=-1):
            part = super().read(size)
            Counting.unpacked += len(part)
            return part

    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 10_000_000, 1))
    monkeypatch.setattr(table_module, "free_memory", lambda: 16 << 20)
    monkeypatch.setattr(table_module.gzip, "open", Counting)
    with pytest.raises(
        InputError, match="bomb.csv.gz' needs about .* of memory or more, and 16.0 MiB are free"
    ):
        read_table(tmp_path / "bomb.csv.gz")
    assert Counting.unpacked < 4 << 20  # of 40 MB


def _wide(path):
    path.with_suffix(".csv").write_text("1," * 5000 + "1\n")


def _long(path):
    path.with_suffix(".csv").write_text("1,2\n" * 50_000)


def _parquet(path):
    frame = pl.DataFrame({"a": np.zeros(200_000)})  # packed to a few hundred bytes
    frame.write_parquet(path.with_suffix(".parquet"))


@pytest.mark.parametrize("write_file", [_wide, _long, _parquet])
def test_a_file_that_memory_does_not_hold_is_refused_before_it_is_read(monkeypatch, tmp_path, write_file):
    write_file(tmp_path / "t")
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(table_module, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(pl, "read_csv", lambda *a, **k: pytest.fail("was read"))
    monkeypatch.setattr(pl, "read_parquet", lambda *a, **k: pytest.fail("was read"))
    with pytest.raises(InputError, match="needs about .* of memory or more, and 1.0 MiB are free; leave out"):
        read_table(path)


@pytest.mark.parametrize("error", [pl.exceptions.PanicException, MemoryError])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_reader_that_gives_up_is_quoted(monkeypatch, tmp_path, name, error):
    def fails(*arguments, **options):
        raise error("it gave up")

    pl.DataFrame({"a": [1.0]}).write_parquet(tmp_path / "t.parquet")
    write(tmp_path, "a,b\n1,2\n")
    monkeypatch.setattr(pl, f"read_{name[2:]}", fails)
    with pytest.raises(InputError, match="could not be read as .*: it gave up"):
        read_table(tmp_path / name)


def test_a_damaged_packed_file(tmp_path):
    packed = bytearray(gzip.compress(b"a,b\n" + b"1,2\n" * 1000))
    packed[20] ^= 255
    (tmp_path / "t.csv.gz").write_bytes(packed)
    with pytest.raises(InputError, match="t.csv.gz' could not be read as a text table"):
        read_table(tmp_path / "t.csv.gz")


@pytest.mark.skipif(sys.platform != "linux", reason="such names are refused by the system")
def test_a_name_that_is_not_utf8(tmp_path):
    frame = pl.DataFrame({"a": [1.5, 2.5], "b": [3.0, 4.0]})
    frame.write_csv(tmp_path / "t.csv")
    frame.write_parquet(tmp_path / "t.parquet")
    for suffix in (".csv", ".parquet"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + suffix.encode()))
        (tmp_path / f"t{suffix}").rename(path)
        same(read_table(path), as_table(frame))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,\xff\xfe\n")
    with pytest.raises(InputError, match="could not be read as a text table"):
        read_table(tmp_path / "t.csv")


def test_a_missing_file_and_an_unknown_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere.csv.*give a CSV"):
        read_table(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match=r"'sklearn:NAME' knows iris, .*got 'sklearn:boston'"):
        read_table("sklearn:boston")
    with pytest.raises(InputError, match=r"is a folder; give the file in it"):
        read_table(tmp_path)
    (tmp_path / "table.xlsx").touch()
    with pytest.raises(InputError, match=r"a table is read from \.csv"):
        read_table(tmp_path / "table.xlsx")


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame])
def test_pandas_and_polars_frames_read_alike(library):
    columns = {
        "i": [1, 2, 3],
        "f": [0.5, None, 1.5],
        "b": [True, False, True],
        "s": ["x", None, "1"],
        "d": np.array(["2020-01-01", "NaT", "2020-01-02"], dtype="datetime64[us]"),
    }
    table = as_table(library(columns))
    assert table.kinds == ("number", "number", "boolean", "category", "date")
    np.testing.assert_array_equal(table.column("f"), [0.5, np.nan, 1.5])
    assert table.column("s").tolist() == ["x", None, "1"]
    np.testing.assert_array_equal(table.column("d"), [1577836800, np.nan, 1577923200])


def test_text_in_a_frame_stays_text():
    assert as_table(pd.DataFrame({"code": ["1", "2"]})).kinds == ("category",)
    assert as_table(pl.DataFrame({"code": ["1", "2"]})).kinds == ("category",)
    assert as_table(np.array([["1"], ["2"]])).kinds == ("number",)


def test_pandas_types():
    table = as_table(
        pd.DataFrame(
            {
                "Int64": pd.array([1, None, 3], dtype="Int64"),
                "boolean": pd.array([True, None, False], dtype="boolean"),
                "string": pd.array(["a", None, "b"], dtype="string"),
                "str": pd.Series(["a", None, "b"], dtype="str"),
                "category": pd.Categorical(["a", None, "b"], categories=["b", "a", "z"]),
                "codes": pd.Categorical([1.0, None, 2.0]),
                "mixed": pd.Series([1, "a", None], dtype=object),
                "numbers": pd.Series([1, 2.5, None], dtype=object),
                "zone": pd.to_datetime(["2020-01-01", None, "2020-01-02"]).tz_localize("Europe/Berlin"),
                "delta": pd.to_timedelta(["1s", None, "1h"]),
                "arrow": pd.array([1, None, 3], dtype="int64[pyarrow]"),
                "nothing": pd.Series([None, None, None], dtype=object),
                "interval": pd.cut([1, 5, 9], 2),
            }
        )
    )
    nan = np.nan
    expected = {
        "Int64": ("number", [1, nan, 3]),
        "boolean": ("boolean", [1, nan, 0]),
        "string": ("category", ["a", None, "b"]),
        "str": ("category", ["a", None, "b"]),
        "category": ("category", ["a", None, "b"]),
        "codes": ("category", ["1", None, "2"]),
        "mixed": ("category", ["1", "a", None]),
        "numbers": ("number", [1, 2.5, nan]),
        "zone": ("date", [1577833200, nan, 1577919600]),
        "delta": ("number", [1, nan, 3600]),
        "arrow": ("number", [1, nan, 3]),
        "nothing": ("category", [None, None, None]),
        "interval": ("category", ["(0.992, 5.0]", "(0.992, 5.0]", "(5.0, 9.0]"]),
    }
    for name, (kind, values) in expected.items():
        assert (name, table.kind(name)) == (name, kind)
        np.testing.assert_array_equal(
            table.column(name), np.array(values, dtype=object if kind == "category" else float)
        )


def test_polars_types():
    table = as_table(
        pl.DataFrame(
            {
                "category": pl.Series(["a", None], dtype=pl.Categorical),
                "enum": pl.Series(["a", None], dtype=pl.Enum(["a", "b"])),
                "date": pl.Series(["2020-01-01", None]).str.to_date(),
                "decimal": pl.Series(["1.5", None]).cast(pl.Decimal(10, 2)),
                "null": pl.Series([None, None]),
            }
        )
    )
    assert table.kinds == ("category", "category", "date", "number", "number")
    np.testing.assert_array_equal(table.column("decimal"), [1.5, np.nan])


def test_arrays_and_lists():
    values = np.arange(6).reshape(3, 2)
    table = as_table(values)
    assert table.names == ("x0", "x1")
    assert table.kinds == ("number", "number")
    same(table, as_table(values.tolist()))
    same(table, as_table([list(row) for row in values.astype(str)]))
    assert as_table(table) is table
    assert as_table(values > 2).kinds == ("boolean", "boolean")
    mixed = as_table([[1, "a", None], [2.5, "b", True]])
    assert mixed.kinds == ("number", "category", "boolean")


def test_columns_are_copies():
    values = np.zeros((3, 2))
    table = as_table(values)
    values[:] = 7
    assert not any(column.any() for column in table.columns)


def test_select_and_drop():
    table = as_table(pd.DataFrame({"a": [1, 2, 3], "b": ["x", "y", None]}))
    assert table.select(np.array([2, 0])).column("b").tolist() == [None, "x"]
    assert len(table.select(np.array([True, False, False]))) == 1
    same(table.drop("a"), as_table(pd.DataFrame({"b": ["x", "y", None]})))


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (csr_matrix(np.eye(3)), "sparse matrix"),
        (csr_array(np.eye(3)), "sparse matrix"),
        (
            np.zeros((2, 2, 2)),
            r"two-dimensional .*\(2, 2, 2\); pass X.reshape\(len\(X\), -1\), which the forward",
        ),
        (
            [np.zeros((3, 2)), np.zeros((3, 4))],
            r"X is a list of 2 inputs, of shapes \(3, 2\), \(3, 4\).*hstack\(X\)",
        ),
        ((torch.zeros(3, 2), torch.zeros(3)), r"X is a tuple of 2 inputs, of shapes \(3, 2\), \(3,\)"),
        (
            {"a": np.zeros((3, 2))},
            r"X is a dict; pass one table .*pandas.DataFrame\(X\).*hstack\(list\(X.values",
        ),
        (TensorDataset(torch.zeros(3, 2)), "X is a TensorDataset; pass its tensors: X, y = dataset.tensors"),
        (
            DataLoader(TensorDataset(torch.zeros(3, 2))),
            "X is a DataLoader; pass all rows .* batch_size is a key",
        ),
        (Subset(TensorDataset(torch.zeros(3, 2)), [0]), "X is a Subset, a torch Dataset; pass all its rows"),
        ([[10**400], [1]], "column 'x0' holds an integer that is larger than any float"),
        (np.zeros(3), r"two-dimensional .*\(3,\)"),
        (pd.Series([1, 2]), "two-dimensional"),
        ([1, 2], "two-dimensional"),
        ([[1, 2], [1]], "equally long"),
        (np.zeros((0, 3)), "no rows"),
        (np.zeros((3, 0)), "no columns"),
        (pd.DataFrame(), "no columns"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "column names must differ"),
        (pd.DataFrame([[1, 2]], columns=["1", 1]), "column names must differ"),
        (pl.DataFrame({"a": [1]}).lazy(), "lazy frame"),
        (np.array([[1.0, np.inf]]), "column 'x1' has an infinite value in row 0"),
        (pd.DataFrame({"price": [1.0, -np.inf]}), "column 'price' has an infinite value in row 1"),
        (np.zeros((2, 2), dtype=complex), "column 'x0' holds complex128"),
        (pd.DataFrame({"a": [[1], [2]]}), "column 'a' holds list"),
        (np.zeros(2, dtype=[("a", float)]), "structured array"),
        (np.ma.masked_array(np.zeros((2, 2)), mask=np.eye(2)), "masked array"),
    ],
)
def test_what_is_no_table(X, message):
    with pytest.raises(InputError, match=message):
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
    with pytest.raises(
        InputError, match=r"target='incme' is not.*did you mean 'income'. The columns are 'income'"
    ):
        split_target(table, "incme")
    with pytest.raises(InputError, match=r"target='zzz' is not a column.*the columns are 'income', 'when'"):
        split_target(table, "zzz")
    with pytest.raises(InputError, match="'when' holds dates"):
        split_target(table, "when")
    with pytest.raises(InputError, match="only column"):
        split_target(Table(("y",), ("number",), (np.zeros(2),)), "y")


def test_a_tensor_on_the_cpu_is_an_array():
    same(as_table(torch.ones(2, 2)), as_table(np.ones((2, 2))))


def test_a_table_as_a_frame_is_the_same_table(tmp_path):
    table = read_table(write(tmp_path, CSV))
    frame = table.frame()
    same(as_table(frame), table)
    assert frame.schema["joined"] == pl.Datetime and frame.schema["member"] == pl.Boolean
    assert frame["city"].to_list() == ["Bonn", "Ulm", None] and frame["age"].to_list() == [31, None, 54]


def test_rows_stay_what_the_user_gave():
    rows, order = [[1.0, 2.0, "x"], [3.0, 4.0, "y"], [5.0, 6.0, "z"]], np.array([2, 0])
    array = np.array(rows, dtype=object)
    assert as_rows(array, ()) is array
    assert select_rows(as_rows(rows, ()), order).tolist() == [rows[2], rows[0]]
    pandas = pd.DataFrame(rows, columns=["a", 7, "c"], index=[10, 20, 30])
    assert as_rows(pandas, ("a", "7", "c")) is pandas
    part = select_rows(as_rows(pandas, ("a", "7")), order)
    assert list(part) == ["a", 7] and part.index.tolist() == [30, 10] and part[7].tolist() == [6.0, 2.0]
    polars = pl.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    assert select_rows(as_rows(polars, ("b",)), order).to_dict(as_series=False) == {"b": ["z", "x"]}
    arrow = polars.to_arrow()
    assert select_rows(as_rows(arrow, ("a",)), order).to_pydict() == {"a": [3, 1]}
