"""Detects if a user's code writes into its input tensors, which other code reads afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gputune.modules.trace import Args, DispatchMode, Operator, Words, memory_of, tensors


class WriteWatch:
    """Passes copies of tensors to code that is tried.

    ``found`` says whether any of that code has written into a copy.
    """

    def __init__(self) -> None:
        self.found = False

    @contextmanager
    def copies(self, originals: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield copies of tensors, and note afterwards whether they were written into."""
        copies = [tensor.clone() for tensor in originals]
        with Writes(copies) as writes:
            yield copies
        # Operations show writes that change no number on these rows. Writes by NumPy show only in
        # the numbers.
        self.found |= writes.found or not all(map(_is_same, copies, originals))


class Writes(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operation writes into the memory of some tensors, also by a view or
    ``out=``."""

    # Version counters of the tensors are not enough: they do not count writes through ``.data``.

    def __init__(self, watched: Sequence[Tensor]) -> None:
        super().__init__()
        self.memories = {memory_of(tensor) for tensor in watched}
        self.found = False

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Words | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func._schema.is_mutable and not self.found:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[place] if place < len(args) else kwargs.get(argument.name)
                    plain = [
                        one
                        for one in tensors(value)
                        if one.layout is torch.strided and not one.is_nested
                    ]
                    self.found |= any(memory_of(one) in self.memories for one in plain)
        return func(*args, **kwargs)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape have the same bits, also in NaN."""
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
