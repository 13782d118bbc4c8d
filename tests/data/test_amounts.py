"""Amounts as spreadsheets write them are numbers where the whole column agrees, and text where it does not."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from gputune.data.columns import Column, convert
from gputune.data.encode import fit_layout
from gputune.data.files import read_table
from gputune.data.kinds import read_amounts
from gputune.data.table import as_table, split_target
from refused import refused


@pytest.mark.parametrize(
    ("texts", "numbers", "example"),
    [
        (["$112.8", "$0.5", None], [112.8, 0.5, np.nan], "$112.8"),
        (["$1,234", "$999", "-$1,234,567.89"], [1234, 999, -1234567.89], "$1,234"),
        (["89.5%", "100%", "-3 %"], [89.5, 100, -3], "89.5%"),
        (["1,234", "12", "12,345.5"], [1234, 12, 12345.5], "1,234"),
        (["12.50 €", " 7 € "], [12.5, 7], "12.50 €"),
        (["£+5", "£10000"], [5, 10000], "£+5"),
        (["¥1.125", "¥1.5"], [1.125, 1.5], "¥1.125"),
    ],
)
def test_amounts_are_numbers(texts, numbers, example):
    found, shown = read_amounts(texts)
    np.testing.assert_array_equal(found, numbers)
    assert shown == f"text such as {example!r} is read as numbers"


@pytest.mark.parametrize(
    ("texts", "numbers", "remark"),
    [
        (["-", "12", "-0.5", None], [np.nan, 12, -0.5, np.nan], "'-' among numbers is read as missing"),
        (["1e3", " -- "], [1000, np.nan], "'--' among numbers is read as missing"),
        (["$1", "–"], [1, np.nan], "text such as '$1' is read as numbers, '–' as missing"),
    ],
)
def test_a_dash_among_numbers_is_missing(texts, numbers, remark):
    found, said = read_amounts(texts)
    np.testing.assert_array_equal(found, numbers)
    assert said == remark


@pytest.mark.parametrize(
    "texts",
    [
        ["$1", "2"],  # one without its currency
        ["$1", "2%"],
        ["$1", "€2"],
        ["$5%"],
        ["1,234", "5678"],  # commas in some thousands alone
        ["1,23"],
        ["0,125"],  # a decimal comma
        ["1,2345"],
        ["1.234,50 €"],
        ["1.234 €", "12.500 €"],  # thousands, where a point stands between them
        ["$007"],
        ["12", "7"],  # plain numbers, and codes
        ["-", "007"],
        ["-", "1_000"],
        ["-", "red"],
        ["-", None],
        ["02139"],
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


def table(tmp_path):
    rows = [f'{i},"${1000 + i:,}.50",{i}.5%,$1{i % 3},{"$1" if i else "free"}' for i in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["id,price,share,mixed,odd", *rows]) + "\n")
    return read_table(tmp_path / "t.csv")


def test_a_file_has_numbers_and_a_note(tmp_path):
    read = table(tmp_path)
    assert read.kinds == ("number", "number", "number", "number", "category")
    rest, y = split_target(read, "price")
    np.testing.assert_array_equal(y, np.arange(30) + 1000.5)
    notes = " ".join(fit_layout(rest).notes)
    for name, example in {"price": "$1,000.50", "share": "0.5%", "mixed": "$10"}.items():
        assert f"Column '{name}': text such as '{example}' is read as numbers" in notes
    assert "'odd': text such" not in notes
    rows = np.arange(5)
    assert rest.select(rows).amounts == read.amounts and len(rest.select(rows)) == 5


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame])
def test_text_in_a_frame_is_a_number_where_it_is_an_amount(make):
    frame = make({"a": ["$1", "$2"], "code": ["01", "02"], "plain": ["1", "2"]})
    assert as_table(frame).kinds == ("number", "category", "category")


def test_a_categorical_column_is_no_number():
    frame = pd.DataFrame({"a": pd.Categorical(["$1", "$2"])})
    assert as_table(frame).kinds == ("category",)


def test_rows_of_another_kind_than_at_training():
    levels = Column("odd", "category", levels=("$1", "free"))
    assert convert(np.array([1.0, np.nan]), "number", levels).tolist() == ["$1", None]
    numbers = Column("price", "number", parts=("value",))
    assert convert(np.array(["$1", "$2"], dtype=object), "category", numbers).tolist() == [1.0, 2.0]
    with refused("column 'price' must be a number as it was for training, got text such as 'free'"):
        convert(np.array(["$1", "free"], dtype=object), "category", numbers)
