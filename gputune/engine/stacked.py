"""Train trials together on stacked tensors: all members take each training step in the same
operations.

A member is one trial on one fold. A chunk is a group of trials of one tensor shape. A stacked chunk
trains any model on any device. If steps are recorded, a removed trial stays in the tensors and
keeps training, but its results are ignored. When more than a quarter of the trials are removed, the
tensors are made again and the steps are recorded again. Within an epoch, Python waits for the
device only to record steps and to fill the buffer with random numbers for dropout.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.ground.device import is_out_of_memory
from gputune.ground.errors import warn, words_unless_strict
from gputune.ground.types import Config, StepKey
from gputune.ground.within_epoch import report_steps
from gputune.modules.recorder import RECORDERS, Direct, Replays, StepTaker
from gputune.modules.trace import TraceError
from gputune.optimizers.blocks import Blocks
from gputune.optimizers.update import optimizer_of
from gputune.population.batches import Batches, StepShape
from gputune.population.kinds import highest_dropout
from gputune.population.pieces import make_batches
from gputune.population.population import Network
from gputune.population.state import State, selected_configs
from gputune.scoring.validation import Validation

# Least share of the trials in recorded tensors that must be alive. It limits the number of
# recordings.
_FULL = 0.75

_TOLERANCES = {
    ("full", torch.float32): 1e-5,
    ("full", torch.float64): 1e-10,
    ("bf16", torch.float32): 1e-2,
}
"""The largest allowed relative difference between a replayed recording of a training step and the
step itself."""


class StackedChunk:
    """Trials that train together on stacked tensors. Parameters, gradients and optimizer moments
    are in flat buffers.

    ``configs`` are the configurations of all trials in the tensors. ``places`` are the positions of
    the trials whose results still count: pruned and diverged trials may stay in the tensors for
    some time. ``start`` are the initial values of the flat buffer, or None for the model's initial
    weights.
    """

    scoring_share = 0.0
    holds_only_state = False

    def __init__(
        self,
        network: Network,
        validation: Validation,
        *,
        seed: int,
        horizon: int,
        recorded: bool = False,
        start: Tensor | None = None,
    ) -> None:
        # A recorded step reads only the memory of its device, but rows in main memory come from
        # outside.
        data = validation.data
        configs = network.configs
        self._network = network
        self.recorded = recorded and not data.on_host
        self.horizon = horizon
        self._options: dict[str, Any] = {"seed": seed, "horizon": horizon, "recorded": recorded}
        self.validation = validation
        target = network.targets(data.y)
        self.configs = list(configs)
        self.epoch = 0  # epochs that the members have trained
        # (F, C): steps that each member would have taken more at its present batch size
        self._lag = np.zeros((data.n_folds, len(configs)), dtype=np.int64)
        self._target = target
        self.batches = self._make_batches(configs)
        # problems while steps were recorded: sentences, as an ordered set
        self.faults: dict[str, None] = {}
        self._flat = network.start() if start is None else start
        steps = self.batches.active_until
        self.update = optimizer_of(
            configs, network.trained, self._trained, steps=steps, horizon=horizon
        )
        self._rebuild()

    def shapes_of(self, data: Dataset) -> list[StepShape]:
        """Return the shapes of the steps of an epoch on other folds of the same rows."""
        return self._make_batches(self.configs, data).shapes

    def _make_batches(self, configs: Sequence[Config], data: Dataset | None = None) -> Batches:
        """Return the minibatches of trials with these configurations, on this chunk's data by
        default."""
        network = self._network
        return make_batches(
            self.validation.data if data is None else data,
            [config["batch_size"] for config in configs],
            self._target,
            seed=self._options["seed"],
            exact=network.exact,
            least_rows=network.least_rows,
        )

    def _rebuild(self) -> None:
        """Make all objects that refer to the buffers: views, gradients, tables, recorded steps and
        random numbers."""
        self.grad = torch.zeros_like(self._trained)
        self.params = self._network.blocks.views(self._flat)
        self.dropout = self.update.clock.per_trial(list(map(highest_dropout, self.configs)))
        self.grads = self._network.trained.views(self.grad)
        # The sum of the gradients of the pieces of a minibatch, if the batch sizes differ.
        self.total = torch.zeros_like(self.grad) if self.batches.is_pieced else None
        self.steps: StepTaker = Direct()
        if self.recorded:
            self.update.prepare()
            self.batches.prepare()
            recorder = RECORDERS[self._flat.device.type](self._flat.device)
            tolerance = _TOLERANCES[self._network.shape.precision, self._flat.dtype]
            self.steps = Replays(
                recorder, self._expected_steps(), self._state, tolerance, self._note_failure
            )
        # why the random numbers of a step cannot be made in advance, or ""
        self.not_ahead = ""
        try:
            self.draws = self._network.draws(self.batches, ahead=self.recorded)
        except TraceError as error:
            self.not_ahead = str(error)
            self.draws = None
            self.steps = Direct()
        except Exception as error:
            if not self.recorded or is_out_of_memory(error):
                raise
            self._note_failure(words_unless_strict(error))
            self.draws = None
            self.steps = Direct()
        self._set_places(list(range(len(self.configs))))

    def _set_places(self, places: list[int]) -> None:
        """Set the positions in the tensors of the trials that still train."""
        self.places = places
        self._places: Tensor | None = None  # the same on the device; None: all positions
        self.network = self._network  # the model of these trials
        if len(places) < len(self.configs):
            self._places = torch.tensor(places).to(self._flat.device)
            self.network = self._network.with_configs([self.configs[i] for i in places])

    def _note_failure(self, reason: str) -> None:
        """Warn that gputune cannot record the training steps, with the reason, and note it for the
        search."""
        fault = (
            "Training steps run without recording, which is slower, because recording a step "
            f"failed: {reason}."
        )
        if fault not in self.faults:
            self.faults[fault] = None
            warn(fault, RuntimeWarning)

    def _expected_steps(self) -> Counter[Hashable]:
        """Return the number of training steps of each step shape in ``horizon`` epochs, the length
        of a complete training run."""
        return Counter(
            {shape: n * self.horizon for shape, n in Counter(self.batches.shapes).items()}
        )

    def _state(self) -> list[Tensor]:
        """Return the tensors that a training step changes: parameters, optimizer state and
        counters."""
        tensors = [self._flat, *self.update.state(), self.update.clock.done, self.batches.step]
        return tensors if self.total is None else [*tensors, self.total]

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the parameters and buffers of all members, and of the order of the
        rows."""
        return self._flat.nbytes + self.batches.order.nbytes

    def release(self) -> None:
        """Free memory that the next training of these trials allocates again."""
        self.validation.release()

    def is_made_with(self, validation: Validation, **options: int) -> bool:
        """Return whether the constructor received these arguments. The network is not compared.

        The data and the scoring are compared by identity, because they hold arrays.
        """
        return (
            self.validation.data is validation.data
            and self.validation.scoring is validation.scoring
            and self._options == options
        )

    def holds(self, trials: int) -> bool:
        """Return whether ``trials`` trials fit into these tensors and use a large enough part of
        them. In small tensors, unused space costs little and is allowed."""
        slots = len(self.configs)
        return trials <= slots and (
            trials >= _FULL * slots or self._flat.numel() <= self.steps.spare
        )

    def become(self, new: "StackedChunk") -> bool:
        """Replace the trials by the trials of a new chunk, in the same memory and with the same
        recorded steps. Returns False, and changes nothing, if the recorded steps do not fit the new
        trials."""
        if not take_over(self._parts(), new._parts()):
            return False
        self.configs = new.configs
        self.epoch = new.epoch
        self._lag = new._lag
        self._set_places(list(range(len(self.configs))))
        if isinstance(self.steps, Replays):
            self.steps.expected = self._expected_steps()
        return True

    def _parts(self) -> list[object]:
        """Return the objects with tensors that the recorded steps read."""
        tables = [self.dropout, self._flat]
        return [self._network, self.batches, self.update, self.draws, *tables]

    @property
    def flat(self) -> Tensor:
        """Flat tensor with the parameters and buffers of all members that still train."""
        return self._of_alive(self._network.blocks, self._flat)

    @property
    def scored(self) -> Tensor:
        """Flat tensor with the weights that gputune scores and saves, for all members that still
        train.

        The tensor has the parameters, or their moving average, followed by the model's buffers.
        """
        return self._of_alive(self._network.blocks, self._scored)

    @property
    def _scored(self) -> Tensor:
        theta = self._trained
        weights = self.update.scored(theta)
        return self._flat if weights is theta else torch.cat([weights, self._flat[len(weights) :]])

    @property
    def _trained(self) -> Tensor:
        """Flat tensor with the parameters that have a gradient, for all members in the tensors."""
        return self._flat[: self._network.trained.size]

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """Flat tensors with the optimizer's moments, for all members that still train."""
        return tuple(self._of_alive(block, moment) for block, moment in self._buffers()[1:])

    def _buffers(self) -> list[tuple[Blocks, Tensor]]:
        """Return the flat tensors of all members that a training step changes, each with its
        layout."""
        moments = [(self._network.trained, buffer) for buffer in self.update.state()]
        return [(self._network.blocks, self._flat), *moments]

    def _of_alive(self, blocks: Blocks, buffer: Tensor) -> Tensor:
        """Return the entries of a flat tensor for only the members that still train."""
        return buffer if self._places is None else blocks.select(buffer, self._places)

    @property
    def steps_taken(self) -> np.ndarray:
        """Number of optimizer steps that each member has taken, (C, F)."""
        taken = self.epoch * self.batches.steps - self._lag
        return np.ascontiguousarray(taken[:, self.places].T)

    @property
    def state(self) -> State:
        """A copy of the training state, from which ``resume`` continues."""
        return State.of(self.network, self.flat, self.moments, self.epoch, self.steps_taken)

    def resume(self, state: State) -> None:
        """Continue from the state of the same trials."""
        buffers = state.flat_buffers(self.network)
        if self._places is not None:
            merged = []
            for (block, tensor), values in zip(self._buffers(), buffers, strict=True):
                block.put(tensor, self._places, values)
                merged.append(tensor)
            buffers = merged
        self._restore(buffers)
        self.epoch = state.epoch
        self._set_lag(state.lag(self.batches.steps[:, self.places]))

    def _restore(self, buffers: Sequence[Tensor]) -> None:
        """Copy the parameters and the optimizer's moments of all trials in the tensors from flat
        tensors, in this order."""
        self._flat.copy_(buffers[0])
        self.update.resume(buffers[1:])

    def _set_lag(self, lag: np.ndarray) -> None:
        """Set how many steps each member that trains would have taken more at its present batch
        size, (F, C)."""
        self._lag = np.zeros((len(lag), len(self.configs)), dtype=np.int64)
        self._lag[:, self.places] = lag
        self.update.clock.set_lag(self._lag)

    def advance(self, epoch: int) -> None:
        """Train all members for one epoch."""
        self._begin(epoch)
        for step, shape in enumerate(self.batches.shapes):
            if self.draws is not None:
                self.draws.fill(epoch, step)
            self.steps.take(shape, partial(self._step, shape, (epoch, step)))
            report_steps(step + 1, len(self.batches.shapes), len(self.places))

    def _begin(self, epoch: int) -> None:
        """Prepare the order of the rows and the learning rates for an epoch."""
        self.epoch = epoch + 1
        self.batches.begin(epoch)
        self.update.begin(epoch)

    def _step(self, shape: StepShape, key: StepKey) -> None:
        """Take one training step of all members. The step reads only tensors on the device, and
        adds one to the step counters there."""
        for name in self._network.scheduled:
            self.params[name].copy_(self.dropout * self.update.clock.factor("dropout_schedule"))
        if sum(part.end - part.begin for part in shape.parts) < len(self.batches.lengths):
            # Folds without rows in this step would otherwise keep the gradient of an earlier step.
            self.grad.zero_()
        for run, part in zip(shape.parts, self.batches.parts(shape, key)):
            if self.draws is not None:
                part = replace(part, draws=self.draws.at(self.batches.step, run.rows))
            self._network.gradient(self.params, part, self.grads)
        if self.total is not None:
            self._add_piece(self.total, shape)
        active = None if shape.all_active else self.batches.active()
        self.update.step(self._trained, self.grad, active)
        self.batches.step.add_(1)

    def _add_piece(self, total: Tensor, shape: StepShape) -> None:
        """Add the gradient of a piece to the gradients of the earlier pieces of each member's
        minibatch (``total``), and copy the sum to the gradient, which the optimizer overwrites."""
        if shape.all_begin:
            total.copy_(self.grad)
            return
        keeps = self.batches.continuing().to(total.dtype)
        for keep, part in self._network.trained.by_block(keeps, total):
            part.mul_(keep)
        total.add_(self.grad)
        self.grad.copy_(total)

    def scores(self) -> np.ndarray:
        """Return the scores (C trials, F folds) of all members. Each member is scored on the
        validation rows of its fold."""
        params = self._network.blocks.views(self._scored)
        scores = self.validation.scores(self._network, params, len(self.configs), epoch=self.epoch)
        if self._places is not None:
            outputs = [of_fold[self._places] for of_fold in self.validation.outputs]
            self.validation.outputs = outputs
        return scores[self.places]

    def select(self, slots: Sequence[int], configs: Sequence[Config | None] | None = None) -> None:
        """Replace the trials: the new trial i continues from the state of the trial ``slots[i]``,
        with a new configuration unless ``configs`` or its entry is None."""
        new_configs = selected_configs(self.network, slots, configs)
        places = [self.places[slot] for slot in slots]
        is_new = new_configs != [self.configs[place] for place in places]
        only_drops = not is_new and all(a < b for a, b in pairwise(places))
        if only_drops and places == self.places:
            return
        fits = self.steps.begun and self.holds(len(places))
        # Recorded steps still fit: the trials that leave stay in the tensors, unseen.
        if only_drops and fits:
            self._set_places(places)
            return
        taken = self.steps_taken[list(slots)].T  # (F, C)
        if only_drops or not (fits and self._refill(places, new_configs)):
            self._make_again(places, new_configs)
        self._set_lag(self.epoch * self.batches.steps[:, self.places] - taken)

    def _refill(self, places: Sequence[int], configs: Sequence[Config]) -> bool:
        """Put trials with the states at these positions into the same tensors, for which steps are
        recorded. Returns False, and changes nothing, if the recorded steps do not fit the
        configurations."""
        surplus = len(self.configs) - len(places)  # repeats of the last trial, dropped below
        all_places = [*places, *[places[-1]] * surplus]
        all_configs = [*configs, *[configs[-1]] * surplus]
        on_device = torch.tensor(all_places).to(self._flat.device)
        buffers = [block.select(tensor, on_device) for block, tensor in self._buffers()]
        network = self._network.with_configs(all_configs)
        epoch = self.epoch
        if not self.become(StackedChunk(network, self.validation, **self._options)):
            return False
        self._restore(buffers)
        self.epoch = epoch
        self._set_places(list(range(len(places))))
        return True

    def _make_again(self, places: list[int], configs: list[Config]) -> None:
        """Make tensors for trials with the states at these positions."""
        on_device = torch.tensor(places).to(self._flat.device)
        self.steps = Direct()  # recorded steps refer to the old tensors
        self._flat = self._network.blocks.select(self._flat, on_device)
        self._network = self._network.with_configs(configs)
        self.batches = self._make_batches(configs)
        self.configs = configs
        steps = self.batches.active_until
        self.update.select(
            self.configs, self._network.trained, on_device, self._trained, steps=steps
        )
        self._rebuild()


