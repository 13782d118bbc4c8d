"""Reuse the memory and the recorded training steps of one group of trials for later groups.

A chunk is a group of trials of one tensor shape that train together. A recorded step is the list of
operations of one training step, which gputune replays. The search also remembers the number of
trials that fitted into memory. A chunk that is like an earlier chunk takes over the earlier chunk's
memory, and with it the steps that were recorded there. A recording costs as much as dozens of
steps. A search that stops at rungs, or trains many chunks of one shape, would otherwise record
again for each chunk. Two chunks are alike if only values in tensors differ (``take_over``).
"""

import secrets
from collections.abc import Hashable, Mapping
from typing import Any

from gputune.engine.member_steps import CompiledSteps
from gputune.engine.stacked import StackedChunk
from gputune.population.population import Network, Population, shape_of
from gputune.scoring.validation import Validation

# Limit for the parameters of kept chunks. A larger chunk has long epochs, and should give back its
# memory.
_KEPT_BYTES = 32 << 20
# Shapes of which the compiled steps are kept. Compiled steps hold the tensors of one member.
_KEPT_CODES = 8


class ChunkPool:
    """Tensors, recorded steps and memory limits that a search keeps for its next chunks in the same
    process.

    A chunk is a group of trials that train together. ``trials`` maps a tensor shape to the number
    of trials to train at once, after a larger number did not fit into memory. ``chunks`` has the
    last chunk with recorded steps of each shape, and the next chunk of that shape trains in its
    memory. Within a worker process, all jobs of a search share one pool: unpickling the pool again
    returns the same object.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.trials: dict[object, int] = {}
        self.chunks: dict[Hashable, StackedChunk] = {}
        # compiled steps of the last chunk of each shape, for the next chunk of that shape
        self.codes: dict[Hashable, CompiledSteps] = {}
        # sentences about faster backends that cannot train or failed when timed, as an ordered set
        self.failures: dict[str, None] = {}
        # sentences about backends that failed while chunks were made, as an ordered set
        self.faults: dict[str, None] = {}
        # ``Population.arguments`` of modules whose members failed only when they were stacked
        self.one_by_one: set[str] = set()

    def keep_code(self, network: Network, code: CompiledSteps) -> None:
        """Keep the compiled steps of a chunk for the next chunk of the same tensor shape."""
        key = _key(network)
        self.codes.pop(key, None)
        self.codes[key] = code
        while len(self.codes) > _KEPT_CODES:
            del self.codes[next(iter(self.codes))]

    def code_of(self, network: Network) -> CompiledSteps | None:
        """Return the compiled steps of the last chunk of the same tensor shape, or None."""
        return self.codes.get(_key(network))

    def take(self, network: Network, validation: Validation, **options: Any) -> StackedChunk:
        """Return the tensors for training these trials from their first epoch, in the memory of an
        earlier chunk if possible."""
        pooled = self.chunks.pop(_key(network), None)
        trials = len(network.configs)
        if (
            pooled is not None
            and pooled.is_made_with(validation, **options)
            and pooled.holds(trials)
        ):
            # Surplus slots of the pooled chunk repeat the last trial and are dropped below.
            slots = len(pooled.configs)
            configs = [network.configs[min(slot, trials - 1)] for slot in range(slots)]
            new = StackedChunk(network.with_configs(configs), validation, **options)
            if pooled.become(new):
                pooled.select(range(trials))
                return pooled
            del new
        del pooled  # frees its memory before more is taken
        return StackedChunk(network, validation, **options)

    def add(self, chunk: object) -> None:
        """Keep a trained chunk (group of trials) for reuse, if gputune has recorded its training
        steps.

        Drops the oldest chunks if all kept chunks together use too much memory.
        """
        if isinstance(chunk, StackedChunk) and chunk.steps.begun:
            self.chunks[_key(chunk.network)] = chunk
            while sum(pooled.nbytes for pooled in self.chunks.values()) > _KEPT_BYTES:
                del self.chunks[next(iter(self.chunks))]

    def remove(self, chunk: object) -> None:
        """Forget a chunk (group of trials) that waits for its next epochs."""
        for key, pooled in list(self.chunks.items()):
            if pooled is chunk:
                del self.chunks[key]

    def trials_at_once(self, chunk: Population) -> int:
        """Return the number of trials of a chunk to train at once. The result is below the chunk's
        size after a chunk of the same tensor shape did not fit into memory."""
        trials = len(chunk.index)
        return min(trials, self.trials.get(shape_of(chunk), trials))

    def note_too_big(self, chunk: Population) -> None:
        """Remember that a chunk did not fit into memory. The next chunk of the same tensor shape
        begins with half of the trials."""
        self.chunks = {}
        self.trials[shape_of(chunk)] = -(-len(chunk.index) // 2)

    def __reduce__(self) -> tuple[object, ...]:
        # Another process receives only the numbers of trials, not the chunks.
        return _pool_of, (self.token, self.trials)


_pools: dict[str, ChunkPool] = {}  # only of the last search that sent a job to this process


def _pool_of(token: str, trials: Mapping[object, int]) -> ChunkPool:
    """Return the ``ChunkPool`` that this process has for a search, with the trial limits of the
    sending process added."""
    if token not in _pools:
        _pools.clear()
        _pools[token] = ChunkPool()
    pool = _pools[token]
    pool.token = token
    for shape, number in trials.items():
        pool.trials[shape] = min(number, pool.trials.get(shape, number))
    return pool


def _key(network: Network) -> Hashable:
    """Return the lookup key of a chunk (a group of trials). gputune then compares chunks with equal
    keys tensor by tensor."""
    sizes = {config["batch_size"] for config in network.configs}
    shape = shape_of(Population(network.kind, (), network.configs))
    return shape, sizes.pop() if len(sizes) == 1 else None
