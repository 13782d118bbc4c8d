"""One independent random stream for every use.

The random numbers of one use therefore never depend on how many random numbers other uses take. A
draw is one call of a random generator.
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

The lock is held while a shared generator is set to one of our streams or draws random numbers for
us.
"""


def stream_seed(seed: int, *key: object) -> int:
    """Return a 63-bit seed that depends on all bits of ``seed`` and ``key``.

    The key is hashed, because torch's CPU generator keeps only the low 32 bits of a seed. Keys
    packed into the high bits would share one stream.
    """
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, *key: object) -> torch.Generator:
    """Return a separate CPU generator for one use, for example ``stream(seed, "rows", n, epoch)``.

    Random numbers are drawn on the CPU and then moved, so that a GPU gets the same random numbers.
    """
    return torch.Generator().manual_seed(stream_seed(seed, *key))


@contextmanager
def keyed_draws(
    device: torch.device, seed: int, *key: object, host: bool = False
) -> Iterator[None]:
    """Let torch's own generator draw from the stream of ``key`` inside the block.

    Outside the block, the generator continues as before. Threads take turns, because they share
    this generator. This generator serves modules and dropout, which accept no other generator.

    Args:
        device: The device that draws. The CPU's generator is always included.
        seed: The seed of the search.
        *key: The use of the draws, for example ``"dropout", epoch, step``.
        host: Whether the generators of Python and NumPy draw from streams of ``key`` as well.
    """
    devices = [device] if device.type == "cuda" else []
    with GLOBAL_DRAWS, torch.random.fork_rng(devices), _restored_host_generators(host):
        start_stream(device, seed, *key, host=host)
        yield


def start_stream(device: torch.device, seed: int, *key: object, host: bool = False) -> None:
    """Let torch's own generator draw from the stream of ``key`` from now on.

    Call it only inside ``keyed_draws``.
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
    """Let a model that uses random numbers in predictions get the same random numbers in each
    call."""
    return keyed_draws(device, 0, "predict", host=True) if draws else nullcontext()


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Start the generators of Python, NumPy and torch at ``seed`` inside the block.

    The generators are restored afterwards. A thread that needs the generators meanwhile, in another
    search, waits until this block ends.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with GLOBAL_DRAWS, torch.random.fork_rng(devices), _restored_host_generators(True):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


@contextmanager
def _restored_host_generators(enabled: bool) -> Iterator[None]:
    """Restore the state of the generators of Python and NumPy after the block, if ``enabled``."""
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
