"""The state of trials that wait for their next epochs in the tensors in which they have trained.

A chunk holds trials that train together. Between two rungs, a chunk can stay on its device. The
trials then continue in place, and nothing is copied to main memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gputune.engine.chunk import Chunk
from gputune.ground.types import Config
from gputune.population.population import Network
from gputune.population.state import State


@dataclass(eq=False)
class WaitingChunk:
    """A chunk that waits until its trials continue. All states of its trials share this object.

    ``is_current`` is False after some of the trials have continued: the tensors then no longer hold
    the state of the others. If ``is_copied`` is True, trials that continue can begin again from a
    copy of their state.
    """

    chunk: Chunk
    is_copied: bool
    is_current: bool = True
    # tensors of an earlier rung, for the copies of the next one: new memory costs more than a copy
    spare: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        # Computed once, because each trial asks for its part.
        chunk = self.chunk
        self.nbytes = chunk.flat.nbytes + sum(moment.nbytes for moment in chunk.moments)
        self.trial_bytes = self.nbytes // len(chunk.network.configs)
        self.steps = State.counts(chunk.steps_taken)

    def rows(self, slots: Sequence[int]) -> list[Tensor]:
        """Return copies of the buffers (C, F, N) of the trials at some positions."""
        network = self.chunk.network
        rows = [network.blocks.to_rows(self.chunk.flat, slots)]
        rows += [network.trained.to_rows(moment, slots) for moment in self.chunk.moments]
        return rows


class WaitingState(State):
    """The state of trials at some positions of a chunk that waits on its device.

    Everything else can be done with it as with other states. ``buffers`` are then copies in main
    memory.

    When the trials continue, the tensors are overwritten. If the chunk is copied, ``begun`` then has
    copies on the device, from which smaller groups of trials continue if the memory is not enough
    for all of them.
    """

    def __init__(self, waiting: WaitingChunk, slots: Sequence[int]) -> None:
        # The dataclass is frozen, and ``buffers`` is a property here.
        vars(self).update(
            epoch=waiting.chunk.epoch,
            waiting=waiting,
            slots=tuple(slots),
            begun=None,
            has_begun=False,
        )

    waiting: WaitingChunk
    slots: tuple[int, ...]
    begun: tuple[Network, list[Tensor]] | None
    has_begun: bool  # whether these trials have continued

    @property
    def steps(self) -> Tensor:
        """Step counts (C, F) of the trials."""
        return self.waiting.steps[list(self.slots)]

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Copies of the buffers (C, F, N) in main memory."""
        if self.begun is not None:
            network, (flat, *moments) = self.begun
            rows = [network.blocks.to_rows(flat), *map(network.trained.to_rows, moments)]
            return tuple(row.cpu() for row in rows)
        if self.has_begun:
            # Main memory had enough space for the same trials before.
            raise MemoryError(
                f"not enough main memory to continue after epoch {self.epoch}. Free memory, and run "
                "the search again: with a study file it resumes from its latest checkpoint"
            )
        if not self.waiting.is_current:
            raise RuntimeError("the state of these trials was overwritten when others continued")
        return tuple(row.cpu() for row in self.waiting.rows(self.slots))

    @property
    def place(self) -> WaitingChunk:
        """The chunk in which the trials wait."""
        return self.waiting

    @property
    def nbytes(self) -> int:
        """Memory of these trials in the tensors of the chunk, in bytes."""
        return self.waiting.trial_bytes * len(self.slots)

    def cpu(self) -> State:
        """Return the same state in main memory."""
        return State(self.epoch, self.buffers, self.steps)

    def select(self, slots: Sequence[int]) -> State:
        """Return the state of the trials at the positions ``slots``, which may repeat."""
        return WaitingState(self.waiting, [self.slots[slot] for slot in slots])

    def joined(self, states: Sequence[State]) -> State | None:
        """Return the state of several groups of trials if all of them wait in this chunk."""
        slots: list[int] = []
        for state in states:
            if not isinstance(state, WaitingState) or state.waiting is not self.waiting:
                return None
            slots += state.slots
        return WaitingState(self.waiting, slots)

    def continued(self, configs: Sequence[Config]) -> Chunk:
        """Return the chunk, in which these trials continue with these configurations. Other trials
        that waited in it have lost their state."""
        self.waiting.is_current = False
        chunk = self.waiting.chunk
        chunk.select(self.slots, list(configs))
        object.__setattr__(self, "has_begun", True)
        if not self.waiting.is_copied:
            return chunk
        copies = []
        spare = list(self.waiting.spare)
        for buffer in (chunk.flat, *chunk.moments):
            copy = spare.pop(0) if spare and spare[0].shape == buffer.shape else None
            copies.append(buffer.clone() if copy is None else copy.copy_(buffer))
        self.waiting.spare = ()
        object.__setattr__(self, "begun", (chunk.network, copies))
        return chunk

    def __reduce__(self) -> tuple[object, ...]:
        # Another process receives the copies.
        return State, (self.epoch, self.buffers, self.steps)
