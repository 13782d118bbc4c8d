"""The trainer, which trains configurations of one model on one dataset, for every interface.

A chunk is a group of trials with one tensor shape that train together. The trainer makes the plan
(the list of chunks) and the job (the settings that all chunks share). Then it trains the chunks and
yields their results.
"""

import sys
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.backends.base import TrialWork
from gputune.engine.backends.selection import choose_backend, trains_as
from gputune.engine.backends.table import backend_named
from gputune.engine.job import Failure, Job, Outcome, ProgressCallback, run_in_parts, train_chunk
from gputune.engine.need import Need
from gputune.engine.plan import Plan, Planner, cores
from gputune.engine.reuse import ChunkPool
from gputune.engine.stop import Stop
from gputune.engine.train import BegunChunk, Trained
from gputune.engine.turns import run_together
from gputune.executors.cluster import Connection
from gputune.executors.executor import Claim, Executor, Outcomes, Queue
from gputune.executors.processes import chunk_processes
from gputune.executors.threads import chunk_threads
from gputune.ground.errors import InputError, option
from gputune.ground.text import count
from gputune.ground.types import BackendWord, Config, Precision
from gputune.hypergradients.chunk import HypergradientJob, plan_chunks
from gputune.hypergradients.first_step import free_bytes
from gputune.modules.construction import Builder
from gputune.modules.inspection import gain_of_code, known_traits, note_fastest, traits_of
from gputune.modules.kept_features import with_kept_features
from gputune.population.kinds import ModelKind
from gputune.population.population import Ensemble, Population, arguments_text, populations
from gputune.population.state import State
from gputune.population.traits import FastestWay
from gputune.scoring.objective import Objective
from gputune.scoring.scoring import Scoring

AnyJob = TypeVar("AnyJob", bound=Job)

# The time to generate the code of a member's step, if the search has already built its kernels.
_BUILT_SECONDS = 0.3


