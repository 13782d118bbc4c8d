"""Rows of many folds laid out in one array, so that folds of one form are fitted together."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gputune.sklearn.dataset import Rows


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
    weights = (
        None
        if first.weights is None
        else np.concatenate([w for w in (b.weights for b in blocks) if w is not None])
    )
    if first.classes is None:
        return Rows(X, np.concatenate([rows.y for rows in blocks]), weights, None, first.names)
    labels = np.concatenate([rows.classes[rows.y] for rows in blocks if rows.classes is not None])
    classes, codes = np.unique(labels, return_inverse=True)
    return Rows(X, codes.astype(np.int64), weights, classes, first.names)
