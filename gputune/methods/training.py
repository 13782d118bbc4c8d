"""Train every trial to its end, or solve it without training steps.

A chunk is a group of trials that train together.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from gputune.engine.checkpoint import Checkpoint, pause_after
from gputune.engine.job import Job, Outcome, RungJob, RungOutcome, stalled_epochs
from gputune.engine.plan import Plan
from gputune.engine.train import BegunChunk
from gputune.ground.device import on_threads
from gputune.ground.types import Config, first_metric
from gputune.hypergradients.first_step import free_bytes
from gputune.methods.rungs import ComparingRule, train_in_rungs
from gputune.population.kinds import is_module
from gputune.population.population import Population, by_numbers
from gputune.solver.solve import solve_chunk
from gputune.study.store import Candidate, PlannedChunk, Result
from gputune.tuning.context import Context, RecordedPlan
from gputune.tuning.session import batch_of, train_waiting

# Share of the time left that the estimated training time exceeds. The estimate may be several times
# too short, because other programs use the machine.
_ENOUGH_SHARE = 0.25
_STATE_SHARE = 0.25  # of the free main memory
_SOLVED_TOGETHER = 16  # solved logistic regressions between two checks of the time


def _train(context: Context, waiting: Sequence[Candidate]) -> list[PlannedChunk]:
    """Train the waiting trials that no other process has claimed.

    If this process can claim no trial, return the chunks that other processes train.
    """
    ledger = context.ledger
    epochs = context.epochs

    def make(configs: Sequence[Config]) -> Plan:
        return context.plan(configs, epochs=epochs).answering_early(context.data.n_folds)

    plans = context.recorded_plans(waiting, 0, make)
    chunks = [chunk for recorded in plans for chunk in recorded.chunks.values()]
    allowed = list(filter(context.good_enough.allows, chunks))
    if not any(map(ledger.claim, allowed)):  # any() stops at the first claimed chunk
        return allowed
    trainings = [_PlanTraining(context, recorded) for recorded in plans]
    planned = [chunk for training in trainings for chunk in training.plan.chunks]
    if _need_first_epochs(context, replace(trainings[0].plan, chunks=tuple(planned))):
        context.progress.say(
            "note: all trials train for one epoch first, so that none is left without a score "
            "if the time is enough for these epochs",
            once=True,
        )
        for training in trainings:
            training.train_first_epochs()
    foreign: set[int] = set()
    for training in trainings:
        training.train()
        foreign |= training.foreign
    context.tell_trials_without_score(foreign)
    return []


class _PlanTraining:
    """The training of the chunks of one plan to their end.

    ``first`` has the results of chunks after their first epoch, if all trials train for one epoch
    first. ``unsaved`` has those without a checkpoint, and ``foreign`` the numbers of trials that
    other processes train.
    """

    def __init__(self, context: Context, recorded: RecordedPlan) -> None:
        self.context = context
        self.recorded = recorded
        self.numbers = [trial.number for trial in recorded.trials]
        self.checkpointing = context.checkpointing(self.numbers)
        checkpoints = context.checkpoints_of(self.numbers, recorded.configs)
        self.plan = _with_checkpoints(recorded, checkpoints)
        self.first: list[RungOutcome] = []
        self.unsaved: list[RungOutcome] = []
        self.foreign: set[int] = set()
        self.may_be_over = False  # only after first epochs; otherwise at least one chunk begins
        context.progress.plan(self.plan)
        for chunk in map(BegunChunk.of, self.plan.chunks):
            if chunk.epoch > 0:
                context.progress.resume([self.numbers[i] for i in chunk.index], chunk.epoch)

    def claim(self, part: Population) -> bool:
        """Claim the recorded chunk of a part. Returns False if another process trains it."""
        is_mine = self.context.ledger.claim(self.recorded.chunk_of(part))
        if not is_mine:
            self.foreign.update(self.numbers[i] for i in part.index)
        return is_mine

    def claim_new(self, part: Population) -> bool:
        """Claim a chunk, unless another process trains it or has trained its first epoch."""
        if not self.claim(part):
            return False
        checkpointing = self.checkpointing
        return checkpointing is None or checkpointing.newer(part, epoch=0) is None

    def train_first_epochs(self) -> None:
        """Train each chunk that has not begun for one epoch, so that all trials have a score when
        the time is over.

        Otherwise the chunks would train one after another, and the last chunks would not begin.
        """
        chunks = list(map(BegunChunk.of, self.plan.chunks))
        new = tuple(chunk for chunk in chunks if chunk.epoch == 0)
        job = self.context.trainer.job(RungJob, epochs=1, keep_stopped=False)
        plan = replace(self.plan, chunks=new)
        training = self.context.train(job, plan, self.numbers, claim=self.claim_new)
        interval = self.context.options.machine.checkpoint_seconds
        due = time.monotonic() + interval
        with closing(training) as outcomes:
            for outcome in outcomes:
                assert isinstance(outcome, RungOutcome)
                # Their outputs would need memory. A single epoch is soon repeated.
                first = replace(outcome, outputs={})
                self.first.append(first)
                self.unsaved.append(first)
                if time.monotonic() >= due:
                    begin = time.monotonic()
                    self._save()
                    now = time.monotonic()
                    due = now + max(interval, pause_after(now - begin))
        self._save()
        self.may_be_over = True
        continued = [self._begun(first) for first in self.first if first.alive]
        rest = tuple(chunk for chunk in chunks if chunk.epoch > 0) + tuple(continued)
        workers = max(1, min(self.plan.workers, len(rest)))
        self.plan = replace(self.plan, chunks=rest, workers=workers)

    def _begun(self, first: RungOutcome) -> BegunChunk:
        """Return the trials of a result in the state after their first epoch."""
        configs = tuple(self.recorded.configs[i] for i in first.index)
        kind = self.recorded.plan.chunks[0].kind
        return BegunChunk(
            kind, first.index, configs, first.state, first.alive, first.curves, first.seconds
        )

    def _save(self) -> None:
        """Write checkpoints of trials after their first epoch.

        The claim on their chunks ends, so that another process can continue them.
        """
        if self.checkpointing is not None:
            saved = set[int]()
            for first in self.unsaved:
                numbers = tuple(self.numbers[i] for i in first.index)
                checkpoint = Checkpoint(
                    numbers, first.alive, first.curves, first.state, first.seconds
                )
                chunk = self._begun(first)
                if first.alive and self.checkpointing.write(checkpoint, chunk.configs):
                    saved.update(first.index)
            for index, recorded in self.recorded.chunks.items():
                if saved.issuperset(index):
                    self.context.ledger.release(recorded)
        self.unsaved.clear()

    def train(self) -> None:
        """Train the chunks to their end, and store the results of their trials."""
        context = self.context
        trials = self.recorded.trials
        ended: set[int] = set()
        if self.plan.chunks and not (self.may_be_over and context.is_over()):
            job = context.trainer.job(
                Job,
                epochs=context.epochs,
                checkpointing=self.checkpointing,
                patience=context.options.training.patience_epochs,
                numbers=tuple(self.numbers),
            )
            may_begin = context.may_begin(self.recorded)
            training = context.train(
                job, self.plan, self.numbers, claim=self.claim, may_begin=may_begin
            )
            with closing(training) as outcomes:
                for outcome in outcomes:
                    ended.update(outcome.index)
                    _finish_chunk(context, trials, outcome)
        for first in self.first:
            if ended.isdisjoint(first.index) and self.claim(self._begun(first)):
                # The epochs that are missing are NaN, as in every stopped trial.
                curves = np.full(
                    (len(first.index), context.epochs, *first.curves.shape[2:]), np.nan
                )
                curves[:, :1] = first.curves
                _finish_chunk(context, trials, Outcome(first.index, curves, 1, first.seconds))


def _need_first_epochs(context: Context, plan: Plan) -> bool:
    """Return whether some chunks of a plan may not begin before the timeout of the search."""
    deadline = context.stop.deadline
    if deadline is None or context.epochs == 1 or context.good_enough.is_possible:
        return False
    if len(plan.chunks) <= plan.at_once:
        return False
    seconds = plan.seconds / (plan.workers * plan.threads)
    is_short = seconds < _ENOUGH_SHARE * (deadline - time.monotonic())
    # The layers of a user's module are unknown: an LSTM took about 50x as long as estimated.
    if is_short and not is_module(plan.chunks[0].kind):
        return False
    return plan.state_bytes <= _STATE_SHARE * free_bytes(torch.device("cpu"))


def _solve(context: Context, waiting: Sequence[Candidate]) -> list[PlannedChunk]:
    """Solve the waiting logistic regressions that no other process has claimed.

    If this process can claim no trial, return the chunks that other processes solve.
    """

    def split(new: Sequence[Candidate]) -> list[tuple[Sequence[int], int, int]]:
        threads = torch.get_num_threads()
        parts = list[tuple[Sequence[int], int, int]]()
        for group in by_numbers([trial.params for trial in new]):
            for begin in range(0, len(group), _SOLVED_TOGETHER):
                parts.append((group[begin : begin + _SOLVED_TOGETHER], threads, 1))
        return parts

    chunks = context.ledger.chunks(waiting, 0, split)
    trial_of = {trial.number: trial for trial in context.ledger.candidates}
    is_solved = False
    allowed = list(filter(context.good_enough.allows, chunks))
    for chunk in chunks:
        if is_solved and context.is_over():
            break
        if context.good_enough.allows(chunk) and context.ledger.claim(chunk):
            trials = [trial_of[number] for number in chunk.trials]
            configs = [context.complete(trial.params) for trial in trials]
            with on_threads(chunk.threads):
                outcome = solve_chunk(context.data, configs, range(len(configs)), context.scoring)
            context.progress.advance(len(trials), outcome.curves)
            _finish_chunk(context, trials, outcome)
            is_solved = True
    return [] if is_solved else allowed


def _finish_chunk(context: Context, trials: Sequence[Candidate], outcome: Outcome) -> None:
    """Store the results of trials that have trained together.

    With the option ``patience``, cut each learning curve at the epoch where its trial ended.
    """
    patience = context.options.training.patience_epochs
    results = []
    if not context.is_over():
        context.progress.skip(len(outcome.index) * (context.epochs - outcome.epochs))
    for i, curve in zip(outcome.index, outcome.curves):
        epochs = outcome.epochs
        if patience is not None:
            stalled = stalled_epochs(first_metric(curve, axes=2)[None, :epochs].mean(2))[0]
            # The curve decides, because a trial resumed from a checkpoint may have trained one
            # epoch more.
            ends = np.flatnonzero(stalled >= patience)
            if ends.size:
                epochs = int(ends[0]) + 1
                curve = curve[:epochs]
        ended = i in outcome.ended
        if ended:
            epochs = min(epochs, outcome.ended[i])
            curve = curve[:epochs]
        number = trials[i].number
        rule = context.options.training.epoch
        # The trials of a chunk train together, so each gets an equal share of the time.
        share = outcome.seconds / len(outcome.index)
        result = Result.of_curve(number, curve, epochs=epochs, rule=rule, seconds=share)
        if ended and result.state == "complete":
            result = replace(result, state="pruned", detail={"ended": "by gputune stop"})
        results.append(result)
    outputs = {trials[i].number: values for i, values in outcome.outputs.items()}
    context.finish(results, outputs)


def _with_checkpoints(recorded: RecordedPlan, checkpoints: Sequence[Checkpoint]) -> Plan:
    """Return a plan in which trials with checkpoints continue from their checkpoints.

    Their chunks come first. Each chunk has the same trials as before, so that the results are
    bit-identical.
    """
    place = {trial.number: i for i, trial in enumerate(recorded.trials)}
    plan = recorded.plan
    chunks: list[Population] = []
    taken: set[int] = set()
    for checkpoint in checkpoints:
        index = tuple(place.get(number, -1) for number in checkpoint.trials)
        # Skip a checkpoint with a trial that is not in this plan or that another checkpoint has.
        if min(index) < 0 or taken & set(index):
            continue
        taken |= set(index)
        begun = BegunChunk(
            plan.chunks[0].kind,
            index,
            tuple(recorded.configs[i] for i in index),
            checkpoint.state,
            checkpoint.alive,
            checkpoint.curves,
            checkpoint.seconds,
        )
        chunks.append(begun)
    for chunk in plan.chunks:
        rest = [c for c, i in enumerate(chunk.index) if i not in taken]
        if rest:
            chunks.append(chunk.select(rest))
    return replace(plan, chunks=tuple(chunks))


def train_batches(context: Context, halving: ComparingRule | None = None) -> bool:
    """Train or solve the waiting trials of a study.

    Return False if the search is over. Without halving, all waiting trials train together. With
    halving, each batch trains separately.
    """
    ledger = context.ledger
    if halving is None:
        train = partial(_solve if context.choice.solved else _train, context)
        return train_waiting(context, train, epochs=context.epochs)
    for batch in sorted(set(map(batch_of, ledger.waiting()))):
        trials = [candidate for candidate in ledger.candidates if batch_of(candidate) == batch]
        train_in_rungs(context, halving, trials)
        if context.is_over():
            break
    return not context.is_over()
