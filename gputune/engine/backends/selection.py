"""Choose a backend from the table: for a search, for each trial, and for a chunk.

A trial whose backend does not support it trains in the backend that the refusal names. The reasons
of all refusals are in the plan.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from gputune.data.dataset import Dataset
from gputune.engine.backend import read_findings
from gputune.engine.backends.base import Backend, Machine, Refusal, TrialWork
from gputune.engine.backends.table import BACKENDS, backend_named, current_name
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.ground.device import is_out_of_memory
from gputune.ground.errors import warn, words_unless_strict
from gputune.ground.types import BackendWord, Config
from gputune.modules.trace import TraceError
from gputune.native.library import NotBuiltError
from gputune.population.kinds import ModelKind, is_module
from gputune.population.population import Network
from gputune.population.traits import Traits
from gputune.scoring.validation import Validation


class Way(NamedTuple):
    """The backend of a trial, and the reason why a faster backend does not train it, or ""."""

    name: str
    reason: str


class BackendChoice(NamedTuple):
    """The backend of a search.

    ``reason`` says why no faster backend was chosen, for the plan. ``told`` is the reason why
    "auto" did not choose the backend ``faster``, if the user can change this. Both may be "".
    """

    name: str
    reason: str = ""
    faster: str = ""
    told: str = ""
    is_requested: bool = False


def choose_backend(
    word: BackendWord, device: torch.device, dtype: torch.dtype, kind: ModelKind = "mlp"
) -> BackendChoice:
    """Return the backend for the user's option ``word``.

    "auto" becomes the fastest backend that fits the device and the model. Raises InputError if the
    requested backend is not available.
    """
    machine = Machine(device, dtype, kind)
    if word == "stacked" and not is_module(kind):
        return BackendChoice("eager")
    if word == "stacked":
        # Compiled code trains members one by one.
        fits = backend_named("recorded").unfit(machine) is None
        return BackendChoice("recorded" if fits else "eager")
    if word != "auto":
        backend = backend_named(word)
        backend.check(machine)
        return BackendChoice(backend.name, "as requested", is_requested=True)
    machine = Machine(device, dtype, kind, read_findings(device))
    told = ""
    faster = ""
    reason = ""
    for name in BACKENDS:
        unfit = backend_named(name).unfit(machine)
        if unfit is None:
            return BackendChoice(name, reason, faster, told)
        if unfit.is_told:
            faster = name
            told = unfit.reason
        reason = unfit.reason or reason
    raise AssertionError("eager steps fit every device")


def refusals(name: str, work: TrialWork) -> Iterator[Refusal]:
    """Yield the refusals of a trial, from the chosen backend to the backend that trains it."""
    while refusal := backend_named(name).refuses(work):
        yield refusal
        name = refusal.instead


def way_of(name: str, work: TrialWork, reason: str = "") -> Way:
    """Return the backend that trains a trial, if the search chose the backend ``name`` for a
    ``reason``."""
    reasons = []
    name = current_name(name)
    for refusal in refusals(name, work):
        name = refusal.instead
        reasons.append(refusal.reason)
    return Way(name, "; ".join(reasons) or reason)


def trains_as(
    name: str,
    kind: ModelKind,
    config: Config,
    traits: Traits | None = None,
    *,
    data: Dataset | None = None,
) -> str:
    """Return the backend that trains one trial, if the search chose the backend ``name``."""
    return way_of(name, TrialWork(kind, config, traits, data)).name


def failures(name: str) -> list[str]:
    """Return the sentences that say why a backend, or a slower one that replaces it, no longer
    trains in this process."""
    sentences = []
    while name:
        backend = backend_named(name)
        sentences.append(backend.failure)
        name = backend.slower
    return [sentence for sentence in sentences if sentence]


def make_chunk(
    name: str,
    network: Network,
    validation: Validation,
    pool: ChunkPool,
    *,
    seed: int,
    horizon: int,
) -> Chunk:
    """Return the chunk of the fastest backend that can train a network, if the search chose the
    backend ``name``.

    If a fast backend fails, gputune warns, notes the reason in the pool, and makes the chunk in the
    next slower backend.
    """
    work = TrialWork.of_chunk(network.kind, network.configs, network.traits, validation.data)
    name = way_of(name, work).name
    # The members of an earlier chunk may have failed to train stacked.
    if network.one_by_one and not backend_named(name).module_class.one_by_one:
        name = "loop"
    while True:
        backend = backend_named(name)
        try:
            return backend.make_chunk(network, validation, pool, seed=seed, horizon=horizon)
        except Exception as error:
            if not backend.is_by_member:
                raise
            _note_failure(error, backend, network, pool)
        name = backend.slower


def _note_failure(error: Exception, backend: Backend, network: Network, pool: ChunkPool) -> None:
    """Warn that a fast backend could not make a chunk. An unexpected error is also noted in the
    pool."""
    slower = backend_named(backend.slower)
    if isinstance(error, NotBuiltError | TraceError):
        if backend.failure:  # the backend has warned already
            return
        reason = str(error)
    elif is_out_of_memory(error):  # the caller halves the chunk
        raise error
    else:
        reason = words_unless_strict(error)
        fault = f"Trials train {slower.in_words}, because {backend.noun} failed: {reason}."
        pool.faults[fault] = None
    optimizer = network.configs[0]["optimizer"]
    warn(
        f"Trials with the optimizer {optimizer!r} train {slower.in_words}, which are slower than "
        f"{backend.in_words}: {reason}",
        RuntimeWarning,
    )
