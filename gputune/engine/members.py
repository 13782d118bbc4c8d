"""A chunk of a user's module in which each member takes the steps of an epoch in compiled code.

The members train one after another. The step of a member is traced in a chunk of only that member,
and its trace is written as C (``modules/member_code.py``). From step to step, the parameters,
moments and activations of the member stay in one core's cache. Those of all members together would
not fit there. Each thread has its own memory, into which a member is loaded for an epoch. Values
that differ between members are in tables. A member's own values are copied from the tables before
its steps.
"""

import ctypes
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.stacked import StackedChunk
from gputune.modules.calls import ModuleDraws
from gputune.modules.member_code import CodedStep, MemberCode
from gputune.modules.module import StackedModule
from gputune.modules.trace import TraceError, tensors, trace
from gputune.native.library import Kernels, build_kernels
from gputune.optimizers.optimizer import OnlineUpdate
from gputune.population.batches import StepShape
from gputune.scoring.scoring import Validation

# steps that are timed to measure the speed
_TIMED_STEPS = 8
# bytes of a pointer
_POINTER = ctypes.sizeof(ctypes.c_void_p)

_Path = tuple[Any, ...]
"""Names of attributes and keys of dicts that lead from a chunk to one of its values."""


def _at(value: Any, path: _Path) -> Any:
    """Return the value at a path.

    The result is None if the value no longer exists, because no member differs from the rule in it.
    """
    for name in path:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
        if value is None:
            return None
    return value


def _part(table: Tensor, fold: int, trial: int) -> Tensor:
    """Return the part of a table (F, C) for one member, or of a table (C,) for one trial."""
    one = slice(trial, trial + 1)
    return table[one] if table.dim() == 1 else table[fold : fold + 1, one]


def _of_fold(data: Dataset, fold: int) -> Dataset:
    """Return the data of one fold. All of its tensors are copies, except the inputs and the
    target."""

    def own(table: Tensor) -> Tensor:
        return table[fold : fold + 1].clone()

    return replace(
        data,
        folds=(data.folds[fold],),
        copies=(data.copies[fold],),
        weights=None if data.weights is None else own(data.weights),
        present=None if data.present is None else own(data.present),
        center=own(data.center),
        scale=own(data.scale),
        transforms=data.transforms[fold : fold + 1],
        scaling=tuple(
            s and replace(s, center=own(s.center), scale=own(s.scale)) for s in data.scaling
        ),
    )


