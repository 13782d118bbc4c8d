"""Train the first epoch of all trials before any trial continues, in a search with a timeout.

When the time is over, every trial then has a score. Otherwise the groups of trials that train
together (chunks) would train one after another, and the last chunks would not begin.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from gputune.engine.checkpoint import Checkpoint, Checkpointing, pause_after
from gputune.engine.job import Failure, Outcome, RungJob, RungOutcome
from gputune.engine.plan import Plan
from gputune.engine.train import BegunChunk
from gputune.executors.executor import Claim
from gputune.hypergradients.first_step import free_bytes
from gputune.population.kinds import is_module
from gputune.population.population import Population
from gputune.tuning.context import Context, RecordedPlan, failed_result
from gputune.types import Config, Outputs, drop_beyond_limit, first_metric

# Share of the time left that the estimated training time exceeds. The estimate may be several times
# too short, because other programs use the machine.
_ENOUGH_SHARE = 0.25
_STATE_SHARE = 0.25  # of the free main memory


@dataclass
class FirstEpochs:
    """The results of chunks of trials after their first epoch.

    ``plan`` has the chunks that still train, each from the state after its first epoch. Each of
    them is claimed again before it continues. ``configs`` has the configurations of all positions.
    ``outputs`` and ``scores`` have the outputs and scores of trials after their first epoch, by
    position. The outputs stay within the limit of bytes. ``ended`` has the positions of trials that
    have results of further epochs, or failed. ``unsaved`` has the results without a checkpoint.
    """

    context: Context
    plan: Plan
    configs: Sequence[Config]
    claim: Claim[Population]
    outcomes: list[RungOutcome] = field(default_factory=list)
    outputs: dict[int, Outputs] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    unsaved: list[RungOutcome] = field(default_factory=list)

    def add(self, outcome: RungOutcome) -> None:
        """Add the results of trials after their first epoch."""
        self.outputs |= outcome.outputs
        outcome = replace(outcome, outputs={})
        self.outcomes.append(outcome)
        self.unsaved.append(outcome)
        means = first_metric(outcome.curves[:, 0], axes=2).mean(1)
        self.scores |= zip(outcome.index, np.nan_to_num(means, nan=-np.inf).tolist())
        drop_beyond_limit(self.outputs, self.scores)

    def completed(self, outcome: Outcome | Failure) -> Outcome | Failure:
        """Return the result of trials that have trained further, with the outputs of trials that
        were best at their first epoch."""
        self.ended.update(outcome.index)
        first_outputs = {}
        for i in self.outputs.keys() & set(outcome.index):
            first_outputs[i] = self.outputs.pop(i)
        if isinstance(outcome, Failure):
            return outcome
        return replace(outcome, outputs=first_outputs | dict(outcome.outputs))

    def rest(self) -> list[Outcome]:
        """Return the results of trials that have trained for only one epoch, except trials that
        another process trains."""
        results = []
        for first in self.outcomes:
            rows = [row for row, i in enumerate(first.index) if i not in self.ended]
            if not rows or not self.claim(self.chunk(first)):
                continue
            index = tuple(first.index[row] for row in rows)
            # The epochs that are missing are NaN, as in every stopped trial.
            shape = (len(rows), self.context.epochs, *first.curves.shape[2:])
            curves = np.full(shape, np.nan)
            curves[:, :1] = first.curves[rows]
            seconds = first.seconds * len(rows) / len(first.index)
            outputs = {i: self.outputs[i] for i in index if i in self.outputs}
            results.append(Outcome(index, curves, 1, seconds, outputs=outputs))
        return results

    def keep_rest(self, checkpointing: Checkpointing | None) -> set[int]:
        """Write checkpoints of trials that have trained for only one epoch, so that a later call
        continues after this epoch. Returns the positions of these trials.

        A worker that was lost, or another process, may have written a checkpoint of a later epoch,
        which stays.
        """
        saved: set[int] = set()
        if checkpointing is None:
            return saved
        unsaved = self.unsaved
        self.unsaved = []
        for first in unsaved:
            chunk = self.chunk(first)
            if not first.alive or not self.ended.isdisjoint(first.index) or not self.claim(chunk):
                continue
            is_saved = checkpointing.newer(chunk, epoch=1) is not None
            if not is_saved:
                trials = tuple(checkpointing.numbers[i] for i in first.index)
                checkpoint = Checkpoint(
                    trials, first.alive, first.curves, first.state, first.seconds
                )
                is_saved = checkpointing.write(checkpoint, chunk.configs)
            if is_saved:
                saved.update(first.index)
            else:
                self.unsaved.append(first)
        return saved

    def chunk(self, first: RungOutcome) -> BegunChunk:
        """Return the trials of a result in the state after their first epoch."""
        return BegunChunk(
            self.plan.chunks[0].kind,
            first.index,
            tuple(self.configs[i] for i in first.index),
            first.state,
            first.alive,
            first.curves,
            first.seconds,
        )


def are_needed(context: Context, plan: Plan) -> bool:
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


def train_first_epochs(
    context: Context, recorded: RecordedPlan, plan: Plan, claim: Claim[Population]
) -> FirstEpochs:
    """Train each chunk of a plan for one epoch, except chunks that have a checkpoint.

    The claim on a chunk ends when its checkpoint is written, so that another process can continue
    the chunk.
    """
    begun = [chunk for chunk in plan.chunks if BegunChunk.of(chunk).epoch > 0]
    new = [chunk for chunk in plan.chunks if BegunChunk.of(chunk).epoch == 0]
    job = context.trainer.job(RungJob, epochs=1, keep_stopped=False)
    part = replace(plan, chunks=tuple(new))
    first = FirstEpochs(context, plan, recorded.configs, claim)
    checkpointing = context.checkpointing([trial.number for trial in recorded.trials])
    n_left = sum(len(chunk.index) for chunk in new)  # trials that nobody has trained yet
    claimed = dict(recorded.chunks)
    saved: set[int] = set()

    def claim_new(chunk: Population) -> bool:
        """Claim a chunk, unless another process trains it or has trained its first epoch."""
        nonlocal n_left
        is_new = claim(chunk)
        if is_new and checkpointing is not None and checkpointing.newer(chunk, epoch=0) is not None:
            is_new = False
            context.ledger.release(recorded.chunk_of(chunk))
        if not is_new:
            n_left -= len(chunk.index)
        return is_new

    def save() -> float:
        """Write checkpoints, and return the time when the next checkpoints are due."""
        if checkpointing is None:
            return math.inf
        begin = time.monotonic()
        saved.update(first.keep_rest(checkpointing))
        for index in list(claimed):
            if saved.issuperset(index):
                context.ledger.release(claimed.pop(index))
        now = time.monotonic()
        return now + max(checkpointing.seconds, pause_after(now - begin))

    due = math.inf if checkpointing is None else time.monotonic() + checkpointing.seconds
    report = context.progress.advance
    with closing(context.trainer.train(job, part, progress=report, claim=claim_new)) as outcomes:
        for outcome in outcomes:
            n_left -= len(outcome.index)
            if isinstance(outcome, Failure):
                number = recorded.trials[outcome.index[0]].number
                context.finish([failed_result(number, context.no_curve, outcome.reason)])
                continue
            assert isinstance(outcome, RungOutcome)
            context.note_fault(outcome.fault)
            context.profile.spent += outcome.spent
            first.add(outcome)
            if time.monotonic() >= due:
                due = save()
    context.tell_trials_without_score(n_left)
    save()
    continued = [first.chunk(outcome) for outcome in first.outcomes if outcome.alive]
    chunks = (*begun, *continued)
    first.plan = replace(plan, chunks=chunks, workers=max(1, min(plan.workers, len(chunks))))
    return first
