"""Detects if a user's code writes into its input tensors, which other code reads afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gputune.modules.trace import (
    Args,
    DispatchMode,
    Kwargs,
    Operator,
    clones,
    memory_of,
    written_tensors,
)


class WriteWatch:
    """Passes copies of tensors to a user's code, and notes writes into the copies.

    ``has_written`` tells whether the user's code has written into a copy.
    """

    def __init__(self) -> None:
        self.has_written = False

    @contextmanager
    def copies(self, originals: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield copies of tensors. Afterwards, note whether the user's code has written into the
        copies."""
        copies = clones(originals)
        with Writes(copies) as writes:
            yield copies
        # Operations show writes that change no number on these rows. Writes by NumPy show only in
        # the numbers.
        self.has_written |= writes.has_written or not all(map(_is_same, copies, originals))


class Writes(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operation writes into the memory of some tensors, also by a view or
    ``out=``."""

    # Version counters of the tensors are not enough: they do not count writes through ``.data``.

    def __init__(self, watched: Sequence[Tensor]) -> None:
        super().__init__()
        self.memories = set(map(memory_of, watched))
        self.has_written = False

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func._schema.is_mutable and not self.has_written:
            for tensor in written_tensors(func, args, kwargs):
                if tensor.layout is torch.strided and not tensor.is_nested:
                    self.has_written |= memory_of(tensor) in self.memories
        return func(*args, **kwargs)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape have the same bits, also in NaN."""
    a = a.contiguous().view(-1).view(torch.uint8)
    return torch.equal(a, b.contiguous().view(-1).view(torch.uint8))
