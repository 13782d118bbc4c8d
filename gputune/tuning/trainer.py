"""What trains the chunks of a plan, for every face: the place is chosen, chunks are handed out, outcomes come back."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from gputune.data.dataset import Dataset
from gputune.engine.backend import computing
from gputune.engine.job import Job, Outcome, Progress
from gputune.engine.memory import GivenUp, run_in_parts
from gputune.engine.plan import Plan
from gputune.engine.population import Population
from gputune.executors.executor import Claim, Executor, Outcomes, hand_out
from gputune.executors.processes import worker_processes
from gputune.executors.ray_cluster import RayCluster


def _unseen(_trial_epochs: int, _curves: np.ndarray) -> None:
    """Show no progress."""


def run_chunks(
    job: Job,
    data: Dataset,
    plan: Plan,
    *,
    progress: Progress = _unseen,
    claim: Claim = lambda chunk: True,
    cluster: RayCluster | None = None,
) -> Iterator[Outcome | GivenUp]:
    """Train the chunks of a plan and yield what came of them, in the order in which they end.

    A chunk that ``claim`` refuses is passed over: another process has it. One that memory does not hold comes in
    parts; a trial that does not fit alone, or whose chunk has ended too many workers, is given up. A ``cluster``
    trains all chunks, and its workers write no checkpoints.
    """
    if cluster is not None:
        executor = cluster.executor(job, data, plan)
        yield from hand_out(plan.chunks, executor, None, job.stop, progress=progress, claim=claim)
        return
    for chunk in plan.chunks:
        _expect(job, chunk.index)

    def train(chunk: Population) -> Outcomes:
        return run_in_parts(job, data, chunk, progress)

    with computing(plan.threads), _here(job, data, plan) as place:
        for outcome in hand_out(plan.chunks, place, train, job.stop, progress=progress, claim=claim):
            if isinstance(outcome, Outcome):
                _expect(job, outcome.index)
            yield outcome


def _here(job: Job, data: Dataset, plan: Plan) -> AbstractContextManager[Executor]:
    """Return the workers that a plan has on this machine beside this process."""
    return nullcontext(Executor()) if plan.workers == 1 else worker_processes(job, data, plan.workers - 1)


def _expect(job: Job, index: tuple[int, ...]) -> None:
    """Remember that a worker may write a checkpoint of these trials."""
    if job.checkpointing is not None:
        job.checkpointing.expect(index)