_OF_HOST = frozenset(
    """StackedMLP.configs StackedModule.configs Batches.sizes Batches.steps Batches.host_taken Batches.shapes
    Batches.epoch PiecedBatches.sizes PiecedBatches.steps PiecedBatches.borders PiecedBatches.shapes
    PiecedBatches.epoch MlpDraws.rows ModuleDraws.rows""".split()
)
"""Attributes that only Python code reads, between training steps. If a new chunk reuses an old
chunk, gputune copies their values to it."""

_STAYS = frozenset(
    """StackedModule.template StackedModule.stateless StackedModule.harmless_calls
    Batches.inputs Batches.target Batches.weights PiecedBatches.inputs
    PiecedBatches.target PiecedBatches.weights""".split()
)
"""Attributes that are always equal in chunks with the same arguments, so gputune does not compare
them.

They are the module (built from equal arguments), the known calls of the module, working memory, and
the data rows.
"""


class _Unlike(Exception):
    """Raised if the recorded training steps of one chunk (group of trials) do not fit another
    chunk."""


def take_over(target: Sequence[object], source: Sequence[object]) -> bool:
    """Copy the tensors of new trials (``source``) into the memory of old trials (``target``).

    Both have the objects that the recorded steps read, first the network. Returns False, and
    changes nothing, if the recorded steps of the old trials do not fit the new trials.
    """
    old = cast(Network, target[0])
    new = cast(Network, source[0])
    if old.constants != new.constants:
        return False
    try:
        pairs = list(_pairs(list(target), list(source)))
    except _Unlike:
        return False
    for place, value in pairs:
        if isinstance(place, Tensor):
            place.copy_(value)
        else:
            owner, name = place
            setattr(owner, name, value)
    return True


