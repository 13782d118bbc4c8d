"""How a study file comes to be: made in a folder of its own beside its path, and given that when it is whole."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from gputune.errors import InputError
from gputune.scratch import scratch_folder
from gputune.study.database import (
    APPLICATION_ID,
    FORMAT_VERSION,
    TABLES,
    connect,
    transaction,
    translated,
    use_wal,
)

DRAFTS = ".study"
"""How the folders of unfinished files begin. What a killed process left is removed when one is made, or a search."""


def create_file(path: Path, fill: Callable[[sqlite3.Connection], object]) -> None:
    """Make a file with our tables and what ``fill`` writes; it appears whole or not at all.

    Raises InputError where something lies at ``path`` already, or where its folder does not exist.
    """
    with _draft(path) as connection, transaction(connection, path):
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        for statement in TABLES.values():
            connection.execute(statement)
        fill(connection)


def copy_file(source: sqlite3.Connection, path: Path) -> None:
    """Write what an open study file holds now into a new file, as ``create_file`` does; claims stay behind."""
    with _draft(path) as connection:
        with translated(path):
            source.backup(connection)
        with transaction(connection, path):
            connection.execute("DELETE FROM claims")


@contextmanager
def _draft(path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a new file in a folder of its own; it gets the name ``path`` when the block has ended well."""
    if path.exists():
        raise _already_exists(path)
    if not path.parent.is_dir():
        raise InputError(
            f"study={str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first."
        )
    with scratch_folder(path.parent, prefix=DRAFTS) as folder:
        draft = folder / "draft.db"
        with closing(connect(draft, "rwc")) as connection:
            yield connection
            # Now, while no other process knows the file: changing the mode later needs it alone.
            use_wal(connection, path)
        _publish(draft, path)


def _publish(draft: Path, path: Path) -> None:
    """Give the finished draft its name, unless another process took the name meanwhile."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise _already_exists(path) from None
    except OSError:  # a file system without hard links
        os.rename(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _already_exists(path: Path) -> InputError:
    return InputError(f"study={str(path)!r} exists already; open it, or give a path that is free.")
