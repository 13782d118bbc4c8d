"""The kernel that trains one member a thread block: source and sizes for one shape of members, and what it knows."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.cuda import _utils

from gputune.native.cuda import Kernel
from gputune.native.library import ACTIVATIONS, FOLDER, OPTIMIZERS, kept_binary

FILES = ("device.h", "work.h", "formulas.h", "update.h", "member.cu")
TILES = (64, 32, 16)
"""Rows of a minibatch whose activations are on chip at once: as many as there is room for."""

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

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer, with the zeros behind them."""
        sizes = [_whole(self.inputs), *[self.width] * self.depth, _whole(self.outputs)]
        return list(zip(sizes[:-1], sizes[1:]))

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
        head = _RATES * rates + 8 * (3 + self.rows) + size * (self.rows + _whole(self.outputs))
        parameters = sum(below * _row(above) + above for below, above in self.layers)
        hidden = 2 * max(1, self.depth) * _row(self.width)
        return -(-head // 16) * 16 + size * (
            parameters + self.rows * (hidden + _row(_whole(self.inputs)) + _row(_whole(self.outputs)))
        )

    @property
    def scratch(self) -> int:
        """Numbers of a block's scratch: the gradients of a part of a minibatch."""
        slots = 0
        for below, above in self.layers:
            fits = (tall for tall in (4, 2) if below // tall * (above // 4) >= self.threads // 2)
            tall = next(fits, 1)
            slots += -(-(below // tall * (above // 4)) // self.threads) * tall * 4 + 1
        return slots * self.threads

    @property
    def source(self) -> str:
        """CUDA C++ of the kernel ``train_members``, which includes nothing that NVRTC has not."""
        sizes = {
            "INPUTS": self.inputs, "WIDTH": self.width, "DEPTH": self.depth, "OUTPUTS": self.outputs,
            "ROWS": self.rows, "THREADS": self.threads, "MOMENTS": self.moments, "ACTIVATION": self.activation,
            "CLASSES": int(self.classes), "DROPOUT": int(self.dropout), "SHARED": self.shared,
            "SCRATCH": self.scratch, "HELD": _HELD_BYTES // self.dtype.itemsize,
        }  # fmt: skip
        double = self.dtype == torch.float64
        lines = [f"typedef {'double' if double else 'float'} real;", *["#define DOUBLE"] * double]
        lines += [f"#define {name} {value}" for name, value in sizes.items()]
        return "\n".join([*lines, *((FOLDER / name).read_text() for name in FILES)])


def _whole(n: int) -> int:
    """The next multiple of 4, which is read at once."""
    return -(-n // 4) * 4


def _row(n: int) -> int:
    """The length of a row of so many numbers, as ``row_of`` in the kernel."""
    return n if n % 8 else n + 4


def tile_of(batch: int) -> int:
    """Return how many rows of a minibatch of ``batch`` the kernel takes at once, where there is room for them."""
    return next((rows for rows in reversed(TILES) if rows >= batch), TILES[0])


def choose_kernel(
    numbers: Mapping[str, int], *, moments: int, dropout: bool, batch: int, dtype: torch.dtype, shared: int
) -> MemberKernel:
    """Return the kernel for members with the ``numbers`` of their Work, whose largest minibatch has ``batch`` rows.

    ``shared`` are the bytes of shared memory that a block of the card may have; ``unknown`` has found them enough.
    """
    shapes = (
        MemberKernel(
            numbers["inputs"], numbers["width"], numbers["layers"] - 1, numbers["outputs"], numbers["activation"],
            moments, bool(numbers["classes"]), dropout, dtype, rows,
        )
        for rows in TILES if rows <= tile_of(batch)
    )  # fmt: skip
    return next(shape for shape in shapes if shape.shared <= shared)


def unknown(
    *, inputs: int, width: int, depth: int, outputs: int, activation: str, optimizer: str, dtype: torch.dtype,
    shared: int,
) -> str | None:  # fmt: skip
    """Return the part of a member that the kernel does not know, as a clause; None: it can train it.

    ``width`` is that of the tensors; ``shared`` are the bytes of shared memory that a block of the card may have.
    """
    sizes = {"inputs": inputs, "width": width, "depth": depth, "outputs": outputs}
    for name, value in sizes.items():
        if value > _MOST[name]:
            return f"{name} of {value}, where {_MOST[name]} is the most"
    if depth and activation not in ACTIVATIONS:
        return f"the activation {activation!r} ({', '.join(ACTIVATIONS)})"
    if optimizer not in OPTIMIZERS:
        return f"the optimizer {optimizer!r} ({', '.join(OPTIMIZERS)})"
    if dtype != torch.float32:
        return f"dtype={str(dtype).removeprefix('torch.')!r}, only float32"
    least = MemberKernel(inputs, width, depth, outputs, 0, 2, True, False, dtype, TILES[-1])
    if least.shared > shared:
        return f"{least.shared:,} bytes of weights and activations on chip, where the card has {shared:,}"
    return None


def compile_kernel(kernel: MemberKernel, device: torch.device) -> Kernel:
    """Return the kernel for a GPU, which NVRTC compiles once on a machine. Raises what NVRTC and the driver raise."""
    name, source = "train_members", kernel.source
    version = ".".join(map(str, torch.cuda.get_device_capability(device)))

    def make() -> bytes:
        return _utils._nvrtc_compile(source, name, nvcc_options=list(OPTIONS))[0]

    with torch.cuda.device(device):
        binary = kept_binary("member", f"{source}{OPTIONS}{torch.version.cuda} {version}", make)
        loaded = _utils._cuda_load_module(binary, [name])
        assert isinstance(loaded, dict)
        loaded[name].set_shared_memory_config(kernel.shared)
    return loaded[name]
