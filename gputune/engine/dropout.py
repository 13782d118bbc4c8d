"""Random numbers for dropout in the built-in MLP, made in advance for several training steps.

A member is one trial on one fold. Each epoch, step and layer has its own random stream. On a GPU, a
kernel (``dropout.cu``) makes the same numbers as PyTorch's CPU generator.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gputune.ground.errors import warn
from gputune.ground.seeding import stream, stream_seed
from gputune.ground.types import StepKey
from gputune.native.cuda import Kernel, kernels, launch
from gputune.native.library import fill_uniform

SOURCE = Path(__file__).with_name("dropout.cu")

# Bytes of draws that are made ahead. The host waits for the device once for each buffer.
_DRAW_BYTES = 64 << 20
_SEED_BITS = (1 << 32) - 1  # the bits of a seed that PyTorch's CPU generator uses


class MlpDraws:
    """A buffer with random numbers for dropout, made for several training steps in advance: (steps,
    layers, B, H) on the device.

    ``rows`` has the minibatch size B of each step of an epoch. H is the width of the hidden layers.
    """

    def __init__(
        self,
        rows: Sequence[int],
        *,
        layers: int,
        width: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.rows = list(rows)
        self.seed = seed
        shape = (layers, max(rows), width)
        # most steps whose float32 draws fit into the buffer
        most = max(1, _DRAW_BYTES // (4 * math.prod(shape)))
        self.ahead = min(len(self.rows), most)
        self.buffer = torch.zeros((self.ahead, *shape), dtype=torch.float32, device=device)
        self.kernel = uniform_kernel(device) if device.type == "cuda" else None

    def fill(self, epoch: int, step: int) -> None:
        """Fill the buffer with the random numbers of this step and the next steps, unless it has
        them already.
        """
        if step % self.ahead:
            return
        _, layers, longest, width = self.buffer.shape
        drawn = None
        if self.kernel is None:
            drawn = torch.zeros(self.buffer.shape)
        seeds = []
        counts = []
        for slot, rows in enumerate(self.rows[step : step + self.ahead]):
            key = (epoch, step + slot)
            for layer in range(layers):
                if drawn is not None:
                    drawn[slot, layer, :rows] = dropout_draw(self.seed, key, layer, rows, width)
                    continue
                # Each epoch, step and layer has its own stream, so draws do not depend on the
                # buffer's size.
                seed = stream_seed(self.seed, "dropout", *key, layer)
                seeds.append(seed & _SEED_BITS)
                counts.append(rows * width)
        if drawn is not None:
            self.buffer.copy_(drawn)
        elif self.kernel is not None:
            # (slots * layers, B * H)
            rows_of_streams = self.buffer.view(-1, longest * width)
            draw_uniform(self.kernel, seeds, counts, rows_of_streams)

    def at(self, step: Tensor, rows: int) -> Tensor:
        """Return the random numbers (layers, B, H) for dropout in one step. ``step`` is a counter
        on the device."""
        slot = torch.remainder(step, self.ahead).view(1)
        return self.buffer.index_select(0, slot)[0, :, :rows]


def dropout_draw(seed: int, key: StepKey, layer: int, rows: int, width: int) -> Tensor:
    """Return uniform random numbers (B, H) for dropout in one training step and hidden layer, made
    on the CPU.

    ``key`` is (epoch, step). B is the minibatch size, and H the layer's width.
    """
    drawn = torch.empty((rows, width), dtype=torch.float32, device="cpu")
    if not fill_uniform(stream_seed(seed, "dropout", *key, layer), [drawn]):
        drawn.uniform_(generator=stream(seed, "dropout", *key, layer))
    return drawn


def draw_uniform(kernel: Kernel, seeds: Sequence[int], counts: Sequence[int], out: Tensor) -> None:
    """Fill each row of ``out`` (streams, n) on the GPU with uniform random numbers from the row's
    own seed.

    ``counts`` says how many numbers each row receives.
    """
    streams = torch.tensor([seeds, counts])
    sizes = torch.tensor([len(seeds), out.shape[1]])
    arguments = [sizes.to(out.device), streams.to(out.device), out]
    launch(kernel, len(seeds), arguments, block=32)


@cache
def uniform_kernel(device: torch.device) -> Kernel | None:
    """Return the kernel that makes uniform random numbers on a GPU.

    If these numbers differ from PyTorch's random numbers on a CPU, the function warns and returns
    None.
    """
    compiled = kernels(SOURCE, ("uniform",), device, torch.float32)
    if compiled is None:
        return None
    kernel = compiled[0]
    seeds = [0, 12345, _SEED_BITS]
    out = torch.zeros((3, 1500), device=device)
    draw_uniform(kernel, seeds, [1500] * 3, out)
    for seed, drawn in zip(seeds, out.cpu()):
        generator = torch.Generator().manual_seed(seed)
        expected = torch.rand(1500, generator=generator, device="cpu")
        if not torch.equal(drawn, expected):
            warn(
                f"The dropout draws of {device} differ from PyTorch's draws on a CPU. The CPU "
                "draws the random numbers, which is slower.",
                RuntimeWarning,
            )
            return None
    return kernel
