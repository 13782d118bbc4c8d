"""Open, check and write study files with SQLite, and translate SQLite's errors.

A file is first checked through a read-only connection. It is opened for writing only if it is
undamaged, has a known version, and has exactly the tables of a study. A transaction is either on
the disk when it ends, or has no effect. A new file is made in a separate folder next to its path,
and moved there when it is complete.
"""

import errno
import os
import shlex
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from gputune.ground.errors import InputError, StudyCorruptError, StudyVersionError, warn
from gputune.ground.files import (
    check_file,
    check_room,
    flush,
    nearest_entry,
    no_folder,
    scratch_folder,
)
from gputune.study.rows import StoredRow
from gputune.study.values import MALFORMED

APPLICATION_ID = 0x67707475  # "gptu"
FORMAT_VERSION = 3
BUSY_SECONDS = 30.0
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
PRAGMAS = (
    "synchronous = FULL",
    "foreign_keys = ON",
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "schema_version",
)
"""SQLite settings of each connection. The last one makes SQLite read the file, which may fail."""

TABLES = {
    "meta": "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum TEXT NOT NULL) "
    "STRICT",
    "trials": "CREATE TABLE trials (number INTEGER PRIMARY KEY, params TEXT NOT NULL, origin TEXT NOT "
    "NULL, checksum TEXT NOT NULL) STRICT",
    "plan": "CREATE TABLE plan (chunk INTEGER PRIMARY KEY, stage INTEGER NOT NULL, trials TEXT NOT "
    "NULL, facts TEXT NOT NULL, checksum TEXT NOT NULL) STRICT",
    "results": "CREATE TABLE results (number INTEGER PRIMARY KEY REFERENCES trials (number), state TEXT "
    "NOT NULL, score BLOB NOT NULL, fold_scores BLOB NOT NULL, best_epoch INTEGER NOT NULL, "
    "seconds BLOB NOT NULL, curve BLOB NOT NULL, detail TEXT NOT NULL, checksum TEXT NOT "
    "NULL) STRICT",
    "claims": "CREATE TABLE claims (chunk INTEGER PRIMARY KEY, lock TEXT NOT NULL) STRICT",
}
OUTPUTS = (
    "CREATE TABLE outputs (number INTEGER PRIMARY KEY REFERENCES trials (number), epoch INTEGER "
    "NOT NULL, width INTEGER NOT NULL, outputs BLOB NOT NULL, checksum TEXT NOT NULL) STRICT"
)
"""The SQL of the table with the outputs of trials. A file has this table only if outputs were
stored."""


def open_file(path: Path) -> sqlite3.Connection:
    """Return a connection to a checked study file. The connection is read-only if this user may not
    write to the file.

    The connection is in autocommit mode: ``transaction`` begins every transaction.

    Raises:
        FileNotFoundError: the file does not exist.
        StudyCorruptError: the file is damaged, or is not a study.
        StudyVersionError: a newer gputune wrote the file.
    """
    check_study_file(path)
    _check_bytes(path)
    with _closed_on_error(_connect_readonly(path)) as reading:
        _check_content(reading, path)
        if not (os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK)):
            return reading
        try:
            with _closed_on_error(connect(path, "rw")) as writing:
                wal = use_wal(writing, path)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOSPC):
                raise
            warn(
                f"The study is opened read-only: {error.strerror}. Free disk space before you "
                "resume its search."
            )
            return reading
    reading.close()
    if not wal:
        warn(
            f"The file system of study {str(path)!r} does not support SQLite's write-ahead log, so "
            "gputune uses a rollback journal. It is as safe, but readers and writers wait for each "
            "other. Prefer a local disk."
        )
    return writing


def check_study_file(path: Path) -> None:
    """Raise an error if SQLite should not open the file.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: the file is a pipe or a device, or memory cannot hold it.
        StudyCorruptError: a file that SQLite keeps for the study is a pipe or a device.
    """
    if os.path.isdir(path):  # Path.is_dir raises an error for a name that is too long
        inner = next(iter(sorted(path.glob("*.db"))), "the file in it")
        reason = f"there is no study file; this is a folder, give {inner!s}"
        raise FileNotFoundError(errno.ENOENT, reason, str(path))
    if not os.path.exists(path):
        near = nearest_entry(path)
        if near is not None and (near.suffix == ".db" or any(near.glob("*.db"))):
            raise FileNotFoundError(
                f"there is no study file {str(path)!r}; did you mean {str(near)!r}?"
            )
        raise FileNotFoundError(errno.ENOENT, "there is no study file; check the path", str(path))
    check_room(path, check_file(path))
    for ending in ("-wal", "-shm", "-journal"):
        log = companion(path, ending)
        # A folder is left to SQLite, which has its own error for it.
        if log.exists() and not (log.is_file() or log.is_dir()):
            raise damage_error(path, f"{str(log)!r} is not a regular file; remove it")


