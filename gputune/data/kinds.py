"""The kind of one column (number, boolean, category or date), and its values in that kind.

The kind follows from the type of the values. A source without types is a CSV file, an array of str
or object, or a list of lists. Its text becomes numbers, booleans or dates if every value can be
read as one. Text in a data frame or a Parquet file stays a category, because its owner chose the
type of the column. An amount is text of a number with a currency, a percent sign, or commas between
thousands, as spreadsheets write it. Amounts become numbers in every source. A dash among numbers is
a missing value.
"""

import datetime
import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import narwhals as nw
import numpy as np

from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.text import is_number

Kind = Literal["number", "boolean", "category", "date"]

KINDS = ("number", "category", "date")
"""The kinds that a user can choose for a column. gputune detects booleans itself."""
MISSING_TEXT = frozenset(["", *"? NA N/A n/a #N/A <NA> NaN nan NAN null NULL None NaT".split()])
"""The texts that are read as a missing value in a source without types, such as a CSV file."""

_NO_KIND = "not numbers, booleans, text or dates"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def is_missing(value: object) -> bool:
    """Return True if a Python value is a missing value: None, NaN, pandas NA or NaT, or NumPy
    NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    return isinstance(value, float | np.floating) and math.isnan(value)


def refuse_infinite(values: np.ndarray, name: str) -> None:
    """Raise InputError if the numbers (n,) of a column have an infinite value."""
    is_infinite = np.isinf(values)
    if not is_infinite.any():
        return
    row = int(is_infinite.argmax())
    place = f"row {row} (the first row is row 0)" if row else "row 0"
    raise InputError(
        None,
        f"Column {name!r} has an infinite value in {place}",
        remedy="Clip it, or leave it empty.",
    )


def checked_labels(values: np.ndarray, name: str) -> np.ndarray:
    """Return the values (n,) of a target, after checking that text is not mixed with other types.

    Raises:
        InputError: text is mixed with other objects, because 1 would become '1'.
    """
    if values.dtype != object:
        return values
    by_type = {isinstance(value, str): value for value in values if not is_missing(value)}
    if len(by_type) == 2:
        text = by_type[True]
        other = by_type[False]
        raise InputError(
            None,
            f"{name} mixes text ({str(text)!r:.100}) and {type(other).__name__} ({other})",
            remedy="Convert the values to one type, for example [str(value) for value in y].",
        )
    return values


def text_of(value: object) -> str:
    """Return the name of a value as a level of a category: 1 and 1.0 both become '1'."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def parse_text(values: np.ndarray) -> tuple[Kind, np.ndarray]:
    """Detect the kind of a column of text (None = missing), and return its kind and values.

    The column is boolean, number or date if every value can be read as this kind. Otherwise the
    column is a category. Dates are written as in ISO 8601 (2020-01-31, 2020-01-31 12:30,
    20200131T123000Z), or with slashes. Another order of day and month would be a guess.
    """
    texts = texts_of(values)
    present = {*texts} - {None}
    if present and {text.lower() for text in present} <= {"true", "false"}:
        return "boolean", _each(texts, lambda text: float(text.lower() == "true"))
    # Python reads 1_000 as a number, but in a table it is more likely a code.
    if "_" not in "".join(present):
        with suppress(ValueError):
            return "number", _each(texts, float)
    with suppress(ValueError):
        return "date", _each(texts, _read_date)
    return "category", texts


def texts_of(values: np.ndarray) -> np.ndarray:
    """Strip blanks around texts, and replace texts that mean a missing value, such as "NA", by
    None."""
    stripped = [None if value is None else value.strip() for value in values]
    return np.array([None if text in MISSING_TEXT else text for text in stripped], dtype=object)


def _read_date(text: str) -> float:
    return _epoch_seconds(datetime.datetime.fromisoformat(text.replace("/", "-")))


