"""Random search, and rules that stop trials early.

All trials (of a bracket) train together. After some epochs, a rule compares the mean validation
scores and decides which trials continue.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gputune.ground.errors import InputError, option
from gputune.ground.text import count
from gputune.tuning.method import Method
from gputune.tuning.rules import STOPPING, Rule

if TYPE_CHECKING:
    import numpy as np

    from gputune.executors.worker import PruningRule, Reports
    from gputune.spaces.distributions import CheckedSpace
    from gputune.study.store import Candidate
    from gputune.study.study import Study
    from gputune.tuning.context import Context

MIN_EPOCHS = Rule(
    "--min-epochs <INT>",
    "Epochs before the first decision to stop trials",
    "For --method halving and median.",
    "1/27 of --epochs for halving; 1/10 for median",
    "1..",
    group=STOPPING,
)
"""The flag for the option ``min_epochs`` of the stopping rules."""

Curves = Mapping[int, "np.ndarray"]
"""The scores of each trial so far, (epochs, F) with F folds, keyed by trial number. Ended trials
are included."""


@dataclass(frozen=True)
class RandomSearch(Method):
    """Random search, the method of ``tune(method="random")``. It has no options."""

    name = "random"
    shares_trials = True

    def run(self, context: "Context", space: "CheckedSpace") -> None:
        """Train all trials of the study to their end."""
        from gputune.methods.training import train_batches

        train_batches(context)

    def to_json(self) -> str:
        """Return the name of the method."""
        return self.name


@dataclass(frozen=True, kw_only=True)
class StoppingRule(Method):
    """Base class of the methods that stop trials early.

    A rule defines ``stops`` and ``trials_to_stop``. The training is the same for all rules.
    """

    @property
    def compares_trials(self) -> bool:
        return True

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

    def check(
        self, context: "Context", space: "CheckedSpace", trials: "Sequence[Candidate]"
    ) -> None:
        """Raise InputError if trials cannot be compared while they train."""
        from gputune.methods.rungs import check_rungs

        check_rungs(self, context)

    def run(self, context: "Context", space: "CheckedSpace") -> None:
        """Train all trials of the study from stop to stop."""
        from gputune.methods.rungs import train_in_rungs

        train_in_rungs(context, self, context.ledger.candidates)

    def pruning_rule(self, max_epochs: int | None) -> "PruningRule":
        """Return the rule that ends the trials of a custom training loop early.

        Raises InputError if the rule would never decide.
        """
        if max_epochs is None:
            raise InputError(
                "max_epochs",
                "must be the number of times that a whole training calls report(value), because "
                f"{option('method', self.name)} decides at these calls",
                got=None,
            )
        self.stops(max_epochs)
        return partial(ends_in_order, self, max_epochs)

    @classmethod
    def summary(cls, study: "Study") -> list[tuple[str, str]]:
        """Return one line about the pruned trials."""
        return [(cls.name.capitalize(), pruning_text(study))]


def ends_in_order(
    rule: StoppingRule, max_epochs: int, number: int, epoch: int, reports: "Reports"
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


def first_epoch(name: str, min_epochs: int | None, max_epochs: int, part: int) -> int:
    """Return the epoch after which a rule first compares trials.

    The default is ``max_epochs // part``, but at least 1. Raises InputError if ``min_epochs`` is
    not below ``max_epochs``. ``name`` is the name of the rule's class.
    """
    first = min_epochs or max(1, max_epochs // part)
    if first >= max_epochs > 1:
        raise InputError(
            f"{name}(min_epochs=...)",
            f"must be below {option('max_epochs', max_epochs)}",
            got=first,
            remedy="Lower it, or train longer.",
        )
    return first


def pruning_text(study: "Study") -> str:
    """Return the rungs at which trials were pruned, and the saved share of training."""
    pruned = Counter(trial.detail["rung"] for trial in study.trials if trial.state == "pruned")
    if not pruned:
        return "no trial was pruned"
    rungs = ", ".join(f"{number} after epoch {rung}" for rung, number in sorted(pruned.items()))
    spent, full = study.spent
    share = f"{spent} of {full} trial-epochs were trained ({spent / max(1, full):.0%})"
    return f"of {count(len(study.trials), 'trial')} these were pruned: {rungs}; {share}"
