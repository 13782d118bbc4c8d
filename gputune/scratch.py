"""Folders for as long as their process works: removed at the end, and by the next process where
this one was killed.

Each is locked by the process that made it, a lock of the operating system that ends with the
process. Nothing is removed because it is old. In such a folder files are written that are to appear
whole or not at all.
"""

import errno
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from gputune.errors import InputError


@contextmanager
def scratch_folder(parent: Path | None = None, *, prefix: str = "gputune") -> Iterator[Path]:
    """Make a folder for this process alone in ``parent`` (None: that of temporary files), and
    remove it at the end.

    What processes of this user that have ended left there under the same prefix is removed too.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(parent, prefix=prefix)
    folder, lock = _locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path, *, prefix: str) -> None:
    """Remove the scratch folders of this user in ``parent`` whose processes on this host have
    ended."""
    if sys.platform == "win32":  # which locks files alone
        return
    name = re.compile(re.escape(_start(prefix)) + "[a-z0-9_]{8}")
    places: list[Path] = []
    with suppress(OSError):  # no folder, or one that cannot be read
        places += (place for place in parent.iterdir() if name.fullmatch(place.name))
    for place in places:
        with suppress(OSError):  # it has just gone, or is no folder
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if is_users(os.fstat(lock)) and lock_descriptor(lock, blocking=False):
                    shutil.rmtree(place)
            finally:
                os.close(lock)


def cache_folder() -> Path | None:
    """Return the folder ``gputune`` in this user's caches (XDG), made where it is missing; None
    where none can be."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # RuntimeError: no HOME, and a user without an entry in passwd
    with suppress(OSError, RuntimeError):
        # a relative one is to be ignored
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "gputune"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    return None


def is_users(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and no other may write to it; taken for
    granted on Windows."""
    return not hasattr(os, "geteuid") or (
        status.st_uid == os.geteuid() and not status.st_mode & 0o022
    )


def open_to_others(path: Path) -> Path | None:
    """Return the folder above a path in which another user could put something else in its place,
    or None.

    That is a folder of another user, or one that others may write to. The sticky bit, which
    ``/tmp`` has, lets nobody move what is not theirs.
    """
    if not hasattr(os, "geteuid"):
        return None
    # If there is a link on the way, whoever writes beside the link could replace that too.
    above = dict.fromkeys([*path.absolute().parents, *path.resolve().parents])
    for folder in above:
        status = folder.stat()
        is_trusted = status.st_uid in (os.geteuid(), 0, _UNKNOWN_USER)
        shared = status.st_mode & (
            stat.S_IWOTH if _is_private_group(status.st_gid) else stat.S_IWOTH | stat.S_IWGRP
        )
        if not is_trusted or (shared and not status.st_mode & stat.S_ISVTX):
            return folder
    return None


_UNKNOWN_USER = 65534
"""Who owns the system's folders in a container that does not map its root."""


def _is_private_group(group_id: int) -> bool:
    """Whether a group is that of one user alone, as many systems make one for each user. Root is in
    all groups."""
    if sys.platform == "win32":
        return False
    import grp
    import pwd

    with suppress(KeyError):
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(group_id)
        is_own = group_id == user.pw_gid and group.gr_name == user.pw_name
        return group_id == 0 or (is_own and set(group.gr_mem) <= {user.pw_name})
    return False


def _start(prefix: str) -> str:
    """Begin a name with the host: where folders are shared, the locks of other hosts may not be
    seen here."""
    return f"{prefix}-{zlib.crc32(platform.node().encode()):08x}-"


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_start(prefix), dir=parent))
        except OSError as error:  # whose path is of a name that nobody has chosen
            raise OSError(
                error.errno, f"no file can be made in this folder: {error.strerror}", str(parent)
            ) from error
        if sys.platform == "win32":
            return folder, None
        lock = os.open(folder, os.O_RDONLY)
        # a file system without locks, where nobody gets one to sweep with either
        with suppress(OSError):
            lock_descriptor(lock, blocking=False)
        with suppress(FileNotFoundError):  # another process swept it before it was locked
            if folder.stat().st_ino == os.fstat(lock).st_ino:
                return folder, lock
        os.close(lock)


def write_files(folder: Path, files: Mapping[str, bytes], *, prefix: str) -> None:
    """Write all files in a scratch folder, then put them in their place in ``folder``, in order."""
    with scratch_folder(folder, prefix=prefix) as drafts:
        for name, content in files.items():
            (drafts / name).write_bytes(content)
            flush(drafts / name)
        for name in files:
            os.replace(drafts / name, folder / name)
    flush(folder)


@contextmanager
def naming_folder(folder: Path, action: str, remedy: str) -> Iterator[None]:
    """Let an OSError inside say what could not be done, in which folder, and what to do about
    it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO, f"{action} ({reason}); {remedy}", str(folder)
        ) from error


def no_folder(argument: str, path: Path) -> InputError:
    """Return the error of an ``argument``, as its door calls it, whose file would lie in a folder
    that is not there."""
    return InputError(f"{argument}: the folder {str(path.parent)!r} does not exist; make it first.")


def write_text(path: Path, text: str) -> None:
    """Write text to a file, which has it whole or stays as it was; what UTF-8 lacks is written as
    an escape."""
    content = text.encode(errors="backslashreplace")
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_bytes(content)
        return
    place = path.resolve()
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    write_files(place.parent, {place.name: content}, prefix=".draft")


def flush(path: Path) -> None:
    """Put on the disk what a file holds, or which files a folder has."""
    # which opens no folder, and flushes what it may write
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
