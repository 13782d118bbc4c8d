"""Writes C code that moves pixels of images: pixel shuffle, and patches of images as columns."""

from collections.abc import Iterator
from dataclasses import replace

from gputune.modules.kernels.places import part_of
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place


def _split(place: Place, axis: int, size: int) -> Place:
    """Return a place with one axis split into two. The second of these has ``size`` entries."""
    n = place.shape[axis]
    along = place.stride[axis]
    shape = [*place.shape]
    stride = [*place.stride]
    shape[axis : axis + 1] = [n // size, size]
    stride[axis : axis + 1] = [along * size, along]
    return replace(place, shape=tuple(shape), stride=tuple(stride))


def _permuted(place: Place, axes: list[int]) -> Place:
    """Return a place with its axes in another order."""
    shape = tuple(place.shape[axis] for axis in axes)
    stride = tuple(place.stride[axis] for axis in axes)
    return replace(place, shape=shape, stride=stride)


def shuffled(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call that moves channels into pixels, or pixels into channels."""
    x = kwargs["self"]
    is_forward = op.name == "pixel_shuffle"
    factor = kwargs["upscale_factor" if is_forward else "downscale_factor"]
    small, large = (x, out) if is_forward else (out, x)
    front = [*range(len(x.shape) - 3)]
    channel = len(front)
    # (..., C, factor, factor, H, W)
    small = _split(_split(small, channel, factor), channel, factor)
    # (..., C, H, factor, W, factor)
    large = _split(_split(large, channel + 2, factor), channel + 1, factor)
    axes = [*front, *(channel + i for i in (0, 2, 4, 1, 3))]
    large = _permuted(large, axes)
    yield writer.copied(large, small) if is_forward else writer.copied(small, large)


def patches(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for patches of images as columns, or for the sum of such columns to
    images: one call for each pixel of a patch."""
    is_forward = op.name == "im2col"
    images, columns = (kwargs["self"], out) if is_forward else (out, kwargs["self"])
    if len(images.shape) == 3:
        images = replace(images, shape=(1, *images.shape), stride=(0, *images.stride))
        columns = replace(columns, shape=(1, *columns.shape), stride=(0, *columns.stride))
    kernel = kwargs["kernel_size"]
    counts = []
    for axis in (0, 1):
        reach = (kernel[axis] - 1) * kwargs["dilation"][axis]
        free = images.shape[2 + axis] + 2 * kwargs["padding"][axis] - reach - 1
        counts.append(free // kwargs["stride"][axis] + 1)
    # (B, C, KH, KW, OH, OW)
    columns = _split(_split(columns, 1, kernel[1]), 1, kernel[0])
    columns = _split(columns, 4, counts[1])
    yield writer.filled(out, 0.0)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            pixels = images
            cells = part_of(part_of(columns, 2, i, 1), 3, j, 1)
            for axis, tap in ((0, i), (1, j)):
                stride = kwargs["stride"][axis]
                # the position in the image of the first patch's pixel
                begin = tap * kwargs["dilation"][axis] - kwargs["padding"][axis]
                first = max(0, -(begin // stride))
                end = min(counts[axis], (images.shape[2 + axis] - 1 - begin) // stride + 1)
                count = max(0, end - first)
                pixels = part_of(pixels, 2 + axis, begin + first * stride, count, stride)
                cells = part_of(cells, 4 + axis, first, count)
            cells = replace(cells, shape=pixels.shape, stride=cells.stride[:2] + cells.stride[4:])
            if 0 in pixels.shape:
                continue
            if is_forward:
                yield writer.copied(cells, pixels)
            else:
                yield writer.pointwise("add", {"self": pixels, "other": cells, "alpha": 1}, pixels)
