"""How much main memory this process may still take.

Torch is not imported, since a study is read without it.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")

# a group above its "high" limit is slowed down until it hardly moves
_V2_LIMITS = ("memory.max", "memory.high")
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")
"""Entries of a group's memory.stat that the kernel gives up when memory is short: cached files,
mainly."""


def free_memory() -> int:
    """Return the bytes of main memory that this process may still take.

    This is the least of what the machine has available, what ``ulimit -v`` leaves, and what each
    control group of the process leaves. Cached files count as free. It is half of all memory if the
    system does not say what is available, and ``sys.maxsize`` if the system says nothing.
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
        import resource  # which Windows has not

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # of addresses: ``ulimit -v``
        if limit != resource.RLIM_INFINITY:
            taken = 0
            with suppress(OSError):
                taken = int((_PROC / "self/statm").read_text().split()[0]) * os.sysconf(
                    "SC_PAGE_SIZE"
                )
            limits.append(limit - taken)
    return max(0, min(limits))


def _free_of_groups() -> Iterator[int]:
    """Yield the bytes that each control group of this process leaves, from its own group up to the
    root."""
    for folder, top, is_v2 in _group_folders():
        while True:
            yield _free_of_group(folder, is_v2=is_v2)
            if folder in (top, folder.parent):
                break
            folder = folder.parent


def _free_of_group(folder: Path, *, is_v2: bool) -> int:
    """Return the bytes that the limits of one control group leave; ``sys.maxsize`` if it has no
    limit."""
    limits = []
    for name in _V2_LIMITS if is_v2 else ("memory.limit_in_bytes",):
        with suppress(OSError, ValueError):  # "max": no limit
            limits.append(int((folder / name).read_text()))
    if not limits:
        return sys.maxsize
    used = reclaimable = 0
    with suppress(OSError, ValueError):
        used = int((folder / ("memory.current" if is_v2 else "memory.usage_in_bytes")).read_text())
        # Version 1 counts the groups below in entries of their own.
        prefix = "" if is_v2 else "total_"
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(entries.get(prefix + name, 0)) for name in _RECLAIMABLE)
    return min(limits) - max(0, used - reclaimable)


def _group_folders() -> Iterator[tuple[Path, Path, bool]]:
    """Yield the folder of this process's memory group, the mount point above it, and whether it is
    of version 2.

    Version 1 and version 2 can be mounted at the same time; then both are yielded. See man 7
    cgroups and man 5 proc.
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
    """Return a path of mountinfo, in which blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
