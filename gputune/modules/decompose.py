"""Replaces operations of a trace that have no C code by simpler operations with the same result.

A trace lists the operations of one training step (``trace.py``), and a place is a tensor's position
and layout in memory. The replacements are PyTorch's own decompositions, which torch.export uses
too. This file has the decompositions that PyTorch lacks.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from gputune.modules.decompositions import OWN
from gputune.modules.kernels.places import is_contiguous
from gputune.modules.trace import (
    Function,
    Operation,
    Place,
    Storages,
    Trace,
    TraceError,
    mapped_leaves,
    memory_of,
    trace,
)

aten = torch.ops.aten


def decomposed(steps: Trace, refused: Mapping[int, TraceError]) -> Trace:
    """Return a trace with simpler operations in place of some operations.

    ``refused`` maps the index of each operation to the reason why it has no C code. This reason is
    raised if there are no simpler operations.
    """
    result: list[Operation] = []
    sizes = dict(steps.sizes)
    for i, op in enumerate(steps.operations):
        if i in refused:
            result += _simpler(op, steps, sizes, refused[i])
        else:
            result.append(op)
    return Trace(result, steps.outside, sizes)


def _simpler(
    op: Operation, steps: Trace, sizes: dict[int, int], refusal: TraceError
) -> list[Operation]:
    """Return simpler operations that compute the same as one operation. Their new memories are
    added to ``sizes``. Raises the refusal if there are none."""
    function = _decomposition(op)
    if function is None or op.out in op.kwargs:
        raise refusal
    room = _Room(steps)
    args, kwargs = mapped_leaves((op.args, op.kwargs), Place, room.tensor)
    targets = [None if place is None else room.tensor(place) for place in op.results]
    if not op.results:
        targets = list(map(room.tensor, op.writes))

    def compute() -> None:
        results = function(*args, **kwargs)
        values = results if isinstance(results, tuple | list) else [results]
        for target, value in zip(targets, values):
            # Fast kernels return some unused results without entries.
            if target is not None and target.numel():
                target.copy_(value)

    try:
        simpler = trace(compute)
    except (TraceError, NotImplementedError, RuntimeError) as error:
        raise refusal from error
    operations: list[Operation] = []
    replaced = op.replaced or str(op.function.overloadpacket)
    for place in op.makes:
        empty = aten.empty_strided.default
        operations.append(Operation(empty, [place.shape, place.stride], {}, [place]))
    # Identifiers of memory are unique only within one trace.
    numbers = itertools.count(min(0, *sizes) - 1, -1)
    memories = dict(room.memories)
    for memory, size in simpler.sizes.items():
        memories[memory] = next(numbers)
        sizes[memories[memory]] = size
    for memory, storage in simpler.outside.items():
        if memory not in memories:  # a constant of the decomposition
            memories[memory] = next(numbers)
            steps.outside[memories[memory]] = storage

    def renamed(place: Place) -> Place:
        return replace(place, memory=memories[place.memory])

    for part in simpler.operations:
        places = (part.args, part.kwargs, part.results, part.writes)
        fields = _fields(mapped_leaves(places, Place, renamed))
        operations.append(replace(part, replaced=replaced, **fields))
    return operations


def _fields(values: Sequence[Any]) -> dict[str, Any]:
    """Return the values of an operation's fields by name."""
    return dict(zip(("args", "kwargs", "results", "writes"), values))


class _Room:
    """Tensors of zeros at the places of an operation, on which a decomposition is traced."""

    def __init__(self, steps: Trace) -> None:
        self.steps = steps
        self.storages: Storages = {}
        self.memories: dict[int, int] = {}
        """Identifiers of the memories in the trace, by the identifiers of these storages."""

    def tensor(self, place: Place) -> Tensor:
        """Return the tensor of zeros at a place."""
        memory = place.memory
        if memory not in self.storages:
            outside = self.steps.outside.get(memory)
            size = self.steps.sizes[memory] if outside is None else outside.nbytes()
            zeros = torch.zeros(size, dtype=torch.uint8)
            self.storages[memory] = zeros.untyped_storage()
            self.memories[memory_of(zeros)] = memory
        return place.on(self.storages[memory])


def _decomposition(op: Operation) -> Function | None:
    """Return a function that computes an operation by simpler operations, or None."""
    function = op.function
    if not isinstance(function, torch._ops.OpOverload):
        return None
    if function.namespace == "prims":
        return getattr(function, "impl_aten", None)
    name = op.name.removesuffix("_")
    if name in _CONTIGUOUS and not all(map(is_contiguous, op.reads)):
        return partial(_with_contiguous, function)
    if name in OWN:
        return OWN[name]
    if op.name.endswith("_") and hasattr(aten, name):
        packet = getattr(aten, name)
        function = getattr(packet, function._overloadname, packet.default)
    simpler: Function | None = decomposition_table.get(function)
    return simpler


_CONTIGUOUS = {
    "native_layer_norm",
    "native_layer_norm_backward",
    "native_group_norm",
    "native_group_norm_backward",
    "native_batch_norm",
    "native_batch_norm_backward",
}
"""Operations with C code that needs contiguous tensors."""


def _with_contiguous(function: Function, *args: object, **kwargs: object) -> object:
    """Call an operation with contiguous copies of its tensors."""
    args, kwargs = mapped_leaves((args, kwargs), Tensor, Tensor.contiguous)
    return function(*args, **kwargs)
