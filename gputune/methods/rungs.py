"""Trials that are compared while they train: successive halving, the median rule, and slots.

A slot is a place for one running trial. Without a sampler, each trial has a slot, and all trials
train together from stop to stop. A stop is an epoch after which the rule prunes trials. Successive
halving calls it a rung.

An Optuna sampler proposes trials for a fixed number of slots. The epochs of all running trials then
count on to the next event, the nearest epoch at which one of them ends or reaches a rung. Trials that
have reached a rung are compared with all trials that ever reached this rung, as in ASHA (Li et al.,
2020, arXiv:1810.05934), and the worse ones are pruned. New trials then start in the free slots. A
trial trains from one rung to the next without a pause, and only when its next score is needed. Trials
that wait for the same epochs then train together, because small groups of trials train slowly.

The decisions depend only on epochs and scores, never on the time that a training takes. Therefore
any number of workers and a resumed search train the same trials.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence, Set
from typing import ClassVar, Protocol

import numpy as np

from gputune.ground.errors import InputError, option
from gputune.ground.types import Config, first_metric
from gputune.methods.paused import PausedTraining, RunningTrial
from gputune.methods.sampling import (
    NOT_REPEATED,
    AskedTrial,
    SlotStudy,
    n_missing,
    next_batch,
    outside_text,
)
from gputune.study.store import Candidate
from gputune.tuning.context import Context
from gputune.tuning.session import batch_of


class ComparingRule(Protocol):
    """A rule that compares running trials. See ``StoppingRule``."""

    name: ClassVar[str]

    def stops(self, max_epochs: int) -> list[int]: ...

    def trials_to_stop(
        self, epoch: int, curves: Mapping[int, np.ndarray], max_epochs: int
    ) -> set[int]: ...


def check_rungs(rule: ComparingRule, context: Context) -> None:
    """Raise InputError if a search cannot use successive halving or the median rule."""
    if context.choice.solved:
        raise InputError(
            f"method={rule.name!r}",
            "compares trials while they train, but the solved logistic regression does not train",
            remedy=f"Pass {option('optimizer', 'adamw')} or {option('method', 'random')}.",
        )
    rule.stops(context.epochs)


def with_divergence(curve: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """Return the scores of a trial, with NaN up to its next stop if the trial has diverged.

    The number of stored epochs after the divergence depends on the other trials of its chunk, and
    on the time at which the search was stopped. The decisions must not depend on it.

    Args:
        curve: The scores of the trial after each epoch, (epochs, F).
        stops: The epochs at which trials are compared or end, in order.
    """
    is_lost = np.isnan(curve).any(1)
    if not is_lost.any():
        return curve
    n_finite = int(is_lost.argmax())
    stop = next(stop for stop in stops if stop > n_finite)
    lost = np.full((stop - n_finite, *curve.shape[1:]), np.nan)
    return np.concatenate([curve[:n_finite], lost])


class SlotSearch(Protocol):
    """The part of a search that proposes, trains and stores the trials in the slots."""

    def is_over(self) -> bool:
        """Return True if the search must end now."""

    def propose(self, n_free: int, running: Mapping[int, int]) -> Sequence[int]:
        """Return the trial numbers of at most ``n_free`` new trials.

        ``running`` has the number of trained epochs of each running trial, by trial number.
        """

    def train(
        self, arrived: Mapping[int, int], later: Mapping[int, int]
    ) -> Mapping[int, np.ndarray]:
        """Train each trial up to its epoch in ``arrived``, and return its scores (epochs, F).

        A trial that can train no further has fewer epochs, or NaN in its scores. ``later`` has the
        epochs up to which the other running trials train at some later call. The search may already
        train them now.
        """

    def end(self, numbers: Sequence[int], rung: int | None = None) -> None:
        """Store the results of trials that have ended. ``rung`` is the epoch at which the rule
        pruned them."""

    def ended_trials(self, rung: int) -> Set[int]:
        """Return the numbers of trials that end at a rung because a user has requested it."""


def fill_slots(
    search: SlotSearch, rule: ComparingRule, *, n_slots: int, max_epochs: int
) -> dict[int, int]:
    """Train all trials of a search in slots, and return the trained epochs of unfinished trials.

    The result is not empty if the search is over before all trials have ended. A resumed search
    calls this function from the start. It repeats all decisions, because they depend on the stored
    scores.
    """
    stops = [*rule.stops(max_epochs), max_epochs]
    running: dict[int, int] = {}
    curves: dict[int, np.ndarray] = {}
    has_trained = False
    # At least one chunk begins, even if the time is already over.
    while not has_trained or not search.is_over():
        new = search.propose(n_slots - len(running), running)
        running |= dict.fromkeys(new, 0)
        if not running:
            break
        next_stops = {number: _next_stop(stops, epoch) for number, epoch in running.items()}
        n_epochs = min(next_stops[number] - epoch for number, epoch in running.items())
        running_then = {number: epoch + n_epochs for number, epoch in running.items()}
        arrived_at: dict[int, int] = {}
        later: dict[int, int] = {}
        for number, stop in next_stops.items():
            group = arrived_at if running_then[number] == stop else later
            group[number] = stop
        trained = search.train(arrived_at, later)
        has_trained = True
        if search.is_over():
            break
        running = running_then
        ended = []
        for number, curve in trained.items():
            curves[number] = with_divergence(curve, stops)
            if len(curve) < arrived_at[number] or np.isnan(curve).any():
                ended.append(number)
        search.end(ended)
        running = _without(running, ended)
        for stop in stops:
            arrived = [number for number, epoch in running.items() if epoch == stop]
            if stop == max_epochs:
                search.end(arrived)
                running = _without(running, arrived)
            elif arrived:
                stopped = rule.trials_to_stop(stop, curves, max_epochs) | search.ended_trials(stop)
                pruned = [number for number in arrived if number in stopped]
                search.end(pruned, rung=stop)
                running = _without(running, pruned)
    return running


def _next_stop(stops: Sequence[int], epoch: int) -> int:
    """Return the first stop after an epoch."""
    return next(stop for stop in stops if stop > epoch)


def _without(running: Mapping[int, int], ended: Collection[int]) -> dict[int, int]:
    """Return the running trials without the trials that have ended."""
    ended = set(ended)
    return {number: epoch for number, epoch in running.items() if number not in ended}


def train_in_rungs(
    context: Context,
    rule: ComparingRule,
    trials: Sequence[Candidate],
    sampler: SlotStudy | None = None,
    n_slots: int | None = None,
) -> None:
    """Train trials, and prune some trials at each stop of a rule such as successive halving.

    All trials begin at once, or the first ``n_slots`` trials. A ``sampler`` proposes further trials
    for the slots of ended trials. Only this process trains the search, because each decision depends
    on the results before it.
    """
    search = _Slots(context, rule, trials, sampler)

    def train() -> None:
        n_places = len(trials) if n_slots is None else n_slots
        fill_slots(search, rule, n_slots=n_places, max_epochs=context.epochs)

    search.run(train, n_proposals=0 if sampler is None else n_missing(context))


def _can_train(trial: RunningTrial, until: Mapping[int, int]) -> bool:
    """Return True if a trial lacks epochs up to its epoch in ``until``, and has not diverged."""
    epochs = until.get(trial.number, 0)
    return len(trial.curve) < epochs and not trial.has_diverged(epochs)


class _Slots(PausedTraining[RunningTrial]):
    """The trials in the slots, their proposals, and their saved states.

    A resumed search repeats its decisions from the start. The scores of its trials then come from
    the study and from the checkpoints, and only the missing epochs train.
    """

    def __init__(
        self,
        context: Context,
        rule: ComparingRule,
        trials: Sequence[Candidate],
        sampler: SlotStudy | None,
    ) -> None:
        super().__init__(context, trials)
        self.stops = rule.stops(context.epochs)
        self.sampler = sampler
        self.waiting = deque(trials)
        self.begun: dict[int, Candidate] = {}

    def begin_trial(self, trial: Candidate, config: Config) -> RunningTrial:
        return RunningTrial(trial.number, config, self.context.no_curve)

    def is_over(self) -> bool:
        return self.context.is_over()

    def propose(self, n_free: int, running: Mapping[int, int]) -> list[int]:
        """Return the trial numbers of new trials: known trials first, then proposals."""
        n_known = min(n_free, len(self.waiting))
        known = [self.waiting.popleft() for _ in range(n_known)]
        self.begun |= {candidate.number: candidate for candidate in known}
        if self.sampler is None:
            return [candidate.number for candidate in known]
        epochs = dict(running)
        stored = {}
        for candidate in known:
            if batch_of(candidate) > 0:
                stored[candidate.number] = candidate.params
            else:  # not a proposal, for example the default trial
                epochs[candidate.number] = 0
        n_new = min(n_free - n_known, n_missing(self.context))
        if stored or n_new:
            known += self._ask(self.sampler, epochs, stored, n_new)
        return [candidate.number for candidate in known]

    def _ask(
        self,
        sampler: SlotStudy,
        epochs: Mapping[int, int],
        stored: Mapping[int, Config],
        n_new: int,
    ) -> list[Candidate]:
        """Ask the sampler for ``n_new`` trials, and store them in the study."""
        context = self.context
        known = context.ledger.candidates
        repeats = sampler.repeats
        with context.profile.clock("proposals"):
            begun = {number: trial for number, trial in self.begun.items() if number not in stored}
            first = 1 + max((trial.number for trial in known), default=-1)
            numbers = range(first, first + n_new)
            proposals = sampler.propose(self._asked(begun, epochs), stored, numbers)
        if repeats and not sampler.repeats:
            context.progress.say(NOT_REPEATED, once=True)
        for number in sorted(sampler.outside):
            context.progress.say(outside_text(self.begun[number]), once=True)
        candidates = next_batch(context, list(proposals.values()))
        for candidate in candidates:
            self.begun[candidate.number] = candidate
            config = context.complete(candidate.params)
            self.running.append(self.begin_trial(candidate, config))
        return candidates

    def _asked(
        self, begun: Mapping[int, Candidate], epochs: Mapping[int, int]
    ) -> dict[int, AskedTrial]:
        """Return trials that have begun, as the sampler sees them.

        ``epochs`` has the number of trained epochs of each running trial.
        """
        curves = self._curves()
        asked = {}
        for number, candidate in begun.items():
            n_epochs = epochs.get(number, len(curves[number]))
            means = first_metric(curves[number], axes=2)[:n_epochs].mean(1)
            rung_means = {}
            for stop in self.stops:
                if stop <= n_epochs and np.isfinite(means[stop - 1]):
                    rung_means[stop] = float(means[stop - 1])
            if number in epochs:
                asked[number] = AskedTrial(candidate.params, rung_means)
            else:
                result = self.context.ledger.results[number]
                asked[number] = AskedTrial(candidate.params, rung_means, result.state, result.score)
        return asked

    def _curves(self) -> dict[int, np.ndarray]:
        """Return the scores so far of all ended and running trials."""
        running = {trial.number: trial.curve for trial in self.running}
        return self.curves | running

    def train(
        self, arrived: Mapping[int, int], later: Mapping[int, int]
    ) -> Mapping[int, np.ndarray]:
        """Train each trial up to its epoch in ``arrived``, and return its scores so far.

        Trials that need the same epochs later train with them, so that groups of trials are larger.
        """
        until = {**arrived, **later}
        trials = [trial for trial in self.running if _can_train(trial, until)]
        segments = {
            (len(trial.curve), until[trial.number]) for trial in trials if trial.number in arrived
        }
        trials = [trial for trial in trials if (len(trial.curve), until[trial.number]) in segments]
        if trials:
            self.train_until(trials, until)
        curves = self._curves()
        scores = {}
        for number, epochs in arrived.items():
            scores[number] = first_metric(curves[number], axes=2)[:epochs]
        return scores

    def end(self, numbers: Sequence[int], rung: int | None = None) -> None:
        """Store the results of trials that have ended."""
        ended = set(numbers)
        self.finish([trial for trial in self.running if trial.number in ended], rung=rung)
        self.running = [trial for trial in self.running if trial.number not in ended]

    def ended_trials(self, rung: int) -> set[int]:
        """Return the trials that ``gputune stop`` ends, and all trials that were pruned at a rung.

        A request is not stored. A resumed search therefore takes the pruned trials from the study.
        """
        ended = set(self.context.stop.ended_trials())
        for number, result in self.context.ledger.results.items():
            if result.state == "pruned" and result.detail.get("rung") == rung:
                ended.add(number)
        return ended
