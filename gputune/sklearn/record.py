"""What a search fits: every candidate in every fold, recorded from the estimators themselves
without training any."""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params, _num_samples

from gputune.data.arrays import ArrayLayout, Arrays
from gputune.sklearn.base import FusedEstimator, check_rows, hooked, last_step
from gputune.sklearn.dataset import FoldGroup, Part, Rows, lay_out
from gputune.sklearn.recipe import content

Splits = Sequence[tuple[ArrayLike, ArrayLike]]


@dataclass(eq=False)
class Fit:
    """One fit of a search: candidate ``trial`` on the training rows of ``fold``, or the error where
    they are refused.

    valid   the fold's validation rows, where the search differentiates its loss on them
    fitted  what training gave, or an exception; None before
    rows    those of all fits that were made together
    """

    trial: int
    fold: int
    estimator: FusedEstimator
    n_rows: int
    train: Part | Exception
    valid: Part | Exception | None = None
    fitted: object = None
    rows: Rows | None = None

    @property
    def error(self) -> Exception | None:
        """The exception that this fit raises, None where it succeeds."""
        return next(
            (each for each in (self.train, self.fitted) if isinstance(each, Exception)), None
        )

    def finish(self, estimator: FusedEstimator) -> None:
        """Make the estimator a fitted one, or raise the exception of this fit."""
        if self.error is not None:
            # It may be raised in many fits, and none should show the way to the one before.
            raise self.error.with_traceback(None)
        assert self.rows is not None
        estimator._become(self.fitted, self.rows)

    def is_of(self, estimator: FusedEstimator, X: object) -> bool:
        """Say whether this is the fit that the estimator wants, by what a copy has in the same
        words."""
        kinds = (bool, int, float, str, type(None))
        params, own = (
            {
                name: repr(value)
                for name, value in each.get_params(deep=False).items()
                if isinstance(value, kinds)
            }
            for each in (estimator, self.estimator)
        )
        return (
            type(estimator) is type(self.estimator)
            and _num_samples(X) == self.n_rows
            and params == own
        )


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


def fits_of(events: Iterable[Event]) -> list[Fit]:
    return [event for event in events if isinstance(event, Fit)]


Trials = dict[int, dict[int, Fit]]  # fits by trial and fold


def layouts(fits: Iterable[Fit], *, held_out: bool = False) -> Iterator[tuple[FoldGroup, Trials]]:
    """Yield folds, and the trials that are fitted together in them: of one class, on the same rows
    of one form.

    ``held_out``: the folds have their validation rows too.
    """
    by_trial: Trials = defaultdict(dict)
    for fit in fits:
        if isinstance(fit.train, Part):
            by_trial[fit.trial][fit.fold] = fit
    groups: dict[Hashable, Trials] = defaultdict(dict)
    for trial, own in by_trial.items():
        key = tuple((fold, type(fit.estimator), id(fit.train)) for fold, fit in own.items())
        groups[key][trial] = own
    for trials in groups.values():
        sides = {
            n: (fit.train, fit.valid if held_out else None)
            for n, fit in next(iter(trials.values())).items()
        }
        for folds in lay_out(
            {n: [part for part in both if isinstance(part, Part)] for n, both in sides.items()}
        ):
            yield folds, trials


def shared_rows(
    candidate: object, X: object, y: object, fit_params: Mapping[str, object]
) -> Part | None:
    """Return all rows, checked once for all folds; None where a fold has to be checked by itself.

    That is so in a pipeline, and where the whole is refused: a fold may not have the rows that are
    wrong.
    """
    if not isinstance(candidate, FusedEstimator) or set(fit_params) - {"sample_weight"}:
        return None
    part = _check(clone(candidate), X, y, fit_params.get("sample_weight"))
    return None if isinstance(part, Exception) else part


Returned = TypeVar("Returned")


