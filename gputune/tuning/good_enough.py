"""The early end of a search, by ``target_score`` and ``patience_trials``.

Trials are judged in order of their trial numbers, never in the order in which they end. A trial
counts when all trials of its chunk, of all earlier chunks, and all trials with lower numbers have
ended. The first trial that ends the search is therefore the same with any number of workers, after
a kill, and in a repeated call.

A chunk begins only if the chunks before it, except the last few, do not end the search. "The last
few" is the number of chunks that may train at once, which the study stores. These chunks train to
their end, also after the decision. So the set of trained trials is the same each time.
"""

import math
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from gputune.ground.errors import Verbatim, option
from gputune.ground.text import count
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate, PlannedChunk

BATCH = "batch "
"""The first part of a trial's ``origin`` if an Optuna sampler proposed the trial.

The batch number follows.
"""

_BLOCK = 16
"""The smallest number of consecutive trials that are planned together.

With fewer trials, the stacked backends would have too little work.
"""


def batch_of(candidate: Candidate) -> int:
    """Return the batch number of a trial that an Optuna sampler proposed.

    The batch number of any other trial is 0.
    """
    origin = candidate.origin
    if not isinstance(origin, str) or not origin.startswith(BATCH):
        return 0
    return int(origin.removeprefix(BATCH))


def block_size(target_score: float | None, patience_trials: int | None) -> int | None:
    """Return the number of consecutive trials that gputune plans together.

    Returns None if the search cannot end early, because then gputune plans all trials at once. A
    search that can end early judges its trials in order. Small groups of consecutive trials let it
    decide sooner.
    """
    if target_score is None and patience_trials is None:
        return None
    return max(_BLOCK, patience_trials or 0)


@dataclass(eq=False)
class GoodEnough:
    """The decision to end a search early because a score is good enough or no longer improves.

    Attributes:
        in_rungs: If True, trials train together from rung to rung, and all trials together count as
            one chunk. With an Optuna sampler, each batch counts as one chunk.
        reason: The reason why the search ends, as text. "" while the search continues.
    """

    ledger: Ledger
    target_score: float | None
    patience_trials: int | None
    in_rungs: bool
    reason: str = ""
    _ended: int = 0  # number of chunks, counted from the first one, that are known to have ended
    _trials: set[int] = field(default_factory=set)  # in these chunks
    _counted: int = 0  # number of candidates, counted from the first one, that count
    _best: float = -math.inf
    _since_best: int = 0
    # Threads of an executor call the methods too.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def is_possible(self) -> bool:
        """True if the user set ``target_score`` or ``patience_trials``, so that the search can end
        early."""
        return self.target_score is not None or self.patience_trials is not None

    def allows(self, chunk: PlannedChunk) -> bool:
        """Return True if a chunk (a group of trials that train together) may begin to train now."""
        if not self.is_possible:
            return True
        with self._lock:
            chunks = self._chunks()
            self._look(chunks)
            place = bisect_left(chunks, chunk.number, key=lambda other: other.number)
            return self._allows(place, chunk)

    def is_reached(self) -> bool:
        """Return True if ``target_score`` or ``patience_trials`` ends the search now.

        The result is False while trials that were allowed to begin have not ended.
        """
        if not self.is_possible:
            return False
        with self._lock:
            chunks = self._chunks()
            self._look(chunks)
            if not self.reason:
                return False
            for place, chunk in enumerate(chunks[self._ended :], start=self._ended):
                if self._allows(place, chunk) and not self._has_ended(chunk):
                    return False
            return True

    def _allows(self, place: int, chunk: PlannedChunk) -> bool:
        """Return True if the chunk at position ``place`` of the plan may begin to train."""
        if self.reason:
            # After the decision, only chunks that were allowed to begin just before it may train.
            return place < self._ended - 1 + chunk.at_once
        return place - chunk.at_once < self._ended

    def _chunks(self) -> Sequence[PlannedChunk]:
        """Return the groups of trials that train together, in the order of the plan.

        With halving or the median rule, each batch of trials is one group.
        """
        if not self.in_rungs:
            return self.ledger.plan
        batches = groupby(self.ledger.candidates, batch_of)
        return [
            PlannedChunk(number, 0, tuple(c.number for c in batch), 1) for number, batch in batches
        ]

    def _has_ended(self, chunk: PlannedChunk) -> bool:
        return all(number in self.ledger.results for number in chunk.trials)

    def _look(self, chunks: Sequence[PlannedChunk]) -> None:
        """Judge the trials that have ended since the last call, until one trial ends the search."""
        while (
            not self.reason and self._ended < len(chunks) and self._has_ended(chunks[self._ended])
        ):
            self._trials.update(chunks[self._ended].trials)
            self._ended += 1
            self._count_trials(chunks)

    def _count_trials(self, chunks: Sequence[PlannedChunk]) -> None:
        """Judge trials in the order of their trial numbers, and stop at the first unfinished
        trial."""
        candidates = self.ledger.candidates
        while not self.reason and self._counted < len(candidates):
            number = candidates[self._counted].number
            if number not in self._trials and not self._is_without_chunk(number, chunks):
                return
            self._counted += 1
            self._count(number)

    def _is_without_chunk(self, number: int, chunks: Sequence[PlannedChunk]) -> bool:
        """Return True if a trial has a result but belongs to no group of the plan.

        A repaired study file may have lost its groups.
        """
        return number in self.ledger.results and not any(number in chunk.trials for chunk in chunks)

    def _count(self, number: int) -> None:
        """Compare a trial with the best trial so far, and set ``reason`` if the trial ends the
        search."""
        result = self.ledger.results[number]
        if result.state == "complete" and result.score > self._best:
            self._best = result.score
            self._since_best = 0
        elif result.state != "pruned" or math.isfinite(self._best):
            # A pruned trial is no worse than a best trial that does not exist yet.
            self._since_best += 1
        if self.target_score is not None and self._best >= self.target_score:
            target = option("target_score", Verbatim(f"{self.target_score:g}"))
            self.reason = f"trial {number} has reached the target score ({target})"
        elif self.patience_trials is not None and self._since_best >= self.patience_trials:
            trials = count(self._since_best, "trial")
            patience = option("patience_trials", self.patience_trials)
            self.reason = f"{trials} in a row were no better than the best before ({patience})"
