"""Writes the training steps of one member as C code, from their traces.

A member is one trial on one fold. A trace lists the operations of one training step (``trace.py``).
A place is a tensor's position and layout in memory. A kernel is a C function for one kind of loop.

Each operation becomes a loop or a call, on memory that is known by its index
(``kernels/table.py``). An operation that is not supported raises TraceError. Before that, the matrix
products of a step are changed so that they take less time. A recurrent network gains most, because
its step has the same products at each time.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gputune.modules.decompositions import decomposition
from gputune.modules.kernels.fusion import joined
from gputune.modules.kernels.table import written
from gputune.modules.kernels.writer import Formula, Line, Writer
from gputune.modules.program import simplify_trace
from gputune.modules.trace import Operation, Place, Storages, TakeStep, Trace, memories_of, trace

aten = torch.ops.aten

_ADDING = {aten.mm.default: aten.addmm.default, aten.bmm.default: aten.baddbmm.default}
"""The product that adds a matrix, for each product."""
_SECOND = {
    aten.mm.default: 1,
    aten.bmm.default: 1,
    aten.addmm.default: 2,
    aten.baddbmm.default: 2,
}
"""The position of the second factor among the arguments of each product."""
_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
# Products with the same transposed factor, for which one copy of the factor pays off.
_SEVERAL = 4


@dataclass(frozen=True, eq=False)
class CodedStep:
    """One training step as data for compiled C code: a list of kernel calls.

    ``calls`` is in the format of ``native/steps.h``. ``numbers`` are Python's numeric values that
    these calls read. ``workspace`` is the size of the working memory in bytes.
    """

    calls: np.ndarray
    numbers: np.ndarray
    workspace: int


class MemberCode:
    """The C code of several training steps in one precision, float32 or float64.

    ``kernels`` maps the code of each kernel (a C function) to its index, in the order of writing.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kernels: dict[str, int] = {}

    def add(self, step: TakeStep, memories: Storages) -> CodedStep:
        """Write the C code of a training step, and return the step's kernel calls.

        The step is taken and undone, to trace it. Operations without C code are replaced by simpler
        operations. The memory that the step uses is added to ``memories``, by address. Raises
        TraceError.
        """
        simple = simplify_trace(trace(step, decomposition))
        simple.operations = with_added_products(simple.operations)
        simple.operations = with_copied_factors(simple)
        kernels = dict(self.kernels)
        used = dict(memories)
        writer = Writer(self.dtype, kernels, simple, used)
        lines: list[tuple[int, Line | Formula]] = []
        for i, op in enumerate(simple.operations):
            lines += [(i, line) for line in written(writer, op)]
        calls: list[int] = []
        for line in joined(writer, lines, simple.last_uses()):
            calls += line.call()
        self.kernels = kernels
        memories |= used
        # at least one number, so that the array has an address
        numbers = np.array([*writer.numbers, 0.0])
        workspace = writer.size + writer.workspace
        return CodedStep(np.array([len(calls), *calls], dtype=np.int64), numbers, workspace)


def with_added_products(operations: Sequence[Operation]) -> list[Operation]:
    """Return the operations of a step in which products add the matrix that a later operation would
    add to their result.

    The sums of a product then begin with this matrix, so that no second pass over the result is
    needed.
    """
    joined = list(operations)
    uses = Counter(place.memory for op in operations for place in op.reads + op.writes)
    products: dict[Place, int] = {}
    removed = set[int]()
    for i, op in enumerate(operations):
        if op.function in _ADDING and not op.writes:
            products[op.makes[0]] = i
        elif op.function in _ADDITIONS and op.kwargs.get("alpha", 1) == 1:
            for result, added in (op.args[:2], op.args[1::-1]):
                product = products.get(result) if isinstance(result, Place) else None
                if product is None or uses[result.memory] != 1 or not isinstance(added, Place):
                    continue
                if _can_add(operations[product : i + 1], added):
                    function = _ADDING[operations[product].function]
                    args = [added, *operations[product].args[:2]]
                    joined[i] = replace(op, function=function, args=args, kwargs={})
                    removed.add(product)
                    break
    return [op for i, op in enumerate(joined) if i not in removed]


def _can_add(operations: Sequence[Operation], added: Place) -> bool:
    """Return whether a product can add a matrix at the place of a later addition.

    The first operation is the product and the last operation the addition.
    """
    product, *between, addition = operations
    out = addition.outputs[0]
    matrices = [product.makes[0], added, out]
    first = matrices[0]
    if any((x.shape, x.dtype) != (first.shape, first.dtype) for x in matrices):
        return False
    if any(x.stride[-1] != 1 for x in matrices) or (added.memory == out.memory and added != out):
        return False
    # The product moves behind the operations between, and writes where the addition would write.
    factors = memories_of(product.reads)
    return out.memory not in factors and not any(memories_of(op.writes) & factors for op in between)


def with_copied_factors(step: Trace) -> list[Operation]:
    """Return the operations of a step in which products share one copy of a transposed factor.

    The C code copies a transposed second factor in each product. The new memory of a shared copy is
    added to ``step.sizes``.
    """
    users: dict[Place, list[int]] = {}
    for i, op in enumerate(step.operations):
        factor = _second_factor(op)
        if factor is not None and factor.stride[-1] != 1:
            users.setdefault(factor, []).append(i)
    operations = list(step.operations)
    copies: dict[int, Operation] = {}
    for factor, places in users.items():
        first, last = places[0], places[-1]
        written = {place.memory for op in step.operations[first : last + 1] for place in op.outputs}
        if len(places) < _SEVERAL or factor.memory in written:
            continue
        copy = _contiguous(factor, memory=min(0, *step.sizes) - 1)
        step.sizes[copy.memory] = math.prod(copy.shape) * copy.dtype.itemsize
        copies[first] = Operation(aten.clone.default, [factor], {}, [copy])
        for i in places:
            args = list(operations[i].args)
            args[_SECOND[operations[i].function]] = copy
            operations[i] = replace(operations[i], args=args)
    result = []
    for i, op in enumerate(operations):
        if i in copies:
            result.append(copies[i])
        result.append(op)
    return result


def _second_factor(op: Operation) -> Place | None:
    """Return the place of the second factor of a product, or None for another operation."""
    position = _SECOND.get(op.function)
    return None if position is None else op.args[position]


def _contiguous(place: Place, *, memory: int) -> Place:
    """Return a place without gaps for a tensor of the same shape, in new memory."""
    stride: list[int] = []
    for i in range(len(place.shape)):
        stride.append(math.prod(place.shape[i + 1 :]))
    return Place(memory, place.dtype, 0, place.shape, tuple(stride))
