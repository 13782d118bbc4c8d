"""Plan a search: cut the trials into chunks, order the chunks, and choose the processes and
threads.

A member is one trial on one fold. A chunk is a group of trials of one tensor shape that train
together.

On a GPU, a chunk may fill the free memory. On the CPU, a chunk should stay in the cache, because
every update reads and writes all parameters and moments. Compiled code loads members into the cache
one by one. Its chunks can therefore be larger, and the threads of one process share the members of
a chunk.

The cost of a trial is an estimate. The planner uses it to cut populations into chunks, to order the
chunks and to choose the number of workers. Results do not depend on the estimate or on the chunks,
except for rounding.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from gputune.data.dataset import Dataset
from gputune.engine.backends.base import TrialWork
from gputune.engine.backends.cost import Cost, TrialSizes
from gputune.engine.backends.selection import way_of
from gputune.engine.backends.table import BACKENDS, backend_named
from gputune.engine.need import Need
from gputune.ground.errors import InputError
from gputune.ground.memory import free_memory
from gputune.ground.text import count, size_words
from gputune.modules.pretrained import KEPT
from gputune.population.kinds import is_module
from gputune.population.population import Population, shape_of, shape_of_tensors
from gputune.population.traits import Traits

_FIRST_TRIALS = 3  # trials of the first chunk, which gives an early answer
# Share of the limit beyond which memory is measured, because an estimate is not accurate enough.
_MEASURED_SHARE = 0.5
# Estimated bytes of a chunk whose members share a large frozen part, which does not fit into a cache
# in any case. For 64 members of a BERT's last layer, 512 MiB take 5% less time than 256 MiB, and as much
# as 1 GiB, which takes 1.5 times the memory. If no layer is shared, half of it takes no more time.
_FROZEN_CHUNK_BYTES = 512 << 20
_FROZEN_FREE_SHARE = 0.1  # of the free main memory
# Frozen parameters from which their products take longer than everything that compiled code saves.
# A BERT of 23 million parameters took 1.3 to 2 times as long in compiled code.
_LARGE_FROZEN = 1 << 20
# Estimated seconds of work from which a second process repays its start.
_WORKERS_PAY = 3.0
# The same for a second GPU: its process takes about 10 s to start, and a core is far slower than a
# GPU.
_GPUS_PAY = 600.0
# Seconds from which a second thread pays off, if nothing can be cut.
_THREADS_PAY = 10.0


def trial_cost(
    population: Population,
    data: Dataset,
    parameters: int = 0,
    backend: str = "eager",
    widest: int = 0,
) -> Cost:
    """Estimate the memory and the training time of one trial, in all folds together.

    For a user's module, ``widest`` is the number of values that one row has in the widest layer.
    """
    sizes = TrialSizes(population, data, parameters, widest)
    return backend_named(backend).cost(sizes)


@dataclass(frozen=True)
class Plan:
    """The plan of a search: groups of trials (chunks), and the processes and threads that train
    them.

    Args:
        chunks: The chunks, in the order in which they begin, the longest first.
        workers: Number of processes; 1 means only this process.
        threads: Number of threads of each process.
        chunk_bytes: Memory of the largest chunk, in bytes.
        data_bytes: Memory of the data, in bytes.
        cluster: The name of the cluster whose tasks are the workers, such as "Ray"; "" without a
            cluster.
        state_bytes: Size of the states of all trials between two epochs, in bytes.
        cache_bytes: Bytes of main memory for the states of trials that wait at rungs; None: trials
            do not wait.
        ways: The name of the backend of each chunk.
        reasons: The reason for each chunk why a faster backend does not train it, or "".
        gpus: Whether each worker has a GPU.
        failures: Sentences that say why a faster backend does not train.
        seconds: Estimated seconds of training on one core.
        features: A clause that says whether features of frozen layers are kept, or "".
        batch_sizes: A clause that says which batch sizes of a user's module train together, or "".
    """

    chunks: tuple[Population, ...]
    workers: int
    threads: int
    chunk_bytes: int
    data_bytes: int
    cluster: str = ""
    state_bytes: int = 0
    cache_bytes: int | None = None
    ways: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    gpus: bool = False
    failures: tuple[str, ...] = ()
    seconds: float = 0.0
    features: str = ""
    batch_sizes: str = ""

    @property
    def at_once(self) -> int:
        """Number of chunks (groups of trials) that train at the same time."""
        return 1 if self.threads > 1 and not self.cluster else max(1, self.workers)

    def with_turns(self, memory: int | None) -> int:
        """Return the number of chunks that train at the same time in threads of one process, which
        take turns (``turns.py``).

        ``memory`` is the limit in bytes that the user has set, or None.
        """
        if self.workers > 1 or self.cluster or not self.ways:
            return 1
        for chunk, way in zip(self.chunks, self.ways):
            # The code of the built-in models gives work to all cores without turns.
            if not (backend_named(way).shares_threads and is_module(chunk.kind)):
                return 1
        # Chunks of the same tensor shape use the same compiled steps, one after another.
        if len(set(map(shape_of, self.chunks))) < len(self.chunks):
            return 1
        number = min(self.threads, len(self.chunks))
        if memory is not None and number * self.chunk_bytes > memory:
            return 1
        return number

    def answering_early(self, folds: int) -> "Plan":
        """Return a plan with the same trials, reordered so that the search has a first result
        early.

        The chunk (group of trials) with the first trial comes first. In compiled code, the first
        trial and a few trials of its shape become a separate small chunk, because this costs
        nothing. (For a user's module it would cost something: each chunk traces the step again.)
        Then a single worker takes the shortest chunk first. Several workers take the longest first,
        so that they end together.
        """
        planned = list(zip(self.chunks, self.ways, self.reasons, strict=True))
        if self.workers == 1:
            planned.reverse()
        place = next(place for place, (chunk, *_) in enumerate(planned) if 0 in chunk.index)
        chunk, way, reason = planned.pop(place)
        # Each thread has two members or more.
        trials = max(_FIRST_TRIALS, -(-2 * self.threads // folds))
        cuts_freely = backend_named(way).shares_threads and not is_module(chunk.kind)
        if cuts_freely and len(chunk.index) >= 2 * trials:
            planned.insert(place, (chunk.part(trials, len(chunk.index)), way, reason))
            chunk = chunk.part(0, trials)
        chunks, ways, reasons = zip((chunk, way, reason), *planned)
        return replace(self, chunks=chunks, ways=ways, reasons=reasons)

    def __str__(self) -> str:
        sizes = [len(chunk.index) for chunk in self.chunks]
        trials = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])
        place = "in this process" if self.workers == 1 else f"in {self.workers} processes"
        if self.threads > 1:
            place += f" on {self.threads} threads"
        if self.gpus and self.workers > 1:
            place = f"on {self.workers} GPUs"
        if self.cluster:
            place = f"on {count(self.workers, f'{self.cluster} worker')}"
        text = (
            f"{count(sum(sizes), 'trial')} in {count(len(sizes), 'chunk')} of {trials}, about "
            f"{size_words(self.chunk_bytes)} a chunk and {size_words(self.data_bytes)} of data, "
            f"{place}"
        )
        if self.ways:
            text += f", {backends_text(self.ways, self.reasons)}"
        if self.cache_bytes is not None:
            in_memory = min(self.state_bytes, self.cache_bytes)
            in_files = self.state_bytes - in_memory
            parts = [f"{size_words(in_memory)} in main memory"] if in_memory else []
            if in_files:
                parts.append(f"{size_words(in_files)} in files")
            text += f"; the states of paused trials take up to {' and '.join(parts)}"
        for clause in filter(None, (self.features, self.batch_sizes)):
            text += f"; {clause}"
        return "; ".join([text, *self.failures])


def backends_text(names: Sequence[str], reasons: Sequence[str]) -> str:
    """Return a text with the backends of chunks, each with the reason why a faster one does not
    train.

    ``names`` and ``reasons`` have one entry per chunk. A reason is a clause or "". The numbers of
    chunks are in the text if there are several backends or reasons.
    """
    numbers = Counter(zip(names, reasons, strict=True))
    texts = []
    for name in BACKENDS:
        for (other, reason), number in numbers.items():
            if other == name:
                text = f"{name} ({reason})" if reason else name
                texts.append(text if len(numbers) == 1 else f"{number} {text}")
    return ", ".join(texts)


@dataclass(frozen=True)
class _Piece:
    """A planned group of trials (``chunk``) with its estimated cost, its epochs, its backend
    (``way``), and the ``reason`` why a faster backend does not train it."""

    chunk: Population
    cost: Cost
    epochs: int
    way: str
    reason: str

    @property
    def seconds(self) -> float:
        """Estimated seconds for training this chunk, over all of its epochs."""
        return self.epochs * (
            self.cost.step_seconds + len(self.chunk.index) * self.cost.trial_seconds
        )

    def cut(self, number: int) -> list["_Piece"]:
        """Cut a chunk (a group of trials) into ``number`` pieces of about equal size. If the chunk
        has fewer trials, cut it into single trials."""
        trials = len(self.chunk.index)
        pieces = []
        for part in np.array_split(np.arange(trials), min(number, trials)):
            chunk = self.chunk.part(int(part[0]), int(part[-1]) + 1)
            pieces.append(replace(self, chunk=chunk))
        return pieces

    def halves(self, seconds: float) -> list["_Piece"]:
        """Halve a chunk (a group of trials) until no piece takes longer than ``seconds``.

        A longer piece would keep one worker busy long after the others.
        """
        if self.seconds <= seconds or len(self.chunk.index) == 1:
            return [self]
        first, second = self.cut(2)
        return [*second.halves(seconds), *first.halves(seconds)]


@dataclass(frozen=True)
class Planner:
    """Cuts the trials of a search into chunks that fit into memory, and chooses the number of
    processes.

    Args:
        data: The rows, and the device that holds them.
        memory: Bytes that a chunk may take; None: the device decides.
        workers: Number of processes. None: the estimate decides, between 1 and ``gpus`` if the data
            is on a GPU.
        gpus: Number of GPUs.
        free: Free bytes of a GPU that is not in this machine.
        backend: The name of the backend that was chosen for the search.
        reason: The reason why a faster backend was not chosen for the search, or "".
        traits: Traits of a user's module. The keys are ``Population.arguments``.
        parameters: Number of parameters of a user's module.
        cost_of: A function that converts the cost of a trial in plain training into the cost in
            this search. If given, ``memory`` is the only limit.
        measure: A function that measures the memory of a population on a device, with at most the
            given count of trials. It is called if the estimate is near the limit, and for a user's
            module, because the module's layers are unknown.
    """

    data: Dataset
    memory: int | None
    workers: int | None
    gpus: int = 1
    free: int | None = None
    backend: str = "eager"
    reason: str = ""
    traits: Mapping[str, Traits] = field(default_factory=dict)
    parameters: int = 0
    cost_of: Callable[[Population, Cost], Cost] | None = None
    measure: Callable[[Population, int], Need | None] | None = None

    def plan(self, populations: Sequence[Population], epochs: int) -> Plan:
        """Return the plan for training the trials of ``populations`` for ``epochs`` epochs."""
        pieces: list[_Piece] = []
        for population in populations:
            pieces += self._pieces(population, epochs)
        share_threads = all(backend_named(piece.way).shares_threads for piece in pieces)
        if self.cost_of is None and self.workers in (None, 1) and share_threads:
            workers = 1
            threads = cores()
        else:
            pieces, workers, threads = self._among_workers(pieces)
        pieces.sort(key=lambda piece: -piece.seconds)
        return Plan(
            chunks=tuple(piece.chunk for piece in pieces),
            workers=workers,
            threads=threads,
            chunk_bytes=max(len(piece.chunk.index) * piece.cost.trial_bytes for piece in pieces),
            data_bytes=self.data.input_bytes,
            ways=tuple(piece.way for piece in pieces),
            reasons=tuple(piece.reason for piece in pieces),
            gpus=self.data.device.type == "cuda",
            state_bytes=sum(len(piece.chunk.index) * piece.cost.state_bytes for piece in pieces),
            seconds=sum(piece.seconds for piece in pieces),
        )

    def _pieces(self, population: Population, epochs: int) -> list[_Piece]:
        """Cut a population into chunks that fit into memory, and return the chunks with their
        costs."""
        config = population.configs[0]
        traits = self.traits.get(population.arguments)
        work = TrialWork.of_chunk(population.kind, population.configs, traits, self.data)
        way, reason = way_of(self.backend, work, self.reason)
        backend = backend_named(way)
        cost = trial_cost(
            population, self.data.of(config), self.parameters, way, traits.widest if traits else 0
        )
        if self.cost_of is not None:
            cost = self.cost_of(population, cost)
        useful = backend.chunk_bytes(population.kind, self.data.device, self.free)
        if traits is not None and self.data.device.type == "cpu":
            useful = max(useful, _useful_bytes(traits))
        limit = self.memory or useful
        if self.cost_of is None:
            limit = min(limit, useful)
        is_near = len(population.index) * cost.trial_bytes > _MEASURED_SHARE * limit
        if self.measure is not None and (is_near or is_module(population.kind)):
            need = self.measure(population, limit // cost.trial_bytes)
            if need is not None:
                cost = replace(cost, trial_bytes=need.trial)
                limit = limit - need.once
        piece = _Piece(population, cost, epochs, way, reason)
        # Stacking gains nothing here, and single trials react to a stop request earlier.
        if backend.takes_single_trials and self.cost_of is None:
            return piece.cut(len(population.index))
        # Chunks are not cut by time. Checkpoints keep the progress of a long chunk. They cost less
        # than the overhead of every step, which each piece would pay again.
        return piece.cut(-(-len(population.index) // max(1, limit // cost.trial_bytes)))

    def _among_workers(self, pieces: list[_Piece]) -> tuple[list[_Piece], int, int]:
        """Divide the chunks among worker processes. Returns the chunks, the number of workers, and
        the number of threads of each worker.

        If the user set no number of workers, gputune starts workers only if the training is long
        enough to repay their start.
        """
        total = sum(piece.seconds for piece in pieces)
        workers = self.workers
        on_gpu = self.data.device.type == "cuda"
        if workers is None:
            available = self.gpus if on_gpu else cores()
            workers = available if total > (_GPUS_PAY if on_gpu else _WORKERS_PAY) else 1
        # Two shares for each worker, so that workers end at about the same time.
        share = total / (2 * workers) if workers > 1 else math.inf
        cut: list[_Piece] = []
        for piece in pieces if on_gpu else reversed(pieces):
            if on_gpu:
                # Only long pieces, one part for each GPU: a short chunk would not be faster.
                cut += piece.cut(workers if piece.seconds > share else 1)
            else:
                cut += piece.halves(share)
        workers = min(workers, len(cut))
        # Products this small lose time to a second thread. Only a long run that cannot be cut has a
        # use for one.
        return cut, workers, cores() if workers == 1 and total > _THREADS_PAY else 1


def _useful_bytes(traits: Traits) -> int:
    """Return the useful size of a chunk (a group of trials) on a CPU, as far as the traits of a
    user's module decide it.

    Members that read the same rows compute the frozen layers in front of the trained ones only
    once. The more of them train together, the less each one costs. The result is 0 for other
    modules.
    """
    if not traits.common_rows or traits.frozen < traits.parameters:
        return 0
    size = _FROZEN_CHUNK_BYTES if traits.shared else _FROZEN_CHUNK_BYTES // 2
    return min(size, int(_FROZEN_FREE_SHARE * free_memory()))


def repeats_frozen_layers(traits: Traits | None, data: Dataset) -> bool:
    """Return whether stacked members share the outputs of large frozen layers, which compiled code
    would compute for each member.

    Kept features take the place of these layers.
    """
    if traits is None or not traits.common_rows or traits.frozen < _LARGE_FROZEN:
        return False
    return not any(name.startswith(KEPT) for name in data.names or ())


def joined_sizes(
    groups: Sequence[Population], data: Dataset, backend: str, known: Mapping[str, Traits]
) -> tuple[list[Population], str]:
    """Join populations that differ only in the batch size, if their trials can train together.

    An epoch is then cut at the borders of the minibatches of all trials (``PiecedBatches``). Each
    frozen layer before the first trained layer runs once per row for all batch sizes. The price is
    that the optimizer passes over the parameters of all members after every piece. Without large
    frozen layers, trials that train together took up to twice as long (an MLP of 72,000 parameters,
    batch sizes 16, 32 and 64, one core). Returns the populations, and a clause for the plan.

    The clause says which batch sizes train together, or why each batch size is a population. It is
    "" if no populations differ only in the batch size.

    Args:
        groups: Populations of one batch size each, or of built-in models.
        data: The dataset.
        backend: The name of the backend that was chosen for the search.
        known: The traits of the module, by ``Population.arguments``.
    """
    alike: dict[Hashable, list[Population]] = defaultdict(list)
    for group in groups:
        key: Hashable = group.index  # each population has other trials
        if is_module(group.kind):
            key = shape_of_tensors(group.configs[0], group.kind)
        alike[key].append(group)
    joined = []
    clauses: dict[str, None] = {}
    for parts in alike.values():
        if len(parts) == 1:
            joined += parts
            continue
        parts.sort(key=_size)
        *first, last = [str(_size(part)) for part in parts]
        sizes = f"{', '.join(first)} and {last}"
        if reason := _why_apart(parts, data, backend, known.get(parts[0].arguments)):
            joined += parts
            clauses[f"the batch sizes {sizes} train separately, because {reason}"] = None
        else:
            joined.append(_join(parts))
            clauses[f"the batch sizes {sizes} train together"] = None
    return joined, "; ".join(clauses)


def _size(group: Population) -> int:
    """Return the batch size of a population of a user's module."""
    size: int = group.configs[0]["batch_size"]
    return size


def _join(parts: Sequence[Population]) -> Population:
    """Return one population with the trials of several populations."""
    index = tuple(number for part in parts for number in part.index)
    configs = tuple(config for part in parts for config in part.configs)
    return Population(parts[0].kind, index, configs)


def _why_apart(
    parts: Sequence[Population], data: Dataset, backend: str, traits: Traits | None
) -> str:
    """Return the reason why populations do not train together, as a clause, or ""."""
    if traits is None or traits.indivisible:
        return "the module was not tried" if traits is None else traits.indivisible
    if data.device.type != "cpu":
        return "batch sizes train together only on a CPU"
    way, _ = way_of(backend, TrialWork(parts[0].kind, parts[0].configs[0], traits, data))
    if backend_named(way).is_by_member or not backend_named(way).trains_built_in:
        return f"they train {backend_named(way).in_words}"
    if not repeats_frozen_layers(traits, data) or traits.shared * traits.frozen < _LARGE_FROZEN:
        return "the shared frozen layers would save less than the additional updates take"
    return ""


def parse_memory(memory: object) -> int | None:
    """Convert the option ``memory`` to bytes: an int, or text such as "8GB", "500MB" or "2GiB".

    Units are powers of 1,024. The result is None for None. Raises InputError for other values.
    """
    if memory is None:
        return None
    text = str(memory).strip().upper().replace("IB", "B")
    units = {"KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40, "B": 1}
    unit = next((unit for unit in units if text.endswith(unit)), "")
    value = -1.0
    with suppress(ValueError):
        value = float(text.removesuffix(unit).strip()) * units.get(unit, 1)
    if isinstance(memory, bool) or not 0 < value < math.inf:
        raise InputError(
            "memory", "must be a positive number of bytes, or text such as '8GB'", got=memory
        )
    return max(1, int(value))


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
