"""One run of a search: it hears what candidates ask for, trains them together, and lets scikit-learn evaluate them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from joblib.parallel import get_active_backend
from sklearn.base import clone, is_classifier
from sklearn.model_selection import check_cv

from gputune.sklearn.dataset import Part
from gputune.sklearn.record import Hearing, Splits, ask
from gputune.sklearn.replay import Event, Fit, Playing, conducting, train

Candidates = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Trained:
    """Candidates that are trained in all ``splits``: what was made, in the order of scikit-learn's loop."""

    candidates: Candidates
    splits: Splits
    events: Sequence[Event]
    seconds: float
    """The share of the time that each fit has."""


@dataclass(eq=False)
class Run:
    """One call of a search's ``fit``. ``given`` is what was trained before, together with other searches."""

    estimator: Any
    cv: Any
    deadline: float | None = None
    given: Trained | None = None
    fit_params: Mapping[str, Any] = field(default_factory=dict)
    split_params: Mapping[str, Any] = field(default_factory=dict)
    hearing: Hearing = field(default_factory=Hearing)
    seconds: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    """How long each candidate trained, in the order of their evaluation."""

    def evaluate(
        self,
        evaluate_candidates: Callable[..., Any],
        candidate_params: Iterable[Any],
        cv: Any = None,
        more_results: Any = None,
        **context: Any,
    ) -> dict[str, Any]:
        """Do what scikit-learn's ``evaluate_candidates`` does, with fits that are made together."""
        candidates = list(candidate_params) if self.given is None else self.given.candidates
        playing = Playing()

        def split(X: Any, y: Any, params: Mapping[str, Any]) -> Splits:
            trained = self.given or self.make(candidates, X, y, self.split(X, y, params, cv))
            self._note(trained)
            playing.events.extend(trained.events)
            return trained.splits

        with conducting(playing):
            results: dict[str, Any] = evaluate_candidates(
                candidates, _Splitter(split), more_results=more_results, **context
            )
        playing.check_end()
        results["mean_fit_time"][:] = self.seconds
        results["std_fit_time"][:] = 0.0
        return results

    def split(self, X: Any, y: Any, params: Mapping[str, Any], cv: Any = None) -> Splits:
        """Return the splits of ``cv``, the search's own where it is None."""
        splitter = check_cv(self.cv if cv is None else cv, y, classifier=is_classifier(self.estimator))
        return list(splitter.split(X, y, **params))

    def make(self, candidates: Candidates, X: Any, y: Any, splits: Splits) -> Trained:
        """Train the candidates in all splits."""
        begin = time.monotonic()
        events = self.ask(candidates, X, y, splits)
        self.train(candidates, [event for event in events if isinstance(event, Fit)])
        share = (time.monotonic() - begin) / max(1, len(candidates) * len(splits))
        return Trained(candidates, splits, events, share)

    def ask(
        self, candidates: Candidates, X: Any, y: Any, splits: Splits, within: Part | None = None
    ) -> Sequence[Event]:
        """Return what the candidates ask for; X and y may be ``within`` rows that other searches share.

        Raises scikit-learn's ValueError for a parameter that the estimator has not.
        """
        chosen = [clone(self.estimator).set_params(**clone(params, safe=False)) for params in candidates]
        return ask(chosen, X, y, splits, self.fit_params, hearing=self.hearing, within=within)

    def train(self, candidates: Candidates, fits: Sequence[Fit]) -> None:
        """Train what was asked for."""
        train(fits, workers=workers(), deadline=self.deadline)

    def _note(self, trained: Trained) -> None:
        self.seconds += [trained.seconds] * len(trained.candidates)
        epochs = [1] * len(trained.candidates)
        for event in trained.events:
            if isinstance(event, Fit):
                epochs[event.trial] = max(epochs[event.trial], getattr(event.member(), "epochs", 1))
        self.epochs += epochs


@dataclass(frozen=True)
class _Splitter:
    """What scikit-learn takes for a splitter: it splits once, and training comes before the splits are returned."""

    once: Callable[[Any, Any, Mapping[str, Any]], Splits]

    def split(self, X: Any, y: Any = None, **params: Any) -> Splits:
        """Return the splits."""
        return self.once(X, y, params)


def workers() -> int | None:
    """Return 1 within a worker of joblib, whose neighbours have the other cores; None lets an estimate decide."""
    return 1 if get_active_backend()[0].nesting_level else None
