"""Kernels of our own for a GPU: CUDA C++ that NVRTC compiles, once in a process.

Each has a definition in operations of PyTorch, which is taken where it cannot be compiled.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.cuda import _utils

from gputune.errors import warn

_MOST_BLOCKS = 1 << 16

Kernel = Callable[..., None]
"""Called with ``grid``, ``block``, ``args`` (tensors and ints of 32 bits) and ``shared_mem``, it launches on the
current stream."""

Code = TypeVar("Code")


def source(path: Path, dtype: torch.dtype) -> str:
    """Return the source in a file, whose ``real`` is a dtype."""
    return f"typedef {'float' if dtype == torch.float32 else 'double'} real;\n{path.read_text()}"


@cache
def kernels(path: Path, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> tuple[Kernel, ...] | None:
    """Return the kernels of a file for a GPU; None, with a warning, where they cannot be compiled."""

    def compile_all() -> tuple[Kernel, ...]:
        return tuple(torch.cuda._compile_kernel(source(path, dtype), name) for name in names)

    return attempt(path.name, device, compile_all)[0]


def attempt(name: str, device: torch.device, compile_it: Callable[[], Code]) -> tuple[Code | None, str]:
    """Return what compiling a file for a GPU gives, or None, with a warning, and why."""
    try:
        with torch.cuda.device(device):
            return compile_it(), ""
    except Exception as error:  # of NVRTC, of the driver, of a library that is not there
        said = str(error).splitlines() or [type(error).__name__]
        reason = " ".join(said[: 2 if said[0].endswith(":") else 1])  # the first line of a compiler's log
        remedy = f" {_install()}" if isinstance(error, OSError) or "libnvrtc" in reason else ""
        why = f"{name} cannot be compiled for {device}: {reason}.{remedy}"
        warn(f"{why} Nothing is lost: its steps are taken by PyTorch's own kernels, in more launches.", RuntimeWarning)
        return None, why


def launch(kernel: Kernel, threads: int, args: Sequence[Tensor | int], *, block: int = 256, shared: int = 0) -> None:
    """Launch a kernel that goes through its work with a stride, in at least so many threads where there is room.

    The tensors are contiguous, on one GPU; a block has ``shared`` bytes of memory beside what the code says.
    """
    assert all(isinstance(arg, int) or arg.is_contiguous() for arg in args)
    (device,) = {arg.device for arg in args if isinstance(arg, Tensor)}
    grid = (min(_MOST_BLOCKS, -(-threads // block)), 1, 1)
    with torch.cuda.device(device):  # whose stream is taken
        kernel(grid=grid, block=(block, 1, 1), args=list(args), shared_mem=shared)


def without_nvrtc() -> str:
    """Return why NVRTC cannot be loaded, and which wheel has it; "" where it can."""
    try:
        _utils._get_gpu_rtc_library()
    except OSError as error:
        return f"{error}. {_install()}"
    return ""


def _install() -> str:
    """Return which wheel has NVRTC."""
    major = (torch.version.cuda or "13").split(".")[0]
    wheel = "nvidia-cuda-nvrtc" if int(major) >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
    return f"pip install '{wheel}=={torch.version.cuda}.*' brings the library."
