"""Train a user's module in compiled C code on a CPU, one member (one trial on one fold) after
another.

A chunk holds trials of one tensor shape that train together. gputune traces the training step in a
chunk of a single member and writes the trace as C (``modules/member_code.py``). From step to step,
the parameters, moments and activations of one member stay in a core's cache. The tensors of all
members together would not fit there. Each thread has its own memory, into which it loads a member
before the steps. Values that differ between members are in tables. A member's own values are copied
from the tables before its steps.
"""

import ctypes
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gputune.engine.backend import torch_threads
from gputune.engine.member_tables import TablePath, data_of_fold, member_part, paths_in, value_at
from gputune.engine.stacked import StackedChunk
from gputune.modules.calls import ModuleDraws
from gputune.modules.member_code import CodedStep, MemberCode
from gputune.modules.module import StackedModule
from gputune.modules.trace import Place, Storages, TraceError, tensors, trace
from gputune.native.library import Kernels, build_kernels, build_seconds
from gputune.optimizers.update import OnlineUpdate
from gputune.population.batches import StepShape
from gputune.scoring.scoring import Validation
from gputune.types import Config

# steps that are timed to measure the speed
_TIMED_STEPS = 8
# Numbers of one layer's outputs on validation rows that the code computes at a time, so that they
# stay in the cache, and the fewest rows.
_CACHED_NUMBERS = 1 << 18
_FEWEST_ROWS = 32
# bytes of a pointer
_POINTER = ctypes.sizeof(ctypes.c_void_p)


