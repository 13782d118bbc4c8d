"""Torch tensors as tables of numbers: checked, summed up and compared where they lie."""

import numpy as np
import torch
from torch import Tensor

from gputune.data.columns import Column, fit_column
from gputune.data.table import FLATTEN
from gputune.errors import InputError

_ODD = 0x9E3779B97F4A7C15 - 2**64
"""Multiplier of a hash of rows: the golden ratio's bits, of which splitmix64 makes streams."""


def tensor_names(X: Tensor) -> tuple[str, ...]:
    """Return the names of a tensor's columns, as for arrays: x0, x1, ..."""
    return tuple(f"x{j}" for j in range(X.shape[1]))


def checked_tensor(X: Tensor) -> Tensor:
    """Return a dense (n, D) tensor of finite or missing floats on its device; InputError for anything else.

    Integers become float64, half precision becomes float32.
    """
    if X.layout is not torch.strided:
        raise InputError("X is a sparse tensor, and only dense input is supported; pass X.to_dense().")
    if X.ndim != 2 or 0 in X.shape:
        shape = tuple(X.shape)
        raise InputError(
            f"X must be two-dimensional with at least one row and column, got shape {shape}; {FLATTEN}."
        )
    if X.is_complex():
        raise InputError(f"X must hold real numbers, got {X.dtype}; pass X.real and X.imag as columns.")
    X = X.detach()
    if not X.is_floating_point():
        return X.double()
    infinite = X.isinf().any(0).nonzero().flatten().tolist()
    if infinite:
        raise InputError(
            f"column 'x{infinite[0]}' has an infinite value; replace it by NaN (missing) or clip it."
        )
    return X.float() if X.dtype.itemsize < 4 else X


def fit_tensor_columns(X: Tensor, *, keep: bool = False) -> list[tuple[Column, tuple[str, ...]]]:
    """Decide as ``fit_column`` does for numbers; three numbers a column leave the device."""
    lost = X.isnan()
    low = torch.where(lost, torch.inf, X).amin(0)
    high = torch.where(lost, -torch.inf, X).amax(0)
    summary = torch.stack([low, high, lost.any(0).to(X.dtype)], dim=1).cpu().double().numpy()
    # Stand-in values with the same answers: the smallest, the largest, and a missing one where there is any.
    columns = [np.array([lo, hi, np.nan] if lost else [lo, hi]) for lo, hi, lost in summary]
    columns = [np.where(np.isinf(values), np.nan, values) for values in columns]
    return [
        fit_column(name, "number", values, max_levels=0, min_count=0, keep=keep)
        for name, values in zip(tensor_names(X), columns)
    ]


def tensor_moments(part: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and scale of the known values, each (D,), summed in float64 on the tensor's device.

    The scale is the standard deviation, or 1 where it is no more than a rounding error. Source: scikit-learn's
    StandardScaler.
    """
    lost = part.isnan()
    count = (~lost).sum(0).clamp(min=1)
    mean = part.nansum(0, dtype=torch.float64) / count
    gap = torch.where(lost, 0.0, part - mean.to(part.dtype))
    variance = gap.square().sum(0, dtype=torch.float64) / count
    eps = torch.finfo(torch.float64).eps
    constant = variance <= count * eps * variance + (count * mean * eps) ** 2
    scale = torch.where(constant, 1.0, variance.sqrt())
    return mean.cpu().numpy(), scale.cpu().numpy()


def first_equal(rows: Tensor) -> Tensor | None:
    """Return the position of the first row that equals each of the rows (n, D), (n,) int64; None where all differ.

    A matrix product computes a row by other instructions at the edge of a block than within it, so that equal rows
    may come out with unlike last bits; ``outputs[first_equal(rows)]`` are outputs in which they are equal.
    """
    bits = torch.int64 if rows.dtype == torch.float64 else torch.int32
    key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in rows.T:
        key = (key ^ (column + 0.0).view(bits)) * _ODD  # + 0.0 makes 0.0 of -0.0, which is equal to it
        key = key ^ (key >> 29)
    group = torch.unique(key, return_inverse=True)[1]
    number = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(number, len(rows)).scatter_reduce(0, group, number, "amin")[group]
    later = (first != number).nonzero().flatten()
    unlike = later[(rows[later] != rows[first[later]]).any(1)]  # with one key by chance
    first[unlike] = unlike
    return None if len(later) == len(unlike) else first
