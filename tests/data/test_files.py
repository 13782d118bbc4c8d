"""Files become tables; a file that cannot be read as a table is refused with its name."""

import gzip
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from gputune.cli.held_out import rows_with_target
from gputune.data import files
from gputune.data.files import BUNDLED, read_table
from gputune.data.kinds import parse_text
from gputune.data.source import fingerprint, read_source
from gputune.data.table import as_table, split_target
from gputune.ground import files as ground_files
from refused import refused
from study_models import make_model

CSV = """age,city,member,joined,score
31,Bonn,true,2021-02-03,1.5
,Ulm,false,,2e1
54,NA,True,2020-12-31,?
"""


def assert_same(table, other):
    assert fingerprint(table, np.zeros(1)) == fingerprint(other, np.zeros(1))


def write(folder, text, name="t.csv"):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


def test_csv_columns_get_kinds_and_missing_values(tmp_path):
    table = read_table(write(tmp_path, CSV))
    assert len(table) == 3 and table.names == ("age", "city", "member", "joined", "score")
    assert table.kinds == ("number", "category", "boolean", "date", "number")
    np.testing.assert_array_equal(table.column("age"), [31, np.nan, 54])
    assert table.column("city").tolist() == ["Bonn", "Ulm", None]
    np.testing.assert_array_equal(table.column("member"), [1, 0, 1])
    np.testing.assert_array_equal(table.column("joined") / 86400, [18661, np.nan, 18627])
    np.testing.assert_array_equal(table.column("score"), [1.5, 20, np.nan])
    assert {c.dtype for c, k in zip(table.columns, table.kinds) if k != "category"} == {
        np.dtype("float64")
    }
    assert read_table(write(tmp_path, "a;b,c\n1,2\n", "comma.csv")).names == ("a;b", "c")
    frame = table.frame()  # the same table
    assert_same(as_table(frame), table)
    assert frame.schema["joined"] == pl.Datetime and frame.schema["member"] == pl.Boolean
    assert frame["city"].to_list() == ["Bonn", "Ulm", None] and frame["age"].to_list() == [
        31,
        None,
        54,
    ]


@pytest.mark.parametrize("name", ["t.tsv", "t.csv.gz", "t.tsv.gz", "T.CSV", "semicolon.csv"])
def test_text_files_read_alike(tmp_path, name):
    separator = "\t" if ".tsv" in name else ";" if "semicolon" in name else ","
    text = CSV.replace(",", separator)
    assert_same(
        read_table(write(tmp_path, text, name)), read_table(write(tmp_path, CSV, "plain.csv"))
    )


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        # Blanks around fields are no part of them.
        (
            "a, b, c\n 1, x, ?\n 2, y, 4\n",
            [("number", [1, 2]), ("category", ["x", "y"]), ("number", [np.nan, 4])],
        ),
        ("a\n20141013T000000\n20141209T120000\n", [("date", [1413158400, 1418126400])]),
        # Other orders than that of ISO 8601 are a guess.
        (
            "a,b,c\n2020-01-01T06:00:00,1/2/2020,2020/1/2\n1969-12-31 23:59:59Z,1/2/2020,\n",
            [
                ("date", [1577858400, -1]),
                ("category", ["1/2/2020"] * 2),
                ("category", ["2020/1/2", None]),
            ],
        ),
        # A late text makes a long column of numbers a category.
        (
            "a,b\n" + "1,2\n" * 20000 + "abc,2\n",
            [("category", [*["1"] * 20000, "abc"]), ("number", [2] * 20001)],
        ),
        # Where semicolons separate, commas belong to the values.
        (
            "a;b\n1,5;2,25\n2,5;3,25\n",
            [("category", ["1,5", "2,5"]), ("category", ["2,25", "3,25"])],
        ),
        # Empty lines at the end are no rows.
        ("a,b\n1,\n,\n3,4\n\n,\n\n", [("number", [1, np.nan, 3]), ("number", [np.nan, np.nan, 4])]),
    ],
)
def test_fields_of_text(tmp_path, text, columns):
    table = read_table(write(tmp_path, text))
    assert table.names == tuple("abc"[: len(columns)])
    for found, values, (kind, expected) in zip(table.kinds, table.columns, columns):
        assert found == kind
        np.testing.assert_array_equal(
            values, np.array(expected, dtype=object if kind == "category" else float)
        )


