"""The hypergradient search and its options.

A starting point is a configuration from which the search begins. The search changes its
hyperparameters so that the mean validation loss over the folds falls.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from gputune.ground.errors import InputError, Verbatim, check_count
from gputune.ground.text import count
from gputune.ground.types import HYPERPARAMETERS, Config
from gputune.tuning.method import Method
from gputune.tuning.rules import HYPERGRADIENTS, Rule

if TYPE_CHECKING:
    from torch import nn

    from gputune.engine.plan import Plan
    from gputune.spaces.distributions import CheckedSpace
    from gputune.study.store import Candidate
    from gputune.study.study import Study
    from gputune.tuning.context import Context
    from gputune.tuning.trainer import Trainer

_FIRST_STEP = 1.5
"""Length of the first step in the coordinates, for one value."""

_FIRST_OF_SEVERAL = 1.0
"""Length of the first step in the coordinates, for several values."""


@dataclass(frozen=True, kw_only=True)
class Hypergradient(Method):
    """Options of a hypergradient search, for ``tune(method=...)``.

    The search begins at several configurations. Each starting point follows the gradient of its
    mean validation loss over the folds. At every point, the model trains for ``max_epochs`` epochs.

    A step moves the logarithm of a value: a step of 1.0 multiplies or divides the value by e. For
    momentum and betas, the step moves the logit, log(p / (1 - p)), so that the value p stays
    between 0 and 1.

    Sources: Maclaurin et al. (2015), arXiv:1502.03492; Franceschi et al. (2017), arXiv:1703.01785.

    Args:
        outer_steps: The number of steps of each starting point, at least 1 [default: 10].
        hyperparameters: The hyperparameters to move: some of "lr", "momentum", "weight_decay",
            "beta1" and "beta2" [default: ("lr",)]. The solved logistic regression moves "C"
            instead.
        segments: The number of values of each hyperparameter over the training time, at least 1
            [default: 1]. Each value applies to an equal part of the training.
        per_layer: If True, each layer has its own value [default: False].
        step: The rule for a step. "sign" moves every value by its own step, which is halved when
            the sign of its slope flips (Riedmiller and Braun 1993; Micaelli and Storkey 2021).
            "normalized" moves all values along the slope, by a length that is divided by ten when
            the loss rises.
        first_step: The length of the first step, in the logarithm of a value (in the logit for
            momentum and betas), above 0. None means 1.5 for one value and 1.0 for several.
        smallest_step: A starting point ends when all its steps are shorter than this. Above 0 and
            at most ``first_step`` [default: 0.05].

    Raises:
        InputError: An option is invalid.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> method = gputune.Hypergradient(outer_steps=3)
        >>> study = gputune.tune(
        ...     "mlp", X, y, method=method, n_trials=1, max_epochs=3, verbose=0
        ... )
        >>> [trial.origin for trial in study.trials]  # (starting point, outer step)
        [(0, 0), (0, 1), (0, 2), (0, 3)]
    """

    name = "hypergradient"
    differentiates = True
    help = "each random configuration follows the gradient of its validation loss"
    ends_single_trials = False
    flags: ClassVar[Mapping[str, Rule]] = {
        "hyperparameters": Rule(
            "--descend-on <NAME,...>",
            "Hyperparameters that follow their gradient",
            "For --method hypergradient.",
            "lr",
            "names",
            values=(*HYPERPARAMETERS, "C (of the solved logistic regression)"),
            group=HYPERGRADIENTS,
        ),
        "outer_steps": Rule(
            "--outer-steps <INT>",
            "Steps from each starting point",
            "For --method hypergradient.",
            "10",
            "1..",
            group=HYPERGRADIENTS,
        ),
        "segments": Rule(
            "--segments <INT>",
            "Number of successive values of each hyperparameter during one training run",
            "For --method hypergradient.",
            "1",
            "1..",
            group=HYPERGRADIENTS,
        ),
        "per_layer": Rule(
            "--per-layer",
            "Use separate values for each layer",
            "For --method hypergradient.",
            group=HYPERGRADIENTS,
        ),
    }

    outer_steps: int = 10
    hyperparameters: Sequence[str] = ("lr",)
    segments: int = 1
    per_layer: bool = False
    step: Literal["sign", "normalized"] = "sign"
    first_step: float | None = None
    smallest_step: float = 0.05

    def __post_init__(self) -> None:
        names = self.hyperparameters
        names = (names,) if isinstance(names, str) else tuple(names)
        object.__setattr__(self, "hyperparameters", names)
        choices = (*HYPERPARAMETERS, "C")
        if not names or len(set(names)) < len(names) or not set(names) <= set(choices):
            raise InputError(
                "Hypergradient(hyperparameters=...)",
                f"must be some of {', '.join(choices)}, each once",
                got=names,
            )
        check_count(self.outer_steps, "Hypergradient(outer_steps=...)")
        check_count(self.segments, "Hypergradient(segments=...)")
        if not isinstance(self.per_layer, bool):
            raise InputError(
                "Hypergradient(per_layer=...)", "must be True or False", got=self.per_layer
            )
        if self.step not in ("sign", "normalized"):
            raise InputError(
                "Hypergradient(step=...)", "must be 'sign' or 'normalized'", got=self.step
            )
        for name in ("first_step", "smallest_step"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise InputError(
                    f"Hypergradient({name}=...)", "must be a finite number > 0", got=value
                )
        several = len(names) > 1 or self.segments > 1 or self.per_layer
        first = self.first_length(several=several)
        if self.smallest_step > first:
            raise InputError(
                "Hypergradient(smallest_step=...)",
                "must be at most the first step, because otherwise no starting point moves twice",
                got=Verbatim(f"smallest_step={self.smallest_step:g} and a first step of {first:g}"),
                remedy="For example smallest_step=0.05.",
            )

    def first_length(self, *, several: bool) -> float:
        """Return the length of the first step, which has another default for several values."""
        return self.first_step or (_FIRST_OF_SEVERAL if several else _FIRST_STEP)

    @property
    def trainings_per_trial(self) -> int:
        """Each starting point is trained once, and once more after each step."""
        return self.outer_steps + 1

    def check(
        self, context: "Context", space: "CheckedSpace", trials: "Sequence[Candidate]"
    ) -> None:
        """Raise InputError if the search cannot move the starting points."""
        from gputune.methods.descent import check_descent

        check_descent(self, trials, context)

    def run(self, context: "Context", space: "CheckedSpace") -> None:
        """Move all starting points of the study at the same time, step by step."""
        from gputune.methods.descent import descend

        descend(context, space, self)

    def pruning_rule(self, max_epochs: int | None) -> None:
        """Raise InputError, because an objective cannot be differentiated."""
        raise InputError(
            "method='hypergradient'",
            "is only for gputune.tune, because gputune.search cannot differentiate your objective",
            remedy="Choose 'random', 'halving', 'median' or gputune.OptunaSampler(...).",
        )

    def plan(self, context: "Context", configs: Sequence[Config]) -> "Plan":
        """Return the plan of the first points of the search."""
        from gputune.methods.descent import plan_points

        plan, _ = plan_points(self, configs, "exact", context)
        return plan

    def complete(self, config: Config) -> Config:
        """Return a configuration with Adam's betas, which a step may change."""
        from gputune.optimizers.rules import BETA1, BETA2

        return {"beta1": BETA1, "beta2": BETA2, **config}

    def retrain(self, trainer: "Trainer", config: Config, epochs: int) -> "nn.Module":
        """Train one point of the search again, with a value for each segment and layer."""
        from gputune.hypergradients.chunk import HypergradientJob, train_scheduled

        (chunk,) = trainer.groups([config])
        job = trainer.job(
            HypergradientJob,
            epochs=epochs,
            hyperparameters=tuple(self.hyperparameters),
            segments=self.segments,
            per_layer=self.per_layer,
        )
        return train_scheduled(job, trainer.data, chunk)

    @classmethod
    def summary(cls, study: "Study") -> list[tuple[str, str]]:
        """Return a line about the hyperparameters, the starting points and the steps."""
        method = study.record.method
        steps = 0 if isinstance(method, str) else int(method["outer_steps"])
        return [("Method", _descent(study, steps))]


def _descent(study: "Study", outer_steps: int) -> str:
    """Return the text about a hypergradient search: its hyperparameters, starting points and
    steps."""
    n_starts = sum(trial.origin[1] == 0 for trial in study.trials)
    names = ", ".join(study.record.changed_hyperparameters)
    text = (
        f"hypergradient search on {names} from {count(n_starts, 'starting point')}, at most "
        f"{count(outer_steps, 'outer step')} each"
    )
    events = {
        "chaotic": "the slope was noise",
        "differences": "the slope was estimated by finite differences with wide steps",
    }
    for name, event in events.items():
        n_points = study.guarded[name]
        if n_points > 0:
            text = f"{text}; {event} at {count(n_points, 'point')}"
    return text
