"""Remarks on columns with an ambiguous meaning.

Most of them are on columns that gputune reads in one way from a text file and in another from a
data frame.

A text file has no types. As in pandas.read_csv, a column of only numeric text becomes numbers, and
texts such as NA are missing values. In a data frame the owner chose the type of each column. So
text stays text, and "NA" is a category level like any other text.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gputune.data.kinds import MISSING_TEXT, Kind, parse_text
from gputune.ground.errors import option
from gputune.ground.text import is_number

if TYPE_CHECKING:
    import polars as pl

_WORDS = ["NA", "N/A", "n/a", "NULL", "null", "None"]
"""Texts that are read as missing values, but may be real categories. For example, NA may mean North
America."""

EXAMPLE = "<column>"
"""A placeholder for the column name in the text of a remark."""

LOST_ZEROS = "leading zeros are lost, because all values are numbers"
"""The remark on a column of codes such as 00501. ``fit_layout`` adds how to keep the zeros, if a
category of these codes has features."""

READ_AS_MISSING = "is read as a missing value"
"""The end of the remark on a column of text in which a text such as NA is a missing value."""

_LEADING_ZERO = r"^\s*[-+]?0[0-9]"


_ROWS_PER_CODE = 10


def may_be_numbers(classes: Sequence[object] | np.ndarray, n_rows: int) -> bool:
    """Return True if the classes of a target may also be the values of a numeric target.

    Two whole numbers are hardly the values of a numeric target. Neither are consecutive codes from
    0 or 1, if each code has many rows on average.

    Args:
        classes: the distinct values of the target, in ascending order.
        n_rows: the number of rows.
    """
    values = np.asarray(classes)
    if values.dtype.kind not in "iuf" or len(values) <= 2:
        return False
    are_codes = values[0] in (0, 1) and values[-1] - values[0] == len(values) - 1
    return not are_codes or n_rows < _ROWS_PER_CODE * len(values)


def file_remark(kind: Kind, texts: "pl.Series") -> str:
    """Return a remark on a column of a text file, for example that leading zeros are lost.

    ``kind`` is the kind that gputune detected.

    The remark is "" if gputune reads the column in the same way from a data frame.
    """
    if kind == "number" and texts.str.contains(_LEADING_ZERO).any():
        return LOST_ZEROS
    if kind == "category":
        stripped = texts.str.strip_chars()
        missing = stripped.filter(stripped.is_in(_WORDS))
        if len(missing):
            return f"{missing[0]!r} {READ_AS_MISSING}"
    return ""


def text_kind(values: np.ndarray) -> Kind | None:
    """Return the kind that a column of text would have in a text file, or None if all values are
    missing."""
    present = (value for value in values if value is not None and value not in MISSING_TEXT)
    first = next(present, None)
    if first is None:
        return None
    # For most columns the first value settles it.
    if parse_text(np.array([first], dtype=object))[0] == "category":
        return "category"
    return parse_text(values)[0]


def frame_remark(values: np.ndarray) -> str:
    """Return a remark on a text column of a data frame, for example that numbers stay text.

    A missing value is None.

    The remark is "" if gputune reads the column in the same way from a text file.
    """
    kind = text_kind(values)
    if kind is None:
        return ""
    if kind in ("number", "date"):
        kinds = option("kinds", {EXAMPLE: kind})
        return (
            f"text that looks like {kind}s stays text, because the type of the column is text. To "
            f"read {kind}s, set {kinds}"
        )
    text = next((value for value in values if value in MISSING_TEXT), None)
    if text is not None:
        return (
            f"{text!r} is a level like other text, although it means a missing value in a CSV "
            "file. Write None for a missing value"
        )
    return ""


def misread_remarks(counts: Counter[str]) -> tuple[str, ...]:
    """Return remarks on a column of text that was probably meant as numbers or dates.

    One odd cell turns a whole column into text.
    """

    def are_most(fits: Callable[[str], object]) -> bool:
        n_fitting = sum(number for level, number in counts.items() if fits(level))
        return n_fitting >= 0.8 * sum(counts.values())

    text = min((level for level in counts if not is_number(level)), default=None)
    if text is not None and are_most(is_number):
        return (f"read as text because of {text!r:.100}, though most of its values are numbers",)
    if text is not None and are_most(lambda level: is_number(level.replace(",", ""))):
        remedy = "Write numbers without commas, and decimals with a point"
        return (f"read as text because of commas as in {text!r:.100}. {remedy}",)
    if are_most(re.compile(r"\d{1,2}[/.-]\d{1,2}[/.-](\d{4}|\d{2})").fullmatch):
        return (f"read as text. Write dates such as {min(counts)!r} as year-month-day",)
    return ()
