"""What a search asks for: every candidate in every fold, heard from the estimators themselves without training any."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import cloudpickle
import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params, _num_samples

from gputune.sklearn.base import FusedEstimator, check_rows
from gputune.sklearn.dataset import Part
from gputune.sklearn.held_out import held_out_part
from gputune.sklearn.replay import Event, Fit, Transformation, conducting

Splits = Sequence[tuple[Any, Any]]


def ask(
    candidates: Sequence[Any],
    X: Any,
    y: Any,
    splits: Splits,
    fit_params: Mapping[str, Any],
    *,
    hearing: "Hearing",
    within: Part | None = None,
) -> list[Event]:
    """Return what fitting every candidate in every fold takes, in the order of scikit-learn's loop.

    ``within`` are X and y as part of rows that other searches share; without it, they are checked here.
    """
    within = within or (shared_rows(candidates[0], X, y, fit_params) if candidates else None)
    if within is None:
        return hearing.listen(candidates, X, y, splits, fit_params)
    parts, held_out = (
        [Part(within.rows, within.index[_as_rows(split[side])]) for split in splits] for side in (0, 1)
    )
    return [
        Fit(trial, fold, candidate, len(part.index), part, valid if hearing.held_out else None)
        for trial, candidate in enumerate(candidates)
        for fold, (part, valid) in enumerate(zip(parts, held_out))
    ]


def shared_rows(candidate: Any, X: Any, y: Any, fit_params: Mapping[str, Any]) -> Part | None:
    """Return all rows, checked once for all folds; None where a fold has to be checked by itself.

    That is so in a pipeline, and where the whole is refused: a fold may not have the rows that are wrong.
    """
    if not isinstance(candidate, FusedEstimator) or set(fit_params) - {"sample_weight"}:
        return None
    found = _check(clone(candidate), X, y, fit_params.get("sample_weight"))
    return None if isinstance(found, Exception) else found


def _as_rows(train: Any) -> NDArray[np.int64]:
    train = np.asarray(train)
    return np.flatnonzero(train) if train.dtype == bool else train.astype(np.int64)


class Hearing:
    """Hears what fits ask for, without training; transformers are fitted as they come, unless they were before.

    ``held_out``: each fit is given its fold's validation rows too.
    """

    def __init__(self, *, held_out: bool = False) -> None:
        self.held_out = held_out
        self.events: list[Event] = []
        self.at = (0, 0)  # trial and fold
        self._parts: dict[Hashable, tuple[Part | Exception, Any]] = {}
        self._transformed: dict[Hashable, tuple[Transformation, Any]] = {}
        self._held_out: dict[Hashable, Part | Exception] = {}
        self._folds: dict[Hashable, tuple[tuple[Any, Any, dict[str, Any]], Any]] = {}

    def listen(
        self, candidates: Sequence[Any], X: Any, y: Any, splits: Splits, fit_params: Mapping[str, Any]
    ) -> list[Event]:
        """Call every fit of scikit-learn's loop and return what was heard."""
        self.events = []
        for trial, candidate in enumerate(candidates):
            for fold, (train, test) in enumerate(splits):
                self.at = (trial, fold)
                rows = self._rows(candidate, X, y, train, fit_params)
                # What fails here fails again where scikit-learn listens, in its loop.
                with conducting(self), suppress(Exception):
                    fitted = _silent(clone(candidate))
                    _fit(fitted, *rows)
                    if self.held_out:  # only now are the steps those of this fold
                        self._hold_out(fitted, X, y, train, test)
        return self.events

    def fit(self, estimator: FusedEstimator, X: Any, y: Any, sample_weight: Any) -> bool:
        """Note the fit; raises the error of rows that it refuses."""
        given = (X, y, sample_weight)
        key = (type(estimator), *map(id, given))
        if key not in self._parts:
            self._parts[key] = (_check(estimator, *given), given)  # kept, so that nothing else gets their ids
        asked = self._parts[key][0]
        n_rows = _num_samples(X) if isinstance(asked, Exception) else len(asked.index)
        self.events.append(Fit(*self.at, estimator, n_rows, asked))
        if isinstance(asked, Exception):
            raise asked.with_traceback(None)
        return True

    def transform(
        self, function: Callable[..., Any], transformer: Any, X: Any, y: Any, *given: Any, **named: Any
    ) -> Any:
        """Fit a transformer and return what ``function`` does, once for equal transformers on the same rows."""
        metadata = [value for routed in (named.get("params") or {}).values() for value in routed.values()]
        key = (_content(transformer), id(X), id(y), *map(id, metadata))
        if key not in self._transformed:
            call = functools.partial(function, transformer, X, y, *given, **named)
            with conducting(None):
                self._transformed[key] = (Transformation(_outcome(call)), (X, y, metadata))
        done = self._transformed[key][0]
        self.events.append(done)
        return done.take()

    def _hold_out(self, fitted: Any, X: Any, y: Any, train: Any, test: Any) -> None:
        """Give the fit that was just noted its validation rows: once for all candidates on the same training rows."""
        fit = self.events[-1]
        assert isinstance(fit, Fit) and isinstance(fit.asked, Part)
        key = (id(fit.asked), self.at[1])
        if key not in self._held_out:
            rows = _safe_split(fitted, X, y, test, train)
            with conducting(None):
                self._held_out[key] = _outcome(functools.partial(held_out_part, fitted, fit.asked, *rows))
        fit.held_out = self._held_out[key]

    def _rows(self, estimator: Any, X: Any, y: Any, train: Any, fit_params: Mapping[str, Any]) -> Any:
        """Return X, y and parameters of ``fit`` for some rows: the same objects whenever they are the same."""
        key = (id(X), id(y), np.asarray(train).tobytes(), *map(id, fit_params.values()))
        if key not in self._folds:
            params = _check_method_params(X, params=fit_params, indices=train)
            rows = (*_safe_split(estimator, X, y, train), params)
            self._folds[key] = (rows, (X, y, fit_params))
        return self._folds[key][0]


def _fit(estimator: Any, X: Any, y: Any, params: Mapping[str, Any]) -> None:
    """Call ``fit`` as scikit-learn's loop does."""
    if y is None:
        estimator.fit(X, **params)
    else:
        estimator.fit(X, y, **params)


def _silent(estimator: Any) -> Any:
    """Return the estimator without callbacks, which hear of the fits of scikit-learn's loop."""
    return estimator.set_callbacks() if hasattr(estimator, "set_callbacks") else estimator


def _check(estimator: FusedEstimator, X: Any, y: Any, sample_weight: Any) -> Part | Exception:
    try:
        rows = check_rows(estimator, X, y, sample_weight)
    except Exception as error:
        return error
    return Part(rows, np.arange(len(rows.X)))


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


def _content(transformer: Any) -> Hashable:
    """Return what equal transformers have in common; nothing else equals one that cannot be pickled."""
    try:
        return type(transformer), cloudpickle.dumps(transformer)
    except Exception:
        return id(transformer), object()