@pytest.mark.parametrize("short", [0, 500])  # rows up to which a column is read value by value
def test_every_column_of_text_reads_as_its_values_do_one_by_one(monkeypatch, tmp_path, short):
    monkeypatch.setattr(files, "_SHORT", short)
    odd = ["1_0", "1e5", "+1", ".5", "-0", " 7 ", "nan", "?", "0x10", "true", "1d5", "2020-01-02"]
    for extra in ("3", "", "false", "x"):
        columns = [[text, extra] for text in odd]
        lines = [
            ",".join(f"c{j}" for j in range(len(columns))),
            *(",".join(row) for row in zip(*columns)),
        ]
        table = read_table(write(tmp_path, "\n".join([*lines, "1," * (len(columns) - 1) + "1"])))
        for j, (text, other) in enumerate(columns):
            kind, values = parse_text(np.array([text, other, "1"], dtype=object))
            assert (text, other, table.kinds[j]) == (text, other, kind)
            np.testing.assert_array_equal(table.columns[j], values)


def test_parquet_keeps_types(tmp_path):
    frame = pl.DataFrame({"a": [1, None], "b": ["1", "2"], "c": [True, None]})
    frame.write_parquet(tmp_path / "t.parquet")
    table = read_table(str(tmp_path / "t.parquet"))
    assert table.kinds == ("number", "category", "boolean")
    assert_same(table, as_table(frame))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_sets(name):
    table = read_table(f"sklearn:{name}")
    X, y = split_target(table, "target")
    assert len(X) == len(y) == dict(zip(BUNDLED, (150, 1797, 178, 569, 442)))[name]
    assert (
        y.dtype.kind == {"diabetes": "i", "digits": "i"}.get(name, "O") and "target" not in X.names
    )
    assert name != "iris" or set(y) == {"setosa", "versicolor", "virginica"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "is empty. Write a header line"),
        ("t.csv", "a,b\n", "no rows"),
        ("t.csv", "a,b,a\n1,2,3\n", "'a' occurs more than once"),
        ("t.csv", "a,b\n1,inf\n", "Column 'b' has an infinite value in row 0"),
        (
            "t.csv",
            "a,b\n1,2\n1,2,3\n",
            "t.csv' has 3 fields in line 3, but 2 in its header line. Write the same",
        ),
        ("t.csv", 'a,b\n"1\n2",2\n\n1\n', "t.csv' has 1 field in line 5, but 2 in its header line"),
        ("t.tsv", "a\tb\tc\n1\t2\t3\n1\t2\n", "has 2 fields in line 3, but 3 in its header line"),
        ("t.parquet", "nothing", "could not be read as Parquet"),
        ("t.xlsx", "a", "A table is read from a .csv"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with refused(message):
        read_table(write(tmp_path, text, name))


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("t.csv", "a,y\n1,2\n\n2,\n3,\n", "line 3"),
        ("t.csv", 'a;y\n"1\n1";2\n3;NA\n', "line 4"),
        ("t.tsv", "a\ty\n1\t2\n\t\n1\t2\n", "line 3"),
    ],
)
def test_a_missing_target_is_named_by_its_line(tmp_path, name, text, place):
    lost = "3 missing values" if text.startswith("a,") else "1 missing value"
    with refused(
        rf"y has {lost} \(the first in {place}\). Fill it, or set missing_target='drop' to leave"
    ):
        read_source(write(tmp_path, text, name), "y")


def test_a_packed_file_is_unpacked_as_far_as_there_is_memory(monkeypatch, tmp_path):
    class Counting(gzip.GzipFile):
        unpacked = 0

        def read(self, size=-1):
            part = super().read(size)
            Counting.unpacked += len(part)
            return part

    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 10_000_000, 1))
    monkeypatch.setattr(files, "free_memory", lambda: 16 << 20)
    monkeypatch.setattr(files.gzip, "open", lambda file, mode: Counting(fileobj=file, mode=mode))
    with refused("bomb.csv.gz' needs about .* of memory or more, but only 16.0 MiB are free"):
        read_table(tmp_path / "bomb.csv.gz")
    assert Counting.unpacked < 4 << 20  # of 40 MB


