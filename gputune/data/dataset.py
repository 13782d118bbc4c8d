"""Checked X and y on one device: what the engine trains on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from gputune.data.target import Target, standardised
from gputune.data.target_transform import FittedTransform
from gputune.data.weights import Weights
from gputune.memory import free_of_gpu
from gputune.types import Config, Task

Rows = tuple[np.ndarray, np.ndarray]
"""Training and validation rows of one fold, as positions."""
Fitted: TypeAlias = Sequence[Statistics] | Sequence[ArrayStatistics]
"""On each fold's training rows."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Row positions of one fold, int64, on the dataset's device."""

    train: Tensor  # (n_f,)
    valid: Tensor  # (m_f,), empty for a refit


@dataclass(frozen=True, eq=False)
class ScorerRows:
    """What a scorer of the user's own reads: the rows X as ``Source.original_rows`` returns them,
    or as features."""

    X: object
    layout: Layout | ArrayLayout

    def rows(self, fold: Fold) -> object:
        """Return the validation rows of a fold, of the kind of X; no write to an array reaches
        anyone else."""
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
        """Return rows like those of X as the members of a fold see them, each (m, ...), on the
        CPU."""
        if isinstance(self.layout, Layout):
            X = as_table(checked_tensor(X).cpu().numpy() if isinstance(X, Tensor) else X)
        return encode(X, self.layout, statistics, dtype)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What of a ``Dataset`` depends on how the numbers of its table are prepared; as there."""

    inputs: tuple[Tensor, ...]
    copies: tuple[int, ...]
    scaling: tuple[Scaling | None, ...]
    statistics: tuple[Statistics | ArrayStatistics, ...]
    feature_groups: tuple[int, ...] | None = None
    on_host: bool = False


class Preparations(dict[str, Inputs]):
    """The inputs of one table by how its numbers are prepared, each made when it is first asked
    for."""

    def __init__(self, make: Callable[[str], Inputs]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, numbers: str) -> Inputs:
        return self.setdefault(numbers, self.make(numbers))


