"""Temporary folders that are removed when their process ends, and atomic writes of files.

If a process is killed, the next process removes its folder. The process that makes a folder locks
the folder. The lock belongs to the operating system and ends with the process. The age of a folder
does not matter. gputune first writes a file into such a folder if the file must appear completely
or not at all.
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
    """Create a temporary folder for this process, and remove the folder at the end of the block.

    Also remove folders with the same prefix that earlier processes of this user have left there.

    Args:
        parent: the folder in which the new folder is created. None: the system's temporary folder.
        prefix: beginning of the new folder's name.
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
    """Remove temporary folders of this user from ``parent`` that ended processes have left.

    The process must have run on this host.
    """
    if sys.platform == "win32":  # Windows can lock only files
        return
    name = re.compile(re.escape(_start(prefix)) + "[a-z0-9_]{8}")
    places: list[Path] = []
    with suppress(OSError):  # the folder is missing or cannot be read
        places += (place for place in parent.iterdir() if name.fullmatch(place.name))
    for place in places:
        with suppress(OSError):  # just removed by another process, or not a folder
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if is_users(os.fstat(lock)) and lock_descriptor(lock, blocking=False):
                    shutil.rmtree(place)
            finally:
                os.close(lock)


def cache_folder() -> Path | None:
    """Return the folder ``gputune`` in this user's cache folder (XDG), and create the folder if
    needed.

    Returns None if the folder cannot be created.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Path.home() raises RuntimeError without HOME for a user without an entry in passwd.
    with suppress(OSError, RuntimeError):
        # The XDG specification says to ignore a relative path.
        folder = (base if base.is_absolute() else Path.home() / ".cache") / "gputune"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    return None


def is_users(status: os.stat_result) -> bool:
    """Return True if a file or folder belongs to this user and no other user may write to it.

    The result is always True on Windows.
    """
    return not hasattr(os, "geteuid") or (
        status.st_uid == os.geteuid() and not status.st_mode & 0o022
    )


def open_to_others(path: Path) -> Path | None:
    """Return the first parent folder of a path in which another user could replace the path.

    Returns None if there is no such folder. The folder belongs to another user, or other users may
    write to it. The sticky bit, which ``/tmp`` has, lets users move only their own files.
    """
    if not hasattr(os, "geteuid"):
        return None
    # A person who may write next to a symbolic link could replace the link. So the folders of the
    # link are checked too.
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
"""The user id that owns the system's folders in a container that does not map its root."""


def _is_private_group(group_id: int) -> bool:
    """Return True if this user is the only member of a group, as many systems set it up.

    Root is in all groups.
    """
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
    """Return the beginning of a temporary folder's name: the prefix and a hash of the host name.

    The hash keeps hosts apart, because this host may not see the locks of other hosts on a shared
    folder.
    """
    return f"{prefix}-{zlib.crc32(platform.node().encode()):08x}-"


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """Create a temporary folder, and return its path and the descriptor of its lock (None on
    Windows)."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_start(prefix), dir=parent))
        except OSError as error:  # its path would have a random name
            raise OSError(
                error.errno, f"no file can be made in this folder: {error.strerror}", str(parent)
            ) from error
        if sys.platform == "win32":
            return folder, None
        lock = os.open(folder, os.O_RDONLY)
        # A file system without locks raises OSError. No process can then lock the folder to sweep
        # it.
        with suppress(OSError):
            lock_descriptor(lock, blocking=False)
        with suppress(FileNotFoundError):  # another process removed it before it was locked
            if folder.stat().st_ino == os.fstat(lock).st_ino:
                return folder, lock
        os.close(lock)


def write_files(folder: Path, files: Mapping[str, bytes], *, prefix: str) -> None:
    """Write files into a temporary folder, then move the files to ``folder`` in order."""
    with scratch_folder(folder, prefix=prefix) as drafts:
        for name, content in files.items():
            (drafts / name).write_bytes(content)
            flush(drafts / name)
        for name in files:
            os.replace(drafts / name, folder / name)
    flush(folder)


@contextmanager
def naming_folder(folder: Path, action: str, remedy: str) -> Iterator[None]:
    """Replace an OSError of the block by an OSError that names the failed action, the folder and a
    remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO, f"{action} ({reason}); {remedy}", str(folder)
        ) from error


def no_folder(argument: str, path: Path) -> InputError:
    """Return the InputError for an argument that names a file in a folder which does not exist."""
    rule = f"must be in an existing folder, but {str(path.parent)!r} does not exist"
    return InputError(argument, rule, remedy="Create the folder first.")


def write_text(path: Path, text: str) -> None:
    """Write text to a file atomically: the file gets the whole text or stays unchanged.

    Characters that UTF-8 lacks are written as escapes.
    """
    content = text.encode(errors="backslashreplace")
    if path.exists() and not path.is_file():  # a pipe, a terminal
        path.write_bytes(content)
        return
    place = path.resolve()
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    write_files(place.parent, {place.name: content}, prefix=".draft")


def flush(path: Path) -> None:
    """Make sure that the content of a file, or the list of files in a folder, is on the disk."""
    # Windows cannot open a folder, and flushes only what it may write.
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
