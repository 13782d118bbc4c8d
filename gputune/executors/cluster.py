"""The interface of clusters, which train the chunks (groups of trials) of a search instead of this
process.

A cluster is a value of ``tune(workers=...)``. ``gputune.Ray`` is one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from gputune.ground.entry_points import integration, integrations
from gputune.ground.errors import InputError
from gputune.ground.types import Json

if TYPE_CHECKING:
    from gputune.data.dataset import Dataset
    from gputune.engine.job import Failure, Job, Outcome
    from gputune.engine.plan import Plan
    from gputune.executors.executor import Executor
    from gputune.population.population import Population

_UNNAMED = "ray"  # the cluster of a study file that stores a cluster without its name


class Connection(ABC):
    """The connection of a running search to a cluster.

    Attributes:
        device: The device of the tasks, "cpu" or "cuda".
        threads: The number of threads of a task.
        tasks: The number of tasks that can run at the same time.
        free: The number of free bytes on the GPU of a task, or None on a CPU.
        cluster: The cluster.
    """

    device: str
    threads: int
    tasks: int
    free: int | None
    cluster: "Cluster"

    @abstractmethod
    def bytes_of_a_task(self) -> int:
        """Return the number of bytes of memory that one task may use."""

    @abstractmethod
    def executor(
        self, job: "Job", data: "Dataset", plan: "Plan"
    ) -> "Executor[Population, Outcome | Failure]":
        """Return the executor that trains the chunks (groups of trials) of a plan as tasks of the
        cluster."""


@dataclass(frozen=True)
class Cluster(ABC):
    """A cluster on which the chunks (groups of trials) of a search train.

    A subclass is a frozen dataclass. Its fields are plain values, because the study file stores
    them.

    Attributes:
        name: The name of the module in ``gputune/integrations/clusters/`` that defines the class.
            ``tune(workers=...)`` accepts it as well.
        title: The name that messages show, such as "Ray".
        addresses: The forms of an address, as the help shows them. The first one is the default.
        address: The place of the cluster. Messages show it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    addresses: ClassVar[tuple[str, ...]]
    address: str

    @property
    @abstractmethod
    def is_elsewhere(self) -> bool:
        """True if the address names other machines.

        gputune resumes a study on them only after a search by this user, or with
        ``trust_code=True``.
        """

    @abstractmethod
    def check(self, device: str) -> None:
        """Check, without a connection, that the cluster can train on a device.

        Raises MissingExtraError if a library is missing, and InputError for a device that tasks
        cannot use.
        """

    @abstractmethod
    def connect(self, device: str) -> AbstractContextManager[Connection]:
        """Connect to the cluster for the duration of a ``with`` block.

        Raises InputError if the cluster cannot be used.
        """

    def to_json(self) -> Json:
        """Return the description of the cluster that a study file stores."""
        fields = asdict(self)
        return fields if self.name == _UNNAMED else {"cluster": self.name, **fields}


def cluster_class(name: str) -> type[Cluster]:
    """Return the class of the cluster with a name of ``integrations("clusters")``."""
    cluster: type[Cluster] = integration("clusters", name).CLUSTER
    return cluster


def cluster_from_json(stored: Mapping[str, object]) -> Cluster:
    """Return the cluster that a study file describes."""
    fields = dict(stored)
    name = str(fields.pop("cluster", _UNNAMED))
    return named_cluster(name, **fields)


def named_cluster(name: str, **fields: object) -> Cluster:
    """Return the cluster of a name such as "ray", with values for its fields.

    Raises InputError for an unknown name.
    """
    known = integrations("clusters")
    if name not in known:
        raise InputError(
            None,
            f"This gputune has no cluster {name!r}, only {', '.join(known)}",
            remedy="Add its module to gputune/integrations/clusters, or choose other workers.",
        )
    return cluster_class(name)(**fields)  # type: ignore[arg-type]