def read_as(
    wanted: Kind, kind: Kind, values: np.ndarray, name: str, *, thousands: bool = True
) -> np.ndarray:
    """Convert a column to the kind ``wanted``, which the user chose for the column.

    ``thousands`` is an argument of ``read_amounts``.

    Raises:
        InputError: a value cannot be converted, or is infinite. The message shows the first such
            value.
    """
    if kind == wanted or (wanted, kind) == ("number", "boolean"):
        return values
    rule = f"does not fit the column {name!r}, which"
    if kind == "date":
        raise InputError(
            option("kinds", {name: wanted}), f"{rule} holds dates", remedy="Convert the column."
        )
    texts = values if kind == "category" else value_texts(values, kind)
    if wanted == "category":
        return texts
    amounts = read_amounts(texts, thousands=thousands) if wanted == "number" else None
    if amounts is not None:
        refuse_infinite(amounts[0], name)
        return amounts[0]
    read = float if wanted == "number" else _read_date
    numbers = np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        try:
            numbers[row] = math.nan if text is None else read(text)
        except ValueError:
            raise InputError(
                option("kinds", {name: wanted}),
                f"{rule} has {text!r:.100} in row {row}",
                remedy="Leave the cell empty if the value is missing, or choose a different kind.",
            ) from None
    refuse_infinite(numbers, name)
    return numbers


