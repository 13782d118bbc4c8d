"""Convolutions, pooling, norms and resizing of images in generated C equal PyTorch's, and small
networks of them train as a plain loop trains them.
"""

import ctypes
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import reference
from gputune.engine.members import MemberChunk
from gputune.modules.inspection import traits_of
from gputune.modules.member_code import MemberCode
from gputune.modules.module import StackedModule
from gputune.native import library as built
from gputune.scoring.validation import Validation
from problems import data_of, fill, largest_difference, rows_of, scoring_of, shape_of

pytestmark = pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler")
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 10))]


@pytest.fixture(autouse=True)
def quick_builds(monkeypatch):
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))


class Draw(random.Random):
    """Random sizes and tensors of a case."""

    def tensor(self, *shape):
        generator = torch.Generator().manual_seed(self.randrange(1 << 30))
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def images(self, *shape):
        """Images or sequences, with the channels last in memory or not."""
        x = self.tensor(*shape)
        is_last = x.dim() == 4 and self.random() < 0.6
        return x.contiguous(memory_format=torch.channels_last) if is_last else x

    def each(self, axes, *values):
        return [self.choice(values) for _ in range(axes)]


def convolution(draw):
    axes = draw.choice((1, 2, 2))
    groups = draw.choice((1, 1, 1, 2, 3))
    inputs = groups * draw.choice((1, 2, 3, 5, 8, 9))
    outputs = groups * draw.choice((1, 2, 3, 4, 8, 10, 17, 28))
    kernel = draw.each(axes, 1, 2, 3, 5)
    stride = draw.each(axes, 1, 1, 2, 3)
    padding = draw.each(axes, 0, 1, 2, 3)
    dilation = draw.each(axes, 1, 1, 2)
    size = []
    for k, p, d in zip(kernel, padding, dilation):
        size.append(max((k - 1) * d + 1 - 2 * p, 1) + draw.randrange(12))
    x = draw.images(draw.choice((1, 2, 5, 14)), inputs, *size)
    bias = draw.tensor(outputs) if draw.random() < 0.5 else None
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if draw.random() < 0.6:
        function = (F.conv1d, F.conv2d)[axes - 1]
        return partial(function, **options), [
            x,
            draw.tensor(outputs, inputs // groups, *kernel),
            bias,
        ]
    options["output_padding"] = [draw.randrange(max(s, d)) for s, d in zip(stride, dilation)]
    function = (F.conv_transpose1d, F.conv_transpose2d)[axes - 1]
    weight = draw.tensor(inputs, outputs // groups, *kernel)
    try:  # some outputs would be empty
        function(x, weight, bias, **options)
    except RuntimeError:
        return convolution(draw)
    return partial(function, **options), [x, weight, bias]


def convolution_of_few_channels(draw):
    """The vectors of the weights' gradient have output channels, because rows of the kernel are
    short."""
    outputs = draw.choice((16, 32))
    groups = draw.choice((1, 2))
    kernel = [draw.choice((1, 3, 7)), draw.choice((1, 2))]
    options = {"stride": draw.each(2, 1, 2), "padding": draw.each(2, 0, 1), "groups": groups}
    x = draw.images(draw.choice((1, 3)), groups, 9, draw.choice((5, 10)))
    weight = draw.tensor(groups * outputs, 1, *kernel)
    return partial(F.conv2d, **options), [x, weight, draw.tensor(groups * outputs)]


def convolution_in_tiles(draw):
    """Convolutions with kernels of 3 x 3 and enough channels for Winograd's algorithm."""
    inputs = draw.choice((8, 9, 16, 21))
    outputs = draw.choice((8, 10, 16, 28))
    padding = draw.each(2, 0, 1, 2)
    size = [3 - 2 * p + draw.choice((3, 4, 6, 8, 12)) - 1 for p in padding]
    x = draw.images(draw.choice((1, 2, 5, 14)), inputs, *map(partial(max, 1), size))
    bias = draw.tensor(outputs) if draw.random() < 0.5 else None
    if draw.random() < 0.7:
        return partial(F.conv2d, padding=padding), [x, draw.tensor(outputs, inputs, 3, 3), bias]
    weight = draw.tensor(inputs, outputs, 3, 3)
    return partial(F.conv_transpose2d, padding=[min(1, p) for p in padding]), [x, weight, bias]


def max_pool(draw):
    axes = draw.choice((1, 2, 2))
    kernel = draw.each(axes, 1, 2, 3)
    padding = [draw.randrange(k // 2 + 1) for k in kernel]
    dilation = draw.each(axes, 1, 1, 2)
    size = [(k - 1) * d + 1 + draw.randrange(7) for k, d in zip(kernel, dilation)]
    # rounded, so that numbers of a window are equal
    x = draw.images(draw.choice((1, 3)), draw.choice((1, 2, 4, 5, 8, 9)), *size).round()
    options = {"stride": draw.each(axes, 1, 2, 3), "padding": padding, "dilation": dilation}
    function = (F.max_pool1d, F.max_pool2d)[axes - 1]
    ceil = draw.random() < 0.3
    return partial(function, kernel_size=kernel, ceil_mode=ceil, **options), [x]


def halving_pool(draw):
    shape = draw.choice((1, 3)), draw.choice((3, 4, 8, 12)), draw.choice((2, 4, 7)), 6
    return partial(F.max_pool2d, kernel_size=2), [draw.images(*shape).round()]


def norm(draw):
    axes = draw.choice((0, 1, 2, 2))
    channels = draw.choice((1, 2, 4, 5, 8, 9, 24, 70))
    x = draw.images(draw.choice((2, 3, 17)), channels, *draw.each(axes, 1, 2, 5, 8)) + 3
    tables = [draw.tensor(channels), draw.tensor(channels)]
    if draw.random() < 0.3:
        tables = [None, None]
    if draw.random() < 0.3:
        groups = draw.choice([n for n in range(1, channels + 1) if channels % n == 0])
        return lambda x, weight, bias: F.group_norm(x, groups, weight, bias), [x, *tables]
    mean = draw.tensor(channels)
    var = draw.tensor(channels).exp()
    is_training = draw.random() < 0.7

    def normalized(x, weight, bias):
        statistics = mean.clone(), var.clone()
        y = F.batch_norm(x, *statistics, weight, bias, is_training)
        sizes = (-1, *[1] * (x.dim() - 2))
        # in training, also the running statistics
        return y + sum(statistics).view(sizes) if is_training else y

    return normalized, [x, *tables]


def average_pool(draw):
    axes = draw.choice((1, 2, 2))
    kernel = draw.each(axes, 1, 2, 3)
    padding = [draw.randrange(k // 2 + 1) for k in kernel]
    size = [k + draw.randrange(7) for k in kernel]
    x = draw.images(draw.choice((1, 3)), draw.choice((1, 2, 4, 5, 8, 9)), *size)
    kind = draw.choice(("plain", "adaptive", "largest"))
    if kind == "plain":
        options = {"stride": draw.each(axes, 1, 2, 3), "padding": padding}
        options["ceil_mode"] = draw.random() < 0.3
        options["count_include_pad"] = draw.random() < 0.5
        if axes == 2 and draw.random() < 0.3:
            options["divisor_override"] = 5
        function = (F.avg_pool1d, F.avg_pool2d)[axes - 1]
        return partial(function, kernel_size=kernel, **options), [x]
    functions = {
        "adaptive": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
        "largest": (F.adaptive_max_pool1d, F.adaptive_max_pool2d),
    }
    size = draw.each(axes, 2, 3, 4)
    return partial(functions[kind][axes - 1], output_size=size if axes == 2 else size[0]), [x]


def resizing(draw):
    axes = draw.choice((1, 2, 2))
    x = draw.images(draw.choice((1, 3)), draw.choice((1, 4, 8, 9)), *draw.each(axes, 1, 2, 3, 5))
    mode = draw.choice(("nearest", "nearest-exact", ("linear", "bilinear")[axes - 1]))
    if axes == 2 and draw.random() < 0.2:
        mode = "bicubic"
    options = {"align_corners": draw.random() < 0.5} if "nearest" not in mode else {}
    if draw.random() < 0.5:
        options["scale_factor"] = draw.each(axes, 1.5, 2, 3)
    else:
        options["size"] = draw.each(axes, 1, 2, 4, 7)
    return partial(F.interpolate, mode=mode, **options), [x]


def moving(draw):
    kind = draw.choice(("shuffle", "unshuffle", "unfold", "fold"))
    if kind == "shuffle":
        return partial(F.pixel_shuffle, upscale_factor=2), [draw.images(2, 8, 3, 2)]
    if kind == "unshuffle":
        return partial(F.pixel_unshuffle, downscale_factor=3), [draw.images(2, 4, 6, 3)]
    kernel = draw.each(2, 1, 2, 3)
    options = {
        "kernel_size": kernel,
        "dilation": draw.each(2, 1, 2),
        "padding": draw.each(2, 0, 1, 3),
        "stride": draw.each(2, 1, 2, 3),
    }
    x = draw.images(2, 3, 5, 7)
    if kind == "unfold":
        return partial(F.unfold, **options), [x]
    options["output_size"] = x.shape[2:]
    return partial(F.fold, **options), [F.unfold(x, *[*options.values()][:4]).contiguous()]


KINDS = {
    "average pooling": average_pool,
    "resizing": resizing,
    "moving pixels": moving,
    "convolutions": convolution,
    "convolutions of few channels": convolution_of_few_channels,
    "convolutions in tiles": convolution_in_tiles,
    "max pooling": max_pool,
    "max pooling of 2 x 2": halving_pool,
    "norms": norm,
}
FUNCTIONS = {"convolutions in tiles": ("winograd(", "winograd_below(", "winograd_weights(")}
"""C functions that the code of a kind calls."""
COUNTS = {"convolutions": 40, "convolutions of few channels": 8, "max pooling of 2 x 2": 8}


def with_gradients(function, inputs):
    """The outputs of a function, and the gradients of their weighted sum in its inputs."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        wanted = [x for x in leaves if x is not None]
        return [y.detach(), *torch.autograd.grad(total, wanted)]


def take(step, memories, kernels):
    """Take a step of the code."""
    scratch = torch.empty(step.workspace + 64, dtype=torch.uint8)
    begin = -(-scratch.data_ptr() // 64) * 64
    pointers = [begin, *(storage.data_ptr() for storage in memories.values())]
    places = (ctypes.c_void_p * len(pointers))(*pointers)
    calls = (ctypes.c_void_p * 1)(step.calls.ctypes.data)
    numbers = (ctypes.c_void_p * 1)(step.numbers.ctypes.data)
    kernels.take_steps(ctypes.c_int64(1), calls, kernels.addresses, places, numbers)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_operation_and_its_gradients_are_those_of_torch(kind, seed):
    draw = Draw(seed)
    code = MemberCode(torch.float64)
    written = []
    for _ in range(COUNTS.get(kind, 20)):
        function, inputs = KINDS[kind](draw)
        expected = with_gradients(function, inputs)
        results = [torch.full_like(tensor, 7.0) for tensor in expected]

        def step(function=function, inputs=inputs, results=results):
            for result, tensor in zip(results, with_gradients(function, inputs)):
                result.copy_(tensor)

        memories = {}
        written.append((code.add(step, memories), memories, results, expected, function))
    for function in FUNCTIONS.get(kind, ()):
        assert any(function in body for body in code.kernels)
    kernels = built.build_kernels(list(code.kernels), torch.float64)
    for coded, memories, results, expected, function in written:
        take(coded, memories, kernels)
        for result, tensor in zip(results, expected):
            torch.testing.assert_close(
                result, tensor, rtol=1e-11, atol=1e-11, msg=lambda text, f=function: f"{f}: {text}"
            )


class Net(nn.Module):
    """A random network of convolutions, norms, activations and pooling for small images."""

    def __init__(self, input_shape, n_outputs, seed=0):
        super().__init__()
        draw = random.Random(seed)
        layers = []
        channels, height, width = input_shape
        for _ in range(draw.choice((1, 2, 3))):
            after = draw.choice((2, 4, 8))
            kernel = draw.choice((1, 3))
            stride = draw.choice((1, 1, 2)) if min(height, width) > 3 else 1
            groups = draw.choice((1, 2)) if channels % 2 == 0 else 1
            norm = draw.choice((nn.BatchNorm2d(after), nn.GroupNorm(2, after), nn.Identity()))
            options = {"padding": kernel // 2, "stride": stride, "groups": groups}
            # The gradient of a bias before a norm is 0, and Adam makes steps of its rounding.
            options["bias"] = isinstance(norm, nn.Identity)
            layers += [nn.Conv2d(channels, after, kernel, **options), norm]
            height, width, channels = -(-height // stride), -(-width // stride), after
            layers.append(draw.choice((nn.ReLU(), nn.Tanh(), nn.GELU())))
            if min(height, width) > 3 and draw.random() < 0.6:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.last = nn.Linear(channels * height * width, n_outputs)

    def forward(self, x):
        return self.last(self.body(x))


NETS = [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 60))]


@pytest.mark.parametrize("seed", NETS)
def test_a_network_trains_as_in_a_plain_loop(seed):
    draw = Draw(seed)
    shape = (draw.choice((1, 2, 3)), draw.choice((5, 8, 9)), draw.choice((5, 8)))
    data = data_of(draw.tensor(23, *shape), 3)
    configs = fill({"lr": 0.01, "batch_size": 9, "module__seed": seed})
    network = StackedModule(
        Net, configs, shape_of(data), seed=0, traits=traits_of(Net, configs[0], data)
    )
    with torch.no_grad():
        chunk = MemberChunk(network, Validation(data, scoring_of(data)), seed=0, horizon=2)
        assert all(member.outputs is not None for member in chunk.code.members)
        for epoch in range(2):
            chunk.advance(epoch)
            assert chunk.scores().shape == (1, 1)
    x, y, _ = rows_of(data, 0)
    expected = reference.train_module(partial(Net, shape, 3, seed), x, y, configs[0], epochs=2)
    trained = network.member(network.blocks.views(chunk.flat), 0, 0)
    assert largest_difference(trained, expected) <= 1e-10
