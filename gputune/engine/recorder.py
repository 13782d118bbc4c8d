"""How the steps of a chunk are taken: each as it is, or recorded once as a graph of CUDA's and replayed.

A graph launches the few dozen small kernels of a step at the cost of one. What it may do is narrow: it reads and writes
the memory that it read and wrote when it was recorded, and nothing of it waits for the device.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from functools import cache
from typing import Protocol

import torch

_WARM_UPS = 3  # steps of one shape before it is recorded, as in PyTorch's documentation

Step = Callable[[], None]


class Steps(Protocol):
    """Takes the steps of a chunk, which differ by their shape."""

    @property
    def recorded(self) -> bool:
        """Whether a step is bound to the memory that it was recorded over."""

    def take(self, shape: Hashable, step: Step) -> None:
        """Take a step of this shape, which writes into tensors that were there before and leaves nothing else."""


class Direct:
    """Takes every step as it is."""

    recorded = False

    def take(self, shape: Hashable, step: Step) -> None:
        step()


class Recorded(Protocol):
    """A step as it was recorded."""

    def replay(self) -> None:
        """Take the step again, on what its memory holds now."""


class Recorder(Protocol):
    """Records steps on one device."""

    def warm_up(self, step: Step) -> None:
        """Take a step as it is, so that what is made on first use is there before it is recorded."""

    def capture(self, step: Step) -> Recorded:
        """Record a step, which is not taken thereby."""


class Replays:
    """Takes the first steps of each shape as they are, which warms up what a recording needs; then replays one."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.steps: dict[Hashable, Recorded] = {}
        self.taken = Counter[Hashable]()

    @property
    def recorded(self) -> bool:
        """Whether a step is bound to the memory that it was recorded over."""
        return bool(self.steps)

    def take(self, shape: Hashable, step: Step) -> None:
        """Take a step of this shape."""
        if shape not in self.steps:
            self.taken[shape] += 1
            if self.taken[shape] <= _WARM_UPS:
                self.recorder.warm_up(step)
                return
            self.steps[shape] = self.recorder.capture(step)
        self.steps[shape].replay()


class CudaRecorder:
    """CUDA graphs as PyTorch's documentation has them: warmed up and captured on one side stream.

    The graphs share a memory pool, which is safe because none leaves a tensor in it that another would overwrite.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        """Take a step on the side stream, in its turn among what is queued."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: Step) -> Recorded:
        """Record a step; this waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            step()
        return graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device: memory that one chunk gave back to it serves the next."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""What records the steps of a type of device."""
