"""A chunk of a user's module whose members each take the steps of an epoch in compiled code, one
after another.

The step of a member is traced in a chunk of that member alone, and its trace is written as C
(``modules/member_code.py``): parameters, moments and activations stay in one core's cache from step
to step, which those of all members together never do. Each thread has memory of its own, into which
members come for an epoch: what they differ in lies in tables, from which a member's own numbers are
copied before its steps.
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
from gputune.modules.member_code import MemberCode, Step
from gputune.modules.module import StackedModule
from gputune.modules.trace import TraceError, tensors, trace
from gputune.native.library import Kernels, build_kernels
from gputune.optimizers.optimizer import OnlineUpdate
from gputune.population.batches import StepShape
from gputune.scoring.scoring import Validation

_TIMED_STEPS = 8
_POINTER = ctypes.sizeof(ctypes.c_void_p)

_Path = tuple[Any, ...]
"""Names of attributes and keys of dicts, from a chunk to what it holds."""


def _at(value: Any, path: _Path) -> Any:
    """Return what lies at a path; None where it is there no more, as no member differs in it from
    the rule."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
        if value is None:
            return None
    return value


def _part(table: Tensor, fold: int, trial: int) -> Tensor:
    """Return what is one member's of a table (F, C), or one trial's of (C,)."""
    one = slice(trial, trial + 1)
    return table[one] if table.dim() == 1 else table[fold : fold + 1, one]


