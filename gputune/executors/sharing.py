"""A dataset on its way to other processes: arrays for tensors, which they map into their memory.

An input whose memory is a file's already, such as one of ``np.load(mmap_mode="r")``, is not copied: a process of this
machine maps that file again.
"""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset, Fold, Inputs
from gputune.data.scaling import Scaling
from gputune.errors import InputError

_LARGE = 1 << 20  # bytes from which a tensor's file is looked for


@dataclass(frozen=True)
class MappedFile:
    """Where the values of a tensor lie in a file: from the byte ``begin`` on, with ``strides`` in bytes."""

    path: str
    file: tuple[int, int]  # device and inode, by which the file is known again
    begin: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Return the values, mapped. Raises InputError where the file is another one by now."""
        if _identity(self.path) != self.file:
            raise InputError(
                f"the file {self.path!r}, which X is mapped from, was moved or replaced while it was being used; leave "
                "it in its place until the search has ended."
            )
        # Copy-on-write: torch wants memory that could be written, and nobody writes to it.
        size = _extent(self.shape, self.strides, np.dtype(self.dtype).itemsize)
        memory = np.memmap(self.path, np.uint8, "c", self.begin, (size,))
        return np.ndarray(self.shape, self.dtype, memory, 0, self.strides)


@dataclass(frozen=True)
class BFloat16:
    """The bits of a bfloat16 tensor, as int16: NumPy has no such numbers."""

    bits: np.ndarray


def map_tensors(value: object, change: Any) -> Any:
    """Return a dataset with ``change`` of every tensor, or of everything that stands for one."""
    if isinstance(value, Tensor | np.ndarray | MappedFile | BFloat16):
        return change(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(item, change) for item in value)
    if isinstance(value, dict):  # of what is made when it is asked for, what is there
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, Dataset | Fold | Inputs | Scaling):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


def to_arrays(data: Dataset, *, here: bool = False) -> Dataset:
    """Return a dataset on the CPU with arrays for tensors, which joblib and Ray map into a process's memory.

    For a process ``here``, on this machine, a tensor whose memory is a file's is where it lies in that file.
    """

    def change(tensor: Tensor) -> np.ndarray | MappedFile | BFloat16:
        if tensor.dtype == torch.bfloat16:
            return BFloat16(tensor.view(torch.int16).numpy())
        return (mapped_file(tensor) if here else None) or tensor.numpy()

    arrays: Dataset = map_tensors(data, change)
    return arrays


def to_tensors(data: Dataset) -> Dataset:
    """Return the dataset of ``to_arrays``."""

    def change(value: np.ndarray | MappedFile | BFloat16) -> Tensor:
        if isinstance(value, BFloat16):
            return torch.from_numpy(value.bits).view(torch.bfloat16)
        return torch.from_numpy(value.array() if isinstance(value, MappedFile) else value)

    tensors: Dataset = map_tensors(data, change)
    return tensors


def to_device(data: Dataset, device: torch.device) -> Dataset:
    """Return a dataset with its tensors on a device, but for inputs that stay in main memory."""
    on_device: Dataset = map_tensors(data, lambda tensor: tensor.to(device))
    return replace(on_device, inputs=data.inputs) if data.on_host else on_device


def mapped_file(tensor: Tensor) -> MappedFile | None:
    """Return where a tensor lies in a file that this process has mapped, None where it does not, or may be written to.

    Linux alone says so, in /proc/self/maps; elsewhere the answer is None.
    """
    array = tensor.numpy()
    size = _extent(array.shape, array.strides, array.itemsize)
    if size < _LARGE:
        return None
    start = tensor.data_ptr()
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        ends, access, offset, _, inode, *path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in ends.split("-"))
        if low <= start < high:
            private = access[1] == "w" and access[3] == "p"  # what was written is not in the file
            if inode == "0" or not path or private or start + size > high or (file := _identity(path[0])) is None:
                return None
            begin = start - low + int(offset, 16)
            return MappedFile(path[0], file, begin, array.dtype.str, array.shape, array.strides)
    return None


def _extent(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Return the bytes from the first value to the end of the last one."""
    return sum((n - 1) * step for n, step in zip(shape, strides)) + itemsize


def _identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file, None where it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
