"""The kernel that trains one member a thread block: source and sizes for one shape of members, and what it knows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.cuda import _utils

from gputune.native.cuda import Kernel
from gputune.native.library import FOLDER, kept_binary

FILES = (
    "device.h", "work.h", "scores.h", "formulas.h", "update.h", "block_product.h", "member_memory.h", "member.cu"
)  # fmt: skip
TILES = (64, 32, 16, 8)
"""Rows of a minibatch whose activations are on chip at once: as many as there is room for; a tensor core has 16."""

OPTIONS = ("--ftz=true", "--prec-div=false", "--prec-sqrt=false")
"""Of the compiler: numbers below 1e-38 are zero, as on a CPU; a quotient or a root may be off by two units of its last
place, for fewer instructions. Source: CUDA C++ Programming Guide, mathematical functions."""

_MOST_THREADS, _FEWEST_THREADS, _WARP = 256, 64, 32
_HELD_BYTES = 384  # of moments that a thread keeps in registers
_RATES = 32  # steps whose rates are there at once
_MOST = {"inputs": 256, "width": 128, "depth": 4, "outputs": 64}


@dataclass(frozen=True)
class MemberKernel:
    """One shape of members: ``width`` is that of the tensors, ``depth`` counts hidden layers (0: the linear model).

    ``moments`` are the optimizer's buffers, ``rows`` those of a tile.
    """

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
            self._parameters + self.rows * (hidden + _row(self.layers[0][0]) + _row(self.layers[-1][1]))
        )

    @property
    def _parameters(self) -> int:
        """Numbers of weights and biases, with the zeros behind them."""
        return sum(below * _row(above) + above for below, above in self.layers)

    @property
    def scratch(self) -> int:
        """Numbers of a block's scratch: the gradients of a part of a minibatch."""
        slots, warps = 0, self.threads // _WARP
        for below, above in self.layers:
            # Four numbers of a thread's: a column of them, or those of 16 x 8 that a warp has. As Product in C++.
            many, others = (above // 8, below // 16) if self.tf32 else (below, above // 4)
            workers, least = (warps, warps) if self.tf32 else (self.threads, self.threads // 2)
            times = next((n for n in (4, 2) if many % n == 0 and many // n * others >= least), 1)
            slots += -(-many // times * others // workers) * times * 4 + 1
        return slots * self.threads

    def fitted(self, shared: int) -> "MemberKernel":
        """Return it with as many rows of a tile as there is room for in so many bytes of a block's shared memory."""
        tiles = [replace(self, rows=rows) for rows in TILES[: 3 if self.tf32 else 4] if rows <= self.rows]
        return next((tile for tile in tiles if tile.shared <= shared), tiles[-1])

    def unknown(self, shared: int) -> str:
        """Return, as a clause, what is beyond the kernel on a card with so many bytes; "" where nothing is."""
        for name, most in _MOST.items():
            if (value := getattr(self, name)) > most:
                return f"{name} of {value}, where {most} is the most"
        if self.dtype != torch.float32:
            return f"dtype={str(self.dtype).removeprefix('torch.')!r}, only float32"
        if self.shared > shared:
            weights = self.dtype.itemsize * self._parameters
            parts = f"{weights:,} bytes of weights and {self.shared - weights:,} of {self.rows} rows' activations"
            return f"{parts} on chip, where the card has {shared:,}"
        return ""

    @property
    def source(self) -> str:
        """CUDA C++ of the kernel ``train_members``, which includes nothing that NVRTC has not."""
        sizes = {
            "INPUTS": self.inputs, "WIDTH": self.width, "DEPTH": self.depth, "OUTPUTS": self.outputs,
            "ROWS": self.rows, "THREADS": self.threads, "MOMENTS": self.moments, "ACTIVATION": self.activation,
            "CLASSES": int(self.classes), "DROPOUT": int(self.dropout), "TF32": int(self.tf32), "SHARED": self.shared,
            "SCRATCH": self.scratch, "HELD": _HELD_BYTES // self.dtype.itemsize,
        }  # fmt: skip
        double = self.dtype == torch.float64
        lines = [f"typedef {'double' if double else 'float'} real;", *["#define DOUBLE"] * double]
        lines += [f"#define {name} {value}" for name, value in sizes.items()]
        return "\n".join([*lines, *((FOLDER / name).read_text() for name in FILES)])


def _row(n: int) -> int:
    """The length of a row of so many numbers, as ``row_of`` in the kernel."""
    return n if n % 8 else n + 4


def tile_of(batch: int) -> int:
    """Return how many rows of a minibatch of ``batch`` the kernel takes at once, where there is room for them."""
    return next((rows for rows in (16, 32) if rows >= batch), 64)


def compile_kernel(kernel: MemberKernel, device: torch.device, say: Callable[[str], object] = str) -> Kernel:
    """Return the kernel for a GPU, which NVRTC compiles once on a machine, as is said then.

    Raises what NVRTC and the driver raise.
    """
    name, source = "train_members", kernel.source
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
