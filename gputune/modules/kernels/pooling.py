"""Writes C code for the pooling of images and sequences, and for its gradient."""

from collections.abc import Iterator, Sequence

from gputune.modules.kernels.places import require
from gputune.modules.kernels.writer import Line, Writer
from gputune.modules.trace import Kwargs, Operation, Place


def _as_batch(values: Sequence[int], entry: int) -> list[int]:
    """Return sizes or strides with four axes. ``entry`` is added in front for a single image."""
    return [entry] * (4 - len(values)) + [*values]


def _pair(values: Sequence[int]) -> list[int]:
    """Return the options of both axes from the argument of a pooling, which may be one value for
    both."""
    return [*values] if len(values) == 2 else [values[0], values[0]]


def _sizes(x: Place, y: Place, positions: Place, options: Sequence[int]) -> list[int]:
    """Return the sizes of a pooling in the order of the C code."""
    sizes = [*_as_batch(x.shape, 1), *y.shape[-2:], *options]
    for place in (x, y, positions):
        sizes += _as_batch(place.stride, 0)
    return sizes


def _options(kwargs: Kwargs) -> list[int]:
    """Return kernel, stride, padding and dilation of both axes. Adaptive windows have kernel 0."""
    if "kernel_size" not in kwargs:
        return [0, 0, 1, 1, 0, 0, 1, 1]
    kernel = _pair(kwargs["kernel_size"])
    stride = _pair(kwargs["stride"]) if kwargs["stride"] else kernel
    return [*kernel, *stride, *_pair(kwargs["padding"]), *_pair(kwargs["dilation"])]


def max_pool(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a max pooling, with the positions of the largest numbers."""
    x = kwargs["self"]
    positions = op.makes[1]
    require(x.dtype == writer.dtype, op, str(x.dtype))
    sizes = _sizes(x, out, positions, _options(kwargs))
    yield writer.call([out, x, positions], "library->max_pool(N, p1, p0, p2);", sizes=sizes)


def max_pool_gradient(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for the gradient of a max pooling."""
    gradient = kwargs["grad_output"]
    positions = kwargs["indices"]
    require(gradient.dtype == writer.dtype, op, str(gradient.dtype))
    sizes = _sizes(out, gradient, positions, _options(kwargs))
    yield writer.call(
        [out, gradient, positions], "library->max_pool_below(N, p1, p2, p0);", sizes=sizes
    )
