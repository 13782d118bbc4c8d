"""The compiled training steps of a single member (one trial on one fold) of a user's module.

A chunk holds trials of one tensor shape that train together. gputune traces the training step in a
chunk of a single member and writes the trace as C (``modules/member_code.py``). Each thread has its
own memory, into which it loads a member before the steps. Values that differ between members are in
tables. A member's own values are copied from the tables before its steps.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.stacked import StackedChunk
from gputune.modules.calls import ModuleDraws
from gputune.modules.member_code import CodedStep, MemberCode
from gputune.modules.module import StackedModule
from gputune.modules.trace import Place, Storages, TraceError, tensors
from gputune.native.library import Kernels, build_kernels, build_seconds
from gputune.optimizers.update import OnlineUpdate
from gputune.population.batches import StepShape
from gputune.scoring.validation import Validation

TablePath = tuple[Any, ...]
"""The path from a chunk (trials that train together) to one of its values, as attribute names and
dict keys."""


def value_at(value: Any, path: TablePath) -> Any:
    """Follow attribute names and dict keys (``path``) from a value, and return the value at the
    end.

    The result is None if the value no longer exists, because all remaining members use the
    optimizer's default.
    """
    for name in path:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
        if value is None:
            return None
    return value


def paths_in(values: dict[Any, Any], path: TablePath) -> Iterator[TablePath]:
    """Yield the path of each tensor in nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from paths_in(value, (*path, name))
        else:
            yield (*path, name)


def member_part(table: Tensor, fold: int, trial: int) -> Tensor:
    """Return the entry of a table (F folds, C trials) for one member, or of a table (C,) for one
    trial."""
    trials = slice(trial, trial + 1)
    return table[trials] if table.dim() == 1 else table[fold : fold + 1, trials]


def data_of_fold(data: Dataset, fold: int) -> Dataset:
    """Return the part of a dataset for one fold. All of its tensors are copies, except the inputs
    and the target."""
    part = slice(fold, fold + 1)
    scaling = []
    for of_input in data.scaling:
        if of_input is not None:
            center = of_input.center[part].clone()
            of_input = replace(of_input, center=center, scale=of_input.scale[part].clone())
        scaling.append(of_input)
    return replace(
        data,
        folds=data.folds[part],
        copies=data.copies[part],
        weights=None if data.weights is None else data.weights[part].clone(),
        present=None if data.present is None else data.present[part].clone(),
        center=data.center[part].clone(),
        scale=data.scale[part].clone(),
        transforms=data.transforms[part],
        scaling=tuple(scaling),
        replicas=1,
    )


# Numbers of one layer's outputs on validation rows that the code computes at a time, so that they
# stay in the cache, and the fewest rows.
_CACHED_NUMBERS = 1 << 18
_FEWEST_ROWS = 32
# Bytes of random numbers that compiled steps keep between two trainings. Allocating more memory than
# this takes little time next to a training.
_KEPT_DRAWS = 4 << 20
# bytes of a pointer
_POINTER = ctypes.sizeof(ctypes.c_void_p)


