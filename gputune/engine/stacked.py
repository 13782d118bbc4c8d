"""A chunk whose members take each step together, as operations on stacked tensors: any model, any
device.

Where steps are recorded, trials that leave go on in the tensors, unseen, until a quarter of them
has left: only then are the tensors made anew and the steps recorded again. Inside an epoch nothing
waits for the device, but for a recording and for a buffer of dropout's draws.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gputune.errors import warn
from gputune.fallback import failure_in_words
from gputune.memory import is_out_of_memory
from gputune.modules.recorder import RECORDERS, Direct, Replays, Steps
from gputune.modules.trace import TraceError
from gputune.optimizers.blocks import Blocks
from gputune.optimizers.update import optimizer_of
from gputune.population.batches import Batches, StepShape
from gputune.population.population import Network
from gputune.scoring.scoring import Validation
from gputune.types import Config

# share of the trials in recorded tensors that must be alive: few numbers of trials are recorded
_FULL = 0.75

_TOLERANCES = {
    ("full", torch.float32): 1e-5,
    ("full", torch.float64): 1e-10,
    ("bf16", torch.float32): 1e-2,
}
"""What a recorded step may differ by from the step itself."""


class StackedChunk:
    """The trials ``slots`` in flat buffers (parameters, gradient, moments), and the steps over
    them."""

    scoring_share = 0.0

    def __init__(
        self,
        network: Network,
        validation: Validation,
        *,
        seed: int,
        horizon: int,
        recorded: bool = False,
    ) -> None:
        # A recorded step reads the memory of its device alone, and rows of main memory come from
        # outside.
        data = validation.data
        configs = network.configs
        self._network = network
        self.recorded = recorded and not data.on_host
        self.horizon = horizon
        self._options = {"seed": seed, "horizon": horizon, "recorded": recorded}
        self.validation = validation
        target = network.targets(data.y)
        self.alive = list(range(len(configs)))
        self.slots = list(range(len(configs)))
        self.configs = list(configs)
        self.epoch = 0  # epochs that the members have trained
        sizes = [config["batch_size"] for config in configs]
        self.batches = Batches(
            data, sizes, target, seed=seed, exact=network.exact, least_rows=network.least_rows
        )
        # what went wrong while steps were recorded, a sentence each
        self.faults: dict[str, None] = {}
        self._flat = network.start()
        steps = self.batches.active_until
        self.update = optimizer_of(
            configs, network.trained, self._trained, steps=steps, horizon=horizon
        )
        self._rebuild()

    def _rebuild(self) -> None:
        """Make what lies over the buffers as they are now."""
        self.grad = torch.zeros_like(self._trained)
        self.params = self._network.blocks.views(self._flat)
        self.dropout = self.update.clock.table(self.configs, "dropout")
        self.grads = self._network.trained.views(self.grad)
        self.steps: Steps = Direct()
        if self.recorded:
            self.update.prepare()
            self.batches.prepare()
            recorder = RECORDERS[self._flat.device.type](self._flat.device)
            tolerance = _TOLERANCES[self._network.shape.precision, self._flat.dtype]
            self.steps = Replays(
                recorder, self._expected_steps(), self._state, tolerance, self._note_failure
            )
        try:
            self.draws = self._network.draws(self.batches, ahead=self.recorded)
        except TraceError:
            self.draws = None
            self.steps = Direct()
        except Exception as error:
            if not self.recorded or is_out_of_memory(error):
                raise
            self._note_failure(failure_in_words(error))
            self.draws = None
            self.steps = Direct()
        self._places: Tensor | None = None  # of the trials that are alive, None: of all
        self.network = self._network  # the model of the trials that are alive

    def _note_failure(self, reason: str) -> None:
        """Say why steps are not recorded, in a warning and in the notes of the search."""
        fault = (
            "Trials train in steps that are not recorded, which is slower, since recording them "
            f"failed: {reason}."
        )
        if fault not in self.faults:
            self.faults[fault] = None
            warn(fault, RuntimeWarning)

    def _expected_steps(self) -> Counter[Hashable]:
        """How many steps of each shape a whole training takes."""
        return Counter(
            {shape: n * self.horizon for shape, n in Counter(self.batches.shapes).items()}
        )

    def _state(self) -> list[Tensor]:
        """What a step changes."""
        return [self._flat, *self.update.state(), self.update.clock.done, self.batches.step]

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and buffers of the members."""
        return self._flat.nbytes

    def is_made_with(self, validation: Validation, **options: int) -> bool:
        """Whether it was made with these arguments, the network apart; objects are the same, as
        some hold arrays."""
        own = self.validation
        return (
            own.data is validation.data
            and own.scoring is validation.scoring
            and self._options == options
        )

    def holds(self, trials: int) -> bool:
        """Whether so many trials are enough for its tensors: what is empty in them costs little."""
        slots = len(self.slots)
        return trials <= slots and (
            trials >= _FULL * slots or self._flat.numel() <= self.steps.spare
        )

    def restart(self, configs: Sequence[Config]) -> None:
        """Go on as the chunk of other trials, whose start is in the tensors already."""
        self.configs = list(configs)
        self.slots = list(range(len(configs)))
        self.alive = list(range(len(configs)))
        self._places = None
        self.network = self._network
        if isinstance(self.steps, Replays):
            self.steps.expected = self._expected_steps()

    @property
    def flat(self) -> Tensor:
        """The parameters and buffers of the members that are alive."""
        return self._of_alive(self._network.blocks, self._flat)

    @property
    def scored(self) -> Tensor:
        """What is scored and saved of those members: the parameters, or their average, and the
        buffers."""
        return self._of_alive(self._network.blocks, self._scored)

    @property
    def _scored(self) -> Tensor:
        theta = self._trained
        weights = self.update.scored(theta)
        return self._flat if weights is theta else torch.cat([weights, self._flat[len(weights) :]])

    @property
    def _trained(self) -> Tensor:
        """The parameters that have a gradient, of all members in the tensors."""
        return self._flat[: self._network.trained.size]

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """The optimizer's flat buffers, of those members."""
        return tuple(self._of_alive(block, moment) for block, moment in self._buffers()[1:])

    def _buffers(self) -> list[tuple[Blocks, Tensor]]:
        """What a step changes in the members, and how it lies."""
        moments = [(self._network.trained, buffer) for buffer in self.update.state()]
        return [(self._network.blocks, self._flat), *moments]

    def _of_alive(self, blocks: Blocks, buffer: Tensor) -> Tensor:
        return buffer if self._places is None else blocks.select(buffer, self._places)

    def resume(self, buffers: Sequence[Tensor]) -> None:
        """Go on from flat buffers: of the parameters, then of the moments."""
        if self._places is None:
            self._flat.copy_(buffers[0])
            self.update.resume(buffers[1:])
            return
        for (block, tensor), values in zip(self._buffers(), buffers, strict=True):
            block.put(tensor, self._places, values)

    def advance(self, epoch: int) -> None:
        """Train for one epoch."""
        self._begin(epoch)
        for step, shape in enumerate(self.batches.shapes):
            if self.draws is not None:
                self.draws.fill(epoch, step)
            self.steps.take(shape, partial(self._step, shape, (epoch, step)))

    def _begin(self, epoch: int) -> None:
        """Prepare the rows and the rates of an epoch."""
        self.epoch = epoch + 1
        self.batches.begin(epoch)
        self.update.begin(epoch)

    def _step(self, shape: StepShape, key: tuple[int, int]) -> None:
        """One step of all members, on what lies on the device alone; the counters there go on by
        one."""
        for name in self._network.scheduled:
            self.params[name].copy_(self.dropout * self.update.clock.factor("dropout_schedule"))
        if sum(part.end - part.begin for part in shape.parts) < len(self.batches.lengths):
            # folds without a part would keep the last step's gradient, or what became of it
            self.grad.zero_()
        for run, part in zip(shape.parts, self.batches.parts(shape, key)):
            if self.draws is not None:
                part = replace(part, draws=self.draws.at(self.batches.step, run.rows))
            self._network.gradient(self.params, part, self.grads)
        active = None if shape.all_active else self.batches.active()
        self.update.step(self._trained, self.grad, active)
        self.batches.step.add_(1)

    def scores(self) -> np.ndarray:
        """Return the scores (C, F) of all members, each on the validation rows of its fold."""
        params = self._network.blocks.views(self._scored)
        scores = self.validation.scores(self._network, params, len(self.slots), epoch=self.epoch)
        if self._places is not None:
            of_epochs = self.validation.outputs
            self.validation.outputs = [
                [one[self._places] for one in outputs] for outputs in of_epochs
            ]
        return scores[np.isin(self.slots, self.alive)]

    def keep(self, stays: np.ndarray) -> None:
        """Go on with the trials of ``stays`` (C,) alone."""
        if stays.all():
            return
        self.alive = [self.alive[i] for i in np.flatnonzero(stays)]
        if not self.alive:
            return
        places = np.flatnonzero(np.isin(self.slots, self.alive)).tolist()
        on_device = torch.tensor(places).to(self._flat.device)
        if self.steps.begun and self.holds(len(places)):
            self._places = on_device
            self.network = self._network.subset(places)
            return
        self.steps = Direct()  # what was recorded is over the old tensors
        self._flat = self._network.blocks.select(self._flat, on_device)
        self._network = self._network.subset(places)
        self.batches.select(np.asarray(places))
        self.configs = [self.configs[i] for i in places]
        self.slots = [self.slots[i] for i in places]
        steps = self.batches.active_until
        self.update.select(
            self.configs, self._network.trained, on_device, self._trained, steps=steps
        )
        self._rebuild()
