"""Arrays as scikit-learn checked them, turned into what the engine trains on: one copy of X for all folds."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gputune.data.dataset import Dataset, Fold


@dataclass(frozen=True, eq=False)
class Rows:
    """Checked rows of one fit, or of one search over many folds.

    X (n, D) float32 or float64; y (n,) int64 positions in ``classes``, or float64 numbers; weights (n,) float64,
    None where all are one; names (D,) of the features, None where X had none.
    """

    X: NDArray[np.floating]
    y: NDArray[np.int64] | NDArray[np.float64]
    weights: NDArray[np.float64] | None
    classes: NDArray[np.generic] | None
    names: NDArray[np.object_] | None

    def weight(self, rows: NDArray[np.int64]) -> float:
        """Return the sum of the weights of some rows."""
        return float(len(rows) if self.weights is None else self.weights[rows].sum())

    def present(self, rows: NDArray[np.int64]) -> tuple[int, ...] | None:
        """Return the classes that some rows have, as positions; None for a regression."""
        return None if self.classes is None else tuple(np.unique(self.y[rows]).tolist())

    def refusal(self, rows: NDArray[np.int64]) -> ValueError | None:
        """Return the error that training on these rows alone must raise, None where it can be done."""
        if len(rows) == 0:
            return ValueError("no rows to train on: found array with 0 sample(s).")
        if not self.weight(rows) > 0:
            return ValueError("sample_weight must be above 0 for at least one training row, got zeros.")
        if self.classes is not None and len(codes := np.unique(self.y[rows])) < 2:
            only = self.classes[codes[0]]
            return ValueError(f"a classifier needs training rows of at least 2 classes, got 1 class: {only}.")
        return None


@dataclass(frozen=True, eq=False)
class FoldGroup:
    """Folds that train together, because their rows have the same classes.

    places   their positions among all folds
    trains   the training rows of each
    classes  positions of their classes among all classes, None for a regression
    """

    places: tuple[int, ...]
    trains: tuple[NDArray[np.int64], ...]
    classes: NDArray[np.int64] | None

    @property
    def n_outputs(self) -> int:
        """Number of outputs: the classes that the folds have, or 1."""
        return 1 if self.classes is None else len(self.classes)


def group_folds(
    rows: Rows,
    trains: Mapping[int, NDArray[np.int64]],
    key: Callable[[NDArray[np.int64]], Hashable] = lambda train: None,
) -> list[FoldGroup]:
    """Group folds, by number, by the classes of their training rows and by ``key``.

    A network for the classes of its own fold is what a fit on that fold's rows alone would make.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for fold, train in trains.items():
        groups[rows.present(train), key(train)].append(fold)
    return [
        FoldGroup(
            tuple(places),
            tuple(trains[fold] for fold in places),
            None if rows.classes is None else np.unique(rows.y[trains[places[0]]]),
        )
        for places in groups.values()
    ]


