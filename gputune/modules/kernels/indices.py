"""Writes C code for operations of a member's step that read or write by an index tensor.

A member is one trial on one fold. A place is a tensor's position and layout in memory. A negative
index counts from the end if torch allows negative indices.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from gputune.modules.kernels.places import broadcast_strides, pick, require, with_entry
from gputune.modules.kernels.writer import Line, Writer, loops_over, named
from gputune.modules.trace import Kwargs, Operation, Place


def _by_indices(
    op: Operation, x: Place, indices: Sequence[Place | None]
) -> tuple[list[Place], list[list[int]], list[int], list[int]]:
    """Return the index tensors of an operation, their strides along the axes of the indexed part,
    the strides of ``x`` along its axes without an index, and the indexed axes of ``x``.

    The axes of the indices are where the first index is. If another axis lies between two indexed
    axes, they are in front.
    """
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    tensors = [index for index in indices if index is not None]
    require(all(index.dtype != torch.bool for index in tensors), op, "a mask as an index")
    dims = max(len(index.shape) for index in tensors)
    is_adjacent = axes == [*range(axes[0], axes[-1] + 1)]
    n_before = axes[0] if is_adjacent else 0
    others = [axis for axis in range(len(x.shape)) if axis not in axes]
    steps = pick(x.stride, others)
    n_after = len(others) - n_before
    strides = []
    for index in tensors:
        strides.append([0] * n_before + broadcast_strides(index, dims) + [0] * n_after)
    return tensors, strides, steps[:n_before] + [0] * dims + steps[n_before:], axes


def indexed(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for ``x[i, j]``: the entries at the positions in index tensors."""
    x = kwargs["self"]
    tensors, strides, steps, axes = _by_indices(op, x, kwargs["indices"])
    loops, sizes = loops_over(out.shape, [out.stride, steps, *strides])
    position = loops.index(1)
    for i, axis in enumerate(axes):
        index = _index_at(f"p{2 + i}[{loops.index(2 + i)}]", named(x.shape[axis], sizes))
        position += f" + {index} * {named(x.stride[axis], sizes)}"
    body = loops.nest(f"p0[{loops.index(0)}] = p1[{position}];")
    yield writer.call([out, x, *tensors], body, sizes=sizes)


