"""Independent streams of random numbers, one for each purpose such as dropout or shuffling.

The random numbers of one purpose therefore never depend on the count of random numbers for other
purposes. A draw is one call of a random generator.
"""

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

GLOBAL_DRAWS = threading.RLock()
"""A lock for the generators that all threads share (torch, Python, NumPy).

A thread holds the lock while gputune seeds a shared generator or draws random numbers from it.
"""


def stream_seed(seed: int, *key: object) -> int:
    """Return the seed of the random stream for a purpose, which ``key`` names.

    The seed has 63 bits and depends on all bits of ``seed`` and ``key``. The function hashes the
    key, because torch's CPU generator keeps only the low 32 bits of a seed. Keys packed into the
    high bits would share one stream.
    """
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def replica_seed(seed: int, replica: int) -> int:
    """Return the seed of one of the networks that a trial trains on the same rows.

    The network 0 has the seed of the search.
    """
    return seed if replica == 0 else stream_seed(seed, "ensemble", replica)


def stream(seed: int, *key: object) -> torch.Generator:
    """Return a random generator on the CPU for one purpose, for example ``stream(seed, "rows", n,
    epoch)``.

    Random numbers are made on the CPU and then moved, so that a GPU gets the same random numbers.
    """
    return torch.Generator().manual_seed(stream_seed(seed, *key))


@contextmanager
def keyed_draws(
    device: torch.device, seed: int, *key: object, host: bool = False
) -> Iterator[None]:
    """Seed torch's own random generator for the purpose ``key`` inside the block.

    Outside the block, the generator continues as before. Threads take turns, because they share
    this generator. Modules and dropout use this generator, because they accept no other generator.

    Args:
        device: The device that makes random numbers. The CPU's generator is always included.
        seed: The seed of the search.
        *key: The purpose of the random numbers, for example ``"dropout", epoch, step``.
        host: If True, the generators of Python and NumPy are seeded for ``key`` as well.
    """
    devices = [device] if device.type == "cuda" else []
    with GLOBAL_DRAWS, torch.random.fork_rng(devices), _restored_host_generators(host):
        start_stream(device, seed, *key, host=host)
        yield


def start_stream(device: torch.device, seed: int, *key: object, host: bool = False) -> None:
    """Seed torch's own random generator for the purpose ``key`` from now on.

    Call this function only inside ``keyed_draws``, which restores the generator.
    """
    # torch.manual_seed() would seed the generators of all devices, and these are not restored here.
    torch.default_generator.manual_seed(stream_seed(seed, *key))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(stream_seed(seed, *key))
    if host:
        number = stream_seed(seed, "host", *key)
        random.seed(number)
        np.random.seed([number >> 32, number & 0xFFFFFFFF])  # NumPy takes 32-bit words


def prediction_draws(device: torch.device, *, draws: bool) -> AbstractContextManager[None]:
    """Return a context in which a model's predictions use the same random numbers in each call.

    With ``draws=False`` the context does nothing.
    """
    return keyed_draws(device, 0, "predict", host=True) if draws else nullcontext()


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seed the random generators of Python, NumPy and torch with ``seed`` inside the block.

    After the block, the generators continue as before. A thread that needs the generators
    meanwhile, in another search, waits until this block ends.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with GLOBAL_DRAWS, torch.random.fork_rng(devices), _restored_host_generators(True):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


@contextmanager
def _restored_host_generators(enabled: bool) -> Iterator[None]:
    """Restore the state of Python's and NumPy's random generators after the block, if
    ``enabled``."""
    if not enabled:
        yield
        return
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
