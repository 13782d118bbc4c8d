"""Successive halving: at several epochs, only the best share of the trials continues."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from gputune.ground.errors import InputError, check_count, option
from gputune.ground.types import Json
from gputune.methods.stopping import MIN_EPOCHS, Curves, StoppingRule, first_epoch
from gputune.tuning.rules import STOPPING, Rule

if TYPE_CHECKING:
    import numpy as np


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
        rungs: A list of epochs after which trials are compared, instead of ``min_epochs`` and its
            multiples.
        keep: With ``rungs`` and without ``factor``, the number of trials that continue after a
            rung, instead of the best 1/``factor``. ``Halving(rungs=[i], keep=k)`` trains all trials
            for i epochs and only the best k to the end (i-Epoch, Egele et al., 2024,
            arXiv:2404.04111).

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

    name = "halving"
    help = "at several epochs, only the best third of the trials continues"
    flags: ClassVar[Mapping[str, Rule]] = {
        "factor": Rule(
            "--factor <NUMBER>",
            "Factor by which each rung reduces the number of trials",
            "For --method halving. With 3, the best third continues.",
            "3",
            "number",
            group=STOPPING,
        ),
        "min_epochs": MIN_EPOCHS,
        "brackets": Rule(
            "--brackets <INT>",
            "Number of brackets",
            "For --method halving. Each bracket starts to prune one rung later than the bracket "
            "before it.",
            "1",
            "1..",
            group=STOPPING,
        ),
        "rungs": Rule(
            "--rungs <INT,...>",
            "Epochs after which trials are compared",
            "For --method halving, instead of --min-epochs.",
            "powers of --factor",
            "integers",
            group=STOPPING,
        ),
        "keep": Rule(
            "--keep <INT>",
            "Number of trials that continue after a rung",
            "For --method halving with --rungs, instead of --factor.",
            "the number of trials divided by --factor",
            "1..",
            group=STOPPING,
        ),
    }

    factor: float = 3
    min_epochs: int | None = None
    brackets: int = 1
    rungs: Sequence[int] | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int | float) or not 1 < self.factor < math.inf:  # True is 1
            raise InputError("Halving(factor=...)", "must be a finite number > 1", got=self.factor)
        check_count(self.min_epochs, "Halving(min_epochs=...)", none=True)
        check_count(self.brackets, "Halving(brackets=...)")
        check_count(self.keep, "Halving(keep=...)", none=True)
        if self.rungs is not None:
            self._check_rungs(self.rungs)
            object.__setattr__(self, "rungs", tuple(self.rungs))
            if self.keep is not None and self.factor != Halving.factor:
                raise InputError(
                    "Halving(factor=...)",
                    f"has no effect, because {option('keep', self.keep)} sets the number of trials "
                    "that continue",
                    got=self.factor,
                    remedy="Leave one out.",
                )
        elif self.keep is not None:
            raise InputError(
                "Halving(keep=...)",
                "needs the epochs after which trials are compared",
                got=self.keep,
                remedy=f"For example {option('rungs', [10])}.",
            )

    def _check_rungs(self, rungs: object) -> None:
        """Raise InputError if the option ``rungs`` is not a list of rising epochs, or if another
        option sets the rungs too."""
        is_list = isinstance(rungs, list | tuple) and len(rungs) > 0
        before = 0
        for rung in rungs if isinstance(rungs, list | tuple) else ():
            is_list = is_list and type(rung) is int and rung > before
            before = rung if is_list else before
        if not is_list:
            raise InputError(
                "Halving(rungs=...)",
                "must be a list of rising epochs, each at least 1",
                got=rungs,
                remedy="For example [10].",
            )
        if self.min_epochs is not None or self.brackets != 1:
            raise InputError(
                "Halving(rungs=...)",
                "sets all rungs, so min_epochs and brackets would have no effect",
                got=rungs,
                remedy="Leave them out.",
            )

    def bracket_rungs(self, max_epochs: int) -> list[list[int]]:
        """Return the epochs after which each bracket (group) of trials is compared, all below
        ``max_epochs``.

        These epochs are called rungs. The last bracket may have no rungs. Raises InputError if
        ``min_epochs`` is not below ``max_epochs``, or if there are too many brackets.
        """
        if self.rungs is not None:
            if self.rungs[-1] >= max_epochs:
                raise InputError(
                    "Halving(rungs=...)",
                    f"must be below {option('max_epochs', max_epochs)}",
                    got=self.rungs[-1],
                    remedy="Leave the rung out, or train longer.",
                )
            return [list(self.rungs)]
        epochs: list[int] = []
        rung = float(first_epoch("Halving", self.min_epochs, max_epochs, 27))
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
        return sorted(set().union(*self.bracket_rungs(max_epochs)))

    def to_json(self) -> Json:
        """Return the options as plain JSON, without ``rungs`` and ``keep`` if they are not set, so
        that older studies continue."""
        options = {"name": self.name, "factor": self.factor}
        options |= {"min_epochs": self.min_epochs, "brackets": self.brackets}
        if self.rungs is not None:
            options |= {"rungs": list(self.rungs), "keep": self.keep}
        return options

    def trials_to_stop(self, epoch: int, curves: Curves, max_epochs: int) -> set[int]:
        """Return the trial numbers of the trials that successive halving prunes after this epoch.

        These trials are not among the best trials of their bracket by mean validation score.
        """
        import numpy as np

        # By trial number, not by position: a repaired study may lack some trials.
        bracket_of = self.brackets_of(1 + max(curves, default=-1), max_epochs)
        stopped: set[int] = set()
        for bracket, rungs in enumerate(self.bracket_rungs(max_epochs)):
            if epoch not in rungs:
                continue
            means = {}
            for number in sorted(curves):
                if bracket_of[number] == bracket and len(curves[number]) >= epoch:
                    means[number] = float(curves[number][epoch - 1].mean())
            stays = survivors(np.array(list(means.values())), self.factor, self.keep)
            stopped.update(number for number, stay in zip(means, stays) if not stay)
        return stopped

    def brackets_of(self, n_trials: int, max_epochs: int) -> list[int]:
        """Return the index of the bracket (group with its own rungs) that each trial belongs to, in
        order of trial number.

        Every bracket gets about the same number of epochs in total.
        """
        import numpy as np

        shares = []
        for rungs in self.bracket_rungs(max_epochs):
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


def survivors(means: "np.ndarray", factor: float, keep: int | None = None) -> "np.ndarray":
    """Return a mask of the trials that continue after a comparison in successive halving, (C,) for
    C trials.

    The best ``keep`` trials continue, or the best 1/``factor`` of the trials if ``keep`` is None, by
    the mean validation scores ``means`` (C,). If this share is less than one trial, only the best
    trial continues. A trial with NaN never
    continues. In a tie, the earlier trial wins.
    """
    import numpy as np

    finite = np.isfinite(means)
    count = keep or max(1, int(len(means) / factor))
    count = min(int(finite.sum()), count)
    # The stable sort lets the earlier trial win a tie.
    best = np.argsort(np.where(finite, -means, np.inf), kind="stable")[:count]
    return np.isin(np.arange(len(means)), best)
