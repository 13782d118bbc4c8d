"""Writes C code that moves entries: joins, flips, rolls, repetitions, padding, and the gradients of
parts and windows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gputune.modules.kernels.places import part_of, pick, require, with_entry, without_axis
from gputune.modules.kernels.writer import Line, Writer, loops_over
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


def _flipped(place: Place, axes: Sequence[int]) -> Place:
    """Return the place of a tensor with its entries in reverse order along some axes."""
    stride = [*place.stride]
    offset = place.offset
    for axis in axes:
        axis %= len(place.shape)
        offset += (place.shape[axis] - 1) * stride[axis]
        stride[axis] = -stride[axis]
    return replace(place, offset=offset, stride=tuple(stride))


def moved(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a flip, a roll, a repetition or a padding, as copies."""
    x: Place = kwargs["self"]
    if op.name == "flip":
        yield writer.copied(out, _flipped(x, kwargs["dims"]))
    elif op.name == "roll":
        yield from _rolled(writer, kwargs, op, out)
    elif op.name == "repeat":
        yield writer.copied(*_repeats(out, x))
    else:
        yield writer.filled(out, kwargs["value"])
        # the last axis comes first: (before, after) of each axis
        pad = kwargs["pad"]
        inside = out
        for i in range(len(pad) // 2):
            axis = len(x.shape) - 1 - i
            before, after = pad[2 * i : 2 * i + 2]
            size = x.shape[axis] + min(before, 0) + min(after, 0)
            inside = part_of(inside, axis, max(before, 0), size)
            x = part_of(x, axis, max(-before, 0), size)
        yield writer.copied(inside, x)


def _rolled(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a roll: each axis is cut in two parts."""
    parts = [(out, kwargs["self"])]
    require(bool(kwargs["dims"]), op, "no axes")
    for shift, axis in zip(kwargs["shifts"], kwargs["dims"]):
        axis %= len(out.shape)
        size = out.shape[axis]
        shift %= max(1, size)
        cut = []
        for target, source in parts:
            cut.append(
                (part_of(target, axis, shift, size - shift), part_of(source, axis, 0, size - shift))
            )
            if shift:
                cut.append(
                    (part_of(target, axis, 0, shift), part_of(source, axis, size - shift, shift))
                )
        parts = cut
    for target, source in parts:
        yield writer.copied(target, source)


def _repeats(out: Place, x: Place) -> tuple[Place, Place]:
    """Return places of a repeated tensor and of its source with two axes in place of each axis: the
    repetitions, and the entries."""
    shape = list[int]()
    stride = list[int]()
    source_stride = list[int]()
    added = len(out.shape) - len(x.shape)
    for axis, (size, step) in enumerate(zip(out.shape, out.stride)):
        length = 1 if axis < added else x.shape[axis - added]
        shape += [size // length, length]
        stride += [length * step, step]
        source_stride += [0, 0 if axis < added else x.stride[axis - added]]
    target = replace(out, shape=tuple(shape), stride=tuple(stride))
    return target, replace(x, shape=tuple(shape), stride=tuple(source_stride))


def windows_gradient(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for the gradient of ``Tensor.unfold``: zeros, then each window is
    added."""
    gradient: Place = kwargs["grad_in"]
    axis = kwargs["dim"] % len(out.shape)
    along = out.stride[axis]
    steps = [*with_entry(out.stride, axis, along * kwargs["step"]), along]
    yield writer.filled(out, 0.0)
    loops, sizes = loops_over(gradient.shape, [gradient.stride, steps])
    # no vectors: windows may overlap
    body = loops.nest(f"p0[{loops.index(1)}] += p1[{loops.index(0)}];", "")
    yield writer.call([out, gradient], body, sizes=sizes)


def diagonal_gradient(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for the gradient of a diagonal: zeros, then the diagonal."""
    first = kwargs["dim1"] % len(out.shape)
    second = kwargs["dim2"] % len(out.shape)
    gradient: Place = kwargs["grad_output"]
    offset = kwargs["offset"]
    begin = out.stride[second] * offset if offset >= 0 else -out.stride[first] * offset
    others = [i for i in range(len(out.shape)) if i not in (first, second)]
    stride = (*pick(out.stride, others), out.stride[first] + out.stride[second])
    yield writer.filled(out, 0.0)
    diagonal = replace(out, offset=out.offset + begin, shape=gradient.shape, stride=stride)
    yield writer.copied(diagonal, gradient)
