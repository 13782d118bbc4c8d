"""The free memory of a GPU, and the detection of out-of-memory errors."""

import threading
from contextlib import suppress

import torch

CPU = torch.device("cpu")

# Out-of-memory messages that come as a plain RuntimeError. In order: torch's allocator on the CPU,
# CUDA when it loads code or makes a graph, three lines for libraries that allocate memory
# themselves, and cuDNN when it finds no memory to work in.
_TEXTS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that the memory of the GPU or the machine is exhausted.

    If a CUDA graph runs out of memory, its error may only say that the graph failed. The error that
    caused it then has the reason.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def free_of_gpu(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that this process can still use.

    The result is the sum of the unused bytes and the bytes that PyTorch has reserved but does not
    use.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


CAPTURING = threading.RLock()
"""A lock that is held while a step is captured on a GPU.

A thread also takes the lock to wait for the whole GPU or to free its memory, because both acts
would end another thread's capture.
"""


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. For the CPU, return at once."""
    if device.type == "cuda":
        with CAPTURING:
            torch.cuda.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Release the GPU memory that PyTorch has reserved but does not use."""
    if device.type == "cuda":
        # After a failed capture, torch < 2.13 believes that every later call is inside a capture.
        # Source: https://github.com/pytorch/pytorch/issues/180395
        with CAPTURING, suppress(RuntimeError):
            torch.cuda.empty_cache()
