"""Writes convolutions of a member's step, and their gradients, as calls of C kernels.

A member is one trial on one fold. A place is a tensor's position and layout in memory. The kernels
are in ``native/convolution.h``. They compute 1d and 2d convolutions. A transposed convolution is the
gradient of a convolution in its inputs.

Shapes: x is (B, C, H, W), the weight (O, C / groups, KH, KW) and y (B, O, OH, OW).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gputune.modules.kernels.axes import reduced
from gputune.modules.kernels.writer import Line, Writer, require
from gputune.modules.trace import Kwargs, Operation, Place

# Tiles of smaller rows of pixels have the same pixel of several images.
_WIDE = 8
_MOST_IMAGES = 12
# Numbers of the images that stay in the fastest cache for the gradients of weights.
_CACHED = 6144
# Sizes of Winograd's algorithm (native/winograd.h): the pixels of a tile of outputs along an axis, the
# frequencies of a tile, and the tiles that are transformed at once.
_TILE_PIXELS = 4
_FREQUENCIES = 36
_TILES_AT_ONCE = 32
# The algorithm pays off with enough channels, because it also adds and copies numbers of each channel.
# With 8 channels of x and of y, the gradient in the weight takes longer than a direct sum.
_FEWEST_CHANNELS = 8
_FEWEST_WEIGHTS = 128
# Most pixels of whole tiles per pixel of an image. The algorithm takes a quarter of the products.
_MOST_PIXELS = 1.8
# The widest vector of a processor in numbers, and the widest tile.
_VECTOR = 16
_TILE = 48


def _as_image(values: Sequence[int], entry: int) -> list[int]:
    """Return sizes or strides of an image. ``entry`` is inserted as the height's for a 1d
    convolution."""
    return [*values] if len(values) == 4 else [*values[:2], entry, *values[2:]]


@dataclass(frozen=True)
class _Convolution:
    """The sizes of a convolution from ``x`` to ``y``, two tensors in memory.

    ``options`` are the strides, paddings and dilations of the height, then of the width.
    """

    x: Place
    y: Place
    weight: Place
    options: tuple[tuple[int, int], ...]
    groups: int

    @staticmethod
    def of(kwargs: Kwargs, x: Place, y: Place, weight: Place) -> "_Convolution":
        """Return the convolution that an operation's arguments describe."""
        options = []
        for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
            values = kwargs[name]
            if len(values) == 1 and len(x.shape) == 4:
                values = [*values, *values]
            *others, last = values
            options.append((others[0] if others else neutral, last))
        return _Convolution(x, y, weight, tuple(options), kwargs["groups"])

    def sizes(self, block: int) -> list[int]:
        """Return the sizes of the convolution in the order of the C code, which processes ``block``
        images at a time."""
        x_shape = _as_image(self.x.shape, 1)
        y_shape = _as_image(self.y.shape, 1)
        kernel = _as_image(self.weight.shape, 1)[2:]
        sizes = [*x_shape, *y_shape[1:], self.groups, *kernel]
        for option in self.options:
            sizes += option
        for place in (self.x, self.weight, self.y):
            sizes += _as_image(place.stride, 0)
        return [*sizes, block]

    @property
    def _kernel(self) -> list[int]:
        return _as_image(self.weight.shape, 1)[2:]

    def _frame_of_x(self) -> int:
        """The numbers of an image of x with its padding, as far as the convolution reads it."""
        strides, _, dilations = self.options
        numbers = self.x.shape[1]
        shape = _as_image(self.y.shape, 1)[2:]
        for size, kernel, stride, dilation in zip(shape, self._kernel, strides, dilations):
            numbers *= (size - 1) * stride + (kernel - 1) * dilation + 1
        return numbers

    def _frame_of_y(self) -> int:
        """The numbers of an image of y between zeros, as the gradient in x reads it."""
        numbers = self.y.shape[1]
        shape = _as_image(self.x.shape, 1)[2:]
        for size, kernel, stride, padding, dilation in zip(shape, self._kernel, *self.options):
            numbers *= (kernel - 1) * dilation // stride + (size - 1 + padding) // stride + 1
        return numbers

    def _takes_tiles(self, images: Place) -> bool:
        """Return whether Winograd's algorithm computes the convolution, or its gradient in its
        inputs, in tiles of ``images``."""
        kernel = [*self.weight.shape[2:]]
        strides, paddings, dilations = self.options
        is_plain = (*strides, *dilations, self.groups) == (1, 1, 1, 1, 1) and max(paddings) <= 2
        if kernel != [3, 3] or not is_plain:
            return False
        pixels = math.prod(images.shape[2:])
        is_filled = _tiles(images) * _TILE_PIXELS**2 <= _MOST_PIXELS * pixels
        return is_filled and min(self.x.shape[1], self.y.shape[1]) >= _FEWEST_CHANNELS

    def _in_tiles(
        self, writer: Writer, function: str, images: Place, places: Sequence[Place | None]
    ) -> Line:
        """Return the call of a kernel that computes a convolution, or a gradient, in tiles of
        ``images``. The kernel writes the first of the places."""
        tiles = _tiles(images)
        block = max(1, min(images.shape[0], _TILES_AT_ONCE // tiles))
        inputs = self.x.shape[1] + _VECTOR
        outputs = self.y.shape[1] + _VECTOR
        pixels = tiles * _TILE_PIXELS**2
        # Each side of an image may have 2 pixels of padding.
        frame = pixels + 4 * sum(images.shape[2:]) + 16
        workspace = (9 + _FREQUENCIES) * inputs * outputs
        workspace += _FREQUENCIES * (_TILES_AT_ONCE * (inputs + outputs) + 2 * _VECTOR)
        workspace += block * (pixels + frame) * max(inputs, outputs) + 4 * _VECTOR
        names = ", ".join(f"p{i}" for i in range(1, len(places)))
        body = f"library->{function}(N, {names}, p0, w);"
        return writer.call(places, body, sizes=self.sizes(block), workspace=workspace)

    def forward(self, writer: Writer, bias: Place | None) -> Line:
        """Return the kernel call that computes y."""
        if self._takes_tiles(self.y):
            return self._in_tiles(writer, "winograd", self.y, [self.y, self.x, self.weight, bias])
        block = _images(self.x.shape[0], self.y.shape[-1])
        body = "library->convolution(N, p1, p2, p3, p0, w);"
        workspace = self._tables(self.y.shape[1], self.x.shape[1], math.prod(self._kernel))
        workspace += block * (self._frame_of_x() + math.prod(self.y.shape[1:]))
        places = [self.y, self.x, self.weight, bias]
        return writer.call(places, body, sizes=self.sizes(block), workspace=workspace)

    def below(self, writer: Writer, bias: Place | None = None) -> Line:
        """Return the kernel call that computes the gradient in x from y."""
        if self._takes_tiles(self.x):
            places = [self.x, self.y, self.weight, bias]
            return self._in_tiles(writer, "winograd_below", self.x, places)
        stride = self.options[0][1]
        block = _images(self.x.shape[0], self.x.shape[-1] // stride)
        body = "library->convolution_below(N, p1, p2, p3, p0, w);"
        workspace = self._tables(self.x.shape[1], self.y.shape[1], math.prod(self._kernel))
        workspace += block * (self._frame_of_y() + math.prod(self.x.shape[1:]))
        places = [self.x, self.y, self.weight, bias]
        return writer.call(places, body, sizes=self.sizes(block), workspace=workspace)

    def weights(self, writer: Writer) -> Line:
        """Return the kernel call that computes the gradient in the weight from x and y."""
        is_large = self.x.shape[1] * self.y.shape[1] >= _FEWEST_WEIGHTS
        if is_large and self._takes_tiles(self.y):
            places = [self.weight, self.y, self.x]
            return self._in_tiles(writer, "winograd_weights", self.y, places)
        frame = self._frame_of_x()
        pixels = math.prod(self.y.shape[1:])
        block = max(1, min(self.x.shape[0], _CACHED // (frame + pixels)))
        kernel = math.prod(self._kernel)
        # A row of the kernel, or the channels of each tap, are padded to vectors.
        columns = kernel * (self.x.shape[1] // self.groups + _VECTOR)
        workspace = columns * self.y.shape[1] + block * (frame + pixels) + _TILE
        places = [self.weight, self.y, self.x]
        body = "library->convolution_weights(N, p1, p2, p0, w);"
        return writer.call(places, body, sizes=self.sizes(block), workspace=workspace)

    def _tables(self, columns: int, inner: int, kernel: int) -> int:
        """The numbers of the packed weights and other tables in working memory.

        ``columns`` and ``inner`` are the channels of the result and of the other tensor.
        """
        inner = inner // self.groups * kernel
        padded = columns + self.groups * _VECTOR
        return 2 * inner + (inner + 1) * padded + 13 * _TILE


def _tiles(images: Place) -> int:
    """Return the number of tiles of an image."""
    height, width = images.shape[2:]
    return -(-height // _TILE_PIXELS) * -(-width // _TILE_PIXELS)


def _images(batch: int, width: int) -> int:
    """Return the number of images that a kernel processes together."""
    return 1 if width >= _WIDE else min(batch, _MOST_IMAGES)


def _check(writer: Writer, op: Operation, places: Sequence[Place | None]) -> None:
    """Raise TraceError unless the convolution has one or two axes, in the precision of the
    step."""
    for place in places:
        is_plain = place is None or place.dtype == writer.dtype
        require(is_plain, op, f"numbers other than {writer.dtype}")
    x = places[0]
    assert x is not None
    require(len(x.shape) in (3, 4), op, "three axes")


def convolution(writer: Writer, kwargs: Kwargs, op: Operation, out: Place) -> Iterator[Line]:
    """Yield the C kernel call for a convolution or a transposed convolution."""
    x = kwargs["input"]
    weight = kwargs["weight"]
    bias = kwargs["bias"]
    _check(writer, op, [x, weight, bias, out])
    require(bias is None or bias.stride in ((), (1,)), op, "a bias with gaps")
    if kwargs["transposed"]:
        yield _Convolution.of(kwargs, out, x, weight).below(writer, bias)
    else:
        yield _Convolution.of(kwargs, x, out, weight).forward(writer, bias)


def convolution_gradient(
    writer: Writer, kwargs: Kwargs, op: Operation, out: Place
) -> Iterator[Line]:
    """Yield the C kernel calls for the gradients of a convolution in its input, weight and bias.

    Gradients that nothing uses are left out.
    """
    gradient = kwargs["grad_output"]
    x = kwargs["input"]
    weight = kwargs["weight"]
    _check(writer, op, [x, weight, gradient])
    in_x, in_weight, in_bias = op.results
    if kwargs["transposed"]:
        if in_x is not None:
            yield _Convolution.of(kwargs, gradient, in_x, weight).forward(writer, None)
        if in_weight is not None:
            yield _Convolution.of(kwargs, gradient, x, in_weight).weights(writer)
    else:
        if in_x is not None:
            yield _Convolution.of(kwargs, in_x, gradient, weight).below(writer)
        if in_weight is not None:
            yield _Convolution.of(kwargs, x, gradient, in_weight).weights(writer)
    if in_bias is not None:
        axes = [0, *range(2, len(gradient.shape))]
        total = Operation(torch.ops.aten.sum.dim_IntList, [], {}, [in_bias])
        yield from reduced(writer, {"self": gradient, "dim": axes}, total, in_bias)
