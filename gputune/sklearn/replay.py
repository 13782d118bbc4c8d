"""One run of a scikit-learn search, in which gputune trains all fits before scikit-learn's loop.

scikit-learn fits candidate after candidate, and fold after fold. gputune knows the steps of this
loop in advance and trains all of them first. Each ``fit`` call of the loop then receives its
trained result.
"""

import copy
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar, Self

import numpy as np
from joblib.parallel import get_active_backend
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.model_selection import check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_memory

from gputune.ground.errors import warn
from gputune.ground.types import Config
from gputune.sklearn.base import FusedEstimator, fit_hook, fit_together, hooked, last_step
from gputune.sklearn.recipe import FitOptions
from gputune.sklearn.record import (
    Event,
    FitRecorder,
    RecordedFit,
    Splits,
    Transformation,
    fits_of,
    layouts,
)

Candidates = Sequence[Config]


def train(fits: Iterable[RecordedFit], training: FitOptions) -> None:
    """Train the recorded fits of a search.

    Fits that share their rows and their estimator class train together.
    """
    for folds, trials in layouts(fits):
        first = folds.numbers[0]
        candidates = {trial: by_fold[first].estimator for trial, by_fold in trials.items()}
        for (fold, trial), fitted in fit_together(candidates, folds, training).items():
            trials[trial][fold].fitted = fitted
            trials[trial][fold].rows = folds.rows


def workers() -> int | None:
    """Return the number of worker processes.

    The result is 1 inside a joblib worker, because other workers use the other cores. Otherwise the
    result is None, and an estimate decides.
    """
    return 1 if get_active_backend()[0].nesting_level else None


class HookedMemory:
    """A replacement for the ``memory`` cache of a pipeline during a search.

    The object reports every fitted transformer to gputune's hook. Without a hook it works like the
    user's memory.
    """

    def __init__(self, memory: object) -> None:
        self.memory = memory

    def __repr__(self) -> str:
        return repr(self.memory)

    def cache(self, function: Callable[..., object], **options: object) -> Callable[..., object]:
        """Return a function that fits a transformer through gputune's hook, or through the user's
        memory without a hook."""
        hook = fit_hook.get()
        if hook is not None:
            return functools.partial(hook.transform, function)
        cached: Callable[..., object] = check_memory(self.memory).cache(function, **options)
        return cached

    def __sklearn_clone__(self) -> Self:
        return self


def with_hook(estimator: BaseEstimator, device: str) -> BaseEstimator:
    """Return a copy of the estimator that scikit-learn's search uses, with the search's device.

    The user's estimator is unchanged.
    """
    _, last = last_step(estimator)
    last = last if device == "auto" else clone(last).set_params(device=device)
    if not isinstance(estimator, Pipeline):
        return last
    copied = copy.copy(estimator)
    copied.steps = [*estimator.steps[:-1], (estimator.steps[-1][0], last)]
    copied.memory = HookedMemory(estimator.memory)
    return copied


@dataclass(frozen=True, eq=False)
class TrainedCandidates:
    """The candidates of a search that gputune has trained in all folds (``splits``).

    ``events`` holds the recorded fits and transformations in the order of scikit-learn's loop.
    ``seconds`` is the share of each fit in the training time.
    """

    candidates: Candidates
    splits: Splits
    events: Sequence[Event]
    seconds: float


