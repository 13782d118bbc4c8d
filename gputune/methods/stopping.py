"""Rules that stop trials early: successive halving and the median rule.

All trials (of a bracket) train together. After some epochs, a rule compares the mean validation
scores and decides which trials continue. The median rule is milder than successive halving.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gputune.errors import InputError, check_count
from gputune.executors.worker import Reports
from gputune.wording import option

Curves = Mapping[int, np.ndarray]
"""The scores of each trial so far, (epochs, F) with F folds, keyed by trial number. Ended trials
are included."""


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """Base class of the rules that stop trials early, with the methods of every rule."""

    def stops(self, max_epochs: int) -> list[int]:
        """Return the epochs after which the rule may stop trials, in order, all below
        ``max_epochs``.

        Raises InputError if the options leave no epoch for a decision.
        """
        raise NotImplementedError

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the trial numbers of the trials that the rule stops (prunes) after an epoch of
        ``stops``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Halving(StoppingRule):
    """Options of successive halving, for ``tune(method=...)`` and ``search(method=...)``.

    A rung is an epoch after which trials are compared. At each rung, the best 1/``factor`` of the
    trials continue. The other trials stop and are "pruned".

    Sources: Jamieson and Talwalkar (2016), arXiv:1502.07943. For brackets: Li et al. (2018),
    arXiv:1603.06560.

    Early rungs favor trials that learn fast at first: small batches, which take more steps per
    epoch, and large learning rates.

    Args:
        factor: From rung to rung, the number of trials is divided by this factor, and the epochs
            are multiplied by it. A finite number > 1 [default: 3].
        min_epochs: The number of epochs before the first rung, at least 1 and below ``max_epochs``.
            None means max(1, max_epochs // 27).
        brackets: The number of brackets, at least 1 [default: 1]. At most one more than the number
            of rungs. Bracket s has its first rung at min_epochs * factor**s, so that some trials
            are not compared early. Each bracket gets about the same number of epochs in total.

    Raises:
        InputError: An option is invalid. ``tune`` raises it if ``max_epochs`` is too small.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> halving = gputune.Halving(factor=2, min_epochs=1)
        >>> study = gputune.tune(
        ...     "mlp", X, y, method=halving, n_trials=8, max_epochs=4, verbose=0
        ... )
        >>> sum(trial.state == "complete" for trial in study.trials)  # 8 -> 4 -> 2
        2
    """

    factor: float = 3
    min_epochs: int | None = None
    brackets: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int | float) or not 1 < self.factor < math.inf:  # True is 1
            raise InputError("Halving(factor=...)", "must be a finite number > 1", got=self.factor)
        check_count(self.min_epochs, "Halving(min_epochs=...)", none=True)
        check_count(self.brackets, "Halving(brackets=...)")

    def rungs(self, max_epochs: int) -> list[list[int]]:
        """Return the epochs after which each bracket (group) of trials is compared, all below
        ``max_epochs``.

        These epochs are called rungs. The last bracket may have no rungs. Raises InputError if
        ``min_epochs`` is not below ``max_epochs``, or if there are too many brackets.
        """
        epochs: list[int] = []
        rung = float(_first_epoch(self, max_epochs, 27))
        while rung < max_epochs:
            # With a small factor, two rungs may be the same epoch after rounding down.
            if int(rung) not in epochs[-1:]:
                epochs.append(int(rung))
            rung *= self.factor
        if self.brackets > len(epochs) + 1:
            length = option("max_epochs", max_epochs)
            raise InputError(
                "Halving(brackets=...)",
                f"must be at most {len(epochs) + 1} for {length}, which has rungs at {epochs}",
                got=self.brackets,
                remedy="Use fewer brackets, or train longer.",
            )
        return [epochs[s:] for s in range(self.brackets)]

    def stops(self, max_epochs: int) -> list[int]:
        """Return all epochs after which successive halving compares trials of any bracket, in
        order."""
        return sorted(set().union(*self.rungs(max_epochs)))

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the trial numbers of the trials that successive halving prunes after this epoch.

        These trials are not among the best trials of their bracket by mean validation score.
        """
        # By trial number, not by position: a repaired study may lack some trials.
        bracket_of = self.brackets_of(1 + max(curves, default=-1), max_epochs)
        stopped: set[int] = set()
        for bracket, rungs in enumerate(self.rungs(max_epochs)):
            if epoch not in rungs:
                continue
            means = {}
            for number in sorted(curves):
                if bracket_of[number] == bracket and len(curves[number]) >= epoch:
                    means[number] = float(curves[number][epoch - 1].mean())
            stays = survivors(np.array(list(means.values())), self.factor)
            stopped.update(number for number, stay in zip(means, stays) if not stay)
        return stopped

    def brackets_of(self, n_trials: int, max_epochs: int) -> list[int]:
        """Return the index of the bracket (group with its own rungs) that each trial belongs to, in
        order of trial number.

        Every bracket gets about the same number of epochs in total.
        """
        shares = []
        for rungs in self.rungs(max_epochs):
            # Each stretch between two rungs trains 1/factor of the trials of the stretch before it.
            stretches = enumerate(pairwise([0, *rungs, max_epochs]))
            epochs_per_trial = sum((end - begin) / self.factor**i for i, (begin, end) in stretches)
            shares.append(1 / epochs_per_trial)
        ends = np.cumsum(shares)
        # The multiples of the golden ratio spread evenly over [0, 1). So any number of trials
        # splits by these shares, and additional trials do not move earlier ones to other brackets.
        places = (np.arange(n_trials) * (math.sqrt(5) - 1) / 2) % 1
        brackets: list[int] = np.searchsorted(ends / ends[-1], places, side="right").tolist()
        return brackets


def survivors(means: np.ndarray, factor: float) -> np.ndarray:
    """Return a mask of the trials that continue after a comparison in successive halving, (C,) for
    C trials.

    The best 1/``factor`` of the trials continue, by the mean validation scores ``means`` (C,). If
    this share is less than one trial, only the best trial continues. A trial with NaN never
    continues. In a tie, the earlier trial wins.
    """
    finite = np.isfinite(means)
    count = min(int(finite.sum()), max(1, int(len(means) / factor)))
    # The stable sort lets the earlier trial win a tie.
    best = np.argsort(np.where(finite, -means, np.inf), kind="stable")[:count]
    return np.isin(np.arange(len(means)), best)


@dataclass(frozen=True, kw_only=True)
class Median(StoppingRule):
    """Options of the median stopping rule, for ``tune(method=...)`` and ``search(method=...)``.

    A trial stops if its best mean validation score so far is below the median of all trials.

    Sources: Golovin et al. (2017), "Google Vizier", the median stopping rule; Optuna's
    MedianPruner, which also compares the best score so far with the median at the same step.

    Departure: trials that stopped earlier count in the median with their last mean validation
    score. All trials train at the same time, so there are no completed trials to compare with. A
    median of only the remaining trials would stop half of them each time.

    Early decisions favor trials that learn fast at first: small batches, which take more steps per
    epoch, and large learning rates.

    Args:
        min_epochs: The number of epochs before the first decision, at least 1 and below
            ``max_epochs``. None means max(1, max_epochs // 10).
        every: The number of epochs between two decisions, at least 1. None means the number before
            the first decision.
        min_trials: With fewer trials than this, no trial stops. At least 1 [default: 5].

    Raises:
        InputError: An option is invalid. ``tune`` raises it if ``max_epochs`` is too small.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> median = gputune.Median(min_epochs=1, every=1)
        >>> study = gputune.tune(
        ...     "mlp", X, y, method=median, n_trials=8, max_epochs=4, verbose=0
        ... )
        >>> sorted({trial.state for trial in study.trials})
        ['complete', 'pruned']
    """

    min_epochs: int | None = None
    every: int | None = None
    min_trials: int = 5

    def __post_init__(self) -> None:
        check_count(self.min_epochs, "Median(min_epochs=...)", none=True)
        check_count(self.every, "Median(every=...)", none=True)
        check_count(self.min_trials, "Median(min_trials=...)")

    def stops(self, max_epochs: int) -> list[int]:
        """Return the epochs after which the median rule compares trials, in order."""
        first = _first_epoch(self, max_epochs, 10)
        return list(range(first, max_epochs, self.every or first))

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the trial numbers of the trials that the median rule stops, because their best
        mean score is below the median.

        Trials that ended earlier stay ended. NaN, the score of a diverged trial, is worse than any
        finite score.
        """
        if len(curves) < self.min_trials:
            return set()
        last = []
        best = {}
        for number in sorted(curves):
            means = curves[number].mean(1)
            # A trial that stopped earlier counts with its last mean.
            last.append(means[:epoch][-1] if len(means) else -np.inf)
            if len(means) >= epoch:
                best[number] = np.max(means[:epoch])
        middle = float(np.median(np.where(np.isfinite(last), last, -np.inf)))
        return {number for number, mean in best.items() if not mean >= middle}


def ends_in_order(
    rule: StoppingRule, max_epochs: int, number: int, epoch: int, reports: Reports
) -> bool | None:
    """Return True if a stopping rule ends a trial of a custom training loop after ``epoch``
    reported values.

    The rule compares the trial with the trials that have lower trial numbers and have reported as
    many values. The result is successive halving without rounds, which ends a trial that the
    paper's version would pause (Li et al., 2020, arXiv:1810.05934), or the median rule of Vizier.
    Both published rules judge trials in the order in which they arrive. gputune judges trials in
    order of trial number. Therefore any number of workers, and a resumed search, prune the same
    trials.

    Returns None while a trial with a lower number still trains and has reported fewer values.
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
    """Return the epoch after which a rule first compares trials.

    Raises InputError if ``min_epochs`` is not below ``max_epochs``.
    """
    first = rule.min_epochs or max(1, max_epochs // part)
    if first >= max_epochs > 1:
        raise InputError(
            f"{type(rule).__name__}(min_epochs=...)",
            f"must be below {option('max_epochs', max_epochs)}",
            got=first,
            remedy="Lower it, or train longer.",
        )
    return first


STOPPING_RULES: Mapping[str, type[StoppingRule]] = {"halving": Halving, "median": Median}
"""The stopping rules by name. ``MethodWord`` lists the same names."""
