"""Functions on places: the positions and layouts of tensors in memory."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from gputune.modules.trace import Operation, Place, TraceError


def with_entry(values: Sequence[int], axis: int, entry: int) -> list[int]:
    """Return a copy of sizes or strides with a new entry for one axis."""
    return [entry if i == axis else value for i, value in enumerate(values)]


def broadcast_strides(place: Place, dim: int) -> list[int]:
    """Return a tensor's strides after broadcasting the tensor to ``dim`` axes."""
    strides = [0 if n == 1 else step for n, step in zip(place.shape, place.stride)]
    # axes are added in front
    return [0] * (dim - len(strides)) + strides


def part_of(place: Place, axis: int, begin: int, size: int, step: int = 1) -> Place:
    """Return the place in memory of a tensor's slice along one axis."""
    along = place.stride[axis]
    shape = with_entry(place.shape, axis, size)
    stride = with_entry(place.stride, axis, along * step)
    offset = place.offset + begin * along
    return replace(place, offset=offset, shape=tuple(shape), stride=tuple(stride))


def without_axis(place: Place, axis: int, index: int) -> Place:
    """Return the place in memory of a tensor's entries at one index of an axis. The axis is
    removed."""
    shape = [*place.shape]
    stride = [*place.stride]
    del shape[axis], stride[axis]
    offset = place.offset + index * place.stride[axis]
    return replace(place, offset=offset, shape=tuple(shape), stride=tuple(stride))


def is_contiguous(place: Place) -> bool:
    """Return whether a tensor's place in memory is contiguous, row by row."""
    # A tensor on this device has no memory.
    return torch.empty_strided(place.shape, place.stride, device="meta").is_contiguous()


def require(is_supported: bool, op: Operation, arguments: str = "these arguments") -> None:
    """Raise TraceError, which names an operation and its unsupported arguments, unless
    ``is_supported``."""
    if not is_supported:
        raise TraceError(f"{op.function} with {arguments} is not supported")


def pick(values: Sequence[int], axes: Iterable[int]) -> list[int]:
    """Return the sizes or strides of the selected axes."""
    return [values[axis] for axis in axes]
