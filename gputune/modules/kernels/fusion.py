"""Joins neighboring formulas of a member's training step into one C kernel.

A member is one trial on one fold. A place is a tensor's position and layout in memory. A formula
computes each entry of its result from single entries of its arguments. In a joint kernel, an entry
of a result stays in a register for the formulas that read it. A result that nothing else reads is
never written to memory.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gputune.modules.kernels.writer import Formula, Line, Loops, Writer, c_type, loops_of
from gputune.modules.trace import Place

# Loops over more numbers should become vector instructions. Shorter loops take little time.
_SMALL = 64
# Functions that every compiler turns into vector instructions.
_VECTORIZED = {"EXP", "fabs", "sqrt"}
# Most operands of a joint kernel. A processor has about this number of registers for addresses.
_MOST_OPERANDS = 20

Axes = list[tuple[int, tuple[int, ...]]]
"""The loops of a kernel, the outermost first: the size of each, and the strides of all operands."""
Key = tuple[int, int, torch.dtype, tuple[int, ...]]
"""Memory, first byte, dtype and strides of an operand. Operands with equal keys have equal
entries."""


@dataclass(frozen=True)
class _Operand:
    """A tensor that a kernel reads or writes, and its first byte in a memory."""

    place: Place
    memory: int
    begin: int
    end: int
    is_written: bool

    def overlaps(self, other: "_Operand") -> bool:
        """Return whether two operands may share bytes of memory."""
        return self.memory == other.memory and self.begin < other.end and other.begin < self.end


class _Group:
    """Formulas that one kernel computes together, entry by entry.

    ``operands`` are the result and the arguments of each formula, one formula after another.
    ``axes`` are the loops of the kernel.
    """

    def __init__(self, writer: Writer, formula: Formula, axes: Axes) -> None:
        self.writer = writer
        self.formulas = [formula]
        self.operands = _operands(writer, formula)
        self.axes = axes
        self.can_join = _can_join(writer, formula, axes)

    def add(self, other: "_Group") -> bool:
        """Add another group to the kernel and return True, or change nothing and return False."""
        axes = _common_axes(self.axes, other.axes)
        is_plain = self.can_join and other.can_join
        if not is_plain or axes is None or not _is_dense(axes):
            return False
        n_before = len(self.operands)
        operands = [*self.operands, *other.operands]
        keys = _keys(operands, axes)
        if len(set(keys)) > _MOST_OPERANDS:
            return False
        for i, new in enumerate(operands[n_before:], n_before):
            for j, old in enumerate(operands[:n_before]):
                # An entry may share memory only with the same entry of another operand.
                is_written = new.is_written or old.is_written
                if is_written and keys[i] != keys[j] and new.overlaps(old):
                    return False
        self.formulas += other.formulas
        self.operands = operands
        self.axes = axes
        return True

    def write(self, unneeded: set[int]) -> Line:
        """Write the kernel, and return its call. Results in the memories ``unneeded`` are not
        stored."""
        keys = _keys(self.operands, self.axes)
        values: dict[Key, str] = {}  # the variable with the present entry of each operand
        loads: dict[Key, str] = {}
        stores: dict[Key, str] = {}
        numbers: list[float] = []
        body: list[str] = []
        remaining = iter(keys)
        for number, formula in enumerate(self.formulas):
            result = next(remaining)
            names = {}
            for name, value in formula.arguments.items():
                if isinstance(value, Place):
                    key = next(remaining)
                    if key not in values:
                        loads[key] = values[key] = f"x{len(loads)}"
                    names[name] = f"(({formula.real}){values[key]})"
                else:
                    names[name] = f"(({formula.real})s{len(numbers)})"
                    numbers.append(value)
            values[result] = f"y{number}"
            expression = formula.text.format(**names).replace("REAL", formula.real)
            exponential = "exponential(" if formula.real == self.writer.real else "exp("
            expression = expression.replace("EXP(", exponential)
            body.append(f"{c_type(formula.out.dtype)} y{number} = {expression};")
            if formula.out.memory not in unneeded:
                stores[result] = values[result]
        order = list(dict.fromkeys([*stores, *loads]))
        columns = [keys.index(key) for key in order]
        places = [self.operands[column].place for column in columns]
        sizes = list[int]()
        loops = _loops(self.axes, columns).named(sizes)
        code = []
        for i, key in enumerate(order):
            if key in loads:
                code.append(f"{c_type(places[i].dtype)} {loads[key]} = p{i}[{loops.index(i)}];")
        code += body
        for i, key in enumerate(order):
            if key in stores:
                code.append(f"p{i}[{loops.index(i)}] = {stores[key]};")
        return self.writer.call(places, loops.nest("\n".join(code)), numbers, sizes=sizes)


def joined(
    writer: Writer, lines: Sequence[tuple[int, Line | Formula]], last: Mapping[int, int]
) -> list[Line]:
    """Write the kernels of all formulas, and return the kernel calls of a step.

    Args:
        writer: The writer of the kernels.
        lines: The calls in their order, each with the index of its operation.
        last: The index of the last operation that uses each memory.
    """
    calls: list[Line] = []
    group: _Group | None = None
    for operation, line in lines:
        following = _Group(writer, line, _axes_of(line)) if isinstance(line, Formula) else None
        if group is not None and following is not None and group.add(following):
            continue
        if group is not None:
            calls.append(group.write(_unneeded(group, last, operation)))
        group = following
        if isinstance(line, Line):
            calls.append(line)
    if group is not None:
        calls.append(group.write(_unneeded(group, last, math.inf)))
    return calls


def _unneeded(group: _Group, last: Mapping[int, int], following: float) -> set[int]:
    """Return the memories of results that no operation from ``following`` on uses."""
    memories = {formula.out.memory for formula in group.formulas}
    return {m for m in memories if m in group.writer.begin and last[m] < following}


def _can_join(writer: Writer, formula: Formula, axes: Axes) -> bool:
    """Return whether a formula may share a kernel: the compiler can turn the kernel's loops into
    vector instructions, or the loops are short."""
    numbers = math.prod(size for size, _ in axes)
    steps = [step for _, strides in axes for step in strides]
    if numbers == 0 or min(steps, default=0) < 0 or any(strides[0] == 0 for _, strides in axes):
        return False
    if numbers <= _SMALL:
        return True
    calls = set(re.findall(r"(\w+)\(", formula.text))
    dtypes = {place.dtype for place in formula.operands} - {torch.bool}
    is_real = dtypes <= {writer.dtype} and formula.real == writer.real
    return calls <= _VECTORIZED and is_real and _is_dense(axes)


def _operands(writer: Writer, formula: Formula) -> list[_Operand]:
    """Return the result and the arguments of a formula, with their first bytes in memory."""
    operands = []
    for i, place in enumerate(formula.operands):
        memory, begin = writer.first_byte(place)
        first, last = place.extent
        operands.append(_Operand(place, memory, begin, begin + last - first, is_written=i == 0))
    return operands


def _axes_of(formula: Formula) -> Axes:
    """Return the loops over the entries of a formula's result and arguments."""
    loops = loops_of(formula)
    axes: Axes = []
    for i, size in enumerate(loops.sizes):
        axes.append((int(size), tuple(int(steps[i]) for steps in loops.strides)))
    return axes


