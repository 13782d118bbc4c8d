"""The list of all fits of a search, which gputune records by calling the estimators' ``fit``
without training."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params, _num_samples

from gputune.data.arrays import ArrayLayout, Arrays
from gputune.ground.annotations import IntArray
from gputune.sklearn.base import FusedEstimator, check_rows, hooked, last_step
from gputune.sklearn.dataset import CheckedRows, FoldGroup, FoldRows, lay_out
from gputune.sklearn.recipe import content

Splits = Sequence[tuple[ArrayLike, ArrayLike]]


@dataclass(eq=False)
class RecordedFit:
    """One fit of a search: candidate ``trial`` on the training rows of ``fold``.

    Attributes:
        trial: number of the candidate.
        fold: number of the fold.
        estimator: the unfitted estimator.
        n_rows: number of training rows.
        train: the training rows, or the error if they are refused.
        valid: the validation rows, if the search differentiates the loss on them.
        fitted: the result of the training, or an exception. None before the training.
        rows: the rows of all fits that were made together.
    """

    trial: int
    fold: int
    estimator: FusedEstimator
    n_rows: int
    train: FoldRows | Exception
    valid: FoldRows | Exception | None = None
    fitted: object = None
    rows: CheckedRows | None = None

    @property
    def error(self) -> Exception | None:
        """The exception that this fit raised, or None if the fit succeeded."""
        if isinstance(self.train, Exception):
            return self.train
        return self.fitted if isinstance(self.fitted, Exception) else None

    def finish(self, estimator: FusedEstimator) -> None:
        """Set the fitted attributes of an estimator from this fit, or raise the exception of this
        fit."""
        error = self.error
        if error is not None:
            # The exception may be raised in many fits. Without this, each traceback would include
            # the earlier ones.
            raise error.with_traceback(None)
        assert self.rows is not None
        estimator._become(self.fitted, self.rows)

    def is_of(self, estimator: FusedEstimator, X: object) -> bool:
        """Return True if this recorded fit belongs to the given estimator.

        The comparison uses only parameters whose text is the same in a copy.
        """
        return (
            type(estimator) is type(self.estimator)
            and _num_samples(X) == self.n_rows
            and _printed(estimator) == _printed(self.estimator)
        )


def _printed(estimator: FusedEstimator) -> dict[str, str]:
    """Return a dict of an estimator's plain parameters as text.

    These parameters have the same text in a copy of the estimator.
    """
    types = (bool, int, float, str, type(None))
    params = estimator.get_params(deep=False).items()
    return {name: repr(value) for name, value in params if isinstance(value, types)}


@dataclass(frozen=True, eq=False)
class Transformation:
    """The recorded result of a pipeline's transformer for some rows, or the exception that it
    raised."""

    result: object

    def take(self) -> object:
        """Return the transformer's result, or raise its exception."""
        if isinstance(self.result, Exception):
            raise self.result.with_traceback(None)
        return self.result


Event = RecordedFit | Transformation


def fits_of(events: Iterable[Event]) -> list[RecordedFit]:
    """Return the fits from a list of recorded fits and transformations."""
    return [event for event in events if isinstance(event, RecordedFit)]


Trials = dict[int, dict[int, RecordedFit]]  # fits by trial and fold


def layouts(
    fits: Iterable[RecordedFit], *, held_out: bool = False
) -> Iterator[tuple[FoldGroup, Trials]]:
    """Yield groups of folds, each with the trials that can train together in these folds.

    The trials of a group have one estimator class, and train on the same rows. With ``held_out``
    the folds also have their validation rows.
    """
    by_trial: Trials = defaultdict(dict)
    for fit in fits:
        if isinstance(fit.train, FoldRows):
            by_trial[fit.trial][fit.fold] = fit
    groups: dict[Hashable, Trials] = defaultdict(dict)
    for trial, by_fold in by_trial.items():
        key = tuple((fold, type(fit.estimator), id(fit.train)) for fold, fit in by_fold.items())
        groups[key][trial] = by_fold
    for trials in groups.values():
        parts = {}
        for fold, fit in next(iter(trials.values())).items():
            sides = (fit.train, fit.valid) if held_out else (fit.train,)
            parts[fold] = [side for side in sides if isinstance(side, FoldRows)]
        for folds in lay_out(parts):
            yield folds, trials


