"""Resolve "auto": choose the device and the fastest backend for a module, by timing training steps.

A member is one trial on one fold. A GPU trains user modules, and models for which there is no
compiled code. The built-in MLP trains on the device that finishes first, according to the speeds of
both devices. Unknown speeds are measured. A step takes a fixed time plus a time for each member, so
timing two member counts gives both. The logistic regression that Newton steps solve stays on the
CPU.

On a CPU, a step of stacked members moves their activations through memory, but the activations of
one member stay in a cache. Therefore stacking makes wide convolutions slower, and small layers
faster. A short timing of both ways shows which one is faster for a module.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch

from gputune.data.dataset import Dataset, Fold
from gputune.engine.backend import (
    Findings,
    Speed,
    choose_device,
    device_name,
    keep_findings,
    read_findings,
    torch_threads,
)
from gputune.engine.backends.base import TrialWork
from gputune.engine.backends.selection import choose_backend, refusals, trains_as
from gputune.engine.backends.table import backend_named
from gputune.engine.job import Job, train_chunk
from gputune.engine.members import MemberChunk
from gputune.engine.plan import cores, repeats_frozen_layers
from gputune.engine.reuse import ChunkPool
from gputune.ground.device import CPU, synchronize
from gputune.ground.errors import warn, words_unless_strict
from gputune.ground.types import BackendWord, Config, Say
from gputune.modules.module import StackedModule
from gputune.modules.trace import TraceError
from gputune.native.library import NotBuiltError
from gputune.population.kinds import ModelKind, hidden_layers, is_module
from gputune.population.population import Population, complete, populations
from gputune.population.traits import FastestWay
from gputune.scoring.validation import Validation

# Seconds on the CPU. A GPU needs some of this time only to make a context and load libraries.
_SOON = 5.0


@dataclass(frozen=True)
class DeviceChoice:
    """A device, and the reason why "auto" did not choose the GPU of the machine.

    The reason is "" if the GPU was chosen, or if the machine has no GPU.
    """

    device: torch.device
    why: str = ""


_SOLVED = DeviceChoice(
    CPU, "the logistic regression needs many small matrix products, which run one after another"
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The training work of a search, from which gputune estimates the training time on a device.

    Complete configurations train for ``epochs`` epochs, with ``rows`` training rows in each fold.
    This is repeated ``repeats`` times in a row. ``held_by`` is the device of a tensor that the user
    passed, or None if the rows are in main memory.
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

    def seconds(self, speed: Speed, *, by_member: bool) -> float:
        """Estimate the seconds that this training work takes with a backend of the given speed.

        If ``by_member`` is True, the backend trains members one by one instead of stacked.
        """
        rows = max(self.rows)
        seconds = 0.0
        for group in populations(
            self.configs, self.kind, rows=rows, own_steps=lambda config: by_member
        ):
            # Steps of an epoch in all folds, for each trial; the last minibatch of a fold may be
            # short.
            steps = [
                sum(-(-n // min(config["batch_size"], n)) for n in self.rows)
                for config in group.configs
            ]
            costs = (
                work_of_a_step(config, self.n_features, self.n_outputs, rows, self.kind)
                for config in group.configs
            )
            seconds += speed.member * sum(n * cost for n, cost in zip(steps, costs))
            # The fixed time of a step counts once for all trials and folds of a group:
            # the trial with the most steps decides.
            seconds += speed.step * max(steps) / len(self.rows)
        return self.repeats * self.epochs * seconds


def device_for(word: str, work: Workload) -> DeviceChoice:
    """Return the device for the user's choice, such as "auto", "cpu", "cuda" or "cuda:1". Raises
    InputError if this machine has no such device."""
    if word != "auto":
        return DeviceChoice(choose_device(word))
    if work.held_by is not None and work.held_by.type != "cpu":
        return DeviceChoice(work.held_by)
    gpu = choose_device("auto")
    if gpu == CPU or work.backend == "compiled":
        return DeviceChoice(CPU)
    if work.solved:
        return _SOLVED
    if is_module(work.kind) or work.differentiated or work.backend != "auto":
        return DeviceChoice(gpu)
    backend = choose_backend("auto", CPU, work.dtype).name
    compiles = all(trains_as(backend, work.kind, config) == "compiled" for config in work.configs)
    return _choice_by_speed(gpu, work) if compiles else DeviceChoice(gpu)


def device_for_solver(word: str) -> DeviceChoice:
    """Return the device that fits the logistic regression if X is in main memory: the CPU if
    ``word`` is "auto"."""
    return _SOLVED if word == "auto" else DeviceChoice(choose_device(word))


def _choice_by_speed(gpu: torch.device, work: Workload) -> DeviceChoice:
    """Return the device that trains the built-in MLP in less time: the CPU or a GPU."""
    backend = choose_backend("auto", gpu, work.dtype).name
    if reason := read_findings(gpu).why_not(backend):
        return DeviceChoice(CPU, reason)
    try:
        cpu_seconds = work.seconds(_speed(CPU, "compiled"), by_member=True)
    except Exception as error:
        reason = words_unless_strict(error)
        warn(f"Timing compiled code on the CPU failed, so the GPU trains: {reason}", RuntimeWarning)
        return DeviceChoice(gpu)
    if cpu_seconds < _SOON:
        return DeviceChoice(CPU, f"compiled code takes about {cpu_seconds:.1f} s on the CPU")
    try:
        by_member = backend_named(backend).is_by_member
        gpu_seconds = work.seconds(_speed(gpu, backend), by_member=by_member)
    except Exception as error:
        return DeviceChoice(CPU, f"timing {device_name(gpu)} failed: {words_unless_strict(error)}")
    if gpu_seconds < cpu_seconds:
        return DeviceChoice(gpu)
    return DeviceChoice(
        CPU,
        f"compiled code takes about {cpu_seconds:.0f} s on the CPU, {device_name(gpu)} about "
        f"{gpu_seconds:.0f} s",
    )


def _speed(device: torch.device, backend: str) -> Speed:
    """Return the speed of a backend from the cache, or measure the speed and store it there."""
    speed = read_findings(device).speeds.get(backend)
    if speed is None:
        speed = measure_speed(device, backend)
        keep_findings(device, Findings(None, {backend: speed}))
    return speed


# The problem that is timed.
FOLDS = 5
FEATURES = 64
CLASSES = 10
WIDTH = 64
BATCH = 32
FEW = 4
MANY = {"cpu": 40, "cuda": 200}
"""The largest number of trials that train on each type of device. A trial trains one network per
fold."""

# 640 rows make 16 steps an epoch. First-use work and the recording fall into the first two epochs.
_ROWS = 640
_EPOCHS = 6
# A slow device trains fewer trials than ``MANY``, so that an epoch takes about 4 seconds.
_FEWEST_EPOCHS = 3
_LONGEST_EPOCH = 4.0
_LONG = 10**6  # epochs of a horizon over which a recording pays off, as in the search


def measure_speed(device: torch.device, backend: str) -> Speed:
    """Measure the speed of a backend, by training a few trials and many trials for some epochs."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (_ROWS,), generator=generator).to(device)
    positions = torch.arange(_ROWS, device=device)
    zeros = torch.zeros(FOLDS, dtype=torch.float64, device=device)
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
        center=zeros,
        scale=zeros + 1,
        n_outputs=CLASSES,
        task="multiclass",
        target=y,
    )
    config = {"width": WIDTH, "batch_size": BATCH}

    def seconds_of_an_epoch(trials: int, epochs: int) -> float:
        rates = np.geomspace(1e-4, 1e-2, trials).tolist()
        configs = tuple(
            complete({"lr": lr, **config}, optimizer="adamw", schedule="constant") for lr in rates
        )
        job = Job(seed=0, epochs=epochs, horizon=_LONG, backend=backend)
        with torch_threads(cores() if backend_named(backend).shares_threads else 1):
            return _fastest_epoch(
                job, data, Population("mlp", tuple(range(trials)), configs), time.perf_counter
            )

    steps = math.ceil(max(data.train_lengths) / BATCH)
    few_epoch = seconds_of_an_epoch(FEW, _EPOCHS)
    many = MANY[device.type]
    epochs = _EPOCHS
    if few_epoch * many > _LONGEST_EPOCH * FEW:  # a slow device
        many = max(2 * FEW, int(_LONGEST_EPOCH / few_epoch * FEW))
        epochs = _FEWEST_EPOCHS
    few_seconds = few_epoch / steps
    many_seconds = seconds_of_an_epoch(many, epochs) / steps
    # Two measurements give both unknowns of: seconds = step + member * (number of members).
    member = max(0.0, many_seconds - few_seconds) / (FOLDS * (many - FEW))
    return Speed(max(0.0, few_seconds - FOLDS * FEW * member), member)


