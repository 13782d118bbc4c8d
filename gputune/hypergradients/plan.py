"""How many trials are differentiated at once: as many as the memory of the mode that is used allows."""

from collections.abc import Sequence
from dataclasses import replace

from gputune.data.dataset import Dataset
from gputune.engine.plan import Cost, Plan, cores, make_plan
from gputune.engine.population import Population
from gputune.errors import InputError
from gputune.hypergradients.chunk import HypergradientJob, inner_training
from gputune.hypergradients.memory import fastest_that_fits, free_bytes, measure

_SLOWER = 10.0  # than plain training: a step that is differentiated twice, by operations of autograd


def plan_chunks(
    groups: Sequence[Population],
    data: Dataset,
    job: HypergradientJob,
    *,
    memory: int | None,
    workers: int | None,
) -> tuple[Plan, HypergradientJob]:
    """Return the plan, and the job with its budget of bytes for each process.

    Raises InputError where one trial alone, with all its folds, does not fit.
    """
    processes = workers or (cores() if data.device.type == "cpu" else 1)
    budget = (memory or free_bytes(data.device)) // processes

    def cost_of(population: Population, plain: Cost) -> Cost:
        one = population.part(0, 1)
        training = inner_training(job, data, one)
        tables = job.tables(training, one.configs)
        need = measure(training, one.configs[0]["optimizer"], tables)
        number = sum(tables[name][0].numel() for name in job.wanted)
        mode = fastest_that_fits(need, budget, steps=training.steps, hyperparameters=number)
        needed = {
            "reverse": need.reverse(training.steps),
            "checkpointed": need.checkpointed(training.steps),
            "forward": need.forward(number),
        }[mode]
        if needed > budget:
            raise InputError(
                f"memory does not suffice to differentiate one trial in {data.n_folds} folds: {needed} bytes are "
                f"needed for {number} hyperparameters, {budget} may be used a process. Use fewer segments, smaller "
                "batches, workers=1, or a larger memory=."
            )
        return replace(plain, trial_bytes=needed, trial_seconds=_SLOWER * plain.trial_seconds)

    plan = make_plan(
        groups, data, epochs=job.epochs, memory=budget, workers=workers, parameters=0, cost_of=cost_of
    )
    return plan, replace(job, budget=budget)
