"""Estimate the share of rows on which a model was trained, by a sample of row digests in the model.

The sample holds the smallest digests of all training rows (a bottom-k sketch; Cohen & Kaplan, 2007,
Summarizing data using bottom-k sketches). The digests of other rows up to the same bound are a
random sample of these rows. The share of these digests that is also in the model's sample estimates
the share of rows on which the model was trained.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gputune.annotations import FloatArray
from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.columns import Layout
from gputune.data.table import Table

SAMPLE_SIZE = 1024
"""The number of digests that a model keeps. With fewer training rows the answer is exact."""

# bytes per digest: enough to tell a million rows apart from 1024, and short in the file
_BYTES = 6
_ROWS = 8192  # rows per batch of digests
_KEY_SEED = 0x6770


def sample_of_rows(layout: Layout | ArrayLayout, X: Table | Tensor | Arrays, y: np.ndarray) -> str:
    """Return the smallest digests of the training rows, in hexadecimal, for ``share_of_rows``.

    Args:
        layout: the layout of the model, which describes the content of a row.
        X: the training rows.
        y: (n, ...) class codes or numbers of these rows.
    """
    smallest = np.unique(_digests(layout, X, y))[:SAMPLE_SIZE]
    return b"".join(int(digest).to_bytes(_BYTES, "big") for digest in smallest).hex()


def share_of_rows(
    sample: str, layout: Layout | ArrayLayout, X: Table | Tensor | Arrays, y: np.ndarray
) -> float:
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
    starts = range(0, len(content), _BYTES)
    numbers = [int.from_bytes(content[start : start + _BYTES], "big") for start in starts]
    trained = np.array(numbers, dtype=np.uint64)
    digests = _digests(layout, X, y)
    if len(trained) >= SAMPLE_SIZE:  # otherwise it holds all training rows
        digests = digests[digests <= trained.max()]
    return float(np.isin(digests, trained).mean()) if len(digests) else 0.0


def _digests(
    layout: Layout | ArrayLayout, X: Table | Tensor | Arrays, y: np.ndarray
) -> NDArray[np.uint64]:
    """Return one digest per row, (n,), of the row's encoded values and its target."""
    target = np.asarray(y, dtype=np.float64).reshape(len(y), -1)
    digests = []
    start = 0
    for parts in _numbers(layout, X):
        rows = len(parts[0])
        digests.append(_digests_of(np.concatenate([*parts, target[start : start + rows]], axis=1)))
        start += rows
    return np.concatenate(digests)


def _numbers(
    layout: Layout | ArrayLayout, X: Table | Tensor | Arrays
) -> Iterator[list[FloatArray]]:
    """Yield the encoded values of a batch of rows at a time, (n, d) float64 for each input."""
    for start in range(0, len(X), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(X)))
        inputs: tuple[Tensor, ...]
        if isinstance(layout, ArrayLayout):
            inputs = layout.raw(X).select(rows).gathered()
        elif isinstance(X, Tensor):
            inputs = (layout.raw(X[rows]),)
        else:
            assert isinstance(X, Table)
            inputs = (torch.from_numpy(layout.raw(X.select(rows))),)
        yield [part.double().reshape(len(rows), -1).cpu().numpy() for part in inputs]


def _digests_of(numbers: FloatArray) -> NDArray[np.uint64]:
    """Return one digest per row, (n,), of encoded values (n, d).

    The digest is a sum over the columns. Each column has its own random factor, and the bits of
    each value are mixed first.
    """
    numbers = numbers + 0.0  # -0.0 becomes 0.0
    numbers[np.isnan(numbers)] = np.nan  # NaN has many bit patterns
    generator = np.random.Generator(np.random.PCG64(_KEY_SEED))
    factors = generator.integers(2**64, size=numbers.shape[1], dtype=np.uint64)
    # Odd factors can be inverted modulo 2^64, so the products lose no bits.
    factors = factors | 1
    bits = _mixed(numbers.view(np.uint64))
    sums = (bits * factors).sum(axis=1, dtype=np.uint64)  # (n, d) -> (n,)
    # only the highest bytes are kept
    return _mixed(sums) >> np.uint64(64 - 8 * _BYTES)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return integers in which each bit depends on all bits of the given integers.

    Source: MurmurHash3's 64-bit finalizer.
    """
    bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    bits = (bits ^ (bits >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return bits ^ (bits >> np.uint64(33))
