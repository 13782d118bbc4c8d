"""Claims: rows in a study file that record which process trains which chunk.

A chunk is a group of trials that train together. Its number is its place in the plan of the search.

Each process has a lock file next to the study. The process holds a lock of the operating system on
this file for as long as it lives. Its claims are rows of the table ``claims`` that name this file.
When the process ends, its claims are void. Time never voids a claim: a stopped process, or a
sleeping laptop, keeps its claims.
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

from gputune.ground.errors import InputError, option
from gputune.ground.types import Json
from gputune.study.database import connect, sqlite_errors, transaction
from gputune.study.file_system import ONE_BY_ONE, network_file_system
from gputune.study.record import has_form
from gputune.study.rows import PlannedChunk
from gputune.study.values import MALFORMED

SETUP = -1
SEARCH = -2
"""Identifiers of the claims that are not for a chunk. Chunks have the numbers 0, 1, ...

``SETUP`` is the right to add to the plan, and ``SEARCH`` is the whole search.
"""

_PLAIN: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Flags of ``os.open`` that follow no link and do not wait for a pipe. Windows has neither."""

_LOOKS = (0.0, 0.002, 0.01)
"""Seconds to wait before each check of another process's lock.

Several checks are needed, because another process that checks also holds the lock for a moment.
"""

_WHOLE_SEARCH = "search"
"""The line in a file of requests that ends the whole search. Other lines are trial numbers."""

PROGRESS = {
    "done": int,
    "of": int,
    "unit": str,
    "best": (float, int, None),
    "left": (float, int, None),
}
"""The keys and types of the progress that a process reports.

``done`` of ``of`` units are finished. ``best`` is the best score so far, and ``left`` is the
remaining time in seconds.
"""


@dataclass(frozen=True)
class Owner:
    """A process that has claimed parts of a search, as its lock file describes the process.

    ``boot`` identifies the running system. Its value changes at each start of the machine.
    """

    host: str
    boot: str
    pid: int
    lock: str

    @property
    def is_near(self) -> bool:
        """True if this process can check the locks of the other process.

        Then the other process runs on this system, or ran on this host before its last start.
        """
        return self.boot == boot() != "" or self.host == platform.node()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host!r}"


_NOBODY = Owner("", "", 0, "")


