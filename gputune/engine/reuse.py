"""What a chunk leaves to the next of its search: how many trials memory has held, and the memory
itself.

A chunk like one that has trained takes it over, and with it the steps that were recorded there. A
recording costs as much as dozens of steps, and a search that stops at rungs, or that trains many
chunks of one shape, would make it anew for each. What a step reads as a number of the host is part
of the recording: a chunk is like another where all of that is equal, and what differs is in
tensors.
"""

import secrets
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gputune.engine.stacked import StackedChunk
from gputune.modules.module import ModuleNetwork
from gputune.population.population import Network, Population, arguments_text, shape_of
from gputune.scoring.scoring import Validation
from gputune.types import Config

# Of the parameters of a chunk that is kept; a larger one has long epochs, and memory to give back.
_KEPT_BYTES = 32 << 20

_OF_HOST = frozenset(
    """StackedMLP.configs StackedModule.configs Batches.sizes Batches.steps Batches.host_taken Batches.shapes
    Batches.epoch Draws.rows ModuleDraws.rows""".split()
)
"""What the host reads between steps, and no step: it is taken from the new chunk."""

_STAYS = frozenset(
    """StackedModule.template StackedModule.stateless StackedMLP._workspaces Batches.inputs Batches.target
    Batches.weights""".split()
)
"""What is the same in like chunks by its making: the module of equal arguments, room to work in,
the rows."""


class _Unlike(Exception):
    """A recorded step of one chunk is no step of the other."""


