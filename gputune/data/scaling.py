"""Scale a table for each fold: one copy per fold, or one copy that is scaled when rows are
gathered.

New rows are prepared like those of a fold.
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
    """The scaling of gathered rows of an input: ``(input - center) / scale`` of the fold.

    ``center`` and ``scale`` are (F, ...) in the dtype of the study. The other axes match those of a
    row: size 1, or the size of an axis with its own values, such as channels. With ``missing``, NaN
    means a missing number. It becomes 0, the mean of the fold's training rows.
    """

    center: Tensor
    scale: Tensor
    missing: bool = False

    @staticmethod
    def of(
        parts: Iterable[tuple[np.ndarray, np.ndarray]], like: Tensor, *, missing: bool = False
    ) -> "Scaling":
        """Return the scaling made from the (center, scale) of each fold."""
        center, scale = (torch.as_tensor(np.stack(part)).to(like) for part in zip(*parts))
        return Scaling(center, scale, missing)

    def of_fold(self, fold: int) -> "Scaling":
        """Return the scaling of only one fold, on the CPU."""
        return replace(
            self, center=self.center[fold : fold + 1].cpu(), scale=self.scale[fold : fold + 1].cpu()
        )

    def __call__(self, rows: Tensor, folds: slice) -> Tensor:
        """Return the scaled rows (F, ..., *row) of some folds."""
        center = self.center[folds]
        # (F, *row) -> (F, 1, ..., 1, *row), to broadcast over the gathered rows
        shape = (len(center), *[1] * (rows.dim() - center.dim()), *center.shape[1:])
        scaled = (rows.to(center.dtype) - center.view(shape)).div_(self.scale[folds].view(shape))
        return torch.where(scaled.isnan(), 0.0, scaled) if self.missing else scaled


SHARED_BEYOND = 2**28
"""Size of a table's copies in bytes above which folds share one copy, scaled at each gather.

