"""The kinds of columns with texts and Python objects; amounts are numbers if all values of a column
agree.
"""

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest

from gputune.data.columns import fit_layout
from gputune.data.files import read_table
from gputune.data.kinds import (
    MISSING_TEXT,
    convert,
    from_column,
    from_values,
    is_missing,
    parse_text,
    read_amounts,
    read_as,
)
from gputune.data.table import as_table, split_target
from refused import refused

NAN = np.nan


def assert_read(found, kind, values):
    assert found[0] == kind
    np.testing.assert_array_equal(
        found[1], np.array(values, dtype=object if kind == "category" else float)
    )


@pytest.mark.parametrize(
    ("texts", "kind", "values"),
    [
        (["1", " 2.5 ", None], "number", [1, 2.5, NAN]),
        (["1e3", "-0.5", "?"], "number", [1000, -0.5, NAN]),
        (["TRUE", "false", ""], "boolean", [1, 0, NAN]),
        (["2020-01-01", "2020/01/02", "NA"], "date", [1577836800, 1577923200, NAN]),
        (["2020-01-01T00:00:00Z", "2020-01-01T01:00:00+01:00"], "date", [1577836800, 1577836800]),
        (["1", "true"], "category", ["1", "true"]),
        (["1_000", "2"], "category", ["1_000", "2"]),
        (["1.2.2020"], "category", ["1.2.2020"]),
        ([" a ", "null"], "category", ["a", None]),
        (sorted(MISSING_TEXT), "number", [NAN] * len(MISSING_TEXT)),
    ],
)
def test_text(texts, kind, values):
    assert_read(parse_text(np.array(texts, dtype=object)), kind, values)


@pytest.mark.parametrize(
    ("given", "kind", "values"),
    [
        ([1, 2.5, None], "number", [1, 2.5, NAN]),
        ([Decimal("1.5"), True, None], "number", [1.5, 1, NAN]),
        ([True, np.False_], "boolean", [1, 0]),
        (
            [datetime.date(1970, 1, 2), pd.Timestamp("1970-01-01 00:01"), None],
            "date",
            [86400, 60, NAN],
        ),
        ([np.datetime64("1970-01-02"), datetime.datetime(1970, 1, 1)], "date", [86400, 0]),
        ([datetime.time(0, 1, 1), None], "number", [61, NAN]),
        ([datetime.timedelta(minutes=1)], "number", [60]),
        (["a", 1.0, 1, True, None], "category", ["a", "1", "1", "True", None]),
        ([None, None], "number", [NAN, NAN]),
    ],
)
def test_objects(given, kind, values):
    assert_read(from_values(given, name="c", untyped=False), kind, values)


def test_text_among_objects_is_parsed_only_where_the_source_has_no_types():
    assert [from_values(["1", None], name="c", untyped=one)[0] for one in (True, False)] == [
        "number",
        "category",
    ]


def test_an_object_that_is_no_value():
    with refused("Column 'c' holds dict objects, not numbers, booleans, text or dates"):
        from_values([1, {}], name="c", untyped=True)
    with refused("Column 'c' holds bytes"):
        from_column(np.array([b"a", b"b"], dtype=object), "c")


def test_times_of_numpy():
    dates = np.array(["1970-01-01T00:00:01", "NaT"], dtype="datetime64[ns]")
    spans = np.array([90, "NaT"], dtype="timedelta64[m]")
    assert_read(from_column(dates, "c"), "date", [1, NAN])
    assert_read(from_column(spans, "c"), "number", [5400, NAN])


