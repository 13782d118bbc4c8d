"""What the compiled library is asked to do, in the layout of its ``Work``: sizes, and where the arrays lie."""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_NUMBERS = (
    "folds", "trials", "inputs", "width", "outputs", "layers", "activation", "optimizer", "classes", "rows", "epoch",
    "horizon",
)  # fmt: skip
_BEFORE = ("x", "copies", "y", "weights", "present", "order", "lengths")
_AFTER = (
    "widths", "sizes", "schedule", "lr", "decay", "momentum", "dropout", "draws", "draw_start", "draw_rows", "theta",
    "first", "second", "valid", "valid_start", "scored", "accuracy", "nanoseconds", "queue",
)  # fmt: skip

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
"""In the order of the library's numbers for them."""


class Work(ctypes.Structure):
    """``member.h`` says what each field is."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _BEFORE),
        ("longest", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _AFTER),
    )


def make_work(numbers: Mapping[str, int], arrays: Mapping[str, Any]) -> Work:
    """Return a Work of numbers and of contiguous tensors or arrays (None: NULL), which must outlive it."""
    return Work(**numbers, **{name: _address(value) for name, value in arrays.items()})


def _address(value: np.ndarray | torch.Tensor | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return value.data_ptr()
    assert value.flags.c_contiguous
    return value.ctypes.data
