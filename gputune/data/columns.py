"""How one input column becomes features: decided once from the column itself, then applied to any other rows.

number     its value
boolean    1 or 0
category   one feature per level (one-hot); rare levels share the feature ``(other)``
date       days since 1970, month, day of the month, weekday (0 = Monday), hour; those that vary

Where values are missing, numbers, booleans and dates get a feature ``(missing)`` beside NaN in the others,
and a category gets a level of that name.

Of torch tensors, tables of numbers, columns are checked, summed up and decided where they lie.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from gputune.data.arrays import refuse_kind
from gputune.data.kinds import Kind, parse_text, read_amounts, read_as, value_texts
from gputune.data.table import nameless, two_axes
from gputune.errors import InputError
from gputune.text import is_number
from gputune.types import Json

DATE_PARTS = ("days", "month", "day", "weekday", "hour")


def _parts(kind: Kind, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features that numbers, booleans or dates are made into, by the names of ``Column.parts``."""
    if kind != "date":
        return {"value": values}
    known = ~np.isnan(values)
    seconds = np.floor(np.where(known, values, 0.0)).astype(np.int64).astype("datetime64[s]")
    days, months = seconds.astype("datetime64[D]"), seconds.astype("datetime64[M]")
    numbers = [
        months.astype(np.int64) % 12 + 1,
        (days - months.astype(days.dtype)).astype(np.int64) + 1,
        (days.astype(np.int64) + 3) % 7,  # 1970-01-01 was a Thursday
        (seconds - days.astype(seconds.dtype)).astype(np.int64) // 3600,
    ]
    return dict(zip(DATE_PARTS, [values / 86400.0, *(np.where(known, part, np.nan) for part in numbers)]))


