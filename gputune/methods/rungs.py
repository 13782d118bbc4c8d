"""Successive halving and the median rule.

A stop is an epoch after which the rule prunes trials. Successive halving calls it a rung. A member
is one trial on one fold, and a chunk is a group of trials that train together.

All trials train together from stop to stop. At each stop, the rule prunes some trials.

A resumed search trains only the trials without a result, each from its checkpoint. Compiled members
give bit-identical results with any other members in their chunk. Eager members, and members on a
GPU, agree up to rounding.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch

from gputune.engine.checkpoint import Checkpoint, Checkpointing, StateCache, pause_after
from gputune.engine.job import Failure, Outcome, RungJob, RungOutcome
from gputune.engine.plan import Plan
from gputune.engine.train import BegunChunk
from gputune.errors import InputError
from gputune.hypergradients.first_step import free_bytes
from gputune.population.population import Population
from gputune.population.state import State
from gputune.study.rows import ResultState
from gputune.study.store import Candidate, Result
from gputune.tuning.context import Context, failed_result
from gputune.types import KEPT_BYTES, Config, Json, Outputs, drop_beyond_limit, first_metric
from gputune.wording import option


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


def train_in_rungs(context: Context, rule: ComparingRule, trials: Sequence[Candidate]) -> None:
    """Train trials, and prune some trials at each stop of a rule such as successive halving.

    The rule also compares running trials with the stored curves of trials that ended earlier.
    """
    search = _RungTraining(context, rule, trials)
    begin = 0
    try:
        n_trained = search.epochs_trained
        with context.progress.bar_over(len(search.running), context.epochs, trained=n_trained):
            for stop in sorted({*search.stops, context.epochs}):
                # At least one chunk begins, even if the time is already over.
                if search.running and (begin == 0 or not context.is_over()):
                    search.train(begin, stop)
                    if context.is_over():
                        search.save()
                    search.end_trials(stop)
                begin = stop
            search.finish([trial for trial in search.running if len(trial.curve)])
        context.tell_trials_without_score()
    finally:
        search.states.close()


@dataclass(eq=False)
class RunningTrial:
    """A trial that has no result yet.

    ``curve`` (epochs, F) holds its scores so far, and ``seconds`` its training time.
    """

    number: int
    config: Config
    curve: np.ndarray
    seconds: float = 0.0

    def has_diverged(self, epoch: int) -> bool:
        """Return True if the trial's score is NaN in one of the first ``epoch`` epochs."""
        scores = first_metric(self.curve[:epoch], axes=2)
        # All scores after the first NaN are NaN, and the minimum with a NaN is NaN.
        return len(scores) > 0 and math.isnan(scores[-1].min())

    @property
    def detail(self) -> Json:
        """Facts about the training for the trial's result."""
        return {}


AnyTrial = TypeVar("AnyTrial", bound=RunningTrial)


