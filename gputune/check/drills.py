"""What goes wrong in a search, made to happen: trials diverge, memory runs out, a step cannot be recorded."""

import warnings
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from gputune.check.members import Case, difference, scoring_of
from gputune.data.dataset import Dataset
from gputune.engine.job import Job, Outcome, Progress
from gputune.engine.memory import run_in_parts
from gputune.modules.recorder import RECORDERS, Replays
from gputune.population.population import Population
from gputune.types import Backend

_LIMIT = 64 << 20  # bytes of a GPU beyond those that are taken
_WILD = 1e300  # a learning rate
_SINGLE = 2  # trials that fit where the limit is played


def leave(device: torch.device, backend: Backend) -> float:
    """Members beside some that diverge, from the same members without them."""
    calm = ({"lr": 0.01}, {"lr": 0.003}, {"lr": 0.001})
    shared = {"optimizer": "sgd", "momentum": 0.9}
    wild = ({"lr": _WILD}, *calm, {"lr": _WILD})
    ((_, expected),) = Case(calm, shared).trained(device, backend)
    case = Case(wild, shared)
    ((_, found),) = case.trained(device, backend, scoring_of(case, "neg_log_loss"))
    if found.alive != (1, 2, 3):
        raise RuntimeError(f"trials (1, 2, 3) should stay, but {found.alive} did")
    return difference(found.flat, expected.flat)


@dataclass(frozen=True)
class _SmallMemory(Job):
    """A CPU, whose memory no program limits, that holds a few trials."""

    def run(self, data: Dataset, chunk: Population, progress: Progress | None = None) -> Outcome:
        """Train one chunk, if it fits."""
        if len(chunk.index) > _SINGLE:
            raise MemoryError("so many trials do not fit")
        return super().run(data, chunk, progress)


def run_out_of_memory(device: torch.device, backend: Backend) -> float:
    """Scores of trials that memory does not hold at once, from those of the same trials with all of it."""
    # 48 of width 128 take 80 MB for parameters, gradients and moments, in double precision.
    trials, width = (6, 8) if device.type == "cpu" else (48, 128)
    rates = tuple({"lr": 10**-power} for power in np.linspace(2, 4, trials).tolist())
    case = Case(rates, {"width": width}, epochs=2)
    data = case.data(device)
    (chunk,) = case.chunks(data)
    job = case.job(backend, scoring_of(case, "neg_log_loss"))
    # What libraries take at their first call is not of this chunk.
    expected = job.run(data, chunk).curves
    small = _SmallMemory if device.type == "cpu" else Job
    job = small(**{name: getattr(job, name) for name in ("seed", "epochs", "horizon", "backend", "scoring")})
    with _limited(device) if device.type == "cuda" else nullcontext():
        outcomes = run_in_parts(job, data, chunk)
    if not job.fits.trials:
        raise RuntimeError("memory did not run out")
    curves = np.full_like(expected, np.nan)
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise outcome.error()
        curves[list(outcome.index)] = outcome.curves
    return difference(torch.from_numpy(curves), torch.from_numpy(expected))


@contextmanager
def _limited(device: torch.device) -> Iterator[None]:
    """Let this process have so much of a GPU's memory inside, beyond what its tensors take."""
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + _LIMIT) / whole, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def recording_fails(device: torch.device, _backend: Backend) -> float:
    """How many steps were lost or taken twice, of steps that read a number and can therefore not be recorded."""
    total = torch.zeros((), device=device)

    def step() -> None:
        total.add_(1)
        total.item()

    expected = Counter[Hashable]({"step": 100})
    steps = Replays(RECORDERS[device.type](device), expected, lambda: [total], 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it says so
        for _ in range(12):
            steps.take("step", step)
    if steps.steps:
        raise RuntimeError("a step that reads a number was recorded")
    return abs(float(total) - 12)
