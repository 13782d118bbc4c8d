"""Turn columns into features.

``fit_layout`` decides once from the column itself. The decision is then applied to any other rows.

number     its value
boolean    1 or 0
category   one feature per level (one-hot); rare levels share the feature ``(other)``
date       days since 1970, month, day of the month, weekday (0 = Monday), hour;
           only the parts that vary

If values are missing, numbers, booleans and dates get an additional feature ``(missing)``, and
their other features are NaN. A category gets a level of that name. Torch tensors are tables of
numbers. They are checked, summarized and decided on their own device.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from gputune.data.arrays import refuse_kind
from gputune.data.kinds import Kind, convert
from gputune.data.readings import EXAMPLE
from gputune.data.table import Table, nameless, quoted, two_axes
from gputune.errors import InputError, warn
from gputune.text import count, is_number
from gputune.types import Json, Numbers

DATE_PARTS = ("days", "month", "day", "weekday", "hour")


def _parts(kind: Kind, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features of numbers, booleans or dates, by the names in ``Column.parts``."""
    if kind != "date":
        return {"value": values}
    known = ~np.isnan(values)
    seconds = np.floor(np.where(known, values, 0.0)).astype(np.int64).astype("datetime64[s]")
    days = seconds.astype("datetime64[D]")
    months = seconds.astype("datetime64[M]")
    numbers = [
        # numpy counts months and days from 1970-01-01
        months.astype(np.int64) % 12 + 1,
        (days - months.astype(days.dtype)).astype(np.int64) + 1,
        (days.astype(np.int64) + 3) % 7,  # 1970-01-01 was a Thursday
        (seconds - days.astype(seconds.dtype)).astype(np.int64) // 3600,
    ]
    return dict(
        zip(DATE_PARTS, [values / 86400.0, *(np.where(known, part, np.nan) for part in numbers)])
    )


