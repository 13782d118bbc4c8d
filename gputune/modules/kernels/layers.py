"""Writes C code for matrix products, norms and max pooling, as calls of the library's functions.

The functions are in ``native/strided.h``, ``native/norms.h`` and ``native/images.h``.
"""

import math
from collections.abc import Iterator, Sequence

from gputune.modules.kernels.writer import Formula, Line, Writer, is_contiguous, require
from gputune.modules.trace import Kwargs, Operation, Place

# columns of the widest tile of a product; it needs working memory for the inner rows and one tile
_TILE = 96
# Smallest inner and column sizes for which a transposed first factor is copied before a product. Its
# copy takes longer than it saves in smaller products (one EPYC core).
_TURNED_INNER = 64
_TURNED_COLUMNS = 128
# Narrow rows are joined up to this width in C.
_JOINED = 64


def product(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line | Formula]:
    """Yield the C kernel calls for a matrix product with an added matrix or bias."""
    names = ("self", "mat2")
    added = None
    for pair in (("batch1", "batch2"), ("mat1", "mat2")):
        if pair[0] in kwargs:
            names = pair
            added = kwargs["self"]
    a = kwargs[names[0]]
    b = kwargs[names[1]]
    is_plain = kwargs.get("beta", 1) == kwargs.get("alpha", 1) == 1 and out.stride[-1] == 1
    require(is_plain and a.dtype == b.dtype == out.dtype, op, "other factors")
    require(out.dtype == writer.dtype, op, f"numbers of {out.dtype}")
    # A matrix or a bias that the kernel can add.
    matrix: Place | None = None
    if (
        added is not None
        and added.dtype == out.dtype
        and (added.stride[-1], added.shape[-1]) == (1, out.shape[-1])
        and (added.memory != out.memory or added == out)
    ):
        matrix = added
    factors = [out, a, b] if matrix is None else [out, a, b, matrix]
    begins = [p.stride[0] if len(p.shape) > 2 and p.shape[0] > 1 else 0 for p in factors]
    sizes = [
        out.shape[0] if len(out.shape) > 2 else 1,
        *out.shape[-2:],
        a.shape[-1],
        *a.stride[-2:],
        *b.stride[-2:],
        *begins,
        out.stride[-2],
    ]
    if matrix is None:
        addition = "0, 0"
    else:
        # A bias is one row that is added to all rows of the product.
        is_bias = len(matrix.shape) == 1 or matrix.shape[-2] == 1
        addition = f"p3 + i * n11, n{len(sizes)}"
        sizes.append(0 if is_bias else matrix.stride[-2])
    workspace = _TILE * (a.shape[-1] + _TILE)
    function = "matrix_product"
    is_large = a.shape[-1] >= _TURNED_INNER and out.shape[-1] >= _TURNED_COLUMNS
    if is_large and a.stride[-2] == 1 and a.stride[-1] != 1:
        function = "turned_product"
        workspace += a.shape[-2] * a.shape[-1]
    body = (
        f"for (long i = 0; i < n0; i++) library->{function}(n1, n2, n3, p1 + i * n9, n4, n5, p2 + i * "
        f"n10, n6, n7, {addition}, p0 + i * n8, n{8 + len(begins)}, w);"
    )
    yield writer.call(factors, body, sizes=sizes, workspace=workspace)
    if added is not None and matrix is None:
        yield writer.pointwise("add", {"self": out, "other": added, "alpha": 1}, out)


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
