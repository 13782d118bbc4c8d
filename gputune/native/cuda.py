"""Kernels of our own for a GPU: CUDA C++ that NVRTC compiles, once in a process.

Each has a definition in operations of PyTorch, which is taken where it cannot be compiled. That
which trains one member a thread block is compiled for each shape of members, and kept on the
machine.
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

from gputune.errors import warn
from gputune.native.library import FOLDER, kept_binary

_MOST_BLOCKS = 1 << 16

Kernel = Callable[..., None]
"""Called with ``grid``, ``block``, ``args`` (tensors and ints of 32 bits) and ``shared_mem``, it
launches on the current stream."""

Code = TypeVar("Code")


def source(path: Path, dtype: torch.dtype) -> str:
    """Return the source in a file, whose ``real`` is a dtype."""
    return f"typedef {'float' if dtype == torch.float32 else 'double'} real;\n{path.read_text()}"


@cache
def kernels(
    path: Path, names: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Kernel, ...] | None:
    """Return the kernels of a file for a GPU; None, with a warning, where they cannot be
    compiled."""
    return attempt(
        path.name,
        device,
        lambda: tuple(torch.cuda._compile_kernel(source(path, dtype), name) for name in names),
    )[0]


def attempt(
    name: str, device: torch.device, compile_it: Callable[[], Code]
) -> tuple[Code | None, str]:
    """Return what compiling a file for a GPU gives, or None, with a warning, and why."""
    try:
        with torch.cuda.device(device):
            return compile_it(), ""
    except Exception as error:  # of NVRTC, of the driver, of a library that is not there
        said = str(error).splitlines() or [type(error).__name__]
        # the first line of a compiler's log
        reason = " ".join(said[: 2 if said[0].endswith(":") else 1])
        remedy = f" {_install()}" if isinstance(error, OSError) or "libnvrtc" in reason else ""
        why = f"{name} cannot be compiled for {device}: {reason}.{remedy}"
        warn(
            f"{why} Nothing is lost: its steps are taken by PyTorch's own kernels, in more "
            "launches.",
            RuntimeWarning,
        )
        return None, why


def launch(
    kernel: Kernel, threads: int, args: Sequence[Tensor | int], *, block: int = 256, shared: int = 0
) -> None:
    """Launch a kernel that goes through its work with a stride, in at least so many threads where
    there is room.

    The tensors are contiguous, on one GPU; a block has ``shared`` bytes of memory beside what the
    code says.
    """
    assert all(isinstance(arg, int) or arg.is_contiguous() for arg in args)
    (device,) = {arg.device for arg in args if isinstance(arg, Tensor)}
    grid = (min(_MOST_BLOCKS, -(-threads // block)), 1, 1)
    with torch.cuda.device(device):  # whose stream is taken
        kernel(grid=grid, block=(block, 1, 1), args=list(args), shared_mem=shared)


def without_nvrtc() -> str:
    """Return why NVRTC cannot be loaded, and which wheel has it; "" where it can."""
    try:
        _utils._get_gpu_rtc_library()
    except OSError as error:
        return f"{error}. {_install()}"
    return ""


def _install() -> str:
    """Return which wheel has NVRTC."""
    major = (torch.version.cuda or "13").split(".")[0]
    wheel = "nvidia-cuda-nvrtc" if int(major) >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
    return f"pip install '{wheel}=={torch.version.cuda}.*' brings the library."


FILES = ("work.h", "block.h", "member.cu")
TILES = (64, 32, 16, 8)
"""Rows of a minibatch whose activations are on chip at once: as many as there is room for; a tensor
core has 16."""

OPTIONS = ("--ftz=true", "--prec-div=false", "--prec-sqrt=false")
"""Of the compiler: numbers below 1e-38 are zero, as on a CPU; a quotient or a root may be off by
two units of its last place, for fewer instructions. Source: CUDA C++ Programming Guide,
mathematical functions."""

_MOST_THREADS = 256
_FEWEST_THREADS = 64
_WARP = 32
_HELD_BYTES = 384  # of moments that a thread keeps in registers
_RATES = 32  # steps whose rates are there at once
_MOST = {"inputs": 256, "width": 128, "depth": 4, "outputs": 64}


@dataclass(frozen=True)
class MemberKernel:
    """One shape of members: ``width`` of the tensors, ``depth`` hidden layers (0: linear), ``rows``
    of a tile."""

    inputs: int
    width: int
    depth: int
    outputs: int
    activation: int
    moments: int
    classes: bool
    dropout: bool
    dtype: torch.dtype
    rows: int
    tf32: bool = False

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer, with the zeros behind them."""
        full = 16 if self.tf32 else 4  # numbers that are read at once
        first, last = (-(-n // full) * full for n in (self.inputs, self.outputs))
        return list(pairwise([first, *[self.width] * self.depth, last]))

    @property
    def threads(self) -> int:
        """Threads of a block: one for a tile of 4 x 4 of the widest activations, within bounds."""
        tiles = self.rows * max(self.width, self.outputs) // 16
        return min(_MOST_THREADS, max(_FEWEST_THREADS, -(-tiles // _WARP) * _WARP))

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        size = self.dtype.itemsize
        rates = -(-(8 + 5 * size) // 8) * 8
        head = _RATES * rates + 8 * (3 + self.rows) + size * (self.rows + self.layers[-1][1])
        hidden = 2 * max(1, self.depth) * _row(self.width)
        return -(-head // 16) * 16 + size * (
            self._parameters
            + self.rows * (hidden + _row(self.layers[0][0]) + _row(self.layers[-1][1]))
        )

    @property
    def _parameters(self) -> int:
        """Numbers of weights and biases, with the zeros behind them."""
        return sum(below * _row(above) + above for below, above in self.layers)

    @property
    def scratch(self) -> int:
        """Numbers of a block's scratch: the gradients of a part of a minibatch."""
        slots = 0
        warps = self.threads // _WARP
        for below, above in self.layers:
            # Four numbers of a thread's: a column of them, or those of 16 x 8 that a warp has. As
            # Product in C++.
            many, others = (above // 8, below // 16) if self.tf32 else (below, above // 4)
            workers, least = (warps, warps) if self.tf32 else (self.threads, self.threads // 2)
            times = next((n for n in (4, 2) if many % n == 0 and many // n * others >= least), 1)
            slots += -(-many // times * others // workers) * times * 4 + 1
        return slots * self.threads

    def fitted(self, shared: int) -> "MemberKernel":
        """Return it with as many rows of a tile as there is room for in so many bytes of a block's
        shared memory."""
        tiles = [
            replace(self, rows=rows) for rows in TILES[: 3 if self.tf32 else 4] if rows <= self.rows
        ]
        return next((tile for tile in tiles if tile.shared <= shared), tiles[-1])

    def unknown(self, shared: int) -> str:
        """Return, as a clause, what is beyond the kernel on a card with so many bytes; "" where
        nothing is."""
        for name, most in _MOST.items():
            if (value := getattr(self, name)) > most:
                return f"{name} of {value}, where {most} is the most"
        if self.dtype != torch.float32:
            return f"dtype={str(self.dtype).removeprefix('torch.')!r}, only float32"
        if self.shared > shared:
            weights = self.dtype.itemsize * self._parameters
            parts = (
                f"{weights:,} bytes of weights and {self.shared - weights:,} of {self.rows} rows' "
                "activations"
            )
            return f"{parts} on chip, where the card has {shared:,}"
        return ""

    @property
    def source(self) -> str:
        """CUDA C++ of the kernel ``train_members``, which includes nothing that NVRTC has not."""
        sizes = {
            "INPUTS": self.inputs,
            "WIDTH": self.width,
            "DEPTH": self.depth,
            "OUTPUTS": self.outputs,
            "ROWS": self.rows,
            "THREADS": self.threads,
            "MOMENTS": self.moments,
            "ACTIVATION": self.activation,
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


def _row(n: int) -> int:
    """The length of a row of so many numbers, as ``row_of`` in the kernel."""
    return n if n % 8 else n + 4


def tile_of(batch: int) -> int:
    """Return how many rows of a minibatch of ``batch`` the kernel takes at once, where there is
    room for them."""
    return next((rows for rows in (16, 32) if rows >= batch), 64)


def compile_kernel(
    kernel: MemberKernel, device: torch.device, say: Callable[[str], object] = str
) -> Kernel:
    """Return the kernel for a GPU, which NVRTC compiles once on a machine. Raises what NVRTC and
    the driver raise."""
    name = "train_members"
    source = kernel.source
    version = ".".join(map(str, torch.cuda.get_device_capability(device)))

    def make() -> bytes:
        sizes = "-".join(map(str, (kernel.inputs, *[kernel.width] * kernel.depth, kernel.outputs)))
        say(f"compiling the kernel for members of {sizes}: some seconds, once on this machine")
        return _utils._nvrtc_compile(source, name, nvcc_options=list(OPTIONS))[0]

    with torch.cuda.device(device):
        binary = kept_binary("member", f"{source}{OPTIONS}{torch.version.cuda} {version}", make)
        loaded = _utils._cuda_load_module(binary, [name])
        assert isinstance(loaded, dict)
        loaded[name].set_shared_memory_config(kernel.shared)
    return loaded[name]
