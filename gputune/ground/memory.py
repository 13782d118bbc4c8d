"""The main memory that this process can still use, and when Python and C return freed memory.

This module does not import torch, because commands that only read a study must not wait for torch.
"""

import ctypes
import gc
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_PROC = Path("/proc")

# The kernel slows down a group above its "high" limit until it hardly runs.
_V2_LIMITS = ("memory.max", "memory.high")
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
"""Entries of memory.stat that the kernel frees when memory is short, mainly cached files."""

# Parameters of mallopt, from malloc.h of the GNU C library: the number of free bytes at the end of
# the heap from which the library returns memory to the system, and the size from which a block is
# memory of its own, which the library returns when the block is freed.
_TRIM_THRESHOLD = -1
_OWN_MEMORY_THRESHOLD = -3
_LARGEST = 2**31 - 1
# The values that the library chooses for a process that has freed a block of 32 MiB.
_USUAL_OWN_MEMORY = 32 << 20
_USUAL_TRIM = 64 << 20
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
"""Environment variables by which a user sets these values."""

_lock = threading.Lock()
_users = 0


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let this process keep freed memory for its next tensors inside the block.

    Otherwise the GNU C library returns large tensors to the system when they are freed, and the
    system clears each page again when the next tensor uses it. This took a tenth of the time of a
    LoRA search with 256 tokens in a step. At the end of the block, free memory is returned. Other C
    libraries, and values that the user has set in the environment, are left alone.
    """
    global _users
    library = _gnu_allocator()
    if library is None:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _set_thresholds(library, _LARGEST, _LARGEST)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set_thresholds(library, _USUAL_OWN_MEMORY, _USUAL_TRIM)
                library.malloc_trim(0)


def _set_thresholds(library: ctypes.CDLL, own_memory: int, trim: int) -> None:
    """Set the two thresholds of the memory allocator, in bytes."""
    # Older versions of the library refuse more than 32 MiB, and return 0.
    if not library.mallopt(_OWN_MEMORY_THRESHOLD, own_memory):
        library.mallopt(_OWN_MEMORY_THRESHOLD, _USUAL_OWN_MEMORY)
    library.mallopt(_TRIM_THRESHOLD, trim)


@cache
def _gnu_allocator() -> ctypes.CDLL | None:
    """Return the GNU C library, or None if this process has another one or the user has set its
    memory allocator."""
    if any(name in os.environ for name in _SETTINGS) or platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def free_memory() -> int:
    """Return the bytes of main memory that this process can still use.

    The result is the smallest of three byte counts: the memory that the machine has available, the
    rest of ``ulimit -v``, and the rest of each control group of the process. Cached files count as
    free. The result is half of all memory if the system does not say how much is available, and
    ``sys.maxsize`` if the system says nothing.
    """
    limits = [sys.maxsize, *_free_of_groups()]
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        limits.append(
            int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
        )
    except (OSError, StopIteration):
        if sys.platform != "win32":
            with suppress(ValueError):
                limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    if sys.platform != "win32":
        import resource  # not available on Windows

        # limit of the address space: ``ulimit -v``
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            taken = 0
            with suppress(OSError):
                taken = int((_PROC / "self/statm").read_text().split()[0]) * os.sysconf(
                    "SC_PAGE_SIZE"
                )
            limits.append(limit - taken)
    return max(0, min(limits))


def _free_of_groups() -> Iterator[int]:
    """Yield the free bytes of each Linux control group of this process, from its own group up to
    the root."""
    for folder, top, is_v2 in _group_folders():
        while True:
            yield _free_of_group(folder, is_v2=is_v2)
            if folder in (top, folder.parent):
                break
            folder = folder.parent


def _free_of_group(folder: Path, *, is_v2: bool) -> int:
    """Return the bytes that processes of a Linux control group can still use within its limits.

    ``sys.maxsize`` means no limit.
    """
    limits = []
    for name in _V2_LIMITS if is_v2 else ("memory.limit_in_bytes",):
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int((folder / name).read_text()))
    if not limits:
        return sys.maxsize
    used = reclaimable = 0
    with suppress(OSError, ValueError):
        used = int((folder / ("memory.current" if is_v2 else "memory.usage_in_bytes")).read_text())
        # Version 1 has separate "total_" entries that include the groups below.
        prefix = "" if is_v2 else "total_"
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(entries.get(prefix + name, 0)) for name in _RECLAIMABLE)
    return min(limits) - max(0, used - reclaimable)


def _group_folders() -> Iterator[tuple[Path, Path, bool]]:
    """Yield the folder of this process's memory control group, its mount point, and True for
    version 2.

    Version 1 and version 2 can be mounted at the same time; the function then yields both. See man
    7 cgroups and man 5 proc.
    """
    try:
        memberships = (_PROC / "self/cgroup").read_text().splitlines()
        mounts = (_PROC / "self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            paths[controllers == ""] = path
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields = before.split()
        kind, *_, options = after.split()
        is_v2 = kind == "cgroup2"
        is_v1 = kind == "cgroup" and "memory" in options.split(",")
        if not (is_v1 or is_v2) or is_v2 not in paths:
            continue
        root = fields[3]
        top = Path(_unescaped(fields[4]))
        inside = Path(os.path.normpath("/" + paths[is_v2].lstrip("/")))
        if inside.is_relative_to(root):
            folder = top / inside.relative_to(root)
        else:
            folder = top  # a container that sees its own group as the mount point
        yield (folder if folder.is_dir() else top), top, is_v2


def _unescaped(text: str) -> str:
    """Decode the octal escapes in a path of /proc/self/mountinfo, such as ``\\040`` for a blank."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


_MANY = 10_000
"""Above this number of new objects, the next garbage collections skip the new objects."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause Python's garbage collector inside the block, to create many objects faster.

    Among a million new objects there was no garbage, and the collector took a third of the time. In
    a large import the collector also visits all objects that torch has created before. That takes
    as long as the import itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if gc.get_count()[0] > _MANY and not gc.get_freeze_count():
                # Freezing and unfreezing marks the new objects as old without visiting them.
                # Otherwise the next small collection would visit all of them.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