def companion(path: Path, ending: str) -> Path:
    """Return the path of a file that SQLite keeps next to a study file, such as its journal."""
    path = path.resolve()
    return path.with_name(path.name + ending)


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        yield connection
    except BaseException:
        connection.close()
        raise


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Commit the changes of the block, or leave the file unchanged if the block fails.

    The transaction is IMMEDIATE: SQLite locks the file before the first read.
    """
    with sqlite_errors(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            # SQLite has already rolled back after a full disk or an I/O error.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Translate SQLite's errors into Python exceptions for a full disk, a lock, a missing
    permission or a damaged file."""
    try:
        yield
    except sqlite3.ProgrammingError as error:  # closed, or used from another thread
        raise ValueError(
            f"study {str(path)!r} cannot be used here: {error} Open it again."
        ) from error
    except sqlite3.Error as error:
        raise _python_error(error, path) from error
    except UnicodeDecodeError as error:  # SQLite quotes a damaged schema in its message
        raise damage_error(path, _OTHER_TABLES) from error


_OTHER_TABLES = "its tables are not those of a study"


def damage_error(path: Path, reason: str) -> StudyCorruptError:
    """Return the StudyCorruptError for a damaged study file, with advice on its repair."""
    return StudyCorruptError(
        None,
        f"study {str(path)!r} is damaged: {reason}",
        remedy="Nothing was changed in it. Restore the file from a copy, or save its undamaged "
        f"rows: {_repair_command(path)}",
    )


def _repair_command(path: Path) -> str:
    return f"gputune repair {shlex.quote(str(path))} --out NEW.db"


@contextmanager
def option_errors(path: Path) -> Iterator[None]:
    """Turn errors into StudyCorruptError while gputune restores a search from stored options.

    Such an error shows that gputune never wrote these options.
    """
    try:
        yield
    except InputError:
        raise
    except (*MALFORMED, zlib.error) as error:
        reason = f"no search has its options ({type(error).__name__}: {error})"
        raise damage_error(path, reason) from error


def _python_error(error: sqlite3.Error, path: Path) -> Exception:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    name = f"study {str(path)!r}"
    match code & 0xFF:  # the low byte is the kind of error
        case sqlite3.SQLITE_FULL:
            reason = "the disk is full; committed results are safe; free disk space"
            return OSError(errno.ENOSPC, f"{name}: {reason}")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            reason = f"another process has held its lock for {BUSY_SECONDS:g} s"
            return TimeoutError(errno.ETIMEDOUT, f"{name}: {reason}; wait for it or end it")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            reason = f"may not be written ({error}); check the permissions of its folder"
            return PermissionError(errno.EACCES, f"{name} {reason}")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR:
            remedy = "check the disk, the permissions of its folder and limits on files"
            return OSError(errno.EIO, f"{name}: {error}; {remedy}")
    return damage_error(path, str(error))


def connect(path: Path, mode: str, *, threads: bool = False) -> sqlite3.Connection:
    """Return a connection in autocommit mode. With ``threads``, any thread may use the connection,
    one at a time.
    """
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    with sqlite_errors(path):
        connection = sqlite3.connect(
            uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=not threads
        )
        with _closed_on_error(connection):
            for pragma in PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
    return connection


def _connect_readonly(path: Path) -> sqlite3.Connection:
    try:
        return connect(path, "ro")
    except (OSError, StudyCorruptError):
        log = companion(path, "-wal")
        if log.exists() and log.stat().st_size:
            raise
    # The write-ahead log needs files next to the study even for reading. On a read-only medium
    # without a pending log, the file holds the whole study.
    return connect(path, "ro&immutable=1")


