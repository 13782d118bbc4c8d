"""The outputs of trials on the rows that their folds validate on, each at its best epoch: what ensembles are made of.

All of them together have a limit; the worst trials go without. A study is read with this file, and must not wait for
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEPT_BYTES = 128 << 20
"""Bytes of the outputs that a study keeps, and of those that a chunk keeps while it trains."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of one trial after ``epoch`` epochs: ``values`` (N, K), float32, on the validation rows of fold after fold."""

    epoch: int
    values: NDArray[np.float32]


def drop_beyond_limit(outputs: dict[int, Outputs], scores: Mapping[int, float]) -> None:
    """Take out of the outputs of trials those of the worst, where all take too many bytes."""
    for number in beyond_limit({number: one.values.nbytes for number, one in outputs.items()}, scores):
        del outputs[number]


def beyond_limit(sizes: Mapping[int, int], scores: Mapping[int, float]) -> list[int]:
    """Return the trials that go without where all take too many bytes: the worst, of equal ones the oldest."""
    order = sorted(sizes, key=lambda number: (scores[number], number), reverse=True)
    total = np.cumsum([sizes[number] for number in order])
    return [number for number, size in zip(order, total) if size > KEPT_BYTES]
