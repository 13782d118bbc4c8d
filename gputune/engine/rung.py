"""Chunks that stop at a rung and go on later: their members' state travels with them."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from gputune.data.dataset import Dataset
from gputune.engine.chunk import Job, Outcome, Progress, make_network
from gputune.engine.population import Population
from gputune.engine.train import State, train


@dataclass(frozen=True)
class BegunChunk(Population):
    """Trials of one shape that have trained for some epochs already, or for none (``state`` None)."""

    state: State | None = None


@dataclass(frozen=True)
class RungOutcome(Outcome):
    """What a chunk gave up to a rung: ``state`` has a row for each of the trials ``alive`` (positions in the chunk)."""

    state: State
    alive: tuple[int, ...]


@dataclass(frozen=True)
class RungJob(Job):
    """Trains every chunk on from where it is up to ``epochs``, of ``horizon``."""

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> RungOutcome:
        """Train one chunk; its curves have the epochs since it was begun."""
        begin = time.monotonic()
        state = chunk.state if isinstance(chunk, BegunChunk) else None
        start = 0 if state is None else state.epoch

        def after_epoch(epoch: int, curves: np.ndarray) -> bool:
            if progress is not None:
                progress(len(curves), curves[:, epoch - 1 : epoch])
            return self.is_over()

        trained = train(
            make_network(chunk, data, seed=self.seed, module_class=self.module_class),
            data,
            chunk.configs,
            seed=self.seed,
            epochs=self.epochs,
            horizon=self.horizon,
            scoring=self.scoring,
            after_epoch=after_epoch,
            begin=state,
        )
        kept = State(trained.state.epoch, tuple(buffer.cpu() for buffer in trained.state.buffers))
        seconds = time.monotonic() - begin
        curves = trained.curves[:, start : trained.epochs]
        return RungOutcome(chunk.index, curves, trained.epochs - start, seconds, kept, trained.alive)


class Parking:
    """Where the states of trials wait for their next rung: in memory up to a limit, then in files that go with it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.states: dict[int, State | Path] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def park(self, trial: int, state: State) -> None:
        """Keep the state (one row) of a trial."""
        size = sum(buffer.nbytes for buffer in state.buffers)
        if self.held + size <= self.limit:
            self.held += size
            # A copy of its own: a row of a chunk would keep the whole chunk alive.
            self.states[trial] = State(state.epoch, tuple(buffer.clone() for buffer in state.buffers))
            return
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="gputune-")
        path = Path(self.folder.name) / f"{trial}.safetensors"
        tensors = {str(i): buffer.contiguous() for i, buffer in enumerate(state.buffers)}
        save_file(tensors, path, metadata={"epoch": str(state.epoch)})
        self.states[trial] = path

    def take(self, trials: Sequence[int], epoch: int) -> State:
        """Return the states of some trials, all after ``epoch`` epochs, and keep them no longer."""
        return State.stack([self._taken(trial, epoch) for trial in trials])

    def _taken(self, trial: int, epoch: int) -> State:
        state = self.states.pop(trial)
        if isinstance(state, State):
            self.held -= sum(buffer.nbytes for buffer in state.buffers)
            return state
        tensors = load_file(state)
        state.unlink()
        return State(epoch, tuple(tensors[str(i)] for i in range(len(tensors))))

    def drop(self, trial: int) -> None:
        """Forget the state of a trial that has left."""
        state = self.states.pop(trial, None)
        if isinstance(state, State):
            self.held -= sum(buffer.nbytes for buffer in state.buffers)
        elif state is not None:
            state.unlink()

    def close(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            self.folder.cleanup()
