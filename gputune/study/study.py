"""The study: all trials of a search with their options, results and learning curves.

Shape letters: C trials, F folds, M metrics.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gputune.ground.annotations import FloatArray, StrPath
from gputune.ground.errors import PYTHON, TOO_BIG, InputError, SearchFailedError, Verbatim, option
from gputune.ground.memory import without_collector
from gputune.ground.text import count, did_you_mean, of_class
from gputune.ground.types import Config, Json
from gputune.study.record import SearchRecord
from gputune.study.rows import Lazy, TrialState, ranked, stack_curves
from gputune.study.store import Candidate, Curve, Result, Store, has_checkpoints

if TYPE_CHECKING:
    # Opening a study must not import torch, and pandas and polars are imported only for a table.
    import pandas
    import polars


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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Study:
    """The trials of a search, with their scores and learning curves.

    Attributes:
        meta: the options of the search by name, read-only. ``record`` has the options that gputune
            knows.
        trials: the trials in order of trial number.
        curves: (C, epochs, F) validation scores after each epoch; row c belongs to ``trials[c]``.
            NaN if a trial did not train that long.
        data: data that the searching process keeps for a refit. None for a study that was opened
            from its file.
        file: the file of the study, or None.
    """

    meta: Mapping[str, Any]
    trials: tuple[Trial, ...]
    curves: Curve
    data: Any = None
    file: Path | None = None
    if not TYPE_CHECKING:
        trials = Lazy()
        curves = Lazy()

    def __post_init__(self) -> None:
        vars(self)["trials"] = tuple(self.trials)
        curves = np.array(vars(self)["curves"], dtype=np.float64)
        if curves.ndim not in (3, 4) or len(curves) != len(self.trials):
            raise InputError(
                "Study(curves=...)",
                f"must be (C, epochs, F) with one row for each of the {len(self.trials)} trials",
                got=Verbatim(f"shape {curves.shape}"),
            )
        curves.flags.writeable = False
        vars(self)["curves"] = curves

    @classmethod
    def open(cls, path: StrPath) -> Self:
        """Return the study in the file at ``path``, with the results so far.

        Raises:
            FileNotFoundError: the file does not exist.
            StudyCorruptError: the file is damaged, or is not a study.
            StudyVersionError: a newer gputune wrote the file.

        Example:
            >>> gputune.Study.open("study.db").best_params == study.best_params
            True
        """
        with Store.open(path) as store, without_collector():
            return cls.from_rows(store.meta, store.trials(), file=Path(path))

    @classmethod
    def from_rows(
        cls,
        meta: Mapping[str, object],
        rows: Sequence[tuple[Candidate, Result | None]],
        *,
        data: object = None,
        file: Path | None = None,
    ) -> Self:
        """Return a study of the given candidates, in the same order, with their results so far."""
        # The record keeps the marks of arguments in its notes. Each interface renders them.
        record = SearchRecord.from_json(meta)
        options: dict[str, object] = copy(meta) if isinstance(meta, dict) else dict(meta)
        if "notes" in options:
            options["notes"] = list(map(PYTHON.render, record.notes))
        study = cls(meta=options, trials=(), curves=np.empty((0, 0, 0)), data=data, file=file)
        trials = partial(_trials, rows, record)
        curves = partial(
            stack_curves, [None if result is None else result.curve for _, result in rows]
        )
        vars(study).update(rows=rows, trials=trials, curves=curves, record=record)
        return study

    @cached_property
    def rows(self) -> Sequence[tuple[Candidate | Trial, Result | Trial | None]]:
        """The configuration and the result of each trial. ``trials`` are made from them at first
        use."""
        return [(trial, trial) for trial in self.trials]

    @cached_property
    def scores(self) -> FloatArray:
        """The scores (C,) of the trials."""
        return np.array(
            [math.nan if result is None else result.score for _, result in self.rows],
            dtype=np.float64,
        )

    @cached_property
    def order(self) -> list[int]:
        """The positions of the trials in ``trials``, in the order of ``ranking``."""
        pruned = [result is not None and result.state == "pruned" for _, result in self.rows]
        return list(map(int, ranked(self.scores, np.array(pruned, dtype=bool))))

    @cached_property
    def record(self) -> SearchRecord:
        """The search record: the options of the search as typed fields."""
        return SearchRecord.from_json(self.meta)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, with the ranking metric first, or () if there is only one
        metric."""
        return tuple(metric["name"] for metric in self.record.metrics)

    def curves_of(self, metric: str) -> Curve:
        """Return the validation scores after each epoch by one of several metrics.

        Args:
            metric: the name of the metric.

        Returns:
            (C, epochs, F), in the layout of ``curves``.

        Raises:
            InputError: the name is not in ``metrics``.

        Example:
            >>> study.curves_of("neg_log_loss").shape  # trials, epochs, folds
            (10, 5, 5)
        """
        curves = curves_of_all(self)
        position = self.metrics.index(check_metric(self, metric, "curves_of(metric={})"))
        return curves[..., position] if curves.ndim == 4 else curves

    def backup(self, path: StrPath) -> None:
        """Copy the study's file to a new file. This is safe while a search writes to it.

        Args:
            path: the path of the new file.

        Raises:
            InputError: the study has no file, or ``path`` exists already.

        Example:
            >>> study.backup("copy.db")
        """
        if self.file is None:
            raise InputError(
                None,
                "backup() copies the file of a study, but this study is in memory",
                remedy=f"Search with {option('study', Verbatim('PATH'))}.",
            )
        with Store.open(self.file) as store:
            store.backup(path)

    @property
    def best_trial(self) -> Trial:
        """The trial with the highest finite score. On a tie, the lower trial number wins.

        A pruned trial is best only if no other trial has a finite score.

        Raises:
            SearchFailedError: no trial has a finite score.
        """
        best = best_trial(self)
        if best is None:
            raise SearchFailedError(self.failure_message())
        return best

    @property
    def best_params(self) -> Config:
        """A copy of the configuration of ``best_trial``, a dict from name to value."""
        return dict(self.best_trial.params)

    @property
    def best_score(self) -> float:
        """The score of ``best_trial``. Greater is better, also for losses: -0.3 for a log loss of 0.3.

        It is optimistic: it is the best of many scores on the folds that chose it.
        """
        return self.best_trial.score

    @property
    def spent(self) -> tuple[int, int]:
        """The number of trained trial-epochs, and the number if every trial had trained fully."""
        # (C, epochs, F): an epoch was trained if the scores of all folds are finite
        trained = int(np.isfinite(self.curves).all(2).sum())
        return trained, len(self.trials) * (self.record.max_epochs or self.curves.shape[1])

    @property
    def guarded(self) -> dict[str, int]:
        """Number of hypergradient points at which gputune distrusted the gradient, by its reaction.

        "chaotic": the gradient was noise, so gputune lowered the learning rate. "differences":
        gputune computed the slope by wide finite differences.
        """
        actions = {"chaotic": 0, "differences": 0}
        for trial in self.trials:
            mode = trial.detail.get("mode")
            if mode == "differences":
                actions["differences"] += 1
            elif mode == "exact" and not trial.detail.get("usable", True):
                actions["chaotic"] += 1
        return actions

    def ranking(self) -> tuple[Trial, ...]:
        """Return the trials, best first.

        Pruned trials follow the others. Trials without a finite score come last. Ties are in order
        of trial number.

        Example:
            >>> study.ranking()[0] == study.best_trial
            True
        """
        return tuple(self.trials[row] for row in self.order)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the trials as a pandas DataFrame, one row per trial.

        The columns are the attributes of ``Trial``:

        - number, best_epoch: integers.
        - score, std_error, fold_0, fold_1, ..., seconds: floats, NaN without a value.
        - score_NAME: with several metrics, the mean of each metric at ``best_epoch``.
        - state, origin: text.
        - params_NAME: each hyperparameter in its own type. It is missing if a trial lacks it.

        Raises:
            ImportError: pandas is not installed.

        Example:
            >>> frame = study.to_pandas()
            >>> frame.loc[frame["score"].idxmax(), "state"]
            'complete'
        """
        return pandas_frame(self.columns())

    def to_polars(self) -> "polars.DataFrame":
        """Return the trials as a polars DataFrame, with the columns of ``to_pandas``.

        Parameters of mixed types become text.

        Example:
            >>> study.to_polars().height
            10
        """
        return polars_frame(self.columns())

    def columns(self) -> dict[str, list[object]]:
        """Return the columns of ``to_pandas`` as lists. A parameter that a trial lacks is None."""
        trials = self.trials
        columns: dict[str, list[object]] = {}
        for name in ("number", "state", "score", "std_error"):
            columns[name] = [getattr(trial, name) for trial in trials]
        n_folds = max((len(trial.fold_scores) for trial in trials), default=0)
        for fold in range(n_folds):
            columns[f"fold_{fold}"] = [trial._fold_score(fold) for trial in trials]
        for name in self.metrics:
            columns[f"score_{name}"] = [trial.scores.get(name, math.nan) for trial in trials]
        for name in ("best_epoch", "seconds"):
            columns[name] = [getattr(trial, name) for trial in trials]
        columns["origin"] = [trial.origin_text for trial in trials]
        for name in dict.fromkeys(chain.from_iterable(trial.params for trial in trials)):
            columns[f"params_{name}"] = [trial.params.get(name) for trial in trials]
        return columns

    def failure_message(self) -> str:
        """Return the reason for a study without any finite score, and a remedy."""
        trials = self.trials
        if not trials:
            return "the study has no trials. Search with at least one trial."
        states = Counter(trial.state for trial in trials)
        n_trials = count(len(trials), "trial")
        waiting = states["waiting"]
        if waiting == len(trials) and self.file is not None and has_checkpoints(self.file):
            return (
                f"the study has {n_trials}, and none has ended yet. Their training waits in "
                f"checkpoints, and {how_to_continue(self.record)} continues it."
            )
        if waiting == len(trials):
            return f"the study has {n_trials}, but none has been trained yet. Run the search."
        failure = "no trial has a finite score"
        errors = [str(trial.detail["error"]) for trial in trials if "error" in trial.detail]
        if errors:
            return f"{failure}: {len(errors)} of {n_trials} raised an error, the first {errors[0]}."
        reasons = {str(trial.detail["reason"]) for trial in trials if "reason" in trial.detail}
        lost = [reason for reason in reasons if not reason.startswith(TOO_BIG)]
        if lost:
            return f"{failure}, and gputune gave up some of {n_trials}: {min(lost)}"
        if reasons:
            return (
                f"{failure}. Some of {n_trials} did not fit into memory ({min(reasons)}), although "
                "each trained separately. Search smaller widths and batch sizes."
            )
        untrained = f", and {waiting} have not been trained" if waiting else ""
        if self.record.face == "loop":
            return (
                f"{failure}: the objective returned or reported NaN or an infinite number in "
                f"{states['failed']} of {n_trials}{untrained}. Check its result."
            )
        return (
            f"{failure}: {states['failed']} of {n_trials} diverged{untrained}. Lower the learning "
            "rates of the space, and look for extreme values in the data."
        )

    def __repr__(self) -> str:
        states = Counter("waiting" if result is None else result.state for _, result in self.rows)
        parts = [self.record.model] if self.record.model else []
        parts.append(count(len(self.rows), "trial"))
        for state in ("pruned", "stopped", "failed", "waiting"):
            if state in states:
                parts.append(f"{states[state]} {state}")
        if np.isfinite(self.scores).any():
            score = f"{self.record.scoring or 'score'}{of_class(self.record.ranked_class)}"
            best = self.order[0]
            number = self.rows[best][0].number
            parts.append(f"best {score} {self.scores[best]:.4g} in trial {number}")
        return f"Study({', '.join(parts)})"


RESUME = "'gputune resume'"


def how_to_continue(record: SearchRecord) -> str:
    """Return the subject of "continues the search" for a message, such as "'gputune resume'".

    The command can continue a search only if the study file stores all of its arguments.
    """
    if record.face == "loop":
        return "repeating the call of gputune.search"
    if record.face == "sklearn":
        return "repeating the call of fit"
    if record.arguments.lacking:
        return "repeating the call of gputune.tune"
    return RESUME


def best_trial(study: Study) -> Trial | None:
    """Return the best trial of a study, or None if no trial has a finite score."""
    return study.trials[study.order[0]] if np.isfinite(study.scores).any() else None


def curves_of_all(study: Study) -> Curve:
    """Return the learning curves (C, epochs, F, M) of a study by all metrics.

    With one metric the shape is (C, epochs, F).
    """
    study.curves  # noqa: B018 they are made now
    curves: Curve = vars(study)["curves"]
    return curves


def check_metric(study: Study, metric: object, argument: str) -> str:
    """Return the name of a metric. For neg_log_loss, log_loss is accepted too.

    Args:
        study: the study.
        metric: the name to check.
        argument: the argument that it was passed as, such as "ranked_by(metric={})", for errors.

    Raises:
        InputError: the study lacks this metric.
    """
    if not study.metrics:
        call = argument.partition("(")[0] if metric is None else argument.format(repr(metric))
        raise InputError(
            call,
            f"needs a study of several metrics, but this study has only {study.record.scoring!r}",
        )
    for name in (metric, f"neg_{metric}"):  # tables show the loss itself, as log_loss
        if name in study.metrics:
            return str(name)
    raise InputError(
        argument.format("..."),
        f"must be one of the study's metrics, {', '.join(map(repr, study.metrics))}",
        got=metric,
        remedy=did_you_mean(metric, study.metrics).strip(),
    )


@without_collector()
def _trials(
    rows: Sequence[tuple[Candidate, Result | None]], record: SearchRecord
) -> tuple[Trial, ...]:
    names = [metric["name"] for metric in record.metrics]
    is_hypergradient = record.is_hypergradient
    trials = []
    for candidate, result in rows:
        number = candidate.number
        params = dict(candidate.params)
        origin = candidate.origin
        if is_hypergradient and isinstance(origin, str):
            origin = (number, 0)
        if result is None:
            trials.append(Trial(number, params, math.nan, (), 0, "waiting", math.nan, origin))
            continue
        metrics = dict(zip(names, map(tuple, result.metrics.T.tolist()))) if names else {}
        params = params_of(params, result)
        trials.append(
            Trial(
                number,
                params,
                result.score,
                tuple(result.fold_scores),
                result.best_epoch,
                result.state,
                result.seconds,
                origin,
                dict(result.detail),
                metrics,
            )
        )
    return tuple(trials)


def pandas_frame(columns: Mapping[str, Sequence[object]]) -> "pandas.DataFrame":
    """Return columns of equal length as a pandas DataFrame. None becomes a missing value.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_pandas() needs pandas: pip install pandas, or use to_polars()."
        ) from error
    series = {}
    for name, values in columns.items():
        # pandas would turn integers with a gap into floats.
        has_gap = _kinds(values) == {int} and None in values
        series[name] = pandas.Series(values, dtype="Int64" if has_gap else None)
    return pandas.DataFrame(series)


def polars_frame(columns: Mapping[str, Sequence[object]]) -> "polars.DataFrame":
    """Return columns of equal length as a polars DataFrame. Values of mixed types become text."""
    import polars

    series = []
    for name, values in columns.items():
        kinds = _kinds(values)
        if not (kinds <= {int, float} or kinds in ({bool}, {str})):
            values = [None if value is None else str(value) for value in values]
        series.append(polars.Series(name, values, strict=False))
    return polars.DataFrame(series)


def _kinds(values: Sequence[object]) -> set[type]:
    return {type(value) for value in values if value is not None}
