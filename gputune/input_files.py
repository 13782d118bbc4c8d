"""Checks of the files that gputune reads, before they are opened.

Every reader of data, studies and models calls these checks first. A read from a pipe would wait
forever, a device has no end, and a small file can describe more values than memory holds. Therefore
gputune checks the kind of a file before it opens it, and the size before the content takes memory.
"""

import os
import re
import stat
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO

from gputune.errors import InputError
from gputune.main_memory import free_memory
from gputune.text import nearest, size_words

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
