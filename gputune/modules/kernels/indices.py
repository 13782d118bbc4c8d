"""Writes C code for operations that read or write a tensor at the positions in index tensors.

A negative index counts from the end of an axis.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gputune.modules.kernels.writer import (
    Formula,
    Line,
    Writer,
    broadcast_strides,
    loops_over,
    named,
    pick,
    require,
    with_entry,
)
from gputune.modules.trace import Kwargs, Operation, Place


@dataclass(frozen=True)
class _Positions:
    """The positions of entries in a tensor, for loops over ``shape``.

    ``steps`` are the strides of the tensor along the loops, 0 where an index chooses the position.
    Each index has the axis of the tensor that it chooses, and its own strides along the loops.
    """

    shape: list[int]
    steps: list[int]
    indices: list[Place]
    axes: list[int]
    strides: list[list[int]]

    @staticmethod
    def of_indices(op: Operation, x: Place, indices: Sequence[Place | None]) -> "_Positions":
        """Return the positions of ``x[i, j]``.

        The axes of the indices are where the first index is. If another axis lies between two
        indexed axes, they are in front.
        """
        axes = [axis for axis, index in enumerate(indices) if index is not None]
        tensors = [index for index in indices if index is not None]
        require(all(index.dtype != torch.bool for index in tensors), op, "a mask as an index")
        index_shape = [*np.broadcast_shapes(*[index.shape for index in tensors])]
        is_adjacent = axes == [*range(axes[0], axes[-1] + 1)]
        n_before = axes[0] if is_adjacent else 0
        others = [axis for axis in range(len(x.shape)) if axis not in axes]
        before = others[:n_before]
        after = others[n_before:]
        shape = pick(x.shape, before) + index_shape + pick(x.shape, after)
        steps = pick(x.stride, before) + [0] * len(index_shape) + pick(x.stride, after)
        strides = []
        for index in tensors:
            inner = broadcast_strides(index, len(index_shape))
            strides.append([0] * n_before + inner + [0] * len(after))
        return _Positions(shape, steps, tensors, axes, strides)

    @staticmethod
    def along_axis(x: Place, axis: int, index: Place) -> "_Positions":
        """Return the positions of ``x.gather(axis, index)``."""
        steps = with_entry(x.stride, axis, 0)
        return _Positions([*index.shape], steps, [index], [axis], [[*index.stride]])

    def call(
        self, writer: Writer, x: Place, other: Place | float, body: str, *, first: int
    ) -> Line:
        """Return the kernel call that runs C code for each position.

        In the code, X is the entry of ``x`` and Y the entry of ``other``, a tensor or a number. The
        operand ``first`` (0: ``other``, 2: the first index) decides the order of the loops.
        """
        places = [x, *self.indices]
        numbers = []
        other_strides = [0] * len(self.shape)
        if isinstance(other, Place):
            places.append(other)
            other_strides = broadcast_strides(other, len(self.shape))
        else:
            numbers.append(other)
        operands = [other_strides, self.steps, *self.strides]
        order = [first, *[i for i in range(len(operands)) if i != first]]
        loops, sizes = loops_over(self.shape, [operands[i] for i in order])
        position = loops.index(order.index(1))
        for i, axis in enumerate(self.axes):
            index = f"p{1 + i}[{loops.index(order.index(2 + i))}]"
            size = named(x.shape[axis] if x.shape else 1, sizes)
            step = named(x.stride[axis] if x.shape else 1, sizes)
            position += f" + ({index} < 0 ? {index} + {size} : {index}) * {step}"
        value = "s0" if numbers else f"p{len(places) - 1}[{loops.index(order.index(0))}]"
        code = body.replace("X", f"p0[{position}]").replace("Y", value)
        # Writes are not vectorized, because positions may repeat.
        pragma = "" if first else "GCC ivdep"
        return writer.call(places, loops.nest(code, pragma), numbers, sizes=sizes)


def chosen(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for ``x[i, j]`` or ``x.gather(axis, index)``."""
    x: Place = kwargs["self"]
    if op.name == "gather":
        positions = _Positions.along_axis(x, kwargs["dim"] % max(1, len(x.shape)), kwargs["index"])
    else:
        positions = _Positions.of_indices(op, x, kwargs["indices"])
    yield positions.call(writer, x, out, "Y = X;", first=0)


def put(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line | Formula]:
    """Yield the C kernel calls for ``x[i, j] = values`` or ``x.scatter(axis, index, values)``, or
    the same with ``+=``."""
    x: Place = kwargs["self"]
    if "indices" in kwargs:
        positions = _Positions.of_indices(op, out, kwargs["indices"])
        adds = kwargs["accumulate"]
        values = kwargs["values"]
    else:
        require(kwargs.get("reduce") is None, op)
        axis = kwargs["dim"] % max(1, len(x.shape))
        positions = _Positions.along_axis(out, axis, kwargs["index"])
        adds = "add" in op.name
        values = kwargs["src"] if "src" in kwargs else kwargs["value"]
    if x != out:
        yield writer.copied(out, x)
    yield positions.call(writer, out, values, "X += Y;" if adds else "X = Y;", first=2)