@pytest.mark.parametrize(
    "text", ["1," * 5000 + "1\n", "1,2\n" * 50_000, None], ids=["wide", "long", "parquet"]
)
def test_a_file_that_memory_does_not_hold_is_refused_before_it_is_read(monkeypatch, tmp_path, text):
    path = tmp_path / "t.parquet" if text is None else write(tmp_path, text)
    if text is None:
        pl.DataFrame({"a": np.zeros(200_000)}).write_parquet(path)  # packed to a few hundred bytes
    monkeypatch.setattr(files, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(ground_files, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(pl, "read_csv", lambda *a, **k: pytest.fail("was read"))
    monkeypatch.setattr(pl, "read_parquet", lambda *a, **k: pytest.fail("was read"))
    with refused("needs about .* of memory or more, but only 1.0 MiB are free. Leave out"):
        read_table(path)


@pytest.mark.parametrize("error", [pl.exceptions.PanicException, MemoryError])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_reader_that_gives_up_is_quoted(monkeypatch, tmp_path, name, error):
    def fails(*arguments, **options):
        raise error("it gave up")

    pl.DataFrame({"a": [1.0]}).write_parquet(tmp_path / "t.parquet")
    write(tmp_path, "a,b\n1,2\n")
    monkeypatch.setattr(pl, f"read_{name[2:]}", fails)
    with refused("could not be read as .*: it gave up"):
        read_table(tmp_path / name)


def test_bytes_that_are_no_text_and_a_damaged_packed_file(tmp_path):
    packed = bytearray(gzip.compress(b"a,b\n" + b"1,2\n" * 1000))
    packed[20] ^= 255
    for name, content in (("t.csv", b"a,b\n1,\xff\xfe\n"), ("t.csv.gz", packed)):
        (tmp_path / name).write_bytes(content)
        with refused(f"{name}' could not be read as a text table"):
            read_table(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="such names are refused by the system")
def test_a_name_that_is_not_utf8(tmp_path):
    frame = pl.DataFrame({"a": [1.5, 2.5], "b": [3.0, 4.0]})
    frame.write_csv(tmp_path / "t.csv")
    frame.write_parquet(tmp_path / "t.parquet")
    for suffix in (".csv", ".parquet"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + suffix.encode()))
        (tmp_path / f"t{suffix}").rename(path)
        assert_same(read_table(path), as_table(frame))


def test_a_missing_file_and_an_unknown_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere.csv.*give a CSV"):
        read_table(tmp_path / "nowhere.csv")
    with refused(r"The data sets of scikit-learn are sklearn:iris, .*got 'sklearn:boston'"):
        read_table("sklearn:boston")
    with refused(r"is a folder. Give the file in it"):
        read_table(tmp_path)


def test_images_are_no_table(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "tom.JPG").write_bytes(b"")
    for path in (tmp_path, tmp_path / "cats" / "tom.JPG"):
        with refused(r"pass a Dataset such as .*ImageFolder.* numpy.savez"):
            read_table(path)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_blank_lines_above_the_header_are_skipped(tmp_path, name):
    path = write(tmp_path, "\n  \r\nx,y\n1,a\n2,\n", name)
    table = read_table(path)
    assert table.names == ("x", "y") and table.column("x").tolist() == [1, 2]
    with refused(r"y has 1 missing value \(the first in line 5\)"):
        read_source(path, "y")
    with refused("has 3 fields in line 4, but 2 in its header line"):
        read_table(write(tmp_path, "\n\nx,y\n1,a,b\n", "wide.csv"))


def test_blank_lines_at_the_end_of_one_column_are_no_rows(tmp_path):
    assert read_table(write(tmp_path, "x\n1\n\n2\n\n \n\n")).column("x").shape == (3,)
    # a missing value, as pandas and polars write it in one column
    assert read_table(write(tmp_path, 'x\n1\n""\n\n')).column("x").shape == (2,)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_column_that_is_not_read_may_hold_anything(tmp_path, name):
    frame = pl.DataFrame({"x": [1.0, 2, 3], "ratio": [1.0, math.inf, 2], "y": [0, 1, 0]})
    frame = frame.with_columns(parts=pl.Series([[1, 2], [3], []]))
    path = tmp_path / name
    if name == "t.csv":
        frame.drop("parts").write_csv(path)
        dropped = ["ratio"]
    else:
        frame.write_parquet(path)
        dropped = ["ratio", "parts"]
        with refused("Column 'parts' of .* holds List"):
            read_source(path, "y", drop=["ratio"])
    source = read_source(path, "y", drop=dropped)
    assert source.X.names == ("x",) and source.X.column("x").tolist() == [1, 2, 3]
    with refused("Column 'ratio' has an infinite value in row 1"):
        read_source(path, "y", drop=dropped[1:])
    assert len(files.read_columns(path, ["x", "y"])[0]) == 3
    labels = ["0", "1", "0"] if name == "t.csv" else [0, 1, 0]  # text, as the classes of the model
    model = make_model(frame[["x"]])
    model = replace(model, info={"drop": dropped}, target="y")
    inputs = frame.drop("parts")
    assert np.array_equal(model.predict(path), model.predict(frame[["x"]]))
    assert np.array_equal(model.predict(inputs), model.predict(frame[["x"]]))
    assert read_source(inputs, "y", drop=["ratio"]).X.names == ("x",)
    assert rows_with_target(model, str(path), "y").y.tolist() == labels
