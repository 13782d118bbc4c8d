"""The fits of a search as a tape: first asked for, then trained together, then played while scikit-learn evaluates.

scikit-learn fits candidate after candidate, and of each one fold after the other. What its loop does is known before,
so that every step of it finds what it would have made.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sklearn.utils.validation import _num_samples

from gputune.sklearn.base import Conductor, Fits, FusedEstimator, conductor, fit_together
from gputune.sklearn.dataset import Part, lay_out
from gputune.sklearn.words import Begun


@dataclass(eq=False)
class Fit:
    """One fit that a search asks for: candidate ``trial`` in ``fold``; the error where its rows are refused.

    ``held_out`` are the fold's validation rows, where the search differentiates its loss on them.
    """

    trial: int
    fold: int
    estimator: FusedEstimator
    n_rows: int
    asked: Part | Exception
    held_out: Part | Exception | None = None
    made: tuple[Fits, int, int] | None = None
    """All fits made together, and which fold and trial this one is of them."""

    def error(self) -> Exception | None:
        """Return the exception that this fit raises, None where it succeeds."""
        if isinstance(self.asked, Exception):
            return self.asked
        assert self.made is not None
        fits, fold, trial = self.made
        return fits.error(fold, trial)

    def settle(self, estimator: FusedEstimator) -> None:
        """Make the estimator a fitted one, or raise the exception of this fit."""
        error = self.error()
        if error is not None:
            # It may be raised in many fits, and none should show the way to the one before.
            raise error.with_traceback(None)
        assert self.made is not None
        fits, fold, trial = self.made
        fits.settle(estimator, fold, trial)

    def member(self) -> Any:
        """Return what was made, an exception where it failed; None where its rows were refused."""
        if self.made is None:
            return None
        fits, fold, trial = self.made
        return fits.found[fold, trial]

    def is_of(self, estimator: FusedEstimator, X: Any) -> bool:
        """Say whether this is the fit that the estimator wants."""
        alike = type(estimator) is type(self.estimator) and _num_samples(X) == self.n_rows
        return alike and _plain(estimator) == _plain(self.estimator)


@dataclass(frozen=True, eq=False)
class Transformation:
    """What fitting a transformer gave and transformed, or the exception that it raised."""

    outcome: Any

    def take(self) -> Any:
        """Return what it gave, or raise its exception."""
        if isinstance(self.outcome, Exception):
            raise self.outcome.with_traceback(None)
        return self.outcome


Event = Fit | Transformation


def _plain(estimator: FusedEstimator) -> dict[str, str]:
    """Return the parameters that a copy of the estimator has in the same words."""
    kinds = (bool, int, float, str, type(None))
    return {n: repr(v) for n, v in estimator.get_params(deep=False).items() if isinstance(v, kinds)}


@contextmanager
def conducting(search: Conductor | None) -> Iterator[None]:
    """Let a search hear of every fit inside; None: let estimators fit themselves."""
    token = conductor.set(search)
    try:
        yield
    finally:
        conductor.reset(token)


def train(
    fits: Sequence[Fit],
    *,
    workers: int | None = 1,
    deadline: float | None = None,
    begun: Sequence[Begun] | None = None,
) -> None:
    """Train all fits that were asked for, as many together as share their rows and their class.

    ``begun`` says for each trial where its training goes on from.
    """
    for trials in fits_alike([fit for fit in fits if isinstance(fit.asked, Part)]):
        _train_group(trials, workers, deadline, begun)


def fits_alike(fits: Iterable[Fit]) -> list[list[list[Fit]]]:
    """Return groups of trials, each as its fits, that are of one class and wanted on the same rows."""
    by_trial: dict[int, list[Fit]] = defaultdict(list)
    for fit in fits:
        by_trial[fit.trial].append(fit)
    groups: dict[Any, list[list[Fit]]] = defaultdict(list)
    for own in by_trial.values():
        groups[type(own[0].estimator), tuple((fit.fold, id(fit.asked)) for fit in own)].append(own)
    return list(groups.values())


def _train_group(
    trials: Sequence[Sequence[Fit]],
    workers: int | None,
    deadline: float | None,
    begun: Sequence[Begun] | None,
) -> None:
    """Train trials (C) that are wanted on the same rows (F)."""
    parts = [fit.asked for fit in trials[0] if isinstance(fit.asked, Part)]
    for layout in lay_out(parts):
        wanted = [[own[place] for place in layout.places] for own in trials]
        made = fit_together(
            [own[0].estimator for own in wanted],
            layout.rows,
            layout.folds,
            workers=workers,
            deadline=deadline,
            begun=None if begun is None else [_in_layout(begun[own[0].trial], own) for own in wanted],
        )
        for trial, own in enumerate(wanted):
            for fold, fit in enumerate(own):
                fit.made = (made, fold, trial)


def _in_layout(begun: Begun, fits: Sequence[Fit]) -> Begun:
    """Return where a trial is, with its folds numbered as they are laid out."""
    states = begun.states
    return replace(begun, states={i: states[fit.fold] for i, fit in enumerate(fits)} if states else {})


class Playing:
    """Hands each fit of scikit-learn's loop what was made for it. A fit that is no step of the loop fits itself."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()

    def fit(self, estimator: FusedEstimator, X: Any, y: Any, sample_weight: Any) -> bool:
        """Settle the estimator where it is its turn."""
        event = self.events[0] if self.events else None
        if not isinstance(event, Fit) or not event.is_of(estimator, X):
            return False
        self.events.popleft()
        event.settle(estimator)
        return True

    def transform(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Return what fitting a transformer gave where it is its turn, else fit it."""
        event = self.events[0] if self.events else None
        if not isinstance(event, Transformation):
            with conducting(None):
                return function(*given, **named)
        self.events.popleft()
        return event.take()

    def check_end(self) -> None:
        """Raise RuntimeError where scikit-learn's loop did not take what was made for it."""
        if self.events:
            raise RuntimeError(
                f"{len(self.events)} of the fits that were trained together were never asked for: a backend of joblib "
                "runs scikit-learn's loop elsewhere, or this release of scikit-learn has another loop. Leave the "
                "backend (joblib.parallel_config), or use scikit-learn's own search."
            )
