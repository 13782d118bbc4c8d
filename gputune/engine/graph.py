"""A training step recorded once and replayed: by CUDA as one graph, on a CPU by a stand-in that is as strict.

A graph launches the few dozen small kernels of a step at the cost of one. What it may do is narrow: it reads and writes
the memory that it read and wrote when it was recorded, and nothing of it waits for the device.

A chunk whose members take each step together, recorded once as a graph and replayed: for a GPU.

The first steps of each shape are taken as they are, which warms up what a recording needs; then the step is
recorded, and every later one is a replay. Trials that leave go on in the tensors, unseen, until a quarter of them has
left: only then are the tensors made anew and the steps recorded again. Inside an epoch nothing waits for the device,
but for a recording and for a buffer of dropout's draws.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.graph_batches import GraphBatches, StepShape
from gputune.engine.graph_update import GraphUpdate
from gputune.engine.mlp import StackedMLP
from gputune.engine.network import Network
from gputune.engine.scoring import Scoring, Validation
from gputune.engine.stand_in import StandIn
from gputune.types import Config


class Recorded(Protocol):
    """A step as it was recorded."""

    def replay(self) -> None:
        """Take the step again, on what its memory holds now."""


class Recorder(Protocol):
    """Records steps that leave nothing behind but what they write into tensors that were there before."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Take a step as it is, so that what is made on first use is there before it is recorded."""

    def capture(self, step: Callable[[], None]) -> Recorded:
        """Record a step, which is not taken thereby."""


def make_recorder(device: torch.device) -> Recorder:
    """Return a recorder of CUDA graphs, or on a CPU the stand-in."""
    return CudaRecorder(device) if device.type == "cuda" else StandIn(device)


class CudaRecorder:
    """CUDA graphs as PyTorch's documentation has them: warmed up and captured on one side stream.

    The graphs share a memory pool, which is safe because none leaves a tensor in it that another would overwrite.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], None]) -> None:
        """Take a step on the side stream, in its turn among what is queued."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def capture(self, step: Callable[[], None]) -> Recorded:
        """Record a step; this waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            step()
        return graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device: memory that one chunk gave back to it serves the next."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


_WARM_UPS = 3  # steps of one shape before it is recorded, as in PyTorch's documentation
_FULL = 0.75  # share of the trials in the tensors that must be alive: few numbers of trials are recorded


class GraphChunk:
    """The trials ``slots`` in flat buffers that stay where they are, and the steps that were recorded over them."""

    def __init__(
        self,
        network: Network,
        data: Dataset,
        configs: Sequence[Config],
        *,
        seed: int,
        horizon: int,
        scoring: Scoring | None,
    ) -> None:
        assert isinstance(network, StackedMLP)
        self._network = network
        self.validation = Validation(data, scoring)
        self.alive = list(range(len(configs)))
        self.slots = list(self.alive)
        self.batches = GraphBatches(network, data, [config["batch_size"] for config in configs], seed=seed)
        self._flat = network.start()
        self.update = GraphUpdate(
            configs, network.blocks, self._flat, steps=self.batches.steps, horizon=horizon
        )
        self._settle()

    def _settle(self) -> None:
        """Begin anew over the buffers as they are now."""
        self.grad = torch.zeros_like(self._flat)
        self.params = self._network.blocks.views(self._flat)
        self.grads = self._network.blocks.views(self.grad)
        self.recorder = make_recorder(self._flat.device)
        self.recorded: dict[StepShape, Recorded] = {}
        self.taken = Counter[StepShape]()
        self._places: Tensor | None = None  # of the trials that are alive, None: of all
        self._seen: Network = self._network

    scoring_share = 0.0

    @property
    def network(self) -> Network:
        """The model of the members that are still in it."""
        return self._seen

    @property
    def flat(self) -> Tensor:
        """The parameters of those members."""
        return self._of_alive(self._flat)

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """The optimizer's flat buffers, of those members."""
        return tuple(map(self._of_alive, self.update.moments))

    def _of_alive(self, buffer: Tensor) -> Tensor:
        return buffer if self._places is None else self._network.blocks.select(buffer, self._places)

    def resume(self, buffers: Sequence[Tensor]) -> None:
        """Go on from flat buffers: of the parameters, then of the moments."""
        for own, kept in zip([self._flat, *self.update.moments], buffers, strict=True):
            own.copy_(kept)

    def advance(self, epoch: int) -> None:
        """Train for one epoch."""
        self.batches.begin(epoch)
        self.update.begin(epoch)
        for step, shape in enumerate(self.batches.shapes):
            self.batches.draw(epoch, step)
            self._take(shape)

    def _take(self, shape: StepShape) -> None:
        if shape not in self.recorded:
            step = partial(self._step, shape)
            self.taken[shape] += 1
            if self.taken[shape] <= _WARM_UPS:
                self.recorder.warm_up(step)
                return
            self.recorded[shape] = self.recorder.capture(step)
        self.recorded[shape].replay()

    def _step(self, shape: StepShape) -> None:
        """One step of all members, on what lies on the device alone; the counters there go on by one."""
        self._network.gradient(self.params, self.batches.batch(shape), self.grads)
        active = None if shape.all_active else self.batches.active()
        self.update.step(self._flat, self.grad, active)
        self.batches.step.add_(1)

    def scores(self) -> np.ndarray:
        """Return the scores (C, F) of all members, each on the validation rows of its fold."""
        scores = self.validation.scores(self._network, self.params, len(self.slots))
        return scores[np.isin(self.slots, self.alive)]

    def keep(self, stays: np.ndarray) -> None:
        """Go on with the trials of ``stays`` (C,) alone."""
        if stays.all():
            return
        self.alive = [self.alive[i] for i in np.flatnonzero(stays)]
        if not self.alive:
            return
        places = np.flatnonzero(np.isin(self.slots, self.alive))
        if not self.recorded or len(places) < _FULL * len(self.slots):
            self._compact(places)
        else:
            self._places = torch.as_tensor(places).to(self._flat.device)
            self._seen = self._network.subset(places.tolist())

    def _compact(self, places: np.ndarray) -> None:
        """Make the tensors anew for the trials at some places, and forget what was recorded over the old ones."""
        self.recorded.clear()
        on_device = torch.as_tensor(places).to(self._flat.device)
        flat = self._network.blocks.select(self._flat, on_device)
        self._network = self._network.subset(places.tolist())
        self.batches.select(self._network, places)
        configs = self._network.configs
        self.update.select(configs, self._network.blocks, on_device, flat, self.batches.steps)
        self._flat = flat
        self.slots = [self.slots[i] for i in places]
        self._settle()
