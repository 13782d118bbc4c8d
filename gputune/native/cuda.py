"""Compile and launch gputune's own GPU kernels, which are written in CUDA C++.

NVRTC (NVIDIA's runtime compiler) compiles a kernel once per process. Each kernel computes the same
as a sequence of PyTorch operations, which run instead if the kernel cannot be compiled. A member is
one trial on one fold. The kernel that trains one member per thread block is compiled for each
tensor shape of members, and its binary is stored on the machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.cuda import _utils

from gputune.ground.errors import warn
from gputune.ground.types import Say
from gputune.native.library import FOLDER, kept_binary

_MOST_BLOCKS = 1 << 16

Kernel = Callable[..., None]
"""A function that launches a kernel on the current stream.

Its arguments are ``grid``, ``block``, ``args`` (tensors and 32-bit ints) and ``shared_mem``.
"""

Code = TypeVar("Code")


def source(path: Path, dtype: torch.dtype) -> str:
    """Return the CUDA source code in a file, with the C type ``real`` defined as float or
    double."""
    return f"typedef {'float' if dtype == torch.float32 else 'double'} real;\n{path.read_text()}"


@cache
def kernels(
    path: Path, names: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Kernel, ...] | None:
    """Compile the kernels ``names`` in a source file for a GPU, and return them.

    Return None, with a warning, if they cannot be compiled.
    """

    def compile_all() -> tuple[Kernel, ...]:
        code = source(path, dtype)
        return tuple(torch.cuda._compile_kernel(code, name) for name in names)

    return attempt(path.name, device, compile_all)[0]


def attempt(
    name: str, device: torch.device, compile_it: Callable[[], Code]
) -> tuple[Code | None, str]:
    """Compile code for a GPU by calling ``compile_it``. Return the compiled code and "".

    If it fails, warn, and return None and the reason.
    """
    try:
        with torch.cuda.device(device):
            return compile_it(), ""
    except Exception as error:  # NVRTC or the driver failed, or a library is missing
        lines = str(error).splitlines() or [type(error).__name__]
        # A line that ends with a colon is a heading: add the first line of the compiler's log.
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        remedy = f" {_install()}" if isinstance(error, OSError) or "libnvrtc" in reason else ""
        message = f"{name} cannot be compiled for {device}: {reason}.{remedy}"
        warn(
            f"{message} Training continues with PyTorch's kernels, which need more launches.",
            RuntimeWarning,
        )
        return None, message


def launch(
    kernel: Kernel, threads: int, args: Sequence[Tensor | int], *, block: int = 256, shared: int = 0
) -> None:
    """Launch a kernel on the current stream, with enough blocks for ``threads`` threads.

    The grid has a largest size, so the kernel must loop over more work items than threads. The
    tensors must be contiguous and on one GPU. A block gets ``shared`` bytes of shared memory in
    addition to the shared memory that the kernel's code declares.
    """
    assert all(isinstance(arg, int) or arg.is_contiguous() for arg in args)
    (device,) = {arg.device for arg in args if isinstance(arg, Tensor)}
    grid = (min(_MOST_BLOCKS, -(-threads // block)), 1, 1)
    with torch.cuda.device(device):  # the kernel runs on this device's current stream
        kernel(grid=grid, block=(block, 1, 1), args=list(args), shared_mem=shared)


def without_nvrtc() -> str:
    """Return the reason why NVRTC (NVIDIA's runtime compiler) cannot be loaded, and the pip command
    that installs it.

    Return "" if it can be loaded.
    """
    try:
        _utils._get_gpu_rtc_library()
    except OSError as error:
        return f"{error}. {_install()}"
    return ""


def _install() -> str:
    """Return a sentence with the pip command that installs NVRTC (NVIDIA's runtime compiler)."""
    major = (torch.version.cuda or "13").split(".")[0]
    wheel = "nvidia-cuda-nvrtc" if int(major) >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
    return f"pip install '{wheel}=={torch.version.cuda}.*' brings the library."


FILES = ("work.h", "block.h", "member.cu")
TILES = (64, 32, 16, 8)
"""Possible tile sizes: a tile is the group of minibatch rows whose activations are on chip at once.

The largest size that fits is used. A tensor core processes 16 rows.
"""

OPTIONS = ("--ftz=true", "--prec-div=false", "--prec-sqrt=false")
"""Options for the NVRTC compiler.

Denormal values (below 1e-38) become zero, as on a CPU. A quotient or a square root may be off by
two units in the last place, which needs fewer instructions. Source: CUDA C++ Programming Guide,
mathematical functions.
"""

_MOST_THREADS = 256
_FEWEST_THREADS = 64
_WARP = 32
_HELD_BYTES = 384  # most bytes of moments that a thread keeps in registers
_RATES = 32  # number of steps whose rates are computed at once
_MOST = {"inputs": 256, "width": 128, "depth": 4, "outputs": 64}


@dataclass(frozen=True)
class MemberKernel:
    """The GPU kernel that trains members of one tensor shape, described by its sizes.

    The padded width of the hidden layers is ``width``. ``depth`` is the number of hidden layers (0:
    a linear model). ``rows`` is the number of minibatch rows in a tile, which has its activations
    on chip at once.
    """

    inputs: int
    width: int
    depth: int
    outputs: int
    activations: tuple[int, ...]
    moments: int
    classes: bool
    dropout: bool
    dtype: torch.dtype
    rows: int
    tf32: bool = False

    @property
    def layers(self) -> list[tuple[int, int]]:
        """The numbers of inputs and outputs of each layer, including padding with zeros."""
        full = 16 if self.tf32 else 4  # padded to multiples of the numbers that are read at once
        first = -(-self.inputs // full) * full
        last = -(-self.outputs // full) * full
        return list(pairwise([first, *[self.width] * self.depth, last]))

    @property
    def threads(self) -> int:
        """The number of threads in a thread block of the GPU kernel.

        There is one thread for each 4 x 4 part of the widest activations, within bounds.
        """
        tiles = self.rows * max(self.width, self.outputs) // 16
        return min(_MOST_THREADS, max(_FEWEST_THREADS, -(-tiles // _WARP) * _WARP))

    @property
    def shared(self) -> int:
        """The shared memory that a thread block of the kernel needs, in bytes."""
        size = self.dtype.itemsize
        # These sums repeat the layout of struct Shared in block.h.
        rates = -(-(8 + 5 * size) // 8) * 8
        head = _RATES * rates + 8 * (3 + self.rows) + size * (self.rows + self.layers[-1][1])
        hidden = 2 * max(1, self.depth) * _row(self.width)
        ends = _row(self.layers[0][0]) + _row(self.layers[-1][1])
        activations = self.rows * (hidden + ends)
        return -(-head // 16) * 16 + size * (self._parameters + activations)

    @property
    def _parameters(self) -> int:
        """The number of weights and biases of one member, including padding with zeros."""
        return sum(below * _row(above) + above for below, above in self.layers)

    @property
    def scratch(self) -> int:
        """The number of values in a thread block's scratch memory, which holds the gradients of a
        part of a minibatch."""
        slots = 0
        warps = self.threads // _WARP
        for below, above in self.layers:
            # A thread has groups of four numbers: a column of four, or its part of a warp's 16 x 8.
            # This is the same computation as in the struct Product in block.h.
            if self.tf32:
                columns = above // 8
                rows = below // 16
                workers = least = warps
            else:
                columns = below
                rows = above // 4
                workers = self.threads
                least = self.threads // 2
            times = 1
            for n in (2, 4):
                if columns % n == 0 and columns // n * rows >= least:
                    times = n
            slots += -(-columns // times * rows // workers) * times * 4 + 1
        return slots * self.threads

    def with_largest_tile(self, shared: int) -> "MemberKernel":
        """Return a copy of the kernel with the largest tile (rows per pass) that fits into
        ``shared`` bytes.

        ``shared`` is the shared memory of a thread block.
        """
        # A tensor core cannot process the smallest tile.
        sizes = TILES[:-1] if self.tf32 else TILES
        tiles = [replace(self, rows=rows) for rows in sizes if rows <= self.rows]
        return next((tile for tile in tiles if tile.shared <= shared), tiles[-1])

    def unsupported(self, shared: int) -> str:
        """Return the reason, as a phrase, why the kernel cannot run on a GPU. Return "" if it can.

        ``shared`` is the GPU's shared memory for a block, in bytes.
        """
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value > most:
                return f"{name} of {value} (at most {most})"
        if self.dtype != torch.float32:
            return f"dtype={str(self.dtype).removeprefix('torch.')!r} (only float32)"
        if self.shared > shared:
            weights = self.dtype.itemsize * self._parameters
            return (
                f"{weights:,} bytes of weights and {self.shared - weights:,} bytes of activations "
                f"of {self.rows} rows on chip (the card has {shared:,} bytes)"
            )
        return ""

    @property
    def source(self) -> str:
        """The complete CUDA C++ source of the kernel ``train_members``.

        It includes only headers that NVRTC has.
        """
        sizes = {
            "INPUTS": self.inputs,
            "WIDTH": self.width,
            "DEPTH": self.depth,
            "OUTPUTS": self.outputs,
            "ROWS": self.rows,
            "THREADS": self.threads,
            "MOMENTS": self.moments,
            # a macro with the layer as its argument, so that each layer's activation is a constant
            "ACTIVATION(L)": _by_layer(self.activations),
            "CLASSES": int(self.classes),
            "DROPOUT": int(self.dropout),
            "TF32": int(self.tf32),
            "SHARED": self.shared,
            "SCRATCH": self.scratch,
            "HELD": _HELD_BYTES // self.dtype.itemsize,
        }
        double = self.dtype == torch.float64
        lines = [f"typedef {'double' if double else 'float'} real;", *["#define DOUBLE"] * double]
        lines += [f"#define {name} {value}" for name, value in sizes.items()]
        return "\n".join([*lines, *((FOLDER / name).read_text() for name in FILES)])


def _by_layer(values: Sequence[int]) -> str:
    """Return a C expression for the value of the hidden layer ``L``, for example ``(L) == 0 ? 0 :
    3``."""
    if not values:
        return "0"
    cases = [f"(L) == {layer} ? {value} : " for layer, value in enumerate(values[:-1])]
    return f"({''.join(cases)}{values[-1]})"


def _row(n: int) -> int:
    """Return the padded length of a row with ``n`` values in shared memory. It must equal the
    result of ``row_of`` in the kernel."""
    return n if n % 8 else n + 4


def tile_of(batch: int) -> int:
    """Return how many rows of a minibatch the kernel processes at once, if they fit into shared
    memory.

    ``batch`` is the size of the minibatch.
    """
    if batch <= 16:
        return 16
    return 32 if batch <= 32 else 64


def compile_kernel(kernel: MemberKernel, device: torch.device, say: Say = str) -> Kernel:
    """Return the compiled kernel for a GPU. NVRTC compiles it once per machine.

    Raises the errors of NVRTC and of the driver.
    """
    name = "train_members"
    source = kernel.source
    version = ".".join(map(str, torch.cuda.get_device_capability(device)))

    def make() -> bytes:
        sizes = [kernel.inputs, *[kernel.width] * kernel.depth, kernel.outputs]
        shape = "-".join(map(str, sizes))
        say(f"compiling the kernel for members of {shape}: some seconds, once on this machine")
        return _utils._nvrtc_compile(source, name, nvcc_options=list(OPTIONS))[0]

    with torch.cuda.device(device):
        binary = kept_binary("member", f"{source}{OPTIONS}{torch.version.cuda} {version}", make)
        loaded = _utils._cuda_load_module(binary, [name])
        assert isinstance(loaded, dict)
        loaded[name].set_shared_memory_config(kernel.shared)
    return loaded[name]