class Recorder:
    """Records fits, which train nothing meanwhile; transformers are fitted as they come, unless
    they were before.

    ``held_out``: each fit is given its fold's validation rows too.
    """

    def __init__(self, *, held_out: bool = False) -> None:
        # trial and fold
        self.held_out = held_out
        self.place = (0, 0)
        self.events: list[Event] = []
        # the fits that are left to scikit-learn's loop, and why
        self.left: dict[tuple[int, int], str] = {}
        self._made: dict[Hashable, tuple[Any, object]] = {}

    def record(
        self,
        candidates: Sequence[BaseEstimator],
        X: object,
        y: object,
        splits: Splits,
        fit_params: Mapping[str, object],
        within: Part | None = None,
    ) -> list[Event]:
        """Return what fitting every candidate in every fold takes, in the order of scikit-learn's
        loop.

        ``within`` are X and y as part of rows that other searches share; without it, they are
        checked here.
        """
        within = within or (shared_rows(candidates[0], X, y, fit_params) if candidates else None)
        self.events = []
        self.left = {}
        if within is not None:
            self._record_parts(candidates, splits, within)
            return self.events
        for (trial, candidate), (fold, (train, test)) in itertools.product(
            enumerate(candidates), enumerate(splits)
        ):
            self.place = (trial, fold)
            arguments, params = self._arguments(candidate, X, y, train, fit_params)
            # What fails here fails again where it is replayed, in scikit-learn's loop.
            with hooked(self), suppress(Exception):
                fitted = clone(candidate)
                # which hear of the fits of scikit-learn's loop
                if hasattr(fitted, "set_callbacks"):
                    fitted.set_callbacks()
                fitted.fit(*arguments, **params)
                # only now are the steps those of this fold
                if self.held_out and self.place not in self.left:
                    self._hold_out(fitted, X, y, train, test)
        return self.events

    def _record_parts(
        self, candidates: Sequence[FusedEstimator], splits: Splits, within: Part
    ) -> None:
        """Record candidates whose rows are parts of checked ones."""
        rows = within.rows
        classes = within.rows.classes
        trains, valids = (
            [Part(rows, within.index[_as_rows(split[side])]) for split in splits] for side in (0, 1)
        )
        targets = [
            rows.y[train.index] if classes is None else classes[rows.y[train.index]]
            for train in trains
        ]
        for t, f in itertools.product(range(len(candidates)), range(len(splits))):
            if (reason := candidates[t]._left_to_scikit_learn(targets[f])) is not None:
                self.left[t, f] = reason
                continue
            valid = valids[f] if self.held_out else None
            self.events.append(Fit(t, f, candidates[t], len(trains[f].index), trains[f], valid))

    def fit(self, estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> bool:
        """Note the fit, unless it is left to scikit-learn's loop; raises the error of rows that it
        refuses."""
        if (reason := estimator._left_to_scikit_learn(y)) is not None:
            self.left[self.place] = reason
            return True
        given = (X, y, sample_weight)
        train = self._once(
            (type(estimator), *map(id, given)), given, lambda: _check(estimator, *given)
        )
        n_rows = _num_samples(X) if isinstance(train, Exception) else len(train.index)
        self.events.append(Fit(*self.place, estimator, n_rows, train))
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
        """Fit a transformer and return what ``function`` does, once for equal transformers on the
        same rows."""
        metadata = [
            value for routed in (options.get("params") or {}).values() for value in routed.values()
        ]
        fit = functools.partial(function, transformer, X, y, *args, **options)
        key = (content(transformer), id(X), id(y), *map(id, metadata))
        with hooked(None):
            event = self._once(key, (X, y, metadata), lambda: Transformation(_result(fit)))
        self.events.append(event)
        return event.take()

    def _once(self, key: Hashable, owners: object, make: Callable[[], Returned]) -> Returned:
        """Return what ``make`` does, once for a key; ``owners`` are kept, so that nothing else gets
        their ids."""
        if key not in self._made:
            self._made[key] = make(), owners
        made: Returned = self._made[key][0]
        return made

    def _hold_out(self, fitted: object, X: object, y: object, train: object, test: object) -> None:
        """Give the fit that was just noted its validation rows: once for all candidates on the same
        training rows."""
        fit = self.events[-1]
        assert isinstance(fit, Fit) and isinstance(fit.train, Part)
        part = fit.train

        def hold_out() -> Part:
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
        """Return what ``fit`` is given for some rows: the same objects whenever they are the
        same."""

        def split() -> tuple[tuple[object, ...], Mapping[str, object]]:
            rows = _safe_split(estimator, X, y, train)
            return rows if y is not None else rows[:1], _check_method_params(
                X, params=fit_params, indices=train
            )

        key = (id(X), id(y), np.asarray(train).tobytes(), *map(id, fit_params.values()))
        return self._once(key, (X, y, fit_params), split)


def held_out_part(fitted: BaseEstimator, train: Part, X: object, y: object) -> Part:
    """Return rows X (m, D) and y (m,) as validation rows beside ``train``, on which ``fitted`` was
    fitted.

    ``fitted`` is an estimator, or a Pipeline whose transformers are fitted. The rows weigh one
    each. Raises what the transformers and scikit-learn's checks raise, and ValueError where the
    columns are not those of the training rows.
    """
    prefix, last = last_step(fitted)
    for _, step in fitted.steps[:-1] if prefix else ():
        if step is not None and step != "passthrough":
            X = step.transform(X)
    rows = check_rows(clone(last), X, y)
    before = train.rows
    parts = rows.X.parts
    # a transformer may give other precisions than in training
    if len(parts) == len(before.X.parts):
        parts = tuple(x.to(part.dtype) for x, part in zip(parts, before.X.parts))
    weights = None if before.weights is None else np.ones(len(rows.X))
    rows = replace(rows, X=Arrays(parts, rows.X.names), weights=weights)
    if rows.form != before.form:
        raise ValueError(
            f"the transformers gave validation rows of {ArrayLayout.of(rows.X)}, named "
            f"{rows.names}, after training rows of {ArrayLayout.of(before.X)}, named "
            f"{before.names}; let them give the same ones."
        )
    return Part(rows, np.arange(len(rows.X)))


def _as_rows(mask_or_rows: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(mask_or_rows)
    return np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64)


def _check(
    estimator: FusedEstimator, X: object, y: object, sample_weight: object
) -> Part | Exception:
    rows = _result(functools.partial(check_rows, estimator, X, y, sample_weight))
    return rows if isinstance(rows, Exception) else Part(rows, np.arange(len(rows.X)))


def _result(call: Callable[[], Returned]) -> Returned | Exception:
    try:
        return call()
    except Exception as error:
        return error