def shared_rows(
    candidate: object, X: object, y: object, fit_params: Mapping[str, object]
) -> CheckedRows | None:
    """Check all rows once, and return them if they are valid for all folds together.

    Returns None if each fold must be checked separately. This is the case in a pipeline, and if all
    rows together are invalid. Each fold may then still be valid, because it may not contain the
    invalid rows.
    """
    if not isinstance(candidate, FusedEstimator) or set(fit_params) - {"sample_weight"}:
        return None
    part = _check(clone(candidate), X, y, fit_params.get("sample_weight"))
    return None if isinstance(part, Exception) else part.rows


Returned = TypeVar("Returned")


class FitRecorder:
    """An object that records the ``fit`` calls of a search without training the estimators.

    The recorder fits a pipeline's transformers, unless it has fitted an equal transformer before.
    With ``held_out=True``, it also records the validation rows of each fit.
    """

    def __init__(self, *, held_out: bool = False) -> None:
        # ``place`` is the trial and the fold of the current fit.
        self.held_out = held_out
        self.place = (0, 0)
        self.events: list[Event] = []
        # (trial, fold) of fits that scikit-learn's own loop must make -> the reason
        self.left: dict[tuple[int, int], str] = {}
        self._made: dict[Hashable, tuple[Any, object]] = {}

    def record(
        self,
        candidates: Sequence[BaseEstimator],
        X: object,
        y: object,
        splits: Splits,
        fit_params: Mapping[str, object],
    ) -> list[Event]:
        """Record the fits and transformations of every candidate in every fold, and return them.

        The fits and transformations have the order of scikit-learn's loop.
        """
        self.events = []
        self.left = {}
        rows = shared_rows(candidates[0], X, y, fit_params) if candidates else None
        if rows is not None:
            self._record_parts(candidates, splits, rows)
            return self.events
        # The order of scikit-learn's loop: candidate after candidate, and fold after fold.
        for (trial, candidate), (fold, (train, test)) in itertools.product(
            enumerate(candidates), enumerate(splits)
        ):
            self.place = (trial, fold)
            arguments, params = self._arguments(candidate, X, y, train, fit_params)
            # An error here occurs again in scikit-learn's loop, which handles it.
            with hooked(self), suppress(Exception):
                fitted = clone(candidate)
                # Callbacks should see only the fits of scikit-learn's loop, so they are removed
                # here.
                if hasattr(fitted, "set_callbacks"):
                    fitted.set_callbacks()
                fitted.fit(*arguments, **params)
                # Only now are the steps of the pipeline fitted on this fold.
                if self.held_out and self.place not in self.left:
                    self._hold_out(fitted, X, y, train, test)
        return self.events

    def _record_parts(
        self, candidates: Sequence[FusedEstimator], splits: Splits, rows: CheckedRows
    ) -> None:
        """Record the fits of candidates on folds of rows that are already checked."""
        folds = []
        for train, test in splits:
            index = _as_rows(train)
            target = rows.y[index] if rows.classes is None else rows.classes[rows.y[index]]
            valid = FoldRows(rows, _as_rows(test))
            folds.append((target, FoldRows(rows, index), valid if self.held_out else None))
        for (t, candidate), (f, fold) in itertools.product(enumerate(candidates), enumerate(folds)):
            target, part, valid = fold
            reason = candidate._left_to_scikit_learn(target)
            if reason is None:
                self.events.append(RecordedFit(t, f, candidate, len(part.index), part, valid))
            else:
                self.left[t, f] = reason

    def fit(self, estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> bool:
        """Record the fit of one estimator in place of its ``fit`` call.

        A fit that gputune does not support is noted for scikit-learn's loop. Raises the error of
        invalid rows.
        """
        reason = estimator._left_to_scikit_learn(y)
        if reason is not None:
            self.left[self.place] = reason
            return True
        arguments = (X, y, sample_weight)
        key = (type(estimator), *map(id, arguments))
        train = self._once(key, arguments, lambda: _check(estimator, *arguments))
        n_rows = _num_samples(X) if isinstance(train, Exception) else len(train.index)
        self.events.append(RecordedFit(*self.place, estimator, n_rows, train))
        if isinstance(train, Exception):
            raise train.with_traceback(None)
        return True

    def transform(
        self,
        function: Callable[..., object],
        transformer: object,
        X: object,
        y: object,
        *args: object,
        **options: Any,
    ) -> object:
        """Fit a pipeline's transformer, record its result and return the result.

        Equal transformers on the same rows are fitted only once.
        """
        metadata: list[object] = []
        for routed in (options.get("params") or {}).values():
            metadata += routed.values()
        fit = functools.partial(function, transformer, X, y, *args, **options)
        key = (content(transformer), id(X), id(y), *map(id, metadata))
        with hooked(None):
            event = self._once(key, (X, y, metadata), lambda: Transformation(_result(fit)))
        self.events.append(event)
        return event.take()

    def _once(self, key: Hashable, owners: object, make: Callable[[], Returned]) -> Returned:
        """Return the stored result for a key, or call ``make`` to compute it.

        The recorder keeps a reference to ``owners``, so that no other object can get their ids.
        """
        if key not in self._made:
            self._made[key] = make(), owners
        made: Returned = self._made[key][0]
        return made

    def _hold_out(self, fitted: object, X: object, y: object, train: object, test: object) -> None:
        """Add the validation rows to the latest fit.

        They are computed once for all candidates on the same rows.
        """
        fit = self.events[-1]
        assert isinstance(fit, RecordedFit) and isinstance(fit.train, FoldRows)
        part = fit.train

        def hold_out() -> FoldRows:
            return held_out_part(fitted, part, *_safe_split(fitted, X, y, test, train))

        with hooked(None):
            fit.valid = self._once((id(part), self.place[1]), part, lambda: _result(hold_out))

    def _arguments(
        self,
        estimator: object,
        X: object,
        y: object,
        train: object,
        fit_params: Mapping[str, object],
    ) -> tuple[tuple[object, ...], Mapping[str, object]]:
        """Return the arguments of ``fit`` for the training rows of a fold.

        Equal rows give the same objects, because other keys contain the ids of these objects.
        """

        def split() -> tuple[tuple[object, ...], Mapping[str, object]]:
            rows = _safe_split(estimator, X, y, train)
            return rows if y is not None else rows[:1], _check_method_params(
                X, params=fit_params, indices=train
            )

        # Equal rows must be the same objects, because the keys of fits and transformers hold their
        # ids.
        key = (id(X), id(y), np.asarray(train).tobytes(), *map(id, fit_params.values()))
        return self._once(key, (X, y, fit_params), split)


def held_out_part(fitted: BaseEstimator, train: FoldRows, X: object, y: object) -> FoldRows:
    """Check and transform validation rows X (m, D) and y (m,) like the training rows of a fit.

    Each row has weight one.

    Args:
        fitted: an estimator, or a Pipeline with fitted transformers.
        train: the training rows on which ``fitted`` was fitted.
        X: the validation rows.
        y: the targets of the validation rows.

    Raises:
        ValueError: the columns differ from the training rows. The errors of the transformers and of
            scikit-learn's checks are raised too.
    """
    prefix, last = last_step(fitted)
    for _, step in fitted.steps[:-1] if prefix else ():
        if step is not None and step != "passthrough":
            X = step.transform(X)
    rows = check_rows(clone(last), X, y)
    trained = train.rows
    parts = rows.X.parts
    # A transformer may return another precision than in training.
    if len(parts) == len(trained.X.parts):
        parts = tuple(x.to(part.dtype) for x, part in zip(parts, trained.X.parts))
    weights = None if trained.weights is None else np.ones(len(rows.X))
    rows = replace(rows, X=Arrays(parts, rows.X.names), weights=weights)
    if rows.form != trained.form:
        raise ValueError(
            "the transformers must return validation rows of the same form as training rows: "
            f"{ArrayLayout.of(trained.X)}, named {trained.names}, got {ArrayLayout.of(rows.X)}, "
            f"named {rows.names}."
        )
    return FoldRows(rows, np.arange(len(rows.X)))


def _as_rows(mask_or_rows: ArrayLike) -> IntArray:
    """Convert a boolean mask of rows to row positions. Positions stay unchanged."""
    array = np.asarray(mask_or_rows)
    return np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64)


def _check(
    estimator: FusedEstimator, X: object, y: object, sample_weight: object
) -> FoldRows | Exception:
    """Check rows for an estimator. Returns the checked rows, or the exception of the check."""
    rows = _result(functools.partial(check_rows, estimator, X, y, sample_weight))
    return rows if isinstance(rows, Exception) else FoldRows(rows, np.arange(len(rows.X)))


def _result(call: Callable[[], Returned]) -> Returned | Exception:
    """Call a function, and return its result or the exception that it raised."""
    try:
        return call()
    except Exception as error:
        return error
