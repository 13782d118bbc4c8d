"""The plan before a run: how many trials fit on the device at once, in which order, on how many processes.

On a GPU a chunk may fill the memory that is free; on the CPU it should stay in the cache, because the update
passes over the whole state at every step. Results do not depend on the cut beyond rounding.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gputune.data.dataset import Dataset
from gputune.engine.population import Population, padded_width
from gputune.errors import InputError
from gputune.report.text import count, size_words
from gputune.types import ONLINE, Config

_CACHE_BYTES = 16 << 20  # a chunk's state on the CPU; 8 to 32 MiB measured alike, beyond that slower
_FREE_SHARE = 0.8  # of the GPU memory that is free
# Parameters, gradient, two moments, scratch; and for unlike trials expanded rate, decay, activity, corrections.
_BUFFERS = 11
_WORKERS_PAY = 3.0  # estimated seconds of work from which a second process repays its start
_THREADS_PAY = 10.0  # and from which a second thread is worth its waiting, where nothing can be cut

# One core's speed, to order chunks and to count workers; no result depends on them. Measured on a Xeon core.
_STEP_SECONDS = 60e-6  # operator overhead of one layer in one step
_PARAMETER_SECONDS = 2.2e-9  # update of one parameter
_PRODUCT_SECONDS = 8e-12  # one multiply-add pair
_ACTIVATION_SECONDS = 1.5e-9


@dataclass(frozen=True)
class Plan:
    """Chunks of a search, longest first; the processes that train them (1: this process alone); threads of each.

    With ``cluster`` the workers are tasks that run at once on other machines. ``state_bytes`` are those of all trials
    between two epochs; where they wait for each other at rungs, ``parking_bytes`` of these have room in main memory.
    """

    chunks: tuple[Population, ...]
    workers: int
    threads: int
    chunk_bytes: int
    data_bytes: int
    cluster: bool = False
    state_bytes: int = 0
    parking_bytes: int | None = None

    def __str__(self) -> str:
        sizes = [len(chunk.index) for chunk in self.chunks]
        trials = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])
        place = "in this process" if self.workers == 1 else f"in {self.workers} processes"
        if self.cluster:
            place = f"on {count(self.workers, 'Ray worker')}"
        return (
            f"{count(sum(sizes), 'trial')} in {count(len(sizes), 'chunk')} of {trials}, about "
            f"{size_words(self.chunk_bytes)} a chunk and {size_words(self.data_bytes)} of data, {place}"
            f"{self._waiting()}"
        )

    def _waiting(self) -> str:
        """Where the states lie that wait for their next rung, in words."""
        if self.parking_bytes is None:
            return ""
        held = min(self.state_bytes, self.parking_bytes)
        places = [(held, "main memory"), (self.state_bytes - held, "files")]
        words = " and ".join(f"{size_words(size)} in {place}" for size, place in places if size)
        return f"; states that wait for a rung take up to {words}"


@dataclass(frozen=True)
class Cost:
    """What one trial of a population costs: bytes while it trains and while it waits, seconds an epoch, of overhead."""

    trial_bytes: int
    state_bytes: int
    trial_seconds: float
    step_seconds: float


def make_plan(
    populations: Sequence[Population],
    data: Dataset,
    *,
    epochs: int,
    memory: int | None,
    workers: int | None,
    parameters: int = 0,
    free: int | None = None,
    cost_of: Callable[[Population, "Cost"], "Cost"] | None = None,
) -> Plan:
    """Cut populations into chunks within ``memory`` bytes (None: what the device suggests).

    ``workers`` None lets the estimate decide; ``parameters`` is the size of a user's module; ``free`` are the bytes
    of a GPU that is not in this machine. ``cost_of`` turns what a
    trial costs in plain training into what it costs here; ``memory`` is then the only limit.
    """
    limit = memory_limit(data, memory, free) if cost_of is None or memory is None else memory
    pieces = []
    for population in populations:
        cost = trial_cost(population, data, parameters)
        if cost_of is not None:
            cost = cost_of(population, cost)
        whole = _Piece(population, cost, epochs)
        # Not cut by time too: each piece of a chunk pays the overhead of every step anew, its checkpoint costs less.
        pieces += whole.cut(-(-len(population.index) // max(1, limit // cost.trial_bytes)))
    total = sum(piece.seconds for piece in pieces)
    if workers is None:
        workers = cores() if data.device.type == "cpu" and total > _WORKERS_PAY else 1
    pieces = _balanced(pieces, workers)
    workers = min(workers, len(pieces))
    # Products this small lose time to a second thread; only a long run that cannot be cut has use for one.
    threads = cores() if workers == 1 and total > _THREADS_PAY else 1
    return Plan(
        chunks=tuple(piece.chunk for piece in pieces),
        workers=workers,
        threads=threads,
        chunk_bytes=max(len(piece.chunk.index) * piece.cost.trial_bytes for piece in pieces),
        data_bytes=data.x.numel() * data.x.element_size(),
        state_bytes=sum(len(piece.chunk.index) * piece.cost.state_bytes for piece in pieces),
    )


@dataclass(frozen=True)
class _Piece:
    """A chunk with what it costs."""

    chunk: Population
    cost: Cost
    epochs: int

    @property
    def seconds(self) -> float:
        return self.epochs * (self.cost.step_seconds + len(self.chunk.index) * self.cost.trial_seconds)

    def cut(self, number: int) -> list["_Piece"]:
        """Cut into so many pieces of equal size, or one a trial."""
        parts = np.array_split(np.arange(len(self.chunk.index)), min(number, len(self.chunk.index)))
        return [replace(self, chunk=self.chunk.part(int(part[0]), int(part[-1]) + 1)) for part in parts]


def _balanced(pieces: list[_Piece], workers: int) -> list[_Piece]:
    """Return the pieces, longest first, with those halved that would keep one worker long after the others."""
    share = sum(piece.seconds for piece in pieces) / (2 * workers)
    done: list[_Piece] = []
    waiting = list(pieces)
    while waiting:
        piece = waiting.pop()
        if workers > 1 and piece.seconds > share and len(piece.chunk.index) > 1:
            waiting += piece.cut(2)
        else:
            done.append(piece)
    return sorted(done, key=lambda piece: -piece.seconds)


def trial_cost(population: Population, data: Dataset, parameters: int = 0) -> Cost:
    """Estimate what one trial with all its folds costs."""
    config, folds, item = population.configs[0], data.n_folds, torch.finfo(data.dtype).bits // 8
    longest = max(len(fold.train) for fold in data.folds)
    batch_sizes = [min(c["batch_size"], longest) for c in population.configs]
    steps, rows = -(-longest // min(batch_sizes)), max(batch_sizes)
    layers, size, units = _shape(population, data, parameters)
    activations = rows * (4 * units + 3 * data.n_outputs) + (rows * data.n_features) // max(
        1, len(batch_sizes)
    )
    dropout = 2 * rows * units if config["dropout"] else 0
    buffers = _BUFFERS + (config["optimizer"] in ONLINE)  # one more: the last direction
    # Outputs on the validation rows, in the scores' working precision and once more for their terms.
    scored = 5 * max(len(fold.valid) for fold in data.folds) * data.n_outputs
    member_seconds = (
        _PARAMETER_SECONDS * size + 3 * _PRODUCT_SECONDS * rows * size + _ACTIVATION_SECONDS * rows * units
    )
    return Cost(
        trial_bytes=folds * item * (buffers * size + activations + dropout) + item * scored,
        state_bytes=folds * item * size * _kept_buffers(config["optimizer"], population.configs),
        trial_seconds=folds * steps * member_seconds,
        step_seconds=steps * layers * _STEP_SECONDS,
    )


def _kept_buffers(optimizer: str, configs: Sequence[Config]) -> int:
    """How many numbers a parameter needs while its training waits: itself, its moments, what adapts its rate."""
    own = optimizer.removesuffix("hd")
    if own in ("adam", "adamw"):
        moments = 2
    else:
        moments = int(own == "nesterov" or any(config["momentum"] for config in configs))
    return 1 + moments + 3 * (optimizer in ONLINE)


def _shape(population: Population, data: Dataset, parameters: int) -> tuple[int, int, int]:
    """Layers, parameters and hidden units of one member, padding included."""
    config, d, k = population.configs[0], data.n_features, data.n_outputs
    if population.kind == "linear":
        return 1, (d + 1) * k, k
    if population.kind == "module":  # its inside is unknown: a square root of the size is a fair width
        return 8, parameters, 4 * int(parameters**0.5)
    depth, width = config["depth"], padded_width(config["width"])
    size = (d + 1) * width + (depth - 1) * (width + 1) * width + (width + 1) * k
    return depth + 1, size, depth * width


def memory_limit(data: Dataset, memory: int | None, free: int | None = None) -> int:
    """Bytes that a chunk may take; ``free`` are those of a GPU elsewhere."""
    if data.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(data.device)
    if free is not None:
        return int(min(_FREE_SHARE * free, memory or free))
    return min(_CACHE_BYTES, memory or _CACHE_BYTES)


def parse_memory(memory: int | str | None) -> int | None:
    """Return bytes of an int or of text such as "8GB", "500MB", "2GiB"."""
    if memory is None:
        return None
    text = str(memory).strip().upper().replace("IB", "B")
    units = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40, "B": 1}
    unit = next((u for u in units if text.endswith(u)), None)
    number = text.removesuffix(unit or "").strip()
    try:
        value = float(number) * units.get(unit or "B", 1)
    except ValueError:
        value = -1.0
    if isinstance(memory, bool) or not 0 < value < float("inf"):
        raise InputError(f"memory is a number of bytes or text such as '8GB', above 0, got {memory!r}.")
    return max(1, int(value))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
