"""Writes C code that joins tensors, or puts the gradient of a part into place."""

from collections.abc import Iterator

from gputune.modules.kernels.places import part_of, without_axis
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place


def joined(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a concatenation or a stack: one copy for each part."""
    axis = kwargs["dim"] % len(out.shape)
    begin = 0
    for part in kwargs["tensors"]:
        if op.name == "stack":
            yield writer.copied(without_axis(out, axis, begin), part)
            begin += 1
        elif part.shape != (0,):
            yield writer.copied(part_of(out, axis, begin, part.shape[axis]), part)
            begin += part.shape[axis]


def part_gradient(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for the gradient of a selection or a slice: zeros, then one copied
    part."""
    axis = kwargs["dim"] % len(out.shape)
    gradient = kwargs["grad_output"]
    n = out.shape[axis]
    if op.name == "select_backward":
        part = without_axis(out, axis, kwargs["index"] % n)
    else:
        start = kwargs["start"]
        begin = max(0, start + n if start < 0 else start)
        part = part_of(out, axis, begin, gradient.shape[axis], kwargs["step"])
    yield writer.filled(out, 0.0)
    yield writer.copied(part, gradient)