class OneMember:
    """A single member (one trial on one fold) in which gputune traces the training step for all
    members of a fold.

    The object also has the compiled code of the steps, which reads and writes this member's
    tensors, or a thread's copies of them.
    """

    def __init__(self, chunk: "MemberChunk", fold: int, seed: int) -> None:
        network = chunk.module
        data = data_of_fold(chunk.data, fold)
        self.network = StackedModule(
            network.builder,
            # a configuration with dropout, if any has it: the code of all members then drops units
            [max(network.configs, key=lambda config: float(config["dropout"]))],
            replace(network.shape, folds=1, rows=None, present=data.present),
            seed=seed,
            traits=network.traits,
            objective=network.objective,
        )
        # The code reads a loss parameter that some trial sets, even if this configuration does not.
        self.network.loss_values = {
            name: values[:1].clone() for name, values in network.loss_values.items()
        }
        self.chunk = chunk
        self.tables = list[tuple[TablePath, Tensor]]()
        self.single = StackedChunk(
            self.network, Validation(data, None), seed=seed, horizon=chunk.horizon, recorded=True
        )
        draws = self.single.draws  # of the steps ahead, if the module draws numbers
        if isinstance(self.single.update, OnlineUpdate):
            raise TraceError("compiled code does not support a learning rate that adapts itself")
        if draws is None and network.objective.augment is not None:
            raise TraceError(f"augment cannot be recorded ({self.single.not_ahead})")
        if draws is None and network.traits.draws:
            raise TraceError(
                "its random numbers depend on more than the seed, the epoch and the step"
            )
        self.draws = draws if isinstance(draws, ModuleDraws) and any(draws.draws.values()) else None
        self._match(self.single.update, ("update",))
        self._match(self.single.update.clock, ("update", "clock"))
        self.single.dropout = self._add_table(chunk.dropout, ("dropout",))
        self.memories: Storages = {}

    def write(self, code: MemberCode) -> None:
        """Trace the training steps of an epoch, and add the steps to ``code`` as C code."""
        single = self.single
        shapes = single.batches.shapes
        single.batches.begin(0)
        single.update.begin(0)
        steps: dict[StepShape, CodedStep] = {}
        for i, shape in enumerate(shapes):
            if shape not in steps:
                # Tracing takes the step, and its draws may be used as indices, so they must be
                # valid.
                if self.draws is not None:
                    self.draws.fill(0, i - i % self.draws.ahead)
                single.batches.step.fill_(i)
                traced = trace(partial(single._step, shape, (0, i)))
                steps[shape] = code.add(traced, self.memories)
        self.steps = [steps[shape] for shape in shapes]
        self.outputs = self._outputs(code)
        shared = [*single.batches.inputs, single.batches.target]
        if self.draws is not None:
            shared += tensors(self.draws.buffers)
        # Addresses of memory that the threads share: a ``MemberMemory`` does not copy it.
        self.shared = {tensor.untyped_storage().data_ptr() for tensor in shared}

    def _outputs(self, code: MemberCode) -> CodedStep | None:
        """Trace the computation of the outputs on a block of validation rows, and add the trace to
        ``code``.

        Returns None if the scores are not computed from these outputs, or if the outputs cannot be
        traced.
        """
        network = self.network
        params = self.single.params
        data = self.single.validation.data
        has_scoring = self.chunk.validation.scoring is not None
        scores_params = has_scoring and self.chunk.scored is self.chunk.flat
        if network.evaluation_draws or not scores_params:
            return None
        valid = data.folds[0].valid
        self.block_rows = len(valid)
        if network.alone:
            widest = max(data.row_numbers, network.widest)
            self.block_rows = min(len(valid), max(_FEWEST_ROWS, _CACHED_NUMBERS // widest))
        self.valid_rows = [x.clone() for x in data.rows(0, valid[: self.block_rows])]
        # (1, block_rows, K): outputs of one member
        self.result = network.outputs(params, 0, self.valid_rows).clone()

        def compute() -> None:
            self.result.copy_(network.outputs(params, 0, self.valid_rows))

        with suppress(TraceError):
            return code.add(trace(compute), self.memories)
        return None

    def _match(self, target: object, path: TablePath) -> None:
        """Copy the settings of the optimizer of all members to ``target``, the optimizer of one
        member. A value that differs between members becomes a table, from which
        ``MemberMemory.load`` reads one member's value."""
        for name, value in vars(value_at(self.chunk, path)).items():
            if (isinstance(value, Tensor) and value.dim() == 2) or isinstance(value, dict):
                setattr(target, name, self._add_table(value, (*path, name)))
            elif isinstance(value, Tensor) and getattr(target, name) is None:
                setattr(target, name, torch.zeros_like(self.single.grad))
            elif isinstance(value, int | float):
                setattr(target, name, value)

    def _add_table(self, value: Any, path: TablePath) -> Any:
        """Return a copy of the first member's entry of a table. ``MemberMemory.load`` fills the
        copy for each member."""
        if isinstance(value, dict):
            return {key: self._add_table(part, (*path, key)) for key, part in value.items()}
        copy = member_part(value, 0, 0).clone()
        self.tables.append((path, copy))
        return copy

    def fits(self) -> bool:
        """Return whether the compiled code fits the present configurations of the chunk: it reads
        the values that differ between members from tables, and its constants are still right."""
        chunk = self.chunk
        drops = any(config["dropout"] for config in chunk.configs)
        if drops != bool(self.network.configs[0]["dropout"]):
            return False
        if chunk.module.loss_values.keys() != self.network.loss_values.keys():
            return False
        tables: set[TablePath] = {("dropout",)}
        owners: dict[TablePath, object] = {("update",): self.single.update}
        owners["update", "clock"] = self.single.update.clock
        for path, single in owners.items():
            for name, value in vars(value_at(chunk, path)).items():
                if isinstance(value, dict):
                    tables.update(paths_in(value, (*path, name)))
                elif isinstance(value, Tensor) and value.dim() == 2:
                    tables.add((*path, name))
                elif isinstance(value, int | float) and getattr(single, name) != value:
                    return False
        return tables == {path for path, _ in self.tables}

    def tensors_of_fold(self, fold: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs (source, target) of tensors to copy when a thread begins members of a
        fold. The targets are the tensors of the traced member."""
        data = self.chunk.data
        batches = self.chunk.batches
        single = self.single.batches
        part = slice(fold, fold + 1)
        yield batches.order[:, part, : single.order.shape[-1]], single.order
        yield batches.start[:, part], single.start
        for name in ("taken", "counted", "active_until"):
            yield getattr(batches, name)[part, :1], getattr(single, name)
        pairs = [
            (batches.weights, single.weights),
            (self.chunk.network.shape.present, self.network.shape.present),
        ]
        for scaling, single_scaling in zip(data.scaling, single.data.scaling):
            if scaling is not None and single_scaling is not None:
                pairs.append((scaling.center, single_scaling.center))
                pairs.append((scaling.scale, single_scaling.scale))
        for tensor, single_tensor in pairs:
            if tensor is not None and single_tensor is not None:
                yield tensor[part], single_tensor


def _pointers(addresses: Sequence[int]) -> "ctypes.Array[ctypes.c_void_p]":
    """Return memory addresses as a C array of pointers, to pass them to compiled code."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


class MemberMemory:
    """The tensors in which one thread trains a member: the thread loads the member, then takes the
    steps."""

    def __init__(self, member: OneMember) -> None:
        self.member = member
        self.fold = -1
        self.storages: Storages = {}
        for address, storage in member.memories.items():
            if address not in member.shared:
                storage = storage.clone()  # type: ignore[no-untyped-call]
            self.storages[address] = storage
        steps = member.steps if member.outputs is None else [*member.steps, member.outputs]
        self.scratch = torch.empty(max(step.workspace for step in steps) + 64, dtype=torch.uint8)
        # Scratch memory begins at a multiple of 64 bytes.
        addresses = [-(-self.scratch.data_ptr() // 64) * 64]
        addresses += [storage.data_ptr() for storage in self.storages.values()]
        self.memories = _pointers(addresses)
        self.calls = _pointers([step.calls.ctypes.data for step in steps])
        self.numbers = _pointers([step.numbers.ctypes.data for step in steps])
        single = member.single
        self.states = list(map(self._copy_of, [single._flat, *single.update.state()]))
        self.tables = [(path, self._copy_of(table)) for path, table in member.tables]
        losses = member.network.loss_values
        self.losses = {name: self._copy_of(value) for name, value in losses.items()}
        self.step = self._copy_of(single.batches.step)
        self.done = self._copy_of(single.update.clock.done)
        if member.outputs is not None:
            self.valid_rows = list(map(self._copy_of, member.valid_rows))
            self.result = self._copy_of(member.result)

    def _copy_of(self, tensor: Tensor) -> Tensor | None:
        """Return this thread's copy of a tensor of the traced member, or None if no step reads the
        tensor."""
        storage = self.storages.get(tensor.untyped_storage().data_ptr())
        return None if storage is None else Place.of(tensor).on(storage)

    def load(self, fold: int, trial: int, rows: Sequence[Tensor], step: int) -> None:
        """Copy a member's parameters and optimizer state from ``rows`` into this thread's tensors,
        before step ``step`` of the epoch."""
        chunk = self.member.chunk
        if fold != self.fold:
            for tensor, single in self.member.tensors_of_fold(fold):
                self._fill(self._copy_of(single), tensor)
            self.fold = fold
        for state, row in zip(self.states, rows):
            self._fill(state, row)
        for path, table in self.tables:
            if table is not None:
                value = value_at(chunk, path)
                if value is None:
                    # The rule's default: learning-rate factors are 1, other values 0.
                    value = float("lr_factors" in path)
                if isinstance(value, Tensor):
                    table.copy_(member_part(value, fold, trial))
                else:  # no table any more: the same for all members
                    table.fill_(value)
        for name, loss_value in self.losses.items():
            values = chunk.module.loss_values.get(name)
            if values is not None:
                self._fill(loss_value, values[trial : trial + 1])
            elif loss_value is not None:  # it is 0 for all members that are left
                loss_value.zero_()
        if self.step is not None:
            self.step.fill_(step)
        if self.done is not None:
            self.done.add_(step)

    @staticmethod
    def _fill(tensor: Tensor | None, value: Tensor) -> None:
        if tensor is not None:
            tensor.copy_(value)

    def take_steps(self, kernels: Kernels, begin: int, end: int, *, outputs: bool = False) -> None:
        """Train the loaded member from step ``begin`` to step ``end`` of the epoch.

        If ``outputs`` is True, also compute the outputs on the validation rows after the last step.
        """
        end = min(end, len(self.member.steps)) + outputs
        if begin < end:
            kernels.take_steps(
                ctypes.c_int64(end - begin),
                ctypes.byref(self.calls, begin * _POINTER),
                kernels.addresses,
                self.memories,
                ctypes.byref(self.numbers, begin * _POINTER),
            )

    def write_outputs(self, kernels: Kernels, outputs: Tensor) -> None:
        """Compute the loaded member's K outputs on the m validation rows in compiled code, block by
        block, into ``outputs`` (m, K)."""
        member = self.member
        steps = len(member.steps)
        assert self.result is not None
        begin = 0
        for block in member.chunk.validation.blocks(self.fold, member.block_rows):
            rows = len(block[0])
            for target, source in zip(self.valid_rows, block):
                if target is not None:
                    # The last block may have fewer rows. The other rows then are old ones.
                    target[:rows].copy_(source)
            self.take_steps(kernels, steps, steps, outputs=True)
            outputs[begin : begin + rows].copy_(self.result[0, :rows])
            begin += rows


class MemberChunk(StackedChunk):
    """Trials of a user's module that train one after another in compiled code on a CPU.

    In each epoch, threads take the members from a queue. The parameters of all members are in flat
    buffers, as in every ``StackedChunk``. Raises TraceError if the module cannot be traced.

    ``check_build`` receives an estimate of the seconds of the build before the code is built. It
    may raise an exception to prevent the build.
    """

    def __init__(
        self,
        network: StackedModule,
        validation: Validation,
        *,
        seed: int,
        horizon: int,
        check_build: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(network, validation, seed=seed, horizon=horizon)
        self.seed = seed
        self.data = validation.data
        self._write_code(check_build)

    def _write_code(self, check_build: Callable[[float], None] | None = None) -> None:
        """Trace the training steps of a single member, and compile them."""
        data = self.data
        seed = self.seed
        code = MemberCode(data.dtype)
        # A step of one member is thousands of small operations, which more threads only delay.
        with torch_threads(1):
            # Folds of equal lengths share their code.
            members: dict[tuple[int, int], OneMember] = {}
            self.members = []  # of each fold
            for number, fold in enumerate(data.folds):
                lengths = (len(fold.train), len(fold.valid))
                if lengths not in members:
                    members[lengths] = OneMember(self, number, seed)
                self.members.append(members[lengths])
            self.member_draws = [
                member.draws for member in members.values() if member.draws is not None
            ]
            self.ahead = len(self.batches.shapes)
            for draws in self.member_draws:
                self.ahead = min(self.ahead, draws.ahead)
            for draws in self.member_draws:
                draws.ahead = self.ahead
            for member in members.values():
                member.write(code)
            bodies = list(code.kernels)
            if check_build is not None:
                check_build(build_seconds(bodies, data.dtype))
            self.kernels = build_kernels(bodies, data.dtype)
        # outputs (C, m, K) of each fold; None if the code does not compute them
        self.outputs: list[Tensor | None] = []
        # memory of each thread, kept because asking the system for pages takes long
        self.memories: list[dict[OneMember, MemberMemory]] = []

    @property
    def module(self) -> StackedModule:
        """The user's module, stacked for all trials that still train."""
        assert isinstance(self.network, StackedModule)
        return self.network

    def select(self, slots: Sequence[int], configs: Sequence[Config | None] | None = None) -> None:
        """Replace the trials, as in every ``StackedChunk``. The steps are traced again if new
        configurations change a constant of the compiled code."""
        super().select(slots, configs)
        if configs is not None and not all(member.fits() for member in self.members):
            self._write_code()

    def advance(self, epoch: int) -> None:
        """Train all members for one epoch in compiled code."""
        self._begin(epoch)
        # Only some megabytes: threads take longer to meet than to copy them.
        # Each tensor is (C, F, N).
        with torch_threads(1):
            rows = [block.to_rows(buffer) for block, buffer in self._buffers()]
        last = len(self.batches.shapes)
        self.outputs = []
        for member, fold in zip(self.members, self.data.folds):
            outputs = None
            if member.outputs is not None:
                shape = (len(self.configs), len(fold.valid), *member.result.shape[2:])
                outputs = member.result.new_empty(shape)
            self.outputs.append(outputs)
        # The draws of ``ahead`` steps are in the buffer at once, so all members take these steps
        # first.
        for begin in range(0, last, self.ahead):
            for draws in self.member_draws:
                draws.fill(epoch, begin)
            self._take_steps(rows, begin, min(begin + self.ahead, last))
        with torch_threads(1):
            for (block, buffer), values in zip(self._buffers(), rows):
                block.put_rows(buffer, values)

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

    def seconds_of_a_step(self) -> float:
        """Measure the CPU seconds of one training step of the first member, without a change of the
        member's state."""
        self.batches.begin(0)
        self.update.begin(0)
        member = self.members[0]
        if member.draws is not None:
            member.draws.fill(0, 0)
        memory = MemberMemory(member)
        end = min(_TIMED_STEPS, self.ahead)
        memory.load(0, 0, [block.to_rows(buffer)[0, 0] for block, buffer in self._buffers()], 0)
        times = []
        for _ in range(3):
            begin = time.thread_time()  # CPU time of this thread, whatever else the machine does
            memory.take_steps(self.kernels, 0, end)
            times.append(time.thread_time() - begin)
        return min(times) / min(end, len(member.steps))

    def _take_steps(self, rows: Sequence[Tensor], begin: int, end: int) -> None:
        """Train all members from step ``begin`` to step ``end`` in worker threads, which take
        members from one queue. The number of threads is torch's setting."""
        queue = deque(itertools.product(range(self.data.n_folds), range(len(self.configs))))
        stop = threading.Event()

        def work(memories: dict[OneMember, MemberMemory]) -> None:
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
                    member = self.members[fold]
                    outputs = self.outputs[fold]
                    member_rows = [buffer[trial, fold] for buffer in rows]
                    if member not in memories:
                        memories[member] = MemberMemory(member)
                    memory = memories[member]
                    memory.load(fold, trial, member_rows, begin)
                    memory.take_steps(self.kernels, begin, end)
                    for row, state in zip(member_rows, memory.states):
                        if state is not None:
                            row.copy_(state)
                    if end == len(self.batches.shapes) and outputs is not None:
                        memory.write_outputs(self.kernels, outputs[trial])

        threads = torch.get_num_threads()
        self.memories += [{} for _ in range(threads - len(self.memories))]
        with ThreadPoolExecutor(threads) as pool:
            try:
                # list() raises the error of a thread, if one failed.
                list(pool.map(work, self.memories[:threads]))
            finally:
                stop.set()
