"""Writes C functions (kernels) for a member's training step, one for each kind of loops and
formula.

A member is one trial on one fold. A place is a tensor's position and layout in memory. The host is
the Python program that calls the kernels.

Kernels are called on places of memory. Addresses, the host's numeric values, and all except small
sizes are arguments of the calls. Models of other widths and minibatches of other sizes therefore
share a kernel. Loops go over the places of tensors. Axes that follow each other in memory become
one loop.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gputune.modules.kernels.formulas import BITWISE, OF_INPUTS, REMAINDER_OF_FRACTIONS, formula_of
from gputune.modules.trace import Kwargs, Operation, Place, Storages, Trace, TraceError

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "uint8_t",
    torch.uint8: "uint8_t",
}


def c_type(dtype: torch.dtype) -> str:
    """Return the name of the C type for a torch dtype. Raises TraceError for a dtype that is not
    supported."""
    if dtype not in C_TYPES:
        raise TraceError(f"{dtype} is not supported")
    return C_TYPES[dtype]


# Largest size that is written into the code, so that its loop can be unrolled.
_SMALL = 32


@dataclass(frozen=True)
class Loops:
    """Nested C loops: their ``sizes``, the outermost first, and the ``strides`` of each operand."""

    sizes: tuple[int | str, ...]
    strides: tuple[tuple[int | str, ...], ...]
    variable: str = "i"

    def named(self, sizes: list[int]) -> "Loops":
        """Return the loops with names, such as n0, in place of all except small sizes and strides.

        The values of the names are appended to ``sizes``. The outermost size always has a name, and
        its value is appended last.
        """

        def names(values: Sequence[int | str], most: int = _SMALL) -> tuple[int | str, ...]:
            return tuple(named(int(value), sizes, most=most) for value in values)

        strides = tuple(map(names, self.strides))
        inner = names(self.sizes[1:])
        outer = names(self.sizes[:1], most=-1)
        return replace(self, sizes=outer + inner, strides=strides)

    def index(self, operand: int) -> str:
        """Return C code that computes an operand's position in memory from the loop variables."""
        steps = enumerate(self.strides[operand])
        return " + ".join(f"{self.variable}{i} * {step}" for i, step in steps if step) or "0"

    def heads(self, pragma: str = "") -> list[str]:
        """Return the lines of C code in front of a loop body. A pragma is put in front of the
        innermost loop."""
        lines = []
        for i, size in enumerate(self.sizes):
            name = f"{self.variable}{i}"
            lines.append(f"for (long {name} = 0; {name} < {size}; {name}++)")
        if pragma and lines:
            lines.insert(-1, f"#pragma {pragma}")
        return lines

    def nest(self, body: str, pragma: str = "GCC ivdep") -> str:
        """Return the C code of the loops around a loop body. The innermost loop may be
        vectorized."""
        return "\n".join([*self.heads(pragma), f"{{\n{body}\n}}"])


def named(size: int, sizes: list[int], *, most: int = _SMALL) -> int | str:
    """Return a small size (up to ``most``) as a constant, or a name such as n0 for a larger size.

    Loops over small sizes are unrolled. A larger size is appended to ``sizes``.
    """
    if 0 <= size <= most:
        return size
    sizes.append(size)
    return f"n{len(sizes) - 1}"


def over(shape: Sequence[int], strides: Sequence[Sequence[int]], variable: str = "i") -> Loops:
    """Return nested C loops over a tensor shape. The innermost loop runs along the first operand's
    densest axis."""
    # (size, strides of all operands) of each axis
    axes = [(n, steps) for n, *steps in zip(shape, *strides, strict=True) if n != 1]
    axes.sort(key=lambda axis: -axis[1][0])
    merged: list[tuple[int, list[int]]] = []
    for n, steps in axes:
        # Two axes become one loop if they follow each other in the memory of all operands.
        if merged and merged[-1][1] == [n * step for step in steps]:
            n *= merged.pop()[0]
        merged.append((n, steps))
    by_operand = zip(*(steps for _, steps in merged)) if merged else [()] * len(strides)
    return Loops(tuple(n for n, _ in merged), tuple(by_operand), variable)