@dataclass(frozen=True)
class Column:
    """One input column and its features, in the order parts, levels, other, missing."""

    name: str
    kind: Kind
    parts: tuple[str, ...] = ()  # "value" for numbers and booleans; names from DATE_PARTS for dates
    levels: tuple[str, ...] = ()
    other: bool = False
    missing: bool = False

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the features. Each begins with the name of the column."""
        parts = [self.name if part == "value" else f"{self.name}.{part}" for part in self.parts]
        levels = [*self.levels, *["(other)"] * self.other, *["(missing)"] * self.missing]
        return (*parts, *(f"{self.name}={level}" for level in levels))

    @property
    def numeric(self) -> tuple[bool, ...]:
        """One flag per feature: True if the feature is a number to be centered and scaled.

        These are the values of numbers and the parts of dates.
        """
        scaled = self.kind in ("number", "date")
        return tuple(scaled and i < len(self.parts) for i in range(len(self.feature_names)))

    def read(self, kind: Kind, values: np.ndarray) -> np.ndarray:
        """Return values of another kind converted to the kind of this column.

        Raises:
            InputError: a value does not fit the kind of the column.
        """
        return convert(values, kind, self.kind, self.name, self.levels)

    def features(self, kind: Kind, values: np.ndarray) -> np.ndarray:
        """Return the features (n, d) of values of a kind, float64.

        A feature is NaN if its number, boolean or date is missing.
        """
        values = self.read(kind, values)
        if self.kind != "category":
            parts = _parts(self.kind, values)
            lost = [np.isnan(values).astype(np.float64)] * self.missing
            return np.stack([*(parts[part] for part in self.parts), *lost], axis=1)
        width = len(self.feature_names)
        unknown = len(self.levels) if self.other else width  # column cut off below: zeros
        position: dict[str | None, int] = {level: j for j, level in enumerate(self.levels)}
        position[None] = width - 1 if self.missing else unknown
        codes = np.array([position.get(value, unknown) for value in values], dtype=np.int64)
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
    """Decide the features of a column.

    Returns the column and the remarks for the user. A column that is left out has no feature.

    A level is rare if it has fewer than ``min_count`` rows (or fewer than 1% of the rows, if that
    is less). It is also rare if it is not among the ``max_levels`` most frequent levels. With
    ``keep``, a number or boolean is always one feature, whatever its values are.
    """
    if kind == "category":
        return _fit_category(name, values, max_levels=max_levels, min_count=min_count)
    known = values[~np.isnan(values)]
    missing = len(known) < len(values)
    identifier = ["counts the rows; leave it out if it is only an identifier"] * (
        kind == "number" and _counts(values)
    )
    if keep and kind != "date":
        mean = "are all 0" if len(known) == 0 else "take the mean of the training rows"
        return Column(name, kind, parts=("value",)), (
            *[f"missing values {mean}"] * missing,
            *identifier,
        )
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


def _fit_category(
    name: str, values: np.ndarray, *, max_levels: int, min_count: int
) -> tuple[Column, tuple[str, ...]]:
    counts = Counter(value for value in values if value is not None)
    if not counts:
        return Column(name, "category"), ("left out, all values missing",)
    known = sum(counts.values())
    meant = _meant_otherwise(counts)
    missing = known < len(values)
    # Every value is distinct: an identifier or free text.
    if len(counts) == known and known > 1:
        return Column(name, "category"), (
            f"left out, text with all {known} values distinct",
            *meant,
        )
    least = min(min_count, math.ceil(len(values) / 100))
    # By count, then by name: the order of the rows has no influence.
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
    return column, (
        *meant,
        *["missing values are a level of their own"] * missing,
        *[shared] * (rare > 0),
    )


def _meant_otherwise(counts: Counter[str]) -> tuple[str, ...]:
    """Return remarks on text that looks like numbers or dates.

    One odd cell turns a whole column into text.
    """

    def are_most(fits: Callable[[str], object]) -> bool:
        return sum(number for level, number in counts.items() if fits(level)) >= 0.8 * sum(
            counts.values()
        )

    odd = min((level for level in counts if not is_number(level)), default=None)
    if odd is not None and are_most(is_number):
        return (f"read as text because of {odd!r:.100}, though most of its values are numbers",)
    if odd is not None and are_most(lambda level: is_number(level.replace(",", ""))):
        remedy = "write numbers without them, decimals with a point"
        return (f"read as text because of commas as in {odd!r:.100}; {remedy}",)
    if are_most(re.compile(r"\d{1,2}[/.-]\d{1,2}[/.-](\d{4}|\d{2})").fullmatch):
        return (f"read as text; write dates like {min(counts)!r} as year-month-day",)
    return ()


def _counts(values: np.ndarray) -> bool:
    """Return True if numbers look like a row counter.

    A counter has more than 20 values that rise in whole steps. Gaps are allowed, because some rows
    may be held out.
    """
    if len(values) <= 20 or not np.isfinite(values).all():
        return False
    steps = np.diff(values)
    return bool(
        (steps >= 1).all() and (steps == np.floor(steps)).all() and np.ptp(values) < 2 * len(values)
    )


def checked_tensor(X: Tensor) -> Tensor:
    """Return a dense (n, D) tensor of floats that are finite or NaN, with at least single
    precision.

    Raises:
        InputError: the tensor has another shape or kind, or an infinite value.
    """
    refuse_kind(X, "X")
    if X.ndim != 2 or 0 in X.shape:
        got = f"got shape {tuple(X.shape)}; {two_axes(X.ndim)}"
        raise InputError(f"X must be two-dimensional with at least one row and column, {got}.")
    X = X.detach()
    if not X.is_floating_point():
        return X.double()
    if infinite := X.isinf().any(0).nonzero().flatten().tolist():
        raise InputError(
            f"column 'x{infinite[0]}' has an infinite value; replace it by NaN (missing) or clip "
            "it."
        )
    return X.float() if X.dtype.itemsize < 4 else X


def _summary(X: Tensor) -> Table:
    """Return a table of three rows from which the columns of a tensor are decided.

    Each column holds its minimum, its maximum and, if the tensor has a missing value there, NaN.
    """
    lost = X.isnan()
    low = torch.where(lost, torch.inf, X).amin(0)
    high = torch.where(lost, -torch.inf, X).amax(0)
    # (3, D): only three numbers per column leave the device.
    ends = torch.stack([low, high, torch.where(lost.any(0), torch.nan, low)]).cpu().double().numpy()
    kind: Kind = "number"
    return Table(
        nameless(X.shape[1]), (kind,) * X.shape[1], tuple(np.where(np.isinf(ends), np.nan, ends).T)
    )


Columns = Literal["keep", "drop-constant"]
Raw: TypeAlias = np.ndarray | Tensor
"""Features before any statistics are applied, (n, D)."""
N_BINS = 16
"""The largest number of bins of a number. If it has fewer bins, the remaining features are 0."""


@dataclass(frozen=True)
class Layout:
    """The columns in use, the names of all columns seen, and the notes for the user.

    Each note is one sentence.
    """

    columns: tuple[Column, ...]
    inputs: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(name for column in self.columns for name in column.feature_names)

    @cached_property
    def numeric(self) -> np.ndarray:
        """(D,) bool: True for features that are centered and scaled.

        Indicators, booleans and levels are False.
        """
        return np.array([flag for column in self.columns for flag in column.numeric], dtype=bool)

    @cached_property
    def feature_groups(self) -> tuple[int, ...]:
        """(D,) group number of each feature.

        It is 0 for a number. Each category or flag has its own number, counted from 1, which all
        levels of the category share.
        """
        groups: list[int] = []
        for column in self.columns:
            for j, numeric in enumerate(column.numeric):
                is_new = j == 0 or column.kind != "category"
                groups.append(0 if numeric else max(groups, default=0) + is_new)
        return tuple(groups)

    def groups(self, places: np.ndarray) -> tuple[int, ...]:
        """Return the feature group of each network input.

        ``places`` (D',) holds the feature of each input. If it is empty, each feature is one input.
        """
        return (
            tuple(self.feature_groups[j] for j in places.tolist())
            if places.size
            else self.feature_groups
        )

    def places(self, numbers: Numbers) -> np.ndarray:
        """Return the feature of each network input, (D',).

        A feature that is cut into bins appears several times.
        """
        is_cut = self.numeric & numbers.startswith("piecewise")
        return np.repeat(np.arange(len(is_cut)), np.where(is_cut, N_BINS, 1))

    def widths(self, numbers: Numbers) -> list[int]:
        """Return the number of network inputs that each column becomes."""
        ends = np.cumsum([len(column.feature_names) for column in self.columns])
        widths: list[int] = np.diff(np.searchsorted(self.places(numbers), ends), prepend=0).tolist()
        return widths

    def in_words(self) -> str:
        """Return the contents of a row as text, for example "3 columns"."""
        return count(len(self.columns), "column")

    @overload
    def raw(self, X: Table) -> np.ndarray: ...
    @overload
    def raw(self, X: Tensor) -> Tensor: ...
    def raw(self, X: Table | Tensor) -> Raw:
        """Return the features before any statistics are applied, (n, D), NaN if a number is
        missing.

        The result of a table is float64. The result of a tensor stays on its device and keeps its
        float dtype (at least float32; float64 for integers). Columns are found by name. Extra
        columns are ignored with one UserWarning. An unknown level counts as ``(other)`` if that
        feature exists, otherwise its features are all 0.

        Raises:
            InputError: a column is missing, or has a kind that cannot be converted.
        """
        if isinstance(X, Tensor):
            return self._raw_tensor(checked_tensor(X))
        self._check(X.names)
        parts = [
            column.features(X.kind(column.name), X.column(column.name)) for column in self.columns
        ]
        return np.concatenate(parts, axis=1)

    def unseen(self, X: Table) -> dict[str, list[str]]:
        """Return the new levels of each column: levels that training did not see and that no
        feature represents."""
        names = set(X.names)
        levels = dict[str, list[str]]()
        for column in self.columns:
            if column.kind == "category" and not column.other and column.name in names:
                values = column.read(X.kind(column.name), X.column(column.name))
                levels[column.name] = sorted({*values} - {None, *column.levels})
        return {name: unseen for name, unseen in levels.items() if unseen}

    def _check(self, names: tuple[str, ...]) -> None:
        """Raise InputError if a column is missing; warn about columns that are not read."""
        present = set(names)
        if missing := [column.name for column in self.columns if column.name not in present]:
            known = f"the columns seen in training are {quoted(self.inputs)}, got {quoted(names)}"
            raise InputError(f"X has no column {quoted(missing)}; {known}.")
        if extra := sorted(present - set(self.inputs)):
            # Without names it is unclear which of the columns are meant.
            if names == nameless(len(names)) and {*self.inputs} < {*names}:
                raise InputError(
                    f"X must have {len(self.inputs)} columns as in training, or names, got "
                    f"{len(names)}."
                )
            warn(f"X has columns that the model does not read: {quoted(extra)}.")

    def _raw_tensor(self, X: Tensor) -> Tensor:
        names = nameless(X.shape[1])
        self._check(names)
        if unfit := [
            column.name for column in self.columns if column.kind not in ("number", "boolean")
        ]:
            raise InputError(
                f"a tensor holds numbers only, but {quoted(unfit)} are text or dates; pass a data "
                "frame."
            )
        position = {name: j for j, name in enumerate(names)}
        source = [position[column.name] for column in self.columns for _ in column.feature_names]
        indicator = [
            flag for c in self.columns for flag in (*[False] * len(c.parts), *[True] * c.missing)
        ]
        picked = (
            X if source == list(range(X.shape[1])) else X[:, torch.tensor(source, device=X.device)]
        )
        if not any(indicator):
            return picked
        return torch.where(
            torch.tensor(indicator, device=X.device), picked.isnan().to(X.dtype), picked
        )

    def to_json(self) -> Json:
        columns = [column.to_json() for column in self.columns]
        return {"columns": columns, "inputs": list(self.inputs), "notes": list(self.notes)}

    @staticmethod
    def from_json(value: Json) -> "Layout":
        columns = tuple(Column.from_json(column) for column in value["columns"])
        return Layout(columns, tuple(value["inputs"]), tuple(value["notes"]))


def fit_layout(
    X: Table | Tensor,
    *,
    columns: Columns = "drop-constant",
    max_levels: int = 32,
    min_count: int = 10,
) -> Layout:
    """Decide from X, and never from y, how its columns become features.

    Constant columns are left out, and so is text with all values distinct. ``notes`` of the layout
    say so.

    Args:
        X: a table, or a tensor (n, D).
        columns: "keep" makes each number and boolean one feature, whatever its values are.
            "drop-constant" adds a feature that marks missing values.
        max_levels: the largest number of levels of a category, see ``fit_column``.
        min_count: the number of rows below which a level is rare, see ``fit_column``.
    """
    if isinstance(X, Tensor):
        X = _summary(checked_tensor(X))
    fit = partial(fit_column, max_levels=max_levels, min_count=min_count, keep=columns == "keep")
    fitted = [fit(*column) for column in zip(X.names, X.kinds, X.columns)]
    reasons = [
        *X.amounts.items(),
        *X.readings.items(),
        *((column.name, reason) for column, of_column in fitted for reason in of_column),
    ]
    columns_of: dict[str, list[str]] = {}
    for name, reason in reasons:
        columns_of.setdefault(reason, []).append(name)
    notes = tuple(
        f"Column{'s' * (len(of) > 1)} {quoted(of)}: {reason.replace(EXAMPLE, repr(of[0]))}."
        for reason, of in columns_of.items()
    )
    used = tuple(column for column, _ in fitted if column.feature_names)
    if not used:
        raise InputError(f"X has no usable column. {' '.join(notes)}")
    return Layout(used, X.names, notes)
