"""Estimate the share of rows on which a model was trained, by a sample of row digests in the model.

The sample holds the smallest digests of all training rows (a bottom-k sketch; Cohen & Kaplan, 2007,
Summarizing data using bottom-k sketches). The digests of other rows up to the same bound are a
random sample of these rows. The share of these digests that is also in the model's sample estimates
the share of rows on which the model was trained.
"""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gputune.annotations import FloatArray
from gputune.data.arrays import ArrayLayout
from gputune.data.columns import AnyRows, Layout
from gputune.data.table import Table

SAMPLE_SIZE = 1024
"""The number of digests that a model keeps. With fewer training rows the answer is exact."""

# bytes per digest: enough to tell a million rows apart from 1024, and short in the file
_BYTES = 6
_ROWS = 8192  # rows per batch of digests
_KEY_SEED = 0x6770
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
            numbers = part.double().reshape(len(rows), -1)
            columns.append(numbers.numpy(force=True))
        columns.append(target[rows])
        digests.append(_digests_of(np.concatenate(columns, axis=1)))
    return np.concatenate(digests)


def _inputs(layout: _AnyLayout, X: AnyRows, rows: np.ndarray) -> tuple[Tensor, ...]:
    """Return the encoded values of some rows, (n, ...) for each input."""
    if isinstance(layout, ArrayLayout):
        return layout.raw(X).select(rows).gathered()
    if isinstance(X, Tensor):
        return (layout.raw(X[rows]),)
    assert isinstance(X, Table)
    return (torch.from_numpy(layout.raw(X.select(rows))),)


def _digests_of(numbers: FloatArray) -> _Bits:
    """Return a digest of each row of encoded values (n, d), as (n,) integers.

    The digest is a sum over the columns. Each column has its own random factor, and the bits of
    each value are mixed first.
    """
    numbers = numbers + 0.0  # -0.0 becomes 0.0
    numbers[np.isnan(numbers)] = np.nan  # NaN has many bit patterns
    generator = np.random.Generator(np.random.PCG64(_KEY_SEED))
    factors = generator.integers(2**64, size=numbers.shape[1], dtype=np.uint64)
    # Odd factors can be inverted modulo 2^64, so the products lose no bits.
    factors = factors | 1
    products = _mixed(numbers.view(np.uint64)) * factors
    sums = products.sum(axis=1, dtype=np.uint64)  # (n, d) -> (n,)
    # only the highest bytes are kept
    return _mixed(sums) >> np.uint64(64 - 8 * _BYTES)


def _mixed(bits: _Bits) -> _Bits:
    """Return integers in which each bit depends on all bits of the given integers.

    Source: MurmurHash3's 64-bit finalizer.
    """
    shift = np.uint64(33)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        bits = bits ^ (bits >> shift)
        bits = bits * np.uint64(factor)
    return bits ^ (bits >> shift)
