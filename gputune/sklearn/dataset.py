"""The conversion of rows that scikit-learn has checked into the engine's dataset.

All folds share one copy of X.

In shapes, n is the number of rows, D of features and K of target columns. Positions are row or
class indexes.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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
from gputune.ground.annotations import FloatArray, IntArray
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.memory import free_memory
from gputune.ground.types import Task


@dataclass(frozen=True, eq=False)
class CheckedRows:
    """The rows of one fit, or of one search over many folds, after scikit-learn's checks.

    Attributes:
        X: the inputs. A table is one tensor (n, D), float32 or float64. Other inputs are unchanged.
        y: (n,) int64 positions in ``classes``, a float64 regression target (n,) or (n, K), or
            labels (n, K) of 0 and 1.
        weights: (n,) float64. None if all weights are one.
        classes: the classes of y. None for a regression and for labels.
        names: (D,) names of a table's features. None if X had no names.
        taken_as: the task of a target without classes.
    """

    X: Arrays
    y: IntArray | FloatArray
    weights: FloatArray | None
    classes: NDArray[np.generic] | None
    names: NDArray[np.object_] | None
    taken_as: Task = "regression"

    @property
    def is_table(self) -> bool:
        """True if X is one table of numbers, so that scikit-learn can count and name the
        columns."""
        x = self.X.parts[0]
        return (
            len(self.X.parts) == 1
            and self.X.names is None
            and x.dim() == 2
            and x.is_floating_point()
        )

    @property
    def task(self) -> Task:
        """The task of the target: binary or multiclass for classes, otherwise ``taken_as``."""
        if self.classes is not None:
            return "binary" if len(self.classes) == 2 else "multiclass"
        return self.taken_as

    @property
    def form(self) -> Hashable:
        """A key that describes the columns, the task and the weights of the rows.

        Rows with equal keys can be stored in one array.
        """
        names = None if self.names is None else tuple(self.names)
        return ArrayLayout.of(self.X), names, self.weights is None, self.task, self.y.shape[1:]

    def weight(self, rows: IntArray) -> float:
        """Return the sum of the sample weights of some rows."""
        return float(len(rows) if self.weights is None else self.weights[rows].sum())

    def refusal(self, rows: IntArray) -> ValueError | None:
        """Return the error for training rows that are empty, have no weight or have one class, or
        None."""
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
        """Return the inputs X on a device.

        Floats have the precision ``dtype`` if set. Otherwise floats keep their precision on a CPU,
        and have single precision on a GPU.
        """
        if dtype is None and device.type != "cpu":
            dtype = torch.float32
        return tuple(x.to(device, dtype if x.is_floating_point() else None) for x in self.X.parts)


@dataclass(frozen=True, eq=False)
class FoldRows:
    """The training or validation rows of one fold, as positions in shared rows.

    Attributes:
        rows: checked rows, which folds can share.
        index: positions in ``rows``.
    """

    rows: CheckedRows
    index: IntArray

    def labels(self) -> list[str | float]:
        """Return the class labels that occur in the rows. The list is empty for a regression."""
        return (
            []
            if self.rows.classes is None
            else self.rows.classes[np.unique(self.rows.y[self.index])].tolist()
        )


@dataclass(frozen=True, eq=False)
class FoldGroup:
    """Several folds of a search that train together, with their rows.

    Attributes:
        numbers: the fold numbers, which identify the folds in the search.
        rows: the rows of all folds.
        trains: positions of the training rows of each fold in ``rows``.
        valids: positions of the validation rows of each fold. Empty if no validation loss is
            needed.
    """

    numbers: tuple[int, ...]
    rows: CheckedRows
    trains: tuple[IntArray, ...]
    valids: tuple[IntArray, ...] = ()

    @cached_property
    def classes(self) -> IntArray | None:
        """The positions, among the classes of all rows, of the classes that the folds train on.

        None for a regression. All folds of a group have the same classes, because ``split`` groups
        folds by their classes.
        """
        return None if self.rows.classes is None else np.unique(self.rows.y[self.trains[0]])

    @cached_property
    def codes(self) -> IntArray:
        """The position of each row's class among ``classes``.

        Rows of other classes are in no fold of the group.
        """
        assert self.classes is not None
        return np.searchsorted(self.classes, self.rows.y).clip(max=len(self.classes) - 1)

    def part(self, index: Sequence[int]) -> "FoldGroup":
        """Return a group with only some of the folds.

        ``index`` holds their positions in ascending order.
        """
        is_chosen = [i in index for i in range(len(self.numbers))]
        numbers = tuple(itertools.compress(self.numbers, is_chosen))
        trains = tuple(itertools.compress(self.trains, is_chosen))
        valids = tuple(itertools.compress(self.valids, is_chosen))
        return FoldGroup(numbers, self.rows, trains, valids)

    def split(self, keys: Iterable[Hashable] | None = None) -> "list[FoldGroup]":
        """Split the group into groups of folds with the same key and the same classes in their
        training rows.

        A network then has the same outputs as in a separate fit on its fold.
        """
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for i, (train, key) in enumerate(zip(self.trains, keys or itertools.repeat(None))):
            present = None if self.rows.classes is None else np.unique(self.rows.y[train]).tobytes()
            groups[present, key].append(i)
        return list(map(self.part, groups.values()))


def lay_out(folds: Mapping[int, Sequence[FoldRows]]) -> list[FoldGroup]:
    """Group folds into ``FoldGroup`` objects, so that all rows of a group have the same columns and
    task.

    Args:
        folds: for each fold number its training rows, and optionally its validation rows. Both have
            the same form.
    """
    forms: dict[Hashable, list[int]] = defaultdict(list)
    for number, (train, *_) in folds.items():
        forms[train.rows.form].append(number)
    return [
        _fold_group({number: folds[number] for number in numbers}) for numbers in forms.values()
    ]


def _fold_group(folds: Mapping[int, Sequence[FoldRows]]) -> FoldGroup:
    """Return a ``FoldGroup`` in which the rows of several folds are joined.

    The rows of all folds must have the same form.
    """
    blocks: list[CheckedRows] = []
    starts: dict[int, int] = {}  # id of a block -> the position of its first row after joining
    n_rows = 0
    indices = []
    for sides in folds.values():
        positions = []
        for part in sides:
            block = part.rows
            if id(block) not in starts:
                starts[id(block)] = n_rows
                n_rows += len(block.X)
                blocks.append(block)
            positions.append(part.index + starts[id(block)])
        indices.append(positions)
    return FoldGroup(tuple(folds), _join(blocks), *zip(*indices))


def _join(blocks: Sequence[CheckedRows]) -> CheckedRows:
    """Concatenate several sets of rows.

    The class codes of the result count over the classes of all sets.
    """
    first = blocks[0]
    if len(blocks) == 1:
        return first
    parts = zip(*(rows.X.parts for rows in blocks))
    X = Arrays(tuple(map(torch.cat, parts)), first.X.names)
    weighted = [rows.weights for rows in blocks if rows.weights is not None]
    weights = np.concatenate(weighted) if weighted else None
    if first.classes is None:
        y = np.concatenate([rows.y for rows in blocks])
        return replace(first, X=X, y=y, weights=weights)
    # Blocks can have different classes, so their labels get new codes.
    labels = np.concatenate([rows.classes[rows.y] for rows in blocks if rows.classes is not None])
    classes, codes = np.unique(labels, return_inverse=True)
    return replace(first, X=X, y=codes.astype(np.int64), weights=weights, classes=classes)


def make_dataset(
    group: FoldGroup,
    x: Sequence[Tensor],
    *,
    standardise: bool = True,
    numbers: str = "none",
    watched: bool = False,
) -> Dataset:
    """Convert a group of folds to the dataset on which gputune's engine trains.

    Args:
        group: the folds and their rows.
        x: the inputs, tensors (n, ...).
        standardise: whether numeric targets are standardized by the training rows of each fold.
        numbers: "standard" or "none", the scaling of numeric inputs.
        watched: whether the training computes its loss after each epoch. The training rows with a
            positive weight are then the validation rows too.
    """
    rows = group.rows
    valids = group.valids
    if not valids:
        counts = np.full(len(rows.y), watched)
        if rows.weights is not None:
            counts &= rows.weights > 0
        valids = tuple(train[counts[train]] for train in group.trains)
    folds = list(zip(group.trains, valids))
    # Half precision is too little for training. A module with only integer inputs has parameters of
    # single precision.
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in x) else torch.float32
    X = Arrays(tuple(x), rows.X.names)
    # an empty tensor that carries the dtype and the device
    like = torch.empty(0, dtype=dtype, device=x[0].device)
    statistics = fit_channels(X, group.trains, numbers)
    weights = Weights(rows.weights, None, of_target=True)
    if rows.classes is None or group.classes is None:
        y = np.require(rows.y, requirements=["C", "W"])
        target = Target(rows.taken_as, y, None, standardize=standardise)
    else:
        task: Task = "binary" if len(group.classes) == 2 else "multiclass"
        target = Target(task, group.codes, rows.classes[group.classes])
    return data_of(X, statistics, target, folds, weights=weights, like=like)


def as_dense(X: Any) -> Any:
    """Convert a sparse matrix to an array, and return anything else unchanged.

    Raises InputError if the array does not fit into memory.
    """
    if not issparse(X):
        return X
    # bytes of the dense array
    size = math.prod(X.shape) * X.dtype.itemsize
    free = free_memory()
    if size > free:
        raise InputError(
            None,
            f"X is a sparse matrix of {X.shape[0]} rows and {X.shape[1]} columns. gputune trains "
            f"on a dense array, which needs {size:.1e} bytes, but only {free:.1e} bytes are free",
            remedy="Reduce the columns first, for example with TruncatedSVD.",
        )
    return X.toarray()


def as_tensor(array: np.ndarray) -> Tensor:
    """Convert an array to a tensor.

    An array that is not writable is copied, because torch shares memory only with writable arrays.
    """
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


class SliceDict(dict[str, Any]):
    """A dict of module inputs that scikit-learn can split by rows.

    The keys are names of the arguments of the module's ``forward``. The values are arrays or
    tensors (n, ...) of equal length. ``len`` is n and ``shape`` is (n,). Indexing with a name
    returns that input. Any other index returns a SliceDict of the selected rows.

    Args:
        inputs: a mapping or pairs of names and inputs.
        **more: further inputs by name.

    Raises:
        InputError: a value is not an array or tensor, or the lengths differ.

    Example:
        >>> import numpy as np
        >>> from gputune.sklearn import SliceDict
        >>> X = SliceDict(image=np.zeros((100, 8, 8)), age=np.arange(100))
        >>> len(X)
        100
        >>> X[:3]["age"]  # pass X to scikit-learn, which selects rows in this way
        array([0, 1, 2])
    """

    def __init__(
        self, inputs: Mapping[str, object] | Iterable[tuple[str, object]] = (), **more: object
    ) -> None:
        super().__init__(inputs, **more)
        for name, value in self.items():
            if not isinstance(value, np.ndarray | Tensor) or value.ndim == 0:
                rule = "must be an array or tensor with one entry per row"
                raise InputError(f"SliceDict[{name!r}]", rule, got=value)
        lengths = {name: len(value) for name, value in self.items()}
        if len(set(lengths.values())) != 1:
            rule = "must hold inputs of equal length"
            raise InputError("SliceDict", rule, got=lengths or Verbatim("none"))

    def __len__(self) -> int:
        return len(next(iter(self.values())))

    @property
    def shape(self) -> tuple[int]:
        """The shape (n,), from which scikit-learn reads the number of rows."""
        return (len(self),)

    def __getitem__(self, key: object) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return SliceDict({name: value[key] for name, value in self.items()})


def as_sliced(X: object) -> object:
    """Convert a dict of inputs to a SliceDict, and return anything else unchanged.

    Raises InputError for a tuple of inputs.
    """
    if isinstance(X, tuple) and X and all(isinstance(value, np.ndarray | Tensor) for value in X):
        raise InputError(
            "X",
            "must be a SliceDict, because scikit-learn cannot split a tuple by rows",
            got=Verbatim(f"a tuple of {len(X)} inputs"),
            remedy="Name the inputs after the arguments of the module's forward: "
            "X=gputune.sklearn.SliceDict(image=..., age=...).",
        )
    return SliceDict(X) if type(X) is dict else X