def unseen(_trial_epochs: int, _curves: np.ndarray) -> None:
    """Do nothing. Callers that show no progress pass this function as the progress callback."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """An object that trains configurations of one model on one dataset. It holds the data, the
    model and the machine options.

    Attributes:
        data: The dataset.
        kind: The kind of model: "mlp", "linear" or "module".
        module_class: The class or function that makes the modules, or None for a built-in model.
        objective: The training objective, or None for the loss of the task.
        seed: The random seed.
        horizon: The number of epochs of a full training run. Schedules run over this number of
            epochs.
        scoring: The scoring of validation rows, or None.
        backend: The name of the backend that was chosen for the trials.
        reason: The reason why a faster backend was not chosen, or "".
        precision: The precision of a module's computations.
        memory: The limit of memory in bytes that the user sets. None means the limit that the
            device suggests.
        workers: The number of processes, or of tasks of a ``cluster`` at the same time. None means
            an estimate.
        others: GPUs in addition to the GPU of the data. Each gets its own process.
        cluster: The connection to a cluster, or None.
        each_epoch: If True, callbacks are notified after every epoch, so that they can end the
            search there.
        stop: The signal that ends the training.
        features: A clause for the plan that says whether features of frozen layers are kept, or "".
        pool: The chunk sizes that fitted into memory, and the recorded steps (operations of one
            training step, replayed), for later chunks.
    """

    data: Dataset
    kind: ModelKind
    module_class: Builder | None = None
    objective: Objective | None = None
    seed: int
    horizon: int
    scoring: Scoring | None = None
    backend: str = "eager"
    reason: str = ""
    precision: Precision = "full"
    memory: int | None = None
    workers: int | None = 1
    others: tuple[torch.device, ...] = ()
    cluster: Connection | None = None
    each_epoch: bool = False
    stop: Stop = field(default_factory=Stop)
    pool: ChunkPool = field(default_factory=ChunkPool)
    features: str = ""

    def __post_init__(self) -> None:
        gpus = self.data.device, *self.others
        if (
            self.data.device.type == "cuda"
            and self.cluster is None
            and (self.workers or 1) > len(gpus)
        ):
            raise InputError(
                f"workers={self.workers}",
                f"is too many: each GPU can have only one process, and this search has "
                f"{count(len(gpus), 'GPU')}, {', '.join(map(str, gpus))}",
                remedy=f"Leave {option('workers')} out, or choose {option('device', 'cpu')}.",
            )

    def with_backend(
        self, word: BackendWord, configs: Sequence[Config], say: Callable[[str], object]
    ) -> "Trainer":
        """Return a copy of the trainer with the requested backend, or with the fastest possible
        backend.

        The function ``say`` tells the user about slow training.
        """
        device = self.data.device if self.cluster is None else torch.device(self.cluster.device)
        chosen = choose_backend(word, device, self.data.dtype, self.kind)
        backend = backend_named(chosen.name)
        if chosen.told:
            faster = backend_named(chosen.faster)
            works = [TrialWork(self.kind, config) for config in configs]
            if not works or not all(faster.refuses(work) for work in works):
                say(
                    f"note: trials train {backend.in_words}, slower than {faster.in_words}: "
                    f"{chosen.told}"
                )
        if chosen.is_requested:
            cluster = "" if self.cluster is None else self.cluster.cluster.name
            backend.check_search(configs, self.kind, self.data, cluster)
        return replace(self, backend=chosen.name, reason=chosen.reason)

    def groups(self, configs: Sequence[Config]) -> list[Population]:
        """Split configurations into populations: trials that have tensors of the same shapes."""

        def own_steps(config: Config) -> Hashable:
            name = trains_as(self.backend, self.kind, config, data=self.data)
            return backend_named(name).separate_steps(TrialWork(self.kind, config, data=self.data))

        rows = max(self.data.train_lengths)
        own_loss = self.objective is not None and not self.objective.is_named
        return populations(configs, self.kind, rows=rows, own_steps=own_steps, own_loss=own_loss)

    def plan(
        self,
        groups: Sequence[Population],
        *,
        epochs: int,
        parameters: int = 0,
        measure: Callable[[Population, int], Need | None] | None = None,
    ) -> Plan:
        """Return the plan that divides populations into chunks, which train one after another or in
        parallel.

        ``measure`` returns the memory that a population needs on a GPU of this machine.
        """
        is_gpu_here = self.cluster is None and self.data.device.type == "cuda"
        planner = Planner(
            self.data,
            self.memory,
            self.workers,
            gpus=1 + len(self.others),
            backend=self.backend,
            reason=self.reason,
            free=None if self.cluster is None else self.cluster.free,
            parameters=parameters,
            traits=known_traits(self.module_class, self.data),
            measure=measure if is_gpu_here else None,
        )
        return self._place(replace(planner.plan(groups, epochs), features=self.features))

    def plan_differentiated(
        self, configs: Sequence[Config], job: HypergradientJob
    ) -> tuple[Plan, HypergradientJob]:
        """Divide the trials of a hypergradient search into groups that fit into memory.

        Returns the plan of the groups, and the job: the settings that all groups share. The field
        ``budget`` of the job is set to the bytes of memory that each process may use.
        """
        if self.cluster is not None:  # each task has ``memory`` for itself
            budget = min(self.memory or sys.maxsize, self.cluster.bytes_of_a_task())
        else:
            device = self.data.device
            # On a GPU, each process has its own device.
            processes = (self.workers or cores()) if device.type == "cpu" else 1
            budget = (self.memory or free_bytes(device)) // processes
        job = replace(job, budget=budget)
        plan = plan_chunks(
            self.groups(configs), self.data, job, workers=self.workers, gpus=1 + len(self.others)
        )
        return self._place(plan), job

    def _place(self, plan: Plan) -> Plan:
        """Set the number of threads of a plan to that of the cluster's tasks.

        Without a cluster, return the plan unchanged.
        """
        if self.cluster is None:
            return plan
        return replace(plan, threads=self.cluster.threads, cluster=self.cluster.cluster.title)

    def with_features(self, configs: Sequence[Config]) -> "Trainer":
        """Return a trainer that reads kept outputs of a pretrained module's frozen layers, if
        gputune can keep them."""
        data, text = with_kept_features(self.module_class, configs, self.data, self.objective)
        return replace(self, data=data, features=text)

    def job(self, kind: type[AnyJob], *, epochs: int, **fields: Any) -> AnyJob:
        """Return the job: the settings that all chunks share for a training up to ``epochs``
        epochs.

        ``fields`` are additional fields of the job class ``kind``.
        """
        return kind(
            seed=self.seed,
            epochs=epochs,
            horizon=self.horizon,
            scoring=self.scoring,
            backend=self.backend,
            precision=self.precision,
            module_class=self.module_class,
            objective=self.objective,
            stop=self.stop,
            pool=self.pool,
            each_epoch=self.each_epoch,
            traits=known_traits(self.module_class, self.data),
            **fields,
        )

    def train(
        self,
        job: Job,
        plan: Plan,
        *,
        progress: ProgressCallback = unseen,
        claim: Claim[Population] = lambda chunk: True,
        may_begin: Claim[Population] | None = None,
    ) -> Generator[Outcome | Failure, None, None]:
        """Train the chunks of a plan, and yield the results of each chunk when it ends.

        The caller closes the generator, also after an error of its own, so that no worker continues.
        A chunk does not train if ``claim`` returns False. A chunk waits for the results of other
        chunks until ``may_begin`` returns True, and does not train if that never happens. A chunk
        that needs too much memory trains in parts. A trial that needs too much memory even as a
        single trial yields a failure.
        """
        data = self.data
        if self.cluster is not None:
            tasks = self.cluster.executor(job, data, plan)
            yield from Queue(plan.chunks, tasks, job.stop, claim, may_begin).run(None, progress)
            return
        if job.checkpointing is not None:
            for chunk in plan.chunks:
                job.checkpointing.expect(chunk.index)

        # This process is a worker itself, so the executor has one worker less.
        devices = (self.others or (data.device,) * plan.workers)[: plan.workers - 1]
        n_trials = 1 + max((max(chunk.index) for chunk in plan.chunks), default=0)
        at_once = plan.with_turns(self.memory)
        executor: AbstractContextManager[Executor[Population, Outcome | Failure]]
        if devices:
            executor = chunk_processes(job, data, devices, n_trials)
        # A receiver of every epoch, and a search that may end early, need the chunks in order.
        elif at_once > 1 and not job.each_epoch and may_begin is None:
            in_parts = partial(run_in_parts, job, data)
            executor = chunk_threads(in_parts, at_once - 1, plan.threads, n_trials)
        else:
            executor = nullcontext(Executor())
        with torch_threads(plan.threads), executor as place:

            def train(chunk: Population) -> Outcomes:
                with place.turn():
                    return run_in_parts(job, data, chunk, progress)

            queue = Queue(plan.chunks, place, job.stop, claim, may_begin)
            with closing(queue.run(train, progress)) as outcomes:
                for outcome in outcomes:
                    if isinstance(outcome, Outcome) and job.checkpointing is not None:
                        job.checkpointing.expect(outcome.index)
                    yield outcome

    def take_code(self, configs: Sequence[Config], epochs: Sequence[int]) -> None:
        """Allow compiled code for the members of a refit if compiled code saves time.

        Compiled code must have been faster in the search, and the gain must be larger than the time
        to build the code.
        """
        builder = self.module_class
        if builder is None or self.data.device.type != "cpu":
            return
        rows = sum(self.data.train_lengths)
        for config, n_epochs in zip(configs, epochs):
            gain = gain_of_code(builder, config)
            if gain * n_epochs * rows / config["batch_size"] > _BUILT_SECONDS:
                traits_of(builder, config, self.data, objective=self.objective)
                note_fastest(builder, self.data, arguments_text(config), FastestWay(gain=gain))

    def train_members(
        self,
        schedules: Sequence[Mapping[int, Config]],
        epochs: Sequence[int],
        progress: ProgressCallback = unseen,
    ) -> list[list[nn.Module]]:
        """Train each trial for its own number of epochs, on all folds of the data.

        A schedule has the configuration of a trial from each epoch on. All trials pause together
        where a configuration changes. Returns one list per trial, with a trained module for every
        split of the data, on the CPU. With replicas, the module is the ``Ensemble`` of a trial's
        networks on the split.
        """
        members: dict[int, list[nn.Module]] = {}
        states: dict[int, State] = {}
        last = max(epochs)
        begins = set(chain.from_iterable(schedules))
        stops = sorted(epoch for epoch in begins if 0 < epoch < last)
        for begin, stop in pairwise([0, *stops, last]):
            trials = [trial for trial in range(len(schedules)) if epochs[trial] > begin]
            configs = []
            for trial in trials:
                epoch = max(epoch for epoch in schedules[trial] if epoch <= begin)
                configs.append(schedules[trial][epoch])
            job = self.job(Job, epochs=stop)
            plan = self.plan(self.groups(configs), epochs=stop - begin)

            def train_chunk_of(
                chunk: Population, trials: Sequence[int] = trials, job: Job = job
            ) -> None:
                numbers = [trials[place] for place in chunk.index]
                begun = BegunChunk.of(chunk)
                if numbers[0] in states:
                    state = State.stack([states.pop(number) for number in numbers])
                    begun = replace(begun, state=state)

                def store(trained: Trained) -> bool:
                    for place, number in enumerate(numbers):
                        if epochs[number] == trained.epochs:
                            members[number] = self._modules(trained, place)
                    progress(len(numbers), trained.curves[:, trained.epochs - 1 : trained.epochs])
                    # True ends the chunk: all its trials have reached their last epoch.
                    return all(epochs[number] <= trained.epochs for number in numbers)

                trained = train_chunk(job, self.data, begun, after_epoch=store)
                if any(epochs[number] > job.epochs for number in numbers):
                    for place, number in enumerate(numbers):
                        states[number] = trained.state.select([place])

            with torch_threads(plan.threads):
                tasks = [partial(train_chunk_of, chunk) for chunk in plan.chunks]
                at_once = plan.with_turns(self.memory)
                run_together(tasks, at_once=at_once, threads=plan.threads)
        return [members[trial] for trial in range(len(schedules))]

    def _modules(self, trained: Trained, place: int) -> list[nn.Module]:
        """Return the modules of the trial at a place in a chunk: its network on each split, or the
        mean of its replicas there."""
        data = self.data
        modules: list[nn.Module] = []
        for split in range(data.n_splits):
            folds = range(split, data.n_folds, data.n_splits)
            networks = [trained.member(fold, place) for fold in folds]
            shares = [1 / len(networks)] * len(networks)
            is_single = len(networks) == 1
            modules.append(networks[0] if is_single else Ensemble(networks, shares, data.task))
        return modules
