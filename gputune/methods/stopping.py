"""Rules that stop trials before their end: their options, when they decide, and who leaves.

All trials (of a bracket) train together; the fold means of their scores at an epoch decide which of
them go on. The median rule is milder than successive halving.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gputune.errors import InputError, check_count
from gputune.executors.worker import Reports

Curves = Mapping[int, np.ndarray]
"""The scores (epochs, F) so far of trials by their number, of those that have ended too."""


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """What a search asks of a rule."""

    def stops(self, max_epochs: int) -> list[int]:
        """Return the epochs at which it decides, in order, all below ``max_epochs``.

        Raises InputError where its options leave no room for one.
        """
        raise NotImplementedError

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the numbers of the trials that leave after an epoch of ``stops``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Halving(StoppingRule):
    """Options of ``tune(method=...)``: at each rung the best 1/``factor`` of the trials go on.

    Sources: Jamieson and Talwalkar (2016), arXiv:1502.07943; brackets: Li et al. (2018),
        arXiv:1603.06560.

    factor       what the number of trials is divided by, and the epochs multiplied by, from rung to
                 rung
    min_epochs   epochs before the first rung; None: max(1, max_epochs // 27)
    brackets     bracket s has its first rung at min_epochs * factor**s, so that some trials are not
                 judged early; every bracket gets about the same number of epochs to spend

    Early rungs favour what learns fast at first: small batches, which take more steps an epoch, and
    large rates.
    """

    factor: float = 3
    min_epochs: int | None = None
    brackets: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int | float) or not 1 < self.factor < math.inf:  # True is 1
            raise InputError(
                f"Halving(factor=...) must be a finite number > 1, got {self.factor!r}."
            )
        check_count(self.min_epochs, "Halving(min_epochs=...)", none=True)
        check_count(self.brackets, "Halving(brackets=...)")

    def rungs(self, max_epochs: int) -> list[list[int]]:
        """Return the epochs of each bracket's rungs, all below ``max_epochs``; the last brackets
        may have none.

        Raises InputError where ``min_epochs`` leaves no room, or there are more brackets than
        rungs.
        """
        epochs: list[int] = []
        rung = float(_first_epoch(self, max_epochs, 27))
        while rung < max_epochs:
            epochs += [int(rung)] * (int(rung) not in epochs[-1:])
            rung *= self.factor
        if self.brackets > len(epochs) + 1:
            raise InputError(
                f"Halving(brackets=...) must be at most {len(epochs) + 1} for "
                f"max_epochs={max_epochs}, which has rungs at {epochs}, got {self.brackets}; ask "
                "for fewer, or train longer."
            )
        return [epochs[s:] for s in range(self.brackets)]

    def stops(self, max_epochs: int) -> list[int]:
        return sorted({epoch for epochs in self.rungs(max_epochs) for epoch in epochs})

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the trials of each bracket with a rung here whose fold means are not among the
        best."""
        # By number and not by place: a study that was repaired may lack some.
        bracket_of = self.brackets_of(1 + max(curves, default=-1), max_epochs)
        leaving: set[int] = set()
        for bracket in (b for b, epochs in enumerate(self.rungs(max_epochs)) if epoch in epochs):
            reached = [
                n for n in sorted(curves) if bracket_of[n] == bracket and len(curves[n]) >= epoch
            ]
            stays = survivors(
                np.array([float(curves[n][epoch - 1].mean()) for n in reached]), self.factor
            )
            leaving |= {number for number, stay in zip(reached, stays) if not stay}
        return leaving

    def brackets_of(self, n_trials: int, max_epochs: int) -> list[int]:
        """Return the bracket of each trial, by its number: every bracket gets about the same number
        of epochs."""
        edges = [[0, *rungs, max_epochs] for rungs in self.rungs(max_epochs)]
        # The epochs that one trial of a bracket takes on average.
        costs = [
            sum((b - a) / self.factor**i for i, (a, b) in enumerate(zip(e[:-1], e[1:])))
            for e in edges
        ]
        shares = np.cumsum([1 / cost for cost in costs])
        # Of every run of trials, however long, about its share goes to each bracket: more trials
        # move no other.
        places = (np.arange(n_trials) * (math.sqrt(5) - 1) / 2) % 1
        brackets: list[int] = np.searchsorted(shares / shares[-1], places, side="right").tolist()
        return brackets


def survivors(means: np.ndarray, factor: float) -> np.ndarray:
    """Return which trials (C,) go on, by their fold means at a rung: the best 1/factor, one at
    least.

    NaN is never among them; the earlier trial wins a tie.
    """
    finite = np.isfinite(means)
    count = min(int(finite.sum()), max(1, int(len(means) / factor)))
    best = np.argsort(np.where(finite, -means, np.inf), kind="stable")[:count]
    return np.isin(np.arange(len(means)), best)


@dataclass(frozen=True, kw_only=True)
class Median(StoppingRule):
    """Options of ``tune(method=...)``: trials whose best fold mean is below the median of all
    leave.

    Sources: Golovin et al. (2017), "Google Vizier", the median stopping rule; Optuna's
    MedianPruner, which has the best so far against the median at the same step. Departure: trials
    that left before count in the median with the last fold mean they had. There are no earlier,
    completed trials to compare with where all train at the same time, and a median of those that
    are left would send half of them away each time.

    min_epochs   epochs before the first decision; None: max(1, max_epochs // 10)
    every        epochs between two decisions; None: as many as before the first
    min_trials   with fewer trials than this nobody leaves

    Early decisions favour what learns fast at first: small batches, which take more steps an epoch,
    and large rates.
    """

    min_epochs: int | None = None
    every: int | None = None
    min_trials: int = 5

    def __post_init__(self) -> None:
        check_count(self.min_epochs, "Median(min_epochs=...)", none=True)
        check_count(self.every, "Median(every=...)", none=True)
        check_count(self.min_trials, "Median(min_trials=...)")

    def stops(self, max_epochs: int) -> list[int]:
        first = _first_epoch(self, max_epochs, 10)
        return list(range(first, max_epochs, self.every or first))

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the trials whose best fold mean so far is below the median; those that ended
        earlier stay ended.

        NaN, of trials that have diverged, counts as worse than any number.
        """
        if len(curves) < self.min_trials:
            return set()
        means = {number: curves[number].mean(1) for number in sorted(curves)}
        last = np.array(
            [mean[min(epoch, len(mean)) - 1] if len(mean) else -np.inf for mean in means.values()]
        )
        middle = float(np.median(np.where(np.isfinite(last), last, -np.inf)))
        reached = {number: mean[:epoch] for number, mean in means.items() if len(mean) >= epoch}
        return {number for number, mean in reached.items() if not np.max(mean) >= middle}


def ends_in_order(
    rule: StoppingRule, max_epochs: int, number: int, epoch: int, reports: Reports
) -> bool | None:
    """Return whether a trial of a custom training loop, which has reported ``epoch`` values, ends
    there.

    The trial is compared with the trials that have lower numbers and have come as far. This is
    successive halving without rounds, which ends a trial that it would pause (Li et al., 2020,
    arXiv:1810.05934), and the median rule of Vizier. Both take the trials in the order in which
    they arrive. gputune takes them in order of number, so that any number of workers, and a resumed
    search, prune the same trials.

    Returns None as long as a trial with a lower number trains and has not come as far.
    """
    if epoch not in rule.stops(max_epochs):
        return False
    curves = {}
    for other, reported in reports.read(up_to=number).items():
        if not reported.ended and len(reported.values) < epoch:
            return None
        curves[other] = reported.values[:, None]
    return number in rule.trials_to_stop(epoch, curves, max_epochs)


def _first_epoch(rule: Halving | Median, max_epochs: int, part: int) -> int:
    """Return the epoch of the first decision. Raises InputError where ``min_epochs`` leaves no room
    for one."""
    first = rule.min_epochs or max(1, max_epochs // part)
    if first >= max_epochs > 1:
        raise InputError(
            f"{type(rule).__name__}(min_epochs=...) must be below max_epochs={max_epochs}, got "
            f"{first}; lower it, or train longer."
        )
    return first


STOPPING_RULES: Mapping[str, type[StoppingRule]] = {"halving": Halving, "median": Median}
"""By the word of each, which ``MethodWord`` has too."""