def loops_over(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[Loops, list[int]]:
    """Return C loops over a tensor shape with named sizes, and the values of these sizes."""
    sizes = list[int]()
    loops = over(shape, strides)
    return loops.named(sizes), sizes


@dataclass
class Line:
    """One call of a C kernel on tensors. Each tensor's place is a memory and the byte at which the
    tensor begins.

    ``first`` is the index of the first numeric value that Python passes to the call.
    """

    kernel: int
    places: list[tuple[int, int]]
    first: int
    sizes: list[int]

    def call(self) -> list[int]:
        """Return the kernel call as integers, in the format of ``native/steps.h``."""
        numbers = [self.kernel, len(self.places), len(self.sizes), self.first]
        for place in self.places:
            numbers += place
        return numbers + self.sizes


@dataclass
class Formula:
    """The computation of each entry of a tensor by a formula, before its kernel is written.

    Neighboring formulas can share a kernel (``fusion.py``). ``text`` is C code with the names of
    ``arguments`` in braces. It computes in the C type ``real``.
    """

    text: str
    arguments: Kwargs
    real: str
    out: Place

    @property
    def operands(self) -> list[Place]:
        """The places of the result and of all arguments that are tensors."""
        tensors = [value for value in self.arguments.values() if isinstance(value, Place)]
        return [self.out, *tensors]


class Writer:
    """Turns one traced training step into calls of C kernels, and writes the code of these
    kernels."""

    def __init__(
        self,
        dtype: torch.dtype,
        kernels: dict[str, int],
        trace: Trace,
        memories: Storages,
    ) -> None:
        self.dtype = dtype
        self.kernels = kernels
        self.real = C_TYPES[dtype]
        self.storages = trace.outside
        self.memories = memories
        self.numbers: list[float] = []
        made = dict[int, int]()
        for i, op in enumerate(trace.operations):
            for place in op.makes:
                made.setdefault(place.memory, i)
        self.begin, self.size = trace.arranged(made)
        self.workspace = 0

    def first_byte(self, place: Place) -> tuple[int, int]:
        """Return the index of the memory that holds a tensor, and the byte at which the tensor
        begins there."""
        # Memory 0 is the working memory of the step; the others were there before.
        if place.memory in self.begin:
            return 0, self.begin[place.memory] + place.extent[0]
        storage = self.storages[place.memory]
        self.memories.setdefault(storage.data_ptr(), storage)
        return 1 + list(self.memories).index(storage.data_ptr()), place.extent[0]

    def call(
        self,
        places: Sequence[Place | None],
        body: str,
        numbers: Sequence[float] = (),
        *,
        sizes: Sequence[int],
        workspace: int = 0,
    ) -> Line:
        """Return a call of the kernel with the C code ``body`` for the tensors at some places.

        The code uses the names p0, ... for these tensors, s0, ... for numeric values, n0, ... for
        sizes, and w for working memory.
        """
        code = []
        begins = []
        for i, place in enumerate(places):
            real = self.real if place is None else c_type(place.dtype)
            code.append(f"{real} *p{i} = ({real} *)P[{i}];")
            begins.append((-1, 0) if place is None else self.first_byte(place))
        if workspace:
            self.workspace = max(self.workspace, workspace * self.dtype.itemsize)
            code.append(f"{self.real} *w = ({self.real} *)P[{len(begins)}];")
            begins.append((0, self.size))
        code += [f"double s{i} = S[{i}];" for i in range(len(numbers))]
        code += [f"int64_t n{i} = N[{i}];" for i in range(len(sizes))]
        # Equal code is one kernel.
        kernel = self.kernels.setdefault("\n".join([*code, body]), len(self.kernels))
        first = len(self.numbers)
        self.numbers += map(float, numbers)
        return Line(kernel, begins, first, [*sizes])

    def pointwise(self, name: str, kwargs: Kwargs, out: Place) -> Formula:
        """Return the computation of each entry of the tensor ``out`` by an operation's formula.

        All operands are converted to the type in which the operation computes.
        """
        text = formula_of(name, kwargs)
        names = _variables(text)
        dtype = out.dtype
        if name in OF_INPUTS:  # in the common type of both arguments
            dtype = torch.result_type(_example(kwargs[names[0]]), _example(kwargs[names[-1]]))
        if name == "remainder" and dtype.is_floating_point:
            text = REMAINDER_OF_FRACTIONS
        if name.startswith("bitwise") and dtype != torch.bool:
            text = BITWISE[name]
        arguments = {}
        for name in names:
            value = kwargs[name]
            if not isinstance(value, Place | int | float):
                raise TraceError(f"{name}={value!r} is not supported")
            arguments[name] = value
        formula = Formula(text, arguments, c_type(dtype), out)
        for place in formula.operands:
            c_type(place.dtype)  # raises TraceError for a dtype that is not supported
        return formula

    def filled(self, out: Place, value: float) -> Formula:
        """Return the computation that fills the tensor ``out`` with one value."""
        return self.pointwise("fill", {"value": value}, out)

    def copied(self, out: Place, source: Place) -> Formula:
        """Return the computation that copies the tensor ``source`` to ``out``."""
        return self.pointwise("clone", {"self": source}, out)


def loops_of(formula: Formula) -> Loops:
    """Return the C loops over the entries of a formula's result and arguments."""
    dim = len(formula.out.shape)
    strides: list[Sequence[int]] = [formula.out.stride]
    for place in formula.operands[1:]:
        strides.append(broadcast_strides(place, dim))
    return over(formula.out.shape, strides)


def _variables(formula: str) -> list[str]:
    """Return the names in braces in a C formula, each once, in the order of their first use."""
    return list(dict.fromkeys(re.findall(r"{(\w+)}", formula)))


def _example(value: Place | float) -> Tensor | float:
    """Return a tensor without data with the shape and dtype of a place. A Python number is returned
    unchanged."""
    if isinstance(value, Place):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value


def with_entry(values: Sequence[int], axis: int, entry: int) -> list[int]:
    """Return a copy of sizes or strides with a new entry for one axis."""
    return [entry if i == axis else value for i, value in enumerate(values)]


def pick(values: Sequence[int], axes: Iterable[int]) -> list[int]:
    """Return the sizes or strides of the selected axes."""
    return [values[axis] for axis in axes]


def broadcast_strides(place: Place, dim: int) -> list[int]:
    """Return a tensor's strides after broadcasting the tensor to ``dim`` axes."""
    strides = [0 if n == 1 else step for n, step in zip(place.shape, place.stride)]
    # axes are added in front
    return [0] * (dim - len(strides)) + strides


def is_contiguous(place: Place) -> bool:
    """Return whether a tensor's place in memory is contiguous, row by row."""
    # A tensor on this device has no memory.
    return torch.empty_strided(place.shape, place.stride, device="meta").is_contiguous()


def require(is_supported: bool, op: Operation, arguments: str = "these arguments") -> None:
    """Raise TraceError, which names an operation and its unsupported arguments, unless
    ``is_supported``."""
    if not is_supported:
        raise TraceError(f"{op.function} with {arguments} is not supported")