@dataclass(frozen=True)
class Column:
    """One input column and its features, in the order parts, levels, other, missing."""

    name: str
    kind: Kind
    parts: tuple[str, ...] = ()  # "value" for numbers and booleans, of DATE_PARTS for dates
    levels: tuple[str, ...] = ()
    other: bool = False
    missing: bool = False

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, each beginning with the column's."""
        parts = [self.name if part == "value" else f"{self.name}.{part}" for part in self.parts]
        levels = [f"{self.name}={level}" for level in self.levels]
        other = [f"{self.name}=(other)"] * self.other
        return (*parts, *levels, *other, *[f"{self.name}=(missing)"] * self.missing)

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which features are numbers to be centred and scaled: values of numbers, and the parts of dates."""
        scaled = self.kind in ("number", "date")
        return tuple(scaled and i < len(self.parts) for i in range(len(self.feature_names)))

    def features(self, kind: Kind, values: np.ndarray) -> np.ndarray:
        """Return (n, d) float64 for values of a kind; NaN where a number, boolean or date is missing."""
        values = convert(values, kind, self)
        if self.kind != "category":
            parts = _parts(self.kind, values)
            lost = [np.isnan(values).astype(np.float64)] * self.missing
            return np.stack([*(parts[part] for part in self.parts), *lost], axis=1)
        width = len(self.feature_names)
        unknown = len(self.levels) if self.other else width  # of no feature: all zeros
        position: dict[str | None, int] = {level: j for j, level in enumerate(self.levels)}
        position[None] = width - 1 if self.missing else unknown
        codes = np.array([position.get(value, unknown) for value in values], dtype=np.int64)
        return np.eye(width + 1)[codes, :width]

    def unseen(self, kind: Kind, values: np.ndarray) -> list[str]:
        """Return the levels, in order, that were not there at training and that no feature stands for."""
        if self.kind != "category" or self.other:
            return []
        return sorted({*convert(values, kind, self)} - {None, *self.levels})

    def to_json(self) -> Json:
        return asdict(self) | {"parts": list(self.parts), "levels": list(self.levels)}

    @staticmethod
    def from_json(value: Json) -> "Column":
        return Column(**{**value, "parts": tuple(value["parts"]), "levels": tuple(value["levels"])})


def fit_column(
    name: str, kind: Kind, values: np.ndarray, *, max_levels: int, min_count: int, keep: bool = False
) -> tuple[Column, tuple[str, ...]]:
    """Decide a column's features; returns it (with no feature if it is left out) and what a user should know.

    A level is rare with fewer than ``min_count`` rows (or 1 % of the rows, where that is less), or beyond the
    ``max_levels`` most frequent ones. With ``keep`` a number or boolean is one feature, whatever its values.
    """
    if kind == "category":
        return _fit_category(name, values, max_levels=max_levels, min_count=min_count)
    known = values[~np.isnan(values)]
    missing = len(known) < len(values)
    identifier = ["counts the rows; leave it out if it is only an identifier"] * (kind == "number" and _counts(values))
    if keep and kind != "date":
        mean = "are all 0" if len(known) == 0 else "take the mean of the training rows"
        return Column(name, kind, parts=("value",)), (*[f"missing values {mean}"] * missing, *identifier)
    if len(known) == 0:
        return Column(name, kind), ("left out, all values missing",)
    varying = tuple(name for name, part in _parts(kind, known).items() if np.ptp(part) > 0)
    column = Column(name, kind, parts=varying, missing=missing)
    if not varying and not missing:
        return column, ("left out, constant",)
    of_missing = "missing values take the mean of the training rows, and a feature says where"
    if not varying:
        of_missing = "constant where it is known, so only a feature that says where it is missing"
    return column, (*[of_missing] * missing, *identifier)


def _fit_category(name: str, values: np.ndarray, *, max_levels: int, min_count: int) -> tuple[Column, tuple[str, ...]]:
    counts = Counter(value for value in values if value is not None)
    known = sum(counts.values())
    missing = known < len(values)
    if not counts:
        return Column(name, "category"), ("left out, all values missing",)
    meant = _meant_otherwise(counts)
    if len(counts) == known and known > 1:
        return Column(name, "category"), (f"left out, text with all {known} values distinct", *meant)
    least = min(min_count, math.ceil(len(values) / 100))
    # By count, then by name, so that the order of rows decides nothing.
    ranked = sorted(counts, key=lambda level: (-counts[level], level))[:max_levels]
    levels = tuple(sorted(level for level in ranked if counts[level] >= least))
    rare = len(counts) - len(levels)
    column = Column(name, "category", levels=levels, other=rare > 0, missing=missing)
    if len(column.feature_names) == 1:
        why = "constant" if levels else f"text with {rare} levels of which none has {least} rows"
        return Column(name, "category"), (f"left out, {why}", *meant)
    rows = known - sum(counts[level] for level in levels)
    bound = sum(number >= least for number in counts.values()) > max_levels
    more = f"; max_levels bounds the others to the {max_levels} most frequent" * bound
    shared = f"rare levels share one feature ({rare} of {len(counts)} levels, {rows} rows){more}"
    return column, (*meant, *["missing values are a level of their own"] * missing, *[shared] * (rare > 0))


def _meant_otherwise(counts: Counter[str]) -> tuple[str, ...]:
    """Say where text looks as if numbers or dates were meant: one odd cell makes a whole column text."""

    def are_most(fits: Callable[[str], object]) -> bool:
        return sum(number for level, number in counts.items() if fits(level)) >= 0.8 * sum(counts.values())

    odd = min((level for level in counts if not is_number(level)), default=None)
    if odd is not None and are_most(is_number):
        return (f"read as text because of {odd!r}, though most of its values are numbers",)
    if odd is not None and are_most(lambda level: is_number(level.replace(",", ""))):
        remedy = "write numbers without them, decimals with a point"
        return (f"read as text because of commas as in {odd!r}; {remedy}",)
    if are_most(re.compile(r"\d{1,2}[/.-]\d{1,2}[/.-](\d{4}|\d{2})").fullmatch):
        return (f"read as text; write dates like {min(counts)!r} as year-month-day",)
    return ()


def _counts(values: np.ndarray) -> bool:
    """Whether numbers count the rows: more than 20, whole ones that rise; some rows may be held out."""
    steps = np.diff(values)
    rise = len(values) > 20 and bool((steps >= 1).all() and (steps == np.floor(steps)).all())
    return rise and bool(np.ptp(values) < 2 * len(values))


def convert(values: np.ndarray, kind: Kind, column: Column) -> np.ndarray:
    """Return the values read as the column's kind, where each of them has one meaning in it.

    A file for prediction may hold only the rows with numbers of a column of codes, or no value at all, so that
    its column is read as another kind than at training. Raises InputError where a value does not fit.
    """
    if kind == column.kind:
        return values
    known = np.array([value is not None for value in values]) if kind == "category" else ~np.isnan(values)
    if not known.any():
        return np.full(len(values), None if column.kind == "category" else np.nan)
    if column.kind == "category" and kind != "date":  # "007" was the number 7, "true" a boolean
        level_of = {level: level for level in column.levels}
        for level in column.levels:
            level_kind, value = _read(np.array([level], dtype=object))
            if level_kind == kind and not np.isnan(value).any():  # a level "NA" reads as a missing number
                level_of.setdefault(value_texts(value, kind)[0], level)
        return np.array([level_of.get(text, text) for text in value_texts(values, kind)], dtype=object)
    if kind == "category":  # texts that read as something else
        kind, read = _read(values)
        if kind != "category":
            return convert(read, kind, column)
        texts = values[known]
        odd = (text for text in texts if _read(np.array([text], dtype=object))[0] == "category")
        raise _misfit(column, f"text such as {next(odd, texts[0])!r}")
    if (column.kind, kind) == ("number", "boolean"):
        return values
    if (column.kind, kind) == ("date", "number"):  # 20200131 reads as both
        with suppress(InputError):
            return read_as("date", kind, values, column.name)
    if (column.kind, kind) == ("boolean", "number") and np.isin(values[known], (0.0, 1.0)).all():
        return values
    raise _misfit(column, f"a {kind}")


def _read(texts: np.ndarray) -> tuple[Kind, np.ndarray]:
    """Return texts as ``parse_text`` does, amounts as numbers."""
    kind, values = parse_text(texts)
    if kind == "category" and (amounts := read_amounts(values)) is not None:
        return "number", amounts[0]
    return kind, values


def _misfit(column: Column, got: str) -> InputError:
    kind = column.kind.replace("category", "category (text)")
    return InputError(f"column {column.name!r} must be a {kind} as it was for training, got {got}; convert it.")


def checked_tensor(X: Tensor) -> Tensor:
    """Return a dense (n, D) tensor of floats, finite or NaN, at least of single precision; else InputError."""
    refuse_kind(X, "X")
    if X.ndim != 2 or 0 in X.shape:
        raise InputError(
            f"X must be two-dimensional with at least one row and column, got shape {tuple(X.shape)}; "
            f"{two_axes(X.ndim)}."
        )
    X = X.detach()
    if not X.is_floating_point():
        return X.double()
    if infinite := X.isinf().any(0).nonzero().flatten().tolist():
        raise InputError(f"column 'x{infinite[0]}' has an infinite value; replace it by NaN (missing) or clip it.")
    return X.float() if X.dtype.itemsize < 4 else X


def fit_tensor_columns(X: Tensor, *, keep: bool = False) -> list[tuple[Column, tuple[str, ...]]]:
    """Decide as ``fit_column`` does for numbers; three numbers a column leave the device."""
    lost = X.isnan()
    low = torch.where(lost, torch.inf, X).amin(0)
    high = torch.where(lost, -torch.inf, X).amax(0)
    summary = torch.stack([low, high, lost.any(0).to(X.dtype)], dim=1).cpu().double().numpy()
    # Stand-in values with the same answers: the smallest, the largest, and a missing one where there is any.
    columns = [np.array([low, high, np.nan] if lost else [low, high]) for low, high, lost in summary]
    return [
        fit_column(name, "number", np.where(np.isinf(values), np.nan, values), max_levels=0, min_count=0, keep=keep)
        for name, values in zip(nameless(X.shape[1]), columns)
    ]


def tensor_moments(part: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and scale of the known values, summed in float64 on the tensor's device, and how far they go: (D,).

    The scale is the standard deviation, or 1 where it is no more than a rounding error. Source: scikit-learn's
    StandardScaler.
    """
    lost = part.isnan()
    count = (~lost).sum(0).clamp(min=1)
    mean = part.nansum(0, dtype=torch.float64) / count
    gap = torch.where(lost, 0.0, part - mean.to(part.dtype))
    farthest = gap.abs().amax(0)
    unit = torch.where(farthest > torch.finfo(gap.dtype).max ** 0.45, farthest, 1.0)  # in which no square overflows
    variance = gap.div_(unit).square_().sum(0, dtype=torch.float64) / count
    eps = torch.finfo(torch.float64).eps
    constant = variance <= count * eps * variance + (count * (mean / unit) * eps) ** 2
    scale = torch.where(constant, 1.0, variance.sqrt() * unit)
    return mean.cpu().numpy(), scale.cpu().numpy(), farthest.double().cpu().numpy()
