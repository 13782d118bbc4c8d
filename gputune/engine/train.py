"""The training loop over epochs for a group of trials that train together.

The group is called a chunk, and its trials have one tensor shape. A member is one trial on one
fold. gputune scores all members after every epoch. Shape letters: C configurations (trials), F
folds, M metrics, N values of one member.
"""

import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.engine.backend import torch_threads
from gputune.engine.backends.selection import make_chunk
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.engine.waiting import WaitingState
from gputune.ground.memory import keep_freed_memory
from gputune.ground.types import Config, Outputs, first_metric
from gputune.modules.failures import explain
from gputune.population.kinds import ModelKind, hidden_layers, is_module
from gputune.population.population import Network, Population
from gputune.population.state import Selection, State
from gputune.scoring.scoring import Scoring, shape_of_scores
from gputune.scoring.validation import BestOutputs, Validation


@dataclass(frozen=True)
class BegunChunk(Population):
    """A group of trials (chunk) that may already have trained for some epochs, with its training
    state.

    Args:
        state: State of only the trials ``alive``, in their order; None before the first epoch.
        alive: Positions in the chunk of the trials that still train; None: all.
        before: Curves (C, epochs, F) of the epochs before, if they are known. C counts all trials
            of the chunk, not only ``alive``.
        seconds: Time in seconds of the training before.
    """

    state: State | None = None
    alive: tuple[int, ...] | None = None
    before: np.ndarray | None = None
    seconds: float = 0.0

    @staticmethod
    def of(chunk: Population) -> "BegunChunk":
        """Convert a population of trials to a ``BegunChunk``. Trials without a state have not
        trained yet."""
        if isinstance(chunk, BegunChunk):
            return chunk
        return BegunChunk(chunk.kind, chunk.index, chunk.configs)

    @property
    def epoch(self) -> int:
        """Number of epochs that the trials have trained."""
        return 0 if self.state is None else self.state.epoch

    def on_host(self) -> "BegunChunk":
        """Return the same trials with their training state in main memory."""
        return replace(self, state=self.state and self.state.cpu())

    def part(self, start: int, stop: int) -> "BegunChunk":
        """Return the trials ``start`` to ``stop - 1`` as a separate group, with their training
        states."""
        alive = range(len(self.index)) if self.alive is None else self.alive
        rows = [row for row, c in enumerate(alive) if start <= c < stop]
        return replace(
            self,
            index=self.index[start:stop],
            configs=self.configs[start:stop],
            state=self.state and self.state.cpu().select(rows),
            alive=None if self.alive is None else tuple(alive[row] - start for row in rows),
            before=None if self.before is None else self.before[start:stop],
            seconds=self.seconds * (stop - start) / len(self.index),
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings that all groups of trials (chunks) of a training run share.

    Args:
        seed: Random seed.
        epochs: Number of epochs.
        horizon: Number of epochs that a schedule runs over.
        scoring: How members are scored; None: not at all.
        backend: The chosen backend. Trials that it does not support train in another way
            (``trains_as``).
        pool: Knowledge and memory that one chunk leaves to the next.
    """

    seed: int
    epochs: int
    horizon: int
    scoring: Scoring | None = None
    backend: str = "eager"
    pool: ChunkPool = field(default_factory=ChunkPool)


@dataclass(frozen=True)
class Spent:
    """The seconds and floating-point operations that a training run took.

    ``steps`` are the seconds of the training steps, and ``scores`` the seconds of scoring.
    ``operations`` counts the floating-point operations of the steps. It is NaN for a user's module,
    because its layers are unknown.
    """

    steps: float = 0.0
    scores: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Trained:
    """The results of a group of trials (chunk) after ``epochs`` epochs: scores, weights and times.

    Args:
        curves: Scores (C, epochs, F), or (C, epochs, F, M) with several metrics. They are NaN after
            the epoch in which a trial diverged.
        epochs: Number of epochs.
        alive: Positions in the chunk of the trials that can still train. ``member(fold, trial)``
            returns one of their members, and ``state`` has a copy of their state.
        network: The stacked model of these trials.
        chunk: The trials in their tensors. The next chunk may train in these tensors.
        spent: Time and operations of the training.
        best: The outputs that a scoring keeps.
    """

    curves: np.ndarray
    epochs: int
    alive: tuple[int, ...]
    network: Network
    chunk: Chunk
    spent: Spent = Spent()
    best: BestOutputs | None = None

    # Read only when needed: members that train one by one join their rows for each of these
    # tensors, which after every epoch took longer than a training step.
    @property
    def flat(self) -> Tensor:
        """The parameters and buffers of all members in one tensor."""
        return self.chunk.flat

    @property
    def scored(self) -> Tensor:
        """The values of ``flat`` that are scored and saved."""
        return self.chunk.scored

    @property
    def state(self) -> State:
        """Training state of the trials that can still train, from which a ``BegunChunk``
        continues."""
        steps = self.chunk.steps_taken
        moments = self.chunk.moments
        state = State.of(self.network, self.flat, moments, self.epochs, steps)
        # No row if all trials have ended: a chunk does not remove its last trials from the tensors.
        return state if self.alive else state.select([])

    def outputs_of(self, index: Sequence[int]) -> dict[int, Outputs]:
        """Return the stored outputs of trials on the validation rows, as a dict. A trial's key is
        its entry in ``index`` (C,)."""
        return {} if self.best is None else self.best.of_trials(index)

    def member(self, fold: int, trial: int) -> nn.Module:
        """Return the trained network of one trial on one fold, as a plain module on the CPU.
        ``trial`` is the trial's position before any trial diverged."""
        params = self.network.blocks.views(self.scored)
        return self.network.member(params, fold, self.alive.index(trial))


AfterEpoch = Callable[[Trained], bool | Selection]
"""A function to call after each epoch with the chunk itself, not a copy.

The function returns True to end the training. Or it returns the trials of ``alive`` that continue,
with the states and configurations from which they continue.
"""


@torch.no_grad()
def train(
    network: Network,
    data: Dataset,
    chunk: BegunChunk,
    training: Training,
    after_epoch: AfterEpoch | None = None,
) -> Trained:
    """Train a group of trials on all folds, and return the scores after each epoch.

    If the training has a scoring, and the first metric of a trial is not finite in any fold, the
    trial's training ends after that epoch. The trial's later scores are NaN, and it costs nothing
    from then on. A chunk that has begun continues up to the same ``epochs``. Its curves start with
    the known scores of the earlier epochs, or with NaN.
    """
    # Built-in models train in code that makes no tensors.
    allocates = is_module(chunk.kind) and data.device.type == "cpu"
    with keep_freed_memory() if allocates else nullcontext():
        return _train(network, data, chunk, training, after_epoch)


def _train(
    network: Network,
    data: Dataset,
    chunk: BegunChunk,
    training: Training,
    after_epoch: AfterEpoch | None,
) -> Trained:
    """Train a group of trials like ``train``, which decides how freed memory is kept."""
    alive = _begin(network, data, chunk, training)
    members = alive.chunk
    epoch = chunk.epoch
    scoring = training.scoring
    is_over = False
    scores_shape = shape_of_scores(scoring, data.n_splits)
    # (C, epochs, F), and (C, epochs, F, M) with several metrics.
    curves = np.full((len(chunk.configs), training.epochs, *scores_shape), np.nan)
    each_epoch = _operations_of(chunk, network.kind, data)
    spent = Spent()
    best = None
    if chunk.before is not None:
        curves[:, :epoch] = chunk.before
    if scoring is not None and scoring.kept_bytes:
        # Unknown scores of earlier epochs are NaN, which no later score exceeds: an earlier epoch
        # may be the best one, so no outputs of a later epoch are kept. All outputs are kept only if
        # the scores of all epochs are known, as in every search of ``tune``.
        means = first_metric(curves[:, :epoch], axes=3).mean(2)
        best = BestOutputs(scoring.kept_bytes, means.max(1, initial=-np.inf))

    def so_far() -> Trained:
        return Trained(
            curves,
            epoch,
            alive.trials,
            members.network,
            members,
            spent,
            best,
        )

    while epoch < training.epochs and alive.trials and not is_over:
        work = float(each_epoch[list(alive.trials)].sum())
        scores, spent_now = _train_epoch(members, data, epoch, scored=scoring is not None)
        spent += replace(spent_now, operations=work)
        epoch += 1
        if scores is not None:
            _keep_scores(alive, curves, epoch, scores, best)
        decision = after_epoch is not None and after_epoch(so_far())
        if isinstance(decision, Selection):
            alive.select(decision)
        else:
            is_over = decision
    members.release()
    training.pool.faults |= members.faults
    training.pool.add(members)
    return so_far()


class _Alive:
    """The trials of a chunk that still train, as positions in the original chunk (``trials``)."""

    def __init__(self, chunk: Chunk, trials: Sequence[int]) -> None:
        self.chunk = chunk
        self.trials = tuple(trials)

    def select(self, selection: Selection) -> None:
        """Let only the selected trials train on, each from the state that was selected for it."""
        self.trials = tuple(self.trials[position] for position in selection.trials)
        # A chunk does not remove its last trials from the tensors.
        if self.trials:
            slots = selection.trials if selection.slots is None else selection.slots
            self.chunk.select(slots, selection.configs)


def _begin(network: Network, data: Dataset, chunk: BegunChunk, training: Training) -> _Alive:
    """Return the trials that still train, in the state from which they continue."""
    trials = range(len(chunk.configs)) if chunk.alive is None else chunk.alive
    if isinstance(chunk.state, WaitingState) and chunk.state.waiting.is_current:
        return _Alive(chunk.state.continued([chunk.configs[i] for i in trials]), trials)
    members = make_chunk(
        training.backend,
        network,
        Validation(data, training.scoring),
        training.pool,
        seed=training.seed,
        horizon=training.horizon,
    )
    alive = _Alive(members, range(len(chunk.configs)))
    if chunk.alive is not None:
        alive.select(Selection(chunk.alive))
    if chunk.state is not None and alive.trials:
        alive.chunk.resume(chunk.state)
    return alive


def operations(config: Config, kind: ModelKind, data: Dataset) -> float:
    """Return the number of floating-point operations for training one trial for one epoch, in all
    folds.

    Only matrix products count. A product (rows, in) x (in, out) takes 2 * rows * in * out
    operations. Each layer has one forward product and two backward products, but the first layer
    has one backward product. The result is NaN for a user's module, because its layers are unknown.
    """
    if is_module(kind):
        return math.nan
    hidden = hidden_layers(config, kind)
    sizes = [data.n_features, *hidden, data.n_outputs]
    pairs = sum(3 * a * b for a, b in pairwise(sizes)) - sizes[0] * sizes[1]
    return float(2 * pairs * sum(data.train_lengths))


def _operations_of(chunk: Population, kind: ModelKind, data: Dataset) -> np.ndarray:
    """Return the number of floating-point operations of an epoch of each trial, (C,)."""
    by_layers: dict[tuple[int, ...], float] = {}
    counts = []
    for config in chunk.configs:
        layers = hidden_layers(config, kind)
        if layers not in by_layers:
            by_layers[layers] = operations(config, kind, data)
        counts.append(by_layers[layers])
    return np.array(counts)


def _train_epoch(
    chunk: Chunk, data: Dataset, epoch: int, *, scored: bool
) -> tuple[np.ndarray | None, Spent]:
    """Train one epoch, and return the scores and the seconds spent.

    The scores are None if ``scored`` is False.
    """
    begin = _time(data.device)
    with _row_errors(chunk, data, epoch):
        chunk.advance(epoch)
    trained = _time(data.device)
    with _row_errors(chunk, data, epoch + 1):
        scores = chunk.scores() if scored else None
    in_steps = _seconds(begin, trained)
    in_scores = _seconds(trained, _time(data.device))
    share = in_steps * chunk.scoring_share
    return scores, Spent(in_steps - share, in_scores + share)


def _time(device: torch.device) -> "float | torch.cuda.Event":
    """Return the current time on a device, to compute a duration from two times.

    For a GPU, the result is an event in the queue of its work, because the host runs ahead of the
    GPU.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Return the seconds between two times on a device. For a GPU, the times are events, and the
    function waits until the GPU has reached both."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert not isinstance(begin, float) and not isinstance(end, float)
    end.synchronize()
    # CUDA events measure milliseconds.
    return float(begin.elapsed_time(end)) / 1000


@contextmanager
def _row_errors(chunk: Chunk, data: Dataset, epoch: int) -> Iterator[None]:
    """Make an error inside the ``with`` block name the row of X that caused the error.

    ``epoch``, the number of finished epochs, is only for the message.
    """
    try:
        yield
    except Exception as error:
        explained = explain(error, chunk.network, chunk.flat, data, epoch)
        if explained is error:
            raise
        raise explained from error


def _keep_scores(
    alive: _Alive, curves: np.ndarray, epoch: int, scores: np.ndarray, best: BestOutputs | None
) -> None:
    """Write the scores after ``epoch`` epochs into ``curves``, and end the training of trials that
    diverged."""
    trials = list(alive.trials)
    curves[trials, epoch - 1] = scores
    firsts = first_metric(scores, axes=2)  # (C, F)
    if best is not None:
        # Only some megabytes: threads take longer to meet than to copy them.
        with torch_threads(1):
            best.take(epoch, trials, firsts.mean(1), alive.chunk.validation.outputs)
    alive.select(Selection.of_mask(np.isfinite(firsts).all(1)))