class Claims(AbstractContextManager["Claims"]):
    """The claims of this process on parts of one search.

    The class is a context manager. Any thread may call it, one at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._absolute = path.resolve()  # absolute: this process may change its folder
        self._pattern = re.compile(re.escape(self._absolute.name) + r"-[0-9a-f]{16}\.lock")
        self._file: int | None = None
        self._lock = ""
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        _OPEN.add(self)
        self.shown()  # which removes the lock files of dead processes

    def take(self, chunk: PlannedChunk) -> bool:
        """Claim a group of trials (a chunk). Return False if another process has the claim, or if
        all results exist."""
        return self._claim(chunk.number, chunk.trials) is None

    def release(self, chunk: PlannedChunk) -> None:
        """Give up the claim on a chunk (a group of trials), so that another process may train it."""
        self._delete("chunk = ? AND lock = ?", chunk.number, self._lock)

    def take_search(self, method: str) -> None:
        """Claim the whole search.

        Raises:
            InputError: another process has the claim. The message names it.
        """
        owner = self._claim(SEARCH)
        if owner is not None:
            raise InputError(
                f"study={str(self.path)!r}",
                f"is in use: {owner} works on this search, and with {option('method', method)} "
                "only one process can choose the trials that continue training",
                remedy=self.remedy(owner),
            )

    def check_sharing(self) -> None:
        """Raise InputError if another process works on a study in a network file system.

        There, locks of files and SQLite are not reliable between machines. One process at a time
        may work on such a study.
        """
        kind = network_file_system(self._absolute)
        if not kind:
            return
        own = self._lock_file()  # first, so that one of two processes sees the other
        for owner in self.owners():
            if owner.lock != own:
                raise InputError(
                    f"study={str(self.path)!r}",
                    f"is on a network file system ({kind}), where only one process at a time can "
                    f"work on a study, but {owner} works on it",
                    remedy=f"{self.remedy(owner)} Or put the study on a local disk. {ONE_BY_ONE}",
                )

    def take_setup(self) -> Owner | None:
        """Claim the right to add trials and chunks to the study. Return the other process that has
        this right, or None on success."""
        return self._claim(SETUP)

    def leave_setup(self) -> None:
        """Release this process's right to add trials and chunks to the study."""
        self._delete("chunk = ? AND lock = ?", SETUP, self._lock)

    def holder(self, chunk: PlannedChunk) -> Owner | None:
        """Return the other process that has claimed a chunk (a group of trials), or None."""
        with self._mutex:
            return self._owner(chunk.number)

    def show(self, progress: Json) -> None:
        """Write the progress of this process to a file next to its lock file, for other
        processes to read."""
        with self._mutex, suppress(OSError):  # a full disk must not end the search
            if self._file is not None:
                path = _progress_file(self._lock_path(self._lock))
                draft = path.with_suffix(".tmp")
                draft.write_text(json.dumps(progress))
                os.replace(draft, path)  # readers never see a partial file

    def shown(self) -> list[tuple[Owner, Json]]:
        """Return the living processes that report their progress, each with its progress
        (``PROGRESS``).

        The call also removes the lock files of dead processes.
        """
        processes = []
        for owner in self.owners():
            with suppress(OSError, *MALFORMED):
                progress = json.loads(_progress_file(self._lock_path(owner.lock)).read_text())
                if has_form(progress, PROGRESS):
                    processes.append((owner, progress))
        return processes

    def owners(self) -> list[Owner]:
        """Return the living processes that work on the study.

        The call also removes the lock files of dead processes.
        """
        owners = []
        folder = self._absolute.parent
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            with suppress(OSError, *MALFORMED):
                owner = self._living_owner(path.name)
                if owner is not None:
                    owners.append(owner)
        return owners

    def request_stop(self, owner: Owner, trial: int | None = None) -> None:
        """Request that another process ends its search, or only one trial of the search."""
        line = _WHOLE_SEARCH if trial is None else str(trial)
        with _request_file(self._lock_path(owner.lock)).open("a") as file:
            file.write(f"{line}\n")

    def stop_requests(self) -> tuple[bool, set[int]]:
        """Return the requests of other processes to this process.

        Returns:
            Whether the search must end, and the numbers of the trials that must end.
        """
        if not self._lock:
            return False, set()
        try:
            lines = _request_file(self._lock_path(self._lock)).read_text().split()
        except (OSError, ValueError):  # no request
            return False, set()
        return _WHOLE_SEARCH in lines, {int(line) for line in lines if line.isdecimal()}

    def close(self) -> None:
        """Release all claims of this process, and remove its lock file."""
        with self._mutex:
            file = self._file
            self._file = None
            try:
                if file is not None:
                    with suppress(OSError, ValueError):  # the rows are void without the file
                        self._delete("lock = ?", self._lock)
            finally:
                # Also after an interrupt, this process must not keep claims that it has given up.
                if file is not None:
                    _remove(self._lock_path(self._lock), file)
                if self._connection is not None:
                    self._connection.close()
                    self._connection = None
            if file is not None:
                self.shown()  # which removes the lock files of dead processes

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self, number: int, trials: Sequence[int] = ()) -> Owner | None:
        """Claim a chunk number, ``SETUP`` or ``SEARCH``. Return None on success, otherwise the
        owner of the claim.

        The owner is ``_NOBODY`` if all the given trials have their results.
        """
        with self._mutex:
            owner = self._owner(number, trials)  # a first check without a lock
            if owner is not None:
                return owner
            connection = self._connect()
            lock = self._lock_file()
            # Checked again under the lock: another process may have made the claim meanwhile.
            with transaction(connection, self.path):
                owner = self._owner(number, trials)
                if owner is None:
                    claim = "INSERT OR REPLACE INTO claims VALUES (?, ?)"
                    connection.execute(claim, (number, lock))
            return owner

    def _owner(self, number: int, trials: Sequence[int] = ()) -> Owner | None:
        connection = self._connect()
        # A stopped trial is not final: it trains again.
        is_final = "SELECT 1 FROM results WHERE number = ? AND state != 'stopped'"
        claim = "SELECT lock FROM claims WHERE chunk = ?"
        with sqlite_errors(self.path):
            if trials and all(connection.execute(is_final, (n,)).fetchone() for n in trials):
                return _NOBODY
            row = connection.execute(claim, (number,)).fetchone()
        if row is None or row[0] == self._lock:
            return None
        return self._living_owner(row[0])

    def _living_owner(self, lock: str) -> Owner | None:
        """Return the process that owns a lock file if that process lives, otherwise None. The call
        removes the lock file of a dead process. The name may come from a stranger's study. gputune
        reads or removes a file only if its name is a lock file name of this study.
        """
        if not self._pattern.fullmatch(lock):
            return None
        path = self._lock_path(lock)
        # Some network file systems allow a lock only to processes that may write.
        access = os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY
        try:
            file = os.open(path, access | _PLAIN)
        except OSError:
            if path.is_file() and not path.is_symlink():
                raise
            return None
        is_dead = False
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            owner = _read_owner(file, lock)
            # Locks may not reach from one host to another. Then a free lock proves nothing about
            # the other host's processes.
            is_dead = owner.is_near and _is_free(file)
            return None if is_dead else owner
        finally:
            if is_dead:
                _remove(path, file)
            else:
                os.close(file)

    def _lock_file(self) -> str:
        """Return the name of this process's lock file. The first call creates the file."""
        try:
            while self._file is None:
                self._make_lock_file()
        except OSError as error:
            raise OSError(
                error.errno,
                f"the lock file of study {str(self.path)!r} cannot be created ({error.strerror}). "
                "Check the disk, the permissions of its folder, and that its file system supports "
                "locks.",
            ) from error
        return self._lock

    def _make_lock_file(self) -> None:
        """Create and lock the lock file of this process. The call has no effect if another process
        removes the file meanwhile."""
        lock = f"{self._absolute.name}-{secrets.token_hex(8)}.lock"
        path = self._lock_path(lock)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            # If the lock fails, another process is about to remove the file.
            if lock_descriptor(file, blocking=False):
                owner = {"host": platform.node(), "boot": boot(), "pid": os.getpid()}
                os.write(file, json.dumps(owner).encode())
                # Another process may have removed the file before it was locked.
                with suppress(FileNotFoundError):
                    if os.fstat(file).st_ino == path.stat().st_ino:
                        self._file = file
                        self._lock = lock
        finally:
            if self._file is None:
                _remove(path, file)

    def _lock_path(self, lock: str) -> Path:
        return self._absolute.with_name(lock)

    def remedy(self, owner: Owner) -> str:
        """Return the advice for an error message if another process holds a claim."""
        if owner.is_near:
            return "Wait for it, or end it."
        lock = str(self._lock_path(owner.lock))
        return (
            f"Wait for that process, or end it. If that process no longer exists, remove {lock!r}."
        )

    def _delete(self, where: str, *values: int | str) -> None:
        with self._mutex, transaction(connection := self._connect(), self.path):
            connection.execute(f"DELETE FROM claims WHERE {where}", values)

    def _connect(self) -> sqlite3.Connection:
        """Return this object's own database connection. Threads that watch workers use the
        connection too."""
        if self._connection is None:
            self._connection = connect(self._absolute, "rw", threads=True)
            # A claim need not survive a power failure, so it does not wait for the disk.
            self._connection.execute("PRAGMA synchronous = NORMAL")
        return self._connection


