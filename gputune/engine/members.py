"""Train a user's module in compiled C code on a CPU, one member (one trial on one fold) after
another.

A chunk holds trials of one tensor shape that train together. From step to step, the parameters,
moments and activations of one member stay in a core's cache. The tensors of all members together
would not fit there. The compiled steps are in ``member_steps.py``.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from gputune.engine.backend import torch_threads
from gputune.engine.member_steps import CompiledSteps, MemberMemory, OneMember
from gputune.engine.stacked import StackedChunk
from gputune.engine.turns import turn_given_up
from gputune.ground.types import Config
from gputune.ground.within_epoch import REPORT_SECONDS, report_steps
from gputune.modules.module import StackedModule
from gputune.scoring.validation import Validation

# steps that are timed to measure the speed
_TIMED_STEPS = 8
# steps of one member between two updates of the count of steps
_COUNTED_STEPS = 256


class MemberChunk(StackedChunk):
    """Trials of a user's module that train one after another in compiled code on a CPU.

    In each epoch, threads take the members from a queue. The parameters of all members are in flat
    buffers, as in every ``StackedChunk``. Raises TraceError if the module cannot be traced.

    ``code`` are the compiled steps of an earlier chunk of the same trials' shape. They are written
    again if they do not fit. ``check_build`` is passed to ``CompiledSteps``.
    """

    def __init__(
        self,
        network: StackedModule,
        validation: Validation,
        *,
        seed: int,
        horizon: int,
        code: CompiledSteps | None = None,
        check_build: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(network, validation, seed=seed, horizon=horizon)
        self.seed = seed
        self.data = validation.data
        if code is None or not code.fits(self, seed):
            code = CompiledSteps(self, seed, check_build)
        self._use(code)

    def _use(self, code: CompiledSteps) -> None:
        """Train with compiled steps from now on."""
        self.code = code
        # outputs (C, m, K) of each fold; None if the code does not compute them
        self.outputs: list[Tensor | None] = []
        # memory of each thread, kept because asking the system for pages takes long
        self.memories: list[dict[OneMember, MemberMemory]] = []
        self.n_releases = code.n_releases

    def select(self, slots: Sequence[int], configs: Sequence[Config | None] | None = None) -> None:
        """Replace the trials, as in every ``StackedChunk``. The steps are traced again if new
        configurations change a constant of the compiled code."""
        super().select(slots, configs)
        if configs is not None and not self.code.fits(self, self.seed):
            self._use(CompiledSteps(self, self.seed))

    def advance(self, epoch: int) -> None:
        """Train all members for one epoch in compiled code."""
        self._begin(epoch)
        self.code.allocate()
        if self.n_releases < self.code.n_releases:
            # The addresses in the threads' memories are no longer those of the random numbers.
            self.memories = []
            self.n_releases = self.code.n_releases
        # Only some megabytes: threads take longer to meet than to copy them.
        # Each tensor is (C, F, N).
        with torch_threads(1):
            rows = [block.to_rows(buffer) for block, buffer in self._buffers()]
        last = len(self.batches.shapes)
        self.step_seconds = 0.0
        self.output_seconds = 0.0
        self.outputs = []
        for member, fold in zip(self.code.members, self.data.folds):
            outputs = None
            if member.outputs is not None:
                shape = (len(self.configs), len(fold.valid), *member.result.shape[2:])
                outputs = member.result.new_empty(shape)
            self.outputs.append(outputs)
        # The draws of ``ahead`` steps are in the buffer at once, so all members take these steps
        # first.
        for begin in range(0, last, self.code.ahead):
            for draws in self.code.draws:
                draws.fill(epoch, begin)
            end = min(begin + self.code.ahead, last)
            self._take_steps(rows, begin, end)
            report_steps(end, last, len(self.places))
        with torch_threads(1):
            for (block, buffer), values in zip(self._buffers(), rows):
                block.put_rows(buffer, values)
        self.scoring_share = self.output_seconds / (self.step_seconds + self.output_seconds)

    def scores(self) -> np.ndarray:
        """Return the scores (C trials, F folds) of all members. Each member is scored on the
        validation rows of its fold."""
        outputs = [of_fold for of_fold in self.outputs if of_fold is not None]
        if len(outputs) < self.data.n_folds:
            return super().scores()
        params = self._network.blocks.views(self._flat)
        # the remaining work is so small that threads would wait for each other
        with torch_threads(1):
            return self.validation.scores(self._network, params, len(self.configs), outputs)

    def release(self) -> None:
        """Free the memory that the next training allocates again, as in every ``StackedChunk``."""
        super().release()
        self.code.release()

    def seconds_of_a_step(self) -> float:
        """Measure the CPU seconds of one training step of the first member, without a change of the
        member's state. Then release the memory."""
        self.batches.begin(0)
        self.update.begin(0)
        self.code.allocate()
        member = self.code.members[0]
        if member.draws is not None:
            member.draws.fill(0, 0)
        memory = MemberMemory(member)
        end = min(_TIMED_STEPS, self.code.ahead)
        memory.load(
            self, 0, 0, [block.to_rows(buffer)[0, 0] for block, buffer in self._buffers()], 0
        )
        times = []
        for _ in range(3):
            begin = time.thread_time()  # CPU time of this thread, whatever else the machine does
            memory.take_steps(self.code.kernels, 0, end)
            times.append(time.thread_time() - begin)
        self.release()
        return min(times) / min(end, memory.n_steps)

    def _take_steps(self, rows: Sequence[Tensor], begin: int, end: int) -> None:
        """Train all members from step ``begin`` to step ``end`` in worker threads, which take
        members from one queue. The number of threads is torch's setting."""
        queue = deque(itertools.product(range(self.data.n_folds), range(len(self.configs))))
        n_members = len(queue)
        stop = threading.Event()
        threads = torch.get_num_threads()
        self.memories += [{} for _ in range(threads - len(self.memories))]
        # of each thread: steps, seconds in these steps, seconds in outputs
        counts = [0] * threads
        step_seconds = [0.0] * threads
        output_seconds = [0.0] * threads

        def work(thread: int, core: Callable[[], AbstractContextManager[object]]) -> None:
            memories = self.memories[thread]
            torch.set_flush_denormal(True)  # each thread has its own setting
            for memory in memories.values():
                # the fold must be loaded again, because the order of its rows has changed
                memory.fold = -1
            with torch.no_grad():
                while not stop.is_set():
                    try:
                        fold, trial = queue.popleft()
                    except IndexError:  # another thread has taken the last member
                        return
                    with core():
                        member = self.code.members[fold]
                        outputs = self.outputs[fold]
                        member_rows = [buffer[trial, fold] for buffer in rows]
                        if member not in memories:
                            memories[member] = MemberMemory(member)
                        memory = memories[member]
                        started = time.perf_counter()
                        memory.load(self, fold, trial, member_rows, begin)
                        for first in range(begin, end, _COUNTED_STEPS):
                            last = min(first + _COUNTED_STEPS, end)
                            memory.take_steps(self.code.kernels, first, last)
                            counts[thread] += last - first
                        for row, state in zip(member_rows, memory.states):
                            if state is not None:
                                row.copy_(state)
                        trained = time.perf_counter()
                        step_seconds[thread] += trained - started
                        if end == len(self.batches.shapes) and outputs is not None:
                            memory.write_outputs(self.code.kernels, self.validation, outputs[trial])
                            output_seconds[thread] += time.perf_counter() - trained

        with turn_given_up() as core, ThreadPoolExecutor(threads) as pool:
            try:
                futures = [pool.submit(work, thread, core) for thread in range(threads)]
                while True:
                    ended, running = wait(futures, REPORT_SECONDS, FIRST_EXCEPTION)
                    for future in ended:
                        future.result()  # raises the error of the thread, if it failed
                    if not running:
                        break
                    n_steps = begin * n_members + sum(counts)
                    n_all = len(self.batches.shapes) * n_members
                    report_steps(n_steps, n_all, len(self.places))
            finally:
                stop.set()
        self.step_seconds += sum(step_seconds)
        self.output_seconds += sum(output_seconds)
