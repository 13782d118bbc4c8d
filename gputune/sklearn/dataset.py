"""Rows as scikit-learn checked them, turned into what the engine trains on: one copy of X for all
folds."""

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from torch import Tensor

from gputune.data.arrays import ArrayLayout, Arrays, fit_channels
from gputune.data.dataset import Dataset
from gputune.data.dataset import make_dataset as data_of
from gputune.data.target import Target
from gputune.data.weights import Weights
from gputune.errors import InputError
from gputune.main_memory import free_memory
from gputune.types import Task

Index: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Checked rows of one fit, or of one search over many folds.

    X          a table is one tensor (n, D), float32 or float64; other inputs are as they were given
    y          (n,) int64 positions in ``classes``, float64 numbers (n,) or (n, K), or labels (n, K)
               of 0 and 1
    weights    (n,) float64, None where all are one
    classes    those of y, None for numbers and labels
    names      (D,) of a table's features, None where X had none
    taken_as   the task of a target that is no classes
    """

    X: Arrays
    y: Index | NDArray[np.float64]
    weights: NDArray[np.float64] | None
    classes: NDArray[np.generic] | None
    names: NDArray[np.object_] | None
    taken_as: Task = "regression"

    @property
    def is_table(self) -> bool:
        """Whether X is rows of numbers, with features that scikit-learn counts and names."""
        x = self.X.parts[0]
        return (
            len(self.X.parts) == 1
            and self.X.names is None
            and x.dim() == 2
            and x.is_floating_point()
        )

    @property
    def task(self) -> Task:
        """What is predicted."""
        if self.classes is not None:
            return "binary" if len(self.classes) == 2 else "multiclass"
        return self.taken_as

    @property
    def form(self) -> Hashable:
        """What rows must have in common to be laid out in one array."""
        names = None if self.names is None else tuple(self.names)
        return ArrayLayout.of(self.X), names, self.weights is None, self.task, self.y.shape[1:]

    def weight(self, rows: Index) -> float:
        """Return the sum of the weights of some rows."""
        return float(len(rows) if self.weights is None else self.weights[rows].sum())

    def refusal(self, rows: Index) -> ValueError | None:
        """Return the error that training on these rows alone must raise, None where it can be
        done."""
        if len(rows) == 0:
            return ValueError("no rows to train on: found array with 0 sample(s).")
        if not self.weight(rows) > 0:
            return ValueError(
                "sample_weight must be above 0 for at least one training row, got zeros."
            )
        if self.classes is not None and len(codes := np.unique(self.y[rows])) < 2:
            only = self.classes[codes[0]]
            return ValueError(
                f"a classifier needs training rows of at least 2 classes, got 1 class: {only}."
            )
        return None

    def inputs(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Return X on a device; floats are in their own precision on a CPU, single on a GPU, or in
        ``dtype``."""
        if dtype is None and device.type != "cpu":
            dtype = torch.float32
        return tuple(x.to(device, dtype if x.is_floating_point() else None) for x in self.X.parts)


@dataclass(frozen=True, eq=False)
class Part:
    """The training or validation rows of one fold: ``index`` into checked rows, which it may share
    with other folds."""

    rows: Rows
    index: Index

    def labels(self) -> list[str | float]:
        """Return the labels that the rows have; none for a regression."""
        return (
            []
            if self.rows.classes is None
            else self.rows.classes[np.unique(self.rows.y[self.index])].tolist()
        )


@dataclass(frozen=True, eq=False)
class FoldGroup:
    """Folds that train together: their numbers, and the training rows of each among ``rows``.

    ``valids`` are the validation rows of each, none where no loss is taken of them.
    """

    numbers: tuple[int, ...]
    rows: Rows
    trains: tuple[Index, ...]
    valids: tuple[Index, ...] = ()

    @cached_property
    def classes(self) -> Index | None:
        """Positions of the classes of their training rows, which ``split`` makes the same; None
        without classes."""
        return None if self.rows.classes is None else np.unique(self.rows.y[self.trains[0]])

    @cached_property
    def codes(self) -> Index:
        """All rows' positions among ``classes``; rows of other classes are in no fold of the
        group."""
        assert self.classes is not None
        return np.searchsorted(self.classes, self.rows.y).clip(max=len(self.classes) - 1)

    def part(self, index: Sequence[int]) -> "FoldGroup":
        """Return some of the folds, by their positions."""
        trains = self.trains
        valids = self.valids
        valids = tuple(valids[i] for i in index) if valids else ()
        return FoldGroup(
            tuple(self.numbers[i] for i in index),
            self.rows,
            tuple(trains[i] for i in index),
            valids,
        )

    def split(self, keys: Iterable[Hashable] | None = None) -> "list[FoldGroup]":
        """Return groups of folds whose training rows have the same classes, and that have the same
        key.

        A network for the classes of its own fold is what a fit on that fold's rows alone would
        make.
        """
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, (train, key) in enumerate(zip(self.trains, keys or itertools.repeat(None))):
            present = None if self.rows.classes is None else np.unique(self.rows.y[train]).tobytes()
            groups[present, key].append(i)
        return [self.part(index) for index in groups.values()]


