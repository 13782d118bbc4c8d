"""Kernels of CUDA C++ on a CPU: g++ compiles them, and the threads of a block are fibers
(``emulation.cpp``)."""

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gputune.native.cuda import MemberKernel, tile_of
from gputune.native.library import MemberWork, make_work

HERE = Path(__file__).parent
ORDERS = ("forwards", "backwards", "shuffled")
LARGEST = 232_448  # bytes of shared memory that a block has on the largest cards


class Emulator:
    """Builds kernels in a folder, where it finds the kernels of earlier runs, and launches them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = functools.cache(self._load)

    def _build(self, name: str, text: str, *options: str) -> Path:
        """Return the library that g++ builds from a text."""
        header = (HERE / "emulation.h").read_bytes()
        key = hashlib.sha256(header + " ".join([text, *options]).encode()).hexdigest()
        path = self.folder / f"{name}-{key[:16]}"
        if not path.exists():
            draft = path.with_suffix(f".{os.getpid()}.cpp")
            draft.write_text(text)
            command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", f"-I{HERE}", *options, str(draft)]
            subprocess.run([*command, "-o", str(draft.with_suffix(".so"))], check=True)
            draft.with_suffix(".so").replace(path)
            draft.unlink()
        return path

    def _load(self, source: str) -> ctypes.CDLL:
        """Return the library of a kernel."""
        fibers = self._build("emulation", (HERE / "emulation.cpp").read_text(), "-c")
        text = f'#include "emulation.h"\n{source}'
        return ctypes.CDLL(
            str(self._build("kernel", text, "-shared", "-Wl,-Bsymbolic", str(fibers)))
        )

    def launch(
        self,
        source: str,
        name: str,
        arguments: Sequence[int],
        *,
        blocks: int,
        threads: int,
        shared: int = 0,
        order: int = 2,
        left_out: int = -1,
    ) -> bool:
        """Launch a kernel; return whether all of its threads came to their ends."""
        library = self.kernel(source)
        library.leave_out(left_out)
        given = (ctypes.c_int64 * len(arguments))(*arguments)
        sizes = len(arguments), blocks, threads, shared, order
        return library.emulate(getattr(library, name), given, *sizes) == 0


def bytes_of(value: np.ndarray | torch.Tensor | None) -> bytes:
    """Return the bytes of an array; none of None."""
    if value is None:
        return b""
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value.tobytes()


def written(numbers: dict[str, int], arrays: dict[str, bytes]) -> bytes:
    """Return the input of ``members_main.c``: for each field -1 and a number, or the array's size
    and bytes.
    """
    parts = []
    for name, _ in MemberWork._fields_:
        first = [-1, numbers[name]] if name in numbers else [len(arrays.get(name, b""))]
        parts += [np.array(first).tobytes(), arrays.get(name, b"")]
    return b"".join(parts)


def kernel_of(numbers: dict[str, int], arrays: dict[str, Any], shared: int = LARGEST):
    """Return the kernel for the input of the C code."""
    return MemberKernel(
        **{name: numbers[name] for name in ("inputs", "width", "outputs")},
        activations=tuple(arrays["activations"].tolist()),
        depth=numbers["layers"] - 1,
        moments=sum(arrays.get(name) is not None for name in ("first", "second")),
        classes=bool(numbers["classes"]),
        dropout=arrays.get("draws") is not None,
        dtype=arrays["theta"].dtype,
        rows=tile_of(int(arrays["sizes"].max())),
    ).with_largest_tile(shared)


def train_members(
    emulator: Emulator,
    numbers: dict[str, int],
    arrays: dict[str, Any],
    *,
    order: int = 2,
    left_out: int = -1,
    pieces: int = 1 << 20,
    blocks: int = 2,
    tf32: bool = False,
    rows: int = 0,
    epochs: int = 1,
) -> bool:
    """Train members by the kernel for one epoch, as the C code does, in launches of ``pieces``
    steps.
    """
    kernel = kernel_of(numbers, arrays)
    work = make_work(numbers, arrays)
    kernel = replace(kernel, tf32=tf32, rows=rows or kernel.rows)
    lengths = np.asarray(arrays["lengths"])[:, None]
    steps = int((-(-lengths // np.minimum(arrays["sizes"].numpy(), lengths))).max())
    scratch = torch.full((blocks * kernel.scratch,), torch.nan, dtype=kernel.dtype)
    whole = True
    for begin in range(0, epochs * steps, pieces):
        taken = np.zeros(1, dtype=np.uint32)
        arguments = [
            ctypes.addressof(work),
            taken.ctypes.data,
            scratch.data_ptr(),
            begin,
            begin + pieces,
            epochs,
        ]
        sizes = {"blocks": blocks, "threads": kernel.threads, "shared": kernel.shared}
        how = {"order": order, "left_out": left_out}
        whole &= emulator.launch(kernel.source, "train_members", arguments, **sizes, **how)
    return whole
