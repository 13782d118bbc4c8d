"""One run of a search: its fits are recorded, trained together, and replayed while scikit-learn evaluates them.

scikit-learn fits candidate after candidate, and of each one fold after the other. What its loop does is known before,
so that every step of it finds what it would have made.
"""

import copy
import functools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from joblib.parallel import get_active_backend
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.model_selection import check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_memory

from gputune.errors import warn
from gputune.sklearn.base import FusedEstimator, fit_hook, fit_together, last_step, using
from gputune.sklearn.dataset import Part, lay_out
from gputune.sklearn.recipe import RungState
from gputune.sklearn.record import Event, Fit, Recorder, Splits, Transformation, fits_of
from gputune.types import Config

Candidates = Sequence[Config]


def train(
    fits: Iterable[Fit],
    *,
    workers: int | None = 1,
    deadline: float | None = None,
    states: Sequence[RungState] | None = None,
    patient: bool = True,
) -> None:
    """Train fits, as many together as share their rows and their class.

    ``states`` say for each trial where its training goes on from; unless ``patient``, all train to their last epoch.
    """
    for trials in group_fits(fit for fit in fits if isinstance(fit.train, Part)):
        for layout in lay_out([fit.train for fit in trials[0] if isinstance(fit.train, Part)]):
            members = [[trial[place] for place in layout.places] for trial in trials]
            results = fit_together(
                [trial[0].estimator for trial in members],
                layout.rows,
                layout.folds,
                workers=workers,
                deadline=deadline,
                states=None if states is None else [_in_layout(states[t[0].trial], t) for t in members],
                patient=patient,
            )
            for c, trial in enumerate(members):
                for f, fit in enumerate(trial):
                    fit.fitted, fit.rows = results[f, c], layout.rows


def group_fits(fits: Iterable[Fit]) -> list[list[list[Fit]]]:
    """Return groups of trials, each as its fits, that are of one class and train on the same rows."""
    by_trial: dict[int, list[Fit]] = defaultdict(list)
    for fit in fits:
        by_trial[fit.trial].append(fit)
    groups: dict[Hashable, list[list[Fit]]] = defaultdict(list)
    for trial in by_trial.values():
        groups[type(trial[0].estimator), tuple((fit.fold, id(fit.train)) for fit in trial)].append(trial)
    return list(groups.values())


def _in_layout(state: RungState, fits: Sequence[Fit]) -> RungState:
    """Return the state of a trial with its folds numbered as they are laid out."""
    buffers = state.buffers
    return replace(state, buffers={i: buffers[fit.fold] for i, fit in enumerate(fits)} if buffers else {})


def workers() -> int | None:
    """Return 1 within a worker of joblib, whose neighbours have the other cores; None lets an estimate decide."""
    return 1 if get_active_backend()[0].nesting_level else None


class HookedMemory:
    """The ``memory`` of a pipeline in a search: the hook has every fitted transformer; elsewhere it is the user's."""

    def __init__(self, memory: object) -> None:
        self.memory = memory

    def __repr__(self) -> str:
        return repr(self.memory)

    def cache(self, function: Callable[..., object], **options: object) -> Callable[..., object]:
        """Return the function that fits a transformer, through the hook where there is one."""
        hook = fit_hook.get()
        if hook is not None:
            return functools.partial(hook.transform, function)
        cached: Callable[..., object] = check_memory(self.memory).cache(function, **options)
        return cached

    def __sklearn_clone__(self) -> Self:
        return self


def with_hook(estimator: BaseEstimator, device: str) -> BaseEstimator:
    """Return the estimator as scikit-learn gets it while a search runs; the user's own stays as it is."""
    copied = estimator
    if isinstance(estimator, Pipeline):
        copied = copy.copy(estimator)
        copied.steps = list(estimator.steps)
        copied.memory = HookedMemory(estimator.memory)
    if device == "auto":
        return copied
    prefix, last = last_step(copied)
    on_device = clone(last).set_params(device=device)
    if not prefix:
        return on_device
    copied.steps[-1] = (copied.steps[-1][0], on_device)
    return copied


def without_hook(estimator: object) -> None:
    """Give a refitted estimator the user's own ``memory`` back."""
    if isinstance(estimator, Pipeline) and isinstance(estimator.memory, HookedMemory):
        estimator.memory = estimator.memory.memory


