"""Writes the training steps of one member as C code, from their traces.

A member is one trial on one fold. A trace lists the operations of one training step (``trace.py``).
A place is a tensor's position and layout in memory. A kernel is a C function for one kind of loop.

Each operation becomes a loop or a call, on memory that is known by its index. Operations that are
more than a formula per entry have a function in ``kernels/table.py``. An operation that is not
supported raises TraceError.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gputune.modules.decompose import decomposed
from gputune.modules.kernels.formulas import FORMULAS, SEVERAL
from gputune.modules.kernels.fusion import joined
from gputune.modules.kernels.table import LAYERS
from gputune.modules.kernels.writer import Line, Writer, kwargs_of
from gputune.modules.product_passes import with_added_products, with_copied_factors
from gputune.modules.program import simplify_trace
from gputune.modules.trace import Operation, Storages, Trace, TraceError, memories_of

# Passes over at least ``_LARGE`` numbers in the same memory run together, ``_BLOCK`` numbers at a
# time.
_LARGE = 4096
_BLOCK = 2048
# Decompositions may again have operations to decompose.
_ROUNDS = 5


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

    def add(self, trace: Trace, memories: Storages) -> CodedStep:
        """Write the C code of a traced training step, and return the step's kernel calls.

        Operations without C code are replaced by simpler operations. The memory that the step uses
        is added to ``memories``, by address. Raises TraceError.
        """
        for _ in range(_ROUNDS):
            trace = simplify_trace(trace)
            trace.operations = with_added_products(trace.operations)
            trace.operations = _small_first(with_copied_factors(trace))
            kernels = dict(self.kernels)
            used = dict(memories)
            writer = Writer(self.dtype, kernels, trace, used)
            lines, refused = _written(writer, trace.operations)
            if not refused:
                break
            trace = decomposed(trace, refused)
        else:
            raise next(iter(refused.values()))
        calls = [*_in_blocks(joined(writer, lines, trace.last_uses()))]
        self.kernels = kernels
        memories |= used
        # at least one number, so that the array has an address
        numbers = np.array([*writer.numbers, 0.0])
        workspace = writer.size + writer.workspace
        return CodedStep(np.array([len(calls), *calls], dtype=np.int64), numbers, workspace)


def _written(
    writer: Writer, operations: Sequence[Operation]
) -> tuple[list[tuple[int, Line]], dict[int, TraceError]]:
    """Return the C kernel calls of operations, each with the index of its operation, and the
    reasons why operations have no C code, by the index of the operation."""
    lines: list[tuple[int, Line]] = []
    refused: dict[int, TraceError] = {}
    for i, op in enumerate(operations):
        try:
            lines += [(i, line) for line in _lines(writer, op)]
        except TraceError as error:
            refused[i] = TraceError(f"{op.replaced} has no C code") if op.replaced else error
    return lines, refused


def _lines(writer: Writer, op: Operation) -> Iterator[Line]:
    """Yield the C kernel calls that compute one operation. Raises TraceError for an operation that
    is not supported."""
    base = op.name.removeprefix("new_").removesuffix("_like")
    name = op.name.removesuffix("_")
    kwargs = kwargs_of(op)
    out = (op.makes or op.writes)[0]
    # Operations of torch's "prims" have the same names, but other arguments.
    if not str(op.function).startswith("aten."):
        raise TraceError(f"{op.function} has no C code")
    if name in LAYERS:
        yield from LAYERS[name](writer, kwargs, op, out)
    elif name in FORMULAS:
        yield writer.pointwise(name, kwargs, out)
    elif name in SEVERAL:
        for formula, place in zip(SEVERAL[name], op.results):
            if place is not None:
                yield writer.by_formula(formula, kwargs, place)
    elif name == "zero" or base in ("zeros", "ones", "full"):
        yield writer.filled(out, kwargs.get("fill_value", float(base == "ones")))
    elif not base.startswith("empty"):
        operation = str(op.function).removesuffix(".default")
        raise TraceError(f"{operation} has no C code")


def _small_first(operations: Sequence[Operation]) -> list[Operation]:
    """Move operations on scalars in front of large operations that they do not depend on.

    The large operations then follow each other, and can run in blocks.
    """

    # whether one operation writes memory that the other reads or writes
    def depend(a: Operation, b: Operation) -> bool:
        return bool(
            memories_of(a.outputs) & memories_of(b.places)
            or memories_of(b.outputs) & memories_of(a.places)
        )

    ordered: list[Operation] = []
    for op in operations:
        index = len(ordered)
        if all(math.prod(place.shape) == 1 for place in op.places):
            while index and not depend(op, ordered[index - 1]):
                outputs = ordered[index - 1].outputs
                if all(math.prod(place.shape) < _LARGE for place in outputs):
                    break
                index -= 1
        ordered.insert(index, op)
    return ordered


def _in_blocks(lines: Sequence[Line]) -> Iterator[int]:
    """Yield all kernel calls as integers for the compiled code. Calls that can share blocks run
    block by block.

    A block of values then stays in the processor's cache from one call to the next.
    """
    runs: list[list[Line]] = []
    for line in lines:
        if runs and _go_together([*runs[-1], line]):
            runs[-1].append(line)
        else:
            runs.append([line])
    for run in runs:
        if len(run) == 1:
            yield from (1, 1, 1, *run[0].call())
        else:
            unit = max(line.unit for line in run)
            yield from (len(run), run[0].total // unit, max(1, _BLOCK // unit))
            for line in run:
                yield from line.call(unit)


def _go_together(lines: Sequence[Line]) -> bool:
    """Return whether several kernel calls can run together, block by block.

    The calls must pass over equally many values. No call may read or write another row of memory
    that another call writes.
    """
    *before, last = lines
    total = last.total
    unit = max(line.unit for line in lines)
    if total < _LARGE or any(line.total != total or line.unit not in (1, unit) for line in lines):
        return False
    rows = total // unit
    for line in before:
        for i, a in enumerate(line.spans):
            for j, b in enumerate(last.spans):
                is_written = i < line.n_written or j < last.n_written
                if is_written and a.overlaps(b):
                    begin, step, is_apart = a.in_rows(unit // line.unit, rows)
                    other = b.in_rows(unit // last.unit, rows)
                    if other != (begin, step, is_apart) or step <= 0 or not is_apart:
                        return False
    return True
