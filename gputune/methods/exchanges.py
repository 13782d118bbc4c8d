"""The decision which trial copies which other trial, in population based training.

A subpopulation is a group of trials that are compared with each other after the same epochs.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from gputune.ground.seeding import stream_seed
from gputune.spaces.perturbation import Perturbation


class ExchangeRule(Protocol):
    """The options of population based training. See ``PopulationBased``."""

    @property
    def explore(self) -> bool: ...

    @property
    def intervals(self) -> tuple[int, ...]: ...

    @property
    def perturbation(self) -> Perturbation: ...

    def is_compared(self, subpopulation: int, epoch: int) -> bool: ...

    def stops(self, max_epochs: int) -> list[int]: ...

    def n_exchanged(self, n_trials: int) -> int: ...


@dataclass(frozen=True)
class Exchange:
    """A change of one trial at a comparison.

    Attributes:
        number: the trial number.
        weights: the trial number from which the weights and the optimizer's state come. It is equal
            to ``number`` if the trial keeps its own.
        values: the trial number from which the movable hyperparameters come.
        is_perturbed: True if these hyperparameters are then perturbed.
    """

    number: int
    weights: int
    values: int
    is_perturbed: bool


def exchanges(
    method: ExchangeRule,
    epoch: int,
    means: Mapping[int, float],
    shapes: Mapping[int, Hashable],
    seed: int,
    protected: int | None = None,
) -> list[Exchange]:
    """Return the changes of trials after an epoch, in order of trial number.

    All sources are the trials before the comparison. The random numbers depend only on the seed,
    the epoch and the trial number.

    Args:
        method: The options.
        epoch: The number of finished epochs.
        means: The mean validation score after this epoch, by trial number. NaN is the worst score.
        shapes: A key for the architecture of each trial, by trial number. Trials with equal keys
            can copy each other.
        seed: The random seed of the search.
        protected: The number of a trial that does not change, or None. If it is among the worst
            trials, the next worse trial changes instead.
    """
    comparison = _Comparison(method, epoch, means, shapes, seed, protected, method.intervals)
    changes = []
    for subpopulation in range(len(comparison.intervals)):
        if method.is_compared(subpopulation, epoch):
            changes += comparison.copies(subpopulation)
            changes += comparison.migrations(subpopulation)
    return sorted(changes, key=lambda change: change.number)


@dataclass(frozen=True)
class _Comparison:
    """The scores and architectures of all trials after an epoch. See ``exchanges``."""

    method: ExchangeRule
    epoch: int
    means: Mapping[int, float]
    shapes: Mapping[int, Hashable]
    seed: int
    protected: int | None
    intervals: tuple[int, ...]

    def copies(self, subpopulation: int) -> list[Exchange]:
        """Return the changes of the worst trials of a subpopulation, which copy its best trials."""
        ranking = self._ranking(subpopulation)
        n_copies = self.method.n_exchanged(len(ranking))
        explore = self.method.explore
        sources_by_shape = defaultdict(list)
        for number in ranking[:n_copies]:
            if math.isfinite(self.means[number]):
                sources_by_shape[self.shapes[number]].append(number)
        changes = []
        for number in self._replaceable(ranking, n_copies)[:n_copies]:
            sources = sources_by_shape[self.shapes[number]]
            if sources:
                draw = stream_seed(self.seed, "population", "source", self.epoch, number)
                source = sources[draw % len(sources)]
                changes.append(Exchange(number, source, source, explore))
            elif explore and math.isfinite(self.means[number]):
                changes.append(Exchange(number, number, number, True))
        return changes

    def migrations(self, subpopulation: int) -> list[Exchange]:
        """Return the changes of the trials just above the worst trials of a subpopulation.

        Each copies the best trial of the other subpopulations, if that trial is better. No two
        copy the same trial.
        """
        changes: list[Exchange] = []
        if len(self.intervals) == 1:
            return changes
        ranking = self._ranking(subpopulation)
        n_copies = self.method.n_exchanged(len(ranking))
        candidates = []
        for number in self._whole_ranking:
            if self._subpopulation(number) != subpopulation:
                candidates.append(number)
        # best first, so that the best trial of the group copies the best source
        for number in reversed(self._replaceable(ranking, n_copies)[n_copies : 2 * n_copies]):
            sources = [other for other in candidates if self._can_copy(number, other)]
            if not sources or not self._is_better(sources[0], number):
                continue
            source = sources[0]
            candidates.remove(source)
            values = source
            if self.intervals[self._subpopulation(source)] < self.intervals[subpopulation]:
                values = next(own for own in ranking if self._can_copy(number, own, itself=True))
            changes.append(Exchange(number, source, values, self.method.explore))
        return changes

    def _replaceable(self, ranking: Sequence[int], n_copies: int) -> list[int]:
        """Return the trials of a subpopulation that may be replaced, worst first.

        The best ``n_copies`` trials stay, because others copy them.
        """
        worst_first = list(reversed(ranking[n_copies:]))
        return [number for number in worst_first if number != self.protected]

    def _subpopulation(self, number: int) -> int:
        return number % len(self.intervals)

    @cached_property
    def _whole_ranking(self) -> list[int]:
        """The trials of all subpopulations, best first.

        In a tie, the trial with the lower number comes first.
        """
        return sorted(sorted(self.means), key=self._loss)

    def _ranking(self, subpopulation: int) -> list[int]:
        """Return the trials of a subpopulation, best first."""
        if len(self.intervals) == 1:
            return self._whole_ranking
        ranking = []
        for number in self._whole_ranking:
            if self._subpopulation(number) == subpopulation:
                ranking.append(number)
        return ranking

    def _loss(self, number: int) -> float:
        mean = self.means[number]
        return -mean if math.isfinite(mean) else math.inf

    def _is_better(self, number: int, other: int) -> bool:
        return self._loss(number) < self._loss(other)

    def _can_copy(self, number: int, source: int, *, itself: bool = False) -> bool:
        """Return whether a trial can copy another trial, or with ``itself`` also its own values."""
        if source == number:
            return itself
        return self.shapes[number] == self.shapes[source] and math.isfinite(self.means[source])


def generator(
    seed: int, purpose: str, epoch: int, number: int, bits: np.random.PCG64 | None = None
) -> np.random.RandomState:
    """Return the random generator of one trial at one comparison.

    The generator draws from ``bits``, which then belongs to this trial. A new PCG64 takes ten times
    as long.
    """
    key = stream_seed(seed, "population", purpose, epoch, number)
    bits = np.random.PCG64(0) if bits is None else bits
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": key << 64 | key, "inc": key << 1 | 1},  # an increment is odd
        "has_uint32": 0,
        "uinteger": 0,
    }
    # The default generator of RandomState takes ten times as long to make.
    return np.random.RandomState(bits)