Small copies are read faster.
"""
_BLOCK = 2**22  # numbers per transformed block


def table_inputs(
    raw: np.ndarray | Tensor, statistics: Sequence[Statistics], like: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[Scaling | None, ...]]:
    """Return a table's copies (V, n, D), the copy index of each fold, and the scaling of the
    table."""
    lost = raw.isnan().any(0).cpu().numpy() if isinstance(raw, Tensor) else np.isnan(raw).any(0)
    # Equal copies are stored once. The fill is ignored for columns without missing values, where it
    # has no effect.
    alike = [replace(fitted, fill=np.where(lost, fitted.fill, 0.0)) for fitted in statistics]
    keys = [b"".join(part.tobytes() for part in vars(fitted).values()) for fitted in alike]
    order = list(dict.fromkeys(keys))
    distinct = [statistics[keys.index(key)] for key in order]
    copies = tuple(map(order.index, keys))
    scaling = None
    shape = (len(raw), statistics[0].n_inputs)
    if len(distinct) > 1 and len(distinct) * math.prod(shape) * like.element_size() > SHARED_BEYOND:
        scaling = _from_first(raw, lost, statistics, like)
    if scaling is not None:
        distinct = [replace(statistics[0], fill=np.full(len(lost), np.nan))]
        copies = (0,) * len(copies)
    x = like.new_empty((len(distinct), *shape))
    rows = max(1, _BLOCK // shape[1])
    for copy, fitted in zip(x, distinct):
        for begin in range(0, len(raw), rows):
            block = raw[begin : begin + rows]
            copy[begin : begin + rows] = torch.as_tensor(transform(block, fitted))
    return (x,), copies, (scaling,)


def _from_first(
    raw: np.ndarray | Tensor, lost: np.ndarray, statistics: Sequence[Statistics], like: Tensor
) -> Scaling | None:
    """Return the affine map from the first fold's rows to the rows of each fold.

    None if the rows differ by more than a shift and a factor. ``lost`` marks the columns with
    missing values. Missing values are filled with 0 after scaling, which is correct if the fill is
    the center.
    """
    first = statistics[0]
    for s in statistics:
        if s.ranked.size or s.clipped.size or s.places.size or (s.fill != s.center)[lost].any():
            return None
    if limited_features(raw, statistics):
        return None
    # x_f = (x - center_f) / scale_f = (x_0 - (center_f - center_0) / scale_0) / (scale_f / scale_0)
    parts = [((s.center - first.center) / first.scale, s.scale / first.scale) for s in statistics]
    return Scaling.of(parts, like, missing=bool(lost.any()))


def limited_features(raw: np.ndarray | Tensor, statistics: Sequence[Statistics]) -> list[int]:
    """Return the positions of features with a number beyond the limits of a fold.

    The features must be one input each.
    """
    ends: np.ndarray | Tensor  # (2, D): smallest and largest number of each column
    if isinstance(raw, Tensor):
        ends = torch.stack(torch.where(raw.isnan(), 0.0, raw).aminmax(dim=0))
    else:
        ends = np.nan_to_num(np.stack([np.fmin.reduce(raw), np.fmax.reduce(raw)]))
    limited = torch.zeros(raw.shape[1], dtype=torch.bool)
    for fitted in statistics:
        # The ends decide: a column is clipped only if its smallest or largest number is.
        free = replace(fitted, least=np.empty(0), most=np.empty(0))
        if fitted.least.size:
            within, beyond = (torch.as_tensor(transform(ends, one)).cpu() for one in (fitted, free))
            limited |= (within != beyond).any(0)
    places: list[int] = limited.nonzero().flatten().tolist()
    return places


def scaling_of(statistics: Sequence[ArrayStatistics], like: Tensor) -> tuple[Scaling | None, ...]:
    """Return the scaling of each input that is not a table, or None for an unscaled input."""
    channels = zip(*(fitted.channels for fitted in statistics))
    return tuple(None if of[0] is None else Scaling.of(of, like) for of in channels)


def encode(
    X: object,
    layout: Layout | ArrayLayout,
    statistics: Statistics | ArrayStatistics,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Return the inputs of a module from a table or arrays, each (n, ...), as ``Dataset.rows``
    does."""
    if isinstance(layout, Layout):
        assert isinstance(statistics, Statistics) and isinstance(X, Table)
        return (torch.from_numpy(transform(layout.raw(X), statistics)).to(dtype),)
    assert isinstance(statistics, ArrayStatistics)
    scaling = scaling_of([statistics], torch.empty(0, dtype=dtype))
    return tuple(
        x.to(dtype if x.is_floating_point() else x.dtype)
        if scale is None
        else scale(x[None].cpu(), slice(0, 1))[0]
        for x, scale in zip(layout.raw(X).gathered(), scaling)
    )


def side_by_side(parts: Sequence[Statistics]) -> Statistics:
    """Return statistics that produce the inputs of all parts, one part after another.

    The parts were fitted on the same rows with different preparations.
    """
    begins = np.cumsum([0, *(part.n_inputs for part in parts)])
    whole = []
    for part in parts:
        # features that are one input each: their places and ends are written out
        if not part.places.size:
            most = np.full(part.n_inputs, np.finfo(np.float64).max)  # which JSON can write
            least, most = (part.least, part.most) if part.least.size else (-most, most)
            part = replace(part, places=np.arange(len(most)), least=least, most=most)
        whole.append(part)
    joined = ("center", "scale", "places", "least", "most")
    positions = ("ranked", "clipped")
    return Statistics(
        fill=parts[0].fill,
        quantiles=next((part.quantiles for part in parts if part.ranked.size), parts[0].quantiles),
        **{name: np.concatenate([getattr(part, name) for part in whole]) for name in joined},
        **{
            name: np.concatenate([getattr(part, name) + at for part, at in zip(parts, begins)])
            for name in positions
        },
    )
