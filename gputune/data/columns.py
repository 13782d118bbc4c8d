"""Turn the columns of a table into numeric features for a network.

``fit_layout`` decides once, from the values of each column. Later rows are converted by
the same decision. In shapes, n counts rows, D features, and D' network inputs. A torch tensor is a
table of numbers. It is checked and summarized on its own device.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from gputune.data.arrays import Arrays, refuse_kind
from gputune.data.kinds import EXAMPLE, LOST_ZEROS, Kind, convert, misread_remarks, text_of
from gputune.data.table import Table, nameless, quoted, two_axes
from gputune.ground.errors import InputError, Verbatim, option, warn
from gputune.ground.text import count, did_you_mean
from gputune.ground.types import Json, Numbers

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


def checked_tensor(X: Tensor) -> Tensor:
    """Return a dense (n, D) tensor of floats that are finite or NaN, with at least single
    precision.

    Raises:
        InputError: the tensor has another shape or kind, or an infinite value.
    """
    refuse_kind(X, "X")
    if X.ndim != 2 or 0 in X.shape:
        raise InputError(
            "X",
            "must be two-dimensional with at least one row and column",
            got=Verbatim(f"shape {tuple(X.shape)}"),
            remedy=two_axes(X.ndim),
        )
    X = X.detach()
    if not X.is_floating_point():
        return X.double()
    infinite = X.isinf().any(0).nonzero().flatten().tolist()
    if infinite:
        raise InputError(
            None,
            f"Column 'x{infinite[0]}' has an infinite value",
            remedy="Replace the value by NaN (missing), or clip it.",
        )
    return X.float() if X.dtype.itemsize < 4 else X


def _summary(X: Tensor) -> Table:
    """Summarize a tensor as a table of three rows, which is enough to decide its features.

    Each column holds its minimum and its maximum, and NaN if the column has a missing value.
    """
    missing = X.isnan()
    low = torch.where(missing, torch.inf, X).amin(0)
    high = torch.where(missing, -torch.inf, X).amax(0)
    nan_if_missing = torch.where(missing.any(0), torch.nan, low)
    # (3, D): only three numbers per column leave the device.
    rows = torch.stack([low, high, nan_if_missing]).cpu().double().numpy()
    rows[np.isinf(rows)] = np.nan  # columns without a known value
    kind: Kind = "number"
    return Table(nameless(X.shape[1]), (kind,) * X.shape[1], tuple(rows.T))


Columns = Literal["keep", "drop-constant"]
Raw: TypeAlias = np.ndarray | Tensor
"""The features (n, D) of a table or a tensor, before scaling."""
AnyRows: TypeAlias = Table | Tensor | Arrays
N_BINS = 16
"""The largest number of bins of a numeric column. With fewer bins, the remaining features are 0."""


@dataclass(frozen=True)
class Layout:
    """The columns of X that become features, the names of all columns of X, and notes for the user.

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
        """Flags (D,) of all features: True if the feature is centered and scaled.

        The flag is False for booleans, for levels of categories, and for features that mark missing
        values.
        """
        return np.array([flag for column in self.columns for flag in column.numeric], dtype=bool)

    @cached_property
    def feature_groups(self) -> tuple[int, ...]:
        """The group of each feature, (D,), so that all levels of a category belong together.

        Numeric features have the group 0. Each category and each flag has its own group, counted
        from 1. The levels of a number that is also a category are one group.
        """
        groups: list[int] = []
        last = 0
        for column in self.columns:
            has_group = False
            for numeric in column.numeric:
                if not numeric and not (has_group and column.is_category):
                    last += 1
                    has_group = True
                groups.append(0 if numeric else last)
        return tuple(groups)

    def groups(self, places: np.ndarray) -> tuple[int, ...]:
        """Return the group of each network input, as in ``feature_groups``.

        ``places`` (D',) holds the index of each input's feature. If ``places`` is empty, each
        feature is one input.
        """
        if not places.size:
            return self.feature_groups
        return tuple(self.feature_groups[j] for j in places.tolist())

    def places(self, numbers: Numbers) -> np.ndarray:
        """Return for each network input the index of its feature, (D',).

        A feature that is cut into bins becomes several inputs, so its index appears several times.
        """
        is_cut = self.numeric & numbers.startswith("piecewise")
        return np.repeat(np.arange(len(is_cut)), np.where(is_cut, N_BINS, 1))

    def widths(self, numbers: Numbers) -> list[int]:
        """Return for each column the number of network inputs made from the column."""
        # After each column: the number of features, then the number of network inputs.
        n_features = np.cumsum([len(column.feature_names) for column in self.columns])
        n_inputs = np.searchsorted(self.places(numbers), n_features)
        widths: list[int] = np.diff(n_inputs, prepend=0).tolist()
        return widths

    def in_words(self) -> str:
        """Return a description of a row for messages, for example "3 columns"."""
        return count(len(self.columns), "column")

    @overload
    def raw(self, X: Table) -> np.ndarray: ...
    @overload
    def raw(self, X: Tensor) -> Tensor: ...
    def raw(self, X: Table | Tensor) -> Raw:
        """Return the features (n, D) of a table or tensor before scaling, with NaN for missing
        numbers.

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
        """Return the levels in X that training did not see and that no feature represents, by
        column name."""
        names = set(X.names)
        unseen = dict[str, list[str]]()
        for column in self.columns:
            if column.kind == "category" and not column.other and column.name in names:
                values = column.read(X.kind(column.name), X.column(column.name))
                levels = sorted({*values} - {None, *column.levels})
                if levels:
                    unseen[column.name] = levels
        return unseen

    def _check(self, names: tuple[str, ...]) -> None:
        """Raise InputError if X lacks a column, and warn about columns that the model does not
        read."""
        present = set(names)
        missing = [column.name for column in self.columns if column.name not in present]
        if missing:
            if names == nameless(len(names)) and self.inputs == nameless(len(self.inputs)):
                rule = f"must have {len(self.inputs)} columns as in training"
                raise InputError("X", rule, got=Verbatim(count(len(names), "column")))
            columns = "column" if len(missing) == 1 else "columns"
            read = [column.name for column in self.columns]
            raise InputError(
                "X",
                f"has no {columns} {quoted(missing)}",
                got=Verbatim(quoted(names)),
                remedy=f"The model reads the columns {quoted(read)}.",
            )
        extra = present - set(self.inputs)
        if extra:
            # Without names it is unclear which of the columns are meant.
            if names == nameless(len(names)) and present > set(self.inputs):
                raise InputError(
                    "X",
                    f"must have {len(self.inputs)} columns as in training, or column names",
                    got=Verbatim(f"{len(names)} columns"),
                )
            columns = quoted(sorted(extra))
            warn(f"{option('X')} has columns that the model does not read: {columns}.")

    def _raw_tensor(self, X: Tensor) -> Tensor:
        names = nameless(X.shape[1])
        self._check(names)
        unfit = [column.name for column in self.columns if not column.is_plain]
        if unfit:
            raise InputError(
                "X",
                f"is a tensor of numbers, but the columns {quoted(unfit)} are categories or dates",
                remedy="Pass a DataFrame.",
            )
        positions = dict(zip(names, range(len(names))))
        sources: list[int] = []  # of each feature, its column in X
        is_indicator: list[bool] = []
        for column in self.columns:
            sources += [positions[column.name]] * len(column.feature_names)
            is_indicator += [False] * len(column.parts) + [True] * column.missing
        features = X
        if sources != list(range(X.shape[1])):
            features = X[:, torch.tensor(sources, device=X.device)]
        if not any(is_indicator):
            return features
        indicators = torch.tensor(is_indicator, device=X.device)
        return torch.where(indicators, features.isnan().to(X.dtype), features)

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
    copies: Sequence[str] = (),
) -> Layout:
    """Decide from X, and never from y, how the columns of X become features.

    The layout leaves out constant columns, and text columns with only distinct values. Its
    ``notes`` report such columns.

    Args:
        X: a table, or a tensor (n, D).
        columns: "keep" makes each number and boolean one feature, whatever its values are.
            "drop-constant" adds a feature that marks missing values.
        max_levels: the largest number of levels of a category, see ``fit_column``.
        min_count: the number of rows below which a level is rare, see ``fit_column``.
        copies: columns of numbers that become categories too.

    Raises:
        InputError: a column in ``copies`` does not exist or has no numbers.
    """
    check_copies(X, copies)
    if isinstance(X, Tensor):
        X = _summary(checked_tensor(X))
    fit = partial(fit_column, max_levels=max_levels, min_count=min_count, keep=columns == "keep")
    used = []
    readings = dict(X.readings)
    for name, remark in X.readings.items():
        if remark == LOST_ZEROS:
            readings[name] += _advice_on_zeros(X, name, max_levels, min_count)
    remarks = [*X.amounts.items(), *readings.items()]
    for name, kind, values in zip(X.names, X.kinds, X.columns):
        column, column_remarks = fit(name, kind, values)
        remarks += [(name, remark) for remark in column_remarks]
        if name in copies:
            column, column_remarks = with_levels(column, values, max_levels, min_count)
            remarks += [(name, remark) for remark in column_remarks]
        if column.feature_names:
            used.append(column)
    names_by_remark: dict[str, list[str]] = {}
    for name, remark in remarks:
        names_by_remark.setdefault(remark, []).append(name)
    notes = tuple(_note(remark, names) for remark, names in names_by_remark.items())
    if not used:
        raise InputError("X", "has no usable column", remedy=" ".join(notes))
    return Layout(tuple(used), X.names, notes)


def check_copies(X: AnyRows, copies: Sequence[str]) -> None:
    """Raise InputError unless all ``copies`` are names of columns with numbers."""
    if not copies:
        return
    if not isinstance(X, Table):
        raise InputError(
            "category_copies",
            "is only for tables, because their columns have names",
            got=list(copies),
            remedy=f"Leave out {option('category_copies')}.",
        )
    for name in copies:
        if name not in X.names:
            raise InputError(
                "category_copies",
                "must name columns from which the model predicts",
                got=name,
                remedy=f"The columns are {quoted(X.names)}.{did_you_mean(name, X.names)}",
            )
        kind = X.kind(name)
        if kind != "number":
            noun = "text" if kind == "category" else f"{kind}s"
            remedy = (
                "A column of text is a category already." if noun == "text" else "Leave it out."
            )
            raise InputError(
                "category_copies",
                "must name columns of numbers",
                got=Verbatim(f"{name!r}, a column of {noun}"),
                remedy=remedy,
            )


def _advice_on_zeros(X: Table, name: str, max_levels: int, min_count: int) -> str:
    """Return a sentence that says how a column of codes keeps its leading zeros.

    The sentence is "" if the column as a category would be left out.
    """
    advice = f". To keep them, set {option('kinds', {EXAMPLE: 'category'})}"
    if name not in X.names:  # the target or the groups
        return advice
    values = X.column(name)
    codes, numbers = np.unique(values[~np.isnan(values)], return_counts=True)
    counts = Counter(dict(zip(map(text_of, codes.tolist()), numbers.tolist())))
    category, _ = fit_category(name, counts, len(values), max_levels, min_count)
    return advice if category.feature_names else ""


def _note(remark: str, names: Sequence[str]) -> str:
    noun = "Column" if len(names) == 1 else "Columns"
    return f"{noun} {quoted(names)}: {remark.replace(repr(EXAMPLE), repr(names[0]))}."
