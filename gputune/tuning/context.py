"""The context of a search: a session, the data, the model and the plan of its training.

A chunk is a group of trials with one tensor shape that train together. A plan is a list of chunks.
A recorded chunk is a chunk that the study file stores.

The last bits of a result depend on the trials that share a chunk, and on the number of threads.
Therefore a resumed search, and every process that works on a search, trains the same chunks of the
same plan, never parts of a chunk. The study file stores this plan.
"""

import math
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import numpy as np

from gputune.data.dataset import Dataset
from gputune.engine.backends.table import backend_named
from gputune.engine.checkpoint import Checkpoint, CheckpointFolder, Checkpointing
from gputune.engine.choice import TimedModule, fastest_way
from gputune.engine.job import Failure, Job, Outcome
from gputune.engine.need import Need, cuda_peak, measure_need
from gputune.engine.plan import Plan, joined_sizes
from gputune.executors.executor import Claim
from gputune.ground.errors import InputError, option
from gputune.ground.text import count, size_words
from gputune.ground.types import Config, Outputs
from gputune.modules.inspection import check_rates, known_traits, note_fastest, traits_of
from gputune.optimizers.classes import loop_reason
from gputune.population.population import Population, arguments_text, shape_of
from gputune.scoring.scoring import Scoring, shape_of_scores
from gputune.study.store import Candidate, PlannedChunk, Result
from gputune.tuning.choices import ModelChoice
from gputune.tuning.problem import Problem
from gputune.tuning.progress import Profile
from gputune.tuning.session import Session, block_size
from gputune.tuning.trainer import Trainer


@dataclass(frozen=True)
class RecordedPlan:
    """A training plan made of recorded chunks (groups of trials that the study file stores).

    ``trials`` are the trials of these chunks only. The ``index`` of a chunk holds the positions of
    its trials in ``trials``. The dict ``chunks`` uses this index as key.
    """

    plan: Plan
    trials: tuple[Candidate, ...]
    configs: tuple[Config, ...]
    chunks: dict[tuple[int, ...], PlannedChunk]

    def chunk_of(self, part: Population) -> PlannedChunk:
        """Return the recorded chunk with the trials of ``part``, which is a chunk or a part of a
        chunk."""
        return next(chunk for index, chunk in self.chunks.items() if part.index[0] in index)