def _common_axes(a: Axes, b: Axes) -> Axes | None:
    """Return loops that pass over the operands of two kernels together, or None.

    A loop is split in two if the loop of the other kernel is shorter. The innermost loop stays
    long.
    """
    left = list(a)
    right = list(b)
    axes: Axes = []
    while left and right:
        n_left, left_steps = left.pop()
        n_right, right_steps = right.pop()
        size = min(n_left, n_right)
        if size == 0 or n_left % size or n_right % size:
            return None
        for rest, n, steps in ((left, n_left, left_steps), (right, n_right, right_steps)):
            if n > size:
                rest.append((n // size, tuple(step * size for step in steps)))
        axes.insert(0, (size, left_steps + right_steps))
    if left or right:
        return None
    if axes and axes[-1][0] < min(_SMALL, max(a[-1][0], b[-1][0])):
        return None
    return axes


def _is_dense(axes: Axes) -> bool:
    """Return whether neighboring passes of the innermost loop use neighboring entries."""
    return not axes or all(step in (0, 1) for step in axes[-1][1])


def _keys(operands: Sequence[_Operand], axes: Axes) -> list[Key]:
    """Return the key of each operand."""
    keys = []
    for i, operand in enumerate(operands):
        strides = tuple(steps[i] for _, steps in axes)
        keys.append((operand.memory, operand.begin, operand.place.dtype, strides))
    return keys


def _loops(axes: Axes, columns: Sequence[int]) -> Loops:
    """Return the loops over some operands. Loops that follow each other in the memory of all these
    operands become one loop."""
    merged: list[tuple[int, list[int]]] = []
    for n, all_steps in axes:
        steps = [all_steps[column] for column in columns]
        if merged and merged[-1][1] == [n * step for step in steps]:
            n *= merged.pop()[0]
        merged.append((n, steps))
    by_operand = zip(*(steps for _, steps in merged)) if merged else [()] * len(columns)
    return Loops(tuple(n for n, _ in merged), tuple(by_operand))
