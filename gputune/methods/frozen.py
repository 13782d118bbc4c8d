"""The frozen plan at work: whatever trains again, trains in the chunks in which it was first planned.

The bits of a result depend on the company in which a trial trains and on the threads that compute it. A search that is
resumed, and every process that works on it, therefore run whole chunks of one plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gputune.engine.plan import Plan
from gputune.engine.population import ModelKind, Population
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate, Chunk
from gputune.types import Config

Make = Callable[[Sequence[Config]], Plan]
Complete = Callable[[Config], Config]


@dataclass(frozen=True)
class FrozenPlan:
    """A plan of frozen chunks. ``index`` of its chunks counts in ``trials``, and is the key of ``chunks``."""

    plan: Plan
    trials: tuple[Candidate, ...]
    configs: tuple[Config, ...]
    chunks: dict[tuple[int, ...], Chunk]

    def chunk(self, population: Population) -> Chunk:
        """Return the frozen chunk that a chunk of the plan is, or is a part of."""
        return next(chunk for index, chunk in self.chunks.items() if population.index[0] in index)


def frozen_plans(
    ledger: Ledger,
    waiting: Sequence[Candidate],
    *,
    stage: int,
    kind: ModelKind,
    complete: Complete,
    make: Make,
    alone: bool = False,
) -> list[FrozenPlan]:
    """Return the plans in which the ``waiting`` trials train, one for each number of threads.

    What is in no frozen chunk is planned by ``make``, and frozen. Chunks are whole: they may hold trials with a result;
    with ``alone`` only the waiting ones of each train.
    """
    made: dict[int, Plan] = {}

    def cut(new: Sequence[Candidate]) -> list[tuple[tuple[int, ...], int]]:
        plan = made[len(new)] = make([complete(trial.params) for trial in new])
        return [(chunk.index, plan.threads) for chunk in plan.chunks]

    chunks = ledger.chunks(waiting, stage, cut)
    numbers = {number for chunk in chunks for number in chunk.trials}
    if alone:
        numbers &= {trial.number for trial in waiting}
    trials = tuple(trial for trial in ledger.candidates if trial.number in numbers)
    configs = tuple(complete(trial.params) for trial in trials)
    plan = made[len(trials)] if len(trials) in made else make(configs)  # how many processes pay
    place = {trial.number: position for position, trial in enumerate(trials)}
    plans = []
    for threads in dict.fromkeys(chunk.threads for chunk in chunks):
        part = {
            tuple(place[n] for n in chunk.trials if n in place): chunk
            for chunk in chunks
            if chunk.threads == threads
        }
        of_part = replace(
            plan,
            chunks=tuple(Population(kind, i, tuple(configs[p] for p in i)) for i in part),
            workers=1 if threads > 1 and not plan.cluster else min(plan.workers, len(part)),
            threads=threads,
        )
        plans.append(FrozenPlan(of_part, trials, configs, part))
    return plans
