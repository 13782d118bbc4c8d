"""Population based training: its options, and the decision which trial copies which other trial.

All trials train together. After some epochs, the worst trials copy the weights and hyperparameters
of the best trials and perturb the hyperparameters. A subpopulation is a group of trials that are
compared with each other after the same epochs.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gputune.errors import InputError, check_count
from gputune.seeding import stream_seed
from gputune.spaces.distributions import is_real
from gputune.spaces.perturbation import Perturbation
from gputune.wording import option


@dataclass(frozen=True, kw_only=True)
class PopulationBased:
    """Options of population based training, for ``tune(method=...)``.

    Every ``interval`` epochs, the trials are ranked by their mean validation score. Each trial in
    the worst quarter copies a randomly drawn trial in the best quarter: its parameters, the state
    of its optimizer, and its hyperparameters. Fold k copies fold k, so no member has seen its own
    validation rows. Then the copy perturbs the learning rate, weight decay, momentum, dropout,
    label smoothing and rate factors that the space has. Values stay within the bounds of the space.

    A trial copies only a trial with the same architecture: equal shapes of all tensors, and equal
    ``module__*`` values. If the best quarter has no such trial, the trial only perturbs its values.

    The result of a trial is one training run with a schedule of hyperparameters,
    ``trial.schedule``. The learning curve of a trial begins with the curve of the trials that it
    descends from. ``best_model()`` repeats the schedule of the best trial.

    Sources: Jaderberg et al. (2017), arXiv:1711.09846. With several intervals: Doulazmi et al.
    (2025), "Multiple-Frequencies Population-Based Training", arXiv:2506.03225.

    Args:
        interval: The number of epochs between two comparisons, at least 1 and below ``max_epochs``
            [default: 5]. A list has one number for each subpopulation: trial i belongs to
            subpopulation i modulo the length of the list. Each subpopulation is compared at its own
            interval. The trials just above its worst quarter then copy better trials of other
            subpopulations. From a subpopulation with a longer interval they copy the weights and
            the hyperparameters. From a subpopulation with a shorter interval they copy only the
            weights, because a short interval favors hyperparameters that help only for a few
            epochs.
        fraction: The share of trials that copy, and the share that they copy from, from 0 to 0.5
            [default: 0.25]. The number of trials is rounded up. With 0, the search is a random
            search.
        factors: A number is multiplied by one of these factors, which is drawn [default: (0.8,
            1.25)]. In a sorted list of numbers, the value moves to the next higher or lower number.
        resample: The probability that a value is drawn from the space instead, from 0 to 1
            [default: 0.25].
        explore: False copies without perturbing, as a control: the gain is then due only to the
            selection of lucky trials [default: True].
        burn_in: The number of epochs before the first comparison, at least 0 [default: 0].

    Raises:
        InputError: An option is invalid. ``tune`` raises it if ``max_epochs`` is too small.

    Example:
        >>> from gputune.methods.population import PopulationBased
        >>> method = PopulationBased(interval=2, fraction=0.5)
        >>> method.exchange_epochs(max_epochs=7)
        [2, 4, 6]
    """

    interval: int | Sequence[int] = 5
    fraction: float = 0.25
    factors: Sequence[float] = (0.8, 1.25)
    resample: float = 0.25
    explore: bool = True
    burn_in: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        self._check_intervals(f"{name}(interval=...)")
        if not is_real(self.fraction) or not 0 <= self.fraction <= 0.5:
            rule = "must be a number from 0 to 0.5"
            raise InputError(f"{name}(fraction=...)", rule, got=self.fraction)
        self._check_factors(f"{name}(factors=...)")
        if not is_real(self.resample) or not 0 <= self.resample <= 1:
            rule = "must be a number from 0 to 1"
            raise InputError(f"{name}(resample=...)", rule, got=self.resample)
        if not isinstance(self.explore, bool):
            raise InputError(f"{name}(explore=...)", "must be True or False", got=self.explore)
        check_count(self.burn_in, f"{name}(burn_in=...)", least=0)

    def _check_intervals(self, name: str) -> None:
        """Raise InputError for invalid intervals."""
        if not isinstance(self.interval, list | tuple):
            check_count(self.interval, name)
            return
        for interval in self.interval:
            check_count(interval, name)
        if not self.interval or len(set(self.interval)) < len(self.interval):
            raise InputError(
                name,
                "must be a number of epochs, or a list of different numbers of epochs",
                got=self.interval,
                remedy="For example [2, 8].",
            )

    def _check_factors(self, name: str) -> None:
        """Raise InputError for invalid factors."""
        are_numbers = isinstance(self.factors, list | tuple) and all(map(is_real, self.factors))
        if not are_numbers or not self.factors or not all(0 < f < math.inf for f in self.factors):
            raise InputError(
                name,
                "must be a list of finite numbers > 0",
                got=self.factors,
                remedy="For example (0.8, 1.25).",
            )

    @property
    def intervals(self) -> tuple[int, ...]:
        """The interval of each subpopulation, in epochs."""
        return tuple(self.interval) if isinstance(self.interval, Sequence) else (self.interval,)

    @property
    def perturbation(self) -> Perturbation:
        """The way in which a copy changes its hyperparameters."""
        return Perturbation(self.factors, self.resample)

    def is_compared(self, subpopulation: int, epoch: int) -> bool:
        """Return whether the trials of a subpopulation are compared after ``epoch`` epochs."""
        return epoch >= self.burn_in and epoch % self.intervals[subpopulation] == 0

    def exchange_epochs(self, max_epochs: int) -> list[int]:
        """Return the epochs after which trials of any subpopulation are compared, in order, all
        below ``max_epochs``.

        Raises InputError if an interval leaves no epoch for a comparison.
        """
        for interval in self.intervals:
            # the first multiple of the interval that burn_in allows
            first = interval * max(1, math.ceil(self.burn_in / interval))
            if first >= max_epochs > 1:
                name = "interval" if interval >= max_epochs else "burn_in"
                raise InputError(
                    f"PopulationBased({name}=...)",
                    f"must leave a comparison below {option('max_epochs', max_epochs)}",
                    got=getattr(self, name),
                    remedy="Lower it, or train longer.",
                )
        epochs = []
        for epoch in range(1, max_epochs):
            if any(self.is_compared(group, epoch) for group in range(len(self.intervals))):
                epochs.append(epoch)
        return epochs

    def n_exchanged(self, n_trials: int) -> int:
        """Return the number of trials of a subpopulation that copy at a comparison."""
        return min(n_trials // 2, math.ceil(self.fraction * n_trials))


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
    method: PopulationBased,
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

    method: PopulationBased
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
    # NumPy takes 32-bit words
    return np.random.RandomState([key >> 32, key & 0xFFFFFFFF])
