"""Turn one column of a table into numeric features for a network.

``fit_column`` decides once, from the values of a column. Later rows are converted by the same
decision. In shapes, n counts rows and d features of a column.

number     its value; ``with_levels`` adds the features of a category of its values
boolean    1 or 0
category   one feature per level (one-hot); rare levels share the feature ``(other)``
date       days since 1970, month, day of the month, weekday (0 = Monday), hour;
           only the parts that vary

If values are missing, numbers, booleans and dates get an additional feature ``(missing)``, and
their other features are NaN. A category gets a level of that name.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np

from gputune.data.kinds import Kind, convert, text_of
from gputune.data.readings import misread_remarks
from gputune.ground.errors import option
from gputune.ground.types import Json

DATE_PARTS = ("days", "month", "day", "weekday", "hour")


def _parts(kind: Kind, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features of a numeric, boolean or date column, by their name in ``Column.parts``."""
    if kind != "date":
        return {"value": values}
    known = ~np.isnan(values)
    seconds = np.floor(np.where(known, values, 0.0)).astype(np.int64).astype("datetime64[s]")
    days = seconds.astype("datetime64[D]")
    months = seconds.astype("datetime64[M]")
    # NumPy counts months and days from 1970-01-01, which was a Thursday.
    parts = {
        "days": values / 86400.0,
        "month": months.astype(np.int64) % 12 + 1,
        "day": (days - months.astype(days.dtype)).astype(np.int64) + 1,
        "weekday": (days.astype(np.int64) + 3) % 7,
        "hour": (seconds - days.astype(seconds.dtype)).astype(np.int64) // 3600,
    }
    return {name: np.where(known, part, np.nan) for name, part in parts.items()}


COPIED_LEVELS = 128
"""The largest number of levels of a number that is also a category, if ``max_levels`` is not higher."""


@dataclass(frozen=True)
class Column:
    """One column of a table and its features, in the order parts, levels, other, missing.

    A number with levels is also a category: its frequent values have features of their own.
    """

    name: str
    kind: Kind
    parts: tuple[str, ...] = ()  # "value" for numbers and booleans; names from DATE_PARTS for dates
    levels: tuple[str, ...] = ()
    other: bool = False
    missing: bool = False

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the features made from this column, such as "age" or "color=red"."""
        parts = [self.name if part == "value" else f"{self.name}.{part}" for part in self.parts]
        levels = [*self.levels, *["(other)"] * self.other, *["(missing)"] * self.missing]
        return (*parts, *(f"{self.name}={level}" for level in levels))

    @property
    def is_plain(self) -> bool:
        """True for a number or boolean that is not also a category."""
        return self.kind in ("number", "boolean") and not self.levels

    @property
    def is_category(self) -> bool:
        """True if the features after the parts are the levels of one category."""
        return self.kind == "category" or bool(self.levels)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """A flag for each feature of this column: True if the feature is centered and scaled.

        The flag is True for the values of numeric columns and for the parts of dates.
        """
        n_scaled = len(self.parts) if self.kind in ("number", "date") else 0
        n_flags = len(self.feature_names) - n_scaled
        return (True,) * n_scaled + (False,) * n_flags

    def read(self, kind: Kind, values: np.ndarray) -> np.ndarray:
        """Return values of another kind converted to this column's kind, such as text to numbers.

        Raises:
            InputError: a value does not fit the kind of the column.
        """
        return convert(values, kind, self.kind, self.name, self.levels)

    def features(self, kind: Kind, values: np.ndarray) -> np.ndarray:
        """Return the features (n, d), float64, of values of this column.

        ``kind`` is the kind of the values. If a number, boolean or date is missing, its features
        are NaN, except a feature that marks missing values.
        """
        values = self.read(kind, values)
        features = []
        if self.parts:
            by_name = _parts(self.kind, values)
            features = [by_name[name] for name in self.parts]
        if self.is_category:
            features.append(self._one_hot(values))
        elif self.missing:
            features.append(np.isnan(values).astype(np.float64))
        return np.column_stack(features)

    def _one_hot(self, values: np.ndarray) -> np.ndarray:
        """Return the features (n, d) of the levels for values of this column's kind."""
        width = len(self.levels) + self.other + self.missing
        unknown = len(self.levels) if self.other else width  # column cut off below: zeros
        position: dict[str | None, int] = {level: j for j, level in enumerate(self.levels)}
        position[None] = width - 1 if self.missing else unknown
        if self.kind == "category":
            codes = np.array([position.get(value, unknown) for value in values], dtype=np.int64)
        else:
            distinct, places = np.unique(values, return_inverse=True)
            texts = [None if math.isnan(value) else _level_of(value) for value in distinct]
            codes = np.array([position.get(text, unknown) for text in texts], np.int64)[places]
        # (n,) codes -> (n, width) one-hot
        return np.eye(width + 1)[codes, :width]

    def to_json(self) -> Json:
        return asdict(self) | {"parts": list(self.parts), "levels": list(self.levels)}

    @staticmethod
    def from_json(value: Json) -> "Column":
        return Column(**{**value, "parts": tuple(value["parts"]), "levels": tuple(value["levels"])})


