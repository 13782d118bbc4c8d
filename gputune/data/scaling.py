"""Scale a table for each fold: store one scaled copy per fold, or scale each minibatch.

New rows are scaled in the same way as the rows of a fold. V counts the copies, n rows, D features
and F folds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gputune.data.arrays import ArrayLayout, ArrayStatistics
from gputune.data.columns import Layout
from gputune.data.encode import Statistics, transform
from gputune.data.table import Table


@dataclass(frozen=True, eq=False)
class Scaling:
    """The scaling of one input's minibatches: ``(input - center) / scale``, with values for each
    fold.

    ``center`` and ``scale`` are (F folds, ...) in the dtype of the study. The other axes match the
    axes of a row. An axis such as channels has its own values. Any other axis has size 1. With
    ``missing``, NaN means a missing value and becomes 0 after scaling, which is the mean of the
    fold's training rows.
    """

    center: Tensor
    scale: Tensor
    missing: bool = False

    @staticmethod
    def of(
        parts: Iterable[tuple[np.ndarray, np.ndarray]], like: Tensor, *, missing: bool = False
    ) -> "Scaling":
        """Return a scaling from pairs (center, scale), one pair per fold."""
        centers, scales = zip(*parts)
        center = torch.as_tensor(np.stack(centers)).to(like)
        scale = torch.as_tensor(np.stack(scales)).to(like)
        return Scaling(center, scale, missing)

    def of_fold(self, fold: int) -> "Scaling":
        """Return the scaling of one fold, copied to the CPU."""
        center = self.center[fold : fold + 1].cpu()
        scale = self.scale[fold : fold + 1].cpu()
        return Scaling(center, scale, self.missing)

    def __call__(self, rows: Tensor, folds: slice) -> Tensor:
        """Scale the rows of some folds, and return them.

        The rows are (F folds, ..., *row), where ``*row`` is the shape of one row.
        """
        center = self.center[folds]
        # (F, *row) -> (F, 1, ..., 1, *row), to broadcast over the gathered rows
        shape = (len(center), *[1] * (rows.dim() - center.dim()), *center.shape[1:])
        scaled = (rows.to(center.dtype) - center.view(shape)).div_(self.scale[folds].view(shape))
        return torch.where(scaled.isnan(), 0.0, scaled) if self.missing else scaled


SHARED_BEYOND = 2**28
"""The size in bytes of a table's copies above which all folds share one copy.

