"""Turn the columns of a table into numeric features for a network.

``fit_layout`` decides once, from the values of each column (column.py). Later rows are converted by
the same decision. In shapes, n counts rows, D features, and D' network inputs. A torch tensor is a
table of numbers. It is checked and summarized on its own device.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from gputune.data.arrays import Arrays, refuse_kind
from gputune.data.column import Column, fit_category, fit_column, with_levels
from gputune.data.kinds import Kind, text_of
from gputune.data.readings import EXAMPLE, LOST_ZEROS
from gputune.data.table import Table, nameless, quoted, two_axes
from gputune.ground.errors import InputError, Verbatim, option, warn
from gputune.ground.text import count, did_you_mean
from gputune.ground.types import Json, Numbers


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
