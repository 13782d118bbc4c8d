"""Which Ray cluster, and the connection to it: made for one search, or the one that this process already has."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from gputune.engine.plan import cores
from gputune.errors import InputError, MissingExtraError, check_count
from gputune.executors.ray_cluster import RayCluster

_SECONDS = 10.0  # to answer a knock; Ray itself waits for minutes
_TOKEN = (
    "A cluster that asks for a token (Ray 2.52 and newer can) lets this process in with RAY_AUTH_MODE=token in its "
    "environment and the token in RAY_AUTH_TOKEN, in the file of RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token."
)


@dataclass(frozen=True)
class Ray:
    """Where the chunks of a search train: ``tune(..., workers=gputune.Ray("auto"))``; ``workers="ray"`` is ``Ray()``.

    address  "local": a cluster of this machine's cores and GPUs, started for the search and ended with it; "auto": the
             cluster that this machine belongs to; "HOST:PORT" or "ray://HOST:PORT" of another. A connection that the
             process already has (``ray.init``) is used by "local" and "auto".
    cpus     CPUs that a task reserves on its node, and threads that it computes with

    Raises InputError for anything else.
    """

    address: str = "local"
    cpus: int = 1

    def __post_init__(self) -> None:
        check_count(self.cpus, "Ray(cpus=...)")
        if self.is_elsewhere and _host_and_port(self.address) is None:
            raise InputError(
                "Ray(address=...), --ray: must be 'local', 'auto', 'HOST:PORT' or 'ray://HOST:PORT', got "
                f"{self.address!r}."
            )

    @property
    def is_elsewhere(self) -> bool:
        """Whether the address itself says which cluster, and not this machine."""
        return self.address not in ("local", "auto")


def check_ray(device: str) -> None:
    """Raise MissingExtraError where Ray is missing, InputError for a device that its tasks cannot have."""
    if find_spec("ray") is None:
        raise MissingExtraError('workers="ray" needs Ray, which is missing: pip install "gputune[ray]".')
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(
            "device with workers='ray' must be 'auto', 'cpu' or 'cuda' (each task has one GPU, whichever it is), got "
            f"{device!r}."
        )


@contextmanager
def ray_cluster(workers: Ray, *, device: str) -> Iterator[RayCluster]:
    """Connect to the cluster for what happens inside; a connection that was there before stays.

    Raises InputError where it cannot be reached, or has no node that a task fits on.
    """
    ray = import_module("ray")
    is_ours = not ray.is_initialized()
    if workers.is_elsewhere and not is_ours:
        raise InputError(
            f"Ray(address={workers.address!r}): this process is connected to a Ray cluster already; call "
            "ray.shutdown() first, or leave the address out to use that one."
        )
    try:
        if is_ours:
            with _keep_signals():
                _connect(ray, workers.address)
        yield RayCluster(ray, device=device, cpus=workers.cpus)
    finally:
        if is_ours:
            ray.shutdown()


def _connect(ray: ModuleType, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # Ray would report usage to its makers; a cluster that is ours stays with us.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=cores(), include_dashboard=False, **quiet)
        return
    hint = ""
    try:
        noted = address
        if address == "auto":  # the address that Ray has noted, whose head may be long gone
            find = getattr(import_module("ray._private.services"), "canonicalize_bootstrap_address", None)
            # Where Ray has this function no longer it finds out by itself, in minutes.
            noted = os.environ.get("RAY_ADDRESS", "") or (str(find(address, None)) if find else address)
        if (place := _host_and_port(noted)) is not None:
            socket.create_connection(place, timeout=_SECONDS).close()
        hint = f" {_TOKEN}"  # someone is there; Ray does not say when it was the token that was missing
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"the Ray cluster at {address!r} cannot be used: {reason}. Start it with 'ray start --head', check the "
            f"address and the versions of Ray and Python, or use 'local'.{hint} Nothing was changed."
        ) from error


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host, int(port)) if host and port.isdecimal() and "/" not in host else None


@contextmanager
def _keep_signals() -> Iterator[None]:
    """Put back what the process does on SIGTERM, which Ray changes when it connects."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            with suppress(TypeError):  # a handler that was not set from Python
                signal.signal(signal.SIGTERM, before)
