"""Train the first epoch of all trials before any trial continues, in a search with a timeout.

When the time is over, every trial then has a score. Otherwise the groups of trials that train
together (chunks) would train one after another, and the last chunks would not begin.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from gputune.engine.checkpoint import Checkpoint, Checkpointing
from gputune.engine.job import Failure, Outcome, RungJob, RungOutcome
from gputune.engine.plan import Plan
from gputune.engine.train import BegunChunk
from gputune.executors.executor import Claim
from gputune.hypergradients.first_step import free_bytes
from gputune.population.population import Population
from gputune.tuning.context import Context, RecordedPlan, failed_result
from gputune.types import Config

# Share of the time left that the estimated training time exceeds. The estimate may be several times
# too short, because other programs use the machine.
_ENOUGH_SHARE = 0.25
_STATE_SHARE = 0.25  # of the free main memory


@dataclass
class FirstEpochs:
    """The results of chunks of trials after their first epoch.

    ``plan`` has the chunks that still train, each from the state after its first epoch. ``begun``
    has the positions of trials that have begun to train further, and ``ended`` those of trials that
    have results of further epochs, or failed. ``configs`` has the configurations of all positions.
    """

    context: Context
    plan: Plan
    configs: Sequence[Config]
    outcomes: list[RungOutcome] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)

    def begin(self, chunk: Population) -> bool:
        """Note that a chunk trains further. Returns True, because this process has claimed it."""
        self.begun.update(chunk.index)
        return True

    def completed(self, outcome: Outcome | Failure) -> Outcome | Failure:
        """Return the result of trials that have trained further, with the outputs of trials that
        were best at their first epoch."""
        self.ended.update(outcome.index)
        if isinstance(outcome, Failure):
            return outcome
        outputs = dict(outcome.outputs)
        for first in self.outcomes:
            for i in set(first.outputs).intersection(outcome.index):
                outputs.setdefault(i, first.outputs[i])
        return replace(outcome, outputs=outputs)

    def rest(self) -> list[Outcome]:
        """Return the results of trials that have trained for only one epoch."""
        results = []
        for first in self.outcomes:
            rows = [row for row, i in enumerate(first.index) if i not in self.ended]
            if not rows:
                continue
            index = tuple(first.index[row] for row in rows)
            # The epochs that are missing are NaN, as in every stopped trial.
            shape = (len(rows), self.context.epochs, *first.curves.shape[2:])
            curves = np.full(shape, np.nan)
            curves[:, :1] = first.curves[rows]
            seconds = first.seconds * len(rows) / len(first.index)
            outputs = {i: first.outputs[i] for i in index if i in first.outputs}
            results.append(Outcome(index, curves, 1, seconds, outputs=outputs))
        return results

    def keep_rest(self, checkpointing: Checkpointing | None) -> None:
        """Write checkpoints of trials that have trained for only one epoch, so that a later call
        continues after this epoch.

        A worker that was lost may have written a checkpoint of a later epoch, which stays.
        """
        if checkpointing is None:
            return
        for first in self.outcomes:
            if first.alive and self.ended.isdisjoint(first.index):
                trials = tuple(checkpointing.numbers[i] for i in first.index)
                has_begun = not self.begun.isdisjoint(first.index)
                if has_begun and checkpointing.folder.path(trials).exists():
                    continue
                checkpoint = Checkpoint(
                    trials, first.alive, first.curves, first.state, first.seconds
                )
                checkpointing.keep(checkpoint, [self.configs[i] for i in first.index])


def are_needed(context: Context, plan: Plan) -> bool:
    """Return whether some chunks of a plan may not begin before the timeout of the search."""
    deadline = context.stop.deadline
    if deadline is None or context.epochs == 1 or context.good_enough.is_possible:
        return False
    if len(plan.chunks) <= plan.at_once:
        return False
    seconds = plan.seconds / (plan.workers * plan.threads)
    if seconds < _ENOUGH_SHARE * (deadline - time.monotonic()):
        return False
    return plan.state_bytes <= _STATE_SHARE * free_bytes(torch.device("cpu"))


def train_first_epochs(
    context: Context, recorded: RecordedPlan, plan: Plan, claim: Claim[Population]
) -> FirstEpochs:
    """Train each chunk of a plan for one epoch, except chunks that continue from a checkpoint.

    The returned plan has only chunks that this process has claimed.
    """
    begun = [chunk for chunk in plan.chunks if BegunChunk.of(chunk).epoch > 0]
    new = [chunk for chunk in plan.chunks if BegunChunk.of(chunk).epoch == 0]
    job = context.trainer.job(RungJob, epochs=1, keep_stopped=False)
    part = replace(plan, chunks=tuple(new))
    first = FirstEpochs(context, plan, recorded.configs)
    n_left = sum(len(chunk.index) for chunk in new)  # trials that nobody has trained yet

    def claim_new(chunk: Population) -> bool:
        nonlocal n_left
        is_claimed = claim(chunk)
        if not is_claimed:  # another process trains them
            n_left -= len(chunk.index)
        return is_claimed

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
            first.outcomes.append(outcome)
    context.tell_trials_without_score(n_left)
    chunks: list[Population] = [chunk for chunk in begun if claim(chunk)]
    for done in first.outcomes:
        if done.alive:
            configs = tuple(recorded.configs[i] for i in done.index)
            chunks.append(
                BegunChunk(
                    plan.chunks[0].kind,
                    done.index,
                    configs,
                    done.state,
                    done.alive,
                    done.curves,
                    done.seconds,
                )
            )
    first.plan = replace(plan, chunks=tuple(chunks), workers=max(1, min(plan.workers, len(chunks))))
    return first