def _check_bytes(path: Path) -> None:
    """Refuse a foreign file, or a file with a rollback journal that names a super-journal.

    This happens before SQLite opens the file: SQLite removes the file that a super-journal names.
    Journals of a study never name a super-journal.
    """
    with path.open("rb") as file:
        header = file.read(100)
    not_a_study = f"{str(path)!r} is not a gputune study"
    if not header:
        raise StudyCorruptError(
            None, f"{not_a_study}: it is empty", remedy="Remove it, or check the path."
        )
    is_sqlite = len(header) == 100 and header[:16] == b"SQLite format 3\x00"
    if not is_sqlite or int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        kind = "an SQLite file of another program" if is_sqlite else "not an SQLite file"
        raise StudyCorruptError(
            None,
            f"{not_a_study}: it is {kind}",
            remedy="Check the path. If it was a study, its first page is damaged. Restore it from "
            f"a copy, or try {_repair_command(path)}.",
        )
    journal = companion(path, "-journal")
    if journal.is_file():
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - len(JOURNAL_MAGIC)))
            if file.read() == JOURNAL_MAGIC:
                raise damage_error(path, f"{str(journal)!r} belongs to another file; remove it")


def _check_content(connection: sqlite3.Connection, path: Path) -> None:
    """Raise an error if the file is damaged, has an unknown version, or has other tables than a
    study.

    Triggers and views are refused too.
    """
    with sqlite_errors(path):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        described = f"study {str(path)!r} has file format {version}"
        if version > FORMAT_VERSION:
            raise StudyVersionError(
                None,
                f"{described}, but this gputune reads formats up to {FORMAT_VERSION}",
                remedy="Upgrade gputune to open it.",
            )
        if version in (1, 2):
            raise StudyVersionError(
                None,
                f"{described}, of a gputune before its first release",
                remedy="Search again with another path.",
            )
        verdict = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
        if verdict != ["ok"]:
            raise damage_error(path, str(verdict[0]).splitlines()[-1])
        schema = dict(
            connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
        )
        orphans = connection.execute("PRAGMA foreign_key_check").fetchall()
    if version < 1 or schema.pop("outputs", OUTPUTS) != OUTPUTS or schema != TABLES:
        raise damage_error(path, _OTHER_TABLES)
    if orphans:
        raise damage_error(path, f"{len(orphans)} results belong to no trial")


def use_wal(connection: sqlite3.Connection, path: Path) -> bool:
    """Switch SQLite to its write-ahead log, and return True if that succeeded.

    SQLite uses the rollback journal if the file system has no shared memory.
    """
    with sqlite_errors(path):
        wal: bool = connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
        if not wal:
            connection.execute("PRAGMA journal_mode = DELETE")
        return wal


DRAFTS = ".study"
"""Prefix of the folders of unfinished files.

Folders of killed processes are removed when the next folder is made, or when a search starts.
"""


_STUDY = "study={!r}"
"""For errors: the template of the argument that passes a new study's path."""


def create_file(
    path: Path, rows: Mapping[str, Iterable[StoredRow]], argument: str = _STUDY
) -> None:
    """Create a study file with the given rows. The file appears complete or not at all.

    Args:
        path: the path of the new file.
        rows: the rows of each table, by the name of the table.
        argument: the template of the argument with the path, for errors.

    Raises:
        InputError: ``path`` exists already, or its folder does not exist.
    """
    with _draft(path, argument) as connection, transaction(connection, path):
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        for table, statement in TABLES.items():
            connection.execute(statement)
            for row in rows.get(table, ()):
                insert(connection, table, row)


def insert(connection: sqlite3.Connection, table: str, row: StoredRow) -> None:
    """Write one row into a table, with the row's checksum as the last value."""
    connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def copy_file(source: sqlite3.Connection, path: Path) -> None:
    """Copy the current content of an open study file, except its claims, to a new file.

    The new file appears complete or not at all.
    """
    with _draft(path, "backup(path={!r})") as connection:
        with sqlite_errors(path):
            source.backup(connection)
        with transaction(connection, path):
            connection.execute("DELETE FROM claims")


@contextmanager
def _draft(path: Path, template: str) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a new file in a separate folder, and rename it to ``path`` at the
    end."""
    argument = template.format(str(path))
    exists_already = InputError(argument, "exists already", remedy="Open it, or pass another path.")
    if path.exists():
        raise exists_already
    if not path.parent.is_dir():
        raise no_folder(argument, path)
    with scratch_folder(path.parent, prefix=DRAFTS) as folder:
        draft = folder / "draft.db"
        with closing(connect(draft, "rwc")) as connection:
            connection.execute("PRAGMA synchronous = OFF")  # flushed once, when complete
            yield connection
            # Here, while no other process knows the file: a later change of the mode needs
            # exclusive access.
            use_wal(connection, path)
        flush(draft)
        try:
            # os.link fails if the name is taken; os.rename would replace that file.
            os.link(draft, path)
        except FileExistsError:  # another process took the name meanwhile
            raise exists_already from None
        except OSError:  # a file system without hard links
            os.rename(draft, path)
        flush(path.parent)
