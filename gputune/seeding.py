"""One independent random stream for every use, so that no draw depends on how many others were made."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GLOBAL_DRAWS = threading.RLock()
"""Held while torch's own generator, which is one for all threads, is at a stream of ours or draws for us."""


def stream_seed(seed: int, *key: object) -> int:
    """Return a 63-bit seed that depends on all bits of ``seed`` and of ``key``.

    The key is hashed, because torch's CPU generator keeps only the low 32 bits of a seed: keys packed into
    the high bits would share one stream.
    """
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, *key: object) -> torch.Generator:
    """Return a CPU generator of its own for one use, for example ``stream(seed, "rows", n, epoch)``.

    Draws are made on the CPU and moved, so that a GPU gives the same numbers.
    """
    return torch.Generator().manual_seed(stream_seed(seed, *key))


@contextmanager
def keyed_draws(device: torch.device, seed: int, *key: object) -> Iterator[None]:
    """Let torch's own generator draw from the stream of ``key`` inside, and go on as before outside.

    One thread at a time, since there is one generator: for what takes no other, as modules and dropout do not.
    """
    with GLOBAL_DRAWS, torch.random.fork_rng([device] if device.type == "cuda" else []):
        start_stream(device, seed, *key)
        yield


def start_stream(device: torch.device, seed: int, *key: object) -> None:
    """Let torch's own generator draw from the stream of ``key`` from now on: within ``keyed_draws`` alone."""
    # Not torch.manual_seed(): that seeds the generators of all devices, and those would not be put back.
    torch.default_generator.manual_seed(stream_seed(seed, *key))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(stream_seed(seed, *key))
