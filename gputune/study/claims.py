"""Which process trains which chunk of a study: claims that are void when their process is.

A process holds a lock of the operating system on a file of its own beside the study for as long as
it lives; its claims are rows of the table ``claims`` that name this file. Nobody takes a claim over
because time has passed: a process that is stopped, or a laptop that sleeps, keeps what it has.
"""

import json
import os
import platform
import re
import secrets
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import lock_descriptor

from gputune.errors import InputError
from gputune.study.database import connect, sqlite_errors, transaction
from gputune.study.record import has_form
from gputune.study.rows import Chunk
from gputune.study.values import MALFORMED
from gputune.types import Json

SETUP = -1
SEARCH = -2
"""What is claimed beside the chunks 0, 1, ...: adding to the plan, and the whole search."""

_PLAIN: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Of ``os.open``: no link is followed, and no pipe waited for. Windows has neither."""

_LOOKS = (0.0, 0.002, 0.01)
"""Seconds before each look at a lock: another process that looks has it for a moment too."""

PROGRESS = {
    "done": int,
    "of": int,
    "unit": str,
    "best": (float, int, None),
    "left": (float, int, None),
}
"""How far a process is: so many of so many units, the best score so far, and the seconds that are
left."""


@dataclass(frozen=True)
class Owner:
    """A process that holds claims, as its lock file describes it; ``boot`` is an identity of the
    running system."""

    host: str
    boot: str
    pid: int
    lock: str

    @property
    def is_near(self) -> bool:
        """Whether its locks reach this process: it runs on this system, or ran before the last
        start of this host."""
        return self.boot == boot() != "" or self.host == platform.node()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host!r}"


_NOBODY = Owner("", "", 0, "")


class Claims(AbstractContextManager["Claims"]):
    """The claims of this process on one study. A context manager; any thread may ask, one at a
    time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = path.resolve()  # wherever this process goes meanwhile
        self._pattern = re.compile(re.escape(self._whole.name) + r"-[0-9a-f]{16}\.lock")
        self._file: int | None = None
        self._lock = ""
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        _OPEN.add(self)
        self.shown()  # which removes the lock files of dead processes

    def take(self, chunk: Chunk) -> bool:
        """Claim a chunk; say no where another process has it, or where all its results are
        there."""
        return self._claim(chunk.number, chunk.trials) is None

    def take_search(self, method: str) -> None:
        """Claim the whole search. Raises InputError where another process has it, which it
        names."""
        if (owner := self._claim(SEARCH)) is not None:
            raise InputError(
                f"study={str(self.path)!r}: {owner} is at work on this search, and one process "
                f"alone decides which trials of method={method!r} train on. {self.remedy(owner)}"
            )

    def take_setup(self) -> Owner | None:
        """Claim the right to add trials and chunks; return who has it, or None where it is ours
        now."""
        return self._claim(SETUP)

    def leave_setup(self) -> None:
        """Let others add trials and chunks."""
        self._delete("chunk = ? AND lock = ?", SETUP, self._lock)

    def holder(self, chunk: Chunk) -> Owner | None:
        """Return the other process that has a chunk, or None."""
        with self._mutex:
            return self._owner(chunk.number)

    def show(self, progress: Json) -> None:
        """Say to whoever looks at the study how far this process is, in a file beside its lock
        file."""
        with self._mutex, suppress(OSError):  # a full disk must not end the search
            if self._file is not None:
                place = _beside(self._whole.with_name(self._lock))
                draft = place.with_suffix(".tmp")
                draft.write_text(json.dumps(progress))
                os.replace(draft, place)  # whoever reads it has it whole

    def shown(self) -> list[tuple[Owner, Json]]:
        """Return the processes that live and say how far they are, with what they say: see
        ``PROGRESS``."""
        found = []
        folder = self._whole.parent
        for place in sorted(folder.iterdir()) if folder.is_dir() else ():
            with suppress(OSError, *MALFORMED):
                if (owner := self._alive(place.name)) is not None and (
                    said := _beside(place)
                ).is_file():
                    progress = json.loads(said.read_text())
                    if has_form(progress, PROGRESS):
                        found.append((owner, progress))
        return found

    def close(self) -> None:
        """Give up all claims, and remove the lock file."""
        with self._mutex:
            file = self._file
            self._file = None
            try:
                if file is not None:
                    with suppress(OSError, ValueError):  # the rows are void without the file
                        self._delete("lock = ?", self._lock)
            finally:
                # an interrupt must not leave this process in possession of what it has given up
                if file is not None:
                    _remove(self._whole.with_name(self._lock), file)
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
            if file is not None:
                self.shown()  # which removes the lock files of dead processes

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self, number: int, trials: Sequence[int] = ()) -> Owner | None:
        """Claim; return None where it is ours now, else its owner: nobody where all these trials
        have their results."""
        with self._mutex:
            if (owner := self._owner(number, trials)) is None:  # a look that locks nobody out
                connection = self._connect()
                lock = self._lock_file()
                with transaction(connection, self.path):
                    if (owner := self._owner(number, trials)) is None:
                        connection.execute(
                            "INSERT OR REPLACE INTO claims VALUES (?, ?)", (number, lock)
                        )
            return owner

    def _owner(self, number: int, trials: Sequence[int] = ()) -> Owner | None:
        connection = self._connect()
        is_final = "SELECT 1 FROM results WHERE number = ? AND state != 'stopped'"
        with sqlite_errors(self.path):
            if trials and all(connection.execute(is_final, (n,)).fetchone() for n in trials):
                return _NOBODY
            row = connection.execute(
                "SELECT lock FROM claims WHERE chunk = ?", (number,)
            ).fetchone()
        return None if row is None or row[0] == self._lock else self._alive(row[0])

    def _alive(self, lock: str) -> Owner | None:
        """Return the owner of a lock file while that process lives, else None; the file of a dead
        one is removed.

        The name may come from a study of somebody else: what is no lock file of this study is
        neither read nor removed.
        """
        if not self._pattern.fullmatch(lock):
            return None
        place = self._whole.with_name(lock)
        try:
            # Some network file systems lock for those alone who may write.
            file = os.open(
                place, (os.O_RDWR if os.access(place, os.W_OK) else os.O_RDONLY) | _PLAIN
            )
        except OSError:
            if place.is_file() and not place.is_symlink():
                raise
            return None
        is_dead = False
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            owner = _read_owner(file, lock)
            # Where locks do not reach from one host to another, a free one says nothing of that
            # host's processes.
            is_dead = owner.is_near and any(
                lock_descriptor(file, blocking=False) for _ in map(time.sleep, _LOOKS)
            )
            return None if is_dead else owner
        finally:
            _remove(place, file) if is_dead else os.close(file)

    def _lock_file(self) -> str:
        """Make the lock file of this process when it is first needed; return its name."""
        try:
            while self._file is None:
                lock = f"{self._whole.name}-{secrets.token_hex(8)}.lock"
                place = self._whole.with_name(lock)
                file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                try:
                    # else another process is just about to sweep it
                    if lock_descriptor(file, blocking=False):
                        me = {"host": platform.node(), "boot": boot(), "pid": os.getpid()}
                        os.write(file, json.dumps(me).encode())
                        # another process swept it before it was locked
                        with suppress(FileNotFoundError):
                            if os.fstat(file).st_ino == place.stat().st_ino:
                                self._file = file
                                self._lock = lock
                finally:
                    if self._file is None:
                        _remove(place, file)
        except OSError as error:
            raise OSError(
                error.errno,
                f"study {str(self.path)!r}: its lock file cannot be made ({error.strerror}); "
                "check the disk, the rights of its folder, and that its file system has locks",
            ) from error
        return self._lock

    def remedy(self, owner: Owner) -> str:
        """Return what can be done about another process that has a claim."""
        gone = f"; where it is gone for good, remove {str(self._whole.with_name(owner.lock))!r}"
        return f"Wait for it, or end it{'' if owner.is_near else gone}."

    def _delete(self, where: str, *values: int | str) -> None:
        with self._mutex, transaction(connection := self._connect(), self.path):
            connection.execute(f"DELETE FROM claims WHERE {where}", values)

    def _connect(self) -> sqlite3.Connection:
        """A connection of our own: the threads that look after workers ask too."""
        if self._connection is None:
            self._connection = connect(self._whole, "rw", threads=True)
            # A claim need not outlive the power, so it need not wait for the disk.
            self._connection.execute("PRAGMA synchronous = NORMAL")
        return self._connection


