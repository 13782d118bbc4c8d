"""Trials that train together up to an epoch after which a method compares them.

Such an epoch is a stop. The states of the trials wait there in a cache. A member is one trial on one
fold, and a chunk is a group of trials that train together.

A resumed search trains only the trials without a result, each from its checkpoint. Compiled members
give bit-identical results with any other members in their chunk. Eager members, and members on a
GPU, agree up to rounding.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch

from gputune.engine.checkpoint import Checkpoint, Checkpointing, StateCache, pause_after
from gputune.engine.job import RungJob, RungOutcome
from gputune.engine.plan import Plan
from gputune.engine.train import BegunChunk
from gputune.ground.types import KEPT_BYTES, Config, Json, Outputs, drop_beyond_limit, first_metric
from gputune.hypergradients.first_step import free_bytes
from gputune.population.population import Population
from gputune.population.state import State
from gputune.study.rows import ResultState
from gputune.study.store import Candidate, Result
from gputune.tuning.context import Context


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
    may continue as a copy of another trial. ``saves_each_chunk`` is False if the checkpoints of all
    trials are valid only together.
    """

    divergence_is_final: ClassVar[bool] = True
    saves_each_chunk: ClassVar[bool] = True

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
        self.is_planned = False
        self.resume(context.checkpoints_of(list(configs), list(configs.values())))

    def begin_trial(self, trial: Candidate, config: Config) -> AnyTrial:
        """Return a trial that has not trained yet."""
        raise NotImplementedError

    def resume(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Continue each running trial from the latest of its checkpoints."""
        by_number = {trial.number: trial for trial in self.running}
        for checkpoint in sorted(checkpoints, key=lambda checkpoint: checkpoint.state.epoch):
            for position, number in enumerate(checkpoint.trials):
                if number in by_number:
                    self.restore(by_number[number], checkpoint, position)

    def restore(self, trial: AnyTrial, checkpoint: Checkpoint, position: int) -> None:
        """Continue one trial from its place in a checkpoint."""
        trial.curve = checkpoint.curves[position]
        trial.seconds = checkpoint.seconds / len(checkpoint.trials)
        self.states.drop(trial.number)
        if position in checkpoint.alive:
            row = checkpoint.alive.index(position)
            self.states.park(trial.number, checkpoint.state.select([row]))

    def run(self, train: Callable[[], object], *, n_proposals: int = 0) -> None:
        """Train the trials with a function, and then store the results of unfinished trials.

        ``n_proposals`` is the number of trials that the function adds.
        """
        context = self.context
        n_trials = len(self.running) + n_proposals
        n_trained = sum(len(trial.curve) for trial in self.running)
        try:
            with context.progress.bar_over(n_trials, context.epochs, trained=n_trained):
                train()
                if context.is_over():
                    self.save()
                self.finish([trial for trial in self.running if len(trial.curve)])
            context.tell_trials_without_score()
        finally:
            self.states.close()

    def plan(self, trials: Sequence[AnyTrial], epochs: int) -> Plan:
        """Return the plan for training trials for a number of epochs."""
        return self.context.plan([trial.config for trial in trials], epochs=epochs)

    def train_until(self, trials: Sequence[AnyTrial], until: Mapping[int, int]) -> None:
        """Train running trials, each up to its epoch in ``until``, which has trial numbers as keys.

        The first call shows its plan.
        """
        context = self.context
        plan = self.plan(trials, max(until[trial.number] - len(trial.curve) for trial in trials))
        is_first = not self.is_planned
        context.progress.plan(replace(plan, cache_bytes=self.states.limit), show=is_first)
        self.is_planned = True
        chunks = tuple(
            part for chunk in plan.chunks for part in self._begun_chunks(chunk, trials, until)
        )
        last = max(until.values())
        numbers = [trial.number for trial in trials]
        chunks, waiting = self._in_place(chunks, is_end=last == context.epochs)
        job = context.trainer.job(
            RungJob,
            epochs=last,
            until=tuple(until[trial.number] for trial in trials),
            checkpointing=context.checkpointing(numbers) if self.saves_each_chunk else None,
            keep_stopped=False,
            waiting=waiting,
        )
        trained: set[int] = set()
        plan = replace(plan, chunks=chunks, workers=min(plan.workers, len(chunks)))
        curves = {trial.number: trial.curve for trial in trials}
        if chunks:
            with closing(context.train(job, plan, numbers, curves=curves)) as outcomes:
                for outcome in outcomes:
                    assert isinstance(outcome, RungOutcome)
                    trained.update(outcome.index)
                    self._add_outcome(trials, outcome)
        results = context.ledger.results
        failed = [trial for trial in trials if trial.number in results]
        if failed:
            self.running = [trial for trial in self.running if trial.number not in results]
            self._leave_out([results[trial.number] for trial in failed], failed)
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
        # The chunks are sorted, so the next chunk takes at most about as long as this one.
        if self.saves_each_chunk and self.is_due(outcome.seconds):
            self.save()

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

    def is_due(self, seconds: float) -> bool:
        """Return whether it is time to write checkpoints.

        ``seconds`` is the training time up to the next possible moment.
        """
        due = self.saved_at + self.context.options.machine.checkpoint_seconds - seconds
        return time.monotonic() > max(due, self.earliest)

    def save(self) -> None:
        """Write checkpoints of all running trials with states that are not in a file yet."""
        begin = time.monotonic()
        checkpointing = self.context.checkpointing([trial.number for trial in self.running])
        if checkpointing is not None:
            self.write(checkpointing)
        self.unsaved.clear()
        self.saved_at = time.monotonic()
        self.earliest = self.saved_at + pause_after(self.saved_at - begin)

    def write(self, checkpointing: Checkpointing) -> None:
        """Write the checkpoint files of the unsaved chunks."""
        by_number = {trial.number: trial for trial in self.running}
        seen: set[int] = set()
        # From the last to the first: the last chunk of a trial holds trials with equal numbers of
        # epochs.
        for numbers in reversed(self.unsaved):
            trials = [by_number[n] for n in numbers if n in by_number and n not in seen]
            seen |= set(numbers)
            if any(trial.number in self.states.states for trial in trials):
                checkpoint = self.checkpoint(trials)
                checkpointing.keep(checkpoint, [trial.config for trial in trials])

    def checkpoint(self, trials: Sequence[AnyTrial], note: str = "") -> Checkpoint:
        """Return the checkpoint of trials with equally long curves."""
        states = self.states
        alive = [i for i, trial in enumerate(trials) if trial.number in states.states]
        state = State(len(trials[0].curve), ())
        if alive:
            state = State.stack([states.look(trials[i].number) for i in alive])
        return Checkpoint(
            tuple(trial.number for trial in trials),
            tuple(alive),
            np.stack([trial.curve for trial in trials]),
            state,
            sum(trial.seconds for trial in trials),
            note,
        )

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
        if not results:
            return
        numbers = {result.number for result in results} & self.outputs.keys()
        self.context.finish(results, {number: self.outputs.pop(number) for number in numbers})
        self._leave_out(results, trials)

    def _leave_out(self, results: Sequence[Result], trials: Sequence[AnyTrial]) -> None:
        """Keep the curves of ended trials, and remove their remaining epochs from the progress
        bar."""
        self.curves |= {result.number: result.curve for result in results}
        self.context.progress.skip(sum(self.context.epochs - len(trial.curve) for trial in trials))
