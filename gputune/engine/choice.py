"""What "auto" is, by steps that are timed: the device, and how members of a module train fastest.

Modules and what nothing compiles go to a GPU. The built-in MLP goes where it is done first, by the
speeds of both, which are measured where they are not known: a step takes some time whatever trains,
and some more for each member, which two numbers of members tell. The solved logistic regression
stays on the CPU.

On a CPU a step of stacked members moves their activations through memory where those of one member
stay in a cache: wide convolutions lose by it what small layers gain. Which of these a module does
is found by trying.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.backend import (
    Findings,
    Speed,
    choose_backend,
    choose_device,
    device_name,
    keep_findings,
    read_findings,
    torch_threads,
    trains_as,
)
from gputune.engine.job import Job, train_chunk
from gputune.engine.members import MemberChunk
from gputune.engine.plan import cores
from gputune.engine.reuse import Fits
from gputune.errors import warn
from gputune.fallback import failure_in_words
from gputune.memory import synchronize
from gputune.modules.module import StackedModule
from gputune.modules.trace import TraceError
from gputune.native.library import NotBuiltError
from gputune.population.population import (
    ModelKind,
    Population,
    complete,
    hidden_widths,
    populations,
)
from gputune.scoring.scoring import Validation
from gputune.types import BY_MEMBER, Backend, BackendWord, Config

CPU = torch.device("cpu")

# seconds on the CPU, in which a GPU has hardly begun: to make a context and load libraries takes
# some
_SOON = 5.0


@dataclass(frozen=True)
class DeviceChoice:
    """A device, and why "auto" is not the GPU that there is; "" where it is, or where there is
    none."""

    device: torch.device
    why: str = ""


_SOLVED = DeviceChoice(
    CPU, "the logistic regression is solved in many small products, which wait for each other"
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be trained: complete configurations, on so many training ``rows`` of each fold,
    for ``epochs``.

    ``repeats`` is how often as much comes again, one after the other. ``held_by`` is the device of
    a tensor that was given, None for rows in main memory.
    """

    kind: ModelKind
    configs: Sequence[Config]
    rows: Sequence[int]
    n_features: int
    n_outputs: int
    epochs: int
    repeats: float = 1.0
    solved: bool = False
    differentiated: bool = False
    backend: BackendWord = "auto"
    dtype: torch.dtype = torch.float32
    held_by: torch.device | None = None

    def seconds(self, speed: Speed, *, alone: bool) -> float:
        """Estimate how long it takes at a speed; ``alone`` where every member takes its own
        steps."""
        rows = max(self.rows)
        seconds = 0.0
        for group in populations(
            self.configs, self.kind, rows=rows, own_steps=lambda config: alone
        ):
            steps = [
                sum(-(-n // min(config["batch_size"], n)) for n in self.rows)
                for config in group.configs
            ]
            work = (
                work_of_a_step(c, self.n_features, self.n_outputs, rows, self.kind)
                for c in group.configs
            )
            seconds += speed.member * sum(n * each for n, each in zip(steps, work))
            seconds += speed.step * max(steps) / len(self.rows)
        return self.repeats * self.epochs * seconds


def device_for(word: str, work: Work) -> DeviceChoice:
    """Return the device of "auto", "cpu", "cuda" or "cuda:1"; InputError where there is none."""
    if word != "auto":
        return DeviceChoice(choose_device(word))
    if work.held_by is not None and work.held_by.type != "cpu":
        return DeviceChoice(work.held_by)
    gpu = choose_device("auto")
    if gpu == CPU or work.backend == "compiled":
        return DeviceChoice(CPU)
    if work.solved:
        return _SOLVED
    if work.kind == "module" or work.differentiated or work.backend != "auto":
        return DeviceChoice(gpu)
    backend, _ = choose_backend("auto", CPU, work.dtype)
    compiles = all(trains_as(backend, work.kind, config) == "compiled" for config in work.configs)
    return _choice_by_speed(gpu, work) if compiles else DeviceChoice(gpu)


def device_for_solver(word: str) -> DeviceChoice:
    """Return the device on which the logistic regression is solved, whose X is in main memory."""
    return _SOLVED if word == "auto" else DeviceChoice(choose_device(word))


def _choice_by_speed(gpu: torch.device, work: Work) -> DeviceChoice:
    backend, _ = choose_backend("auto", gpu, work.dtype)
    if why := read_findings(gpu).why_not(backend):
        return DeviceChoice(CPU, why)
    try:
        here = work.seconds(_speed(CPU, "compiled"), alone=True)
    except Exception as error:
        reason = failure_in_words(error)
        warn(
            f"Timing compiled code on the CPU failed, so that the GPU trains: {reason}",
            RuntimeWarning,
        )
        return DeviceChoice(gpu)
    if here < _SOON:
        return DeviceChoice(CPU, f"compiled code takes about {here:.1f} s on the CPU")
    try:
        there = work.seconds(_speed(gpu, backend), alone=backend in BY_MEMBER)
    except Exception as error:
        return DeviceChoice(CPU, f"timing {device_name(gpu)} failed: {failure_in_words(error)}")
    why = (
        f"compiled code takes about {here:.0f} s on the CPU, {device_name(gpu)} about {there:.0f} s"
    )
    return DeviceChoice(gpu) if there < here else DeviceChoice(CPU, why)


def _speed(device: torch.device, backend: Backend) -> Speed:
    """Return a speed that is known, or measure it and keep it."""
    known = read_findings(device).speeds.get(backend)
    if known is None:
        known = measure_speed(device, backend)
        keep_findings(device, Findings(None, {backend: known}))
    return known


FOLDS = 5
FEATURES = 64
CLASSES = 10
WIDTH = 64
BATCH = 32
FEW = 4
MANY = {"cpu": 40, "cuda": 200}
"""Trials, each of which has a member in every fold."""

# 16 steps an epoch; what is made on first use, and the recording, is in the first two
_ROWS = 640
_EPOCHS = 6
_LONG = 10**6  # epochs of a horizon over which a recording pays, as it will in the search


def measure_speed(device: torch.device, backend: Backend) -> Speed:
    """Train few and many trials for some epochs, in seconds, and return the seconds of a step."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (_ROWS,), generator=generator).to(device)
    positions = torch.arange(_ROWS, device=device)
    nothing = torch.zeros(FOLDS, dtype=torch.float64, device=device)
    data = Dataset(
        inputs=(torch.randn(1, _ROWS, FEATURES, generator=generator).to(device),),
        copies=(0,) * FOLDS,
        y=y,
        weights=None,
        folds=tuple(
            Fold(positions[positions % FOLDS != f], positions[positions % FOLDS == f])
            for f in range(FOLDS)
        ),
        present=None,
        center=nothing,
        scale=nothing + 1,
        n_outputs=CLASSES,
        task="multiclass",
        target=y,
    )
    job = Job(seed=0, epochs=_EPOCHS, horizon=_LONG, backend=backend)
    config = {"width": WIDTH, "batch_size": BATCH}

    def seconds_of_a_step(trials: int) -> float:
        rates = np.geomspace(1e-4, 1e-2, trials).tolist()
        configs = tuple(
            complete({"lr": lr, **config}, optimizer="adamw", schedule="constant") for lr in rates
        )
        with torch_threads(cores() if backend == "compiled" else 1):
            seconds = _fastest_epoch(
                job, data, Population("mlp", tuple(range(trials)), configs), time.perf_counter
            )
        return seconds / math.ceil(max(len(fold.train) for fold in data.folds) / BATCH)

    few = seconds_of_a_step(FEW)
    most = seconds_of_a_step(many := MANY[device.type])
    member = max(0.0, most - few) / (FOLDS * (many - FEW))
    return Speed(max(0.0, few - FOLDS * FEW * member), member)


def work_of_a_step(
    config: Config, n_features: int, n_outputs: int, rows: int, kind: ModelKind
) -> float:
    """Return what one step of a member costs, as a multiple of those that are timed here.

    Both of its parts go with the number of parameters: the update, once, and the products, for each
    row. One row costs a tenth of the update, in compiled code on an EPYC core.
    """

    def parameters(*sizes: int) -> int:
        return sum((a + 1) * b for a, b in pairwise(sizes))

    hidden = hidden_widths(config) if kind == "mlp" else ()
    batch = min(int(config["batch_size"]), rows)
    timed = parameters(FEATURES, WIDTH, WIDTH, CLASSES) * (10 + BATCH)
    return float(parameters(n_features, *hidden, n_outputs)) * (10 + batch) / timed


# of one shape, which is recorded in the first of the epochs
_STEPS = 3
_TRIED_EPOCHS = 4
_WORTH_SECONDS = 3.0  # of all members one by one: less is trained before it could be told
_CODE_SECONDS = 3.0  # of all members the faster way: from there one of building code is repaid
_TRIALS = 4
_TIMED_NUMBERS = 1 << 22  # of the parameters of all members that are timed in compiled code
_MARGIN = 1.1  # a difference below this is noise
_PATIENCE_SECONDS = 0.2  # after which two epochs must be enough


class _Enough(Exception):
    """The time of a step is known well enough."""


def fastest_way(
    job: Job, data: Dataset, group: Population, *, member_steps: float
) -> tuple[str, float]:
    """Return by how much trials of one shape train faster one by one, in words, "" where they do
    not, or hardly; and by how many seconds a member's step is faster in compiled code, 0.0 where it
    is not.

    ``member_steps`` is how many steps all members of a search take that train as these do.
    """
    data = data.of(group.configs[0])
    rows = _STEPS * group.configs[0]["batch_size"]
    few = replace(data, folds=tuple(Fold(fold.train[:rows], fold.valid) for fold in data.folds))
    loop = _try_way(
        "training one by one", job, lambda: _seconds(job, few, group.part(0, 1), "loop")
    )
    alone = loop.seconds
    if alone * member_steps < _WORTH_SECONDS:
        return "", 0.0
    several = group.part(0, min(_TRIALS, len(group.index)))
    together = _try_way("training stacked", job, lambda: _seconds(job, few, several, job.backend))
    stacked = together.seconds
    if loop.error is not None and together.error is not None:
        raise loop.error  # of the module itself, which no backend can train
    known = min(alone, stacked)
    if known * member_steps > _CODE_SECONDS:
        coded = _try_way("compiled code", job, lambda: _compiled_seconds(job, data, group)).seconds
        if _MARGIN * coded < known:
            return "", known - coded
        job.fits.drop_timed(group.configs)
    if together.error is not None:
        return together.sentence, 0.0
    if stacked < _MARGIN * alone:
        return "", 0.0
    slow = (
        f"a step of a member takes {1e3 * alone:.3g} ms so, and {1e3 * stacked:.3g} ms with its "
        "members stacked"
    )
    return slow, 0.0


@dataclass(frozen=True)
class _Tried:
    """Seconds of a step of one member; infinity for a way that failed, with its error and the
    plan's sentence."""

    seconds: float
    error: Exception | None = None
    sentence: str = ""


def _try_way(name: str, job: Job, seconds: Callable[[], float]) -> _Tried:
    """Time a way to train. If it fails, the search goes on without it, and ``Fits.failures`` says
    so to the plan."""
    try:
        return _Tried(seconds())
    except Exception as error:
        sentence = f"{name} failed: {failure_in_words(error)}"
        job.fits.failures[sentence] = None
        return _Tried(math.inf, error, sentence)


def _compiled_seconds(job: Job, data: Dataset, group: Population) -> float:
    """Return the seconds of one step of one member in compiled code, which is built here; infinity
    where none is.

    The chunk that is timed is that of all trials, unless they are large, and trains afterwards.
    """
    network = job.network(data, group)
    chunk = group
    if network.blocks.size > _TIMED_NUMBERS:
        chunk = group.part(0, _TRIALS)
        network = job.network(data, chunk)
    if trains_as(job.backend, chunk.kind, chunk.configs[0]) != "graph" or not isinstance(
        network, StackedModule
    ):
        return math.inf
    try:
        with torch_threads(1), torch.no_grad():
            timed = MemberChunk(
                network, Validation(data, job.scoring), seed=job.seed, horizon=job.horizon
            )
            job.fits.keep_timed(timed)
            return timed.seconds_of_a_step()
    except (TraceError, NotBuiltError) as error:
        job.fits.failures[f"not in compiled code: {error}"] = None
        return math.inf


def _seconds(job: Job, data: Dataset, chunk: Population, backend: Backend) -> float:
    """Return the seconds of one step of one member, once what is made in the first steps is
    there."""
    short = replace(
        job, epochs=_TRIED_EPOCHS, horizon=_LONG, scoring=None, backend=backend, fits=Fits()
    )
    short = replace(short, checkpointing=None)
    with torch_threads(1):  # whose time is counted, whatever else the machine does
        seconds = _fastest_epoch(short, data, chunk, time.process_time, patience=_PATIENCE_SECONDS)
    size = int(chunk.configs[0]["batch_size"])
    return seconds / (sum(-(-len(fold.train) // size) for fold in data.folds) * len(chunk.index))


def _fastest_epoch(
    job: Job,
    data: Dataset,
    chunk: Population,
    clock: Callable[[], float],
    patience: float = math.inf,
) -> float:
    """Return the seconds of the fastest epoch after the first two; of the second where there are no
    more.

    After ``patience`` seconds two epochs are enough. 0.0 where training is over before there are
    two.
    """
    times = list[float]()
    begun = time.perf_counter()

    def note(_trials: int, _scores: np.ndarray) -> None:
        synchronize(data.device)
        times.append(clock())
        if len(times) > 1 and time.perf_counter() - begun > patience:
            raise _Enough

    with suppress(_Enough):
        train_chunk(job, data, chunk, note)
    between = [b - a for a, b in pairwise(times)]
    return min(between[1:] or between, default=0.0)