def work_of_a_step(
    config: Config, n_features: int, n_outputs: int, rows: int, kind: ModelKind
) -> float:
    """Return the cost of one training step of one member, relative to a step of the timed networks.

    A member is one trial on one fold. The cost is proportional to the number of parameters. It is
    the cost of one update, plus the cost of the matrix products for each row. The products of one
    row cost a tenth of the update (compiled code, one EPYC core).
    """

    def parameters(*sizes: int) -> int:
        return sum((a + 1) * b for a, b in pairwise(sizes))

    hidden = hidden_layers(config, kind)
    batch = min(int(config["batch_size"]), rows)
    timed = parameters(FEATURES, WIDTH, WIDTH, CLASSES) * (10 + BATCH)
    return float(parameters(n_features, *hidden, n_outputs)) * (10 + batch) / timed


_TRIED_EPOCHS = 4
_TIMED_STEPS = 3  # of a fold in an epoch, all of one shape; they are recorded in the first epoch
# Seconds of all members one by one. A shorter training ends before the timing could help.
WORTH_SECONDS = 3.0
# The estimated share of the faster way's time that compiled code needs at most. Compiled code of 12
# common modules needed 0.09 to 0.5 of the time of recorded steps.
CODED_SHARE = 0.5
# Seconds to trace a module and write its C code, before the seconds of the build are known.
WRITING_SECONDS = 0.3
_TRIALS = 4
MARGIN = 1.1  # a smaller ratio is noise
# Compiled code also trains modules that are like one for which it was faster by this ratio.
_CLEARLY = 1.5
_LIKE = 4  # the largest ratio of the numbers of parameters of such modules
_PATIENCE_SECONDS = 0.2  # after this time two epochs must be enough