gputune scales the shared copy for each minibatch. Smaller tables have one scaled copy per fold,
because reading scaled rows is faster.
"""
_BLOCK = 2**22  # numbers per transformed block


def table_inputs(
    raw: np.ndarray | Tensor, statistics: Sequence[Statistics], like: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[Scaling | None, ...]]:
    """Return the scaled copies of a table, and for each fold the index of its copy.

    The copies are (V copies, n rows, D features). The third result is the ``Scaling`` of the
    table's minibatches, or None if the copies are completely scaled.
    """
    if isinstance(raw, Tensor):
        has_missing = raw.isnan().any(0).cpu().numpy()
    else:
        has_missing = np.isnan(raw).any(0)
    # Equal copies are stored once. The fill is ignored for columns without missing values, where it
    # has no effect.
    keys = []
    by_key: dict[bytes, Statistics] = {}
    for fitted in statistics:
        used = replace(fitted, fill=np.where(has_missing, fitted.fill, 0.0))
        key = b"".join(array.tobytes() for array in vars(used).values())
        keys.append(key)
        by_key.setdefault(key, fitted)
    distinct = list(by_key.values())
    copies = tuple(map(list(by_key).index, keys))
    scaling = None
    shape = (len(raw), statistics[0].n_inputs)
    if len(distinct) > 1 and len(distinct) * math.prod(shape) * like.element_size() > SHARED_BEYOND:
        scaling = _affine_maps(raw, has_missing, statistics, like)
    if scaling is not None:
        # one copy, scaled as for the first fold, in which missing values stay NaN
        distinct = [replace(statistics[0], fill=np.full(len(has_missing), np.nan))]
        copies = (0,) * len(copies)
    x = like.new_empty((len(distinct), *shape))
    rows = max(1, _BLOCK // shape[1])
    for copy, fitted in zip(x, distinct):
        for begin in range(0, len(raw), rows):
            block = raw[begin : begin + rows]
            copy[begin : begin + rows] = torch.as_tensor(transform(block, fitted))
    return (x,), copies, (scaling,)


def _affine_maps(
    raw: np.ndarray | Tensor,
    has_missing: np.ndarray,
    statistics: Sequence[Statistics],
    like: Tensor,
) -> Scaling | None:
    """Return the affine map from the rows scaled for the first fold to the rows scaled for each
    fold.

    The result is None if the folds differ by more than a shift and a factor. ``has_missing`` marks
    the columns with missing values. Missing values are filled with 0 after scaling, which is
    correct if the fill is the center.
    """
    for fitted in statistics:
        if fitted.ranked.size or fitted.clipped.size or fitted.places.size:
            return None
        if (fitted.fill != fitted.center)[has_missing].any():
            return None
    if limited_features(raw, statistics):
        return None
    # x_f = (x - center_f) / scale_f = (x_0 - (center_f - center_0) / scale_0) / (scale_f / scale_0)
    first = statistics[0]
    parts = []
    for fitted in statistics:
        shift = (fitted.center - first.center) / first.scale
        parts.append((shift, fitted.scale / first.scale))
    return Scaling.of(parts, like, missing=bool(has_missing.any()))


def limited_features(raw: np.ndarray | Tensor, statistics: Sequence[Statistics]) -> list[int]:
    """Return the positions of features with values that at least one fold clips at its limits.

    Each feature must be one network input.
    """
    extremes: np.ndarray | Tensor  # (2, D): smallest and largest number of each column
    if isinstance(raw, Tensor):
        extremes = torch.stack(torch.where(raw.isnan(), 0.0, raw).aminmax(dim=0))
    else:
        extremes = np.nan_to_num(np.stack([np.fmin.reduce(raw), np.fmax.reduce(raw)]))
    limited = torch.zeros(raw.shape[1], dtype=torch.bool)
    for fitted in statistics:
        if fitted.least.size:
            # A column is clipped only if its smallest or largest number is.
            unlimited = replace(fitted, least=np.empty(0), most=np.empty(0))
            clipped = torch.as_tensor(transform(extremes, fitted))
            limited |= (clipped != torch.as_tensor(transform(extremes, unlimited))).any(0).cpu()
    places: list[int] = limited.nonzero().flatten().tolist()
    return places


def scaling_of(statistics: Sequence[ArrayStatistics], like: Tensor) -> tuple[Scaling | None, ...]:
    """Return the scaling of each input of a module, or None for an input that stays unchanged.

    The inputs are arrays such as images. Tables have ``table_inputs``.
    """
    by_input = zip(*(fitted.channels for fitted in statistics))
    # An input is scaled for all folds or for no fold.
    return tuple(None if folds[0] is None else Scaling.of(folds, like) for folds in by_input)


def encode(
    X: object,
    layout: Layout | ArrayLayout,
    statistics: Statistics | ArrayStatistics,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Convert new rows, a table or arrays, to the inputs (n, ...) of a network.

    The rows are scaled like the rows of ``Dataset.rows``.
    """
    if isinstance(layout, Layout):
        assert isinstance(statistics, Statistics) and isinstance(X, Table)
        return (torch.from_numpy(transform(layout.raw(X), statistics)).to(dtype),)
    assert isinstance(statistics, ArrayStatistics)
    scalings = scaling_of([statistics], torch.empty(0, dtype=dtype))
    inputs = []
    for x, scaling in zip(layout.raw(X).gathered(), scalings):
        if scaling is not None:
            x = scaling(x[None].cpu(), slice(0, 1))[0]
        elif x.is_floating_point():
            x = x.to(dtype)
        inputs.append(x)
    return tuple(inputs)


def joined_statistics(parts: Sequence[Statistics]) -> Statistics:
    """Join several preparations of one table, for a network that receives the inputs of all.

    The ``Statistics`` of a preparation are its means, scales and other fitted values. All parts
    were fitted on the same rows, with different values of ``numbers`` (the preparation of numeric
    columns). The joined statistics produce the inputs of the first part, then the inputs of the
    second part, and so on.
    """
    begin = 0  # position of the part's first input among all inputs
    complete = []
    for part in parts:
        ranked = part.ranked + begin
        clipped = part.clipped + begin
        begin += part.n_inputs
        part = replace(part, ranked=ranked, clipped=clipped)
        if not part.places.size:
            # Features that are one input each. Their places and limits are written out, because
            # other parts have some. The largest float stands for no limit, since JSON has no inf.
            part = replace(part, places=np.arange(part.n_inputs))
            if not part.least.size:
                most = np.full(part.n_inputs, np.finfo(np.float64).max)
                part = replace(part, least=-most, most=most)
        complete.append(part)
    names = ("center", "scale", "places", "least", "most", "ranked", "clipped")
    joined = {name: np.concatenate([getattr(part, name) for part in complete]) for name in names}
    # Only one preparation, "quantile", has quantiles.
    quantiles = next((part.quantiles for part in parts if part.ranked.size), parts[0].quantiles)
    return Statistics(fill=parts[0].fill, quantiles=quantiles, **joined)