class Fits:
    """What the chunks of one search leave to the next, where a process has trained some.

    How many trials of each tensor shape memory has held: what failed once is not tried again. And
    the chunks that take recorded steps, the last of each shape, in whose memory the next of their
    shape train. Within a process all copies are one object, however often it is sent there with a
    job.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.trials: dict[object, int] = {}
        self.chunks: dict[Hashable, StackedChunk] = {}
        # those in compiled code that are at their start, being only timed
        self.timed: list[StackedChunk] = []
        # faster ways that cannot train or have failed when timed, and why
        self.failures: dict[str, None] = {}
        # the same of backends that failed while chunks were made, a sentence each
        self.faults: dict[str, None] = {}

    def keep_timed(self, chunk: StackedChunk) -> None:
        """Keep a chunk that was timed, where there is room beside the others."""
        if not self.timed or sum(kept.nbytes for kept in (*self.timed, chunk)) <= _KEPT_BYTES:
            self.timed.append(chunk)

    def drop_timed(self, configs: Sequence[Config]) -> None:
        """Keep the chunk of these trials no longer."""
        self.timed = [chunk for chunk in self.timed if chunk.configs != list(configs)]

    def take_timed(
        self, network: Network, validation: Validation, **options: int
    ) -> StackedChunk | None:
        """Return the chunk of these trials that was timed, which is kept no longer; None where
        there is none."""
        found = [chunk for chunk in self.timed if chunk.configs == list(network.configs)]
        self.drop_timed(network.configs)
        return (
            found[0]
            if found and found[0].is_made_with(validation, recorded=False, **options)
            else None
        )

    def take(
        self, network: Network, validation: Validation, *, recorded: bool, **options: int
    ) -> StackedChunk:
        """Return a chunk of these trials at their start: one that was kept where it can be, or a
        new one."""
        kept = self.chunks.pop(_key(network), None)
        trials = len(network.configs)
        if (
            kept is not None
            and kept.is_made_with(validation, recorded=recorded, **options)
            and kept.holds(trials)
        ):
            places = [min(slot, trials - 1) for slot in range(len(kept.slots))]
            like = StackedChunk(network.subset(places), validation, recorded=recorded, **options)
            if take_over(kept, like):
                kept.keep(np.arange(len(places)) < trials)
                return kept
            del like
        del kept  # its memory is free before more is taken
        return StackedChunk(network, validation, recorded=recorded, **options)

    def give(self, chunk: object) -> None:
        """Keep a chunk that has trained, where it takes recorded steps; the oldest go where all are
        large."""
        if isinstance(chunk, StackedChunk) and chunk.steps.begun:
            self.chunks[_key(chunk.network)] = chunk
            while sum(kept.nbytes for kept in self.chunks.values()) > _KEPT_BYTES:
                del self.chunks[next(iter(self.chunks))]

    def most(self, chunk: Population) -> int:
        """Return how many trials of a chunk to train at once."""
        return min(len(chunk.index), self.trials.get(shape_of(chunk), len(chunk.index)))

    def refused(self, chunk: Population) -> None:
        """Remember that a chunk did not fit: the next of its shape begins with half of it."""
        self.chunks = {}
        self.timed = []
        self.trials[shape_of(chunk)] = -(-len(chunk.index) // 2)

    def __reduce__(self) -> tuple[object, ...]:
        return _here, (self.token, self.trials)


_arrived: dict[str, Fits] = {}  # of the last search that this process had a job of


def _here(token: str, trials: Mapping[object, int]) -> Fits:
    """Return what this process knows of a search, with what the sender knows."""
    if token not in _arrived:
        _arrived.clear()
        _arrived[token] = Fits()
    known = _arrived[token]
    known.token = token
    for shape, number in trials.items():
        known.trials[shape] = min(number, known.trials.get(shape, number))
    return known


def _key(network: Network) -> Hashable:
    """Return what like chunks have in common before they are looked at closely."""
    sizes = {config["batch_size"] for config in network.configs}
    shape = shape_of(Population(network.kind, (), network.configs))
    return shape, sizes.pop() if len(sizes) == 1 else None


def take_over(chunk: StackedChunk, like: StackedChunk) -> bool:
    """Make a chunk what another one is, in its own memory; return False, and change nothing, where
    they are unlike."""
    mine, theirs = ([one._network, one.batches, one.update, one.draws] for one in (chunk, like))
    if _constants(chunk._network) != _constants(like._network):
        return False
    try:
        pairs = list(_pairs(mine, theirs))
    except _Unlike:
        return False
    for own, value in [*pairs, (chunk._flat, like._flat)]:
        if isinstance(own, Tensor):
            own.copy_(value)
        else:
            owner, name = own
            setattr(owner, name, value)
    chunk.restart(like.configs)
    return True


def _constants(network: Network) -> object:
    """Return the values of a user's module and loss that all members share, which are numbers of
    the host."""
    if not isinstance(network, ModuleNetwork):
        return None
    config = network.configs[0]
    named = network.objective.is_named
    return arguments_text(config), [
        (k, repr(v)) for k, v in config.items() if not named and k.startswith("loss__")
    ]


def _pairs(mine: Any, theirs: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the tensors of two structures, and the places and values of what the host reads. Raises
    _Unlike."""
    if mine is theirs:
        return
    if type(mine) is not type(theirs):
        raise _Unlike
    if isinstance(mine, Tensor):
        if (mine.shape, mine.dtype, mine.stride()) != (theirs.shape, theirs.dtype, theirs.stride()):
            raise _Unlike
        yield mine, theirs
    elif isinstance(mine, dict):
        if list(mine) != list(theirs):
            raise _Unlike
        yield from _pairs([*mine.values()], [*theirs.values()])
    elif isinstance(mine, list | tuple):
        if len(mine) != len(theirs):
            raise _Unlike
        for a, b in zip(mine, theirs):
            yield from _pairs(a, b)
    elif type(mine).__module__.startswith("gputune."):
        for name, value in vars(mine).items():
            place = f"{type(mine).__name__}.{name}"
            if place in _OF_HOST:
                yield (mine, name), getattr(theirs, name)
            elif place not in _STAYS:
                yield from _pairs(value, getattr(theirs, name))
    elif not (np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs):
        raise _Unlike
