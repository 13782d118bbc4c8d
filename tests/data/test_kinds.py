"""What texts and Python objects are read as, one column at a time."""

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from gputune.data.kinds import MISSING_TEXT, from_column, from_values, is_missing, parse_text, read_as, text_of
from gputune.errors import InputError

NAN = np.nan


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
    found, read = parse_text(np.array(texts, dtype=object))
    assert found == kind
    np.testing.assert_array_equal(read, np.array(values, dtype=object if kind == "category" else float))


@pytest.mark.parametrize(
    ("given", "kind", "values"),
    [
        ([1, 2.5, None], "number", [1, 2.5, NAN]),
        ([Decimal("1.5"), True, None], "number", [1.5, 1, NAN]),
        ([True, np.False_], "boolean", [1, 0]),
        ([datetime.date(1970, 1, 2), pd.Timestamp("1970-01-01 00:01"), None], "date", [86400, 60, NAN]),
        ([np.datetime64("1970-01-02"), datetime.datetime(1970, 1, 1)], "date", [86400, 0]),
        ([datetime.time(0, 1, 1), None], "number", [61, NAN]),
        ([datetime.timedelta(minutes=1)], "number", [60]),
        (["a", 1.0, 1, True, None], "category", ["a", "1", "1", "True", None]),
        ([None, None], "number", [NAN, NAN]),
    ],
)
def test_objects(given, kind, values):
    found, read = from_values(given, name="c", untyped=False)
    assert found == kind
    np.testing.assert_array_equal(read, np.array(values, dtype=object if kind == "category" else float))


def test_text_among_objects_is_parsed_only_where_the_source_has_no_types():
    assert from_values(["1", None], name="c", untyped=True)[0] == "number"
    assert from_values(["1", None], name="c", untyped=False)[0] == "category"


def test_an_object_that_is_no_value():
    with pytest.raises(InputError, match="column 'c' holds dict, which is no number, boolean, text or date"):
        from_values([1, {}], name="c", untyped=True)
    with pytest.raises(InputError, match="column 'c' holds bytes"):
        from_column(np.array([b"a", b"b"], dtype=object), "c")


def test_times_of_numpy():
    dates = np.array(["1970-01-01T00:00:01", "NaT"], dtype="datetime64[ns]")
    spans = np.array([90, "NaT"], dtype="timedelta64[m]")
    for column, kind, values in [(dates, "date", [1, NAN]), (spans, "number", [5400, NAN])]:
        found, read = from_column(column, "c")
        assert found == kind
        np.testing.assert_array_equal(read, values)


def test_missing_values():
    assert all(map(is_missing, [None, NAN, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT", "s")]))
    assert not any(map(is_missing, [0, "", "nan", False, np.datetime64("2020-01-01")]))


def test_numbers_as_categories():
    assert [text_of(value) for value in (1, 1.0, 1.5, True, "a", NAN)] == ["1", "1", "1.5", "True", "a", "nan"]


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
    found = read_as(wanted, kind, values, "c")
    np.testing.assert_array_equal(found, np.array(read, dtype=object if wanted == "category" else float))


@pytest.mark.parametrize(
    ("wanted", "kind", "values", "words"),
    [
        (
            "number",
            "category",
            column("1", "many"),
            r"kinds=\{'c': 'number'\}: column 'c' has 'many' in row 1; leave that cell empty",
        ),
        ("date", "number", column(7, 20200101), r"kinds=\{'c': 'date'\}: column 'c' has '7' in row 0"),
        ("number", "date", column(0), "holds dates, which nothing else is read from; convert it"),
    ],
)
def test_a_column_that_cannot_be_read_as_its_owner_says(wanted, kind, values, words):
    with pytest.raises(InputError, match=words):
        read_as(wanted, kind, values, "c")
