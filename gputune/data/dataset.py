"""Checked X and y on one device: the data on which a search trains.

A member is one trial on one fold. Positions are row indexes. In shapes, n counts rows, n_f and m_f
the training and validation rows of a fold, F folds, and K classes or target columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from gputune.data.arrays import ArrayLayout, Arrays, ArrayStatistics, input_labels
from gputune.data.columns import Layout, Raw, checked_tensor
from gputune.data.encode import Statistics
from gputune.data.scaling import Scaling, encode, scaling_of, table_inputs
from gputune.data.table import as_table, select_rows
from gputune.data.target import Target, standardized
from gputune.data.target_transform import FittedTransform
from gputune.data.weights import Weights
from gputune.ground.device import free_of_gpu
from gputune.ground.types import Config, Task

Rows = tuple[np.ndarray, np.ndarray]
"""The training rows and the validation rows of one fold, as positions."""
Fitted: TypeAlias = Sequence[Statistics] | Sequence[ArrayStatistics]
"""Preprocessing statistics of each fold's training rows, one entry per fold."""


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold of the cross-validation: the positions of its training and validation rows.

    Both are int64 tensors on the device of the dataset.
    """

    train: Tensor  # (n_f,)
    valid: Tensor  # (m_f,), empty for a refit


@dataclass(frozen=True, eq=False)
class ScorerRows:
    """The rows of X that a custom scorer receives.

    ``X`` is the result of ``Source.original_rows``, or the features.
    """

    X: object
    layout: Layout | ArrayLayout

    def rows(self, fold: Fold) -> object:
        """Return a fold's validation rows for a custom scorer, in the type of X.

        A scorer cannot change the data by writing into the returned array.
        """
        positions = fold.valid.cpu().numpy()
        if isinstance(self.X, Arrays):
            return replace(self.X, places=positions).as_given()
        rows = select_rows(self.X, positions)
        if isinstance(rows, np.ndarray):
            rows.flags.writeable = False
        return rows

    def encoded(
        self, X: object, statistics: Statistics | ArrayStatistics, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Return the module inputs (m, ...) for new rows X that a custom scorer passes, on the CPU.

        The rows are scaled by the ``statistics`` of a fold, like the rows on which the fold's
        members trained.
        """
        if isinstance(self.layout, Layout):
            X = as_table(checked_tensor(X).cpu().numpy() if isinstance(X, Tensor) else X)
        return encode(X, self.layout, statistics, dtype)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The fields of a ``Dataset`` that depend on how numeric columns are scaled (``numbers``).

    The fields have the same names in ``Dataset``.
    """

    inputs: tuple[Tensor, ...]
    copies: tuple[int, ...]
    scaling: tuple[Scaling | None, ...]
    statistics: tuple[Statistics | ArrayStatistics, ...]
    feature_groups: tuple[int, ...] | None = None
    on_host: bool = False


class Preparations(dict[str, Inputs]):
    """The prepared inputs of one table, keyed by the scaling of numeric columns, such as
    "quantile".

    The first use of a key prepares its inputs.
    """

    def __init__(self, make: Callable[[str], Inputs]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, numbers: str) -> Inputs:
        return self.setdefault(numbers, self.make(numbers))


@dataclass(frozen=True, eq=False)
class Dataset:
    """X, y and folds of a study on one device.

    Axes: V distinct copies of X, n rows, D features, F folds, K classes.

    A copy of a table holds all rows, transformed by the statistics of a fold's training rows, such
    as mean and deviation. Folds with the same statistics share a copy. Large tables, and inputs
    that are not tables, have only one copy if each minibatch can be scaled instead.
    """

    # each (V, n, ...); a table is one (V, n, D). Floats get ``dtype`` when rows are gathered.
    inputs: tuple[Tensor, ...]
    copies: tuple[int, ...]  # (F,) index of the copy that a fold reads
    # (n,) int64 class codes. Regression: (F, n) or (F, n, K), standardized by each fold's training
    # rows unless the loss is custom. Labels and custom targets: (1, n, ...).
    y: Tensor
    # (F, n) float64, sample weight times class weight; None if all are 1
    weights: Tensor | None
    folds: tuple[Fold, ...]
    # (F, K) bool, True for the classes in a fold's training rows; None if every fold has all
    # classes
    present: Tensor | None
    center: Tensor  # (F,) or (F, K) float64, the target's training mean; 0 for classes
    scale: Tensor  # (F,) or (F, K) float64, the target's training standard deviation; 1 for classes
    # K: number of classes (or 1 if a module for two classes returns one logit), of labels, or of
    # numbers per row
    n_outputs: int
    task: Task
    target: Tensor  # (n,) class codes, or y (n, ...) in its own units (float64)
    # True if custom losses and scores read a y of one number per row as (n, 1)
    column: bool = False
    scorer_rows: ScorerRows | None = None  # None without a custom scorer
    names: tuple[str, ...] | None = None  # keywords of the inputs, if any
    scaling: tuple[Scaling | None, ...] = (None,)  # one per input
    # dtype of float inputs and of a regression's y; weights are float64
    dtype: torch.dtype = torch.float32
    # (D,) ``Layout.feature_groups`` of a table; None if all inputs are numbers
    feature_groups: tuple[int, ...] | None = None
    # one per fold, applied to the target before it is standardized; () without a transformation
    transforms: tuple[FittedTransform, ...] = ()
    statistics: tuple[Statistics | ArrayStatistics, ...] = ()  # fitted on each fold's training rows
    numbers: str = ""  # preparation of the numbers of a table
    # the same table with its numbers prepared in other ways
    preparations: Mapping[str, Inputs] = field(default_factory=dict)
    # True if inputs lie in main memory and only gathered rows are sent to the device
    on_host: bool = False
    # Networks of a trial on each split whose outputs are averaged. Fold r * S + s is the split s of
    # S, for the replica r: the same rows, from other initial weights and in another order.
    replicas: int = 1

    def of(self, config: Config) -> "Dataset":
        """Return the dataset on which trials with a given configuration train.

        A configuration may set ``numbers``, the scaling of a table's numeric columns.
        """
        numbers = config.get("numbers", self.numbers)
        if numbers == self.numbers:
            return self
        if numbers not in self._prepared_datasets:
            inputs = self.preparations[numbers]
            self._prepared_datasets[numbers] = replace(self, numbers=numbers, **vars(inputs))
        return self._prepared_datasets[numbers]

    @cached_property
    def _prepared_datasets(self) -> dict[str, "Dataset"]:
        return {}

    @property
    def x(self) -> Tensor:
        """The table as a tensor (V, n, D). The dataset must have no other input."""
        (x,) = self.inputs
        return x

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the module's inputs in error messages, such as X['image']."""
        return input_labels(len(self.inputs), self.names)

    @property
    def device(self) -> torch.device:
        """The device of all tensors. Only inputs with ``on_host`` may lie in main memory
        instead."""
        return self.folds[0].train.device

    @property
    def n_rows(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def n_features(self) -> int:
        """The number of features D of a table.

        For other inputs it is the size of the last axis of the first input, or 1 without such an
        axis.
        """
        return self.inputs[0].shape[-1] if self.inputs[0].dim() > 2 else 1

    @property
    def input_bytes(self) -> int:
        """The memory of all inputs in bytes, including all scaled versions of a table made until
        now."""
        tensors = list(self.inputs)
        for prepared in self.preparations.values():
            tensors += prepared.inputs
        return sum(x.nbytes for x in tensors)

    @property
    def row_numbers(self) -> int:
        """The number of values in one row, summed over all inputs."""
        return sum(x[0, 0].numel() for x in self.inputs)

    @property
    def n_folds(self) -> int:
        return len(self.folds)

    @property
    def n_splits(self) -> int:
        """The number of different pairs of training and validation rows: the folds of a study."""
        return len(self.folds) // self.replicas

    def split_of(self, fold: int) -> int:
        """Return the index of a fold's split: its training and validation rows."""
        return fold % self.n_splits

    def replica_of(self, fold: int) -> int:
        """Return the number of the replica that trains on a fold."""
        return fold // self.n_splits

    @property
    def train_lengths(self) -> list[int]:
        """The number of training rows in each fold."""
        return [len(fold.train) for fold in self.folds]

    def rows(self, fold: int, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the rows at some positions, scaled for a fold, as one tensor (m, ...) per
        input."""
        rows = []
        for number, x in enumerate(self.inputs):
            # (V, n, ...) -> (m, ...)
            gathered = x[self.copies[fold]].index_select(0, positions.to(x.device))
            if self.on_host:
                gathered = stage_rows(gathered, self.device)
            rows.append(self.read(number, gathered[None], slice(fold, fold + 1))[0])
        return tuple(rows)

    def training_rows(self, fold: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return all training rows of a fold, scaled for the fold, and their targets.

        The rows are a tuple with one tensor (n_f, ...) per input.
        """
        train = self.folds[fold].train
        return self.rows(fold, train), self.targets(fold)[train]

    def targets(self, fold: int) -> Tensor:
        """Return the targets (n, ...) of all rows, as a fold trains on them.

        Regression targets are standardized by the fold's training rows, unless the loss is custom.
        """
        return self.y if self.task in ("binary", "multiclass") else self.y[fold % len(self.y)]

    def read(self, number: int, rows: Tensor, folds: slice) -> Tensor:
        """Scale rows (F, ..., *row) of one input for some folds, and return them in ``dtype``."""
        scaling = self.scaling[number]
        if scaling is not None:
            return scaling(rows, folds)
        return rows.to(self.dtype) if rows.is_floating_point() else rows

    def in_units(self, fold: int, outputs: Tensor) -> Tensor:
        """Convert a regression's outputs (..., K) to the units of the target.

        Outputs of other tasks stay unchanged.
        """
        values = outputs * self.scale[fold] + self.center[fold]
        return self.transforms[fold].inverse(values) if self.transforms else values

    def example(self, number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return up to ``number`` example rows and their targets, each (B, ...), to try out a
        module.

        The rows are spread evenly over the first fold's training rows.
        """
        train = self.folds[0].train
        spaced = torch.linspace(0, len(train) - 1, min(number, len(train))).long()
        rows = train[spaced.to(self.device)]
        return self.rows(0, rows), self.targets(0)[rows]

    def with_one_logit(self) -> "Dataset":
        """Return the dataset of a binary target for a module that returns one logit per row.

        One logit covers both classes, so the new dataset has no absent class.
        """
        return replace(self, n_outputs=1, present=None)

    @cached_property
    def first_equal(self) -> tuple[Tensor | None, ...]:
        """For each fold, the position of the first equal row for each validation row, (m_f,) int64.

        The entry is None for a fold without equal rows.
        """
        x = self.inputs[0]
        if len(self.inputs) > 1 or x.dim() != 3 or not x.is_floating_point():
            return (None,) * len(self.folds)
        pairs = list(zip(self.copies, self.folds))[: self.n_splits]
        positions = [first_equal(x[copy, fold.valid]) for copy, fold in pairs]
        return tuple(positions * self.replicas)


def make_dataset(
    raw: Raw | Arrays,
    statistics: Fitted,
    target: Target,
    folds: Sequence[Rows],
    *,
    weights: Weights,
    like: Tensor,
) -> Dataset:
    """Return the dataset of a search, in the dtype and on the device of the tensor ``like``.

    Args:
        raw: arrays, or the features (n, D) that ``Layout.raw`` returned.
        statistics: the statistics of each fold's training rows.
        target: the checked target.
        folds: the rows of each fold.
        weights: the sample and class weights.
        like: a tensor with the dtype and the device of the result.

    Raises:
        InputError: the weights of a fold's training rows add up to 0.
    """
    row_weights = [weights.for_fold(target, train) for train, _ in folds]
    target_weights = row_weights if weights.of_target else [None] * len(folds)
    y, center, scale, transforms = standardized(target, folds, target_weights)
    values = target.values
    present = _present(target, folds, target_weights)
    stacked = None
    if any(row is not None for row in row_weights):
        # (F, n)
        stacked = np.stack([np.ones(len(values)) if row is None else row for row in row_weights])
    if isinstance(raw, Arrays) and raw.places is not None:
        # ``raw.places`` selects some of the rows in the inputs. Folds and targets use positions
        # among all rows, so they are moved to these positions.
        places = raw.places
        scatter = partial(_scattered, places=places, size=len(raw.parts[0]))
        y = scatter(y, axis=0 if target.classes is not None else 1)
        values = scatter(values)
        stacked = None if stacked is None else scatter(stacked, axis=1)
        folds = [(places[train], places[valid]) for train, valid in folds]
    to_device = partial(torch.as_tensor, device=like.device)
    positions = partial(to_device, dtype=torch.int64)
    return Dataset(
        **vars(inputs_of(raw, statistics, like)),
        y=to_device(y, dtype=like.dtype if y.dtype.kind == "f" else torch.int64),
        weights=None if stacked is None else to_device(stacked),
        folds=tuple(Fold(positions(train), positions(valid)) for train, valid in folds),
        present=None if present is None else to_device(present),
        center=to_device(center),
        scale=to_device(scale),
        n_outputs=target.n_outputs,
        task=target.task,
        target=to_device(values),
        column=target.column,
        names=raw.names if isinstance(raw, Arrays) else None,
        dtype=like.dtype,
        transforms=transforms,
    )


def _scattered(values: np.ndarray, *, places: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
    """Return an array of ``size`` rows that holds the values at ``places`` and 0 elsewhere.

    The rows lie along ``axis``.
    """
    shape = list(values.shape)
    shape[axis] = size
    scattered = np.zeros(shape, values.dtype)
    # a view with the axis first
    np.moveaxis(scattered, axis, 0)[places] = np.moveaxis(values, axis, 0)
    return scattered


def inputs_of(
    raw: Raw | Arrays, statistics: Fitted, like: Tensor, groups: tuple[int, ...] | None = None
) -> Inputs:
    """Return the prepared inputs of all folds, in the dtype and on the device of ``like``.

    ``groups`` holds the feature groups of a table.
    """
    if not isinstance(raw, Arrays):
        inputs, copies, scaling = table_inputs(raw, cast(Sequence[Statistics], statistics), like)
        return Inputs(inputs, copies, scaling, tuple(statistics), groups)
    on_host = _stays_on_host(raw, like.device)
    inputs = tuple((x if on_host else x.to(like.device))[None] for x in raw.parts)
    scaling = scaling_of(cast(Sequence[ArrayStatistics], statistics), like)
    return Inputs(inputs, (0,) * len(statistics), scaling, tuple(statistics), on_host=on_host)


_DEVICE_SHARE = 0.5  # share of a GPU's free memory that inputs may take


def _stays_on_host(arrays: Arrays, device: torch.device) -> bool:
    """Return True if inputs must stay in main memory, because the GPU needs its memory for
    training."""
    if device.type != "cuda" or any(x.device.type == "cuda" for x in arrays.parts):
        return False
    return sum(x.nbytes for x in arrays.parts) > _DEVICE_SHARE * free_of_gpu(device)


def stage_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Copy the rows of a minibatch to a device, and return them.

    For a CUDA device, the copy runs from pinned memory, and the process does not wait for it.
    """
    if device.type == "cuda":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def _present(
    target: Target, folds: Sequence[Rows], weights: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """Return a mask (F, K) of the classes that occur in each fold's training rows.

    Rows of weight 0 do not count.

    None if every fold has all classes, or if the target has no classes.
    """
    if target.classes is None:
        return None
    counts = []
    for (train, _), row in zip(folds, weights):
        train_weights = None if row is None else row[train]
        counts.append(np.bincount(target.values[train], train_weights, target.n_outputs))
    present = np.stack(counts) > 0
    return None if present.all() else present


_ODD = 0x9E3779B97F4A7C15 - 2**64
"""The multiplier in the hash of a row: the bits of the golden ratio, as in splitmix64."""


def first_equal(rows: Tensor) -> Tensor | None:
    """Return for each row (n, D) the position of the first equal row, (n,) int64.

    None if all rows differ.

    A matrix product uses different instructions for rows at the edge of a block. So equal rows may
    get outputs that differ in their last bits. In ``outputs[first_equal(rows)]`` equal rows have
    equal outputs.
    """
    bits = torch.int64 if rows.dtype == torch.float64 else torch.int32
    key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.T:
        # -0.0 + 0.0 is 0.0, so both zeros get the same key.
        key = (key ^ (column + 0.0).view(bits)) * _ODD
        key = key ^ (key >> 29)
    # (n,) number of the key of each row, then the first row with that key
    group = torch.unique(key, return_inverse=True)[1]
    position = torch.arange(len(rows), device=rows.device)
    first_of_group = torch.full_like(position, len(rows))
    first = first_of_group.scatter_reduce(0, group, position, "amin")[group]
    later = (first != position).nonzero().flatten()
    # Equal keys do not prove equal rows, so the rows are compared.
    differs = (rows[later] != rows[first[later]]).any(1)
    different = later[differs]
    first[different] = different
    return None if len(later) == len(different) else first


# Each column may index its own embedding. For longer rows only the outermost ids are tried.
_MOST_COLUMNS = 64


def outermost_rows(x: Tensor) -> list[int]:
    """Return the positions of the rows that hold an input's largest and smallest values, such as
    token ids.

    The list is empty for booleans, for floats with more than two axes such as images, and for long
    rows of floats.
    """
    if x.dtype == torch.bool or (x.dim() > 2 and x.is_floating_point()):
        return []
    columns = x.flatten(1) if x.dim() > 1 else x[:, None]
    if columns.shape[1] > _MOST_COLUMNS:
        if x.is_floating_point():
            return []
        # (n, columns) -> (n, 2): largest and smallest id of each row
        columns = torch.stack([columns.amax(1), columns.amin(1)], 1)
    return [*columns.argmax(0).tolist(), *columns.argmin(0).tolist()]


def with_replicas(data: Dataset, replicas: int) -> Dataset:
    """Return the dataset on which each trial trains ``replicas`` networks on each split."""
    if replicas == 1:
        return data
    preparations: Mapping[str, Inputs] = data.preparations
    if isinstance(preparations, Preparations):
        preparations = Preparations(partial(_prepared, preparations, replicas))
    values = {field.name: getattr(data, field.name) for field in fields(Inputs)}
    return replace(
        data,
        **vars(_repeated_inputs(Inputs(**values), replicas)),
        # (F, n, ...) for numbers. Class codes (n,) are the same in all folds.
        y=_repeated(data.y, replicas) if data.task == "regression" else data.y,
        weights=None if data.weights is None else _repeated(data.weights, replicas),
        folds=data.folds * replicas,
        present=None if data.present is None else _repeated(data.present, replicas),
        center=_repeated(data.center, replicas),
        scale=_repeated(data.scale, replicas),
        transforms=data.transforms * replicas,
        preparations=preparations,
        replicas=replicas,
    )


def _repeated(of_folds: Tensor, replicas: int) -> Tensor:
    """Repeat a tensor (F, ...) along its first axis."""
    return of_folds.repeat(replicas, *[1] * (of_folds.dim() - 1))


def _repeated_inputs(inputs: Inputs, replicas: int) -> Inputs:
    """Repeat the folds of prepared inputs. All replicas read the same copies."""
    scaling = []
    for of_input in inputs.scaling:
        if of_input is not None:
            center = _repeated(of_input.center, replicas)
            of_input = replace(of_input, center=center, scale=_repeated(of_input.scale, replicas))
        scaling.append(of_input)
    return replace(
        inputs,
        copies=inputs.copies * replicas,
        scaling=tuple(scaling),
        statistics=inputs.statistics * replicas,
    )


def _prepared(preparations: Preparations, replicas: int, numbers: str) -> Inputs:
    """Return the inputs of one preparation of the numeric columns, with repeated folds."""
    return _repeated_inputs(preparations[numbers], replicas)