def _pairs(target: Any, source: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs (target, value) that ``take_over`` copies from one object to another.

    Usually, both are tensors of equal layout. For an attribute that only Python code reads, the
    target is (owner, attribute name). Raises _Unlike if the objects differ.
    """
    if target is source:
        return
    if type(target) is not type(source):
        raise _Unlike
    if isinstance(target, Tensor):
        # A recorded step holds addresses and strides, so the layouts must be equal.
        if (target.shape, target.dtype, target.stride()) != (
            source.shape,
            source.dtype,
            source.stride(),
        ):
            raise _Unlike
        yield target, source
    elif isinstance(target, dict):
        if list(target) != list(source):
            raise _Unlike
        yield from _pairs([*target.values()], [*source.values()])
    elif isinstance(target, list | tuple):
        if len(target) != len(source):
            raise _Unlike
        for parts in zip(target, source):
            yield from _pairs(*parts)
    elif type(target).__module__.startswith("gputune."):
        for name, value in vars(target).items():
            place = f"{type(target).__name__}.{name}"
            if place in _OF_HOST:
                yield (target, name), getattr(source, name)
            elif place not in _STAYS:
                yield from _pairs(value, getattr(source, name))
    elif not (
        np.array_equal(target, source) if isinstance(target, np.ndarray) else target == source
    ):
        raise _Unlike
