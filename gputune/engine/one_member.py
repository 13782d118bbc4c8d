"""The steps of one member as code, on memory of a thread: traced in a chunk of that member alone.

What members differ in lies in tables, from which the member's own numbers are copied before its steps.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.stacked import StackedChunk
from gputune.modules.calls import ModuleDraws
from gputune.modules.member_code import MemberCode, Step
from gputune.modules.module import StackedModule
from gputune.modules.trace import TraceError, tensors, trace
from gputune.native.library import Kernels
from gputune.optimizers.update import OnlineUpdate
from gputune.population.batches import StepShape
from gputune.population.population import Network

_Path = tuple[Any, ...]
"""Names of attributes and keys of dicts, from a chunk to what it holds."""


class OneMember:
    """A chunk of one member like those of a fold, and its steps, whose code reads and writes its tensors."""

    def __init__(self, chunk: StackedChunk, fold: int, seed: int) -> None:
        network, data = _network_of(chunk, fold, seed), _of_fold(chunk.validation.data, fold)
        if network.objective.augment is not None:
            raise TraceError("a function of the user's is in no code")
        self.chunk = chunk
        self.own = StackedChunk(
            network, data, chunk.configs[:1], seed=seed, horizon=chunk.horizon, scoring=None, recorded=True
        )
        if isinstance(self.own.update.update, OnlineUpdate):
            raise TraceError("a rate that adapts itself is in no code")
        if self.own.draws is None and network.traits.draws:
            raise TraceError("what it draws depends on more than the key of the step")
        self.tables: list[tuple[_Path, Tensor]] = []
        self._match(self.own.update, ("update",))
        self._match(self.own.update.update, ("update", "update"))
        self._match(self.own.update.update.clock, ("update", "update", "clock"))
        self.own.dropout = self._shared(chunk.dropout, ("dropout",))
        self.memories: dict[int, torch.UntypedStorage] = {}

    def write(self, code: MemberCode) -> None:
        """Write the steps of an epoch as code."""
        own, shapes = self.own, self.own.batches.shapes
        own.batches.begin(0)
        own.update.begin(0)
        steps: dict[StepShape, Step] = {}
        for i, shape in enumerate(shapes):
            if shape not in steps:
                own.batches.step.fill_(i)
                steps[shape] = code.add(trace(partial(own._step, shape, (0, i))), self.memories)
        self.steps = [steps[shape] for shape in shapes]
        self.outputs = self._outputs(code)
        buffers = [] if self.draws is None else list(tensors(self.draws.buffers))
        held = [*own.batches.inputs, own.batches.target, *buffers]
        self.common = {tensor.untyped_storage().data_ptr() for tensor in held}

    def _outputs(self, code: MemberCode) -> Step | None:
        """Write what the member makes of its validation rows as code; None where that is not what is scored."""
        own, validation = self.own, self.chunk.validation
        if validation.scoring is None or self.chunk.scored is not self.chunk.flat:
            return None
        if not validation.is_small(own.network):
            return None
        data = own.validation.data
        self.rows = [x.clone() for x in data.rows(0, data.folds[0].valid)]
        self.result = own.network.outputs(own.params, 0, self.rows).clone()

        def compute() -> None:
            self.result.copy_(own.network.outputs(own.params, 0, self.rows))

        with suppress(TraceError):
            return code.add(trace(compute), self.memories)
        return None

    @property
    def draws(self) -> ModuleDraws | None:
        """The draws of the steps ahead, where it draws any."""
        draws = self.own.draws
        return draws if isinstance(draws, ModuleDraws) and any(draws.draws.values()) else None

    def _match(self, mine: object, path: "_Path") -> None:
        """Let a part of the optimizer be like the chunk's: with a table wherever members may differ there."""
        for name, value in vars(_at(self.chunk, path)).items():
            if (isinstance(value, Tensor) and value.dim() == 2) or isinstance(value, dict):
                setattr(mine, name, self._shared(value, (*path, name)))
            elif isinstance(value, Tensor) and getattr(mine, name) is None:
                setattr(mine, name, torch.zeros_like(self.own.grad))
            elif isinstance(value, int | float):
                setattr(mine, name, value)

    def _shared(self, value: Any, path: "_Path") -> Any:
        if isinstance(value, dict):
            return {key: self._shared(part, (*path, key)) for key, part in value.items()}
        self.tables.append((path, own := _part(value, 0, 0).clone()))
        return own

    def of_fold(self, fold: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what a fold has, and the tensors in which its members find it."""
        mine, theirs, part = self.own, self.chunk, slice(fold, fold + 1)
        yield theirs.batches.order[:, part, : mine.batches.order.shape[-1]], mine.batches.order
        yield theirs.batches.start[:, part], mine.batches.start
        for name in ("taken", "counted", "active_until"):
            yield getattr(theirs.batches, name)[part, :1], getattr(mine.batches, name)
        if self.outputs is not None:
            data = theirs.validation.data
            yield from zip(data.rows(fold, data.folds[fold].valid), self.rows)
        shapes = theirs.network.shape, mine.network.shape
        pairs = [(theirs.batches.weights, mine.batches.weights), (shapes[0].present, shapes[1].present)]
        for of_all, own in zip(theirs.validation.data.scaling, mine.batches.data.scaling):
            if of_all is not None and own is not None:
                pairs += [(of_all.center, own.center), (of_all.scale, own.scale)]
        yield from ((of_all[part], own) for of_all, own in pairs if of_all is not None and own is not None)


def _at(value: Any, path: _Path) -> Any:
    """Return what lies at a path; None where it is there no more, as no member differs in it from the rule."""
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
        scaling=tuple(s and replace(s, center=own(s.center), scale=own(s.scale)) for s in data.scaling),
    )


def _module(network: Network) -> StackedModule:
    assert isinstance(network, StackedModule)
    return network


def _network_of(chunk: StackedChunk, fold: int, seed: int) -> StackedModule:
    """Return the network of one member of a fold."""
    network = _module(chunk.network)
    present = network.shape.present
    present = None if present is None else present[fold : fold + 1].clone()
    return StackedModule(
        network.builder,
        [max(network.configs, key=lambda config: float(config["dropout"]))],  # one that drops, where any does
        replace(network.shape, folds=1, rows=None, present=present),
        seed=seed,
        traits=network.traits,
        objective=network.objective,
    )


_POINTER = ctypes.sizeof(ctypes.c_void_p)


def _pointers(addresses: Sequence[int]) -> "ctypes.Array[ctypes.c_void_p]":
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Space:
    """The memory in which a thread takes the steps of a member."""

    def __init__(self, one: OneMember) -> None:
        self.one, self.fold = one, -1
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
        self.losses = {name: self._here(value) for name, value in _module(own.network).loss_values.items()}
        self.step, self.done = self._here(own.batches.step), self._here(own.update.update.clock.done)

    def _here(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor of the chunk of one member in this memory; None where no step reads it."""
        storage = self.copies.get(tensor.untyped_storage().data_ptr())
        if storage is None:
            return None
        return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

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
        values = _module(chunk.network).loss_values.items()
        self._fill((value[trial : trial + 1], self.losses[name]) for name, value in values)
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
        """Take some steps of the epoch; after these, with ``outputs``, what follows them in the code."""
        end = min(end, len(self.one.steps)) + outputs
        if begin < end:
            calls, numbers = (ctypes.byref(table, begin * _POINTER) for table in (self.calls, self.numbers))
            kernels.take_steps(ctypes.c_int64(end - begin), calls, kernels.addresses, self.memories, numbers)

    def outputs(self, kernels: Kernels) -> Tensor:
        """Return the outputs (m, K) on the validation rows, which are in the code."""
        steps = len(self.one.steps)
        self.take(kernels, steps, steps, outputs=True)
        result = self._here(self.one.result)
        assert result is not None
        return result[0]

    def store(self, rows: Sequence[Tensor]) -> None:
        """Give the rows of the member back."""
        self._fill((state, row) for state, row in zip(self.states, rows) if state is not None)
