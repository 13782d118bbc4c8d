"""One column's features: levels, rare ones, missing values, dates, and values of another kind at
prediction."""

import numpy as np
import pytest

from gputune.data.columns import Column, fit_column, fit_layout
from gputune.data.kinds import convert, parse_text
from gputune.data.table import as_table
from refused import refused


def fit(kind, values, *, max_levels=32, min_count=10):
    values = np.array(values, dtype=object if kind == "category" else float)
    column, notes = fit_column("c", kind, values, max_levels=max_levels, min_count=min_count)
    return column, notes, values


def text(*values):
    return np.array(values, dtype=object)


def test_rare_levels_share_a_feature():
    column, notes, values = fit("category", ["a"] * 50 + ["b"] * 12 + ["c"] * 9 + ["d"] * 929)
    assert column.feature_names == ("c=a", "c=b", "c=d", "c=(other)")
    assert notes == ("rare levels share one feature (1 of 4 levels, 9 rows)",)
    np.testing.assert_array_equal(column.features("category", values).sum(0), [50, 12, 929, 9])
    # Unknown and missing ones (there was none in training) count as other.
    np.testing.assert_array_equal(
        column.features("category", text("zzz", None)), [[0, 0, 0, 1]] * 2
    )


def test_at_most_so_many_levels_the_most_frequent_then_by_name():
    column, _, _ = fit("category", ["d", "c", "b", "a"] * 5 + ["e"] * 9, max_levels=3)
    assert (column.levels, column.other) == (("a", "b", "e"), True)


def test_few_rows_keep_their_levels_and_a_missing_category_is_one():
    column, notes, _ = fit("category", ["a", "b", "a"])
    assert (column.feature_names, notes) == (("c=a", "c=b"), ())
    np.testing.assert_array_equal(
        column.features("category", text("b", "zzz", None)), [[0, 1], [0, 0], [0, 0]]
    )
    column, notes, values = fit("category", ["a", None, "b", "a"])
    assert (column.feature_names, notes) == (
        ("c=a", "c=b", "c=(missing)"),
        ("missing values become a level",),
    )
    np.testing.assert_array_equal(column.features("category", values)[1], [0, 0, 1])
    assert fit("category", ["a", None, "a"])[0].feature_names == ("c=a", "c=(missing)")


@pytest.mark.parametrize(
    ("kind", "values", "note"),
    [
        ("category", [f"v{i}" for i in range(30)], "left out, text with all 30 values distinct"),
        ("category", ["a"] * 4, "left out, constant"),
        ("category", [None] * 4, "left out, all values missing"),
        (
            "category",
            [f"v{i // 2}" for i in range(2000)],
            "left out, text with 1000 levels, all in under 10 rows",
        ),
        ("number", [1, 1, 1], "left out, constant"),
        ("number", [np.nan] * 3, "left out, all values missing"),
        ("boolean", [1, 1, 1], "left out, constant"),
        ("date", [86400.0] * 3, "left out, constant"),
    ],
)
def test_what_is_left_out(kind, values, note):
    column, notes, _ = fit(kind, values)
    assert column.feature_names == ()
    assert notes == (note,)


def test_numbers_and_booleans_with_missing_values():
    column, notes, values = fit("number", [1, np.nan, 3])
    assert column.feature_names == ("c", "c=(missing)")
    assert column.numeric == (True, False)
    assert notes == (
        "missing values become the mean of the training rows, and a feature marks them",
    )
    np.testing.assert_array_equal(column.features("number", values), [[1, 0], [np.nan, 1], [3, 0]])
    assert fit("boolean", [1, np.nan, 0])[0].numeric == (False, False)
    only, notes, _ = fit("number", [5, np.nan, 5])
    assert only.feature_names == ("c=(missing)",)
    assert notes == ("all known values are equal, so its only feature marks missing values",)


def test_parts_of_a_date():
    days = np.array(
        ["1969-12-31T23:30:00", "2024-02-29T00:00:00", "2023-03-01T12:00:00"], dtype="datetime64[s]"
    )
    column, _, values = fit("date", days.astype(np.int64).astype(float))
    assert column.feature_names == ("c.days", "c.month", "c.day", "c.weekday", "c.hour")
    features = column.features("date", values)
    np.testing.assert_allclose(features[:, 0], [-30 / 1440, 19782, 19417.5])
    np.testing.assert_array_equal(features[:, 1:], [[12, 31, 2, 23], [2, 29, 3, 0], [3, 1, 2, 12]])
    assert np.isnan(column.features("date", np.array([np.nan]))).all()


