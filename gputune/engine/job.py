"""Train one chunk, a group of trials with one tensor shape, and return its scores.

The trials of a chunk train together on all folds. A chunk is the unit of work that a process, a
study or a cluster task receives.

A chunk trains to its last epoch, or to a rung (an epoch from which it continues later). If a chunk
does not fit into memory, gputune cuts the chunk into halves, which train one after the other. If a
single trial does not fit, the result is a ``Failure``.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine.backends.selection import failures, trains_as
from gputune.engine.backends.table import backend_named
from gputune.engine.checkpoint import Checkpoint, Checkpointing
from gputune.engine.mlp import StackedMLP
from gputune.engine.stop import Stop
from gputune.engine.train import AfterEpoch, BegunChunk, Spent, Trained, Training, train
from gputune.engine.waiting import WaitingChunk, WaitingState
from gputune.ground.device import empty_cache, free_of_gpu, is_out_of_memory
from gputune.ground.errors import TOO_BIG, is_strict, warn, words_unless_strict
from gputune.ground.types import Outputs, Precision, first_metric
from gputune.modules.construction import Builder, name_of
from gputune.modules.failures import StackedError
from gputune.modules.inspection import traits_of
from gputune.population.population import Network, Population, Shape
from gputune.population.state import Selection, State
from gputune.population.traits import Traits
from gputune.scoring.objective import Objective, make_objective

ProgressCallback = Callable[[int, np.ndarray], object]
"""A function to call with the count of newly trained trial-epochs and their scores.

