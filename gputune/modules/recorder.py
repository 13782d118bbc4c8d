"""Runs training steps: each step directly, or recorded once and then replayed.

The steps train a chunk, which is a group of trials that train together. A member is one trial on
one fold. The argument ``shape`` of a step is equal for all steps with tensors of the same sizes.

On a GPU, a recording is a CUDA graph. It launches the few dozen small kernels of a step at the cost
of one kernel. On a CPU, it is a function that contains only these kernels. A recorded step can do
little: it reads and writes the same memory as when it was recorded, and never waits for the device.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from gputune.ground.device import CAPTURING, is_out_of_memory
from gputune.ground.errors import warn, words_unless_strict
from gputune.ground.types import Say
from gputune.modules.program import compile_trace
from gputune.modules.trace import TakeStep, TraceError, clones, trace


class RecordingError(TraceError):
    """Raised if recording a step failed for a reason that does not concern the step itself."""


class Direct:
    """Runs every step directly, without a recording."""

    begun = False
    spare = 0

    def take(self, shape: Hashable, step: TakeStep) -> None:
        step()


class Replays:
    """Runs the first steps of each shape directly, then records a step and replays the recording.

    Steps have the same shape if their tensors have the same sizes. The first steps warm up
    everything that a recording needs. ``expected`` is the number of steps of each shape that may
    come. A rare shape is recorded after as many steps as would have repaid its recording. A replay
    may change the tensors of ``state`` differently from the step, by a share (``tolerance``) of the
    sum of each tensor.
    """

    def __init__(
        self,
        recorder: "StepRecorder",
        expected: Counter[Hashable],
        state: Callable[[], Sequence[Tensor]],
        tolerance: float,
        note_failure: Say = warn,
    ) -> None:
        self.note_failure = note_failure
        self.recorder = recorder
        self.expected = expected
        self.state = state
        self.tolerance = tolerance
        self.spare = recorder.spare
        """Size of the members' tensors up to which stopped members are not removed from them.

        Up to this size, removing them would not make a step faster.
        """
        self.steps: dict[Hashable, TakeStep] = {}
        self.taken = Counter[Hashable]()
        self.refused = set[Hashable]()

    @property
    def begun(self) -> bool:
        """True after the first step, which already prepares a recording.

        A recording works only with the memory of the trials for which it was made.
        """
        return bool(self.taken)

    def take(self, shape: Hashable, step: TakeStep) -> None:
        """Run a step of this shape, or replay its recording.

        The step writes into tensors that existed before, and leaves no other results.
        """
        if shape in self.steps:
            self.steps[shape]()
            return
        self.taken[shape] += 1
        recording, failure = self._record(shape, step)
        if recording is None:
            self.recorder.warm_up(step)
            # only now: an error of the module itself would have been raised by the step too
            if failure:
                self.note_failure(failure)
        elif not isinstance(self.recorder, CudaRecorder):
            self.steps[shape] = recording
        elif difference := self._take_both_ways(recording, step):
            self.steps.clear()
            self.recorder.fail(f"a recorded step differs from the step itself by {difference}")
        else:
            self.steps[shape] = recording

    def _record(self, shape: Hashable, step: TakeStep) -> tuple[TakeStep | None, str]:
        """Record a step if enough steps were taken before, and if the recording will repay its
        cost.

        Returns the recording, or None and an error text. On a CPU, the returned recording has
        already taken the step once.
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
        before = clones(state)
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

    def _take_both_ways(self, recording: TakeStep, step: TakeStep) -> str:
        """Run a step once by its recording and once directly. Return a description of the
        difference, or ""."""
        state = self.state()
        others = clones(state)
        recording()
        # The replayed values go into ``others``, and the state before the step is restored.
        for tensor, other in zip(state, others):
            replayed = tensor.clone()
            tensor.copy_(other)
            other.copy_(replayed)
        self.recorder.warm_up(step)
        worst = max(float(_difference(*pair)) for pair in zip(others, state))
        return "" if worst <= self.tolerance else f"{worst:.0e} of its size"


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Return the relative difference of two tensors: the sum of |a - b| over the sum of |b|.

    Equal entries and pairs of NaN do not count. Sums are compared, because the gradient of a few
    entries is only rounding. Adam moves these entries by the full learning rate in either
    direction.
    """
    size = b.abs().nan_to_num(0.0, 0.0, 0.0).sum(dtype=torch.float64)
    apart = (
        (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).sum(dtype=torch.float64)
    )
    return torch.where(apart == 0, apart, apart / size).nan_to_num(torch.inf)


class CudaRecorder:
    """Records steps as CUDA graphs: warmed up and captured on a side stream, as PyTorch documents.

    After a capture has failed, this process captures no other step and takes all steps directly.
    CUDA would refuse such a step again, and the allocator of torch < 2.13 is damaged by a failed
    capture. The same holds after a capture whose first replay differs from the step itself.

    The graphs share a memory pool. This is safe because no graph leaves a tensor there that another
    one would overwrite.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    # as in PyTorch's documentation
    before = 3
    repays = 3
    """The number of steps of one shape before gputune records a step, and the number of steps that
    repay a recording."""
    # A pass over 4 MB takes a GPU about as long as launching it.
    spare = 1 << 20
    failure: ClassVar[str] = ""
    """The reason, a sentence, why this process has stopped recording, or ""."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _side_stream(device, threading.get_ident())
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: TakeStep) -> None:
        """Run a step on the side stream, in order with the work queued before. PyTorch then
        initializes everything that is made at first use."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: TakeStep) -> TakeStep:
        """Record a step as a CUDA graph, and wait for the device. If that fails, warn and raise
        TraceError."""
        if CudaRecorder.failure:
            raise TraceError("a capture failed before")
        graph = torch.cuda.CUDAGraph()
        with CAPTURING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            try:
                # Only this thread: calls of CUDA in other threads must not end the capture.
                with torch.cuda.graph(
                    graph, self.pool, self.stream, capture_error_mode="thread_local"
                ):
                    step()
            except Exception as error:
                # If a capture cannot be ended, PyTorch leaves the side stream as the current
                # stream.
                torch.cuda.set_stream(current)
                if is_out_of_memory(error):
                    raise
                try:
                    torch.cuda.synchronize(self.device)
                except RuntimeError as lost:
                    raise RuntimeError(
                        f"{self.device} has failed, and this process cannot use it any more: "
                        f"{str(lost).splitlines()[0]}. The study keeps finished results. Resume "
                        "the search in a new process."
                    ) from error
                # CUDA raises RuntimeError for a step that it cannot record. Other errors come from
                # gputune or the module.
                reason = (
                    str(error).splitlines()[0]
                    if isinstance(error, RuntimeError)
                    else words_unless_strict(error)
                )
                self.fail(f"recording a step on {self.device} failed: {reason}")
                raise TraceError(CudaRecorder.failure) from error
        return graph.replay

    def fail(self, reason: str) -> None:
        """Stop recording in this process, with a warning that gives the reason."""
        CudaRecorder.failure = (
            f"{reason}. Nothing is lost: this process takes all further steps without recording, "
            f"which is slower. backend='eager' does so from the start."
        )
        warn(CudaRecorder.failure, RuntimeWarning)


@cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    # One stream per device, so that the next chunk can use the memory that a chunk gave back. One
    # per thread, because a capture records everything on its stream.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CpuRecorder:
    """Records steps as plain Python functions that call only kernels (``program.py``)."""

    # A recording takes as long as about 8 steps of a small module save.
    before = 1
    repays = 8
    spare = 0

    def __init__(self, device: torch.device) -> None:
        del device  # there is only one CPU

    def warm_up(self, step: TakeStep) -> None:
        step()

    def capture(self, step: TakeStep) -> TakeStep:
        """Record a step as a Python function of its kernels.

        Raises TraceError for a step that cannot be recorded, and RecordingError if recording fails.
        """
        try:
            return compile_trace(trace(step))
        except TraceError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise RecordingError(words_unless_strict(error)) from error


StepTaker = Direct | Replays
"""An object that runs the training steps of a chunk (trials that train together)."""

StepRecorder = CudaRecorder | CpuRecorder
"""Object that records the training steps of one device."""

RECORDERS: dict[str, Callable[[torch.device], StepRecorder]] = {
    "cpu": CpuRecorder,
    "cuda": CudaRecorder,
}
"""StepRecorder classes by device type, "cpu" or "cuda"."""