def value_texts(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Return numbers or booleans as texts, and None for missing values."""
    text = (lambda value: str(bool(value))) if kind == "boolean" else text_of
    return np.array([None if np.isnan(value) else text(value) for value in values], dtype=object)


def from_series(series: "nw.Series[Any]") -> tuple[Kind, np.ndarray]:
    """Return the kind and the values of one column of a data frame.

    The kind follows from the type of the column.
    """
    dtype = series.dtype
    if dtype == nw.Boolean or dtype.is_numeric():
        return "boolean" if dtype == nw.Boolean else "number", _floats(series)
    if dtype == nw.Date or isinstance(dtype, nw.Datetime):
        return "date", _floats(series.dt.timestamp("us")) / 1e6
    if isinstance(dtype, nw.Duration):
        return "number", _floats(series.dt.total_microseconds()) / 1e6
    values = _present_or_none(series.to_list())
    if isinstance(dtype, nw.Categorical | nw.Enum):
        return "category", _category(values)
    if dtype == nw.String:
        # Equal texts are one object. Otherwise each row would take 50 bytes more.
        texts: dict[object, object] = {}
        shared = [texts.setdefault(value, value) for value in values]
        return "category", np.array(shared, dtype=object)
    return from_values(values, name=str(series.name), untyped=False)


def _present_or_none(values: Iterable[object]) -> list[object]:
    return [None if is_missing(value) else value for value in values]


def _floats(series: "nw.Series[Any]") -> np.ndarray:
    return np.array(series.cast(nw.Float64).to_numpy(), dtype=np.float64)


def _category(values: Sequence[object]) -> np.ndarray:
    return np.array([None if value is None else text_of(value) for value in values], dtype=object)


def from_column(column: np.ndarray, name: str) -> tuple[Kind, np.ndarray]:
    """Return the kind and the values of one column of an array. The kind follows from the dtype."""
    match column.dtype.kind:
        case "b" | "i" | "u" | "f":
            return "boolean" if column.dtype == bool else "number", column.astype(np.float64)
        case "M" | "m":
            microseconds = column.astype(f"{column.dtype.kind}8[us]").astype(np.int64)
            seconds = np.where(np.isnat(column), np.nan, microseconds / 1e6)
            return "date" if column.dtype.kind == "M" else "number", seconds
        case "U":
            return parse_text(column.astype(object))
        case "O":
            return from_values(_present_or_none(column), name=name, untyped=True)
    raise InputError(
        None, f"Column {name!r} holds {column.dtype}, {_NO_KIND}", remedy="Convert it."
    )


def from_values(values: Sequence[object], *, name: str, untyped: bool) -> tuple[Kind, np.ndarray]:
    """Return the kind and the values of a column of Python objects (None = missing).

    The kind is the common kind of all objects, or category if the objects have no common kind.
    """
    present = [value for value in values if value is not None]
    if not present:
        return "number", np.full(len(values), np.nan)
    for types, kind, convert in _OBJECTS:
        if all(isinstance(value, types) for value in present):
            try:
                return kind, _each(values, convert)
            except OverflowError:
                raise InputError(
                    None,
                    f"Column {name!r} holds an integer that is larger than any float",
                    remedy="Pass it as text.",
                ) from None
    if untyped and all(isinstance(value, str) for value in present):
        return parse_text(np.array(values, dtype=object))
    for value in present:
        if not isinstance(value, str | numbers.Number | np.bool_ | datetime.date):
            raise InputError(
                None,
                f"Column {name!r} holds {type(value).__name__} objects, {_NO_KIND}",
                remedy="Convert it.",
            )
    return "category", _category(values)


def _each(values: Iterable[Any], convert: Callable[[Any], float]) -> np.ndarray:
    return np.array([math.nan if v is None else convert(v) for v in values], dtype=np.float64)


def _epoch_seconds(value: datetime.date | np.datetime64) -> float:
    if isinstance(value, np.datetime64):
        return float(value.astype("datetime64[us]").astype(np.int64)) / 1e6
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    aware = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
    return (aware - _EPOCH).total_seconds()


def _seconds_of_day(time: datetime.time) -> float:
    return time.hour * 3600.0 + time.minute * 60 + time.second + time.microsecond / 1e6


_OBJECTS: tuple[tuple[Any, Kind, Callable[[Any], float]], ...] = (
    (bool | np.bool_, "boolean", float),
    (numbers.Real | Decimal | np.bool_, "number", float),
    (datetime.date | np.datetime64, "date", _epoch_seconds),
    (datetime.time, "number", _seconds_of_day),
    (datetime.timedelta, "number", datetime.timedelta.total_seconds),
)
"""Entries (types, kind, converter) for columns of Python objects. An entry applies if all values of
the column have its types."""

_AMOUNT = re.compile(
    r"([-+]?)([$€£¥]?) ?([-+]?)(0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(\.[0-9]+)? ?([%$€£¥]?)"
)
_MARKS = str.maketrans("", "", "$€£¥%, ")
# Texts such as 007 and 1_000 are codes and do not match.
_PLAIN = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_DASHES = ("-", "--", "–", "—")
_THOUSANDS = 4  # a number with this many digits has a comma if its column uses commas


def read_amounts(
    texts: Iterable[str | None], *, thousands: bool = True
) -> tuple[np.ndarray, str] | None:
    """Read a column of amounts, such as "$1,200", as numbers (n,), with a remark for the user.

    Returns None if the texts are not amounts.

    None becomes NaN, and 89.5% becomes 89.5. All texts must have one form:

    - the same currency, or a percent sign,
    - commas between thousands everywhere or nowhere.

    Plain numbers are not amounts. Currencies with three decimals throughout are not amounts either,
    because a point separates thousands in some countries. A dash among amounts or plain numbers is
    a missing value.

    ``thousands=False`` means that a comma may be a decimal comma, as in a file in which semicolons
    separate the fields. Then text with commas is an amount only if it has a currency.
    """
    texts = [None if text is None else text.strip() for text in texts]
    dash = next(filter(_is_dash, texts), None)
    texts = [None if _is_dash(text) else text for text in texts]
    present = [text for text in texts if text is not None]
    example = _example(present, thousands=thousands)
    if example is not None:
        missing = "" if dash is None else f", {dash!r} as missing"
        numbers = _each(texts, lambda text: float(text.translate(_MARKS)))
        return numbers, f"text such as {example!r} is read as numbers{missing}"
    if dash is not None and present and all(map(_PLAIN.fullmatch, present)):
        return _each(texts, float), f"{dash!r} among numbers is read as missing"
    return None


def _is_dash(text: str | None) -> bool:
    """Return True for a dash, which is a missing value among numbers."""
    return text is not None and text.strip() in _DASHES


def _example(texts: Sequence[str], *, thousands: bool) -> str | None:
    """Return an example of the amounts in a column for the remark to the user.

    The result is None if the texts are not all amounts of one form.

    An example with a comma is preferred.
    """
    signs = set[str]()
    decimals = set[int]()
    commas = set[bool]()
    for text in texts:
        match = _AMOUNT.fullmatch(text)
        if match is None or (match[1] and match[3]) or (match[2] and match[6]):
            return None
        signs.add(match[2] + match[6])
        decimals.add(len(match[5] or ""))
        if len(match[4]) >= _THOUSANDS:
            commas.add("," in match[4])
    # Without a currency or percent sign, only commas show that the texts are amounts.
    if len(signs) != 1 or len(commas) > 1 or (signs == {""} and commas != {True}):
        return None
    if not thousands and signs <= {"", "%"} and True in commas:
        return None
    # 4 characters are the point and three decimals, which may be thousands.
    if not signs <= {"", "%"} and decimals - {0} == {4}:
        return None
    return next((text for text in texts if "," in text), texts[0])


def convert(
    values: np.ndarray, kind: Kind, wanted: Kind, name: str, levels: Sequence[str] = ()
) -> np.ndarray:
    """Convert a column of new rows to the kind that the column had at training.

    A file for prediction may hold only numbers in a column of codes, or no value at all. Then the
    column was read as a different kind than at training. Values are converted only if their meaning
    in the new kind is clear.

    Args:
        values: the values (n,) of the column.
        kind: the kind of these values.
        wanted: the kind of the column at training.
        name: the name of the column, for errors.
        levels: the levels of a category at training.

    Raises:
        InputError: a value does not fit the kind ``wanted``.
    """
    if kind == wanted:
        return values
    if kind == "category" and wanted == "number":
        values = np.array([None if _is_dash(text) else text for text in values], dtype=object)
    if kind == "category":
        known = np.array([value is not None for value in values])
    else:
        known = ~np.isnan(values)
    if not known.any():
        return np.full(len(values), None if wanted == "category" else np.nan)
    got = f"a {kind}"
    if wanted == "category" and kind != "date":
        return _as_levels(values, kind, levels)
    if kind == "category":  # texts that may be read as another kind
        kind, read = _read(values, thousands=False)
        if kind != "category":
            refuse_infinite(read, name)
            return convert(read, kind, wanted, name)
        unread = (text for text in values[known] if _read([text], thousands=False)[0] == "category")
        got = f"text such as {next(unread, values[known][0])!r:.100}"
    if (wanted, kind) == ("number", "boolean"):
        return values
    if (wanted, kind) == ("date", "number"):  # 20200131 reads as both
        with suppress(InputError):
            return read_as("date", kind, values, name)
    if (wanted, kind) == ("boolean", "number") and np.isin(values[known], (0.0, 1.0)).all():
        return values
    expected = "category (text)" if wanted == "category" else wanted
    raise InputError(
        None,
        f"Column {name!r} must be a {expected} as in training",
        got=Verbatim(got),
        remedy="Convert it.",
    )


def _as_levels(values: np.ndarray, kind: Kind, levels: Sequence[str]) -> np.ndarray:
    """Convert numbers or booleans back to the levels of a category as they were at training.

    For example, if the column had the level "007" at training, the number 7 becomes "007".
    """
    level_of = dict(zip(levels, levels))
    for level in levels:
        level_kind, value = _read([level])
        # A level "NA" is read as a missing number.
        if level_kind == kind and not np.isnan(value).any():
            level_of.setdefault(value_texts(value, kind)[0], level)
    texts = value_texts(values, kind)
    return np.array([level_of.get(text, text) for text in texts], dtype=object)


def _read(texts: Iterable[str | None], *, thousands: bool = True) -> tuple[Kind, np.ndarray]:
    """Return the kind of a column of texts, such as "number" or "category", and its values.

    Unlike ``parse_text``, the function also reads amounts such as "$1,200" as numbers.
    """
    kind, values = parse_text(np.array([*texts], dtype=object))
    amounts = read_amounts(values, thousands=thousands) if kind == "category" else None
    return (kind, values) if amounts is None else ("number", amounts[0])


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
