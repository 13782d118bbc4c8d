"""Chunks that stop at a rung and go on later: their members' state travels with them."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gputune.data.dataset import Dataset
from gputune.engine.job import BegunChunk, Job, Outcome, Progress, train_chunk
from gputune.engine.train import State
from gputune.population.population import Population
from gputune.scratch import scratch_folder


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
        start = chunk.state.epoch if isinstance(chunk, BegunChunk) and chunk.state is not None else 0
        trained = train_chunk(self, data, chunk, progress)
        kept = State(trained.state.epoch, tuple(buffer.cpu() for buffer in trained.state.buffers))
        seconds = time.monotonic() - begin
        curves = trained.curves[:, start : trained.epochs]
        return RungOutcome(
            chunk.index,
            curves,
            trained.epochs - start,
            seconds,
            kept,
            trained.alive,
            spent=trained.spent,
            outputs=trained.outputs_of(chunk.index),
        )


class StateCache:
    """Where the states of trials wait for their next rung: in memory up to a limit, then in files that go with it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.states: dict[int, State | Path] = {}
        self.folder: Path | None = None
        self.end = ExitStack()

    def park(self, trial: int, state: State) -> None:
        """Keep the state (one row) of a trial."""
        size = sum(buffer.nbytes for buffer in state.buffers)
        if self.size + size <= self.limit:
            self.size += size
            # A copy of its own: a row of a chunk would keep the whole chunk alive.
            self.states[trial] = State(state.epoch, tuple(buffer.clone() for buffer in state.buffers))
            return
        if self.folder is None:
            self.folder = self.end.enter_context(scratch_folder())
        path = self.folder / f"{trial}.safetensors"
        tensors = {str(i): buffer.contiguous() for i, buffer in enumerate(state.buffers)}
        try:
            save_file(tensors, path, metadata={"epoch": str(state.epoch)})
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(
                f"no room for the states of trials that wait for their rung: {str(path.parent)!r} takes no more "
                f"({error}). Make room there, let TMPDIR name a folder of a larger disk, or allow more memory=."
            ) from error
        self.states[trial] = path

    def look(self, trial: int) -> State:
        """Return the state of a trial, which stays."""
        state = self.states[trial]
        return state if isinstance(state, State) else self._load(state)

    def take(self, trials: Sequence[int]) -> State:
        """Return the states of some trials, all after one number of epochs, and keep them no longer."""
        states = [self.look(trial) for trial in trials]
        for trial in trials:
            self.drop(trial)
        return State.stack(states)

    def _load(self, path: Path) -> State:
        with safe_open(path, framework="pt") as file:
            count = len(list(file.keys()))
            buffers = tuple(file.get_tensor(str(i)) for i in range(count))
            return State(int(file.metadata()["epoch"]), buffers)

    def drop(self, trial: int) -> None:
        """Forget the state of a trial that has left."""
        state = self.states.pop(trial, None)
        if isinstance(state, State):
            self.size -= sum(buffer.nbytes for buffer in state.buffers)
        elif state is not None:
            state.unlink()

    def close(self) -> None:
        """Remove the files."""
        self.end.close()