@dataclass(frozen=True, eq=False)
class Dataset:
    """X, y and folds of a study on one device. Axes: V distinct copies of X, n rows, D features, F
    folds, K classes.

    A copy of a table holds all rows, transformed by what was fitted on the training rows of the
    folds that read it. Large tables, and tensors of another shape, have one copy where they can be
    scaled as they are gathered.
    """

    # each (V, n, ...); a table is one (V, n, D); floats are gathered in ``dtype``
    inputs: tuple[Tensor, ...]
    copies: tuple[int, ...]  # (F,) which copy a fold reads
    # (n,) int64 class codes; regression: (F, n) or (F, n, K), standardised by each fold's training
    # rows,
    y: Tensor
    # unless the loss is of the user's own; labels and custom targets (1, n, ...)
    # (F, n) float64, sample weight times class weight; None when all are one
    weights: Tensor | None
    folds: tuple[Fold, ...]
    # (F, K) bool, classes that a fold's training rows have; None when all have all
    present: Tensor | None
    center: Tensor  # (F,) or (F, K) float64, the target's training mean; 0 for classes
    scale: Tensor  # (F,) or (F, K) float64, the target's training standard deviation; 1 for classes
    # K: number of classes (of two also 1, their one logit), of labels, or of numbers a row
    n_outputs: int
    task: Task
    target: Tensor  # (n,) class codes, or y (n, ...) in its own units (float64)
    # whether losses and scores of the user's own see y of one number a row as (n, 1)
    column: bool = False
    scorer_rows: ScorerRows | None = None  # where there is a scorer of the user's own
    names: tuple[str, ...] | None = None  # of the inputs, where a module takes them as keywords
    scaling: tuple[Scaling | None, ...] = (None,)  # of each input
    # of float inputs and of a regression's y; weights are float64
    dtype: torch.dtype = torch.float32
    # (D,) of a table: ``Layout.feature_groups``; None: numbers
    feature_groups: tuple[int, ...] | None = None
    # of each fold's target, before it is standardised; (): none
    transforms: tuple[FittedTransform, ...] = ()
    statistics: tuple[Statistics | ArrayStatistics, ...] = ()  # fitted on each fold's training rows
    numbers: str = ""  # how those of a table are prepared
    # the table prepared in other ways
    preparations: Mapping[str, Inputs] = field(default_factory=dict)
    # whether inputs lie in main memory, of which gathered rows are sent to the device
    on_host: bool = False

    def of(self, config: Config) -> "Dataset":
        """Return the data as the trials with a configuration read it, whose ``numbers`` may be
        prepared otherwise."""
        numbers = config.get("numbers", self.numbers)
        if numbers == self.numbers:
            return self
        if numbers not in self._prepared_datasets:
            self._prepared_datasets[numbers] = replace(
                self, numbers=numbers, **vars(self.preparations[numbers])
            )
        return self._prepared_datasets[numbers]

    @cached_property
    def _prepared_datasets(self) -> dict[str, "Dataset"]:
        return {}

    @property
    def x(self) -> Tensor:
        """The only input, (V, n, D): a table."""
        (x,) = self.inputs
        return x

    @property
    def labels(self) -> tuple[str, ...]:
        """What messages call the inputs."""
        return input_labels(len(self.inputs), self.names)

    @property
    def device(self) -> torch.device:
        """Where all tensors lie; the inputs too, unless they are ``on_host``."""
        return self.folds[0].train.device

    @property
    def n_rows(self) -> int:
        return self.inputs[0].shape[1]

    @property
    def n_features(self) -> int:
        """Number of features D of a table; of other inputs the size of the first one's last axis, 1
        without one."""
        return self.inputs[0].shape[-1] if self.inputs[0].dim() > 2 else 1

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs, in all ways in which they have been prepared."""
        prepared = (part.inputs for part in self.preparations.values())
        return sum(x.nbytes for inputs in (self.inputs, *prepared) for x in inputs)

    @property
    def row_numbers(self) -> int:
        """How many numbers a row has, in all inputs."""
        return sum(x[0, 0].numel() for x in self.inputs)

    @property
    def n_folds(self) -> int:
        return len(self.folds)

    def rows(self, fold: int, positions: Tensor) -> tuple[Tensor, ...]:
        """Return rows of all inputs as a fold reads them, each (m, ...)."""
        rows = []
        for number, x in enumerate(self.inputs):
            gathered = x[self.copies[fold]].index_select(0, positions.to(x.device))
            gathered = stage_rows(gathered, self.device) if self.on_host else gathered
            rows.append(self.read(number, gathered[None], slice(fold, fold + 1))[0])
        return tuple(rows)

    def training_rows(self, fold: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the training rows of all inputs as a fold reads them, and their training targets,
        each (n_f, ...)."""
        train = self.folds[fold].train
        return self.rows(fold, train), self.targets(fold)[train]

    def targets(self, fold: int) -> Tensor:
        """Return the targets that a fold trains on, (n, ...)."""
        return self.y if self.task in ("binary", "multiclass") else self.y[fold % len(self.y)]

    def read(self, number: int, rows: Tensor, folds: slice) -> Tensor:
        """Return gathered rows (F, ..., *row) of an input as some folds read them."""
        if (scaling := self.scaling[number]) is not None:
            return scaling(rows, folds)
        return rows.to(self.dtype) if rows.is_floating_point() else rows

    def in_units(self, fold: int, outputs: Tensor) -> Tensor:
        """Return outputs (..., K) of a regression in the target's own units; of another task as
        they are."""
        values = outputs * self.scale[fold] + self.center[fold]
        return self.transforms[fold].inverse(values) if self.transforms else values

    def example(self, number: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return at most so many training rows of the first fold, evenly spread, and their targets:
        each (B, ...)."""
        train = self.folds[0].train
        spread = train[
            torch.linspace(0, len(train) - 1, min(number, len(train))).long().to(self.device)
        ]
        return self.rows(0, spread), self.targets(0)[spread]

    def with_one_logit(self) -> "Dataset":
        """Return the data of two classes for a module with one output: it has no class that could
        take no part."""
        return replace(self, n_outputs=1, present=None)

    @cached_property
    def first_equal(self) -> tuple[Tensor | None, ...]:
        """Of each fold's validation rows the first that equals each, (m_f,) int64; None for a fold
        without equals."""
        if (
            len(self.inputs) > 1
            or self.inputs[0].dim() != 3
            or not self.inputs[0].is_floating_point()
        ):
            return (None,) * len(self.folds)
        return tuple(
            first_equal(self.x[copy, fold.valid]) for copy, fold in zip(self.copies, self.folds)
        )


def make_dataset(
    raw: Raw | Arrays,
    statistics: Fitted,
    target: Target,
    folds: Sequence[Rows],
    *,
    weights: Weights,
    like: Tensor,
) -> Dataset:
    """Return the dataset in the dtype and on the device of ``like``.

    ``raw`` is arrays, or (n, D) what ``Layout.raw`` returned, and ``statistics`` are those of each
    fold's training rows. Raises InputError where the weights of a fold's training rows add up to 0.
    """
    row_weights = [weights.for_fold(target, train) for train, _ in folds]
    counted = row_weights if weights.of_target else [None] * len(folds)
    y, center, scale, transforms = standardised(target, folds, counted)
    values = target.values
    present = _present(target, folds, counted)
    if isinstance(raw, Arrays) and raw.places is not None:
        # The inputs have other rows as well, which no fold has: folds and targets name rows by
        # their places among all.
        among = partial(_among, raw.places, len(raw.parts[0]))
        places = raw.places
        y = among(y, axis=0 if target.classes is not None else 1)
        values = among(values)
        row_weights = [None if row is None else among(row) for row in row_weights]
        folds = [(places[train], places[valid]) for train, valid in folds]
    to_device = partial(torch.as_tensor, device=like.device)
    weigh = any(row is not None for row in row_weights)
    stacked = [np.ones(len(values)) if row is None else row for row in row_weights if weigh]
    return Dataset(
        **vars(inputs_of(raw, statistics, like)),
        y=to_device(y, dtype=like.dtype if y.dtype.kind == "f" else torch.int64),
        weights=to_device(np.stack(stacked)) if weigh else None,
        folds=tuple(
            Fold(*(to_device(np.asarray(rows, np.int64)) for rows in fold)) for fold in folds
        ),
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


def _among(places: np.ndarray, size: int, values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return the values of some rows, along an axis, in their places among ``size`` rows; 0
    elsewhere."""
    spread = np.zeros((*values.shape[:axis], size, *values.shape[axis + 1 :]), values.dtype)
    spread[(slice(None),) * axis + (places,)] = values
    return spread


def inputs_of(
    raw: Raw | Arrays, statistics: Fitted, like: Tensor, groups: tuple[int, ...] | None = None
) -> Inputs:
    """Return the inputs in the dtype and on the device of ``like``; ``groups`` are the features' of
    a table."""
    if not isinstance(raw, Arrays):
        return Inputs(
            *table_inputs(raw, cast(Sequence[Statistics], statistics), like),
            tuple(statistics),
            groups,
        )
    on_host = _stays_on_host(raw, like.device)
    inputs = tuple((x if on_host else x.to(like.device))[None] for x in raw.parts)
    scaling = scaling_of(cast(Sequence[ArrayStatistics], statistics), like)
    return Inputs(inputs, (0,) * len(statistics), scaling, tuple(statistics), on_host=on_host)


_DEVICE_SHARE = 0.5  # of the memory that is free on a GPU, which inputs may take


def _stays_on_host(arrays: Arrays, device: torch.device) -> bool:
    """Whether inputs are too large for a GPU beside what trains on it."""
    if device.type != "cuda" or any(x.device.type == "cuda" for x in arrays.parts):
        return False
    return sum(x.nbytes for x in arrays.parts) > _DEVICE_SHARE * free_of_gpu(device)


def stage_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Return gathered rows on a device; to a CUDA device they go from pinned memory, and nobody
    waits for that."""
    return (
        rows.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else rows.to(device)
    )


def _present(
    target: Target, folds: Sequence[Rows], weights: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """Return which classes have training rows that weigh something, (F, K); None where all have, or
    there are none."""
    if target.classes is None:
        return None
    parts = (
        (target.values[train], None if row is None else row[train])
        for (train, _), row in zip(folds, weights)
    )
    present = np.stack([np.bincount(codes, row, target.n_outputs) for codes, row in parts]) > 0
    return None if present.all() else present


_ODD = 0x9E3779B97F4A7C15 - 2**64
"""Multiplier of a hash of rows: the golden ratio's bits, of which splitmix64 makes streams."""


def first_equal(rows: Tensor) -> Tensor | None:
    """Return the position of the first row that equals each of the rows (n, D), (n,) int64; None
    where all differ.

    A matrix product computes a row by other instructions at the edge of a block than within it, so
    that equal rows may come out with unlike last bits; ``outputs[first_equal(rows)]`` are outputs
    in which they are equal.
    """
    bits = torch.int64 if rows.dtype == torch.float64 else torch.int32
    key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.T:
        # + 0.0 makes 0.0 of -0.0, which is equal to it
        key = (key ^ (column + 0.0).view(bits)) * _ODD
        key = key ^ (key >> 29)
    group = torch.unique(key, return_inverse=True)[1]
    number = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(number, len(rows)).scatter_reduce(0, group, number, "amin")[group]
    later = (first != number).nonzero().flatten()
    unlike = later[(rows[later] != rows[first[later]]).any(1)]  # with one key by chance
    first[unlike] = unlike
    return None if len(later) == len(unlike) else first


# of which each may go to an embedding of its own; of longer rows only the outermost ids are tried
_MOST_COLUMNS = 64


def outermost_rows(x: Tensor) -> list[int]:
    """Return the rows of an input (n, ...) with the largest and the smallest numbers; none of
    images and the like."""
    if x.dtype == torch.bool or (x.dim() > 2 and x.is_floating_point()):
        return []
    columns = x.flatten(1) if x.dim() > 1 else x[:, None]
    if columns.shape[1] > _MOST_COLUMNS:
        if x.is_floating_point():
            return []
        columns = torch.stack([columns.amax(1), columns.amin(1)], 1)
    return [*columns.argmax(0).tolist(), *columns.argmin(0).tolist()]
