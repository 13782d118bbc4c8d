"""The base class of backends. A backend is a program that trains a chunk, a group of trials.

A backend tells which devices it needs, which trials it refuses and why, and what a trial costs. It
makes the network and the chunk of the trials. No other code tests the name of a backend. A member
is one trial on one fold.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self

import torch

from gputune.data.dataset import Dataset
from gputune.engine.backend import Findings
from gputune.engine.backends.cost import Cost, TrialSizes, by_member_cost, stacked_cost
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.ground.device import free_of_gpu
from gputune.ground.types import Config, Say
from gputune.modules.looped import LoopedModule
from gputune.modules.module import StackedModule
from gputune.population.kinds import ModelKind, is_module
from gputune.population.population import Network
from gputune.population.traits import Traits
from gputune.scoring.validation import Validation

# Bytes of a chunk's state on the CPU. 8 to 32 MiB were equally fast, more was slower.
_CACHE_BYTES = 16 << 20
_FREE_SHARE = 0.8  # of the free GPU memory


@dataclass(frozen=True)
class Machine:
    """The device, the number format and the kind of model for which the search chooses a backend.

    ``findings`` are the stored results of ``gputune check`` for the device.
    """

    device: torch.device
    dtype: torch.dtype
    kind: ModelKind
    findings: Findings = field(default_factory=Findings)


class Unfit(NamedTuple):
    """The reason why "auto" does not choose a backend for a search.

    ``reason`` is a clause, or "" if the backend is for other devices. ``is_told`` tells whether
    gputune tells the user before the plan, because the user can change something.
    """

    reason: str = ""
    is_told: bool = False


@dataclass(frozen=True)
class TrialWork:
    """A trial that needs a backend, with the known facts about its model and data.

    ``traits`` describes a user's module. ``traits`` and ``data`` are None if they are not known.
    ``mixes_sizes`` says that the trial shares its chunk with trials of other batch sizes.
    """

    kind: ModelKind
    config: Config
    traits: Traits | None = None
    data: Dataset | None = None
    mixes_sizes: bool = False

    @classmethod
    def of_chunk(
        cls, kind: ModelKind, configs: Sequence[Config], traits: Traits | None, data: Dataset
    ) -> Self:
        """Return the first trial of a chunk, which stands for all of its trials."""
        sizes = {config["batch_size"] for config in configs}
        return cls(kind, configs[0], traits, data, mixes_sizes=len(sizes) > 1)

    @property
    def is_on_gpu(self) -> bool:
        """True if the data is known and on a GPU."""
        return self.data is not None and self.data.device.type == "cuda"


class Refusal(NamedTuple):
    """The reason why a backend does not train a trial, as a clause, and the backend to try next."""

    reason: str
    instead: str


class Backend:
    """One way to train a chunk, a group of trials that train together.

    Attributes:
        name: The name in the option ``backend``, in studies and in the plan.
        noun: The program that trains, for messages.
        in_words: How trials train, for messages.
        slower: The backend that trains if this one fails or does not support a trial, or "".
        is_by_member: Whether the members of a built-in model take their steps separately, so that
            batch sizes of other members do not matter. Members of other backends train stacked, and
            the gradients of pieces of their minibatches add up. If such a backend fails to make a
            chunk, ``slower`` makes it.
        shares_threads: Whether the threads of a process share the members of a chunk at no cost.
        trains_built_in: Whether the backend trains the built-in models.
        takes_single_trials: Whether chunks of several trials gain nothing.
        module_class: The class of the network of a user's module.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    in_words: ClassVar[str]
    slower: ClassVar[str] = ""
    is_by_member: ClassVar[bool] = False
    trains_built_in: ClassVar[bool] = True
    shares_threads: ClassVar[bool] = False
    takes_single_trials: ClassVar[bool] = False
    module_class: ClassVar[type[StackedModule] | type[LoopedModule]] = StackedModule

    @property
    def failure(self) -> str:
        """A sentence that says why this process no longer trains with this backend on a GPU, or
        ""."""
        return ""

    def check(self, machine: Machine) -> None:
        """Raise InputError if the user requested this backend, but the device does not have it."""

    def unfit(self, machine: Machine) -> Unfit | None:
        """Return the reason why "auto" does not choose this backend, or None if it may."""
        return None

    def refuses(self, work: TrialWork) -> Refusal | None:
        """Return the reason why this backend does not train a trial, or None if it does."""
        return None

    def check_search(
        self, configs: Sequence[Config], kind: ModelKind, data: Dataset, cluster: str
    ) -> None:
        """Raise InputError if the user requested this backend, but it cannot train the search.

        ``cluster`` is the name of the cluster that trains, or "".
        """

    def prepare(self, configs: Sequence[Config], kind: ModelKind, data: Dataset, say: Say) -> None:
        """Build programs for configurations before they train, and tell the user."""

    def separate_steps(self, work: TrialWork) -> Hashable:
        """Return the grouping key of a trial that takes its steps separately, or False.

        Trials with equal keys may share a chunk, whatever their batch sizes.
        """
        return self.is_by_member

    def cost(self, sizes: TrialSizes) -> Cost:
        """Estimate the memory and the training time of one trial, in all folds together."""
        by_member = self.is_by_member and not is_module(sizes.kind)
        return by_member_cost(sizes) if by_member else stacked_cost(sizes)

    def chunk_bytes(self, kind: ModelKind, device: torch.device, free: int | None) -> int:
        """Return the useful size of a chunk in bytes.

        ``free`` are the free bytes of a GPU that is not in this machine, or None.
        """
        if device.type == "cuda":
            free = free_of_gpu(device)
        return _CACHE_BYTES if free is None else int(_FREE_SHARE * free)

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        """Return the trials of a network as a chunk that can train: by default, stacked."""
        is_recorded = self.name == "recorded"
        return pool.take(network, validation, seed=seed, horizon=horizon, recorded=is_recorded)