def fit_column(
    name: str,
    kind: Kind,
    values: np.ndarray,
    *,
    max_levels: int,
    min_count: int,
    keep: bool = False,
) -> tuple[Column, tuple[str, ...]]:
    """Decide from a column's values which features the network receives for the column.

    Returns the column and remarks for the user. A search does not use a column without features.

    A level is rare if it has fewer than ``min_count`` rows (or fewer than 1% of the rows, if that
    is less). It is also rare if it is not among the ``max_levels`` most frequent levels. With
    ``keep``, a number or boolean is always one feature, whatever its values are.
    """
    if kind == "category":
        counts = Counter(values.tolist())
        del counts[None]
        return fit_category(name, counts, len(values), max_levels, min_count)
    known = values[~np.isnan(values)]
    missing = len(known) < len(values)
    remarks = []
    if kind == "number" and _is_row_counter(values):
        remarks.append("counts the rows. Leave the column out if it is only an identifier")
    if keep and kind != "date":
        if missing:
            fill = "are all 0" if len(known) == 0 else "become the mean of the training rows"
            remarks.append(f"missing values {fill}")
        return Column(name, kind, parts=("value",)), tuple(remarks)
    if len(known) == 0:
        return Column(name, kind), ("left out, all values missing",)
    varying = tuple(name for name, part in _parts(kind, known).items() if np.ptp(part) > 0)
    column = Column(name, kind, parts=varying, missing=missing)
    if not varying and not missing:
        return column, ("left out, constant",)
    if not varying:
        remarks.append("all known values are equal, so its only feature marks missing values")
    elif missing:
        remarks.append(
            "missing values become the mean of the training rows, and a feature marks them"
        )
    return column, tuple(remarks)


def with_levels(
    number: Column, values: np.ndarray, max_levels: int, min_count: int
) -> tuple[Column, tuple[str, ...]]:
    """Add the frequent values of a number as levels. Return the column and remarks for the user.

    The limit of the levels is ``COPIED_LEVELS``, or ``max_levels`` if that is more. A column with a
    single known value gets no levels.
    """
    counts = Counter[str]()
    for value, n_rows in zip(*np.unique(values[~np.isnan(values)], return_counts=True)):
        counts[_level_of(value)] += int(n_rows)
    if len(counts) < 2:
        return number, ()
    limit = max(max_levels, COPIED_LEVELS)
    category, _ = fit_category(number.name, counts, len(values), limit, min_count)
    if not category.levels:
        return number, ("no value is frequent enough to be a category too",)
    remark = f"{len(category.levels)} of {len(counts)} values are categories too"
    return replace(number, levels=category.levels, other=category.other), (remark,)


def _level_of(value: float) -> str:
    """Return the name of a number as a level of a category.

    Other numbers than integers are rounded to single precision, because the same value may come
    from a file, and from arrays of both precisions.
    """
    return text_of(value) if float(value).is_integer() else str(np.float32(value))


def fit_category(
    name: str, counts: Counter[str], n_rows: int, max_levels: int, min_count: int
) -> tuple[Column, tuple[str, ...]]:
    """Return a category for a column with these numbers of rows by level, and remarks for the
    user."""
    if not counts:
        return Column(name, "category"), ("left out, all values missing",)
    n_known = sum(counts.values())
    remarks = misread_remarks(counts)
    missing = n_known < n_rows
    # Every value is distinct: an identifier or free text.
    if len(counts) == n_known and n_known > 1:
        reason = f"left out, text with all {n_known} values distinct"
        return Column(name, "category"), (reason, *remarks)
    least = min(min_count, math.ceil(n_rows / 100))
    # By count, then by name: the order of the rows has no influence.
    ranked = sorted(counts, key=lambda level: (-counts[level], level))
    frequent = [level for level in ranked if counts[level] >= least]
    levels = tuple(sorted(frequent[:max_levels]))
    n_rare = len(counts) - len(levels)
    column = Column(name, "category", levels=levels, other=n_rare > 0, missing=missing)
    if len(column.feature_names) == 1:
        reason = "constant" if levels else f"text with {n_rare} levels, all in under {least} rows"
        return Column(name, "category"), (f"left out, {reason}", *remarks)
    if missing:
        remarks = (*remarks, "missing values become a level")
    if n_rare:
        n_rare_rows = n_known - sum(counts[level] for level in levels)
        rare = f"{n_rare} of {len(counts)} levels, {n_rare_rows} rows"
        remark = f"rare levels share one feature ({rare})"
        if len(frequent) > max_levels:
            limit = option("max_levels", max_levels)
            remark = f"{remark}. {limit} keeps only the most frequent levels"
        remarks = (*remarks, remark)
    return column, remarks


def _is_row_counter(values: np.ndarray) -> bool:
    """Return True if the numbers of a column look like a row counter.

    A counter has more than 20 values that rise in whole steps. Gaps are allowed, because some rows
    may be held out.
    """
    if len(values) <= 20 or not np.isfinite(values).all() or np.ptp(values) >= 2 * len(values):
        return False
    steps = np.diff(values)
    return bool((steps >= 1).all() and (steps == np.floor(steps)).all())