class OneMember:
    """A single member (one trial on one fold) in which gputune traces the training step for all
    members of a fold, and of other folds of about equal length.

    The object also has the compiled code of the steps, which reads and writes this member's
    tensors, or a thread's copies of them. ``steps`` has the steps of an epoch for each number of
    training rows.
    """

    def __init__(self, chunk: StackedChunk, fold: int, seed: int) -> None:
        network = module_of(chunk)
        data = data_of_fold(chunk.validation.data, fold)
        self.network = StackedModule(
            network.builder,
            # a configuration with dropout, if any has it: the code of all members then drops units
            [max(network.configs, key=lambda config: float(config["dropout"]))],
            network.shape.of_one_fold(data.present),
            seed=seed,
            traits=network.traits,
            objective=network.objective,
        )
        # The code reads a loss parameter that some trial sets, even if this configuration does not.
        self.network.loss_values = {
            name: values[:1].clone() for name, values in network.loss_values.items()
        }
        self.tables = list[tuple[TablePath, Tensor]]()
        # No new initial weights, because each member's parameters are loaded before its steps.
        weights = chunk.network.blocks.to_rows(chunk.flat, [0])[:, fold : fold + 1]
        self.single = StackedChunk(
            self.network,
            Validation(data, None),
            seed=seed,
            horizon=chunk.horizon,
            recorded=True,
            start=self.network.blocks.from_rows(weights),
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
        self._match(self.single.update, chunk, ("update",))
        self._match(self.single.update.clock, chunk, ("update", "clock"))
        self.single.dropout = self._add_table(chunk.dropout, ("dropout",))
        # whether gputune scores the parameters themselves
        self.scores_params = _scores_params(chunk)
        self.memories: Storages = {}
        # the shapes of the steps of an epoch, by the number of training rows
        self.shapes = {len(data.folds[0].train): self.single.batches.shapes}
        self.most_valid = len(data.folds[0].valid)

    def add_fold(self, chunk: StackedChunk, fold: int) -> bool:
        """Train also the members of a fold with fewer training rows, or return False if they need
        a member of their own."""
        data = chunk.validation.data
        lengths = _lengths(data, fold)
        if self.draws is not None or not self.network.alone or lengths[0] > max(self.shapes):
            return False
        if lengths[0] not in self.shapes:
            shapes = self.single.shapes_of(data_of_fold(data, fold))
            self.shapes[lengths[0]] = shapes
            if isinstance(self.single.draws, ModuleDraws):
                for shape in shapes:
                    for part in shape.parts:
                        self.single.draws.add_rows(part.rows)
        self.most_valid = max(self.most_valid, lengths[1])
        return True

    def write(self, code: MemberCode, all_draws: Sequence[ModuleDraws]) -> None:
        """Trace the training steps of an epoch, and add the steps to ``code`` as C code.

        ``all_draws`` make the random numbers of the members of all folds, which may share memory.
        """
        single = self.single
        single.batches.begin(0)
        single.update.begin(0)
        steps: dict[StepShape, CodedStep] = {}
        for shapes in self.shapes.values():
            for i, shape in enumerate(shapes):
                if shape not in steps:
                    # Tracing takes the step, and its draws may be used as indices, so they must be
                    # valid.
                    for draws in all_draws:
                        draws.fill(0, i - i % draws.ahead)
                    single.batches.step.fill_(i)
                    step = partial(single._step, shape, (0, i))
                    steps[shape] = code.add(step, self.memories)
        self.steps = {rows: [steps[shape] for shape in of] for rows, of in self.shapes.items()}
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
        if network.evaluation_draws or not self.scores_params:
            return None
        valid = data.folds[0].valid
        self.block_rows = self.most_valid
        if network.alone:
            widest = max(data.row_numbers, network.widest)
            self.block_rows = min(self.most_valid, max(_FEWEST_ROWS, _CACHED_NUMBERS // widest))
        places = torch.arange(self.block_rows, device=valid.device) % len(valid)
        self.valid_rows = [x.clone() for x in data.rows(0, valid[places])]
        # (1, block_rows, K): outputs of one member
        self.result = network.outputs(params, 0, self.valid_rows).clone()

        def compute() -> None:
            self.result.copy_(network.outputs(params, 0, self.valid_rows))

        with suppress(TraceError):
            return code.add(compute, self.memories)
        return None

    def _match(self, target: object, chunk: StackedChunk, path: TablePath) -> None:
        """Copy the settings of the optimizer of all members to ``target``, the optimizer of one
        member. A value that differs between members becomes a table, from which
        ``MemberMemory.load`` reads one member's value."""
        for name, value in vars(value_at(chunk, path)).items():
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

    def fits(self, chunk: StackedChunk) -> bool:
        """Return whether the compiled code fits the present configurations of a chunk: it reads the
        values that differ between members from tables, and its constants are right."""
        drops = any(config["dropout"] for config in chunk.configs)
        if drops != bool(self.network.configs[0]["dropout"]):
            return False
        if module_of(chunk).loss_values.keys() != self.network.loss_values.keys():
            return False
        if _scores_params(chunk) != self.scores_params:
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
                elif isinstance(value, Tensor) != isinstance(getattr(single, name), Tensor):
                    return False  # one of them has a buffer that the other does not have
        return tables == {path for path, _ in self.tables}

    def tensors_of_fold(self, chunk: StackedChunk, fold: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs (source, target) of tensors to copy when a thread begins members of a
        fold of a chunk. The targets are the tensors of the traced member."""
        data = chunk.validation.data
        batches = chunk.batches
        single = self.single.batches
        part = slice(fold, fold + 1)
        yield batches.order[:, part, : single.order.shape[-1]], single.order
        yield batches.start[:, part], single.start
        for name in ("taken", "counted", "active_until"):
            yield getattr(batches, name)[part, :1], getattr(single, name)
        pairs = [
            (batches.weights, single.weights),
            (chunk.network.shape.present, self.network.shape.present),
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
        self.rows = 0  # training rows of the fold
        self.storages: Storages = {}
        for address, storage in member.memories.items():
            if address not in member.shared:
                storage = storage.clone()  # type: ignore[no-untyped-call]
            self.storages[address] = storage
        outputs = [] if member.outputs is None else [member.outputs]
        self.steps = {rows: [*steps, *outputs] for rows, steps in member.steps.items()}
        workspace = max(step.workspace for steps in self.steps.values() for step in steps)
        self.scratch = torch.empty(workspace + 64, dtype=torch.uint8)
        # Scratch memory begins at a multiple of 64 bytes.
        addresses = [-(-self.scratch.data_ptr() // 64) * 64]
        addresses += [storage.data_ptr() for storage in self.storages.values()]
        self.memories = _pointers(addresses)
        self.calls = {}
        self.numbers = {}
        for rows, steps in self.steps.items():
            self.calls[rows] = _pointers([step.calls.ctypes.data for step in steps])
            self.numbers[rows] = _pointers([step.numbers.ctypes.data for step in steps])
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

    def load(
        self, chunk: StackedChunk, fold: int, trial: int, rows: Sequence[Tensor], step: int
    ) -> None:
        """Copy a member's values from a chunk into this thread's tensors, before step ``step`` of
        the epoch. ``rows`` are its parameters and optimizer state."""
        if fold != self.fold:
            for tensor, single in self.member.tensors_of_fold(chunk, fold):
                self._fill(self._copy_of(single), tensor)
            self.fold = fold
            self.rows, _ = _lengths(chunk.validation.data, fold)
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
            values = module_of(chunk).loss_values.get(name)
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
        end = min(end, self.n_steps) + outputs
        if begin < end:
            kernels.take_steps(
                ctypes.c_int64(end - begin),
                ctypes.byref(self.calls[self.rows], begin * _POINTER),
                kernels.addresses,
                self.memories,
                ctypes.byref(self.numbers[self.rows], begin * _POINTER),
            )

    @property
    def n_steps(self) -> int:
        """The number of steps of the loaded member in an epoch."""
        return len(self.member.steps[self.rows])

    def write_outputs(self, kernels: Kernels, validation: Validation, outputs: Tensor) -> None:
        """Compute the loaded member's K outputs on the m validation rows of its fold in compiled
        code, block by block, into ``outputs`` (m, K)."""
        member = self.member
        steps = self.n_steps
        assert self.result is not None
        begin = 0
        for block in validation.blocks(self.fold, member.block_rows):
            rows = len(block[0])
            for target, source in zip(self.valid_rows, block):
                if target is not None:
                    # The last block may have fewer rows. The other rows then are old ones.
                    target[:rows].copy_(source)
            self.take_steps(kernels, steps, steps, outputs=True)
            outputs[begin : begin + rows].copy_(self.result[0, :rows])
            begin += rows


class CompiledSteps:
    """The compiled training steps of all members of a chunk.

    ``members`` has a traced member for each fold. Folds of about equal length share a member.
    ``draws`` are the random numbers that the steps read, of ``ahead`` steps at once. Later chunks of
    the same trials' shape can use the same steps. ``n_releases`` counts the calls of ``release`` that
    freed memory: a ``MemberMemory`` from before a release has invalid addresses.

    Raises TraceError if the module cannot be traced. ``check_build`` receives an estimate of the
    seconds of the build before the code is built. It may raise an exception to prevent the build.
    """

    def __init__(
        self,
        chunk: StackedChunk,
        seed: int,
        check_build: Callable[[float], None] | None = None,
    ) -> None:
        self.seed = seed
        self.horizon = chunk.horizon
        self.validation = chunk.validation
        self.constants = chunk.network.constants
        self.shapes = chunk.batches.shapes
        self.n_releases = 0
        data = chunk.validation.data
        code = MemberCode(data.dtype)
        # A step of one member is thousands of small operations, which more threads only delay.
        with torch_threads(1):
            by_lengths: dict[tuple[int, int], OneMember] = {}
            # The longest fold comes first, because its member can have the steps of shorter folds.
            order = sorted(range(data.n_folds), key=lambda fold: -_lengths(data, fold)[0])
            for fold in order:
                lengths = _lengths(data, fold)
                if lengths in by_lengths:
                    continue
                for member in by_lengths.values():
                    if member.add_fold(chunk, fold):
                        by_lengths[lengths] = member
                        break
                else:
                    by_lengths[lengths] = OneMember(chunk, fold, seed)
            self.members = [by_lengths[_lengths(data, fold)] for fold in range(data.n_folds)]
            members = list(dict.fromkeys(self.members))
            self.draws = [member.draws for member in members if member.draws is not None]
            for draws in self.draws[1:]:
                draws.share(self.draws[0])
            self.ahead = min([len(self.shapes), *(draws.ahead for draws in self.draws)])
            for draws in self.draws:
                draws.ahead = self.ahead
            for member in members:
                member.write(code, self.draws)
            bodies = list(code.kernels)
            if check_build is not None:
                check_build(build_seconds(bodies, data.dtype))
            self.kernels = build_kernels(bodies, data.dtype)

    def allocate(self) -> None:
        """Allocate the memory of the random numbers, if ``release`` has freed it."""
        for buffer in self._draw_buffers():
            if buffer.untyped_storage().nbytes() < buffer.nbytes:
                buffer.untyped_storage().resize_(buffer.nbytes)

    def release(self) -> None:
        """Free the memory of the random numbers if it is large.

        A search keeps the compiled steps of several shapes. Together their random numbers would
        take more memory than the data.
        """
        buffers = self._draw_buffers()
        if sum(buffer.nbytes for buffer in buffers) > _KEPT_DRAWS:
            self.n_releases += 1
            for buffer in buffers:
                buffer.untyped_storage().resize_(0)

    def _draw_buffers(self) -> list[Tensor]:
        """Return the tensors with the random numbers of the steps ahead."""
        return tensors([draws.buffers for draws in self.draws])

    def fits(self, chunk: StackedChunk, seed: int) -> bool:
        """Return whether these steps train the members of a chunk of the same trials' shape."""
        validation = chunk.validation
        return (
            (self.seed, self.horizon) == (seed, chunk.horizon)
            and self.validation.data is validation.data
            and self.validation.scoring is validation.scoring
            and self.constants == chunk.network.constants
            and self.shapes == chunk.batches.shapes
            and all(member.fits(chunk) for member in self.members)
        )


def _lengths(data: Dataset, fold: int) -> tuple[int, int]:
    """Return the numbers of training rows and validation rows of a fold."""
    return len(data.folds[fold].train), len(data.folds[fold].valid)


def module_of(chunk: StackedChunk) -> StackedModule:
    """Return the user's module, stacked for all trials of a chunk that still train."""
    return cast(StackedModule, chunk.network)


def _scores_params(chunk: StackedChunk) -> bool:
    """Return whether gputune scores the parameters of a chunk themselves, not an average."""
    return chunk.validation.scoring is not None and chunk.scored is chunk.flat
