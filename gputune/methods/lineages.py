"""The training of population based training: trials train to a comparison, and copy each other.

A lineage is one training run with a schedule of hyperparameters. At a comparison, a trial may end
its lineage and continue the lineage of another trial. Its learning curve then begins with the curve
of that trial.

A resumed search continues from the latest comparison that has all of its checkpoints.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from gputune.engine.checkpoint import Checkpoint, Checkpointing
from gputune.engine.plan import Plan
from gputune.ground.seeding import stream_seed
from gputune.ground.text import count
from gputune.ground.types import Config, Json, first_metric
from gputune.methods.paused import PausedTraining, RunningTrial
from gputune.population.kinds import ModelKind, hidden_layers, highest_dropout, is_module
from gputune.population.population import shape_of_tensors
from gputune.population.state import State
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.perturbation import Perturbation, movable_keys
from gputune.study.record import has_form
from gputune.study.rows import LINEAGE
from gputune.study.store import Candidate
from gputune.study.values import from_json, to_json
from gputune.tuning.context import Context

_NOTE = {"epoch": int, "lineages": [LINEAGE]}
"""The form of the note in a checkpoint: the epoch of the latest comparison, and each lineage."""


class ExchangeRule(Protocol):
    """The options of population based training. See ``PopulationBased``."""

    @property
    def explore(self) -> bool: ...

    @property
    def intervals(self) -> tuple[int, ...]: ...

    @property
    def perturbation(self) -> Perturbation: ...

    def is_compared(self, subpopulation: int, epoch: int) -> bool: ...

    def stops(self, max_epochs: int) -> list[int]: ...

    def n_exchanged(self, n_trials: int) -> int: ...


@dataclass(frozen=True)
class Exchange:
    """A change of one trial at a comparison.

    Attributes:
        number: the trial number.
        weights: the trial number from which the weights and the optimizer's state come. It is equal
            to ``number`` if the trial keeps its own.
        values: the trial number from which the movable hyperparameters come.
        is_perturbed: True if these hyperparameters are then perturbed.
    """

    number: int
    weights: int
    values: int
    is_perturbed: bool


def train_population(
    context: Context, method: ExchangeRule, space: CheckedSpace, trials: Sequence[Candidate]
) -> None:
    """Train trials from comparison to comparison, where bad trials copy good trials.

    Trials that have ended in an earlier call are neither copied nor compared.
    """
    search = _PopulationTraining(context, method, space, trials)
    search.explain()
    search.run(search.train)


@dataclass(eq=False)
class _Lineage(RunningTrial):
    """A running trial and the history of its weights.

    Attributes:
        params: The hyperparameters that the space has, now.
        first_config: The configuration with which the trial began.
        schedule: The hyperparameters of the lineage from each epoch on: {"epoch": ..., "params":
            ...}, in order.
        path: The trials through which the weights have come: [epoch, trial number], in order.
        copies: The copies that this trial has made: [epoch, trial number of the source].
        architecture: A lookup key for its tensor shapes, which never change.
    """

    params: Config = field(default_factory=dict)
    first_config: Config = field(default_factory=dict)
    schedule: list[Json] = field(default_factory=list)
    path: list[list[int]] = field(default_factory=list)
    copies: list[list[int]] = field(default_factory=list)
    architecture: tuple[object, ...] = ()

    @property
    def history(self) -> Json:
        """The history of the trial as plain values."""
        return {"schedule": self.schedule, "lineage": self.path, "copies": self.copies}

    @property
    def detail(self) -> Json:
        """The history of the trial, or nothing if the trial trained as in random search."""
        return self.history if len(self.schedule) > 1 or self.copies else {}


class _PopulationTraining(PausedTraining[_Lineage]):
    """The running trials of population based training, and their saved states.

    ``compared_at`` is the epoch of the latest comparison, or 0.
    """

    divergence_is_final = False
    saves_each_chunk = False

    def __init__(
        self,
        context: Context,
        method: ExchangeRule,
        space: CheckedSpace,
        trials: Sequence[Candidate],
    ) -> None:
        self.method = method
        self.space = space
        self.compared_at = 0
        self.perturbation = method.perturbation
        if not is_module(context.choice.kind):
            self.perturbation = replace(self.perturbation, batch_size=True)
        # the latest plan, and the values on which it depends
        self.latest_plan: tuple[object, Plan] | None = None
        super().__init__(context, trials)

    def begin_trial(self, trial: Candidate, config: Config) -> _Lineage:
        first = {"epoch": 0, "params": trial.params}
        return _Lineage(
            trial.number,
            config,
            self.context.no_curve,
            params=trial.params,
            first_config=config,
            schedule=[first],
            path=[[0, trial.number]],
            architecture=architecture(config, self.context.choice.kind),
        )

    def explain(self) -> None:
        """Tell the user how many trials cannot copy another trial."""
        n_by_shape = Counter(trial.architecture for trial in self.running)
        n_running = len(self.running)
        n_alone = list(n_by_shape.values()).count(1)
        # Without a fraction, no trial would copy one of many trials either.
        if n_alone and self.method.n_exchanged(n_running + 2):
            self.context.progress.say(
                f"note: {n_alone} of {count(n_running, 'trial')} cannot copy or be copied, because "
                "no other trial has the same architecture"
            )

    def trainable(self) -> list[_Lineage]:
        """Return the running trials that have not diverged."""
        curves = [trial.curve for trial in self.running]
        if not all(map(len, curves)):
            return [trial for trial in self.running if not trial.has_diverged(len(trial.curve))]
        # All scores after the first NaN are NaN.
        latest = first_metric(np.stack([curve[-1] for curve in curves]), axes=2)
        is_lost = np.isnan(latest).any(1).tolist()
        return [trial for trial, lost in zip(self.running, is_lost) if not lost]

    def plan(self, trials: Sequence[_Lineage], epochs: int) -> Plan:
        """Return the plan for training trials, which is the latest plan if only rates have
        changed."""
        key: list[object] = [epochs]
        for trial in trials:
            config = trial.config
            loss = config.get("loss__label_smoothing")
            drops = highest_dropout(config) > 0
            key.append((trial.number, config["batch_size"], loss, drops))
        if self.latest_plan is None or self.latest_plan[0] != key:
            self.latest_plan = (key, super().plan(trials, epochs))
        plan = self.latest_plan[1]
        chunks = []
        for chunk in plan.chunks:
            configs = tuple(trials[i].config for i in chunk.index)
            chunks.append(replace(chunk, configs=configs))
        return replace(plan, chunks=tuple(chunks))

    def train(self) -> None:
        """Train the trials from comparison to comparison."""
        epochs = self.context.epochs
        stops = [*self.method.stops(epochs), epochs]
        stops = [stop for stop in stops if stop > self.compared_at]
        for stop in stops:
            # At least one chunk begins, even if the time is already over.
            if self.running and (stop == stops[0] or not self.context.is_over()):
                self._train_to(stop)
                if stop < epochs and not self.context.is_over():
                    self.compare(stop)

    def _train_to(self, stop: int) -> None:
        """Train the running trials from the latest comparison up to the epoch ``stop``."""
        trials = self.trainable()
        if trials:
            self.train_until(trials, {trial.number: stop for trial in trials})
        if self.context.is_over():
            return
        for trial in self.running:
            # Diverged trials do not train, but they may copy another trial.
            missing = stop - len(trial.curve)
            if missing:
                self.context.progress.skip(missing)
                lost = np.full((missing, *trial.curve.shape[1:]), np.nan)
                trial.curve = np.concatenate([trial.curve, lost])

    def compare(self, epoch: int) -> None:
        """Let bad trials copy good trials after an epoch, and perturb their hyperparameters."""
        numbers = [trial.number for trial in self.running]
        # (C, epochs)
        curves = first_metric(np.stack([trial.curve for trial in self.running]), axes=3).mean(2)
        means = dict(zip(numbers, curves[:, -1].tolist()))
        shapes = {trial.number: trial.architecture for trial in self.running}
        seed = self.context.options.search.random_state
        leader = self._leader(curves)
        changes = exchanges(self.method, epoch, means, shapes, seed, leader)
        # A source may change at the same comparison, so all sources are read first.
        by_number = {trial.number: trial for trial in self.running}
        before = dict(by_number)
        outputs = dict(self.outputs)
        states = {}
        sources = {change.weights for change in changes} | {change.values for change in changes}
        for change in changes:
            if change.number in sources:
                before[change.number] = copy(by_number[change.number])
            if change.weights != change.number:
                states[change.number] = self.states.look(change.weights)
        for change in changes:
            trial = by_number[change.number]
            weights = before[change.weights]
            if change.number in states:
                self._copy(trial, weights, states[change.number], epoch)
                self.outputs.pop(trial.number, None)
                if weights.number in outputs:
                    self.outputs[trial.number] = outputs[weights.number]
            params = self._changed_params(change, weights, before[change.values], epoch)
            trial.params = params
            trial.config = self.context.complete(params)
            if params != trial.schedule[-1]["params"]:
                trial.schedule = [*trial.schedule, {"epoch": epoch, "params": params}]
        self.compared_at = epoch
        if self.is_due(0.0):
            self.save()

    def _leader(self, curves: np.ndarray) -> int | None:
        """Return the number of the trial with the best score of all epochs, which is not replaced.

        ``curves`` (C, epochs) are the mean validation scores. Returns None if only the scores of
        the last epoch count, or if all trials have diverged. In a tie, the trial with the best
        latest score leads.
        """
        if self.context.options.training.epoch != "best":
            return None
        leader = None
        best = (-math.inf, -math.inf)
        for trial, peak, latest in zip(
            self.running, curves.max(1).tolist(), curves[:, -1].tolist()
        ):
            # The maximum with a NaN is NaN: the score of a trial that has diverged does not count.
            if (peak, latest) > best and math.isfinite(peak):
                leader = trial.number
                best = (peak, latest)
        return leader

    def _copy(self, trial: _Lineage, source: _Lineage, state: State, epoch: int) -> None:
        """Let a trial continue the training of another trial."""
        self.states.drop(trial.number)
        self.states.park(trial.number, state)
        trial.curve = source.curve
        trial.schedule = source.schedule
        trial.path = [*source.path, [epoch, trial.number]]
        trial.copies = [*trial.copies, [epoch, source.number]]

    def _changed_params(
        self, change: Exchange, weights: _Lineage, values: _Lineage, epoch: int
    ) -> Config:
        """Return the hyperparameters of a trial after a comparison."""
        params = dict(weights.params)
        if values is not weights:
            keys = movable_keys(params, self.space, batch_size=self.perturbation.batch_size)
            for key in keys:
                value = values.params.get(key, params[key])
                # A zero stays zero, except the dropout rate of a copy, see ``architecture``.
                if key == "dropout" or bool(value) == bool(params[key]):
                    params[key] = value
        if not change.is_perturbed:
            return params
        seed = self.context.options.search.random_state
        rng = generator(seed, "values", epoch, change.number)
        return self.perturbation.move(params, self.space, rng)

    def write(self, checkpointing: Checkpointing) -> None:
        """Write checkpoints of all running trials, which replace all earlier checkpoints."""
        groups: dict[object, list[_Lineage]] = defaultdict(list)
        for trial in self.running:
            groups[trial.architecture, len(trial.curve)].append(trial)
        if self._has_states():
            checkpoints = []
            configs = []
            for trials in groups.values():
                lineages = [trial.history for trial in trials]
                note = to_json({"epoch": self.compared_at, "lineages": lineages}, name="lineages")
                checkpoints.append(self.checkpoint(trials, note))
                configs.append([trial.first_config for trial in trials])
            checkpointing.keep_only(checkpoints, configs)

    def _has_states(self) -> bool:
        """Return whether every trial that can still train has a state."""
        numbers = set()
        for trial in self.trainable():
            if len(trial.curve) < self.context.epochs:
                numbers.add(trial.number)
        return numbers <= self.states.states.keys()

    def resume(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Continue all trials from the latest comparison that has a checkpoint of every trial."""
        by_epoch = defaultdict(list)
        for checkpoint in sorted(checkpoints, key=lambda checkpoint: checkpoint.state.epoch):
            note: Json = from_json(checkpoint.note) if checkpoint.note else {}
            if has_form(note, _NOTE) and len(note["lineages"]) == len(checkpoint.trials):
                by_epoch[note["epoch"]].append((checkpoint, note["lineages"]))
        running = {trial.number: trial for trial in self.running}
        for epoch in sorted(by_epoch, reverse=True):
            covered: set[int] = set()
            for checkpoint, _ in by_epoch[epoch]:
                covered.update(checkpoint.trials)
            if running.keys() <= covered:
                self.compared_at = epoch
                for checkpoint, lineages in by_epoch[epoch]:
                    for position, number in enumerate(checkpoint.trials):
                        if number in running:
                            trial = running[number]
                            trial.schedule = lineages[position]["schedule"]
                            trial.path = lineages[position]["lineage"]
                            trial.copies = lineages[position]["copies"]
                            trial.params = trial.schedule[-1]["params"]
                            trial.config = self.context.complete(trial.params)
                            self.restore(trial, checkpoint, position)
                return


