"""Estimate the share of rows on which a model was trained, by a sample of row digests in the model.

The sample holds the smallest digests of all training rows (a bottom-k sketch; Cohen & Kaplan, 2007,
Summarizing data using bottom-k sketches). The digests of other rows up to the same bound are a
random sample of these rows. The share of these digests that is also in the model's sample estimates
the share of rows on which the model was trained.
"""

import hashlib
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gputune.data.arrays import ArrayLayout
from gputune.data.columns import AnyRows, Layout
from gputune.data.table import Table

SAMPLE_SIZE = 1024
"""The number of digests that a model keeps. With fewer training rows the answer is exact."""

# bytes per digest: enough to tell a million rows apart from 1024, and short in the file
_BYTES = 6
_ROWS = 8192  # rows per batch of digests
_AnyLayout = Layout | ArrayLayout
_Bits: TypeAlias = NDArray[np.uint64]


class RowSample(str):
    """A sample of row digests in hexadecimal, which ``print(model.info)`` shows in a few words."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self) // (2 * _BYTES)} row digests>"


def sample_of_rows(layout: _AnyLayout, X: AnyRows, y: np.ndarray) -> RowSample:
    """Return the smallest digests of the training rows, in hexadecimal, for ``share_of_rows``.

    Args:
        layout: the layout of the model, which describes the content of a row.
        X: the training rows.
        y: (n, ...) class codes or numbers of these rows.
    """
    content = b""
    smallest = np.unique(_digests(layout, X, y))[:SAMPLE_SIZE]
    for digest in smallest.tolist():
        content += digest.to_bytes(_BYTES, "big")
    return RowSample(content.hex())


def share_of_rows(sample: str, layout: _AnyLayout, X: AnyRows, y: np.ndarray) -> float:
    """Return the estimated share, 0 to 1, of rows that equal rows on which the model was trained.

    Args:
        sample: the result of ``sample_of_rows``.
        layout: the layout of the model.
        X: the rows.
        y: (n, ...) class codes or numbers of these rows.

    Raises:
        ValueError: ``sample`` is not a result of ``sample_of_rows``.
    """
    content = bytes.fromhex(sample)
    numbers = []
    for start in range(0, len(content), _BYTES):
        numbers.append(int.from_bytes(content[start : start + _BYTES], "big"))
    trained = np.array(numbers, dtype=np.uint64)
    digests = _digests(layout, X, y)
    if len(trained) >= SAMPLE_SIZE:  # otherwise it holds all training rows
        digests = digests[digests <= trained.max()]
    if len(digests) == 0:
        return 0.0
    return float(np.isin(digests, trained).mean())


def _digests(layout: _AnyLayout, X: AnyRows, y: np.ndarray) -> _Bits:
    """Return a digest of each row's encoded values and target, (n,)."""
    target = np.asarray(y, dtype=np.float64)
    target = target.reshape(len(y), -1)
    digests = []
    for start in range(0, len(X), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(X)))
        columns = []
        for part in _inputs(layout, X, rows):
            values = part.double().reshape(len(rows), -1)
            columns.append(values.numpy(force=True))
        columns.append(target[rows])
        numbers = np.concatenate(columns, axis=1) + 0.0  # -0.0 becomes 0.0
        numbers[np.isnan(numbers)] = np.nan  # NaN has many bit patterns
        for row in numbers:
            digest = hashlib.blake2b(row.tobytes(), digest_size=_BYTES).digest()
            digests.append(int.from_bytes(digest, "big"))
    return np.array(digests, dtype=np.uint64)


def _inputs(layout: _AnyLayout, X: AnyRows, rows: np.ndarray) -> tuple[Tensor, ...]:
    """Return the encoded values of some rows, (n, ...) for each input."""
    if isinstance(layout, ArrayLayout):
        return layout.raw(X).select(rows).gathered()
    if isinstance(X, Tensor):
        return (layout.raw(X[rows]),)
    assert isinstance(X, Table)
    return (torch.from_numpy(layout.raw(X.select(rows))),)
