"""The threads of the CPU and the memory of a GPU that torch uses."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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


SMALL_LOSS = 2**18
"""The largest count of numbers for which one thread computes losses or scores: a few ms."""
SMALL_PRODUCT = 2**24
"""The largest count of multiplications for which one thread computes a product: about 1 ms."""


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Let torch use ``threads`` threads inside the ``with`` block.

    The setting belongs to the current thread. Entering and leaving the block takes 0.3 µs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_one_thread(*, if_small: bool) -> Iterator[None]:
    """Let torch use a single thread inside the ``with`` block, if the work is small.

    torch splits operations of a few microseconds between threads, and waits for all of them. If
    other programs use the cores, the wait takes 5 to 30 ms, as long as several turns of the
    scheduler.
    """
    if not if_small:
        yield
        return
    with on_threads(1):
        yield


def is_small_pass(module: nn.Module, inputs: Sequence[Tensor], widest: int | None = None) -> bool:
    """Return True if a forward pass of a module surely multiplies few numbers.

    ``widest`` is the largest number of values that a layer returns for one row, or None. If it is
    None, the result is False for convolutions, because they use a weight many times for each row.
    """
    # A recurrent network uses its weights once for each step of a sequence (B, T, D).
    rows = max(x.numel() if x.dim() < 2 else x.numel() // max(1, x.shape[-1]) for x in inputs)
    products = 0
    for weight in module.parameters():
        if is_lazy(weight):
            return False
        if weight.dim() <= 2:
            products += rows * weight.numel()
        elif widest is None:
            return False
        else:
            # A convolution with O channels returns at most widest / O pixels for each row.
            products += len(inputs[0]) * weight.numel() * widest // max(1, len(weight))
    return products <= SMALL_PRODUCT
