"""All trials of a search and their results: a value made from options, trials and curves."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gputune.errors import TOO_BIG, InputError, SearchFailedError
from gputune.garbage import without_collector
from gputune.study.record import SearchRecord
from gputune.study.rows import Lazy, TrialState, ranked, stack_curves
from gputune.study.store import Candidate, Curve, Result, Store
from gputune.text import count, did_you_mean, of_class
from gputune.types import Config, Json

if TYPE_CHECKING:
    # Reading a study must not wait for torch; pandas and polars are imported by the one who asks
    # for a table.
    import pandas
    import polars


@dataclass(frozen=True)
class Trial:
    """One configuration and its cross-validated result. Scores follow scikit-learn: greater is
    better.

    metrics      of several metrics by name the fold scores at ``best_epoch``, the one that ranks
                 first; {} for one
    state        "complete"; "pruned" where a rung of successive halving sent it away, "stopped"
                 where a deadline cut the training short (both are scored on what they had);
                 "failed" where it diverged (score NaN); "waiting" where it has not run
    score        mean of ``fold_scores`` at ``best_epoch``; NaN where one fold is NaN or nothing has
                 run
    best_epoch   epochs trained when the score was taken, 1 for the first; 0 where nothing has run
    seconds      time of its training; members train together, so it is the trial's share of its
                 chunk
    origin       "default", "include", "random", or "batch 3" where Optuna's sampler proposed it; in
                 a study by hypergradients (start, outer step), the start being the number of the
                 trial it began with, which is outer step 0
    detail       what the search method keeps of it: for hypergradients "loss", "ratio", "usable",
                 "slope", ...; for halving "rung", the epoch at which it was pruned; "error" where
                 an objective of ``search`` raised one; "reason" where it was given up: memory did
                 not hold it, or it ended every worker process that trained it
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
        """The mean of each of ``metrics`` over the folds, by its name; NaN where one fold is."""
        return {name: float(np.mean(folds)) for name, folds in self.metrics.items()}

    @property
    def origin_text(self) -> str:
        """``origin`` in words."""
        return (
            self.origin
            if isinstance(self.origin, str)
            else "start {}, step {}".format(*self.origin)
        )

    @property
    def std_error(self) -> float:
        """Standard error of ``score`` over the folds, std(ddof=1) / sqrt(F); NaN for fewer than two
        folds."""
        folds = len(self.fold_scores)
        if folds < 2 or not np.isfinite(self.fold_scores).all():
            return math.nan
        return float(np.std(self.fold_scores, ddof=1)) / math.sqrt(folds)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Study:
    """What a search found.

    trials   in order of their number
    curves   (C, epochs, F) validation scores after each epoch, row c for ``trials[c]``; NaN where a
             trial did not train that long
    meta     the options of the search by name, to be read only; ``record`` has those that gputune
             knows
    data     what the process that searched keeps for a refit; None for a study that was opened from
             its file
    file     the file that keeps the study; None where none does
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
                "Study(curves=...) must be (C, epochs, F) with a row for each of the "
                f"{len(self.trials)} trials, got shape {curves.shape}."
            )
        curves.flags.writeable = False
        vars(self)["curves"] = curves

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Return the study in the file at ``path``, with what is finished so far.

        Raises FileNotFoundError, StudyCorruptError, StudyVersionError.
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
        """Return the study of these candidates, in this order, and of the results that there are so
        far."""
        study = cls(meta=meta, trials=(), curves=np.empty((0, 0, 0)), data=data, file=file)
        trials = partial(_trials, rows, SearchRecord.from_json(meta))
        curves = partial(
            stack_curves, [None if result is None else result.curve for _, result in rows]
        )
        vars(study).update(rows=rows, trials=trials, curves=curves)
        return study

    @cached_property
    def rows(self) -> Sequence[tuple[Candidate | Trial, Result | Trial | None]]:
        """The configuration of each trial and its result, from which ``trials`` are made when they
        are asked for."""
        return [(trial, trial) for trial in self.trials]

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """The scores (C,) of the trials."""
        return np.array(
            [math.nan if result is None else result.score for _, result in self.rows],
            dtype=np.float64,
        )

    @cached_property
    def order(self) -> list[int]:
        """The rows of the trials, in the order of ``ranking``."""
        pruned = [result is not None and result.state == "pruned" for _, result in self.rows]
        return list(map(int, ranked(self.scores, np.array(pruned, dtype=bool))))

    @cached_property
    def record(self) -> SearchRecord:
        """What is known of the search."""
        return SearchRecord.from_json(self.meta)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, the one that ranks first; () where there is one."""
        return tuple(metric["name"] for metric in self.record.metrics)

    def curves_of(self, metric: str) -> Curve:
        """Return the scores (C, epochs, F) after each epoch by one of several metrics, as
        ``curves`` has the first.

        Raises InputError for a name that is none of ``metrics``.
        """
        curves = curves_of_all(self)
        place = self.metrics.index(check_metric(self, metric, "curves_of"))
        return curves[..., place] if curves.ndim == 4 else curves

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the study's file, as it is now, to a new one; safe while a search writes to it.

        Raises InputError for a study without a file, or where something lies at ``path`` already.
        """
        if self.file is None:
            raise InputError(
                "backup() copies the file of a study, and this one is in memory; search with "
                "study=PATH."
            )
        with Store.open(self.file) as store:
            store.backup(path)

    @property
    def best_trial(self) -> Trial:
        """The trial with the highest finite score, the lower number on a tie; a pruned one only
        where all are.

        Raises SearchFailedError where no trial has one.
        """
        if (best := best_trial(self)) is None:
            raise SearchFailedError(self.why_none_is_best())
        return best

    @property
    def best_params(self) -> Config:
        """The configuration of ``best_trial``, a copy."""
        return dict(self.best_trial.params)

    @property
    def best_score(self) -> float:
        """The score of ``best_trial``. Optimistic: it is the best of many on the folds that chose
        it."""
        return self.best_trial.score

    @property
    def spent(self) -> tuple[int, int]:
        """Trial-epochs that were trained, and those that training every trial to the end would have
        taken."""
        trained = int(np.isfinite(self.curves).all(2).sum())
        return trained, len(self.trials) * (self.record.max_epochs or self.curves.shape[1])

    @property
    def guarded(self) -> dict[str, int]:
        """Points of a search by hypergradients at which the guard acted, by what it did.

        "chaotic": the slope was noise, and the start stepped down; "differences": taken by wide
        finite differences.
        """
        modes = Counter(
            (trial.detail.get("mode"), bool(trial.detail.get("usable", True)))
            for trial in self.trials
        )
        differences = modes["differences", False] + modes["differences", True]
        return {"chaotic": modes["exact", False], "differences": differences}

    def ranking(self) -> tuple[Trial, ...]:
        """The trials, best first; pruned ones after the others, those without a finite score last;
        ties by number."""
        return tuple(self.trials[row] for row in self.order)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row a trial: number, state, score, std_error, fold_0.., best_epoch, seconds, origin,
        params_*.

        Of several metrics there is a ``score_NAME`` each, the mean at ``best_epoch``, behind the
        folds of the first.

        A parameter that a trial does not have is missing. Raises ImportError without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas: pip install pandas, or use to_polars()."
            ) from error
        columns = self.columns().items()
        # pandas would turn integers with a gap into floats.
        gaps = {name for name, values in columns if _kinds(values) == {int} and None in values}
        series = {
            name: pandas.Series(values, dtype="Int64" if name in gaps else None)
            for name, values in columns
        }
        return pandas.DataFrame(series)

    def to_polars(self) -> "polars.DataFrame":
        """As ``to_pandas``, as a polars frame. Parameters of unlike types are given as text."""
        import polars

        series = []
        for name, values in self.columns().items():
            plain = (kinds := _kinds(values)) <= {int, float} or kinds in ({bool}, {str})
            column = (
                values if plain else [None if value is None else str(value) for value in values]
            )
            series.append(polars.Series(name, column, strict=False))
        return polars.DataFrame(series)

    def columns(self) -> dict[str, list[object]]:
        """Return the columns of ``to_pandas`` as lists; None where a trial does not have a
        parameter."""
        trials = self.trials
        folds = range(max((len(t.fold_scores) for t in trials), default=0))
        names = dict.fromkeys(name for t in trials for name in t.params)
        return {
            "number": [t.number for t in trials],
            "state": [t.state for t in trials],
            "score": [t.score for t in trials],
            "std_error": [t.std_error for t in trials],
            **{
                f"fold_{f}": [
                    t.fold_scores[f] if f < len(t.fold_scores) else math.nan for t in trials
                ]
                for f in folds
            },
            **{
                f"score_{name}": [t.scores.get(name, math.nan) for t in trials]
                for name in self.metrics
            },
            "best_epoch": [t.best_epoch for t in trials],
            "seconds": [t.seconds for t in trials],
            "origin": [t.origin_text for t in trials],
            **{f"params_{name}": [t.params.get(name) for t in trials] for name in names},
        }

    def why_none_is_best(self) -> str:
        """Return the reason, and what to do, where no trial has a finite score."""
        trials = self.trials
        states = Counter(trial.state for trial in self.trials)
        if not trials:
            return "the study has no trials; search with n_trials >= 1."
        if states["waiting"] == len(trials):
            return f"none of the {len(trials)} trials has been trained yet; run the search."
        all_of = count(len(trials), "trial")
        none = "no trial has a finite score"
        if errors := [str(t.detail["error"]) for t in trials if "error" in t.detail]:
            return f"{none}: {len(errors)} of {all_of} raised an error, the first {errors[0]}."
        reasons = {str(t.detail["reason"]) for t in trials if "reason" in t.detail}
        if lost := [reason for reason in reasons if not reason.startswith(TOO_BIG)]:
            return f"{none}, and some of {len(trials)} were given up: {min(lost)}"
        if reasons:
            small = "did not fit into memory even alone"
            return (
                f"{none}, and some of {len(trials)} {small} ({min(reasons)}); search smaller "
                "widths and batch sizes."
            )
        failed = states["failed"]
        waiting = f", {states['waiting']} have not been trained" * (states["waiting"] > 0)
        if self.record.face == "loop":
            odd = "the objective returned or reported NaN or an infinite number"
            return f"{none}: of {all_of} {odd} in {failed}{waiting}; look at what it returns."
        remedy = "lower the learning rates of the space, and look for extreme values in the data"
        return f"{none}: {failed} of {all_of} diverged{waiting}; {remedy}."

    def __repr__(self) -> str:
        states = Counter("waiting" if result is None else result.state for _, result in self.rows)
        parts = [*filter(None, [self.record.model]), count(len(self.rows), "trial")]
        parts += [
            f"{states[s]} {s}" for s in ("pruned", "stopped", "failed", "waiting") if s in states
        ]
        if np.isfinite(self.scores).any():
            score = f"{self.record.scoring or 'score'}{of_class(self.record.ranked_class)}"
            best = self.order[0]
            parts.append(
                f"best {score} {self.scores[best]:.4g} in trial {self.rows[best][0].number}"
            )
        return f"Study({', '.join(parts)})"


def best_trial(study: Study) -> Trial | None:
    """Return the best trial of a study, None where none has a finite score."""
    return study.trials[study.order[0]] if np.isfinite(study.scores).any() else None


def curves_of_all(study: Study) -> Curve:
    """Return the curves (C, epochs, F, M) of a study by all metrics; (C, epochs, F) where there is
    one."""
    study.curves  # noqa: B018 they are made now
    curves: Curve = vars(study)["curves"]
    return curves


def check_metric(study: Study, metric: object, method: str) -> str:
    """Return the name of a metric, of neg_log_loss also log_loss; InputError, in a ``method``'s
    words, for another."""
    if not study.metrics:
        call = method if metric is None else f"{method}({metric!r})"
        raise InputError(
            f"{call} needs a study of several metrics, and this one has {study.record.scoring!r} "
            "alone."
        )
    for name in (metric, f"neg_{metric}"):  # tables are headed by what they show, the loss itself
        if name in study.metrics:
            return str(name)
    raise InputError(
        f"{method}(...) must be one of the study's metrics, "
        f"{', '.join(map(repr, study.metrics))}, got {metric!r}."
        f"{did_you_mean(metric, study.metrics)}"
    )


def _kinds(values: Sequence[object]) -> set[type]:
    return {type(value) for value in values if value is not None}


@without_collector()
def _trials(
    rows: Sequence[tuple[Candidate, Result | None]], record: SearchRecord
) -> tuple[Trial, ...]:
    names = [metric["name"] for metric in record.metrics]
    descends = record.descends
    trials = []
    for candidate, result in rows:
        number = candidate.number
        params = dict(candidate.params)
        origin = (number, 0) if descends and isinstance(candidate.origin, str) else candidate.origin
        if result is None:
            trials.append(Trial(number, params, math.nan, (), 0, "waiting", math.nan, origin))
            continue
        of_training = (
            result.score,
            tuple(result.fold_scores),
            result.best_epoch,
            result.state,
            result.seconds,
        )
        metrics = dict(zip(names, map(tuple, result.metrics.T.tolist()))) if names else {}
        trials.append(Trial(number, params, *of_training, origin, dict(result.detail), metrics))
    return tuple(trials)