@dataclass(frozen=True)
class Context(Session):
    """A session that trains configurations on rows.

    Attributes:
        trainer: The data, the model and the machine.
        problem: The encoded rows, the target and the loss.
        profile: The time that each part of the search takes.
        checkpoints: The folder with the checkpoints. None if the study is not stored in a file.
        needs: The device memory that trials need, measured once for each tensor shape.
        timed: The fastest way to train the members, keyed by the text of the module__* values that
            may be sizes.
        faults: Problems during the training that did no harm, one sentence each.
    """

    trainer: Trainer
    problem: Problem
    profile: Profile
    checkpoints: CheckpointFolder | None = None
    needs: dict[object, Need | None] = field(default_factory=dict)
    timed: dict[str, TimedModule] = field(default_factory=dict)
    faults: dict[str, None] = field(default_factory=dict)

    @property
    def choice(self) -> ModelChoice:
        return self.problem.choice

    @property
    def in_rungs(self) -> bool:
        """True if the method compares running trials (halving or median), so that all trials train
        together from one comparison to the next."""
        return self.method.compares_trials

    @property
    def data(self) -> Dataset:
        return self.trainer.data

    @property
    def scoring(self) -> Scoring:
        assert self.trainer.scoring is not None
        return self.trainer.scoring

    @property
    def no_curve(self) -> np.ndarray:
        """The empty learning curve of a trial that has not trained.

        The shape is (0, F), or (0, F, M) with several metrics.
        """
        return np.empty((0, *shape_of_scores(self.scoring, self.data.n_splits)))

    @property
    def epochs(self) -> int:
        """The number of epochs for which a trial trains if nothing ends the trial early."""
        return self.trainer.horizon

    def complete(self, params: Config) -> Config:
        """Return the hyperparameters of a trial, with default values for all keys that training
        reads."""
        return self.method.complete(self.choice.complete(params, self.options.training.schedule))

    def plan(self, configs: Sequence[Config], *, epochs: int) -> Plan:
        """Return the training plan for configurations that train for ``epochs`` epochs.

        Raises InputError for a module that cannot be trained.
        """
        with self.profile.clock("planning"):
            # A failed build is not an error here, because later plans use another backend instead.
            backend = backend_named(self.trainer.backend)
            backend.prepare(configs, self.trainer.kind, self.data, self.progress.say)
        groups = self.trainer.groups(configs)
        parameters = 0
        if self.choice.module_class is not None:
            # One module is tried for each set of constructor arguments.
            first = {group.arguments: group.configs[0] for group in groups}
            parameters = max([0, *map(self.check_module, first.values())])
            self._check_rows(groups)
        for remark in self.remarks_on(configs):
            self.progress.say(f"note: {remark}", once=True)
        with self.profile.clock("planning"):
            make = partial(
                self.trainer.plan, epochs=epochs, parameters=parameters, measure=self._need
            )
            plan = make(groups)
            # The timing may have found a faster way for some chunks.
            is_faster = self._time(plan, groups, epochs)
            known = known_traits(self.choice.module_class, self.data)
            joined, clause = joined_sizes(groups, self.data, self.trainer.backend, known)
            if is_faster or len(joined) < len(groups):
                plan = make(joined)
            failures = tuple(self.trainer.pool.failures)
            plan = replace(plan, failures=failures, batch_sizes=clause)
        self.profile.plan = plan
        self.profile.at_once = max(plan.workers, plan.with_turns(self.trainer.memory))
        if plan.chunk_bytes > (self.trainer.memory or math.inf):
            memory = option("memory", self.options.machine.memory)
            self.progress.say(
                f"note: {memory} does not hold one trial of the largest size, which takes about "
                f"{size_words(plan.chunk_bytes)}; a trial of that size trains alone, and uses "
                "that much memory",
                once=True,
            )
        return plan

    def _time(self, plan: Plan, groups: Sequence[Population], epochs: int) -> bool:
        """Time the possible backends for a user's module, and choose the fastest.

        Returns True if any trial now trains with a different backend.
        """
        builder = self.choice.module_class
        data = self.data
        if (
            builder is None
            or self.options.machine.backend != "auto"
            or data.device.type != "cpu"
            or self.trainer.cluster
        ):
            return False
        chunks_by_sizes: dict[str, list[Population]] = {}
        for chunk, way in zip(plan.chunks, plan.ways):
            if not backend_named(way).takes_single_trials:
                # A float, such as a standard deviation of the initial weights, is not a size.
                # Trials that differ only in floats are timed once.
                config = chunk.configs[0]
                sizes = {key: config[key] for key in config if not isinstance(config[key], float)}
                chunks_by_sizes.setdefault(arguments_text(sizes), []).append(chunk)
        n_rows = sum(data.train_lengths)
        is_changed = False
        for key, chunks in chunks_by_sizes.items():
            if key not in self.timed:
                n_trials = sum(len(chunk.index) for chunk in chunks)
                steps = n_trials * epochs * n_rows / chunks[0].configs[0]["batch_size"]
                group = next(group for group in groups if chunks[0].index[0] in group.index)
                # More trials than a chunk has could need more memory than the training.
                group = group.part(0, max(len(chunk.index) for chunk in chunks))
                job = self.trainer.job(Job, epochs=epochs)
                earlier = list(self.timed.values())
                fastest = fastest_way(job, data, group, member_steps=steps, earlier=earlier)
                traits = job.traits.get(group.arguments)
                self.timed[key] = TimedModule(traits.parameters if traits else 0, fastest)
                if slow := fastest.slow:
                    failed = slow in self.trainer.pool.failures
                    reason = f"since {slow}" if failed else f"which is faster here: {slow}"
                    self.progress.say(f"note: {self.choice.name} trains one by one, {reason}")
            for arguments in {chunk.arguments for chunk in chunks}:
                is_changed |= note_fastest(builder, data, arguments, self.timed[key].way)
        return is_changed

    def recorded_plans(
        self, waiting: Sequence[Candidate], stage: int, make: Callable[[Sequence[Config]], Plan]
    ) -> list[RecordedPlan]:
        """Return the training plans of the waiting trials, with trials grouped as the study file
        records.

        There is one plan for each number of threads. ``make`` groups the trials that have no
        recorded group yet.
        """
        # Plans by number of trials, so that a search in which all trials are new is planned only
        # once.
        plan_of: dict[int, Plan] = {}
        options = self.options

        def split(new: Sequence[Candidate]) -> list[tuple[tuple[int, ...], int, int]]:
            configs = [self.complete(trial.params) for trial in new]
            size = block_size(options.search.target_score, options.search.patience_trials)
            if size is None:
                plan = plan_of[len(new)] = make(configs)
                return [(chunk.index, plan.threads, plan.at_once) for chunk in plan.chunks]
            parts = []
            for begin in range(0, len(configs), size):
                plan = make(configs[begin : begin + size])
                for chunk in sorted(plan.chunks, key=lambda chunk: min(chunk.index)):
                    # The plan of a block counts from 0, the ledger over all new trials.
                    index = tuple(begin + place for place in chunk.index)
                    parts.append((index, plan.threads, plan.at_once))
            return parts

        chunks = self.ledger.chunks(waiting, stage, split)
        candidates = {trial.number: trial for trial in self.ledger.candidates}
        configs = {}
        for number in sorted(number for chunk in chunks for number in chunk.trials):
            configs[number] = self.complete(candidates[number].params)
        # This plan decides the number of processes.
        whole = plan_of.get(len(configs)) or make(list(configs.values()))
        plans = []
        for threads in dict.fromkeys(chunk.threads for chunk in chunks):
            group = [chunk for chunk in chunks if chunk.threads == threads]
            numbers = sorted(number for chunk in group for number in chunk.trials)
            place = {number: position for position, number in enumerate(numbers)}
            recorded = {}
            parts = []
            for chunk in group:
                index = tuple(place[number] for number in chunk.trials)
                recorded[index] = chunk
                members = tuple(configs[number] for number in chunk.trials)
                parts.append(Population(self.choice.kind, index, members))
            one_process = threads > 1 and not whole.cluster
            n_workers = 1 if one_process else min(whole.workers, len(parts))
            plan = replace(whole, chunks=tuple(parts), workers=n_workers, threads=threads)
            trials = tuple(candidates[number] for number in numbers)
            group_configs = tuple(configs[number] for number in numbers)
            plans.append(RecordedPlan(plan, trials, group_configs, recorded))
        return plans

    def train(
        self,
        job: Job,
        plan: Plan,
        numbers: Sequence[int],
        *,
        claim: Claim[Population] = lambda chunk: True,
        may_begin: Claim[Population] | None = None,
        curves: Mapping[int, np.ndarray] = MappingProxyType({}),
    ) -> Generator[Outcome, None, None]:
        """Train the chunks of a plan, and yield the results of each chunk when it ends.

        Trials that cannot be trained are stored as failed. See ``Trainer.train``, also for closing
        the generator.

        Args:
            job: The settings that all chunks share.
            plan: The plan.
            numbers: The trial number at each position of the plan.
            claim: Returns False for a chunk that another process trains.
            may_begin: Returns False for a chunk that must wait for other chunks.
            curves: The learning curves of trials that have trained before, by trial number.
        """
        report = self.progress.advance
        training = self.trainer.train(job, plan, progress=report, claim=claim, may_begin=may_begin)
        with closing(training) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, Failure):
                    number = numbers[outcome.index[0]]
                    curve = curves.get(number, self.no_curve)
                    folds = (math.nan,) * curve.shape[1]
                    detail = {"reason": outcome.reason}
                    self.finish([Result(number, "failed", math.nan, folds, 0, 0.0, curve, detail)])
                    continue
                self.note_fault(outcome.fault)
                self.profile.spent += outcome.spent
                yield outcome

    def note_fault(self, fault: str) -> None:
        """Show a harmless problem of the training to the user, and note the problem for the
        study."""
        if fault:
            self.faults[fault] = None
            self.progress.say(f"note: {fault}", once=True)

    def tell_trials_without_score(self, foreign: Container[int] = ()) -> None:
        """Tell the user how many trials have no score because the time was over.

        ``foreign`` are the numbers of trials that other processes train.
        """
        n_waiting = 0
        for trial, result in self.ledger.rows():
            n_waiting += result is None and trial.number not in foreign
        # A request to stop, such as Ctrl-C, has its own message.
        if n_waiting and self.is_over() and not self.stop.requested:
            self.progress.say(
                f"note: the time was over before {count(n_waiting, 'trial')} had trained for one "
                f"epoch. These trials have no score. Choose a longer {option('timeout')}, or fewer "
                "trials or folds."
            )

    def may_begin(self, recorded: RecordedPlan) -> Claim[Population] | None:
        """Return a function that decides whether a group of trials may begin to train.

        Returns None if every group may begin at any time.
        """
        if not self.good_enough.is_possible:
            return None
        return lambda part: self.good_enough.allows(recorded.chunk_of(part))

    def _need(self, population: Population, max_trials: int) -> Need | None:
        """Measure the device memory that trials with the same tensor shapes need, once for each
        shape."""
        shape = shape_of(population)
        if shape not in self.needs:
            job = self.trainer.job(Job, epochs=self.epochs)
            peak = cuda_peak(self.data.device)
            self.needs[shape] = measure_need(job, self.data, population, peak, most=max_trials)
        return self.needs[shape]

    def checkpointing(self, numbers: Sequence[int]) -> Checkpointing | None:
        """Return the settings for checkpoints of trials: folder, trial numbers and interval.

        Returns None if the study is not stored in a file.
        """
        if self.checkpoints is None:
            return None
        return Checkpointing(
            self.checkpoints, tuple(numbers), self.options.machine.checkpoint_seconds
        )

    def checkpoints_of(self, numbers: Sequence[int], configs: Sequence[Config]) -> list[Checkpoint]:
        """Read the checkpoints of trials, and tell the user how many trials can continue
        training."""
        if self.checkpoints is None:
            return []
        checkpoints = self.checkpoints.read(dict(zip(numbers, configs)))
        begun = {number for checkpoint in checkpoints for number in checkpoint.trials}
        if begun:
            trials = count(len(begun), "trial")
            self.progress.say(f"{trials} can continue from where training was stopped", once=True)
        return checkpoints

    def finish(
        self, results: Sequence[Result], outputs: Mapping[int, Outputs] = MappingProxyType({})
    ) -> None:
        """Store the results of trials that have ended, and the outputs of trials by trial number.

        Also update the progress bar, and delete the checkpoints of these trials.
        """
        new = [result for result in results if result.number not in self.ledger.results]
        with self.profile.clock("storing"):
            self.ledger.finish(results, outputs)
        self.progress.finished(len(new), pruned=sum(result.state == "pruned" for result in new))
        self._drop(results)

    def _drop(self, results: Iterable[Result]) -> None:
        """Delete the checkpoints of trials that ended with a final result.

        Stopped trials are not final.
        """
        if self.checkpoints is not None:
            self.checkpoints.drop(result.number for result in results if result.state != "stopped")

    def tidy(self) -> None:
        """Delete the checkpoints of trials that have ended.

        If no trial waits for training, delete all checkpoints.
        """
        self._drop(self.ledger.results.values())
        if self.checkpoints is not None and not self.ledger.has_waiting():
            self.checkpoints.clear()

    def check_module(self, config: Config, *, first: bool = False) -> int:
        """Run the user's module with a configuration once, and return its number of parameters.

        Raises InputError if the module cannot be trained. With ``first=True``, outputs that are not
        finite also raise InputError.
        """
        builder = self.choice.module_class
        objective = self.trainer.objective
        if builder is None:
            return 0
        traits = traits_of(
            builder, config, self.data, columns=self.problem.columns_text, objective=objective
        )
        if traits.unstackable and self.options.machine.backend == "stacked":
            raise InputError(
                None,
                f"{option('backend', 'stacked')}: the members of {self.choice.name} cannot be "
                f"stacked: {traits.unstackable}",
                remedy=f"Change that, or pass {option('backend', 'auto')} to train them one by "
                "one.",
            )
        if first and traits.at_start:
            raise InputError(None, f"{option('model')}: {traits.at_start}")
        return traits.parameters

    def _check_rows(self, groups: Sequence[Population]) -> None:
        """Raise InputError for learning rates or minibatches that do not fit the user's module.

        Each factor on the learning rate must belong to a parameter of the module. A minibatch must
        have enough rows for the module.
        """
        known = known_traits(self.choice.module_class, self.data)
        smallest = min(self.data.train_lengths)
        for group in groups:
            traits = known[group.arguments]
            for config in group.configs:
                check_rates(self.choice.name, config, traits, usual=self.choice.recipe)
            rows = min(smallest, *(config["batch_size"] for config in group.configs))
            if rows < traits.least_rows:
                raise InputError(
                    None,
                    f"{option('model')}: {self.choice.name} cannot train on minibatches of one row "
                    f"(BatchNorm cannot either), and batch_size={rows} gives only such minibatches",
                    remedy=f"Use minibatches of {traits.least_rows} rows or more.",
                )

    def remarks_on(self, configs: Sequence[Config]) -> tuple[str, ...]:
        """Return the reasons why trials train one by one instead of together, one sentence each.

        The reasons come from the modules that gputune has inspected, and from the configurations.
        """
        if self.options.machine.backend == "loop":
            return ()
        traits = known_traits(self.choice.module_class, self.data).values()
        remarks = []
        for tried in traits:
            if tried.unstackable:
                way = "on merged rows" if tried.merges and not tried.slow else "one by one"
                remarks.append(
                    f"{self.choice.name} trains {way}, because its members cannot be stacked: "
                    f"{tried.unstackable}"
                )
        for reason in filter(None, map(loop_reason, configs)):
            remarks.append(f"trials train one by one, because {reason}")
        return tuple(dict.fromkeys(remarks))
