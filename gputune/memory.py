"""How much memory this process may still take, of the machine and of a GPU; whether an error says that it ran out."""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

_GROUP = Path("/sys/fs/cgroup/memory.max")  # as a container sees its own


def free_memory() -> int:
    """Return bytes of main memory: what is available, cached files included, or less where a limit is set.

    Half of all memory where the system does not say what is available; no limit where it says nothing.
    """
    limits = [sys.maxsize]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    except (OSError, StopIteration):
        if sys.platform != "win32":
            with suppress(ValueError):
                limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    if sys.platform != "win32":
        import resource  # which Windows has not

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # of addresses: ``ulimit -v``
        if limit != resource.RLIM_INFINITY:
            taken = 0
            with suppress(OSError):
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limits.append(limit - taken)
    with suppress(OSError, ValueError):  # "max": no limit
        limits.append(int(_GROUP.read_text()))
    return max(0, min(limits))


# What is said in a plain RuntimeError: by torch's allocator on the CPU; by CUDA where it loads code or makes a graph;
# by the libraries that take memory of their own; by cuDNN where it finds no room to work in.
_TEXTS = (
    "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUSOLVER_STATUS_ALLOC_FAILED", "CUDNN_STATUS_NOT_SUPPORTED",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the device or on the host.

    A graph that ends with such an error may say only that it failed; why is then the error before it.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def free_of_gpu(device: torch.device) -> int:
    """Return bytes of a GPU that may be taken: those that nobody has, and those that PyTorch keeps for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


CAPTURING = threading.RLock()
"""Held while a step is captured on a GPU, and by what waits for the whole of one or gives back its memory, which would
end the capture of another thread."""


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is done at once."""
    if device.type == "cuda":
        with CAPTURING:
            torch.cuda.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch keeps of a GPU's memory for later."""
    if device.type == "cuda":
        # After a capture that failed, torch < 2.13 takes every later call for one inside a capture.
        # Source: https://github.com/pytorch/pytorch/issues/180395
        with CAPTURING, suppress(RuntimeError):
            torch.cuda.empty_cache()