def test_missing_values():
    assert all(
        map(is_missing, [None, NAN, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT", "s")])
    )
    assert not any(map(is_missing, [0, "", "nan", False, np.datetime64("2020-01-01")]))


def column(*values):
    return np.array(values, dtype=object if any(isinstance(v, str) for v in values) else float)


@pytest.mark.parametrize(
    ("wanted", "kind", "values", "read"),
    [
        ("category", "category", column("007", None), ["007", None]),
        ("category", "number", column(7, NAN, 1.5), ["7", None, "1.5"]),
        ("category", "boolean", column(1, NAN), ["True", None]),
        ("number", "category", column("007", "1e3"), [7, 1000]),
        ("number", "category", column("$1,234", "-"), [1234, NAN]),
        ("number", "boolean", column(1, 0), [1, 0]),
        ("date", "number", column(20200101, NAN), [1577836800, NAN]),
        ("date", "category", column("2020-01-01", None), [1577836800, NAN]),
    ],
)
def test_a_column_is_read_as_its_owner_says(wanted, kind, values, read):
    assert_read((wanted, read_as(wanted, kind, values, "c")), wanted, read)


@pytest.mark.parametrize(
    ("wanted", "kind", "values", "words"),
    [
        (
            "number",
            "category",
            column("1", "many"),
            "which has 'many' in row 1. Leave the cell emp",
        ),
        (
            "date",
            "number",
            column(7, 20200101),
            r"kinds={'c': 'date'} does not fit the column 'c', which has '7' in row 0",
        ),
        ("number", "date", column(0), "holds dates. Convert the column"),
        (
            "number",
            "category",
            column("0.5", "-inf"),
            r"Column 'c' has an infinite value in row 1 \(the first row is row 0\). Clip it",
        ),
        ("number", "category", column(f"${'9' * 400}"), "has an infinite value in row 0. Clip it"),
    ],
)
def test_a_column_that_cannot_be_read_as_its_owner_says(wanted, kind, values, words):
    with refused(words):
        read_as(wanted, kind, values, "c")


@pytest.mark.parametrize(
    ("texts", "numbers", "remark"),
    [
        (["$112.8", "$0.5", None], [112.8, 0.5, NAN], "text such as '$112.8' is read as numbers"),
        (
            ["$1,234", "$999", "-$1,234,567.89"],
            [1234, 999, -1234567.89],
            "text such as '$1,234' is read as numbers",
        ),
        (["89.5%", "100%", "-3 %"], [89.5, 100, -3], "text such as '89.5%' is read as numbers"),
        (
            ["1,234", "12", "12,345.5"],
            [1234, 12, 12345.5],
            "text such as '1,234' is read as numbers",
        ),
        (["12.50 €", " 7 € "], [12.5, 7], "text such as '12.50 €' is read as numbers"),
        (["£+5", "£10000"], [5, 10000], "text such as '£+5' is read as numbers"),
        (["¥1.125", "¥1.5"], [1.125, 1.5], "text such as '¥1.125' is read as numbers"),
        (["-", "12", "-0.5", None], [NAN, 12, -0.5, NAN], "'-' among numbers is read as missing"),
        (["1e3", " -- ", ".5", "2."], [1000, NAN, 0.5, 2], "'--' among numbers is read as missing"),
        (["$1", "–"], [1, NAN], "text such as '$1' is read as numbers, '–' as missing"),
    ],
)
def test_amounts_are_numbers_and_a_dash_among_numbers_is_missing(texts, numbers, remark):
    values, words = read_amounts(texts)
    np.testing.assert_array_equal(values, numbers)
    assert words == remark


@pytest.mark.parametrize(
    "texts",
    [
        ["$1", "2"],
        ["$1", "2%"],
        ["$1", "€2"],
        ["$5%"],  # not one currency throughout
        # commas in some thousands, decimal ones
        ["1,234", "5678"],
        ["$1,234", "$5678"],
        ["1,23"],
        ["0,125"],
        ["1,2345"],
        # thousands, where a point stands between them
        ["1.234,50 €"],
        ["1.234 €", "12.500 €"],
        ["1.234 €", "12 €"],
        ["$007"],
        ["12", "7"],
        ["-", "007"],
        ["-", "1_000"],
        ["02139"],  # plain numbers, and codes
        ["-", "red"],
        ["-", "."],
        ["-", None],
        ["$"],
        ["%"],
        ["-$-5"],
        ["(5)"],
        ["$1e3"],
        ["$1", "call us"],
        ["$1", ""],
        ["٣%"],
        [None],
        [],
    ],
)
def test_what_does_not_agree_stays_text(texts):
    assert read_amounts(texts) is None


def test_a_file_of_amounts_has_numbers_and_a_note(tmp_path):
    rows = [f'{i},"${1000 + i:,}.50",{i}.5%,$1{i % 3},{"$1" if i else "free"}' for i in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["id,price,share,mixed,odd", *rows]) + "\n")
    table = read_table(tmp_path / "t.csv")
    assert table.kinds == ("number", "number", "number", "number", "category")
    rest, y = split_target(table, "price")
    np.testing.assert_array_equal(y, np.arange(30) + 1000.5)
    notes = " ".join(fit_layout(rest).notes)
    for name, example in {"price": "$1,000.50", "share": "0.5%", "mixed": "$10"}.items():
        assert f"Column '{name}': text such as '{example}' is read as numbers" in notes
    assert "'odd': text such" not in notes and rest.select(np.arange(5)).amounts == table.amounts
    # as its owner says
    assert table.read_as({"price": "number"}).amounts.keys() == {"share", "mixed"}


def test_amounts_in_a_frame_are_numbers_but_not_categories():
    columns = {"a": ["$1", "$2"], "code": ["01", "02"], "plain": ["1", "2"]}
    for frame in (pd.DataFrame(columns), pl.DataFrame(columns)):
        assert as_table(frame).kinds == ("number", "category", "category")
    assert as_table(pd.DataFrame({"a": pd.Categorical(["$1", "$2"])})).kinds == ("category",)


def test_a_comma_in_a_file_with_semicolons_separates_no_thousands(tmp_path):
    rows = [f"{i % 9 + 1},{i * 7 % 1000:03d};{i},500%;{1 + i},000 €;{i}" for i in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["x;share;price;y", *rows]) + "\n")
    table = read_table(tmp_path / "t.csv")
    assert table.kinds == ("category", "category", "number", "number")
    assert table.column("x")[1] == "2,007" and table.column("price")[0] == 1000
    assert "because of commas as in '1,000'" in " ".join(fit_layout(table).notes)
    with refused("does not fit the column 'x', which has '1,000' in row 0"):
        table.read_as({"x": "number"})
    # The model was trained with numbers.
    with refused("Column 'x' must be a number as in training, got text such as '1,000'"):
        convert(table.column("x"), "category", "number", "x")


def test_a_dash_in_new_rows_of_a_column_of_numbers_is_missing():
    for texts, numbers in ((["-"], [NAN]), (["–", None], [NAN, NAN]), ([" - ", "1"], [NAN, 1])):
        values = np.array(texts, dtype=object)
        np.testing.assert_array_equal(convert(values, "category", "number", "x"), numbers)
    assert convert(np.array(["-"], dtype=object), "category", "category", "x").tolist() == ["-"]