class OneMember:
    """A chunk of one member, like the members of a fold, and the code of its steps.

    The code reads and writes the tensors of this chunk.
    """

    def __init__(self, chunk: "MemberChunk", fold: int, seed: int) -> None:
        network = chunk.module
        data = _of_fold(chunk.data, fold)
        if network.objective.augment is not None:
            raise TraceError("a function of the user's is in no code")
        self.network = StackedModule(
            network.builder,
            # a configuration with dropout, if any has it: the code of all members then drops units
            [max(network.configs, key=lambda config: float(config["dropout"]))],
            replace(network.shape, folds=1, rows=None, present=data.present),
            seed=seed,
            traits=network.traits,
            objective=network.objective,
        )
        self.chunk = chunk
        self.tables = list[tuple[_Path, Tensor]]()
        self.own = StackedChunk(
            self.network, Validation(data, None), seed=seed, horizon=chunk.horizon, recorded=True
        )
        if isinstance(self.own.update, OnlineUpdate):
            raise TraceError("a rate that adapts itself is in no code")
        if self.own.draws is None and network.traits.draws:
            raise TraceError("what it draws depends on more than the key of the step")
        draws = self.own.draws  # of the steps ahead, if the module draws numbers
        self.draws = draws if isinstance(draws, ModuleDraws) and any(draws.draws.values()) else None
        self._match(self.own.update, ("update",))
        self._match(self.own.update.clock, ("update", "clock"))
        self.own.dropout = self._shared(chunk.dropout, ("dropout",))
        self.memories: dict[int, torch.UntypedStorage] = {}

    def write(self, code: MemberCode) -> None:
        """Write the steps of an epoch as code."""
        own = self.own
        shapes = self.own.batches.shapes
        own.batches.begin(0)
        own.update.begin(0)
        steps: dict[StepShape, CodedStep] = {}
        for i, shape in enumerate(shapes):
            if shape not in steps:
                # Tracing takes the step, and its draws may be used as indices, so they must be
                # valid.
                if self.draws is not None:
                    self.draws.fill(0, i - i % self.draws.ahead)
                own.batches.step.fill_(i)
                steps[shape] = code.add(trace(partial(own._step, shape, (0, i))), self.memories)
        self.steps = [steps[shape] for shape in shapes]
        self.outputs = self._outputs(code)
        # Threads share these tensors: a ``Space`` does not copy them.
        buffers = [] if self.draws is None else list(tensors(self.draws.buffers))
        held = [*own.batches.inputs, own.batches.target, *buffers]
        self.common = {tensor.untyped_storage().data_ptr() for tensor in held}

    def _outputs(self, code: MemberCode) -> CodedStep | None:
        """Write the code of the member's outputs on its validation rows.

        The result is None if the scores are not computed from these outputs, or if they cannot be
        traced.
        """
        own = self.own
        validation = self.chunk.validation
        data = self.own.validation.data
        as_it_is = validation.scoring is not None and self.chunk.scored is self.chunk.flat
        if own.network.evaluation_draws or not (as_it_is and validation.is_small(own.network)):
            return None
        # (1, m, K): outputs of one member
        self.rows = [x.clone() for x in data.rows(0, data.folds[0].valid)]
        self.result = own.network.outputs(own.params, 0, self.rows).clone()

        def compute() -> None:
            self.result.copy_(own.network.outputs(own.params, 0, self.rows))

        with suppress(TraceError):
            return code.add(trace(compute), self.memories)
        return None

    def _match(self, mine: object, path: _Path) -> None:
        """Copy a part of the chunk's optimizer. Values that may differ between members become
        tables."""
        for name, value in vars(_at(self.chunk, path)).items():
            if (isinstance(value, Tensor) and value.dim() == 2) or isinstance(value, dict):
                setattr(mine, name, self._shared(value, (*path, name)))
            elif isinstance(value, Tensor) and getattr(mine, name) is None:
                setattr(mine, name, torch.zeros_like(self.own.grad))
            elif isinstance(value, int | float):
                setattr(mine, name, value)

    def _shared(self, value: Any, path: _Path) -> Any:
        """Return one member's copy of a table, and remember its path for ``Space.load``."""
        if isinstance(value, dict):
            return {key: self._shared(part, (*path, key)) for key, part in value.items()}
        self.tables.append((path, own := _part(value, 0, 0).clone()))
        return own

    def of_fold(self, fold: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor of a fold together with the tensor from which its members read it."""
        mine = self.own
        theirs = self.chunk
        data = self.chunk.data
        part = slice(fold, fold + 1)
        yield theirs.batches.order[:, part, : mine.batches.order.shape[-1]], mine.batches.order
        yield theirs.batches.start[:, part], mine.batches.start
        for name in ("taken", "counted", "active_until"):
            yield getattr(theirs.batches, name)[part, :1], getattr(mine.batches, name)
        if self.outputs is not None:
            yield from zip(data.rows(fold, data.folds[fold].valid), self.rows)
        shapes = theirs.network.shape, mine.network.shape
        pairs = [
            (theirs.batches.weights, mine.batches.weights),
            (shapes[0].present, shapes[1].present),
        ]
        for of_all, own in zip(data.scaling, mine.batches.data.scaling):
            if of_all is not None and own is not None:
                pairs += [(of_all.center, own.center), (of_all.scale, own.scale)]
        yield from (
            (of_all[part], own) for of_all, own in pairs if of_all is not None and own is not None
        )


def _pointers(addresses: Sequence[int]) -> "ctypes.Array[ctypes.c_void_p]":
    """Return memory addresses as a C array of pointers."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Space:
    """The memory in which one thread takes the steps of a member."""

    def __init__(self, one: OneMember) -> None:
        self.one = one
        self.fold = -1
        self.copies = {
            address: storage if address in one.common else storage.clone()  # type: ignore[no-untyped-call]
            for address, storage in one.memories.items()
        }
        steps = [*one.steps, *([] if one.outputs is None else [one.outputs])]
        self.room = torch.empty(max(step.workspace for step in steps) + 64, dtype=torch.uint8)
        # Scratch memory begins at a multiple of 64 bytes.
        room = -(-self.room.data_ptr() // 64) * 64
        self.memories = _pointers([room, *(storage.data_ptr() for storage in self.copies.values())])
        self.calls = _pointers([step.calls.ctypes.data for step in steps])
        self.numbers = _pointers([step.numbers.ctypes.data for step in steps])
        own = one.own
        self.states = [self._here(tensor) for tensor in (own._flat, *own.update.state())]
        self.tables = [(path, self._here(table)) for path, table in one.tables]
        self.losses = {name: self._here(value) for name, value in one.network.loss_values.items()}
        self.step, self.done = self._here(own.batches.step), self._here(own.update.clock.done)

    def _here(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor of the one-member chunk in this memory, or None if no step reads it."""
        storage = self.copies.get(tensor.untyped_storage().data_ptr())
        if storage is None:
            return None
        return torch.empty(0, dtype=tensor.dtype).set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def load(self, fold: int, trial: int, rows: Sequence[Tensor], step: int) -> None:
        """Load a member before a step of the epoch. ``rows`` has its parameters and optimizer
        state."""
        chunk = self.one.chunk
        if fold != self.fold:
            self._fill((theirs, self._here(mine)) for theirs, mine in self.one.of_fold(fold))
            self.fold = fold
        self._fill(zip(rows, self.states))
        for path, table in self.tables:
            if table is not None:
                value = _at(chunk, path)
                # A value that is no table any more is the same for all members. If it is None, the
                # rule's default applies: learning-rate factors are 1, other values 0.
                if isinstance(value, Tensor):
                    table.copy_(_part(value, fold, trial))
                else:
                    table.fill_(value if value is not None else float("lr_factors" in path))
        self._fill(
            (value[trial : trial + 1], self.losses[k])
            for k, value in chunk.module.loss_values.items()
        )
        if self.step is not None:
            self.step.fill_(step)
        if self.done is not None:
            self.done.add_(step)

    @staticmethod
    def _fill(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        for value, tensor in pairs:
            if tensor is not None:
                tensor.copy_(value)

    def take(self, kernels: Kernels, begin: int, end: int, *, outputs: bool = False) -> None:
        """Take the steps from ``begin`` to ``end`` of the epoch.

        With ``outputs``, also run the code of the outputs, which follows the last step.
        """
        end = min(end, len(self.one.steps)) + outputs
        if begin < end:
            calls, numbers = (
                ctypes.byref(table, begin * _POINTER) for table in (self.calls, self.numbers)
            )
            kernels.take_steps(
                ctypes.c_int64(end - begin), calls, kernels.addresses, self.memories, numbers
            )

    def outputs(self, kernels: Kernels) -> Tensor:
        """Return the outputs (m, K) on the validation rows, computed in compiled code."""
        steps = len(self.one.steps)
        self.take(kernels, steps, steps, outputs=True)
        result = self._here(self.one.result)
        assert result is not None
        return result[0]


class MemberChunk(StackedChunk):
    """A stacked chunk in which each epoch is a queue of members.

    The trials are in flat buffers, as in any stacked chunk. Raises TraceError if the module cannot
    be traced.
    """

    def __init__(
        self, network: StackedModule, validation: Validation, *, seed: int, horizon: int
    ) -> None:
        super().__init__(network, validation, seed=seed, horizon=horizon)
        data = self.data = validation.data
        code = MemberCode(data.dtype)
        # A step of one member is thousands of small operations, which more threads only delay.
        with torch_threads(1):
            # Folds of equal lengths share their code.
            lengths = [(len(fold.train), len(fold.valid)) for fold in data.folds]
            ones = {
                length: OneMember(self, lengths.index(length), seed)
                for length in dict.fromkeys(lengths)
            }
            self.members = [ones[length] for length in lengths]
            drawing = [one.draws for one in ones.values() if one.draws is not None]
            self.ahead = min([draws.ahead for draws in drawing], default=len(self.batches.shapes))
            for draws in drawing:
                draws.ahead = self.ahead
            for one in ones.values():
                one.write(code)
            self.kernels = build_kernels(list(code.kernels), data.dtype)
        # outputs (C, m, K) of each fold; None if the code does not compute them
        self.outputs: list[Tensor | None] = []
        # memory of each thread, kept because asking the system for pages takes long
        self.spaces: list[dict[OneMember, Space]] = []

    @property
    def module(self) -> StackedModule:
        """Network of the members that are alive."""
        assert isinstance(self.network, StackedModule)
        return self.network

    def advance(self, epoch: int) -> None:
        """Train for one epoch."""
        self._begin(epoch)
        # Only some megabytes: threads take longer to meet than to copy them.
        # Each tensor is (C, F, N).
        with torch_threads(1):
            rows = [block.to_rows(buffer) for block, buffer in self._buffers()]
        last = len(self.batches.shapes)
        self.outputs = [
            None
            if one.outputs is None
            else one.result.new_empty((len(self.configs), *one.result.shape[1:]))
            for one in self.members
        ]
        # The draws of ``ahead`` steps are in the buffer at once, so all members take these steps
        # first.
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
        if len(outputs := [x for x in self.outputs if x is not None]) < self.data.n_folds:
            return super().scores()
        params = self._network.blocks.views(self._flat)
        # the remaining work is so small that threads would wait for each other
        with torch_threads(1):
            return self.validation.scores(self._network, params, len(self.configs), outputs)

    def seconds_of_a_step(self) -> float:
        """Return the CPU seconds of one step of the first member. Its state does not change."""
        self.batches.begin(0)
        self.update.begin(0)
        one = self.members[0]
        if one.draws is not None:
            one.draws.fill(0, 0)
        space = Space(one)
        end = min(_TIMED_STEPS, self.ahead)
        space.load(0, 0, [block.to_rows(buffer)[0, 0] for block, buffer in self._buffers()], 0)
        times = [time.thread_time()]  # CPU time of this thread, whatever else the machine does
        for _ in range(3):
            space.take(self.kernels, 0, end)
            times.append(time.thread_time())
        return min(b - a for a, b in itertools.pairwise(times)) / min(end, len(one.steps))

    def _take(self, rows: Sequence[Tensor], begin: int, end: int) -> None:
        """Let torch's number of threads take members from one queue, each through some steps."""
        queue = deque(itertools.product(range(self.data.n_folds), range(len(self.configs))))
        stop = threading.Event()

        def work(spaces: dict[OneMember, Space]) -> None:
            torch.set_flush_denormal(True)  # each thread has its own setting
            for space in spaces.values():
                # the fold must be loaded again, because the order of its rows has changed
                space.fold = -1
            with torch.no_grad():
                while not stop.is_set():
                    try:
                        f, c = queue.popleft()
                    except IndexError:  # another thread has taken the last member
                        return
                    one = self.members[f]
                    outputs = self.outputs[f]
                    own = [of_all[c, f] for of_all in rows]
                    if one not in spaces:
                        spaces[one] = Space(one)
                    space = spaces[one]
                    space.load(f, c, own, begin)
                    space.take(self.kernels, begin, end)
                    for row, state in zip(own, space.states):
                        if state is not None:
                            row.copy_(state)
                    if end == len(self.batches.shapes) and outputs is not None:
                        outputs[c] = space.outputs(self.kernels)

        threads = torch.get_num_threads()
        self.spaces += [{} for _ in range(threads - len(self.spaces))]
        with ThreadPoolExecutor(threads) as pool:
            try:
                # list() raises the error of a thread, if one failed.
                list(pool.map(work, self.spaces[:threads]))
            finally:
                stop.set()