_OPEN = weakref.WeakSet[Claims]()


def _let_go_in_child() -> None:
    """Close the lock files that a forked child has from its parent: open there, they would outlive
    the parent."""
    for claims in list(_OPEN):
        if claims._file is not None:
            os.close(claims._file)
            claims._file = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@cache
def boot() -> str:
    """Return an identity of the running system that is another one after its next start; "" where
    there is none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        return subprocess.run(
            ["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True
        ).stdout.strip()
    return ""


def _read_owner(file: int, lock: str) -> Owner:
    os.lseek(file, 1, os.SEEK_SET)  # Windows lets nobody read the byte that is locked, the first
    try:
        owner = json.loads(b"{" + os.read(file, 4096))
        return Owner(str(owner["host"]), str(owner["boot"]), int(owner["pid"]), lock)
    except MALFORMED:  # killed before it had written it
        return Owner(platform.node(), boot(), 0, lock)


def _beside(lock: Path) -> Path:
    """Return the place of what a process says beside its lock file; it is found by that alone, and
    goes before it."""
    return lock.with_suffix(".progress")


def _remove(place: Path, file: int) -> None:
    """Remove an open lock file and close it: closed first, it could be another process's by the
    time it is removed."""
    try:
        for one in (_beside(place).with_suffix(".tmp"), _beside(place), place):
            with suppress(OSError):
                one.unlink()
    finally:
        os.close(file)
    # which removes nothing that is open, here or in the process whose it is
    if sys.platform == "win32":
        with suppress(OSError):
            place.unlink()
