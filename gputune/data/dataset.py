"""Checked X and y on one device: what the engine trains on.

The rows of folds as short text, for a study file.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gputune.data.encode import Layout, Numbers, Statistics, fit_statistics, transform
from gputune.data.table import as_table, checked_tensor, first_equal, select_rows
from gputune.data.target import Target
from gputune.data.weights import check_weights
from gputune.types import Task

Rows = tuple[np.ndarray, np.ndarray]
"""Training and validation rows of one fold, as positions."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Row positions of one fold, int64, on the dataset's device."""

    train: Tensor  # (n_f,)
    valid: Tensor  # (m_f,), empty for a refit


@dataclass(frozen=True, eq=False)
class Given:
    """What a scorer of the user's own asks for: the rows as they were given, and any such rows as features.

    ``X`` is what ``Source.as_given`` returns; ``statistics`` are those of each fold.
    """

    X: Any
    layout: Layout
    statistics: tuple[Statistics, ...]

    def rows(self, fold: Fold) -> Any:
        """Return the validation rows of a fold, of the kind of X; no write to an array reaches anyone else."""
        rows = select_rows(self.X, fold.valid.cpu().numpy())
        if isinstance(rows, np.ndarray):
            rows.flags.writeable = False
        return rows

    def encoded(self, X: Any, fold: int) -> Tensor:
        """Return rows like those of X as the members of a fold see them, (m, D) float64, on the CPU."""
        table = as_table(checked_tensor(X).cpu().numpy() if isinstance(X, Tensor) else X)
        return torch.from_numpy(transform(self.layout.raw(table), self.statistics[fold]))


@dataclass(frozen=True, eq=False)
class Dataset:
    """X, y and folds of a study on one device. Axes: V distinct copies of X, n rows, D features, F folds, K classes.

    A copy of X holds all rows, transformed by what was fitted on the training rows of the folds that read it.
    """

    x: Tensor  # (V, n, D) in the dtype of the study
    copies: tuple[int, ...]  # (F,) which copy a fold reads
    y: Tensor  # (n,) int64 class codes; regression: (F, n), standardised by each fold's training rows
    weights: Tensor | None  # (F, n) float64, sample weight times class weight; None when all are one
    folds: tuple[Fold, ...]
    present: Tensor | None  # (F, K) bool, classes that a fold's training rows have; None when all have all
    center: Tensor  # (F,) float64, the target's training mean; 0 for classes
    scale: Tensor  # (F,) float64, the target's training standard deviation; 1 for classes
    n_outputs: int  # K: number of classes (2 for a binary task), or 1
    task: Task
    target: Tensor  # (n,) class codes, or y in its own units (float64)
    given: Given | None = None  # where a scorer of the user's own is to see its rows

    @property
    def n_rows(self) -> int:
        """Number of rows n."""
        return self.x.shape[1]

    @property
    def n_features(self) -> int:
        """Number of features D."""
        return self.x.shape[2]

    @property
    def n_folds(self) -> int:
        """Number of folds F."""
        return len(self.folds)

    def example(self, number: int) -> Tensor:
        """Return at most so many training rows of the first fold, as it reads them, evenly spread: (B, D)."""
        train = self.folds[0].train
        places = torch.linspace(0, len(train) - 1, min(number, len(train))).long()
        return self.x[self.copies[0], train[places.to(self.device)]]

    @property
    def device(self) -> torch.device:
        """Where all tensors lie."""
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        """The float type of x and of a regression's y; weights are float64."""
        return self.x.dtype

    @cached_property
    def first_equal(self) -> tuple[Tensor | None, ...]:
        """Of each fold's validation rows the first that equals each, (m_f,) int64; None for a fold without equals."""
        return tuple(first_equal(self.x[copy, fold.valid]) for copy, fold in zip(self.copies, self.folds))


