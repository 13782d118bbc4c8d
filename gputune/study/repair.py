"""Save the undamaged rows of a damaged study file into a new file."""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from gputune.ground.annotations import StrPath
from gputune.ground.errors import StudyCorruptError
from gputune.study.database import TABLES, check_study_file, companion, create_file
from gputune.study.record import OPTION_COUNT
from gputune.study.rows import (
    Candidate,
    PlannedChunk,
    Result,
    StoredRow,
    option_from_row,
    read_rows,
)

_MOST_FAILURES = 20_000
"""The number of failed reads after which a repair skips the other rows between damaged pages.

The limit is larger than the count of rows below one interior page of SQLite's tree.
"""

_READERS: dict[str, Callable[..., Iterable[Any]]] = {
    "meta": partial(map, option_from_row),
    "trials": Candidate.from_rows,
    "plan": partial(map, PlannedChunk.from_row),
    "results": Result.from_rows,
}


@dataclass(frozen=True)
class RepairResult:
    """The count of saved rows, and the count of rows that the file is known to have held.

    A trial without a result may have lost its result, or may never have had a result. ``finished``
    is the number of trials with a result.
    """

    options: tuple[int, int]
    trials: tuple[int, int]
    chunks: tuple[int, int]
    finished: int

    @property
    def is_whole_search(self) -> bool:
        """True if the new file has all options of the search, so that the search can continue in
        it."""
        return self.options[0] >= self.options[1]

    def __str__(self) -> str:
        rest = "trials without a result train when the search resumes"
        lines = [
            "options  {} of {}".format(*self.options),
            "trials   {} of {}".format(*self.trials),
            "chunks   {} of {} of the frozen plan".format(*self.chunks),
            f"results  of {self.finished} of the {self.trials[0]} trials; {rest}",
        ]
        if not self.is_whole_search:
            lines.append(
                "Options are lost: the trials can be read, but the search cannot resume in this "
                "file."
            )
        return "\n".join(lines)


def repair(path: StrPath, out: StrPath) -> RepairResult:
    """Save every undamaged row of the study at ``path`` into a new file ``out``.

    The old file is only read. A row is undamaged if SQLite can read it and its checksum fits, so no
    value is ever a guess.

    Args:
        path: the damaged study file.
        out: the path of the new file.

    Returns:
        The counts of saved rows.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        StudyCorruptError: every option and every trial is damaged.
        InputError: ``out`` exists already, or its folder does not exist.
    """
    path = Path(path)
    check_study_file(path)
    with closing(_connect(path)) as connection:
        options, trials, plan, results = (_whole_rows(connection, table) for table in _READERS)
    named = dict(option for _, option in options.values())
    n_options = named.pop(OPTION_COUNT, 0)
    if not named and not trials:
        raise StudyCorruptError(
            None,
            f"{str(path)!r} holds no readable, undamaged row of a study",
            remedy="Check the path, or restore the file from a copy.",
        )
    # With a damaged index, the file may hold an option twice.
    option_rows = {row[0]: row for row, _ in options.values()}
    planned = set[int]()
    chunk_rows = []
    for row, chunk in plan.values():
        planned.update(chunk.trials)
        if trials.keys() >= set(chunk.trials):
            chunk_rows.append(row)
    rows = {
        "meta": list(option_rows.values()),
        "trials": [row for row, _ in trials.values()],
        "plan": chunk_rows,
        "results": [results[number][0] for number in results if number in trials],
    }
    create_file(Path(out), rows, "repair(out={!r})")
    numbers = trials.keys() | results.keys() | planned
    return RepairResult(
        options=(len(named), n_options or max(options, default=1) - 1),
        trials=(len(trials), 1 + max(numbers, default=-1)),
        chunks=(len(chunk_rows), 1 + max(plan, default=-1)),
        finished=sum(row[1] != "stopped" for row in rows["results"]),
    )


def _connect(path: Path) -> sqlite3.Connection:
    """Return a connection that reads the damaged file with its log, or without the log if that
    fails."""
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)
        # Invalid text is replaced instead of raising: its checksum no longer fits.
        connection.text_factory = lambda raw: raw.decode(errors="replace")
        # A damaged record may claim any length, but no value is longer than the file.
        log = companion(path, "-wal")
        size = path.stat().st_size + (log.stat().st_size if log.is_file() else 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max(size, 10_000))
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA trusted_schema = OFF")
            # Without this, SQLite reads nothing from a truncated file.
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            return connection
        connection.close()
    return sqlite3.connect(":memory:")


def _whole_rows(connection: sqlite3.Connection, table: str) -> dict[int, tuple[StoredRow, Any]]:
    """Return the values of the undamaged rows of a table, keyed by rowid. The result is empty if
    the file has lost the table."""
    whole: dict[int, tuple[StoredRow, Any]] = {}
    schema = "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ?"
    with suppress(sqlite3.Error):
        if connection.execute(schema, (table,)).fetchall() != [(TABLES[table],)]:
            return {}
        for rowid, row in sorted(_readable_rows(connection, table).items()):
            # The checksum does not fit, or it fits and the content is unreadable.
            with suppress(ValueError):
                (value,) = read_rows(_READERS[table], [row])
                whole[rowid] = row, value
    return whole


def _readable_rows(connection: sqlite3.Connection, table: str) -> dict[int, StoredRow]:
    """Return the rows of a table that SQLite can still read.

    The table is read from both ends up to the first damaged pages, and rowid by rowid between them.
    """
    rows: dict[int, StoredRow] = {}
    query = f"SELECT rowid, * FROM {table} NOT INDEXED WHERE rowid BETWEEN ? AND ? ORDER BY rowid"

    def read(low: int, high: int, order: str = "ASC") -> bool:
        with suppress(sqlite3.Error):
            for rowid, *row in connection.execute(f"{query} {order}", (low, high)):
                rows[rowid] = tuple(row)
            return True
        return False

    low = 0
    high = 2**63 - 1
    if read(low, high):
        return rows
    low = 1 + max(rows, default=-1)
    read(low, high, "DESC")
    high = min((rowid for rowid in rows if rowid >= low), default=high)
    for _ in range(_MOST_FAILURES):
        if low >= high or read(low, high):
            break
        # continue after the row that cannot be read
        low = next(rowid for rowid in count(low + 1) if rowid not in rows)
    return rows
