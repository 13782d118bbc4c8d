"""Population based training and its options.

All trials train together. After some epochs, the worst trials copy the weights and hyperparameters
of the best trials and perturb the hyperparameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gputune.ground.errors import InputError, check_count, option
from gputune.tuning.method import Method
from gputune.tuning.rules import POPULATION, Rule

if TYPE_CHECKING:
    from gputune.spaces.distributions import CheckedSpace
    from gputune.spaces.perturbation import Perturbation
    from gputune.study.store import Candidate
    from gputune.study.study import Study
    from gputune.tuning.context import Context


@dataclass(frozen=True, kw_only=True)
class PopulationBased(Method):
    """Options of population based training, for ``tune(method=...)``.

    Every ``interval`` epochs, the trials are ranked by their mean validation score. Each trial in
    the worst quarter copies a randomly drawn trial in the best quarter: its parameters, the state
    of its optimizer, and its hyperparameters. Fold k copies fold k, so no member has seen its own
    validation rows. Then the copy perturbs the learning rate, weight decay, momentum, dropout,
    label smoothing and rate factors that the space has, and the batch size of the built-in models.
    Values stay within the bounds of the space.

    A trial copies only a trial with the same architecture: equal shapes of all tensors, and equal
    ``module__*`` values. The optimizer has tensors too, so the optimizers must be equal, and the
    values of ``momentum``, ``ema`` and ``clip_norm`` must be on or off in both trials. If the best
    quarter has no such trial, the trial only perturbs its values.
    The trial with the best score of all epochs is not replaced, so the best score never falls.

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
            epochs. These copies are perturbed, too.
        fraction: The share of trials that copy, and the share that they copy from, from 0 to 0.5
            [default: 0.25]. The number of trials is rounded up. With 0, the search is a random
            search.
        factors: A number is multiplied by one of these factors, which is drawn [default: (0.8,
            1.25)]. In a sorted list of numbers, the value moves to the next higher or lower number.
        resample: The probability that a value is drawn from the space instead, from 0 to 1
            [default: 0.25].
        explore: False copies without perturbing, as a control [default: True]. All trials share
            their random numbers, so such a copy repeats the trial that it has copied.
        burn_in: The number of epochs before the first comparison, at least 0 [default: 0].

    Raises:
        InputError: An option is invalid. ``tune`` raises it if ``max_epochs`` is too small.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> pbt = gputune.PopulationBased(interval=2)
        >>> study = gputune.tune("mlp", X, y, method=pbt, n_trials=8, max_epochs=6, verbose=0)
        >>> sorted(study.best_trial.schedule[0])  # the configuration from epoch 0 on
        ['batch_size', 'lr', 'weight_decay', 'width']
    """

    name = "pbt"
    about_length = (
        "compares all trials after the same number of epochs, so none of them can end early"
    )
    help = "every few epochs, the worst trials copy the best trials, with perturbed values"
    ends_single_trials = False
    flags: ClassVar[Mapping[str, Rule]] = {
        "interval": Rule(
            "--interval <INT,...>",
            "Epochs between two comparisons of all trials",
            "For --method pbt. Each number makes one subpopulation.",
            "5",
            "integers",
            group=POPULATION,
        ),
        "fraction": Rule(
            "--fraction <SHARE>",
            "Share of all trials that copy another trial",
            "For --method pbt. From 0 to 0.5. The same share of trials is copied.",
            "0.25",
            "number",
            group=POPULATION,
        ),
        "factors": Rule(
            "--factors <NUM,...>",
            "Factors by which a copy changes a number; one is drawn for each number",
            "For --method pbt. In a sorted list of numbers, a factor above 1 chooses the next higher "
            "number, and any other factor the next lower number.",
            "0.8,1.25",
            "numbers",
            group=POPULATION,
        ),
        "resample": Rule(
            "--resample <SHARE>",
            "Probability that a copy draws a new value from the space, instead of changing it slightly",
            "For --method pbt.",
            "0.25",
            "number",
            group=POPULATION,
        ),
        "explore": Rule(
            "--explore",
            "Perturb the hyperparameters of a copy",
            "For --method pbt. --no-explore only copies, for comparison.",
            "yes",
            "yes or no",
            group=POPULATION,
        ),
        "burn_in": Rule(
            "--burn-in <INT>",
            "Epochs before the first comparison",
            "For --method pbt.",
            "0",
            "0..",
            group=POPULATION,
        ),
    }

    interval: int | Sequence[int] = 5
    fraction: float = 0.25
    factors: Sequence[float] = (0.8, 1.25)
    resample: float = 0.25
    explore: bool = True
    burn_in: int = 0

    def __post_init__(self) -> None:
        from gputune.spaces.distributions import is_real

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
        # Tuples, so that the method of a study file is equal to this one.
        object.__setattr__(self, "factors", tuple(self.factors))
        intervals = self.intervals
        interval = intervals[0] if len(intervals) == 1 else intervals
        object.__setattr__(self, "interval", interval)

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
        from gputune.spaces.distributions import is_real

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
    def perturbation(self) -> "Perturbation":
        """The way in which a copy changes its hyperparameters."""
        from gputune.spaces.perturbation import Perturbation

        return Perturbation(self.factors, self.resample)

    def is_compared(self, subpopulation: int, epoch: int) -> bool:
        """Return whether the trials of a subpopulation are compared after ``epoch`` epochs."""
        return epoch >= self.burn_in and epoch % self.intervals[subpopulation] == 0

    def _first_comparison(self, interval: int) -> int:
        """Return the first multiple of an interval that ``burn_in`` allows, in epochs."""
        return interval * max(1, math.ceil(self.burn_in / interval))

    def stops(self, max_epochs: int) -> list[int]:
        """Return the epochs after which trials of any subpopulation are compared, in order, all
        below ``max_epochs``.

        Raises InputError if an interval leaves no epoch for a comparison.
        """
        for interval in self.intervals:
            if self._first_comparison(interval) >= max_epochs:
                name = "interval" if interval >= max_epochs else "burn_in"
                is_lowest = getattr(self, name) == 1
                raise InputError(
                    f"PopulationBased({name}=...)",
                    f"must leave a comparison below {option('max_epochs', max_epochs)}",
                    got=getattr(self, name),
                    remedy="Train longer." if is_lowest else "Lower it, or train longer.",
                )
        epochs = []
        for epoch in range(1, max_epochs):
            if any(self.is_compared(group, epoch) for group in range(len(self.intervals))):
                epochs.append(epoch)
        return epochs

    def n_exchanged(self, n_trials: int) -> int:
        """Return the number of trials of a subpopulation that copy at a comparison."""
        return min(n_trials // 2, math.ceil(self.fraction * n_trials))

    @property
    def compares_trials(self) -> bool:
        return True

    def check(
        self, context: "Context", space: "CheckedSpace", trials: "Sequence[Candidate]"
    ) -> None:
        """Raise InputError if trials cannot copy each other while they train."""
        if context.choice.solved:
            raise InputError(
                "method='pbt'",
                "copies trials while they train, but the solved logistic regression does not train",
                remedy=f"Pass {option('optimizer', 'adamw')} or {option('method', 'random')}.",
            )
        self.stops(context.epochs)

    def run(self, context: "Context", space: "CheckedSpace") -> None:
        """Train all trials of the study from comparison to comparison."""
        from gputune.methods.lineages import train_population

        train_population(context, self, space, context.ledger.candidates)

    def pruning_rule(self, max_epochs: int | None) -> None:
        """Raise InputError, because the state of a custom training loop cannot be copied."""
        raise InputError(
            "method='pbt'",
            "is only for gputune.tune, because gputune.search cannot copy the weights of your own "
            "training loop",
            remedy="Choose 'random', 'halving', 'median' or gputune.OptunaSampler(...).",
        )

    @classmethod
    def summary(cls, study: "Study") -> list[tuple[str, str]]:
        """Return one line about the copies, and one about the schedule of the best trial."""
        from gputune.study.study import best_trial

        n_copies = 0
        for trial in study.trials:
            n_copies += len(trial.detail.get("copies", ()))
        times = "once" if n_copies == 1 else f"{n_copies} times"
        copies = f"a trial has copied a better trial {times}"
        if not n_copies:
            copies = "no trial has copied another trial"
        lines = [("Copies", copies)]
        best = best_trial(study)
        schedule = {} if best is None else best.schedule_to_best
        if len(schedule) > 1:
            first, *later = schedule
            start = schedule[first]
            changed: set[str] = set()
            for params in schedule.values():
                changed.update(key for key, value in params.items() if value != start.get(key))
            names = ", ".join(sorted(changed))
            epochs = ", ".join(map(str, later))
            lines.append(("Schedule", f"the best trial changes {names} after epoch {epochs}"))
        return lines