class PausedTraining(Generic[AnyTrial]):
    """Trials that train together up to a stop, an epoch after which they are compared.

    Their states wait there in a cache. ``divergence_is_final`` is False if a trial that has diverged
    may continue as a copy of another trial.
    """

    divergence_is_final: ClassVar[bool] = True

    def __init__(self, context: Context, trials: Sequence[Candidate]) -> None:
        self.context = context
        configs = {trial.number: context.complete(trial.params) for trial in trials}
        ended = context.ledger.results
        # The curves of the trials that have ended.
        self.curves = {n: ended[n].curve for n in configs if n in ended}
        self.outputs: dict[int, Outputs] = {}  # at the best epochs so far
        self.running = [
            self.begin_trial(trial, configs[trial.number])
            for trial in trials
            if trial.number not in ended
        ]
        # States wait in main memory, also if the trials train on a GPU.
        free = free_bytes(torch.device("cpu")) // 4
        self.states = StateCache(min(free, context.trainer.memory or free))
        self.unsaved: list[tuple[int, ...]] = []  # chunks with states that are not in a file yet
        self.saved_at = time.monotonic()
        self.earliest = 0.0
        self.resume(context.checkpoints_of(list(configs), list(configs.values())))

    def begin_trial(self, trial: Candidate, config: Config) -> AnyTrial:
        """Return a trial that has not trained yet."""
        raise NotImplementedError

    def resume(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Continue each running trial from the latest of its checkpoints."""
        by_number = {trial.number: trial for trial in self.running}
        for checkpoint in sorted(checkpoints, key=lambda checkpoint: checkpoint.state.epoch):
            for position, number in enumerate(checkpoint.trials):
                if (trial := by_number.get(number)) is None:
                    continue
                trial.curve = checkpoint.curves[position]
                trial.seconds = checkpoint.seconds / len(checkpoint.trials)
                self.states.drop(number)
                if position in checkpoint.alive:
                    self.states.park(
                        number, checkpoint.state.select([checkpoint.alive.index(position)])
                    )

    @property
    def epochs_trained(self) -> int:
        """The number of epochs that the running trials have trained, summed over the trials."""
        return sum(len(trial.curve) for trial in self.running)

    def in_chunks(self, trials: Sequence[AnyTrial]) -> Checkpointing | None:
        """Return the settings for the checkpoints that a chunk writes before the next stop."""
        return self.context.checkpointing([trial.number for trial in trials])

    def trainable(self) -> list[AnyTrial]:
        """Return the running trials that train up to the next stop."""
        return self.running

    def plan(self, trials: Sequence[AnyTrial], epochs: int) -> Plan:
        """Return the plan for training trials for a number of epochs."""
        return self.context.plan([trial.config for trial in trials], epochs=epochs)

    def train(self, begin: int, stop: int) -> None:
        """Train the running trials from epoch ``begin`` to epoch ``stop``."""
        trials = self.trainable()
        until = {trial.number: stop for trial in trials}
        self.train_until(trials, until, epochs=stop - begin, show=begin == 0)

    def train_until(
        self, trials: Sequence[AnyTrial], until: Mapping[int, int], *, epochs: int, show: bool
    ) -> None:
        """Train running trials, each up to its epoch in ``until``, which has trial numbers as keys.

        ``epochs`` is the number of epochs for the plan. If ``show`` is True, show the plan.
        """
        context = self.context
        plan = self.plan(trials, epochs)
        context.progress.plan(replace(plan, cache_bytes=self.states.limit), show=show)
        chunks = tuple(
            part for chunk in plan.chunks for part in self._begun_chunks(chunk, trials, until)
        )
        last = max(until.values())
        chunks, waiting = self._in_place(chunks, is_end=last == context.epochs)
        job = context.trainer.job(
            RungJob,
            epochs=last,
            until=tuple(until[trial.number] for trial in trials),
            checkpointing=self.in_chunks(trials),
            keep_stopped=False,
            waiting=waiting,
        )
        trained: set[int] = set()
        plan = replace(plan, chunks=chunks, workers=min(plan.workers, len(chunks)))
        report = context.progress.advance
        training: AbstractContextManager[Iterable[Outcome | Failure]] = nullcontext(())
        if chunks:
            training = closing(context.trainer.train(job, plan, progress=report))
        with training as outcomes:
            for outcome in outcomes:
                trained.update(outcome.index)
                if isinstance(outcome, Failure):
                    trial = trials[outcome.index[0]]
                    self.running = [other for other in self.running if other is not trial]
                    self._store([failed_result(trial.number, trial.curve, outcome.reason)], [trial])
                else:
                    assert isinstance(outcome, RungOutcome)
                    self._add_outcome(trials, outcome)
        for chunk in chunks:
            for row, position in enumerate(chunk.alive or ()):
                # The time was over before this chunk continued.
                if chunk.state is not None and chunk.index[position] not in trained:
                    self.states.park(
                        trials[chunk.index[position]].number, chunk.state.select([row])
                    )

    def _in_place(
        self, chunks: tuple[BegunChunk, ...], *, is_end: bool
    ) -> tuple[tuple[BegunChunk, ...], tuple[tuple[int, ...], ...]]:
        """Return groups of trials with the states from which they continue, and the groups that may
        wait for the next stop in the tensors in which they have trained.

        A single group stays on its device. On a CPU, several groups can stay. ``is_end`` is True if
        the training ends for some of the trials.
        """
        context = self.context
        index = tuple(chunk.index for chunk in chunks)
        is_single = len(chunks) == 1
        is_on_cpu = context.data.device.type == "cpu"
        if context.trainer.cluster is not None or not (is_single or is_on_cpu):
            self.states.settle()
            return tuple(chunk.on_host() for chunk in chunks), ()
        places = [chunk.state and chunk.state.place for chunk in chunks]
        in_place = []
        for chunk, place in zip(chunks, places):
            # The first group that continues overwrites the tensors of the place.
            is_shared = place is not None and places.count(place) > 1
            in_place.append(chunk.on_host() if is_shared else chunk)
        self.states.settle([place for place in places if place] if is_on_cpu else None)
        return tuple(in_place), () if is_single and is_end else index

    def _begun_chunks(
        self, chunk: Population, trials: Sequence[AnyTrial], until: Mapping[int, int]
    ) -> Iterator[BegunChunk]:
        """Split a planned chunk into groups of trials that can continue training together.

        A group holds trials that have trained for the same number of epochs, and that train up to
        the same epoch.
        """
        segment = {}
        for c, i in enumerate(chunk.index):
            segment[c] = (len(trials[i].curve), until[trials[i].number])
        in_order = sorted(segment, key=segment.__getitem__)
        for (epoch, stop), group in groupby(in_order, key=segment.__getitem__):
            places = list(group)
            part = [trials[chunk.index[c]] for c in places]
            index = tuple(chunk.index[c] for c in places)
            configs = tuple(chunk.configs[c] for c in places)
            if epoch == 0:
                yield BegunChunk(chunk.kind, index, configs)
                continue
            before = np.stack([trial.curve for trial in part])
            # Diverged trials keep their place without a state, and the rest of their curve is
            # filled in.
            is_lost = np.isnan(first_metric(before, axes=3)).any((1, 2))
            alive = tuple(np.flatnonzero(~is_lost).tolist())
            if epoch < stop and alive:
                state = self.states.take([part[i].number for i in alive])
                seconds = sum(trial.seconds for trial in part)
                yield BegunChunk(chunk.kind, index, configs, state, alive, before, seconds)

    def _add_outcome(self, trials: Sequence[AnyTrial], outcome: RungOutcome) -> None:
        """Store the curves, outputs and states of trials that have trained up to a stop."""
        self.context.note_fault(outcome.fault)
        self.context.profile.spent += outcome.spent
        seconds = outcome.seconds / len(outcome.index)
        # All at once, because NumPy takes longer for many small arrays.
        before = np.stack([trials[i].curve for i in outcome.index])
        curves = np.concatenate([before, outcome.curves], axis=1)
        for i, curve in zip(outcome.index, curves):
            trials[i].curve = curve
            trials[i].seconds += seconds
        # The outputs of better epochs.
        self.outputs |= {trials[i].number: values for i, values in outcome.outputs.items()}
        self._limit_outputs()
        for row, position in enumerate(outcome.alive):
            number = trials[outcome.index[position]].number
            self.states.park(number, outcome.state.select([row]))
        self.unsaved.append(tuple(trials[i].number for i in outcome.index))
        self.save_if_due(outcome.seconds)

    def _limit_outputs(self) -> None:
        """Drop the outputs of the worst trials if all outputs need too much memory."""
        size = sum(outputs.values.nbytes for outputs in self.outputs.values())
        if size <= KEPT_BYTES:
            return
        scores = {}
        for trial in self.running:
            if trial.number in self.outputs:
                means = first_metric(trial.curve, axes=2).mean(1)
                scores[trial.number] = float(np.nanmax(means))
        drop_beyond_limit(self.outputs, scores)

    def save_if_due(self, seconds: float) -> None:
        """Write checkpoints if it is time. ``seconds`` is the training time of the last chunk."""
        # The chunks are sorted, so the next chunk takes at most about as long as this one.
        due = self.saved_at + self.context.options.machine.checkpoint_seconds - seconds
        if time.monotonic() > max(due, self.earliest):
            self.save()

    def save(self) -> None:
        """Write checkpoints of all running trials with states that are not in a file yet."""
        begin = time.monotonic()
        by_number = {trial.number: trial for trial in self.running}
        checkpointing = self.context.checkpointing(list(by_number))
        seen: set[int] = set()
        # From the last to the first: the last chunk of a trial holds trials with equal numbers of
        # epochs.
        for numbers in reversed(self.unsaved if checkpointing is not None else []):
            trials = [by_number[n] for n in numbers if n in by_number and n not in seen]
            seen |= set(numbers)
            alive = tuple(i for i, trial in enumerate(trials) if trial.number in self.states.states)
            if checkpointing is not None and alive:
                state = State.stack([self.states.look(trials[i].number) for i in alive])
                curves = np.stack([trial.curve for trial in trials])
                seconds = sum(trial.seconds for trial in trials)
                checkpoint = Checkpoint(
                    tuple(t.number for t in trials), alive, curves, state, seconds
                )
                checkpointing.keep(checkpoint, [trial.config for trial in trials])
        self.unsaved.clear()
        self.saved_at = time.monotonic()
        self.earliest = self.saved_at + pause_after(self.saved_at - begin)

    def finish(self, trials: Sequence[AnyTrial], *, rung: int | None = None) -> None:
        """Store the results of trials that do not continue training.

        ``rung`` is the epoch at which the rule pruned the trials, or None.
        """
        epochs = self.context.epochs
        epoch_rule = self.context.options.training.epoch
        results = []
        for trial in trials:
            self.states.drop(trial.number)
            curve = trial.curve[: epochs if rung is None else rung]
            detail = trial.detail if rung is None else {"rung": rung}
            n_trained = len(curve)
            result = Result.of_curve(
                trial.number,
                curve,
                epochs=n_trained,
                rule=epoch_rule,
                seconds=trial.seconds,
                detail=detail,
            )
            is_final = result.state == "failed" and self.divergence_is_final
            if n_trained < epochs and not is_final:
                best_epoch = 0 if math.isnan(result.score) else result.best_epoch
                state: ResultState = "stopped" if rung is None else "pruned"
                result = replace(result, state=state, best_epoch=best_epoch)
            results.append(result)
        if results:
            self._store(results, trials)

    def _store(self, results: Sequence[Result], trials: Sequence[AnyTrial]) -> None:
        """Store the results of trials, and remove their remaining epochs from the progress bar."""
        numbers = {result.number for result in results} & self.outputs.keys()
        self.context.finish(results, {number: self.outputs.pop(number) for number in numbers})
        self.curves |= {result.number: result.curve for result in results}
        self.context.progress.skip(sum(self.context.epochs - len(trial.curve) for trial in trials))


class _RungTraining(PausedTraining[RunningTrial]):
    """The running trials of a search with halving or the median rule, and their saved states."""

    def __init__(self, context: Context, rule: ComparingRule, trials: Sequence[Candidate]) -> None:
        super().__init__(context, trials)
        self.rule = rule
        self.stops = rule.stops(context.epochs)

    def begin_trial(self, trial: Candidate, config: Config) -> RunningTrial:
        return RunningTrial(trial.number, config, self.context.no_curve)

    def end_trials(self, epoch: int) -> None:
        """Store the results of trials that have diverged, that were stopped, or that the rule
        prunes."""
        is_last = epoch == self.context.epochs
        # A curve shorter than this epoch means that the time was over before the stop.
        ended = {
            t for t in self.running if is_last or len(t.curve) < epoch or t.has_diverged(epoch)
        }
        self.finish([trial for trial in self.running if trial in ended and len(trial.curve)])
        self.running = [trial for trial in self.running if trial not in ended]
        if epoch in self.stops and not self.context.is_over():
            curves = self.curves | {trial.number: trial.curve for trial in self.running}
            stops = [*self.stops, self.context.epochs]
            ranked = {}
            for number, curve in curves.items():
                ranked[number] = with_divergence(first_metric(curve, axes=2), stops)
            pruned = self.rule.trials_to_stop(epoch, ranked, self.context.epochs)
            pruned = pruned | self.context.stop.ended_trials()
            self.finish([trial for trial in self.running if trial.number in pruned], rung=epoch)
            self.running = [trial for trial in self.running if trial.number not in pruned]
