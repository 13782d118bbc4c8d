"""How much memory of a GPU this process may still take, and whether an error says that memory has
run out."""

import threading
from contextlib import suppress

import torch

# What is said in a plain RuntimeError: by torch's allocator on the CPU; by CUDA where it loads code
# or makes a graph; by the libraries that take memory of their own; by cuDNN where it finds no room
# to work in.
_TEXTS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the device or on the host.

    A graph that ends with such an error may say only that it failed; why is then the error before
    it.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def free_of_gpu(device: torch.device) -> int:
    """Return bytes of a GPU that may be taken: those that nobody has, and those that PyTorch keeps
    for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


CAPTURING = threading.RLock()
"""Held while a step is captured on a GPU, and by what waits for the whole of one or gives back its
memory, which would end the capture of another thread."""


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
