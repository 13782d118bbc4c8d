"""Kernels of our own for a GPU: CUDA C++ that NVRTC compiles, once in a process.

Each has a definition in operations of PyTorch, which is taken where it cannot be compiled.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_MOST_BLOCKS = 1 << 16

Kernel = Callable[..., None]
"""Called with ``grid``, ``block`` and ``args``, tensors and ints of 32 bits, it launches on the current stream."""


def source(path: Path, dtype: torch.dtype) -> str:
    """Return the source in a file, whose ``real`` is a dtype."""
    return f"typedef {'float' if dtype == torch.float32 else 'double'} real;\n{path.read_text()}"


@cache
def kernels(
    path: Path, names: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Kernel, ...] | None:
    """Return the kernels of a file for a GPU; None, with a warning, where they cannot be compiled."""
    try:
        with torch.cuda.device(device):
            return tuple(torch.cuda._compile_kernel(source(path, dtype), name) for name in names)
    except Exception as error:  # of NVRTC, of the driver, of a library that is not there
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = f" {_install()}" if isinstance(error, OSError) or "libnvrtc" in reason else ""
        warnings.warn(
            f"{path.name} cannot be compiled for {device}: {reason}.{remedy} Nothing is lost: its steps are taken by "
            "PyTorch's own kernels, in more launches.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def launch(kernel: Kernel, threads: int, args: Sequence[Tensor | int], *, block: int = 256) -> None:
    """Launch a kernel that goes through its work with a stride, in at least so many threads where there is room.

    The tensors are contiguous.
    """
    assert all(isinstance(arg, int) or arg.is_contiguous() for arg in args)
    kernel(grid=(min(_MOST_BLOCKS, -(-threads // block)), 1, 1), block=(block, 1, 1), args=list(args))


def _install() -> str:
    """Return which wheel has NVRTC."""
    major = (torch.version.cuda or "13").split(".")[0]
    wheel = "nvidia-cuda-nvrtc" if int(major) >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
    return f"pip install '{wheel}=={torch.version.cuda}.*' brings the library."