class _Enough(Exception):
    """Raised to end a timing run early, when the measured time of a training step is accurate
    enough."""


class NotWorthItError(Exception):
    """Raised before the build of compiled code that would take longer than it saves."""


_TOO_SHORT = "the training is too short for compiled code to pay off"
_REPEATS = "compiled code computes the frozen layers again for each trial"


class TimedModule(NamedTuple):
    """The result of a timing, and the number of trained parameters of the timed module."""

    parameters: int
    way: FastestWay


def fastest_way(
    job: Job,
    data: Dataset,
    group: Population,
    *,
    member_steps: float,
    earlier: Sequence[TimedModule] = (),
    tell: Say | None = None,
) -> FastestWay:
    """Time three ways to train trials of one tensor shape: one by one, stacked, and in compiled
    code.

    If compiled code was clearly the fastest for an earlier module of about the same size, nothing is
    timed.

    Args:
        member_steps: Total number of steps of all members of the search that train like this group.
        earlier: The results for other arguments of the same module.
        tell: A function to call with a description before each timing.
    """
    tell = tell or (lambda _: None)
    data = data.of(group.configs[0])
    traits = job.traits.get(group.arguments)
    repeats = repeats_frozen_layers(traits, data)
    if repeats and traits is not None and not traits.convolves:
        # A stacked step of such modules took 0.9 to 1.1 times the time of a loop's step.
        return FastestWay(uncoded=_REPEATS)
    for parameters, way in earlier:
        ratio = parameters / max(1, traits.parameters if traits else 0)
        is_clear = way.gain >= (_CLEARLY - 1) * way.seconds.get("compiled", math.inf)
        if is_clear and 1 / _LIKE <= ratio <= _LIKE:
            return way
    short_data = _few_steps(data, group)
    tell("one by one")
    one = group.part(0, 1)
    loop = _try("training one by one", job, lambda: _seconds(job, short_data, one, "loop"))
    seconds = {"loop": loop.seconds}
    if loop.seconds * member_steps < WORTH_SECONDS:
        return FastestWay(uncoded=_TOO_SHORT, seconds=seconds)
    name = trains_as("recorded", group.kind, group.configs[0], traits)  # or "eager" or "merged"
    tell(name)
    timed = group.part(0, min(_TRIALS, len(group.index)))
    stacked = _try("training stacked", job, lambda: _seconds(job, short_data, timed, name))
    seconds[name] = stacked.seconds
    if loop.error is not None and stacked.error is not None:
        raise loop.error  # of the module itself, which no backend can train
    fastest = min(loop.seconds, stacked.seconds)
    uncoded = _REPEATS if repeats else _TOO_SHORT
    # CPU seconds that compiled steps save. (Short searches train recorded steps on one core.)
    saved = (1 - CODED_SHARE) * fastest * member_steps
    if not repeats and saved > WRITING_SECONDS:
        tell("compiled")
        code = _try("compiled code", job, lambda: _compiled_seconds(job, data, timed, saved))
        coded = seconds["compiled"] = code.seconds
        if MARGIN * coded < fastest:
            return FastestWay(gain=fastest - coded, seconds=seconds)
        uncoded = code.sentence or (
            f"a training step of one trial on one fold takes {1e3 * coded:.3g} ms in compiled "
            f"code, and {1e3 * fastest:.3g} ms without"
        )
        if uncoded in job.pool.failures:  # the plan also has the sentence about a failure
            uncoded = "compiled code failed"
    if stacked.error is not None:
        return FastestWay(stacked.sentence, seconds=seconds)
    if stacked.seconds < MARGIN * loop.seconds:
        return FastestWay(uncoded=uncoded, seconds=seconds)
    slow = (
        f"a training step of one trial on one fold takes {1e3 * loop.seconds:.3g} ms one by one, "
        f"and {1e3 * stacked.seconds:.3g} ms {backend_named(name).in_words}"
    )
    return FastestWay(slow, seconds=seconds)