def make_dataset(
    raw: np.ndarray | Tensor,
    layout: Layout,
    target: Target,
    folds: Sequence[Rows],
    *,
    numbers: Numbers = "standard",
    sample_weight: Any = None,
    class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Dataset, tuple[Statistics, ...]]:
    """Fit each fold's statistics on its training rows, transform, and move to the device.

    ``raw`` (n, D) is what ``layout.raw`` returned. Returns the dataset and one Statistics a fold. Raises InputError
    for weights that do not fit (weights.py).
    """
    weights = check_weights(sample_weight, class_weight, target)
    statistics = tuple(fit_statistics(raw, layout, train, numbers=numbers) for train, _ in folds)
    distinct, copies = _distinct(raw, statistics)
    x = torch.empty((len(distinct), *raw.shape), dtype=dtype, device=device)
    for copy, fitted in zip(x, distinct):
        copy.copy_(torch.as_tensor(transform(raw, fitted)))
    y, center, scale = _standardise(target, folds)
    rows = [weights.for_fold(target, train) for train, _ in folds]
    dataset = Dataset(
        x=x,
        copies=copies,
        y=torch.as_tensor(y, device=device).to(torch.int64 if target.classes is not None else dtype),
        weights=_stack(rows, device),
        folds=tuple(Fold(_positions(train, device), _positions(valid, device)) for train, valid in folds),
        present=_present(target, folds, device),
        center=torch.as_tensor(center, device=device),
        scale=torch.as_tensor(scale, device=device),
        n_outputs=target.n_outputs,
        task=target.task,
        target=torch.as_tensor(target.values, device=device),
    )
    return dataset, statistics


def _positions(rows: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.as_tensor(np.asarray(rows, dtype=np.int64), device=device)


def _distinct(
    raw: np.ndarray | Tensor, statistics: Sequence[Statistics]
) -> tuple[list[Statistics], tuple[int, ...]]:
    """Return the statistics that give different copies of X, and which of them each fold uses."""
    lost = raw.isnan().any(0).cpu().numpy() if isinstance(raw, Tensor) else np.isnan(raw).any(0)
    distinct: dict[bytes, int] = {}
    kept: list[Statistics] = []
    copies = []
    for fitted in statistics:
        # The fill of a column without missing values changes nothing.
        parts = (
            np.where(lost, fitted.fill, 0.0),
            fitted.center,
            fitted.scale,
            fitted.ranked,
            fitted.quantiles,
        )
        key = b"".join(part.tobytes() for part in parts)
        if key not in distinct:
            distinct[key] = len(kept)
            kept.append(fitted)
        copies.append(distinct[key])
    return kept, tuple(copies)


def _standardise(target: Target, folds: Sequence[Rows]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return y, center (F,) and scale (F,); y is (n,) class codes, or (F, n) standardised numbers."""
    if target.classes is not None:
        return target.values, np.zeros(len(folds)), np.ones(len(folds))
    center = np.array([target.values[train].mean() for train, _ in folds])
    scale = np.array([target.values[train].std() for train, _ in folds])
    # A constant target has a standard deviation of rounding errors, not of 0.
    constant = np.array([np.ptp(target.values[train]) == 0 for train, _ in folds])
    scale = np.where(constant | (scale == 0), 1.0, scale)
    return (target.values - center[:, None]) / scale[:, None], center, scale


def _stack(rows: Sequence[np.ndarray | None], device: torch.device | str) -> Tensor | None:
    length = next((len(row) for row in rows if row is not None), None)
    if length is None:
        return None
    stacked = np.stack([np.ones(length) if row is None else row for row in rows])
    return torch.as_tensor(stacked, dtype=torch.float64, device=device)


def _present(target: Target, folds: Sequence[Rows], device: torch.device | str) -> Tensor | None:
    if target.classes is None:
        return None
    counts = [np.bincount(target.values[train], minlength=target.n_outputs) for train, _ in folds]
    present = np.stack(counts) > 0
    return None if present.all() else torch.as_tensor(present, device=device)


def pack_folds(folds: Sequence[Rows]) -> list[list[str]]:
    """Return (train, valid) row positions as pairs of text; sorted ones take a few bits a row."""
    return [[_pack(train), _pack(valid)] for train, valid in folds]


def unpack_folds(packed: Sequence[Sequence[str]]) -> list[Rows]:
    """Return the row positions, int64, that ``pack_folds`` packed, in the same order."""
    return [(_unpack(train), _unpack(valid)) for train, valid in packed]


def _pack(rows: np.ndarray) -> str:
    steps = np.diff(np.asarray(rows, dtype="<i8"), prepend=0)
    return base64.b64encode(zlib.compress(steps.astype("<i8").tobytes())).decode()


def _unpack(text: str) -> np.ndarray:
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8")
    return np.cumsum(steps, dtype=np.int64)