The scores have the shape (C, epochs, F) for C trials and F folds.
"""


@dataclass(frozen=True, kw_only=True)
class Job(Training):
    """Settings that all trials of a search share, with methods that train one chunk (a group of
    trials)."""

    module_class: Builder | None = None
    # traits of the module, by ``Population.arguments``
    traits: Mapping[str, Traits] = field(default_factory=dict)
    objective: Objective | None = None  # training loss of a module; None: the loss of its task
    # says when training ends and no further chunk begins
    stop: Stop = field(default_factory=Stop)
    # how to keep the state of a long training; None: not at all
    checkpointing: Checkpointing | None = None
    # Whether a stopped chunk writes its own checkpoint. Otherwise the receiver of its outcome does.
    keep_stopped: bool = True
    # epochs without a better mean validation score after which a trial leaves its chunk
    patience: int | None = None
    # the trial number at each position in the search; () if no single trial can be ended
    numbers: tuple[int, ...] = ()
    each_epoch: bool = False  # whether every epoch is reported to a receiver that may end training
    precision: Precision = "full"

    def is_over(self) -> bool:
        return self.stop.is_over()

    def network(self, data: Dataset, chunk: Population) -> Network:
        """Return the model that computes all members of a chunk with stacked tensors, or one by
        one."""
        shape = Shape.of(data, self.precision)
        if self.module_class is None:
            kwargs: dict[str, Any] = {}
            if shape.regression and self.objective is not None:
                kwargs = {"loss": self.objective.loss, "loss_number": self.objective.number}
            return StackedMLP(chunk.kind, chunk.configs, shape, seed=self.seed, **kwargs)
        first = chunk.configs[0]
        traits = self.traits.get(chunk.arguments)
        # Known traits save a worker from trying the module again.
        traits = traits or traits_of(self.module_class, first, data, objective=self.objective)
        objective = self.objective or make_objective(None, None, None, data.task)
        name = trains_as(self.backend, chunk.kind, first, traits)
        if chunk.arguments in self.pool.one_by_one:
            name = "loop"
            reason = traits.unstackable or "training with stacked members failed"
            traits = replace(traits, unstackable=reason, unused=())
        return backend_named(name).module_class(
            self.module_class,
            chunk.configs,
            shape,
            seed=self.seed,
            traits=traits,
            objective=objective,
        )

    def run(
        self, data: Dataset, chunk: Population, progress: ProgressCallback | None = None
    ) -> "Outcome":
        """Train one chunk (a group of trials) and return the validation scores after each epoch.

        The chunk continues from its newest checkpoint.
        """
        begin = time.monotonic()
        begun = BegunChunk.of(chunk)
        latest = self._latest(begun)
        watch = _Watch(self, latest, progress, reported=begun.epoch)
        trained = train_chunk(self, data, latest, watch=watch)
        seconds = time.monotonic() - begin + latest.seconds
        outputs = trained.outputs_of(chunk.index)
        return Outcome(
            chunk.index,
            trained.curves,
            trained.epochs,
            seconds,
            begun=begun.epoch,
            spent=trained.spent,
            outputs=outputs,
            ended=watch.ended,
        )

    def _latest(self, begun: BegunChunk) -> BegunChunk:
        """Return a chunk in the state of its newest checkpoint.

        Another process, or a lost worker, may have written this checkpoint after the plan was made.
        """
        checkpoint = None
        if self.checkpointing is not None:
            checkpoint = self.checkpointing.newer(begun, begun.epoch)
        if checkpoint is None:
            return begun
        return replace(
            begun,
            state=checkpoint.state,
            alive=checkpoint.alive,
            before=checkpoint.curves,
            seconds=checkpoint.seconds,
        )


@dataclass(frozen=True)
class Outcome:
    """Result of training a chunk, a group of trials that train together.

    Args:
        index: Positions of its trials in the search.
        curves: Scores (C, epochs, F).
        epochs: Number of epochs that were trained.
        seconds: Training time.
        begun: The first ``begun`` of these epochs, which an earlier call has trained.
        spent: Parts of the training time and operations, if they are known.
        fault: Description of a problem that did no harm, or "".
        outputs: Stored validation outputs of trials. The keys are entries of ``index``.
        ended: Epochs after which a request ended a trial. The keys are entries of ``index``.
    """

    index: tuple[int, ...]
    curves: np.ndarray
    epochs: int
    seconds: float
    begun: int = field(default=0, kw_only=True)
    spent: Spent = field(default=Spent(), kw_only=True)
    fault: str = field(default="", kw_only=True)
    outputs: Mapping[int, Outputs] = field(default_factory=dict, kw_only=True)
    ended: Mapping[int, int] = field(default_factory=dict, kw_only=True)


def train_chunk(
    job: Job,
    data: Dataset,
    chunk: Population,
    progress: ProgressCallback | None = None,
    after_epoch: AfterEpoch | None = None,
    *,
    watch: "_Watch | None" = None,
) -> Trained:
    """Train one chunk (a group of trials) from the start, or continue from a checkpoint or rung.

    If the caller passes ``after_epoch``, only this callback decides when training ends, and gputune
    writes no checkpoint. Otherwise ``watch`` decides.
    """
    begun = BegunChunk.of(chunk)
    data = data.of(chunk.configs[0])
    after_epoch = after_epoch or watch or _Watch(job, begun, progress)
    if isinstance(begun.state, WaitingState) and begun.state.waiting.is_current:
        network = begun.state.waiting.chunk.network
    else:
        network = job.network(data, chunk)
    try:
        return train(network, data, begun, job, after_epoch)
    except StackedError as error:
        # A state of stacked members can continue only with stacked members.
        if begun.state is not None:
            raise
        if network.one_by_one:
            job.pool.one_by_one.add(chunk.arguments)
        elif is_strict():
            raise
        else:
            _train_one_by_one(job, chunk, error)
    return train(job.network(data, chunk), data, begun, job, after_epoch)


def _train_one_by_one(job: Job, chunk: Population, error: StackedError) -> None:
    """Make modules with the same arguments as this chunk's module train one by one from now on.

    gputune calls this function after training with stacked members has failed. A warning and a note
    in the pool give the reason.
    """
    cause = error.__cause__
    reason = words_unless_strict(cause) if isinstance(cause, Exception) else error.rule
    assert job.module_class is not None
    name = name_of(job.module_class)
    fault = f"{name} trains one by one, because training with stacked members failed: {reason}."
    job.pool.one_by_one.add(chunk.arguments)
    job.pool.faults[fault] = None
    warn(fault, RuntimeWarning)


@dataclass(frozen=True)
class RungOutcome(Outcome):
    """Result of training a group of trials up to a rung, an epoch from which the trials may
    continue.

    ``alive`` has the positions of the trials that can still train. After the last epoch of the
    search, it is empty. ``state`` has one row for each of these trials.
    """

    state: State
    alive: tuple[int, ...]


@dataclass(frozen=True)
class RungJob(Job):
    """Job that trains each chunk (a group of trials) up to a rung, the epoch ``epochs``. Schedules
    run over ``horizon`` epochs.

    If ``until`` is not empty, it has the rung of each trial, by the trial's position in the search.
    All trials of a chunk then have the same rung, which replaces ``epochs``.

    ``waiting`` has the groups of trials that may wait for the next rung in the tensors in which they
    have trained, each as positions in the search.
    """

    until: tuple[int, ...] = ()
    waiting: tuple[tuple[int, ...], ...] = ()

    def run(
        self, data: Dataset, chunk: Population, progress: ProgressCallback | None = None
    ) -> RungOutcome:
        """Train one group of trials (chunk) up to the rung. Returns the scores of only the epochs
        that this call trained."""
        begin = time.monotonic()
        start = BegunChunk.of(chunk).epoch
        rung = self.until[chunk.index[0]] if self.until else self.epochs
        trained = train_chunk(replace(self, epochs=rung), data, chunk, progress)
        if trained.epochs < self.horizon:
            alive = trained.alive
            state = self._state(trained, chunk)
        else:  # No trial trains again. A copy of its state would take as long as some minibatches.
            alive = ()
            state = State(trained.epochs, ())
        return RungOutcome(
            chunk.index,
            trained.curves[:, start : trained.epochs],
            trained.epochs - start,
            time.monotonic() - begin,
            state,
            alive,
            spent=trained.spent,
            outputs=trained.outputs_of(chunk.index),
        )

    def _state(self, trained: Trained, chunk: Population) -> State:
        """Return the state of the trials that can still train, which waits on the device if nothing
        else needs the memory there."""
        if chunk.index not in self.waiting or not trained.alive:
            return trained.state.cpu()
        # The memory of other chunks, for example for gradients, is needed for the next group.
        if len(self.waiting) > 1 and not trained.chunk.holds_only_state:
            return trained.state.cpu()
        spare: Sequence[Tensor] = ()
        begun = BegunChunk.of(chunk).state
        if isinstance(begun, WaitingState) and begun.begun is not None:
            spare = begun.begun[1]
        device = trained.flat.device
        # The main memory was enough for these trials before. A GPU's memory may be short, because a
        # recording takes more at times.
        waiting = WaitingChunk(trained.chunk, device.type == "cuda", spare=spare)
        state = WaitingState(waiting, range(len(trained.alive)))
        # The trials that continue are copied on the device, twice for a moment.
        if device.type == "cuda" and 2 * state.nbytes > free_of_gpu(device):
            return state.cpu()
        self.pool.remove(trained.chunk)
        return state


class _Watch:
    """Callback after each epoch. It reports the progress, writes a checkpoint if one is due, and
    decides whether training ends.

    The progress up to the epoch ``reported`` is known already.
    """

    def __init__(
        self,
        job: Job,
        chunk: BegunChunk,
        progress: ProgressCallback | None,
        *,
        reported: int | None = None,
    ) -> None:
        self.job = job
        self.chunk = chunk
        self.progress = progress
        self.begin = time.monotonic()
        self.reported = chunk.epoch if reported is None else reported
        self.ended: dict[int, int] = {}  # position in the search -> epochs
        self.due = math.inf
        if job.checkpointing is not None:
            self.due = self.begin + job.checkpointing.seconds

    def __call__(self, trained: Trained) -> bool | Selection:
        epoch = trained.epochs
        curves = trained.curves
        if self.progress is not None and epoch > self.reported:
            self.progress(len(curves), curves[:, epoch - 1 : epoch])
        self.reported = max(self.reported, epoch)  # a chunk may begin again, one by one
        is_over = self.job.is_over()
        checkpointing = self.job.checkpointing
        now = time.monotonic()
        is_due = now >= self.due or (is_over and self.job.keep_stopped)
        if checkpointing is not None and is_due and epoch < self.job.epochs and trained.alive:
            trials = tuple(checkpointing.numbers[i] for i in self.chunk.index)
            seconds = self.chunk.seconds + now - self.begin
            checkpoint = Checkpoint(
                trials, trained.alive, curves[:, :epoch], trained.state, seconds
            )
            self.due = time.monotonic() + checkpointing.keep(checkpoint, self.chunk.configs)
        if is_over or not trained.alive:
            return is_over
        stays = np.ones(len(trained.alive), dtype=bool)
        if self.job.patience is not None:
            means = first_metric(curves[list(trained.alive), :epoch], axes=3).mean(2)
            # Trials that improved recently enough stay.
            stays = stalled_epochs(means)[:, -1] < self.job.patience
        self._end_requested(trained, stays)
        return False if stays.all() else Selection.of_mask(stays)

    def _end_requested(self, trained: Trained, stays: np.ndarray) -> None:
        """Clear ``stays`` (C,) for each training trial that a request ends now."""
        requested = self.job.stop.ended_trials()
        if not requested or trained.epochs == self.job.epochs:
            return
        for place, position in enumerate(trained.alive):
            index = self.chunk.index[position]
            if self.job.numbers and self.job.numbers[index] in requested:
                stays[place] = False
                self.ended[index] = trained.epochs


def stalled_epochs(means: np.ndarray) -> np.ndarray:
    """Return the number of epochs since each trial's best mean score, after every epoch, (C,
    epochs).

    ``means`` (C, epochs) are the mean validation scores of C trials. If several means are equally
    good, the earliest counts.
    """
    epochs = np.arange(means.shape[1])
    best = np.maximum.accumulate(means, axis=1)
    is_better = np.pad(best[:, 1:] > best[:, :-1], ((0, 0), (1, 0)))
    stalled: np.ndarray = epochs - np.maximum.accumulate(np.where(is_better, epochs, 0), axis=1)
    return stalled


@dataclass(frozen=True)
class Failure:
    """A trial that gputune cannot train, and the reason.

    Args:
        index: Position of the trial in the search.
        reason: The reason, as a sentence.
        fits: Whether the trial fits into memory by itself.
    """

    index: tuple[int]
    reason: str
    fits: bool = True

    def error(self) -> Exception:
        """Return the exception that a caller raises if a failed trial is an error for the
        caller."""
        if self.fits:
            return RuntimeError(self.reason)
        return MemoryError(
            f"{self.reason}. This trial does not fit into memory, even if it trains alone. Make "
            "it smaller."
        )


def run_in_parts(
    job: Job, data: Dataset, chunk: Population, progress: ProgressCallback | None = None
) -> list[Outcome | Failure]:
    """Train a group of trials, in smaller groups if all of them together do not fit into memory.

    Returns an ``Outcome`` for each group, and a ``Failure`` for each trial that does not fit by
    itself. After a request to stop, no new group begins.
    """
    waiting = [chunk]
    done = list[Outcome | Failure]()
    n_reported = 0

    def report(trial_epochs: int, curves: np.ndarray) -> None:
        nonlocal n_reported
        n_reported += trial_epochs
        if progress is not None:
            progress(trial_epochs, curves)

    while waiting and not (done and job.is_over()):
        part = waiting.pop()
        trials = job.pool.trials_at_once(part)
        if trials < len(part.index):
            waiting += [part.part(trials, len(part.index)), part.part(0, trials)]
            continue
        n_reported = 0
        reason = ""
        try:
            outcome = job.run(data, part, report)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"{TOO_BIG}: {lines[0]}"
        if not reason:
            faults = list(job.pool.faults)
            # After the kernel or a recording has failed on a GPU, another backend than the chosen
            # one trains.
            if data.device.type == "cuda":
                faults = failures(job.backend) + faults
            done.append(replace(outcome, fault=" ".join(faults)))
            continue
        if progress is not None and n_reported:  # withdraw the reported progress
            progress(-n_reported, np.full((1, 1, 1), np.nan))
        # Memory can be freed only here, because the error and the frames that it holds are gone.
        gc.collect()
        empty_cache(data.device)
        job.pool.note_too_big(part)
        if len(part.index) == 1:
            done.append(Failure((part.index[0],), reason, fits=False))
        else:
            waiting.append(part)
    return done