def _few_steps(data: Dataset, group: Population) -> Dataset:
    """Return the data with few training rows in each fold, so that an epoch has few steps."""
    rows = _TIMED_STEPS * group.configs[0]["batch_size"]
    folds = [Fold(fold.train[:rows], fold.valid) for fold in data.folds]
    return replace(data, folds=tuple(folds))


class _Tried(NamedTuple):
    """Measured seconds of one training step of one member (one trial on one fold), for one way to
    train.

    If the timing failed, ``seconds`` is infinity, and ``sentence`` describes the error for the
    user.
    """

    seconds: float
    error: Exception | None = None
    sentence: str = ""


def _try(name: str, job: Job, seconds: Callable[[], float]) -> _Tried:
    """Time one way to train. If the timing fails, the search continues without this way.

    ``ChunkPool.failures`` then has a sentence that the plan shows to the user, unless compiled code
    does not exist for the module, which is no failure.
    """
    try:
        return _Tried(seconds())
    except NotWorthItError as error:
        return _Tried(math.inf, error, str(error))
    except (TraceError, NotBuiltError) as error:
        return _Tried(math.inf, error, f"{name} cannot train this module: {error}")
    except Exception as error:
        sentence = f"{name} failed: {words_unless_strict(error)}"
        job.pool.failures[sentence] = None
        return _Tried(math.inf, error, sentence)


def _compiled_seconds(job: Job, data: Dataset, group: Population, saved: float) -> float:
    """Build compiled code for a module, and return the seconds of one training step of one member.

    The training later uses this code. Raises TraceError or NotBuiltError if there is no compiled
    code for the module, and NotWorthItError if the build would take more than ``saved`` seconds.
    """
    # Compiled code is written from recorded steps of stacked members.
    work = TrialWork(group.kind, group.configs[0], job.traits.get(group.arguments))
    for refusal in refusals("recorded", work):
        raise TraceError(refusal.reason)
    network = job.network(data, group)
    if network.one_by_one:
        raise TraceError("its members are not stacked")

    def check_build(build: float) -> None:
        if build > saved:
            raise NotWorthItError(_TOO_SHORT)

    with torch_threads(1), torch.no_grad():
        chunk = MemberChunk(
            cast(StackedModule, network),
            Validation(data, job.scoring),
            seed=job.seed,
            horizon=job.horizon,
            check_build=check_build,
        )
        job.pool.keep_code(network, chunk.code)
        return chunk.seconds_of_a_step()


def seconds_of_backend(job: Job, data: Dataset, group: Population, backend: str) -> float:
    """Measure the seconds of one training step of one member in a backend, without the one-time
    work of the first steps."""
    return _seconds(job, _few_steps(data, group), group, backend)


def _seconds(job: Job, data: Dataset, chunk: Population, backend: str) -> float:
    """Measure the seconds of one training step of one member, without the one-time work of the
    first steps."""
    short = replace(
        job,
        epochs=_TRIED_EPOCHS,
        horizon=_LONG,
        scoring=None,
        backend=backend,
        pool=ChunkPool(),
        checkpointing=None,
    )
    # On a CPU the time of this process, whatever else the machine does.
    clock = time.process_time if data.device.type == "cpu" else time.perf_counter
    with torch_threads(1):
        seconds = _fastest_epoch(short, data, chunk, clock, patience=_PATIENCE_SECONDS)
    size = int(chunk.configs[0]["batch_size"])
    return seconds / (sum(-(-len(fold.train) // size) for fold in data.folds) * len(chunk.index))


def _fastest_epoch(
    job: Job,
    data: Dataset,
    chunk: Population,
    clock: Callable[[], float],
    patience: float = math.inf,
) -> float:
    """Train trials, and return the seconds of the fastest epoch after the first two epochs.

    If there are only two epochs, the result is the seconds of the second. After ``patience``
    seconds, two epochs are enough. The result is 0.0 if training ends before two epochs.
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
