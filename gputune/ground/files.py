"""Checks of the files that gputune reads, temporary folders, and atomic writes.

Every reader of data, studies and models checks a file before it opens the file. A read from a pipe
would wait forever, a device has no end, and a small file can describe more values than memory
holds. Therefore gputune checks the kind of a file first, and the size before the content takes
memory.

A file that must appear completely or not at all is first written into a temporary folder. The
process that makes a temporary folder locks it. The lock belongs to the operating system and ends
with the process, so the next process can remove the folder of a process that was killed. The age of
a folder does not matter.
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
from itertools import islice
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from gputune.ground.errors import InputError
from gputune.ground.memory import free_memory
from gputune.ground.text import nearest, size_words

MISSING_TABLE = "give a CSV or Parquet file or 'sklearn:iris'"
"""Advice for the error message if the file of a table is missing."""
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def check_file(
    path: Path, *, missing: str = "check the path", folder: str = "give the file in it"
) -> int:
    """Check that a path is a readable file, and return its size in bytes. A symbolic link to a file
    is valid.

    Args:
        path: the file that will be read.
        missing: advice for the user if the file does not exist.
        folder: advice for the user if the path is a folder.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: a folder of the path may not be entered.
        InputError: the path is a folder, a pipe, a socket, a device or a link to itself.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        message = f"there is no file {str(path)!r}; {_remedy(path, missing)}"
        raise FileNotFoundError(message if message.endswith("?") else f"{message}.") from None
    except PermissionError:
        raise _no_permission(path) from None
    except (OSError, ValueError) as error:  # a link to itself, a name that is too long or has a NUL
        reason = getattr(error, "strerror", None) or str(error)
        rule = f"{str(path)!r:.300} cannot be read: {reason.lower()}"
        raise InputError(None, rule, remedy="Check the path.") from None
    _check_mode(path, status.st_mode, folder)
    return status.st_size


def open_file(
    path: Path, *, missing: str = "check the path", folder: str = "give the file in it"
) -> IO[bytes]:
    """Open a file for reading after checking that the path is a file.

    Raises the errors of ``check_file``, and PermissionError if the user may not read the file.
    """
    check_file(path, missing=missing, folder=folder)
    # A pipe can replace the file after the check. Without O_NONBLOCK, opening the pipe would wait.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        raise _no_permission(path) from None
    file = os.fdopen(descriptor, "rb")
    try:
        _check_mode(path, os.fstat(descriptor).st_mode, folder)
    except BaseException:
        file.close()
        raise
    return file


def read_file(path: Path, *, bytes_per_byte: int = 1, missing: str = "check the path") -> bytes:
    """Check and read a file, and return its content as bytes.

    Args:
        path: the file.
        bytes_per_byte: bytes of memory that reading and decoding one byte of the file needs.
        missing: advice for the user if the file does not exist.

    Raises:
        InputError: the content does not fit into memory, or the path is not a file.
    """
    with open_file(path, missing=missing) as file:
        size = os.fstat(file.fileno()).st_size
        check_room(path, size * bytes_per_byte)
        return file.read(size)


def check_room(path: Path, needed: int, free: int | None = None) -> None:
    """Raise InputError if the content of a file needs more memory than is free.

    Args:
        path: the file.
        needed: bytes of memory that the content of the file needs.
        free: bytes of free memory. None: measure the free memory.
    """
    if free is None:
        free = free_memory()
    if needed > free:
        raise InputError(
            None,
            f"{str(path)!r} needs about {size_words(needed)} of memory or more, but only "
            f"{size_words(free)} are free",
            remedy="Leave out rows or columns, or use a machine with more memory.",
        )


def check_model_folder(folder: Path) -> None:
    """Raise FileNotFoundError if the folder of a saved model does not exist."""
    if not folder.is_dir():
        near = nearest_entry(folder)
        remedy = "Check the path." if near is None else f"Did you mean {str(near)!r}?"
        raise FileNotFoundError(f"there is no model folder {str(folder)!r}. {remedy}")


def _check_mode(path: Path, mode: int, folder: str) -> None:
    if stat.S_ISDIR(mode):
        remedy = f"{folder[0].upper()}{folder[1:]}."
        raise InputError(None, f"{str(path)!r} is a folder", remedy=remedy)
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            remedy = "Write the content into a file first."
            raise InputError(None, f"{str(path)!r} is {kind}, not a file", remedy=remedy)


def _remedy(path: Path, missing: str) -> str:
    if str(path) == "-":
        return "write standard input into a file first"
    if _URL.match(str(path)):
        return "download the URL into a file first"
    if path.is_symlink():
        return "the path is a link to a file that does not exist"
    near = nearest_entry(path)
    return missing if near is None else f"did you mean {str(near)!r}?"


def nearest_entry(path: Path) -> Path | None:
    """Return the file or folder with the most similar name next to a missing path, or None."""
    with suppress(OSError):  # there is no such folder, or it may not be read
        # Only the first 1000 names are compared, because a folder may be large.
        names = {entry.name for entry in islice(path.parent.iterdir(), 1000)} - {path.name}
        near = nearest(path.name, sorted(names))
        return None if near is None else path.with_name(near)
    return None


def _no_permission(path: Path) -> PermissionError:
    return PermissionError(
        f"{str(path)!r} may not be read; check the permissions of the file and of its folders."
    )


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
