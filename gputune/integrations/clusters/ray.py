"""The options of a Ray cluster. ``ray_tasks.py`` trains on it.

The help of the command line reads this module, which therefore imports neither Ray nor torch.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from gputune.executors.cluster import Cluster, Connection
from gputune.ground.entry_points import how_to_install
from gputune.ground.errors import InputError, MissingExtraError, check_count, option


@dataclass(frozen=True)
class Ray(Cluster):
    """The Ray cluster on which the chunks of a search train.

    Pass it as ``tune(..., workers=gputune.Ray("auto"))``. ``workers="ray"`` is short for ``Ray()``.

    Each task trains a chunk, the trials that train together. The data goes to Ray's object store
    once per search. If the cluster asks for a token, set ``RAY_AUTH_MODE=token`` and
    ``RAY_AUTH_TOKEN`` (or ``RAY_AUTH_TOKEN_PATH``) in the environment of this process.

    Args:
        address: The cluster to use. "local" starts a cluster with this machine's cores and GPUs,
            and ends it after the search. "auto" is the cluster that this machine belongs to.
            "HOST:PORT" or "ray://HOST:PORT" is any other cluster. If the process already has a
            connection (``ray.init``), "local" and "auto" use that connection.
        cpus: The number of CPUs that a task reserves on its node, at least 1 [default: 1]. The task
            computes with this number of threads.

    Raises:
        InputError: The address or the number of CPUs is invalid. ``tune`` raises it if Ray cannot
            connect.
        MissingExtraError: Ray is not installed. ``tune`` raises it.

    Example:
        >>> import gputune
        >>> cluster = gputune.Ray("10.0.0.5:6379", cpus=4)
        >>> cluster  # pass it as gputune.tune(..., workers=cluster)
        Ray(address='10.0.0.5:6379', cpus=4)
    """

    name: ClassVar[str] = "ray"
    title: ClassVar[str] = "Ray"
    addresses: ClassVar[tuple[str, ...]] = ("local", "auto", "HOST:PORT", "ray://HOST:PORT")
    address: str = "local"
    cpus: int = 1

    def __post_init__(self) -> None:
        check_count(self.cpus, "Ray(cpus=...)")
        if self.is_elsewhere and self.place(self.address) is None:
            raise InputError(
                "Ray(address=...)",
                "must be 'local', 'auto', 'HOST:PORT' or 'ray://HOST:PORT'",
                got=self.address,
            )

    @staticmethod
    def place(address: str) -> tuple[str, int] | None:
        """Return the host and port of a Ray address, or None if the address does not have the form
        HOST:PORT."""
        host, _, port = address.removeprefix("ray://").rpartition(":")
        return (host, int(port)) if host and port.isdecimal() and "/" not in host else None

    @property
    def is_elsewhere(self) -> bool:
        """True if the address names a cluster by its host and port."""
        return self.address not in ("local", "auto")

    def check(self, device: str) -> None:
        """Check that Ray is installed and that its tasks can use a device.

        Raises MissingExtraError if Ray is missing, and InputError for a device that tasks cannot
        use.
        """
        if find_spec("ray") is None:
            raise MissingExtraError(
                "workers='ray'",
                "needs Ray, which is not installed",
                remedy=how_to_install("ray"),
            )
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(
                "device",
                f"must be 'auto', 'cpu' or 'cuda' with {option('workers', 'ray')}, because Ray "
                "gives each task one GPU",
                got=device,
            )

    def connect(self, device: str) -> AbstractContextManager[Connection]:
        """Connect to the Ray cluster for the duration of a ``with`` block.

        If this process was already connected, the connection stays open. Raises InputError if the
        cluster cannot be used.
        """
        from gputune.integrations.ray_tasks import connection

        return connection(self, self.cpus, device)


CLUSTER = Ray
