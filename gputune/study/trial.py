"""A trial: one configuration of a search, with its cross-validated result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gputune.study.rows import Result, TrialState
from gputune.types import Config, Json


@dataclass(frozen=True)
class Trial:
    """One configuration and its cross-validated result.

    Scores follow scikit-learn: greater is better. You get trials from a ``gputune.Study``.

    Attributes:
        number: the number of the trial, from 0.
        params: the configuration, a dict from the name of a hyperparameter to its value. With
            population based training, it is the configuration at ``best_epoch``.
        score: mean of ``fold_scores`` at ``best_epoch``. NaN if a fold is NaN or the trial has not
            run.
        fold_scores: (F,) the score of each fold at ``best_epoch``.
        best_epoch: epochs trained when the score was taken, from 1. 0 if the trial has not run.
        state: the state of the trial. Pruned and stopped trials are scored on their trained epochs.

            - "complete": it trained to its end. In population based training, a trial that diverged
              and then copied another trial is also complete.
            - "pruned": halving or the median rule ended it.
            - "stopped": a deadline cut the training short.
            - "failed": it diverged, or its objective raised an error. The score is NaN.
            - "waiting": it has not run.

        seconds: seconds of its training. Trials train together in chunks, so it is the trial's
            share of the time of its chunk.
        origin: "default", "include", "random", or "batch 3" for a proposal of the Optuna sampler.
            In a hypergradient search it is (starting point, outer step). The starting point is the
            number of the trial with outer step 0.
        detail: facts from the search method. For a hypergradient search: "loss", "ratio", "usable",
            "slope", ... For halving: "rung", the epoch at which it was pruned. For population based
            training: "schedule", "lineage" and "copies", if the trial has changed. "error" if an
            objective of ``search`` raised an error. "reason" if it was given up, because memory
            could not hold it or it ended every worker process that trained it.
        metrics: with several metrics, the fold scores at ``best_epoch`` by metric name; the metric
            that ranks comes first. {} for one metric.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> study = gputune.tune("mlp", X, y, n_trials=2, max_epochs=5, verbose=0)
        >>> trial = study.trials[0]
        >>> trial.number, trial.state, len(trial.fold_scores)
        (0, 'complete', 5)
    """

    number: int
    params: Config
    score: float
    fold_scores: tuple[float, ...]
    best_epoch: int
    state: TrialState
    seconds: float
    origin: str | tuple[int, int]
    detail: Json = field(default_factory=dict)
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """The mean of each of ``metrics`` over the folds, by its name; NaN if one fold is NaN."""
        return {name: float(np.mean(folds)) for name, folds in self.metrics.items()}

    @property
    def origin_text(self) -> str:
        """The origin of the trial as text, such as "random" or "start 3, step 1"."""
        return (
            self.origin
            if isinstance(self.origin, str)
            else "start {}, step {}".format(*self.origin)
        )

    @property
    def std_error(self) -> float:
        """Standard error of ``score`` over the folds, std(ddof=1) / sqrt(F).

        NaN with fewer than two folds, or if a fold is not finite.
        """
        folds = len(self.fold_scores)
        if folds < 2 or not np.isfinite(self.fold_scores).all():
            return math.nan
        return float(np.std(self.fold_scores, ddof=1)) / math.sqrt(folds)

    def _fold_score(self, fold: int) -> float:
        return self.fold_scores[fold] if fold < len(self.fold_scores) else math.nan

    @property
    def schedule(self) -> dict[int, Config]:
        """The configuration from each epoch on, as a dict from the number of finished epochs.

        Only population based training changes a configuration during training. For other methods,
        the schedule is {0: params}.
        """
        changes = self.detail.get("schedule", [])
        return {change["epoch"]: change["params"] for change in changes} or {0: self.params}

    @property
    def schedule_to_best(self) -> dict[int, Config]:
        """The part of ``schedule`` up to ``best_epoch``, which ``best_model()`` repeats."""
        first, *later = self.schedule.items()
        return dict([first, *(change for change in later if change[0] < self.best_epoch)])

    @property
    def lineage(self) -> tuple[tuple[int, int], ...]:
        """The trials through which the weights have come: (number of finished epochs, trial number).

        The first pair is the trial that began the training. Each further pair is a copy in
        population based training. The last pair is this trial.
        """
        path = self.detail.get("lineage", [])
        return tuple((epoch, number) for epoch, number in path) or ((0, self.number),)


def params_of(params: Config, result: Result) -> Config:
    """Return the configuration of a trial at its best epoch, or at its end if it failed.

    Args:
        params: The configuration with which the trial began.
        result: The result of the trial.
    """
    for change in result.detail.get("schedule", ()):
        if change["epoch"] < result.best_epoch or result.best_epoch == 0:
            params = change["params"]
    return dict(params)
