"""One independent random stream for every use, so that no draw depends on how many others were made."""

import hashlib

import torch


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
