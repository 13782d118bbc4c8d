"""The compiled training of members: C that was built when gputune was installed, for each level of the processor.

The libraries know nothing of Python or of torch: they are loaded through ctypes, and one wheel serves all versions.
"""

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent
LEVELS = (4, 3, 1)
"""Of x86-64: AVX-512; AVX2 with FMA; what every such processor has. Level 1 alone on other processors."""


class NotBuiltError(Exception):
    """Why there is no compiled library here."""


@functools.lru_cache(maxsize=2)
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library for float32 or float64 at the processor's level. Raises NotBuiltError."""
    kind = "double" if dtype == torch.float64 else "float"
    built = {level: path for level in LEVELS for path in FOLDER.glob(f"_{kind}{level}.*")}
    if 1 not in built:
        raise NotBuiltError(
            "this installation of gputune has no compiled code, as none could be built when it was installed: install "
            "gcc or clang, and then gputune anew, or a wheel of it that was built for this platform"
        )
    try:
        best = ctypes.CDLL(str(built[1])).processor_level()
        loaded = ctypes.CDLL(str(next(built[level] for level in LEVELS if level <= best and level in built)))
        loaded.train_members.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise NotBuiltError(
            f"gputune's compiled code cannot be loaded, install gputune anew: {error}"
        ) from error
    return loaded


_NUMBERS = (
    "folds", "trials", "inputs", "width", "outputs", "layers", "activation", "optimizer", "classes", "rows", "epoch",
    "horizon",
)  # fmt: skip
_BEFORE = ("x", "center", "scale", "copies", "y", "weights", "present", "order", "lengths")
_AFTER = (
    "widths", "sizes", "schedule", "lr", "decay", "momentum", "dropout", "draws", "draw_start", "draw_rows", "theta",
    "first", "second", "valid", "valid_start", "scored", "accuracy", "nanoseconds", "queue",
)  # fmt: skip

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
"""In the order of the library's numbers for them."""


class Work(ctypes.Structure):
    """What the library is asked to do, sizes and where the arrays lie; ``member.h`` says what each field is."""

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
