"""Whether a user's code writes into the tensors that it is given, which others read after it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gputune.modules.trace import Args, DispatchMode, Operator, Words, memory_of, tensors


class WriteWatch:
    """Gives copies of tensors to code that is tried; ``found`` says whether any of that code has
    written into one."""

    def __init__(self) -> None:
        self.found = False

    @contextmanager
    def copies(self, originals: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield copies of tensors, and note afterwards whether they were written into."""
        copies = [tensor.clone() for tensor in originals]
        with Writes(copies) as writes:
            yield copies
        # Operations tell of writes that change no number on these rows. What numpy writes is seen
        # in the numbers only.
        self.found |= writes.found or not all(map(_is_same, copies, originals))


class Writes(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether an operation writes into the memory of some tensors, also through a view or by
    ``out=``."""

    # Not the version counters of the tensors: those do not count what is written through ``.data``.

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
    """Whether two tensors of one shape hold the same bits, also where they are no number."""
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b)))
