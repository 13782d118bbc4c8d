"""One chunk of a search by hypergradients: its trials trained in all folds, scored, and differentiated.

How many trials are differentiated at once: as many as the memory of the mode that is used allows.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.engine.cost import Cost
from gputune.engine.job import Job, Outcome, Progress, make_network
from gputune.engine.plan import Plan, cores, make_plan
from gputune.engine.population import Population
from gputune.engine.rules import BETA1, BETA2
from gputune.errors import InputError
from gputune.hypergradients.curvature import twice_differentiable
from gputune.hypergradients.differences import differences
from gputune.hypergradients.inner import HYPERPARAMETERS, Tables
from gputune.hypergradients.memory import fastest_that_fits, free_bytes, measure
from gputune.hypergradients.population_training import PopulationTraining
from gputune.hypergradients.unrolled import Hypergradients, Watch, forward, reverse, train_plainly
from gputune.text import size_words
from gputune.types import Config

WIDE = 0.2  # in the logarithm: finite differences that look across the noise of chaotic training


@dataclass(frozen=True, kw_only=True)
class HypergradientJob(Job):
    """What every chunk has in common: ``wanted`` hyperparameters, ``segments`` each, a value for each layer or not.

    ``budget`` is in bytes; "exact" is the fastest of reverse and forward mode that fits into it.
    """

    wanted: tuple[str, ...] = ("lr",)
    segments: int = 1
    per_layer: bool = False
    mode: Literal["exact", "differences"] = "exact"
    budget: int = 2**30

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> "Slopes":
        """Train one chunk, score it after each epoch and differentiate its validation losses."""
        begin = time.monotonic()
        training = inner_training(self, data, chunk)
        curves = np.full((len(chunk.index), self.epochs, data.n_folds), np.nan)

        def watch(step: int, weights: Tensor) -> None:
            epoch, within = divmod(step, training.each)
            if within:
                return
            if self.scoring is not None:
                curves[:, epoch - 1] = training.scores(weights, self.scoring)
            if progress is not None:
                progress(len(curves), curves[:, epoch - 1 : epoch])
            if self.is_over() and epoch < self.epochs:
                raise _OverError(epoch)

        epochs, found = self.epochs, None
        try:
            found = self._differentiate(training, chunk, watch)
        except _OverError as over:
            epochs = over.epochs
        seconds = time.monotonic() - begin
        return Slopes(chunk.index, curves, epochs, seconds, *_by_trial(found, self.wanted, data.n_folds))

    def _differentiate(self, training: PopulationTraining, chunk: Population, watch: Watch) -> Hypergradients:
        optimizer, tables = chunk.configs[0]["optimizer"], self.tables(training, chunk.configs)
        if self.mode == "differences":
            return differences(training, optimizer, tables, self.wanted, width=WIDE, watch=watch)
        number = sum(tables[name][0].numel() for name in self.wanted)
        need = measure(training, optimizer, tables)
        mode = fastest_that_fits(need, self.budget, steps=training.steps, hyperparameters=number)
        if mode == "forward":
            return forward(training, optimizer, tables, self.wanted, watch=watch)
        return reverse(
            training, optimizer, tables, self.wanted, checkpoint=mode == "checkpointed", watch=watch
        )

    def tables(self, training: PopulationTraining, configs: Sequence[Config]) -> Tables:
        """Return the hyperparameters (P, S, L) of configurations; those that are searched have all their entries."""
        layers = int(training.layer.max()) + 1 if self.per_layer else 1
        whole = (self.segments, layers)
        tables = {}
        for name in HYPERPARAMETERS:
            default = {"beta1": BETA1, "beta2": BETA2}.get(name, 0.0)
            rows = [
                _table(config.get(name, default), whole if name in self.wanted else None)
                for config in configs
            ]
            members = np.tile(np.stack(rows), (training.folds, 1, 1))
            tables[name] = torch.as_tensor(members, dtype=training.data.dtype, device=training.data.device)
        return tables


@dataclass(frozen=True)
class Slopes(Outcome):
    """What a chunk gave beside its curves, None where the deadline cut it short.

    ``losses`` (C, F) on the validation rows, ``slopes`` hyperparameter -> (C, F, S, L), ``ratios`` (C, F) of the guard.
    """

    losses: np.ndarray | None
    slopes: dict[str, np.ndarray] | None
    ratios: np.ndarray | None


class _OverError(Exception):
    """The deadline has passed, after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs


def inner_training(job: Job, data: Dataset, chunk: Population) -> PopulationTraining:
    """Return the training of a chunk over the whole horizon."""
    network = make_network(chunk, data, seed=job.seed, module_class=job.module_class)
    return PopulationTraining(network, data, chunk.configs, seed=job.seed, epochs=job.horizon)


def train_scheduled(job: HypergradientJob, data: Dataset, chunk: Population) -> nn.Module:
    """Train the one trial of a chunk on the rows of its one fold, with its segments and layers; return the module."""
    training = inner_training(job, data, chunk)
    tables = job.tables(training, chunk.configs)
    steps = job.epochs * training.each
    weights = train_plainly(training, chunk.configs[0]["optimizer"], tables, steps=steps)
    return training.member(weights, 0, 0)


def _table(value: float | list[float] | list[list[float]], whole: tuple[int, int] | None) -> np.ndarray:
    """A value, one for each segment, or one for each segment and layer, as (S, L)."""
    table = np.asarray(value, dtype=float)
    table = table.reshape(len(table) if table.ndim else 1, -1)
    return table if whole is None else np.broadcast_to(table, whole)


def _by_trial(
    found: Hypergradients | None, wanted: tuple[str, ...], folds: int
) -> tuple[np.ndarray | None, dict[str, np.ndarray] | None, np.ndarray | None]:
    """Turn the member axis (fold-major) into trials x folds."""
    if found is None:
        return None, None, None

    def turned(table: Tensor) -> np.ndarray:
        array: np.ndarray = table.detach().double().cpu().numpy()
        return array.reshape(folds, -1, *array.shape[1:]).swapaxes(0, 1)

    slopes = {name: turned(found.gradients[name]) for name in wanted}
    return turned(found.value), slopes, turned(found.ratio)


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
