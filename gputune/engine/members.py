"""A chunk of a user's module whose members each take the steps of an epoch in compiled code, one after another.

The step of a member is traced in a chunk of that member alone, and its trace is written as C
(``modules/member_code.py``): parameters, moments and activations stay in one core's cache from step to step, which
those of all members together never do. Each thread has memory of its own, into which members come for an epoch.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.one_member import OneMember, Space
from gputune.engine.stacked import StackedChunk
from gputune.modules.member_code import MemberCode
from gputune.modules.module import StackedModule
from gputune.native.library import build_kernels
from gputune.types import Config

_TIMED_STEPS = 8


class MemberChunk(StackedChunk):
    """The trials in flat buffers, as in any stacked chunk; an epoch is a queue of members. Raises TraceError."""

    def __init__(
        self, network: StackedModule, data: Dataset, configs: Sequence[Config], *, seed: int, **options: Any
    ) -> None:
        super().__init__(network, data, configs, seed=seed, **options)
        self.data = data
        with torch_threads(1):  # a step of one member is thousands of small operations, which threads only delay
            self.kernels = build_kernels(list(self._write(seed).kernels), data.dtype)
        self.outputs: list[Tensor | None] = []  # room for those (C, m, K) of each fold, None where they are in no code
        self.spaces: list[dict[OneMember, Space]] = []  # of threads: to ask the system for pages takes long

    def _write(self, seed: int) -> MemberCode:
        """Return the steps of a member of each fold as code, once for folds of equal lengths."""
        lengths = [(len(fold.train), len(fold.valid)) for fold in self.data.folds]
        ones = {length: OneMember(self, lengths.index(length), seed) for length in dict.fromkeys(lengths)}
        self.members = [ones[length] for length in lengths]
        drawing = [one.draws for one in ones.values() if one.draws is not None]
        self.ahead = min([draws.ahead for draws in drawing], default=len(self.batches.shapes))
        for draws in drawing:
            draws.ahead = self.ahead
        code = MemberCode(self.data.dtype)
        for one in ones.values():
            one.write(code)
        return code

    def advance(self, epoch: int) -> None:
        """Train for one epoch."""
        self.batches.begin(epoch)
        self.update.begin(epoch)
        with torch_threads(1):  # some megabytes, for which threads take longer to meet than to copy
            rows = [block.to_rows(buffer) for block, buffer in self._buffers()]
        last = len(self.batches.shapes)
        self.outputs = [
            None if one.outputs is None else one.result.new_empty((len(self.configs), *one.result.shape[1:]))
            for one in self.members
        ]
        for begin in range(0, last, self.ahead):
            for one in dict.fromkeys(self.members):
                if one.draws is not None:
                    one.draws.fill(epoch, begin)
            self._take(rows, begin, min(begin + self.ahead, last))
        with torch_threads(1):
            for (block, buffer), own in zip(self._buffers(), rows):
                block.put_rows(buffer, own)

    def scores(self) -> np.ndarray:
        """Return the scores (C, F) of all members, each on the validation rows of its fold."""
        outputs = [x for x in self.outputs if x is not None]
        if len(outputs) < self.data.n_folds:
            return super().scores()
        params = self._network.blocks.views(self._flat)
        with torch_threads(1):  # what is left is so little that threads wait for each other
            return self.validation.scores(self._network, params, len(self.configs), outputs)

    def seconds_of_a_step(self) -> float:
        """Return the seconds of a core that a step of the first member takes; its state stays as it is."""
        self.batches.begin(0)
        self.update.begin(0)
        one = self.members[0]
        if one.draws is not None:
            one.draws.fill(0, 0)
        space, end = Space(one), min(_TIMED_STEPS, self.ahead)
        space.load(0, 0, [block.to_rows(buffer)[0, 0] for block, buffer in self._buffers()], 0)
        times = [time.thread_time()]  # whatever else the machine does
        for _ in range(3):
            space.take(self.kernels, 0, end)
            times.append(time.thread_time())
        return min(b - a for a, b in itertools.pairwise(times)) / min(end, len(one.steps))

    def _take(self, rows: Sequence[Tensor], begin: int, end: int) -> None:
        """Let as many threads as torch has here take members from one queue, each through some steps."""
        queue = deque(itertools.product(range(self.data.n_folds), range(len(self.configs))))
        stop = threading.Event()

        def work(spaces: dict[OneMember, Space]) -> None:
            torch.set_flush_denormal(True)  # each thread has its own setting
            for space in spaces.values():
                space.fold = -1  # the order of its rows is another one now
            with torch.no_grad():
                while not stop.is_set():
                    try:
                        f, c = queue.popleft()
                    except IndexError:  # which may be empty since another thread has taken its last
                        return
                    one = self.members[f]
                    if one not in spaces:
                        spaces[one] = Space(one)
                    space = spaces[one]
                    space.load(f, c, [own[c, f] for own in rows], begin)
                    space.take(self.kernels, begin, end)
                    space.store([own[c, f] for own in rows])
                    outputs = self.outputs[f]
                    if end == len(self.batches.shapes) and outputs is not None:
                        outputs[c] = space.outputs(self.kernels)

        threads = torch.get_num_threads()
        self.spaces += [{} for _ in range(threads - len(self.spaces))]
        with ThreadPoolExecutor(threads) as pool:
            try:
                list(pool.map(work, self.spaces[:threads]))  # raises what one of them has raised
            finally:
                stop.set()