def put_at_indices(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for ``x[i, j] = values``, or ``+=``."""
    values = kwargs["values"]
    if kwargs["self"] != out:
        yield writer.copied(out, kwargs["self"])
    tensors, strides, steps, axes = _by_indices(op, out, kwargs["indices"])
    dims = max(len(index.shape) for index in tensors)
    n_before = axes[0] if axes == [*range(axes[0], axes[-1] + 1)] else 0
    others = [size for axis, size in enumerate(out.shape) if axis not in axes]
    of_indices = [1] * dims
    for tensor in tensors:
        for i, size in enumerate(tensor.shape, dims - len(tensor.shape)):
            of_indices[i] = max(of_indices[i], size)
    shape = [*others[:n_before], *of_indices, *others[n_before:]]
    # The index is the first operand, so the innermost loop runs along it. No loop may be
    # vectorized, because places may be equal.
    values_strides = broadcast_strides(values, len(shape))
    loops, sizes = loops_over(shape, [strides[0], values_strides, steps, *strides[1:]])
    position = loops.index(2)
    for i, axis in enumerate(axes):
        operand = 2 + i if i else 0
        index = _index_at(f"p{2 + i}[{loops.index(operand)}]", named(out.shape[axis], sizes))
        position += f" + {index} * {named(out.stride[axis], sizes)}"
    sign = "+=" if kwargs["accumulate"] else "="
    body = loops.nest(f"p0[{position}] {sign} p1[{loops.index(1)}];", "")
    yield writer.call([out, values, *tensors], body, sizes=sizes)


def chosen_rows(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call that copies the rows or entries at the positions in an index
    tensor."""
    if op.name == "embedding":
        x = kwargs["weight"]
        axis = 0
        index = kwargs["indices"]
        index_strides = [*index.stride, 0]
        row_strides = [*[0] * len(index.shape), x.stride[1]]
    else:
        x = kwargs["self"]
        axis = kwargs["dim"] % max(1, len(x.shape))
        index = kwargs["index"]
        row_strides = with_entry(x.stride, axis, 0)
        index_strides = index.stride
        if op.name != "gather":
            zeros = [0] * len(out.shape)
            index_strides = with_entry(zeros, axis, sum(index.stride))
    loops, sizes = loops_over(out.shape, [out.stride, index_strides, row_strides])
    # none of these operations takes a negative index
    row = f"p2[{loops.index(1)}]"
    number = f"p1[{loops.index(2)} + {row} * {named(x.stride[axis], sizes)}]"
    body = loops.nest(f"p0[{loops.index(0)}] = {number};")
    yield writer.call([out, x, index], body, sizes=sizes)


def embedding_gradient(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for the gradient of an embedding: zeros, then each row's gradient is
    added."""
    gradient = kwargs["grad_output"]
    index = kwargs["indices"]
    require(not kwargs["scale_grad_by_freq"], op)
    yield writer.filled(out, 0.0)
    index_strides = [*index.stride, 0]
    row_strides = [*[0] * len(index.shape), out.stride[1]]
    strides = [gradient.stride, index_strides, row_strides]
    loops, sizes = loops_over(gradient.shape, strides)
    row = f"p2[{loops.index(1)}]"
    target = f"p0[{row} * {named(out.stride[0], sizes)} + {loops.index(2)}]"
    body = f"{target} += p1[{loops.index(0)}];"
    numbers = []
    if kwargs["padding_idx"] >= 0:
        numbers.append(kwargs["padding_idx"])
        body = f"if ({row} != (int64_t)s0) {body}"
    # No vectors along rows of the index: an id may occur twice, and must not be written twice at
    # once.
    yield writer.call([out, gradient, index], loops.nest(body, ""), numbers, sizes=sizes)


def put_at_places(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls that write or add values at the positions in an index tensor.

    Positions may repeat.
    """
    x = kwargs["self"]
    axis = kwargs["dim"] % max(1, len(x.shape))
    index = kwargs["index"]
    source = kwargs.get("src", kwargs.get("source", kwargs.get("value")))
    adds = "add" in op.name
    require(kwargs.get("alpha", 1) == 1 and kwargs.get("reduce") is None, op)
    if op.name.startswith("index_"):  # the same rows for all entries
        shape = with_entry(out.shape, axis, math.prod(index.shape))
        zeros = [0] * len(shape)
        index_strides = with_entry(zeros, axis, sum(index.stride))
    else:
        shape = [*index.shape]
        index_strides = [*index.stride]
    if x != out:
        yield writer.copied(out, x)
    places = [out, index]
    numbers = list[float]()
    source_strides = [0] * len(shape)
    if isinstance(source, Place):
        places.append(source)
        is_scalar = not source.shape
        source_strides = source_strides if is_scalar else [*source.stride]
    else:
        assert source is not None
        numbers.append(source)
    # The index is the first operand, so the innermost loop runs along it. No loop may be
    # vectorized, because places may be equal.
    strides = [index_strides, source_strides, with_entry(out.stride, axis, 0)]
    loops, sizes = loops_over(shape, strides)
    row = _index_at(f"p1[{loops.index(0)}]", named(out.shape[axis] if out.shape else 1, sizes))
    step = named(out.stride[axis] if out.shape else 1, sizes)
    value = "s0" if numbers else f"p2[{loops.index(1)}]"
    body = f"p0[{loops.index(2)} + {row} * {step}] {'+=' if adds else '='} {value};"
    yield writer.call(places, loops.nest(body, ""), numbers, sizes=sizes)


def _index_at(index: str, size: int | str) -> str:
    """Return the C code of an index into an axis. A negative index counts from the axis' end."""
    return f"({index} < 0 ? {index} + {size} : {index})"
