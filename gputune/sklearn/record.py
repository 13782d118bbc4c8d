"""What a search fits: every candidate in every fold, recorded from the estimators themselves without training any."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params, _num_samples

from gputune.data.arrays import ArrayLayout, Arrays
from gputune.sklearn.base import FusedEstimator, check_rows, fit_hook, last_step, using
from gputune.sklearn.dataset import Part, Rows, form
from gputune.sklearn.recipe import content

Splits = Sequence[tuple[ArrayLike, ArrayLike]]


@dataclass(eq=False)
class Fit:
    """One fit of a search: candidate ``trial`` on the training rows of ``fold``, or the error where they are refused.

    ``valid`` are the fold's validation rows, where the search differentiates its loss on them.
    """

    trial: int
    fold: int
    estimator: FusedEstimator
    n_rows: int
    train: Part | Exception
    valid: Part | Exception | None = None
    fitted: object = None
    """What training gave, or an exception; None before."""
    rows: Rows | None = None
    """Those of all fits that were made together."""

    @property
    def error(self) -> Exception | None:
        """The exception that this fit raises, None where it succeeds."""
        result = self.train if isinstance(self.train, Exception) else self.fitted
        return result if isinstance(result, Exception) else None

    def finish(self, estimator: FusedEstimator) -> None:
        """Make the estimator a fitted one, or raise the exception of this fit."""
        if self.error is not None:
            # It may be raised in many fits, and none should show the way to the one before.
            raise self.error.with_traceback(None)
        assert self.rows is not None
        estimator._become(self.fitted, self.rows)

    def is_of(self, estimator: FusedEstimator, X: object) -> bool:
        """Say whether this is the fit that the estimator wants."""
        alike = type(estimator) is type(self.estimator) and _num_samples(X) == self.n_rows
        return alike and _plain_params(estimator) == _plain_params(self.estimator)


@dataclass(frozen=True, eq=False)
class Transformation:
    """What fitting a transformer gave and transformed, or the exception that it raised."""

    result: object

    def take(self) -> object:
        """Return what it gave, or raise its exception."""
        if isinstance(self.result, Exception):
            raise self.result.with_traceback(None)
        return self.result


Event = Fit | Transformation

FitArguments = tuple[object, object, Mapping[str, object]]
"""X, y and the parameters of ``fit``."""

Returned = TypeVar("Returned")


def _plain_params(estimator: FusedEstimator) -> dict[str, str]:
    """Return the parameters that a copy of the estimator has in the same words."""
    kinds = (bool, int, float, str, type(None))
    return {n: repr(v) for n, v in estimator.get_params(deep=False).items() if isinstance(v, kinds)}


def fits_of(events: Sequence[Event]) -> list[Fit]:
    """Return the fits among the events."""
    return [event for event in events if isinstance(event, Fit)]


def shared_rows(candidate: object, X: object, y: object, fit_params: Mapping[str, object]) -> Part | None:
    """Return all rows, checked once for all folds; None where a fold has to be checked by itself.

    That is so in a pipeline, and where the whole is refused: a fold may not have the rows that are wrong.
    """
    if not isinstance(candidate, FusedEstimator) or set(fit_params) - {"sample_weight"}:
        return None
    part = _check(clone(candidate), X, y, fit_params.get("sample_weight"))
    return None if isinstance(part, Exception) else part


class Recorder:
    """Records fits, which train nothing meanwhile; transformers are fitted as they come, unless they were before.

    ``held_out``: each fit is given its fold's validation rows too.
    """

    def __init__(self, *, held_out: bool = False) -> None:
        self.held_out = held_out
        self.events: list[Event] = []
        self.place = (0, 0)  # trial and fold
        self.left: dict[tuple[int, int], str] = {}
        """The fits that are left to scikit-learn's loop, and why."""
        # Each beside what its key has the ids of, so that nothing else gets them.
        self._parts: dict[Hashable, tuple[Part | Exception, object]] = {}
        self._transformed: dict[Hashable, tuple[Transformation, object]] = {}
        self._folds: dict[Hashable, tuple[FitArguments, object]] = {}
        self._valid: dict[Hashable, Part | Exception] = {}

    def record(
        self,
        candidates: Sequence[BaseEstimator],
        X: object,
        y: object,
        splits: Splits,
        fit_params: Mapping[str, object],
        within: Part | None = None,
    ) -> list[Event]:
        """Return what fitting every candidate in every fold takes, in the order of scikit-learn's loop.

        ``within`` are X and y as part of rows that other searches share; without it, they are checked here.
        """
        within = within or (shared_rows(candidates[0], X, y, fit_params) if candidates else None)
        if within is not None:
            return self._of_parts(candidates, splits, within)
        self.events, self.left = [], {}
        for trial, candidate in enumerate(candidates):
            for fold, (train, test) in enumerate(splits):
                self.place = (trial, fold)
                rows = self._rows(candidate, X, y, train, fit_params)
                # What fails here fails again where it is replayed, in scikit-learn's loop.
                with using(fit_hook, self), suppress(Exception):
                    fitted = clone(candidate)
                    if hasattr(fitted, "set_callbacks"):  # which hear of the fits of scikit-learn's loop
                        fitted.set_callbacks()
                    _fit(fitted, *rows)
                    if self.held_out and self.place not in self.left:  # only now are the steps those of this fold
                        self._hold_out(fitted, X, y, train, test)
        return self.events

    def _of_parts(self, candidates: Sequence[BaseEstimator], splits: Splits, within: Part) -> list[Event]:
        trains, valids = (
            [Part(within.rows, within.index[_as_rows(split[side])]) for split in splits] for side in (0, 1)
        )
        labels = [within.rows.labels(train.index) for train in trains]
        reasons = [[candidate._left_to_scikit_learn(y) for y in labels] for candidate in candidates]
        self.left = {(t, f): why for t, row in enumerate(reasons) for f, why in enumerate(row) if why is not None}
        return [
            Fit(trial, fold, candidate, len(train.index), train, valid if self.held_out else None)
            for trial, candidate in enumerate(candidates)
            for fold, (train, valid) in enumerate(zip(trains, valids))
            if (trial, fold) not in self.left
        ]

    def fit(self, estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> bool:
        """Note the fit, unless it is left to scikit-learn's loop; raises the error of rows that it refuses."""
        reason = estimator._left_to_scikit_learn(y)
        if reason is not None:
            self.left[self.place] = reason
            return True
        arguments = (X, y, sample_weight)
        key = (type(estimator), *map(id, arguments))
        if key not in self._parts:
            self._parts[key] = (_check(estimator, *arguments), arguments)
        train = self._parts[key][0]
        n_rows = _num_samples(X) if isinstance(train, Exception) else len(train.index)
        self.events.append(Fit(*self.place, estimator, n_rows, train))
        if isinstance(train, Exception):
            raise train.with_traceback(None)
        return True

    def transform(
        self, function: Callable[..., object], transformer: object, X: object, y: object, *args: object, **options: Any
    ) -> object:
        """Fit a transformer and return what ``function`` does, once for equal transformers on the same rows."""
        metadata = [value for routed in (options.get("params") or {}).values() for value in routed.values()]
        key = (content(transformer), id(X), id(y), *map(id, metadata))
        if key not in self._transformed:
            call = functools.partial(function, transformer, X, y, *args, **options)
            with using(fit_hook, None):
                self._transformed[key] = (Transformation(_result(call)), (X, y, metadata))
        event = self._transformed[key][0]
        self.events.append(event)
        return event.take()

    def _hold_out(self, fitted: object, X: object, y: object, train: object, test: object) -> None:
        """Give the fit that was just noted its validation rows: once for all candidates on the same training rows."""
        fit = self.events[-1]
        assert isinstance(fit, Fit) and isinstance(fit.train, Part)
        key = (id(fit.train), self.place[1])
        if key not in self._valid:
            rows = _safe_split(fitted, X, y, test, train)
            with using(fit_hook, None):
                self._valid[key] = _result(functools.partial(held_out_part, fitted, fit.train, *rows))
        fit.valid = self._valid[key]

    def _rows(
        self, estimator: object, X: object, y: object, train: object, fit_params: Mapping[str, object]
    ) -> FitArguments:
        """Return X, y and parameters of ``fit`` for some rows: the same objects whenever they are the same."""
        key = (id(X), id(y), np.asarray(train).tobytes(), *map(id, fit_params.values()))
        if key not in self._folds:
            params = _check_method_params(X, params=fit_params, indices=train)
            self._folds[key] = (*_safe_split(estimator, X, y, train), params), (X, y, fit_params)
        return self._folds[key][0]


def held_out_part(fitted: BaseEstimator, train: Part, X: object, y: object) -> Part:
    """Return rows X (m, D) and y (m,) as validation rows beside ``train``, on which ``fitted`` was fitted.

    ``fitted`` is an estimator, or a Pipeline whose transformers are fitted. The rows weigh one each. Raises what the
    transformers and scikit-learn's checks raise, and ValueError where the columns are not those of the training rows.
    """
    prefix, last = last_step(fitted)
    for _, step in fitted.steps[:-1] if prefix else ():
        if step is not None and step != "passthrough":
            X = step.transform(X)
    rows = check_rows(clone(last), X, y)
    weights = None if train.rows.weights is None else np.ones(len(rows.X))
    if len(rows.X.parts) == len(train.rows.X.parts):  # a transformer may give other precisions than in training
        parts = tuple(x.to(part.dtype) for x, part in zip(rows.X.parts, train.rows.X.parts))
        rows = replace(rows, X=Arrays(parts, rows.X.names))
    rows = replace(rows, weights=weights)
    if form(rows) != form(train.rows):
        now, before = ArrayLayout.of(rows.X), ArrayLayout.of(train.rows.X)
        raise ValueError(
            f"the transformers gave validation rows of {now}, named {rows.names}, after training rows of {before}, "
            f"named {train.rows.names}; let them give the same ones."
        )
    return Part(rows, np.arange(len(rows.X)))


def _as_rows(mask_or_rows: object) -> NDArray[np.int64]:
    array = np.asarray(mask_or_rows)
    return np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64)


def _fit(estimator: BaseEstimator, X: object, y: object, params: Mapping[str, object]) -> None:
    """Call ``fit`` as scikit-learn's loop does."""
    if y is None:
        estimator.fit(X, **params)
    else:
        estimator.fit(X, y, **params)


def _check(estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> Part | Exception:
    rows = _result(functools.partial(check_rows, estimator, X, y, sample_weight))
    return rows if isinstance(rows, Exception) else Part(rows, np.arange(len(rows.X)))


def _result(call: Callable[[], Returned]) -> Returned | Exception:
    try:
        return call()
    except Exception as error:
        return error
