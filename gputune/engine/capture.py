"""A training step recorded once and replayed: by CUDA as one graph, on a CPU by a stand-in that is as strict.

A graph launches the few dozen small kernels of a step at the cost of one. What it may do is narrow: it reads and writes
the memory that it read and wrote when it was recorded, and nothing of it waits for the device.
"""

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from gputune.engine.stand_in import StandIn


class Recorded(Protocol):
    """A step as it was recorded."""

    def replay(self) -> None:
        """Take the step again, on what its memory holds now."""


class Recorder(Protocol):
    """Records steps that leave nothing behind but what they write into tensors that were there before."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Take a step as it is, so that what is made on first use is there before it is recorded."""

    def capture(self, step: Callable[[], None]) -> Recorded:
        """Record a step, which is not taken thereby."""


def make_recorder(device: torch.device) -> Recorder:
    """Return a recorder of CUDA graphs, or on a CPU the stand-in."""
    return CudaRecorder(device) if device.type == "cuda" else StandIn(device)


class CudaRecorder:
    """CUDA graphs as PyTorch's documentation has them: warmed up and captured on one side stream.

    The graphs share a memory pool, which is safe because none leaves a tensor in it that another would overwrite.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        """Take a step on the side stream, in its turn among what is queued."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: Callable[[], None]) -> Recorded:
        """Record a step; this waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            step()
        return graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device: memory that one chunk gave back to it serves the next."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