def lay_out(folds: Mapping[int, Sequence[Part]]) -> list[FoldGroup]:
    """Group folds, by number, by the form of their rows.

    Each fold is its training rows, or these and its validation rows, which have the same form.
    """
    forms: dict[Hashable, list[int]] = defaultdict(list)
    for number, (train, *_) in folds.items():
        forms[train.rows.form].append(number)
    groups = []
    for numbers in forms.values():
        blocks = {id(part.rows): part.rows for number in numbers for part in folds[number]}
        starts = dict(zip(blocks, np.cumsum([0, *(len(rows.X) for rows in blocks.values())])))
        indices = (
            [part.index + starts[id(part.rows)] for part in folds[number]] for number in numbers
        )
        groups.append(FoldGroup(tuple(numbers), _join(list(blocks.values())), *zip(*indices)))
    return groups


def _join(blocks: Sequence[Rows]) -> Rows:
    """Return the rows of all blocks, one after the other, with codes among the classes of all."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    X = Arrays(tuple(map(torch.cat, zip(*(rows.X.parts for rows in blocks)))), first.X.names)
    weighted = [rows.weights for rows in blocks if rows.weights is not None]
    weights = np.concatenate(weighted) if weighted else None
    if first.classes is None:
        return Rows(
            X,
            np.concatenate([rows.y for rows in blocks]),
            weights,
            None,
            first.names,
            first.taken_as,
        )
    labels = np.concatenate([rows.classes[rows.y] for rows in blocks if rows.classes is not None])
    classes, codes = np.unique(labels, return_inverse=True)
    return Rows(X, codes.astype(np.int64), weights, classes, first.names)


def make_dataset(
    group: FoldGroup,
    x: Sequence[Tensor],
    *,
    standardise: bool = True,
    numbers: str = "none",
    watched: bool = False,
) -> Dataset:
    """Return the engine's dataset of a group of folds on inputs (n, ...).

    Numbers to be predicted are standardised by the training rows of each fold, unless told not to;
    ``numbers`` says whether inputs are. Where training is ``watched``, the training rows that weigh
    something are its validation rows.
    """
    rows = group.rows
    weigh = np.full(len(rows.y), watched) if rows.weights is None else (rows.weights > 0) & watched
    folds = list(zip(group.trains, group.valids or [train[weigh[train]] for train in group.trains]))
    # Half a number is too little to train in; a module of integers alone has parameters of single
    # precision.
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in x) else torch.float32
    X = Arrays(tuple(x), rows.X.names)
    like = torch.empty(0, dtype=dtype, device=x[0].device)
    statistics = fit_channels(X, group.trains, numbers)
    weights = Weights(rows.weights, None, of_target=True)
    if rows.classes is None or group.classes is None:
        target = Target(
            rows.taken_as,
            np.require(rows.y, requirements=["C", "W"]),
            None,
            standardise=standardise,
        )
    else:
        task: Task = "binary" if len(group.classes) == 2 else "multiclass"
        target = Target(task, group.codes, rows.classes[group.classes])
    return data_of(X, statistics, target, folds, weights=weights, like=like)


def as_dense(X: Any) -> Any:
    """Return a sparse matrix as an array, anything else as it is. Raises InputError where memory
    does not hold it."""
    if not issparse(X):
        return X
    size = math.prod(X.shape) * X.dtype.itemsize
    free = free_memory()
    if size > free:
        raise InputError(
            f"X is a sparse matrix of {X.shape[0]} rows and {X.shape[1]} columns, which takes "
            f"{size:.1e} bytes as the array that it is trained as, and {free:.1e} are free; give "
            "fewer columns, as TruncatedSVD makes them."
        )
    return X.toarray()


def as_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor; torch shares the memory only of arrays that could be written."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


class SliceDict(dict[str, Any]):
    """Inputs of a module by the names of its forward's arguments, arrays or tensors (n, ...), split
    by their rows.

        X = SliceDict(image=images, age=ages)
        cross_validate(net, X, y)

    Its length and shape are those of rows, n and (n,). A name gives that input, any other index a
    SliceDict of those rows. Raises InputError for what is no array, and for unequal lengths.
    """

    def __init__(
        self, inputs: Mapping[str, object] | Iterable[tuple[str, object]] = (), **more: object
    ) -> None:
        super().__init__(inputs, **more)
        for name, value in self.items():
            if not isinstance(value, np.ndarray | Tensor) or value.ndim == 0:
                must = "must be an array or tensor with a row for each case"
                raise InputError(f"SliceDict: {name!r} {must}, got {value!r:.60}.")
        lengths = {name: len(value) for name, value in self.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"SliceDict needs inputs of one length, got {lengths or 'none'}.")

    def __len__(self) -> int:
        return len(next(iter(self.values())))

    @property
    def shape(self) -> tuple[int]:
        """(n,), by which scikit-learn counts rows."""
        return (len(self),)

    def __getitem__(self, key: object) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return SliceDict({name: value[key] for name, value in self.items()})


def as_sliced(X: object) -> object:
    """Return a dict of inputs as a SliceDict, anything else as it is. Raises InputError for a tuple
    of inputs."""
    if isinstance(X, tuple) and X and all(isinstance(value, np.ndarray | Tensor) for value in X):
        raise InputError(
            f"X is a tuple of {len(X)} inputs, which scikit-learn cannot split by rows; name them "
            "after the arguments of the module's forward: X=gputune.sklearn.SliceDict(image=..., "
            "age=...)."
        )
    return SliceDict(X) if type(X) is dict else X