def shared_x(rows: Rows, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return X (n, D) on the device: in its own dtype on a CPU, in single precision on a GPU, unless one is given."""
    if dtype is None and device.type != "cpu":
        dtype = torch.float32
    return as_tensor(rows.X).to(device, dtype)


def as_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor; torch shares the memory only of arrays that could be written."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def make_dataset(rows: Rows, group: FoldGroup, x: Tensor) -> Dataset:
    """Return the engine's dataset of a group of folds on ``x`` (n, D): X as it came, no validation rows."""
    device = x.device
    folds = tuple(
        Fold(as_tensor(train).to(device), torch.empty(0, dtype=torch.int64, device=device))
        for train in group.trains
    )
    y, center, scale = _targets(rows, group)
    weights = None
    if rows.weights is not None:
        weights = as_tensor(rows.weights).to(device).expand(len(folds), -1)
    codes = as_tensor(y).to(device)
    outputs = group.n_outputs
    return Dataset(
        inputs=(x[None],),
        dtype=x.dtype,
        copies=(0,) * len(folds),
        y=codes if group.classes is not None else codes.to(x.dtype),
        weights=weights,
        folds=folds,
        present=_present(rows, group, y, device),
        center=as_tensor(center).to(device),
        scale=as_tensor(scale).to(device),
        n_outputs=outputs,
        task="regression" if group.classes is None else "binary" if outputs == 2 else "multiclass",
        target=codes if group.classes is not None else as_tensor(rows.y).to(device),
    )


def _targets(rows: Rows, group: FoldGroup) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes (n,) among the group's classes, or standardised targets (F, n), with center and scale (F,).

    Rows of classes that no fold of the group has get the code 0, and are never read.
    """
    folds = len(group.trains)
    if group.classes is not None:
        assert rows.classes is not None
        place = np.zeros(len(rows.classes), dtype=np.int64)
        place[group.classes] = np.arange(len(group.classes))
        return place[rows.y], np.zeros(folds), np.ones(folds)
    stats = np.array([_center_and_scale(rows, train) for train in group.trains])
    center, scale = stats.T.copy()
    return (rows.y - center[:, None]) / scale[:, None], center, scale


def _center_and_scale(rows: Rows, train: NDArray[np.int64]) -> tuple[float, float]:
    """Return weighted mean and standard deviation of the targets of some rows; 1 where they are constant."""
    y, weights = rows.y[train], None if rows.weights is None else rows.weights[train]
    if weights is not None:
        y, weights = y[weights > 0], weights[weights > 0]
    center = float(np.average(y, weights=weights))
    scale = float(np.sqrt(np.average((y - center) ** 2, weights=weights)))
    # The standard deviation of a constant consists of rounding errors, not of 0.
    return center, scale if np.ptp(y) > 0 and scale > 0 else 1.0


def _present(rows: Rows, group: FoldGroup, codes: np.ndarray, device: torch.device) -> Tensor | None:
    """Return which classes take part, (F, K): a class whose rows weigh nothing does not. None where all do."""
    if group.classes is None or rows.weights is None:
        return None
    counts = [np.bincount(codes[t], rows.weights[t], minlength=group.n_outputs) for t in group.trains]
    present = np.stack(counts) > 0
    return None if present.all() else as_tensor(present).to(device)


@dataclass(frozen=True, eq=False)
class Part:
    """The training or validation rows of one fold: ``index`` into checked rows, which it may share with other folds."""

    rows: Rows
    index: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """Folds of one form: ``places`` among all of them, and the training rows of each in ``rows``."""

    places: tuple[int, ...]
    rows: Rows
    folds: tuple[NDArray[np.int64], ...]


def lay_out(parts: Sequence[Part]) -> list[Layout]:
    """Return the folds in as few layouts as their columns, names and precision allow."""
    forms: dict[Hashable, list[int]] = defaultdict(list)
    for place, part in enumerate(parts):
        forms[form(part.rows)].append(place)
    return [_layout(tuple(places), [parts[place] for place in places]) for places in forms.values()]


def form(rows: Rows) -> Hashable:
    """Return what rows must have in common to be laid out in one array."""
    names = None if rows.names is None else tuple(rows.names)
    return rows.X.shape[1], rows.X.dtype, names, rows.weights is None, rows.classes is None


def _layout(places: tuple[int, ...], parts: Sequence[Part]) -> Layout:
    distinct = list({id(part.rows): part.rows for part in parts}.values())
    starts = np.cumsum([0, *(len(rows.X) for rows in distinct)])
    start_of = {id(rows): start for rows, start in zip(distinct, starts)}
    folds = tuple(part.index + start_of[id(part.rows)] for part in parts)
    return Layout(places, distinct[0] if len(distinct) == 1 else _joined(distinct), folds)


def _joined(blocks: Sequence[Rows]) -> Rows:
    """Return the rows of all blocks, one after the other, with codes among the classes of all."""
    first, X = blocks[0], np.concatenate([rows.X for rows in blocks])
    weighted = [rows.weights for rows in blocks if rows.weights is not None]
    weights = np.concatenate(weighted) if weighted else None
    if first.classes is None:
        return Rows(X, np.concatenate([rows.y for rows in blocks]), weights, None, first.names)
    labels = np.concatenate([rows.classes[rows.y] for rows in blocks if rows.classes is not None])
    classes, codes = np.unique(labels, return_inverse=True)
    return Rows(X, codes.astype(np.int64), weights, classes, first.names)
