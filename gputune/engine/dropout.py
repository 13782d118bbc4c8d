"""The uniform draws of the MLP's dropout, made ahead of the steps that read them: on the CPU, or by a GPU itself.

Both draw the numbers of one generator, PyTorch's on a CPU, so that a member is the same on every device.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gputune.errors import warn
from gputune.native.cuda import Kernel, kernels, launch
from gputune.native.library import fill_uniform
from gputune.seeding import stream, stream_seed

SOURCE = Path(__file__).with_name("dropout.cu")

_DRAW_BYTES = 64 << 20  # of draws that are made ahead; a buffer of them waits for the device once
_SEED_BITS = (1 << 32) - 1  # those that PyTorch's generator of a CPU keeps


class Draws:
    """The draws of some steps ahead, (steps, layers, B, H) on the device; B are the steps' ``rows``, of some epochs."""

    def __init__(
        self, rows: Sequence[int], *, layers: int, width: int, seed: int, device: torch.device, epochs: int = 1
    ) -> None:
        self.steps, self.rows, self.seed = len(rows), [*rows] * epochs, seed
        shape = (layers, max(rows), width)
        self.room = max(1, _DRAW_BYTES // (4 * math.prod(shape)))
        self.ahead = min(len(self.rows), self.room)
        self.buffer = torch.zeros((self.ahead, *shape), dtype=torch.float32, device=device)
        self.kernel = uniform_kernel(device) if device.type == "cuda" else None

    def fill(self, epoch: int, step: int) -> None:
        """Draw for this step, counted from an epoch's first, and those ahead, where the buffer ends before it."""
        if step % self.ahead:
            return
        _, layers, most, width = self.buffer.shape
        ahead = self.rows[step : step + self.ahead]
        places = [divmod(step + slot, self.steps) for slot in range(len(ahead))]
        if self.kernel is not None:
            keys = [(epoch + more, within, layer) for more, within in places for layer in range(layers)]
            seeds = [stream_seed(self.seed, "dropout", *key) & _SEED_BITS for key in keys]
            counts = [rows * width for rows in ahead for _ in range(layers)]
            draw_uniform(self.kernel, seeds, counts, self.buffer.view(-1, most * width))
            return
        drawn = torch.zeros(self.buffer.shape)
        for slot, (rows, (more, within)) in enumerate(zip(ahead, places)):
            for layer in range(layers):
                drawn[slot, layer, :rows] = dropout_draw(self.seed, (epoch + more, within), layer, rows, width)
        self.buffer.copy_(drawn)

    def at(self, step: Tensor, rows: int) -> Tensor:
        """Return the draws (layers, B, H) of the step that a counter on the device says."""
        slot = torch.remainder(step, self.ahead).view(1)
        return self.buffer.index_select(0, slot)[0, :, :rows]


def dropout_draw(seed: int, key: tuple[int, int], layer: int, rows: int, width: int) -> Tensor:
    """Return the uniform draw (B, H) of one step and hidden layer, keyed by (epoch, step), on the CPU."""
    drawn = torch.empty((rows, width), dtype=torch.float32, device="cpu")
    if fill_uniform(stream_seed(seed, "dropout", *key, layer), [drawn]):
        return drawn
    return torch.rand(drawn.shape, generator=stream(seed, "dropout", *key, layer), dtype=torch.float32, device="cpu")


def draw_uniform(kernel: Kernel, seeds: Sequence[int], counts: Sequence[int], out: Tensor) -> None:
    """Write into each row of ``out`` (streams, n) the first numbers of a stream, on its GPU."""
    streams = torch.tensor([seeds, counts], dtype=torch.int64).to(out.device)
    sizes = torch.tensor([len(seeds), out.shape[1]], dtype=torch.int64).to(out.device)
    launch(kernel, len(seeds), [sizes, streams, out], block=32)


@cache
def uniform_kernel(device: torch.device) -> Kernel | None:
    """Return the kernel that draws on a GPU; None, with a warning, where its numbers are not PyTorch's on a CPU."""
    compiled = kernels(SOURCE, ("uniform",), device, torch.float32)
    if compiled is None:
        return None
    seeds, out = [0, 12345, _SEED_BITS], torch.zeros((3, 1500), device=device)
    draw_uniform(compiled[0], seeds, [1500] * 3, out)
    expected = [torch.rand(1500, generator=torch.Generator().manual_seed(seed), device="cpu") for seed in seeds]
    if torch.equal(out.cpu(), torch.stack(expected)):
        return compiled[0]
    what = f"what {device} draws for dropout is not what PyTorch draws on a CPU"
    warn(f"{what}: the CPU draws, which is slower.", RuntimeWarning)
    return None