@dataclass(eq=False)
class SearchRun:
    """One run of a search, which passes gputune's trained results to scikit-learn's loop.

    Attributes:
        trained: candidates that a hypergradient search has trained already.
        seconds: training time of each candidate, in the order of evaluation.
        epochs: number of trained epochs of each candidate, in the order of evaluation.
        steps: the remaining steps of scikit-learn's loop.
    """

    estimator: BaseEstimator
    cv: object
    deadline: float | None = None
    trained: TrainedCandidates | None = None
    fit_params: Mapping[str, object] = field(default_factory=dict)
    split_params: Mapping[str, object] = field(default_factory=dict)
    recorder: FitRecorder = field(default_factory=FitRecorder)
    seconds: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    steps: deque[Event] = field(default_factory=deque)
    patient: ClassVar[bool] = True
    """True if the training of a candidate can end early because its loss stalls."""

    def evaluate(
        self,
        evaluate_candidates: Callable[..., dict[str, np.ndarray]],
        candidate_params: Iterable[Config],
        cv: object = None,
        more_results: object = None,
        **context: object,
    ) -> dict[str, np.ndarray]:
        """Train all candidates together, then let scikit-learn's ``evaluate_candidates`` score
        them."""
        candidates = list(candidate_params) if self.trained is None else self.trained.candidates
        fits: list[RecordedFit] = []

        def split(X: object, y: object, **params: object) -> Splits:
            """Train all candidates together, and return the data splits of scikit-learn's search.

            scikit-learn calls this function in place of the ``split`` of a splitter, before it fits
            the candidates in a loop. Candidates that are trained already are not trained again.
            """
            trained = self.trained
            if trained is None:
                trained = self._train_all(candidates, X, y, self.split(X, y, params, cv))
            fits.extend(fits_of(trained.events))
            first = len(self.epochs)
            self.epochs += [1] * len(candidates)
            self.seconds += [np.nan] * len(candidates)
            for fit in fits:
                number = first + fit.trial
                self.epochs[number] = max(self.epochs[number], getattr(fit.fitted, "epochs", 1))
                self.seconds[number] = trained.seconds
            # scikit-learn's loop takes these steps in order.
            self.steps.extend(trained.events)
            return trained.splits

        with hooked(self):
            splitter = SimpleNamespace(split=split)
            try:
                results = evaluate_candidates(
                    candidates, splitter, more_results=more_results, **context
                )
            except ValueError as error:
                # scikit-learn's message begins with advice, and the reason is in a traceback.
                failures = [fit.error for fit in fits if fit.error is not None]
                if not failures or "fits failed" not in str(error):
                    raise
                reason = " ".join(str(failures[0]).split())
                first = f"The first one raised {type(failures[0]).__name__}: {reason}"
                raise ValueError(f"All the {len(fits)} fits failed. {first}") from error
        if self.steps:
            raise RuntimeError(
                f"{len(self.steps)} fits that were trained together were never used, because a "
                "joblib backend runs scikit-learn's loop elsewhere, or this release of "
                "scikit-learn has a different loop. Remove the backend (joblib.parallel_config), "
                "or use scikit-learn's own search."
            )
        together = ~np.isnan(self.seconds)  # the others were fitted by scikit-learn's loop
        results["mean_fit_time"][together] = np.array(self.seconds)[together]
        results["std_fit_time"][together] = 0.0
        return results

    def fit(self, estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> bool:
        """Set the fitted attributes of an estimator if its fit is the next recorded fit.

        Return False if the estimator must train itself.
        """
        del sample_weight
        if not self.steps or estimator._left_to_scikit_learn(y) is not None:
            return False
        step = self.steps[0]
        if not isinstance(step, RecordedFit) or not step.is_of(estimator, X):
            return False
        self.steps.popleft()
        step.finish(estimator)
        return True

    def transform(
        self, function: Callable[..., object], *args: object, **options: object
    ) -> object:
        """Return the next recorded result of a transformer.

        If the next record is not a transformation, fit the transformer.
        """
        step = self.steps[0] if self.steps else None
        if isinstance(step, Transformation):
            self.steps.popleft()
            return step.take()
        with hooked(None):
            return function(*args, **options)

    def split(
        self, X: object, y: object, params: Mapping[str, object], cv: object = None
    ) -> Splits:
        """Return the (train, test) row positions of each fold that ``cv`` makes.

        ``cv=None`` means the search's ``cv``.
        """
        splitter = check_cv(
            self.cv if cv is None else cv, y, classifier=is_classifier(self.estimator)
        )
        return list(splitter.split(X, y, **params))

    def _train_all(
        self, candidates: Candidates, X: object, y: object, splits: Splits
    ) -> TrainedCandidates:
        """Record the fits of all candidates in all folds, and train the fits together."""
        begin = time.monotonic()
        events = self.record(candidates, X, y, splits)
        self.train(candidates, fits_of(events))
        # Fits train together, so each gets an equal share of the time.
        share = (time.monotonic() - begin) / max(1, len(candidates) * len(splits))
        return TrainedCandidates(candidates, splits, events, share)

    def record(self, candidates: Candidates, X: object, y: object, splits: Splits) -> list[Event]:
        """Record the fits and transformations of candidates, and return them.

        Raises scikit-learn's ValueError for a parameter that the estimator does not have.
        """
        estimators = [
            clone(self.estimator).set_params(**clone(params, safe=False)) for params in candidates
        ]
        events = self.recorder.record(estimators, X, y, splits, self.fit_params)
        left = self.recorder.left
        if left:
            n_left = len({trial for trial, _ in left})
            settings = ", ".join(sorted(set(left.values())))
            warn(
                f"{n_left} of {len(candidates)} candidates are fitted by scikit-learn's own loop, "
                f"one by one, because gputune does not train {settings}."
            )
        return events

    def fit_options(self, candidates: Candidates) -> FitOptions:
        """Return the options (processes, deadline) with which the candidates train."""
        del candidates
        return FitOptions(workers(), self.deadline, patient=self.patient)

    def train(self, candidates: Candidates, fits: Sequence[RecordedFit]) -> None:
        """Train the recorded fits of the candidates together."""
        train(fits, self.fit_options(candidates))
