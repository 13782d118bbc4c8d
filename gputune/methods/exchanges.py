"""The decision which trial copies which other trial, in population based training.

A subpopulation is a group of trials that are compared with each other after the same epochs.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gputune.seeding import stream_seed
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
    """
    comparison = _Comparison(method, epoch, means, shapes, seed)
    changes = []
    for subpopulation in range(len(method.intervals)):
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

    def copies(self, subpopulation: int) -> list[Exchange]:
        """Return the changes of the worst trials of a subpopulation, which copy its best trials."""
        ranking = self._ranking(subpopulation)
        n_copies = self.method.n_exchanged(len(ranking))
        explore = self.method.explore
        changes = []
        for number in ranking[len(ranking) - n_copies :]:
            sources = [other for other in ranking[:n_copies] if self._can_copy(number, other)]
            if sources:
                rng = generator(self.seed, "source", self.epoch, number)
                source = sources[rng.randint(len(sources))]
                changes.append(Exchange(number, source, source, explore))
            elif explore and math.isfinite(self.means[number]):
                changes.append(Exchange(number, number, number, True))
        return changes

    def migrations(self, subpopulation: int) -> list[Exchange]:
        """Return the changes of the trials just above the worst trials of a subpopulation.

        Each copies the best trial of the other subpopulations, if that trial is better. No two
        copy the same trial.
        """
        ranking = self._ranking(subpopulation)
        n_copies = self.method.n_exchanged(len(ranking))
        end = len(ranking) - n_copies
        candidates = []
        for number in self._ranking(None):
            if self._subpopulation(number) != subpopulation:
                candidates.append(number)
        changes = []
        for number in ranking[max(n_copies, end - n_copies) : end]:
            sources = [other for other in candidates if self._can_copy(number, other)]
            if not sources or not self._is_better(sources[0], number):
                continue
            source = sources[0]
            candidates.remove(source)
            intervals = self.method.intervals
            values = source
            if intervals[self._subpopulation(source)] < intervals[subpopulation]:
                values = next(own for own in ranking if self._can_copy(number, own, itself=True))
            changes.append(Exchange(number, source, values, False))
        return changes

    def _subpopulation(self, number: int) -> int:
        return number % len(self.method.intervals)

    def _ranking(self, subpopulation: int | None) -> list[int]:
        """Return the trials of a subpopulation, or all trials, best first.

        In a tie, the trial with the lower number comes first.
        """
        numbers = []
        for number in sorted(self.means):
            if subpopulation in (None, self._subpopulation(number)):
                numbers.append(number)
        return sorted(numbers, key=self._loss)

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


def generator(seed: int, purpose: str, epoch: int, number: int) -> np.random.RandomState:
    """Return the random generator of one trial at one comparison."""
    key = stream_seed(seed, "population", purpose, epoch, number)
    # The default generator of RandomState takes ten times as long to make.
    return np.random.RandomState(np.random.PCG64(key))
