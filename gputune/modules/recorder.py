"""How the steps of a chunk are taken: each as it is, or recorded once and replayed.

On a GPU that is a graph of CUDA's, which launches the few dozen small kernels of a step at the cost
of one; on a CPU a function of these kernels alone. What a recorded step may do is narrow: it reads
and writes the memory that it read and wrote when it was recorded, and nothing of it waits for the
device.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from gputune.errors import warn
from gputune.fallback import words_unless_strict
from gputune.memory import CAPTURING, is_out_of_memory
from gputune.modules.program import compile_trace
from gputune.modules.trace import TraceError, trace

Step = Callable[[], None]


class RecordingError(TraceError):
    """Recording a step failed by an error that says nothing of whether the step can be recorded."""


class Direct:
    """Takes every step as it is."""

    begun = False
    spare = 0

    def take(self, shape: Hashable, step: Step) -> None:
        step()


class Replays:
    """Takes the first steps of each shape as they are, which warms up what a recording needs; then
    replays one.

    ``expected`` says how many steps of a shape may come: one that comes seldom is recorded when as
    many have been taken as would have repaid it. The replay of a step may change the tensors of
    ``state`` otherwise than the step by a share (``tolerance``) of the sum of each.
    """

    def __init__(
        self,
        recorder: "Recorder",
        expected: Counter[Hashable],
        state: Callable[[], Sequence[Tensor]],
        tolerance: float,
        note_failure: Callable[[str], object] = warn,
    ) -> None:
        self.note_failure = note_failure
        self.recorder = recorder
        self.expected = expected
        self.state = state
        self.tolerance = tolerance
        self.spare = recorder.spare
        """Numbers in the tensors of members up to which those that have left may stay: it is as
        short without them."""
        self.steps: dict[Hashable, Step] = {}
        self.taken = Counter[Hashable]()
        self.refused = set[Hashable]()

    @property
    def begun(self) -> bool:
        """Whether there are recordings, or steps that lead to one, which are bound to the memory of
        the chunk."""
        return bool(self.taken)

    def take(self, shape: Hashable, step: Step) -> None:
        """Take a step of this shape, which writes into tensors that were there before and leaves
        nothing else."""
        if shape in self.steps:
            self.steps[shape]()
            return
        self.taken[shape] += 1
        recording, failure = self._record(shape, step)
        if recording is None:
            self.recorder.warm_up(step)
            if failure:  # only now: an error of the module itself has been raised by the step too
                self.note_failure(failure)
        elif not isinstance(self.recorder, CudaRecorder):
            self.steps[shape] = recording
        elif difference := self._take_both_ways(recording, step):
            self.steps.clear()
            self.recorder.fail(f"a recorded step differs from the step itself by {difference}")
        else:
            self.steps[shape] = recording

    def _record(self, shape: Hashable, step: Step) -> tuple[Step | None, str]:
        """Return the recording of a step if it is time for one; if that fails, None and the error
        in words.

        On a CPU the step has been taken once by the recording that is returned.
        """
        taken = self.taken[shape]
        repaid = max(self.expected[shape], taken) > self.recorder.repays
        if shape in self.refused or taken <= self.recorder.before or not repaid:
            return None, ""
        try:
            recording = self.recorder.capture(step)
        except TraceError as error:
            self.refused.add(shape)
            return None, str(error) if isinstance(error, RecordingError) else ""
        if isinstance(self.recorder, CudaRecorder):
            return recording, ""
        state = self.state()
        before = [tensor.clone() for tensor in state]
        try:
            recording()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            for tensor, value in zip(state, before):
                tensor.copy_(value)
            self.refused.add(shape)
            return None, words_unless_strict(error)
        return recording, ""

    def _take_both_ways(self, recording: Step, step: Step) -> str:
        """Take a step as it is, after a replay of it; return by how much they differ, "" where they
        agree."""
        state = self.state()
        others = [tensor.clone() for tensor in state]
        recording()
        for tensor, other in zip(state, others):
            replayed = tensor.clone()
            tensor.copy_(other)
            other.copy_(replayed)
        self.recorder.warm_up(step)
        worst = max(float(_difference(*pair)) for pair in zip(others, state))
        return "" if worst <= self.tolerance else f"{worst:.0e} of its size"


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of |a - b| over that of |b|; entries that are equal, or both NaN, differ by
    nothing.

    A sum, since the few entries whose slope is rounding alone go either way under Adam, by a whole
    rate.
    """
    size = b.abs().nan_to_num(0.0, 0.0, 0.0).sum(dtype=torch.float64)
    apart = (
        (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).sum(dtype=torch.float64)
    )
    return torch.where(apart == 0, apart, apart / size).nan_to_num(torch.inf)