def architecture(config: Config, kind: ModelKind) -> tuple[object, ...]:
    """Return a lookup key for the tensor shapes of a configuration before padding.

    Only trials with equal keys copy each other. Dropout needs no tensors, so trials with and without
    dropout have equal keys.
    """
    shape = shape_of_tensors({**config, "dropout": 0.0}, kind)
    return (*shape, hidden_layers(config, kind))


def exchanges(
    method: ExchangeRule,
    epoch: int,
    means: Mapping[int, float],
    shapes: Mapping[int, Hashable],
    seed: int,
    protected: int | None = None,
) -> list[Exchange]:
    """Return the changes of trials after an epoch, in order of trial number.

    All sources are the trials before the comparison. The random numbers depend only on the seed,
    the epoch and the trial number.

    Args:
        method: The options.
        epoch: The number of finished epochs.
        means: The mean validation score after this epoch, by trial number. NaN is the worst score.
        shapes: A key for the architecture of each trial, by trial number. Trials with equal keys
            can copy each other.
        seed: The random seed of the search.
        protected: The number of a trial that does not change, or None. If it is among the worst
            trials, the next worse trial changes instead.
    """
    comparison = _Comparison(method, epoch, means, shapes, seed, protected, method.intervals)
    changes = []
    for subpopulation in range(len(comparison.intervals)):
        if method.is_compared(subpopulation, epoch):
            changes += comparison.copies(subpopulation)
            changes += comparison.migrations(subpopulation)
    return sorted(changes, key=lambda change: change.number)


