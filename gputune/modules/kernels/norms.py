"""Writes C code for the gradient of layer norm, and for batch and group norms.

The kernels of batch and group norms are in ``native/norms.h``.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from gputune.modules.kernels.places import is_contiguous, require
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place

# Narrow rows are joined up to this width in C.
_JOINED = 64


def layer_norm_gradient(
    writer: Writer, kwargs: Kwargs, op: Operation, out: Place
) -> Iterator[Line]:
    """Yield the C kernel call for the gradient of a layer norm without weights."""
    places = [out, kwargs["grad_out"], kwargs["input"], kwargs["mean"], kwargs["rstd"]]
    is_plain = kwargs["weight"] is None and op.makes == [out]
    require(is_plain and all(map(is_contiguous, places)), op)
    n = math.prod(kwargs["normalized_shape"])
    body = "library->layer_norm_slope(n0, n1, p1, p2, p3, p4, p0);"
    sizes = [math.prod(kwargs["input"].shape) // n, n]
    yield writer.call(places, body, sizes=sizes)


def layer_norm(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel calls for a layer norm."""
    x = kwargs["input"]
    places = [*op.makes, x]
    require(len(op.makes) == 3 and all(map(is_contiguous, places)), op)
    weight = kwargs["weight"]
    bias = kwargs["bias"]
    n = math.prod(kwargs["normalized_shape"])
    shape = (math.prod(x.shape) // n, n)
    body = "library->layer_norm(n0, n1, s0, p3, p0, p1, p2);"
    yield writer.call(places, body, [kwargs["eps"]], sizes=shape)
    flat = replace(out, shape=shape, stride=(n, 1))
    for name, factor in (("mul", weight), ("add", bias)):
        if factor is not None:
            require(is_contiguous(factor), op)
            other = replace(factor, shape=shape, stride=(0, 1))
            yield writer.pointwise(name, {"self": flat, "other": other, "alpha": 1}, flat)


def _channels(op: Operation, *places: Place) -> tuple[list[int], list[int]]:
    """Return the sizes (B, C, L) of tensors of channels, and each tensor's strides. Raises
    TraceError if the pixels of a channel are not evenly spaced."""
    sizes = [*places[0].shape[:2], math.prod(places[0].shape[2:])]
    strides = []
    for place in places:
        # (size, stride) of the axes of pixels, the last one first
        pixels = [axis for axis in zip(place.shape[:1:-1], place.stride[:1:-1]) if axis[0] != 1]
        step = pixels[0][1] if pixels else 1
        expected = step
        for size, along in pixels:
            require(along == expected, op, "pixels with gaps")
            expected *= size
        strides += [*place.stride[:2], step]
    return sizes, strides


def batch_norm(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a batch norm in training or evaluation."""
    x = kwargs["input"]
    is_training = bool(kwargs["training"])
    require(x.dtype == writer.dtype, op, str(x.dtype))
    sizes, strides = _channels(op, x, out)
    # The gradient, which is the last tensor of these sizes, is not used here.
    sizes += [1, is_training, *strides, *strides[3:]]
    places = [out, x, *map(kwargs.get, "weight bias running_mean running_var".split())]
    places += op.results[1:] if is_training else [None, None]
    for place in places[2:]:
        require(place is None or is_contiguous(place), op)
    body = "library->batch_norm(N, s0, s1, p1, p2, p3, p4, p5, p0, p6, p7, w);"
    numbers = [kwargs["momentum"], kwargs["eps"]]
    yield writer.call(places, body, numbers, sizes=sizes, workspace=_tables(x))


def batch_norm_gradient(
    writer: Writer, kwargs: Kwargs, op: Operation, out: Place
) -> Iterator[Line]:
    """Yield the C kernel call for the gradients of a batch norm."""
    gradient = kwargs["grad_out"]
    x = kwargs["input"]
    below, *in_tables = op.results
    require(below is not None and x.dtype == writer.dtype, op)
    sizes, strides = _channels(op, x, out, gradient)
    sizes += [1, bool(kwargs["train"]), *strides]
    names = "weight save_mean save_invstd running_mean running_var"
    places = [out, gradient, x, *map(kwargs.get, names.split()), *in_tables]
    for place in places[3:]:
        require(place is None or is_contiguous(place), op)
    body = "library->batch_norm_slope(N, s0, p1, p2, p3, p4, p5, p6, p7, p0, p8, p9, w);"
    yield writer.call(places, body, [kwargs["eps"]], sizes=sizes, workspace=_tables(x))


def _tables(x: Place) -> int:
    """Return the numbers of working memory for the statistics of all channels of a batch norm."""
    return 6 * (x.shape[1] + _JOINED)


def group_norm(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a group norm."""
    x = kwargs["input"]
    require(x.dtype == writer.dtype, op, str(x.dtype))
    sizes, strides = _channels(op, x, out)
    sizes += [kwargs["group"], 1, *strides, *strides[3:]]
    places = [out, x, kwargs["weight"], kwargs["bias"], *op.results[1:]]
    for place in places[2:]:
        require(place is None or is_contiguous(place), op)
    body = "library->group_norm(N, s0, p1, p2, p3, p0, p4, p5);"
    yield writer.call(places, body, [kwargs["eps"]], sizes=sizes)


def group_norm_gradient(
    writer: Writer, kwargs: Kwargs, op: Operation, out: Place
) -> Iterator[Line]:
    """Yield the C kernel call for the gradients of a group norm."""
    gradient = kwargs["grad_out"]
    x = kwargs["input"]
    require(x.dtype == writer.dtype, op, str(x.dtype))
    sizes, strides = _channels(op, x, op.results[0] or x, gradient)
    sizes += [kwargs["group"], 1, *strides]
    places = [gradient, x, *map(kwargs.get, "weight mean rstd".split()), *op.results]
    for place in (*places[2:5], *places[6:]):
        require(place is None or is_contiguous(place), op)
    body = "library->group_norm_slope(N, p0, p1, p2, p3, p4, p5, p6, p7);"
    yield writer.call(places, body, sizes=sizes)