class CudaRecorder:
    """CUDA graphs as PyTorch's documentation has them: warmed up and captured on one side stream.

    A capture that fails is the last one of this process, whose steps are then taken as they are:
    what CUDA refused once it refuses again, and the allocator of torch < 2.13 does not survive it
    whole. So is one whose first replay is not the step itself.

    The graphs share a memory pool, which is safe because none leaves a tensor in it that another
    would overwrite.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    # as in PyTorch's documentation
    before = 3
    repays = 3
    """Steps of one shape to take before it is recorded, and that together repay its recording."""
    spare = 1 << 20  # a pass over 4 MB takes a GPU about as long as launching it
    failure: ClassVar[str] = ""
    """Why this process records nothing any more, in a sentence."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _side_stream(device, threading.get_ident())
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        """Take a step on the side stream, in its turn among what is queued: what is made on first
        use is then there."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: Step) -> Step:
        """Record a step; this waits for the device. Raises TraceError if that fails, with a
        warning."""
        if CudaRecorder.failure:
            raise TraceError("a capture failed before")
        graph = torch.cuda.CUDAGraph()
        with CAPTURING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            try:
                # What other threads of the program ask of CUDA meanwhile is none of this capture's
                # business.
                with torch.cuda.graph(
                    graph, self.pool, self.stream, capture_error_mode="thread_local"
                ):
                    step()
            except Exception as error:
                # Where a capture cannot be ended, PyTorch leaves the side stream current.
                torch.cuda.set_stream(current)
                if is_out_of_memory(error):
                    raise
                try:
                    torch.cuda.synchronize(self.device)
                except RuntimeError as lost:
                    why = (
                        "has failed, and this process cannot use it any more: "
                        f"{str(lost).splitlines()[0]}"
                    )
                    remedy = "What a study has finished is kept; go on in a new process."
                    raise RuntimeError(f"{self.device} {why}. {remedy}") from error
                # CUDA refuses by RuntimeError what it cannot record. Other errors are of gputune or
                # of the module.
                reason = (
                    str(error).splitlines()[0]
                    if isinstance(error, RuntimeError)
                    else words_unless_strict(error)
                )
                self.fail(f"recording a step on {self.device} failed: {reason}")
                raise TraceError(CudaRecorder.failure) from error
        return graph.replay

    def fail(self, reason: str) -> None:
        """Record nothing from now on in this process, for a reason that is said."""
        CudaRecorder.failure = (
            f"{reason}. Nothing is lost: this process takes its steps as they are from here on, "
            "which is slower; backend='eager' does so from the start."
        )
        warn(CudaRecorder.failure, RuntimeWarning)


@cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    # One a device, so that memory that a chunk gave back serves the next, and a thread: a capture
    # records all on it.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CpuRecorder:
    """Straight functions of the kernels of a step (``program.py``)."""

    # a recording takes as long as it saves in about so many steps of a small module
    before = 1
    repays = 8
    spare = 0

    def __init__(self, device: torch.device) -> None:
        del device  # there is one

    def warm_up(self, step: Step) -> None:
        step()

    def capture(self, step: Step) -> Step:
        """Record a step. Raises TraceError for one that cannot be recorded, RecordingError if
        recording fails."""
        try:
            return compile_trace(trace(step))
        except TraceError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise RecordingError(words_unless_strict(error)) from error


Steps = Direct | Replays
"""Takes the steps of a chunk, which differ by their shape."""

Recorder = CudaRecorder | CpuRecorder
"""Records steps on one device."""

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {
    "cpu": CpuRecorder,
    "cuda": CudaRecorder,
}
"""What records the steps of a type of device."""