def _of_fold(data: Dataset, fold: int) -> Dataset:
    """Return the data of one fold, in tensors of its own but for the inputs and the target."""

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
    """A chunk of one member like those of a fold, and its steps, whose code reads and writes its
    tensors."""

    def __init__(self, chunk: "MemberChunk", fold: int, seed: int) -> None:
        network = chunk.module
        data = _of_fold(chunk.data, fold)
        if network.objective.augment is not None:
            raise TraceError("a function of the user's is in no code")
        self.network = StackedModule(
            network.builder,
            # one that drops, where any does
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
        draws = self.own.draws  # of the steps ahead, where it draws any
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
        steps: dict[StepShape, Step] = {}
        for i, shape in enumerate(shapes):
            if shape not in steps:
                if self.draws is not None:  # tracing takes the step, whose draws may be indices
                    self.draws.fill(0, i - i % self.draws.ahead)
                own.batches.step.fill_(i)
                steps[shape] = code.add(trace(partial(own._step, shape, (0, i))), self.memories)
        self.steps = [steps[shape] for shape in shapes]
        self.outputs = self._outputs(code)
        buffers = [] if self.draws is None else list(tensors(self.draws.buffers))
        held = [*own.batches.inputs, own.batches.target, *buffers]
        self.common = {tensor.untyped_storage().data_ptr() for tensor in held}

    def _outputs(self, code: MemberCode) -> Step | None:
        """Write what the member makes of its validation rows as code; None where that is not what
        is scored."""
        own = self.own
        validation = self.chunk.validation
        data = self.own.validation.data
        as_it_is = validation.scoring is not None and self.chunk.scored is self.chunk.flat
        if own.network.evaluation_draws or not (as_it_is and validation.is_small(own.network)):
            return None
        self.rows = [x.clone() for x in data.rows(0, data.folds[0].valid)]
        self.result = own.network.outputs(own.params, 0, self.rows).clone()

        def compute() -> None:
            self.result.copy_(own.network.outputs(own.params, 0, self.rows))

        with suppress(TraceError):
            return code.add(trace(compute), self.memories)
        return None

    def _match(self, mine: object, path: _Path) -> None:
        """Let a part of the optimizer be like the chunk's: with a table wherever members may differ
        there."""
        for name, value in vars(_at(self.chunk, path)).items():
            if (isinstance(value, Tensor) and value.dim() == 2) or isinstance(value, dict):
                setattr(mine, name, self._shared(value, (*path, name)))
            elif isinstance(value, Tensor) and getattr(mine, name) is None:
                setattr(mine, name, torch.zeros_like(self.own.grad))
            elif isinstance(value, int | float):
                setattr(mine, name, value)

    def _shared(self, value: Any, path: _Path) -> Any:
        if isinstance(value, dict):
            return {key: self._shared(part, (*path, key)) for key, part in value.items()}
        self.tables.append((path, own := _part(value, 0, 0).clone()))
        return own

    def of_fold(self, fold: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what a fold has, and the tensors in which its members find it."""
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
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Space:
    """The memory in which a thread takes the steps of a member."""

    def __init__(self, one: OneMember) -> None:
        self.one = one
        self.fold = -1
        self.copies = {
            address: storage if address in one.common else storage.clone()  # type: ignore[no-untyped-call]
            for address, storage in one.memories.items()
        }
        steps = [*one.steps, *([] if one.outputs is None else [one.outputs])]
        self.room = torch.empty(max(step.room for step in steps) + 64, dtype=torch.uint8)
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
        """Return a tensor of the chunk of one member in this memory; None where no step reads
        it."""
        storage = self.copies.get(tensor.untyped_storage().data_ptr())
        if storage is None:
            return None
        return torch.empty(0, dtype=tensor.dtype).set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def load(self, fold: int, trial: int, rows: Sequence[Tensor], step: int) -> None:
        """Take a member, its rows as they are before a step of this epoch."""
        chunk = self.one.chunk
        if fold != self.fold:
            self._fill((theirs, self._here(mine)) for theirs, mine in self.one.of_fold(fold))
            self.fold = fold
        self._fill(zip(rows, self.states))
        for path, table in self.tables:
            if table is not None:
                value = _at(chunk, path)
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
        """Take some steps of the epoch; after these, with ``outputs``, what follows them in the
        code."""
        end = min(end, len(self.one.steps)) + outputs
        if begin < end:
            calls, numbers = (
                ctypes.byref(table, begin * _POINTER) for table in (self.calls, self.numbers)
            )
            kernels.take_steps(
                ctypes.c_int64(end - begin), calls, kernels.addresses, self.memories, numbers
            )

    def outputs(self, kernels: Kernels) -> Tensor:
        """Return the outputs (m, K) on the validation rows, which are in the code."""
        steps = len(self.one.steps)
        self.take(kernels, steps, steps, outputs=True)
        result = self._here(self.one.result)
        assert result is not None
        return result[0]


class MemberChunk(StackedChunk):
    """The trials in flat buffers, as in any stacked chunk; an epoch is a queue of members. Raises
    TraceError."""

    def __init__(
        self, network: StackedModule, validation: Validation, *, seed: int, horizon: int
    ) -> None:
        super().__init__(network, validation, seed=seed, horizon=horizon)
        data = self.data = validation.data
        code = MemberCode(data.dtype)
        # a step of one member is thousands of small operations, which threads only delay
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
        # room for those (C, m, K) of each fold, None where they are in no code
        self.outputs: list[Tensor | None] = []
        # of threads: to ask the system for pages takes long
        self.spaces: list[dict[OneMember, Space]] = []

    @property
    def module(self) -> StackedModule:
        """The network of the members that are alive."""
        assert isinstance(self.network, StackedModule)
        return self.network

    def advance(self, epoch: int) -> None:
        """Train for one epoch."""
        self._begin(epoch)
        with torch_threads(1):  # some megabytes, for which threads take longer to meet than to copy
            rows = [block.to_rows(buffer) for block, buffer in self._buffers()]
        last = len(self.batches.shapes)
        self.outputs = [
            None
            if one.outputs is None
            else one.result.new_empty((len(self.configs), *one.result.shape[1:]))
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
        if len(outputs := [x for x in self.outputs if x is not None]) < self.data.n_folds:
            return super().scores()
        params = self._network.blocks.views(self._flat)
        with torch_threads(1):  # what is left is so little that threads wait for each other
            return self.validation.scores(self._network, params, len(self.configs), outputs)

    def seconds_of_a_step(self) -> float:
        """Return the seconds of a core that a step of the first member takes; its state stays as it
        is."""
        self.batches.begin(0)
        self.update.begin(0)
        one = self.members[0]
        if one.draws is not None:
            one.draws.fill(0, 0)
        space = Space(one)
        end = min(_TIMED_STEPS, self.ahead)
        space.load(0, 0, [block.to_rows(buffer)[0, 0] for block, buffer in self._buffers()], 0)
        times = [time.thread_time()]  # whatever else the machine does
        for _ in range(3):
            space.take(self.kernels, 0, end)
            times.append(time.thread_time())
        return min(b - a for a, b in itertools.pairwise(times)) / min(end, len(one.steps))

    def _take(self, rows: Sequence[Tensor], begin: int, end: int) -> None:
        """Let as many threads as torch has here take members from one queue, each through some
        steps."""
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
                list(pool.map(work, self.spaces[:threads]))  # raises what one of them has raised
            finally:
                stop.set()
