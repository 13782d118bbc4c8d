"""Writes C code for operations of a member's step that read or write by an index tensor.

A member is one trial on one fold. A place is a tensor's position and layout in memory. A negative
index counts from the end if torch allows negative indices.
"""

from collections.abc import Iterator, Sequence

import torch

from gputune.modules.kernels.places import broadcast_strides, require, with_entry
from gputune.modules.kernels.writer import Line, Writer, loops_over, named
from gputune.modules.trace import Kwargs, Operation, Place


def _only_index(op: Operation, indices: Sequence[Place | None]) -> tuple[int, Place]:
    """Return the axis and the place in memory of an operation's only index tensor.

    Raises TraceError if there are several, or if the index is boolean or has several axes.
    """
    axis, *others = [i for i, index in enumerate(indices) if index is not None]
    index = indices[axis]
    assert index is not None
    is_single = not others and len(index.shape) == 1 and index.dtype != torch.bool
    require(is_single, op, "several indices")
    return axis, index


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
        if op.name == "index":
            axis, index = _only_index(op, kwargs["indices"])
        else:
            axis = kwargs["dim"] % max(1, len(x.shape))
            index = kwargs["index"]
        row_strides = with_entry(x.stride, axis, 0)
        index_strides = index.stride
        if op.name != "gather":
            zeros = [0] * len(out.shape)
            index_strides = with_entry(zeros, axis, sum(index.stride))
    loops, sizes = loops_over(out.shape, [out.stride, index_strides, row_strides])
    row = f"p2[{loops.index(1)}]"
    if op.name == "index":  # the other operations take no negative index
        row = _index_at(row, named(x.shape[axis], sizes))
    number = f"p1[{loops.index(2)} + {row} * {named(x.stride[axis], sizes)}]"
    body = loops.nest(f"p0[{loops.index(0)}] = {number};")
    yield writer.call([out, x, index], body, sizes=sizes)


def embedding_gradient(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for the gradient of an embedding: zeros, then each row's gradient is
    added."""
    gradient = kwargs["grad_output"]
    index = kwargs["indices"]
    require(kwargs["padding_idx"] < 0 and not kwargs["scale_grad_by_freq"], op)
    yield writer.filled(out, 0.0)
    index_strides = [*index.stride, 0]
    row_strides = [*[0] * len(index.shape), out.stride[1]]
    strides = [gradient.stride, index_strides, row_strides]
    loops, sizes = loops_over(gradient.shape, strides)
    target = f"p0[p2[{loops.index(1)}] * {named(out.stride[0], sizes)} + {loops.index(2)}]"
    # No vectors along rows of the index: an id may occur twice, and must not be written twice at
    # once.
    body = loops.nest(f"{target} += p1[{loops.index(0)}];", "")
    yield writer.call([out, gradient, index], body, sizes=sizes)


def added_at_places(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls that add values at the positions in an index tensor. Positions may
    repeat."""
    x = kwargs["self"]
    if op.name.startswith("index_put"):
        axis, index = _only_index(op, kwargs["indices"])
        require(kwargs["accumulate"], op, "an index that replaces")
        source = kwargs["values"]
        shape = with_entry(out.shape, axis, index.shape[0])
        zeros = [0] * len(shape)
        index_strides = with_entry(zeros, axis, index.stride[0])
        source_strides = broadcast_strides(source, len(shape))
    else:
        axis = kwargs["dim"] % max(1, len(x.shape))
        index = kwargs["index"]
        source = kwargs["src"]
        shape = index.shape
        index_strides = index.stride
        source_strides = source.stride
    if x != out:
        yield writer.copied(out, x)
    # The index is the first operand, so the innermost loop runs along it. No loop may be
    # vectorized, because places may be equal.
    strides = [index_strides, source_strides, with_entry(out.stride, axis, 0)]
    loops, sizes = loops_over(shape, strides)
    row = _index_at(f"p1[{loops.index(0)}]", named(out.shape[axis], sizes))
    target = f"p0[{loops.index(2)} + {row} * {named(out.stride[axis], sizes)}]"
    body = loops.nest(f"{target} += p2[{loops.index(1)}];", "")
    yield writer.call([out, index, source], body, sizes=sizes)


def _index_at(index: str, size: int | str) -> str:
    """Return the C code of an index into an axis. A negative index counts from the axis' end."""
    return f"({index} < 0 ? {index} + {size} : {index})"