def features(column, *texts):
    """The features of a column of a text file that holds only these values."""
    kind, values = parse_text(np.array(texts, dtype=object))
    return column.features(kind, values).tolist()


def test_a_column_of_codes_read_as_numbers_at_prediction():
    column, _, _ = fit("category", ["007", "7a", "12", "007", "7a", "12"])
    assert column.levels == ("007", "12", "7a")
    assert features(column, "007", "12") == [[1, 0, 0], [0, 1, 0]]
    assert features(column, "13", None) == [[0, 0, 0], [0, 0, 0]]
    flags, _, _ = fit("category", ["true", "false", "maybe"] * 2)
    assert features(flags, "false", "true") == [[1, 0, 0], [0, 0, 1]]


def test_values_of_another_kind_that_fit():
    number = Column("c", "number", parts=("value",))
    boolean = Column("c", "boolean", parts=("value",))
    date = Column("c", "date", parts=("days",))
    assert features(number, "true", "false") == [[1], [0]]
    assert features(boolean, "0", "1") == [[0], [1]]
    assert number.features("category", text("1.5", "2")).tolist() == [[1.5], [2]]
    assert date.features("category", text("1970-01-02", "1970-01-03")).tolist() == [[1], [2]]
    for column in (number, boolean, date):
        assert np.isnan(column.features("category", text(None, None))).all()
    amounts = Column("c", "category", levels=("$1", "NA", "free"))
    assert convert(np.array([1.0, np.nan]), "number", "category", "c", amounts.levels).tolist() == [
        "$1",
        None,
    ]
    assert number.features("category", text("$1", "$2")).tolist() == [[1], [2]]
    category = Column("c", "category", levels=("a",), missing=True)
    assert category.features("number", np.array([np.nan])).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("wanted", "kind", "values", "message"),
    [
        (
            "number",
            "category",
            ["$1", "abc"],
            "must be a number as in training, got text such as 'abc'",
        ),
        ("number", "category", ["inf"], "has an infinite value in row 0"),
        ("number", "date", [0.0], "must be a number as in training, got a date"),
        ("boolean", "number", [2.0], "must be a boolean as in training, got a number"),
        ("date", "number", [1.0], "must be a date as in training, got a number"),
        (
            "date",
            "category",
            ["soon"],
            "must be a date as in training, got text such as 'soon'",
        ),
        (
            "category",
            "date",
            [0.0],
            r"must be a category \(text\) as in training, got a date",
        ),
    ],
)
def test_values_of_another_kind_that_do_not_fit(wanted, kind, values, message):
    column = Column("c", wanted, parts=("value",))
    with refused(f"Column 'c' {message}"):
        column.features(kind, np.array(values, dtype=object if kind == "category" else float))


def test_an_array_with_too_few_columns_is_refused_by_their_number():
    layout = fit_layout(as_table(np.random.default_rng(0).normal(size=(20, 6))))
    with refused("X must have 6 columns as in training, got 4 columns.$"):
        layout.raw(as_table(np.zeros((2, 4))))


@pytest.mark.parametrize(
    ("texts", "note"),
    [
        (
            ["1"] * 10 + ["2"] * 10 + ["oops"] * 2,
            " because of 'oops', though most of its values are numbers",
        ),
        (
            ["1,234.5", "2,500"] * 10,
            " because of commas as in '1,234.5'. Write numbers without commas, and decimals with a point",
        ),
        (
            ["31/12/2020"] * 5 + ["01.02.2021"] * 15,
            ". Write dates such as '01.02.2021' as year-month-day",
        ),
        (["1", "2"] * 10, None),
        (["red", "blue", "3"] * 10, None),
    ],
)
def test_text_that_was_meant_otherwise_is_said(texts, note):
    assert fit("category", texts, min_count=1)[1] == (
        () if note is None else (f"read as text{note}",)
    )
