"""How much main memory this process may still take."""

import os
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_GROUP = Path("/sys/fs/cgroup/memory.max")  # as a container sees its own


def free_memory() -> int:
    """Return bytes of main memory: what is available, cached files included, or less where a limit is set.

    Half of all memory where the system does not say what is available; no limit where it says nothing.
    """
    return max(0, min(_available(), _within_limit(), _of_group()))


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError):
        return sys.maxsize


def _within_limit() -> int:
    """Bytes of addresses left under the process's own limit (``ulimit -v``)."""
    if resource is None:
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        taken = 0
    return limit - taken


def _of_group() -> int:
    try:
        return int(_GROUP.read_text())
    except (OSError, ValueError):  # "max": no limit
        return sys.maxsize