@dataclass(frozen=True)
class _Comparison:
    """The scores and architectures of all trials after an epoch. See ``exchanges``."""

    method: ExchangeRule
    epoch: int
    means: Mapping[int, float]
    shapes: Mapping[int, Hashable]
    seed: int
    protected: int | None
    intervals: tuple[int, ...]

    def copies(self, subpopulation: int) -> list[Exchange]:
        """Return the changes of the worst trials of a subpopulation, which copy its best trials."""
        ranking = self._ranking(subpopulation)
        n_copies = self.method.n_exchanged(len(ranking))
        explore = self.method.explore
        sources_by_shape = defaultdict(list)
        for number in ranking[:n_copies]:
            if math.isfinite(self.means[number]):
                sources_by_shape[self.shapes[number]].append(number)
        changes = []
        for number in self._replaceable(ranking, n_copies)[:n_copies]:
            sources = sources_by_shape[self.shapes[number]]
            if sources:
                draw = stream_seed(self.seed, "population", "source", self.epoch, number)
                source = sources[draw % len(sources)]
                changes.append(Exchange(number, source, source, explore))
            elif explore and math.isfinite(self.means[number]):
                changes.append(Exchange(number, number, number, True))
        return changes

    def migrations(self, subpopulation: int) -> list[Exchange]:
        """Return the changes of the trials just above the worst trials of a subpopulation.

        Each copies the best trial of the other subpopulations, if that trial is better. No two
        copy the same trial.
        """
        changes: list[Exchange] = []
        if len(self.intervals) == 1:
            return changes
        ranking = self._ranking(subpopulation)
        n_copies = self.method.n_exchanged(len(ranking))
        candidates = []
        for number in self._whole_ranking:
            if self._subpopulation(number) != subpopulation:
                candidates.append(number)
        # best first, so that the best trial of the group copies the best source
        for number in reversed(self._replaceable(ranking, n_copies)[n_copies : 2 * n_copies]):
            sources = [other for other in candidates if self._can_copy(number, other)]
            if not sources or not self._is_better(sources[0], number):
                continue
            source = sources[0]
            candidates.remove(source)
            values = source
            if self.intervals[self._subpopulation(source)] < self.intervals[subpopulation]:
                values = next(own for own in ranking if self._can_copy(number, own, itself=True))
            changes.append(Exchange(number, source, values, self.method.explore))
        return changes

    def _replaceable(self, ranking: Sequence[int], n_copies: int) -> list[int]:
        """Return the trials of a subpopulation that may be replaced, worst first.

        The best ``n_copies`` trials stay, because others copy them.
        """
        worst_first = list(reversed(ranking[n_copies:]))
        return [number for number in worst_first if number != self.protected]

    def _subpopulation(self, number: int) -> int:
        return number % len(self.intervals)

    @cached_property
    def _whole_ranking(self) -> list[int]:
        """The trials of all subpopulations, best first.

        In a tie, the trial with the lower number comes first.
        """
        return sorted(sorted(self.means), key=self._loss)

    def _ranking(self, subpopulation: int) -> list[int]:
        """Return the trials of a subpopulation, best first."""
        if len(self.intervals) == 1:
            return self._whole_ranking
        ranking = []
        for number in self._whole_ranking:
            if self._subpopulation(number) == subpopulation:
                ranking.append(number)
        return ranking

    def _loss(self, number: int) -> float:
        mean = self.means[number]
        return -mean if math.isfinite(mean) else math.inf

    def _is_better(self, number: int, other: int) -> bool:
        return self._loss(number) < self._loss(other)

    def _can_copy(self, number: int, source: int, *, itself: bool = False) -> bool:
        """Return whether a trial can copy another trial, or with ``itself`` also its own values."""
        if source == number:
            return itself
        return self.shapes[number] == self.shapes[source] and math.isfinite(self.means[source])


def generator(seed: int, purpose: str, epoch: int, number: int) -> np.random.RandomState:
    """Return the random generator of one trial at one comparison."""
    key = stream_seed(seed, "population", purpose, epoch, number)
    bits = np.random.PCG64(0)
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": key << 64 | key, "inc": key << 1 | 1},  # an increment is odd
        "has_uint32": 0,
        "uinteger": 0,
    }
    # The default generator of RandomState takes ten times as long to make.
    return np.random.RandomState(bits)
