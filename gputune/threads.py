"""The number of threads that torch uses for one operation on a CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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
