"""The training of population based training: trials train to a comparison, and copy each other.

A lineage is one training run with a schedule of hyperparameters. At a comparison, a trial may end
its lineage and continue the lineage of another trial. Its learning curve then begins with the curve
of that trial.

A resumed search continues from the latest comparison that has all of its checkpoints.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np

from gputune.engine.checkpoint import Checkpoint, Checkpointing
from gputune.engine.plan import Plan
from gputune.ground.types import Config, Json, first_metric
from gputune.methods.exchanges import Exchange, ExchangeRule, exchanges, generator
from gputune.methods.paused import PausedTraining, RunningTrial
from gputune.population.kinds import ModelKind, hidden_layers, highest_dropout, is_module
from gputune.population.population import shape_of_tensors
from gputune.population.state import State
from gputune.spaces.config import MODULE_PREFIX
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.perturbation import movable_keys
from gputune.study.record import has_form
from gputune.study.rows import LINEAGE
from gputune.study.store import Candidate
from gputune.study.values import from_json, to_json
from gputune.tuning.context import Context

_OF_SHAPES = ("width", "depth", "activation", "optimizer", "numbers")
"""Hyperparameters on which the tensors of a trial depend, in addition to ``module__*``."""

_NOTE = {"epoch": int, "lineages": [LINEAGE]}
"""The form of the note in a checkpoint: the epoch of the latest comparison, and each lineage."""


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
        self.bits = np.random.PCG64(0)
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
        """Tell the user if no trial can copy another trial, or if some trials cannot."""
        n_by_shape = Counter(trial.architecture for trial in self.running)
        n_running = len(self.running)
        n_alone = list(n_by_shape.values()).count(1)
        # Without a fraction, no trial would copy one of many trials either.
        is_control = not self.method.n_exchanged(n_running + 2)
        if not n_alone or is_control:
            return
        if n_alone < n_running:
            trials = "1 trial has" if n_alone == 1 else f"{n_alone} trials have"
            self.context.progress.say(
                f"note: {trials} an architecture that no other trial has, and can neither copy nor "
                "be copied"
            )
            return
        reason = no_copy_reason([trial.first_config for trial in self.running])
        reason = reason or "each trial has a different architecture"
        self.context.progress.say(f"note: no trial copies another trial, because {reason}")

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
        rng = generator(seed, "values", epoch, change.number, self.bits)
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


def no_copy_reason(configs: Sequence[Config]) -> str:
    """Return the reason why none of some trials can copy another trial, as a clause, or ""."""
    if len(configs) == 1:
        return "the search has only one trial"
    shapes = set()
    values = defaultdict(set)
    for config in configs:
        parts = _parts_of_shape(config)
        for key, value in parts.items():
            values[key].add(value)
        shapes.add(tuple(parts.items()))
    if len(shapes) < len(configs):
        return ""
    names = ", ".join(key for key in sorted(values) if len(values[key]) > 1)
    return f"each trial has a different architecture ({names})"


def _parts_of_shape(config: Config) -> dict[str, str]:
    """Return the hyperparameters on which the tensors of a trial depend, as text, by key."""
    parts = {}
    for key, value in sorted(config.items()):
        if key in _OF_SHAPES or key.startswith(MODULE_PREFIX):
            parts[key] = repr(value)
        elif key in ("momentum", "ema"):
            parts[key] = "0" if value == 0 else "above 0"
        elif key == "clip_norm":
            parts[key] = "none" if value == math.inf else "some"
    return parts
