"""The column layout, fixed once; the statistics of each fold; and one pure transform, used to predict too.

    layout = fit_layout(X)                           from X alone: which columns go in, which features come out
    raw = layout.raw(X)                              (n, D), NaN where a number is missing
    statistics = fit_statistics(raw, layout, rows)   means, scales, quantiles of the training rows
    x = transform(raw, statistics)                   (n, D), no NaN

Tables become NumPy arrays. A torch tensor (numbers only) stays where it lies, with the same numbers.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from gputune.data.columns import Column, checked_tensor, fit_column, fit_tensor_columns, tensor_moments
from gputune.data.quantiles import N_BINS, OPEN, bins_of, fit_quantiles, median_and_spread, normal_scores, smooth_clip
from gputune.data.table import Table, nameless, quoted
from gputune.errors import InputError, warn
from gputune.text import count
from gputune.types import NUMBERS, TENSOR_NUMBERS, Json, Numbers

Columns = Literal["keep", "drop-constant"]
LIMIT = 20.0
"""Standard deviations from the mean within which a number stays, or as far as the farthest training row if farther."""
_ROUNDING = 1e-6
"""How much farther than it that may be, so that no training row is clipped by rounding in single precision."""

Raw: TypeAlias = np.ndarray | Tensor
"""Features before any statistics, (n, D)."""
Array = TypeVar("Array", np.ndarray, Tensor, Raw)


@dataclass(frozen=True)
class Layout:
    """Which columns go in and which features come out.

    ``columns`` are the used ones, ``inputs`` the names of all columns seen, ``notes`` one sentence for each
    thing a user should know.
    """

    columns: tuple[Column, ...]
    inputs: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(name for column in self.columns for name in column.feature_names)

    @cached_property
    def numeric(self) -> np.ndarray:
        """(D,) bool: features that are centred and scaled; indicators, booleans and levels are not."""
        return np.array([flag for column in self.columns for flag in column.numeric], dtype=bool)

    @cached_property
    def feature_groups(self) -> tuple[int, ...]:
        """Of each feature 0 where it is a number, else, from 1, of which category or flag it is a level: (D,)."""
        groups: list[int] = []
        for column in self.columns:
            for j, numeric in enumerate(column.numeric):
                first = j == 0 or column.kind != "category"
                groups.append(0 if numeric else max(groups, default=0) + first)
        return tuple(groups)

    def groups(self, places: np.ndarray) -> tuple[int, ...]:
        """Return ``feature_groups`` of the inputs that are made of the features at ``places``, (0,): of each one."""
        return tuple(self.feature_groups[j] for j in places.tolist()) if places.size else self.feature_groups

    def places(self, numbers: Numbers) -> np.ndarray:
        """Return of which feature each input of a network is made, (D',): several of one that is cut into bins."""
        many = self.numeric if numbers.startswith("piecewise") else np.zeros(len(self.numeric), dtype=bool)
        return np.repeat(np.arange(len(many)), np.where(many, N_BINS, 1))

    def widths(self, numbers: Numbers) -> list[int]:
        """Return how many inputs of a network each column is made into."""
        ends = np.cumsum([len(column.feature_names) for column in self.columns])
        widths: list[int] = np.diff(np.searchsorted(self.places(numbers), ends), prepend=0).tolist()
        return widths

    def in_words(self) -> str:
        """Say what a row is made of."""
        return count(len(self.columns), "column")

    @overload
    def raw(self, X: Table) -> np.ndarray: ...
    @overload
    def raw(self, X: Tensor) -> Tensor: ...
    def raw(self, X: Table | Tensor) -> Raw:
        """Return the features before any statistics, (n, D), NaN where a number is missing.

        float64 for a table; on its device for a tensor, in its float dtype (at least float32; float64 for
        integers). Columns are found by name; extra ones are ignored with one UserWarning. An unknown level
        counts as ``(other)`` where there is such a feature and is all zeros elsewhere. Raises InputError for
        missing columns, for values of another kind, and for infinite values.
        """
        if isinstance(X, Tensor):
            X = checked_tensor(X)
            return self._raw_tensor(X, self._positions(nameless(X.shape[1])))
        position = self._positions(X.names)
        chosen = [position[column.name] for column in self.columns]
        parts = [column.features(X.kinds[j], X.columns[j]) for column, j in zip(self.columns, chosen)]
        return np.concatenate(parts, axis=1)

    def unseen(self, X: Table) -> dict[str, list[str]]:
        """Return the levels of each column that were not there at training and that no feature stands for."""
        seen = {name: (kind, values) for name, kind, values in zip(X.names, X.kinds, X.columns)}
        levels = {c.name: c.unseen(*seen[c.name]) for c in self.columns if c.name in seen}
        return {name: unseen for name, unseen in levels.items() if unseen}

    def _positions(self, names: tuple[str, ...]) -> dict[str, int]:
        """Return where each column stands among ``names``."""
        present = set(names)
        if missing := [column.name for column in self.columns if column.name not in present]:
            raise InputError(
                f"X has no column {quoted(missing)}; the columns seen in training are {quoted(self.inputs)}, "
                f"got {quoted(names)}."
            )
        if extra := sorted(present - set(self.inputs)):
            if names == nameless(len(names)) and {*self.inputs} < {*names}:  # nobody has said which of them are meant
                raise InputError(f"X must have {len(self.inputs)} columns as in training, or names, got {len(names)}.")
            warn(f"X has columns that the model does not read: {quoted(extra)}.")
        return {name: j for j, name in enumerate(names)}

    def _raw_tensor(self, X: Tensor, position: dict[str, int]) -> Tensor:
        if unfit := [column.name for column in self.columns if column.kind not in ("number", "boolean")]:
            raise InputError(f"a tensor holds numbers only, but {quoted(unfit)} are text or dates; pass a data frame.")
        source = [position[column.name] for column in self.columns for _ in column.feature_names]
        indicator = [flag for c in self.columns for flag in (*[False] * len(c.parts), *[True] * c.missing)]
        if source == list(range(X.shape[1])) and not any(indicator):
            return X
        picked = X[:, torch.tensor(source, device=X.device)]
        if not any(indicator):
            return picked
        return torch.where(torch.tensor(indicator, device=X.device), picked.isnan().to(X.dtype), picked)

    def to_json(self) -> Json:
        columns = [column.to_json() for column in self.columns]
        return {"columns": columns, "inputs": list(self.inputs), "notes": list(self.notes)}

    @staticmethod
    def from_json(value: Json) -> "Layout":
        columns = tuple(Column.from_json(column) for column in value["columns"])
        return Layout(columns, tuple(value["inputs"]), tuple(value["notes"]))


def fit_layout(
    X: Table | Tensor, *, columns: Columns = "drop-constant", max_levels: int = 32, min_count: int = 10
) -> Layout:
    """Decide from X alone (never y) how its columns become features.

    "keep" makes each number and boolean one feature, whatever its values; "drop-constant" leaves out those that are
    constant, and adds a feature that says where values are missing.
    A category keeps at most ``max_levels`` levels of its own, each with at least ``min_count`` rows (or 1 % of
    the rows, where that is less); the others share a feature. Constant text, and text with all values
    distinct, are left out, which ``notes`` say. Raises InputError where no column is left.
    """
    keep, reasons = columns == "keep", list[tuple[str, str]]()
    if isinstance(X, Tensor):
        X = checked_tensor(X)
        names, fitted = nameless(X.shape[1]), fit_tensor_columns(X, keep=keep)
    else:
        names, reasons = X.names, list(X.amounts.items())
        fitted = [
            fit_column(name, kind, values, max_levels=max_levels, min_count=min_count, keep=keep)
            for name, kind, values in zip(X.names, X.kinds, X.columns)
        ]
    reasons += [(column.name, reason) for column, of_column in fitted for reason in of_column]
    columns_of: dict[str, list[str]] = {}
    for name, reason in reasons:
        columns_of.setdefault(reason, []).append(name)
    notes = tuple(f"Column{'s' * (len(of) > 1)} {quoted(of)}: {reason}." for reason, of in columns_of.items())
    used = tuple(column for column, _ in fitted if column.feature_names)
    if not used:
        raise InputError(f"X has no usable column. {' '.join(notes)}")
    return Layout(used, names, notes)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is fitted on the training rows of one fold; float64 arrays.

    ``fill``, ``center``, ``scale`` are (D,): a missing value becomes ``fill``, then (x - center) / scale.
    ``ranked`` (R,) are the positions of the inputs with a quantile transform instead, ``quantiles`` (Q, R)
    their quantiles at equally spaced probabilities from 0 to 1. ``clipped`` are those of the inputs that are clipped
    smoothly once they are scaled. Where a feature is several inputs, ``places`` (D',) says of which feature each is
    made, else it is (0,) and D' is D; ``center`` and ``scale`` are (D',). Inputs lie within ``least`` and ``most``
    (D',), where there are such ends; else these are (0,).
    """

    fill: np.ndarray
    center: np.ndarray
    scale: np.ndarray
    ranked: np.ndarray
    quantiles: np.ndarray
    clipped: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    places: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    least: np.ndarray = field(default_factory=lambda: np.empty(0))
    most: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def n_inputs(self) -> int:
        """Numbers that a row becomes, with which a module is built."""
        return len(self.center)

    def to_json(self) -> Json:
        of_bins = ("places", "least", "most")
        return {name: value.tolist() for name, value in vars(self).items() if name not in of_bins or value.size}

    @staticmethod
    def from_json(value: Json) -> "Statistics":
        arrays = {key: np.array(part, dtype=np.float64) for key, part in value.items()}
        for positions in {"ranked", "clipped", "places"} & value.keys():  # not all models have all
            arrays[positions] = np.array(value[positions], dtype=np.int64)
        arrays["quantiles"] = arrays["quantiles"].reshape(len(value["quantiles"]), len(value["ranked"]))
        return Statistics(**arrays)


@np.errstate(over="ignore", invalid="ignore")  # numbers near the largest: what overflows is clipped
def fit_statistics(
    raw: Raw, layout: Layout, rows: np.ndarray, *, numbers: Numbers = "standard", target: np.ndarray | None = None
) -> Statistics:
    """Fit on the given rows only: the mean (for missing values), and what ``numbers`` asks for.

    "standard": mean 0 and variance 1 over the known values (scale 1 where they are all equal); other rows are
    clipped at ``LIMIT``, or at the farthest of these if farther, since a network's outputs run away. "robust": by
    median and quartiles, then clipped smoothly to +-3. "quantile": normal scores, by at most 1000 quantiles of the
    known values; of both, a column that is constant in these rows is only centred. "piecewise": features of bins
    between quantiles; "piecewise-tree": of those that a decision tree makes for the ``target`` (n, ...), of which the
    given rows alone are read; of both, of numbers within the same limit. "none": numbers stay as they are. A column
    without a known value in the rows is filled with 0.

    Source: scikit-learn's StandardScaler and QuantileTransformer (with ``subsample=None``); ``quantiles.py``.
    """
    check_numbers(numbers, raw)
    if isinstance(raw, Tensor):
        part = np.empty((0, 0))  # what needs it is for tables
        mean, scale, farthest = tensor_moments(raw[torch.as_tensor(rows, device=raw.device)])
    else:
        part = raw[rows]
        part[:, np.isnan(part).all(0)] = 0.0  # a column with no known value in these rows has mean 0 and scale 1
        mean, scale, farthest = _moments(part)
    numeric = layout.numeric
    reach = np.where(numeric, np.minimum(np.maximum(LIMIT * scale, farthest * (1 + _ROUNDING)), OPEN[3]), np.inf)
    numeric = numeric & (numbers != "none")
    center, scale = np.where(numeric, mean, 0.0), np.where(numeric, scale, 1.0)
    fitted = Statistics(mean, center, scale, ranked=np.empty(0, dtype=np.int64), quantiles=np.empty((0, 0)))
    match numbers:
        case "standard":
            least, most = np.where(numeric, [[-1], [1]] * reach / scale, OPEN[2:])
            return replace(fitted, least=least, most=most)
        case "quantile":
            varies = numeric & (np.nanmax(part, 0) > np.nanmin(part, 0))
            center, scale, ranked = np.where(varies, 0.0, center), np.where(varies, 1.0, scale), np.flatnonzero(varies)
            return replace(fitted, center=center, scale=scale, ranked=ranked, quantiles=fit_quantiles(part[:, ranked]))
        case "robust":
            median, spread = median_and_spread(part)
            center, scale = np.where(numeric, median, 0.0), np.where(numeric, spread, 1.0)
            return replace(fitted, center=center, scale=scale, clipped=np.flatnonzero(numeric))
        case "piecewise" | "piecewise-tree":
            of_rows = target[rows] if numbers == "piecewise-tree" and target is not None else None
            bins = [bins_of(part[:, j], of_rows) if is_number else OPEN for j, is_number in enumerate(numeric)]
            center, scale, least, most = np.concatenate(bins, axis=1)
            places = layout.places(numbers)
            low, high = (mean[places] - center + [[-1], [1]] * reach[places]) / scale
            least, most = np.maximum(least, low), np.minimum(most, high)
            return replace(fitted, center=center, scale=scale, places=places, least=least, most=most)
    return fitted


def _moments(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, scale and how far the known values (n, D) go from the mean, (D,); as ``StandardScaler``."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(part)
    mean, scale, farthest = scaler.mean_, scaler.scale_, np.nanmax(np.abs(part - scaler.mean_), 0)
    if np.isfinite(scaler.var_).all():
        return mean, scale, farthest
    unit = np.where(np.isfinite(scaler.var_), 1.0, 2.0**600)  # in which no square overflows
    mean, scale, farthest = _moments(part / unit)
    return mean * unit, scale * unit, farthest * unit


def check_numbers(numbers: str, raw: Raw) -> None:
    """Raise InputError for a way to prepare numbers that there is not, or not for tensors."""
    if numbers not in NUMBERS:
        raise InputError(f"numbers must be one of {', '.join(map(repr, NUMBERS))}, got {numbers!r}.")
    if isinstance(raw, Tensor) and numbers not in TENSOR_NUMBERS:
        raise InputError(f"numbers={numbers!r} is not there for tensors; pass a NumPy array or numbers='standard'.")


@np.errstate(over="ignore")  # of a number so far away that it is clipped
def transform(raw: Array, statistics: Statistics) -> Array:
    """Return the inputs of a network, (n, D'), without NaN; type, device and dtype of ``raw``."""
    if isinstance(raw, Tensor):
        of = statistics
        parts = (of.fill, of.center, of.scale, of.least, of.most)
        fill, center, scale, least, most = (torch.as_tensor(part, dtype=raw.dtype, device=raw.device) for part in parts)
        scaled = (torch.where(raw.isnan(), fill, raw) - center) / scale
        return scaled.clamp_(least, most) if least.numel() else scaled
    x = np.where(np.isnan(raw), statistics.fill, raw)
    x = x[:, statistics.places] if statistics.places.size else x
    normal = [normal_scores(x[:, j], q) for j, q in zip(statistics.ranked, statistics.quantiles.T)]
    x -= statistics.center
    x /= statistics.scale
    if statistics.least.size:
        np.clip(x, statistics.least, statistics.most, out=x)
    for j, scores in zip(statistics.ranked, normal):
        x[:, j] = scores
    x[:, statistics.clipped] = smooth_clip(x[:, statistics.clipped])
    return x