class Replay:
    """Hands each fit of scikit-learn's loop what was made for it. A fit that is no step of the loop fits itself."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()

    def fit(self, estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> bool:
        """Finish the estimator where it is its turn."""
        del sample_weight
        event = self.events[0] if self.events and estimator._left_to_scikit_learn(y) is None else None
        if not isinstance(event, Fit) or not event.is_of(estimator, X):
            return False
        self.events.popleft()
        event.finish(estimator)
        return True

    def transform(self, function: Callable[..., object], *args: object, **options: object) -> object:
        """Return what fitting a transformer gave where it is its turn, else fit it."""
        event = self.events[0] if self.events else None
        if not isinstance(event, Transformation):
            with using(fit_hook, None):
                return function(*args, **options)
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


@dataclass(frozen=True, eq=False)
class TrainedCandidates:
    """Candidates that are trained in all ``splits``, with the events of scikit-learn's loop.

    ``seconds`` is the share of the time that each fit has.
    """

    candidates: Candidates
    splits: Splits
    events: Sequence[Event]
    seconds: float


@dataclass(eq=False)
class SearchRun:
    """One call of a search's ``fit``. ``trained`` are candidates that were trained before, with other searches."""

    estimator: BaseEstimator
    cv: object
    deadline: float | None = None
    trained: TrainedCandidates | None = None
    fit_params: Mapping[str, object] = field(default_factory=dict)
    split_params: Mapping[str, object] = field(default_factory=dict)
    recorder: Recorder = field(default_factory=Recorder)
    seconds: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    """How long each candidate trained, in the order of their evaluation."""

    def evaluate(
        self,
        evaluate_candidates: Callable[..., dict[str, np.ndarray]],
        candidate_params: Iterable[Config],
        cv: object = None,
        more_results: object = None,
        **context: object,
    ) -> dict[str, np.ndarray]:
        """Do what scikit-learn's ``evaluate_candidates`` does, with fits that are made together."""
        candidates = list(candidate_params) if self.trained is None else self.trained.candidates
        replay = Replay()

        def split(X: object, y: object, params: Mapping[str, object]) -> Splits:
            trained = self.trained or self._train_all(candidates, X, y, self.split(X, y, params, cv))
            self._note(trained)
            replay.events.extend(trained.events)
            return trained.splits

        with using(fit_hook, replay):
            results = evaluate_candidates(candidates, _Splitter(split), more_results=more_results, **context)
        replay.check_end()
        together = ~np.isnan(self.seconds)  # the others were fitted in this loop
        results["mean_fit_time"][together] = np.array(self.seconds)[together]
        results["std_fit_time"][together] = 0.0
        return results

    def split(self, X: object, y: object, params: Mapping[str, object], cv: object = None) -> Splits:
        """Return the splits of ``cv``, the search's own where it is None."""
        splitter = check_cv(self.cv if cv is None else cv, y, classifier=is_classifier(self.estimator))
        return list(splitter.split(X, y, **params))

    def _train_all(self, candidates: Candidates, X: object, y: object, splits: Splits) -> TrainedCandidates:
        begin = time.monotonic()
        events = self.record(candidates, X, y, splits)
        self.train(candidates, fits_of(events))
        share = (time.monotonic() - begin) / max(1, len(candidates) * len(splits))
        return TrainedCandidates(candidates, splits, events, share)

    def record(
        self, candidates: Candidates, X: object, y: object, splits: Splits, within: Part | None = None
    ) -> list[Event]:
        """Return what fitting the candidates takes; X and y may be ``within`` rows that other searches share.

        Raises scikit-learn's ValueError for a parameter that the estimator has not.
        """
        estimators = [clone(self.estimator).set_params(**clone(params, safe=False)) for params in candidates]
        events = self.recorder.record(estimators, X, y, splits, self.fit_params, within)
        if left := self.recorder.left:
            warn(
                f"{len({trial for trial, _ in left})} of {len(candidates)} candidates are fitted by scikit-learn's own "
                f"loop, one by one, because gputune does not train {', '.join(sorted(set(left.values())))}."
            )
        return events

    def train(self, candidates: Candidates, fits: Sequence[Fit]) -> None:
        """Train the fits of candidates."""
        del candidates
        train(fits, workers=workers(), deadline=self.deadline)

    def _note(self, trained: TrainedCandidates) -> None:
        together = {fit.trial for fit in fits_of(trained.events)}
        self.seconds += [trained.seconds if i in together else np.nan for i in range(len(trained.candidates))]
        epochs = [1] * len(trained.candidates)
        for fit in fits_of(trained.events):
            epochs[fit.trial] = max(epochs[fit.trial], getattr(fit.fitted, "epochs", 1))
        self.epochs += epochs


@dataclass(frozen=True)
class _Splitter:
    """What scikit-learn takes for a splitter: it splits once, and training comes before the splits are returned."""

    once: Callable[[object, object, Mapping[str, object]], Splits]

    def split(self, X: object, y: object = None, **params: object) -> Splits:
        """Return the splits."""
        return self.once(X, y, params)
