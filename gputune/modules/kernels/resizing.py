"""Writes C code for linear maps of the pixels of images and sequences: average pooling and
interpolation, and their gradients.

Such an operation is a matrix on the rows of an image and another matrix on its columns. PyTorch
itself computes both matrices, from the images of an identity matrix. Their transposes are the
gradient. Each row of a matrix has few entries, which follow each other.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from gputune.modules.kernels.places import require
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place

aten = torch.ops.aten

OnAxis: TypeAlias = Callable[[Tensor, Kwargs, int, int], Tensor]
"""Applies an operation to one axis of images (1, n, n, 1).

The arguments are the images, the arguments of the operation, the axis (0 is the height) and the
size of the result.
"""


def _average(x: Tensor, kwargs: Kwargs, axis: int, size: int) -> Tensor:
    """Average windows of one axis."""
    kernel = kwargs["kernel_size"]
    stride = kwargs["stride"] or kernel
    options = []
    for values, neutral in ((kernel, 1), (stride, 1), (kwargs["padding"], 0)):
        options.append([values[axis % len(values)], neutral])
    # A divisor divides the sums of whole windows, not each axis.
    divisor = None if kwargs["divisor_override"] is None else 1
    flags = kwargs["ceil_mode"], kwargs["count_include_pad"]
    result: Tensor = aten.avg_pool2d(x, *options, *flags, divisor)
    return result


def _adaptive(x: Tensor, kwargs: Kwargs, axis: int, size: int) -> Tensor:
    """Average adaptive windows of one axis."""
    result: Tensor = aten._adaptive_avg_pool2d(x, [size, 1])
    return result


def _interpolation(name: str) -> OnAxis:
    """Return the function that interpolates one axis with the torch operation ``name``."""

    def interpolate(x: Tensor, kwargs: Kwargs, axis: int, size: int) -> Tensor:
        scale = kwargs.get("scales", kwargs.get(("scales_h", "scales_w")[axis]))
        corners = [kwargs["align_corners"]] if "align_corners" in kwargs else []
        result: Tensor = getattr(aten, name)(x, [size, 1], *corners, scale, None)
        return result

    return interpolate


MAPS: dict[str, OnAxis] = {
    "avg_pool2d": _average,
    "_adaptive_avg_pool2d": _adaptive,
    "upsample_nearest1d": _interpolation("upsample_nearest2d"),
    "upsample_nearest2d": _interpolation("upsample_nearest2d"),
    "_upsample_nearest_exact1d": _interpolation("_upsample_nearest_exact2d"),
    "_upsample_nearest_exact2d": _interpolation("_upsample_nearest_exact2d"),
    "upsample_linear1d": _interpolation("upsample_bilinear2d"),
    "upsample_bilinear2d": _interpolation("upsample_bilinear2d"),
    "upsample_bicubic2d": _interpolation("upsample_bicubic2d"),
}
"""The operations, by their name in torch. The gradient of each has ``_backward`` in its name."""


def _table(matrix: Tensor) -> list[float]:
    """Return the entries of a matrix as the C code reads them.

    For each row, the table has the index of its first entry, the number of entries, and the
    position of the entries in the table. The entries of all rows follow.
    """
    heads = list[float]()
    entries = list[float]()
    for row in matrix:
        places = row.nonzero().flatten().tolist()
        begin = places[0] if places else 0
        count = places[-1] - begin + 1 if places else 0
        heads += [begin, count, 3 * len(matrix) + len(entries)]
        entries += row[begin : begin + count].tolist()
    return heads + entries


def resized(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for an average pooling, an interpolation, or the gradient of one."""
    name = op.name.removesuffix("_backward")
    is_gradient = name != op.name
    x: Place = kwargs["grad_output"] if is_gradient else kwargs["self"]
    require(x.dtype == writer.dtype and len(x.shape) in (3, 4), op, str(x.dtype))
    is_sequence = name.endswith("1d")
    small, large = (x, out) if is_gradient else (out, x)
    tables = list[list[float]]()
    for axis in (0, 1):
        if is_sequence and axis == 0:
            matrix = torch.ones(1, 1)
        else:
            n = large.shape[axis - 2]
            images = torch.eye(n, dtype=writer.dtype).view(1, n, n, 1)
            matrix = MAPS[name](images, kwargs, axis, small.shape[axis - 2]).view(n, -1)
        if axis == 1 and kwargs.get("divisor_override"):
            matrix = matrix / kwargs["divisor_override"]
        tables.append(_table(matrix if is_gradient else matrix.T))
    sizes = [*_as_images(x.shape, is_sequence, 1), *_as_images(out.shape, is_sequence, 1)[2:]]
    for place in (x, out):
        sizes += _as_images(place.stride, is_sequence, 0)
    sizes.append(len(tables[0]))
    body = "library->resize(N, S, p1, p0);"
    yield writer.call([out, x], body, sizes=sizes, table=tables[0] + tables[1])


def _as_images(values: tuple[int, ...], is_sequence: bool, entry: int) -> list[int]:
    """Return sizes or strides with four axes. ``entry`` is inserted for the height of sequences, or
    in front for a single image."""
    if is_sequence:
        return [*values[:2], entry, values[2]]
    return [entry] * (4 - len(values)) + [*values]
