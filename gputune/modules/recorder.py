"""How the steps of a chunk are taken: each as it is, or recorded once and replayed.

On a GPU that is a graph of CUDA's, which launches the few dozen small kernels of a step at the cost of one; on a CPU a
function of these kernels alone. What a recorded step may do is narrow: it reads and writes the memory that it read and
wrote when it was recorded, and nothing of it waits for the device.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import torch

from gputune.modules.program import compile_trace
from gputune.modules.trace import TraceError, trace
from gputune.out_of_memory import is_out_of_memory

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

    before: int
    """Steps of one shape to take before it is recorded."""
    repays: int
    """Steps of one shape that together repay its recording."""

    def warm_up(self, step: Step) -> None:
        """Take a step as it is, so that what is made on first use is there before it is recorded."""

    def capture(self, step: Step) -> Recorded:
        """Record a step, which is not taken thereby. Raises TraceError where it can only be taken as it is."""


class Replays:
    """Takes the first steps of each shape as they are, which warms up what a recording needs; then replays one.

    ``expected`` says how many steps of a shape may come: one that comes seldom is recorded when as many have been taken
    as would have repaid it.
    """

    def __init__(self, recorder: Recorder, expected: Counter[Hashable]) -> None:
        self.recorder, self.expected = recorder, expected
        self.steps: dict[Hashable, Recorded] = {}
        self.taken = Counter[Hashable]()
        self.refused = set[Hashable]()

    @property
    def recorded(self) -> bool:
        """Whether a step is bound to the memory that it was recorded over."""
        return bool(self.steps)

    def take(self, shape: Hashable, step: Step) -> None:
        """Take a step of this shape."""
        if shape in self.steps or self._record(shape, step):
            self.steps[shape].replay()
        else:
            self.recorder.warm_up(step)

    def _record(self, shape: Hashable, step: Step) -> bool:
        """Record a step of this shape, if it is time to."""
        self.taken[shape] += 1
        worth = max(self.expected[shape], self.taken[shape]) > self.recorder.repays
        if shape in self.refused or self.taken[shape] <= self.recorder.before or not worth:
            return False
        try:
            self.steps[shape] = self.recorder.capture(step)
        except TraceError:
            self.refused.add(shape)
        return shape in self.steps


class CudaRecorder:
    """CUDA graphs as PyTorch's documentation has them: warmed up and captured on one side stream.

    A capture that fails is the last one of this process, whose steps are then taken as they are: what CUDA refused
    once it refuses again, and the allocator of torch < 2.13 does not survive it whole.

    The graphs share a memory pool, which is safe because none leaves a tensor in it that another would overwrite.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    before, repays = 3, 3  # as in PyTorch's documentation
    has_failed: ClassVar = False

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
        """Record a step; this waits for the device. Raises TraceError where CUDA refuses it, with a warning."""
        if CudaRecorder.has_failed:
            raise TraceError("a capture failed before")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    step()
            except RuntimeError as error:
                torch.cuda.set_stream(
                    current
                )  # where a capture cannot be ended, PyTorch leaves the side stream
                if is_out_of_memory(error):
                    raise
                torch.cuda.synchronize(self.device)  # raises where the device itself has failed
                raise self._failure(error) from error
        return graph

    def _failure(self, error: RuntimeError) -> TraceError:
        """Say, once in a process, that nothing is recorded from now on."""
        CudaRecorder.has_failed = True
        text = f"recording a step on {self.device} failed: {str(error).splitlines()[0]}"
        warnings.warn(
            f"{text}. Nothing is lost: this process takes its steps as they are from here on, which is slower; "
            "backend='eager' does so from the start.",
            RuntimeWarning,
            stacklevel=2,
        )
        return TraceError(text)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device: memory that one chunk gave back to it serves the next."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CpuRecorder:
    """Straight functions of the kernels of a step (``program.py``)."""

    before, repays = 1, 8  # a recording takes as long as it saves in about so many steps of a small module

    def __init__(self, device: torch.device) -> None:
        del device  # there is one

    def warm_up(self, step: Step) -> None:
        """Take a step as it is."""
        step()

    def capture(self, step: Step) -> Recorded:
        """Record a step. Raises TraceError."""
        return Program(compile_trace(trace(step)))


@dataclass(frozen=True)
class Program:
    """A function that takes a step."""

    replay: Step


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cpu": CpuRecorder, "cuda": CudaRecorder}
"""What records the steps of a type of device."""
