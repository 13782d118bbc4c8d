"""The steps of one member as C, from their traces: a loop or a call for each operation, on memory known by its number.

An operation that is not known here raises TraceError.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gputune.modules.formulas import FORMULAS, arguments
from gputune.modules.member_kernels import Line, Span, Writer
from gputune.modules.member_layers import LAYERS
from gputune.modules.program import split_constants
from gputune.modules.trace import Operation, Place, Trace, TraceError

_LARGE, _BLOCK = 4096, 2048  # numbers from which passes over the same memory are taken in blocks of so many


@dataclass(frozen=True, eq=False)
class Step:
    """A step: its calls of kernels (``native/calls.h``), numbers of the host that they read, and bytes of room."""

    calls: np.ndarray
    numbers: np.ndarray
    room: int


class MemberCode:
    """The code of several steps in one precision, float32 or float64; ``kernels`` are numbered in their order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kernels: dict[str, int] = {}

    def add(self, trace: Trace, memories: dict[int, torch.UntypedStorage]) -> Step:
        """Write a step, and add by their addresses the memories that it finds there. Raises TraceError."""
        constants, operations = split_constants(trace)
        storages = {**trace.outside, **{m: t.untyped_storage() for m, t in constants.items()}}
        operations = _small_first(operations)
        writer = Writer(self.dtype, self.kernels, trace, operations, storages, memories)
        lines = [line for op in operations for line in _lines(writer, op)]
        calls = [number for run in _in_blocks(lines) for number in run]
        numbers = np.array([*writer.numbers, 0.0])  # one at least, whose place can be said
        return Step(np.array([len(calls), *calls], dtype=np.int64), numbers, writer.size + writer.room)


def _lines(writer: Writer, op: Operation) -> Iterator[Line]:
    """Yield the calls that an operation is made into. Raises TraceError for one that is not known."""
    base, plain = op.name.removeprefix("new_").removesuffix("_like"), op.name.removesuffix("_")
    given, out = arguments(op), (op.makes or op.writes)[0]
    if plain in LAYERS:
        yield from LAYERS[plain](writer, given, op, out)
    elif plain in FORMULAS:
        yield writer.pointwise(plain, given, out)
    elif plain == "zero" or base in ("zeros", "ones", "full"):
        yield writer.filled(out, given.get("fill_value", float(base == "ones")))
    elif not base.startswith("empty"):
        raise TraceError(f"{op.function} is in no code")


def _small_first(operations: Sequence[Operation]) -> list[Operation]:
    """Take what makes one number before passes over many that do not depend on it, so that these follow each other."""

    def count(place: Place) -> int:
        return torch.Size(place.shape).numel()

    def depend(a: Operation, b: Operation) -> bool:  # whether one writes what the other reads or writes
        into = [{place.memory for place in (*op.makes, *op.writes)} for op in (a, b)]
        used = [{place.memory for place in op.reads} | own for op, own in zip((a, b), into)]
        return bool(into[0] & used[1] or into[1] & used[0])

    found: list[Operation] = []
    for op in operations:
        at = len(found)
        if all(count(place) == 1 for place in (*op.makes, *op.reads, *op.writes)):
            while at and not depend(op, before := found[at - 1]):
                if all(count(place) < _LARGE for place in (*before.makes, *before.writes)):
                    break
                at -= 1
        found.insert(at, op)
    return found


def _in_blocks(lines: Sequence[Line]) -> Iterator[list[int]]:
    """Yield runs of calls, those over as many numbers a block at a time, which stays in the cache between them."""
    run: list[Line] = []
    for line in lines:
        alone = not _go_together([line])
        if run and (alone or not _go_together([*run, line])):
            yield from _take_lines(run)
            run = []
        run.append(line)
        if alone:
            yield from _take_lines(run)
            run = []
    yield from _take_lines(run)


def _go_together(lines: Sequence[Line]) -> bool:
    """Whether calls pass over equally many numbers, and none reads or writes another row of what another one writes."""
    total, unit = lines[0].total, max(line.unit for line in lines)
    if total < _LARGE or any(line.total != total or line.unit not in (1, unit) for line in lines):
        return False
    *before, last = lines

    def alike(a: Line, b: Line, x: Span, y: Span) -> bool:
        mine, other = x.in_rows(unit // a.unit, total // unit), y.in_rows(unit // b.unit, total // unit)
        return not x.overlaps(y) or (mine == other and mine[1] > 0 and mine[2])

    return all(
        alike(line, last, x, y)
        for line in before
        for i, x in enumerate(line.spans)
        for j, y in enumerate(last.spans)
        if i == 0 or j == 0
    )


def _take_lines(run: Sequence[Line]) -> Iterator[list[int]]:
    if len(run) == 1:
        yield [1, 1, 1, *run[0].call()]
    elif run:
        unit = max(line.unit for line in run)
        calls = [number for line in run for number in line.call(unit)]
        yield [len(run), run[0].total // unit, max(1, _BLOCK // unit), *calls]