_OPEN = weakref.WeakSet[Claims]()


def _let_go_in_child() -> None:
    """Close the lock files that a forked child process has inherited from its parent.

    If they stayed open in the child, the locks would outlive the parent.
    """
    for claims in list(_OPEN):
        if claims._file is not None:
            os.close(claims._file)
            claims._file = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@cache
def boot() -> str:
    """Return an identifier of the running system, or "". It changes at the next start of the
    system."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        return subprocess.run(
            ["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True
        ).stdout.strip()
    return ""


def _read_owner(file: int, lock: str) -> Owner:
    os.lseek(file, 1, os.SEEK_SET)  # Windows: the locked first byte cannot be read
    try:
        # the first byte, "{", was skipped
        owner = json.loads(b"{" + os.read(file, 4096))
        return Owner(str(owner["host"]), str(owner["boot"]), int(owner["pid"]), lock)
    except MALFORMED:  # killed before it wrote the file
        return Owner(platform.node(), boot(), 0, lock)


def _is_free(file: int) -> bool:
    """Try to lock a file. Return True if this process now holds the lock, because no other process
    held it."""
    for seconds in _LOOKS:
        time.sleep(seconds)
        if lock_descriptor(file, blocking=False):
            return True
    return False


def _progress_file(lock: Path) -> Path:
    """Return the path of the progress file that belongs to a lock file.

    The progress file is found only through the lock file, so the progress file is removed first.
    """
    return lock.with_suffix(".progress")


def _request_file(lock: Path) -> Path:
    """Return the path of the file with requests to the process that has a lock file."""
    return lock.with_suffix(".stop")


def _remove(lock: Path, file: int) -> None:
    """Remove an open lock file and close it.

    The order matters: if the file were closed first, another process could lock the file before
    this process removes it.
    """
    progress = _progress_file(lock)
    try:
        others = (progress.with_suffix(".tmp"), progress, _request_file(lock))
        for path in (*others, lock):
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(file)
    # Windows cannot remove an open file, so the first attempt failed. This one fails if another
    # process has it open.
    if sys.platform == "win32":
        with suppress(OSError):
            lock.unlink()
