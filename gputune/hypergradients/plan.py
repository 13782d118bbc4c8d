"""How many trials are differentiated at once: as many as the memory of the mode that is used allows."""

from collections.abc import Sequence
from dataclasses import replace

from gputune.data.dataset import Dataset
from gputune.engine.cost import Cost
from gputune.engine.plan import Plan, cores, make_plan
from gputune.engine.population import Population
from gputune.errors import InputError
from gputune.hypergradients.chunk import HypergradientJob, inner_training
from gputune.hypergradients.curvature import twice_differentiable
from gputune.hypergradients.memory import fastest_that_fits, free_bytes, measure
from gputune.report.text import size_words

_SLOWER = 10.0  # than plain training: a step that is differentiated twice, by operations of autograd


def plan_chunks(
    groups: Sequence[Population],
    data: Dataset,
    job: HypergradientJob,
    *,
    memory: int | None,
    workers: int | None,
    bytes_of_a_task: int | None = None,
) -> tuple[Plan, HypergradientJob]:
    """Return the plan, and the job with its budget of bytes for each process.

    ``bytes_of_a_task`` are those of a task on another machine, which shares ``memory`` with no other.

    Raises InputError where one trial alone, with all its folds, does not fit.
    """
    processes = workers or (cores() if data.device.type == "cpu" else 1)
    if bytes_of_a_task is None:
        budget = (memory or free_bytes(data.device)) // processes
    else:
        budget = min(memory or bytes_of_a_task, bytes_of_a_task)

    def cost_of(population: Population, plain: Cost) -> Cost:
        one = population.part(0, 1)
        training = inner_training(job, data, one)
        if job.segments > training.totals.min():
            raise InputError(
                f"Hypergradient(segments=...) must be at most the number of steps, got {job.segments} segments for "
                f"{training.totals.min()} steps; use fewer, smaller batches, or more epochs."
            )
        tables = job.tables(training, one.configs)
        with twice_differentiable(training):
            need = measure(training, one.configs[0]["optimizer"], tables)
        number = sum(tables[name][0].numel() for name in job.wanted)
        steps = training.steps
        mode = fastest_that_fits(need, budget, steps=steps, hyperparameters=number)
        reverse, blocks, tangents = need.reverse(steps), need.checkpointed(steps), need.forward(number)
        needed = {"reverse": reverse, "checkpointed": blocks, "forward": tangents}[mode]
        if needed > budget:
            least = tangents if number == 1 else min(blocks, tangents)
            raise InputError(
                f"memory does not suffice to differentiate one trial in {data.n_folds} folds: {number} hyperparameters "
                f"over {steps} steps need about {size_words(least)}, and {size_words(budget)} may be used a process. "
                "Use fewer segments, smaller batches, workers=1, or a larger memory=."
            )
        return replace(plain, trial_bytes=needed, trial_seconds=_SLOWER * plain.trial_seconds)

    plan = make_plan(
        groups, data, epochs=job.epochs, memory=budget, workers=workers, parameters=0, cost_of=cost_of
    )
    return plan, replace(job, budget=budget)
