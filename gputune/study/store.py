"""One SQLite file that keeps a study: options, candidates, the plan, and each result exactly once.

Tables:

- ``meta``: option -> JSON.
- ``trials``: the candidates, written before they train.
- ``plan``: the chunks (groups of trials that train together), which never change.
- ``results``: at most one row per trial. Only the result of a stopped trial is replaced.
- ``claims``: the process that trains each chunk; see ``claims.py``.
- ``outputs``: outputs of the best trials. A file has this table only if outputs were kept.
"""

import errno
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import numpy as np

from gputune.ground.annotations import StrPath
from gputune.ground.errors import InputError
from gputune.ground.memory import without_collector
from gputune.ground.types import Outputs, beyond_limit
from gputune.study import database
from gputune.study.database import damage_error, sqlite_errors, transaction
from gputune.study.record import OPTION_COUNT, lost_option
from gputune.study.rows import (
    Candidate,
    Curve,
    PlannedChunk,
    Result,
    StoredRow,
    StoredValue,
    checksum,
    option_from_row,
    option_to_row,
    outputs_from_row,
    outputs_to_row,
    read_rows,
)

_ROWS = {
    "meta": "option {!r}",
    "trials": "trial {}",
    "plan": "chunk {} of the plan",
    "results": "the result of trial {}",
    "outputs": "the row of outputs of trial {}",
}
"""The name of a row in error messages, keyed by table. The first value of the row replaces the
braces."""

_AT_ONCE = 100
"""The count of rows that gputune reads together. With more rows, gputune needs more memory, and
more time to allocate this memory."""

__all__ = ["Candidate", "Curve", "PlannedChunk", "Result", "Store"]

CachedRow = TypeVar("CachedRow", Candidate, PlannedChunk, Result)


class Meta(dict[str, Any]):
    """The options of a study file.

    An option that a repair could not save raises StudyCorruptError when it is read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, key: str) -> object:
        raise lost_option(self.path, key)


class Store(AbstractContextManager["Store"]):
    """An open study file, made by ``Store.create`` or ``Store.open``.

    It is a context manager that closes the file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._absolute = path.absolute()  # absolute: this process may change its folder
        self._file = path.stat()
        # A cache of rows that never change: all candidates and chunks, and the final results.
        # ``results`` adds stopped results too, and drops them at its next call.
        self._candidates: dict[int, Candidate] = {}
        self._chunks: dict[int, PlannedChunk] = {}
        self._results: dict[int, Result] = {}

    @classmethod
    def create(cls, path: StrPath, meta: Mapping[str, object]) -> Self:
        """Create a study file that holds ``meta`` and no trials, and open it.

        The file appears complete or not at all.

        Args:
            path: the path of the new file.
            meta: the options by name.

        Raises:
            InputError: ``path`` exists already, its folder does not exist, or an option cannot be
                written (see ``to_json``).
        """
        options = {OPTION_COUNT: len(meta), **meta}
        rows = [option_to_row(name, option) for name, option in options.items()]
        database.create_file(Path(path), {"meta": [(*row, checksum(*row)) for row in rows]})
        return cls.open(path)

    @classmethod
    def open(cls, path: StrPath) -> Self:
        """Open an existing study file. The file is opened read-only if it may not be written.

        Raises:
            FileNotFoundError: the file does not exist.
            StudyCorruptError: the file is damaged, or is not a study.
            StudyVersionError: the file has another format.
        """
        path = Path(path)
        return cls(path, database.open_file(path))

    @property
    def meta(self) -> Meta:
        """The options with which the study was created."""
        options = Meta(self.path)
        options |= self._rows("meta", partial(map, option_from_row))
        options.pop(OPTION_COUNT, None)
        if "numbers" in options:  # the only behavior before this option existed
            options.setdefault("columns", "drop-constant")
        return options

    def note(self, notes: Iterable[str]) -> None:
        """Add notes for the user to the option ``notes``. Notes that are already in the option are
        not repeated."""
        self.replace_option("notes", list(dict.fromkeys([*self.meta["notes"], *notes])))

    def replace_option(self, name: str, option: object) -> None:
        """Write a new value for an existing option of the file."""
        key, value = option_to_row(name, option)
        self._check_place()
        with transaction(self._connection, self.path):
            change = "UPDATE meta SET value = ?, checksum = ? WHERE key = ?"
            self._connection.execute(change, (value, checksum(key, value), key))

    def add_trials(self, candidates: Iterable[Candidate]) -> None:
        """Write all given candidates into the file, or none of them.

        Raises:
            InputError: a number is already taken.
        """
        self._insert("trials", [candidate.to_row() for candidate in candidates])

    def add_chunks(self, chunks: Iterable[PlannedChunk]) -> None:
        """Write all given chunks into the plan, or none of them. The plan's chunks never change.

        Raises:
            InputError: a number is already taken.
        """
        self._insert("plan", [chunk.to_row() for chunk in chunks])

    def finish(
        self, results: Iterable[Result], outputs: Mapping[int, Outputs] = MappingProxyType({})
    ) -> None:
        """Write all results of one chunk, or none of them. Then write the outputs of the trials.

        The results are on the disk when this returns. A trial that a deadline had stopped gets its
        new result in place of the old one. The outputs are a second transaction. If it fails, the
        results stay.

        Args:
            results: the results of the chunk.
            outputs: outputs by the number of a trial. Outputs are kept up to a limit. Above it, the
                outputs of the worst trials are dropped.

        Raises:
            InputError: a trial has a final result already, which is never replaced, or was never
                added.
        """
        self._insert("results", [result.to_row() for result in results])
        if not outputs:
            return
        self._check_place()
        replacement = "INSERT OR REPLACE INTO outputs VALUES (?, ?, ?, ?, ?)"
        query = (
            "SELECT number, length(outputs), substr(score, 1, 8) FROM outputs JOIN results USING "
            "(number)"
        )
        with transaction(self._connection, self.path):
            execute = self._connection.execute
            # Not in ``OUTPUTS`` itself, which must equal the SQL that SQLite stores: SQLite leaves
            # out IF NOT EXISTS.
            execute(database.OUTPUTS.replace("TABLE", "TABLE IF NOT EXISTS"))
            for number, output in outputs.items():  # replaces outputs left from a lost result
                row = outputs_to_row(number, output)
                execute(replacement, (*row, checksum(*row)))
            sizes = {}
            scores = {}
            for number, size, score in execute(query).fetchall():
                sizes[number] = size
                scores[number] = float(np.frombuffer(score, "<f8")[0])
            for number in beyond_limit(sizes, scores):
                execute("DELETE FROM outputs WHERE number = ?", (number,))

    def trials(
        self, numbers: Collection[int] | None = None
    ) -> list[tuple[Candidate, Result | None]]:
        """Return candidates in order of trial number, each with its result or None.

        Args:
            numbers: the trial numbers, or None for all trials.

        Raises:
            StudyCorruptError: a row does not fit its checksum. A changed value is never returned.
        """
        if numbers is None:
            candidates = self.candidates()
            results = self.results()
        else:
            candidates = self._rows("trials", Candidate.from_rows, numbers)
            results = _by_number(self._rows("results", Result.from_rows, numbers))
        return [(candidate, results.get(candidate.number)) for candidate in candidates]

    def candidates(self) -> list[Candidate]:
        """Return every candidate in order of its number.

        Raises:
            StudyCorruptError: a row is damaged.
        """
        return self._all("trials", Candidate.from_rows, self._candidates)

    def results(self) -> dict[int, Result]:
        """Return every result by the number of its trial, in that order.

        Raises:
            StudyCorruptError: a row is damaged.
        """
        # Stopped results are read again, because another result may have replaced them.
        final = [result for result in self._results.values() if result.state != "stopped"]
        self._results = _by_number(final)
        return _by_number(self._all("results", Result.from_rows, self._results))

    def n_finished(self) -> int:
        """Return the number of trials with a final result."""
        return self._count("results WHERE state != 'stopped'")

    def n_waiting(self) -> int:
        """Return the number of trials without a final result, which includes stopped trials."""
        return self._count("trials") - self.n_finished()

    def plan(self) -> list[PlannedChunk]:
        """Return the planned groups of trials that always train together (chunks), by chunk number.

        Raises:
            StudyCorruptError: a row is damaged.
        """
        return self._all("plan", partial(map, PlannedChunk.from_row), self._chunks)

    def backup(self, path: StrPath) -> None:
        """Write the current study to a new file, complete or not at all, even while other processes
        write to the study. The new file has no claims.

        Raises:
            InputError: ``path`` exists already, or its folder does not exist.
        """
        database.copy_file(self._connection, Path(path))

    def outputs(self, numbers: Collection[int]) -> dict[int, Outputs]:
        """Return the stored outputs of the trials with the given trial numbers.

        Raises:
            StudyCorruptError: a row is damaged.
        """
        if not self._read("SELECT 1 FROM sqlite_schema WHERE name = 'outputs'"):
            return {}
        return dict(self._rows("outputs", partial(map, outputs_from_row), numbers))

    def close(self) -> None:
        """Close the file. All data are already on the disk. Closing twice has no effect."""
        self._connection.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(
        self,
        table: str,
        make: Callable[..., Iterable[StoredValue]],
        numbers: Collection[int] | None = None,
    ) -> list[StoredValue]:
        """Return the values of all rows of a table, or of the rows with the given trial or chunk
        numbers.

        ``make`` receives the columns of some rows, without their checksums. It returns one value
        for each row.

        Raises:
            StudyCorruptError: a row is damaged.
        """
        condition = ""
        parameters: tuple[str, ...] = ()
        if numbers is not None:
            # The rowid is the first column: the number of the trial or chunk.
            condition = "WHERE rowid IN (SELECT value FROM json_each(?))"
            parameters = (json.dumps(list(numbers)),)
        query = f"SELECT * FROM {table} {condition} ORDER BY rowid"
        values: list[StoredValue] = []
        with without_collector(), sqlite_errors(self.path):
            cursor = self._connection.execute(query, parameters)
            while rows := cursor.fetchmany(_AT_ONCE):
                try:
                    values += read_rows(make, rows)
                except ValueError:  # a damaged row, or rows of different lengths
                    values += self._single_rows(table, make, rows)
        return values

    def _single_rows(
        self, table: str, make: Callable[..., Iterable[StoredValue]], rows: Iterable[StoredRow]
    ) -> Iterator[StoredValue]:
        for row in rows:
            try:
                yield from read_rows(make, [row])
            except ValueError as error:
                reason = f"{_ROWS[table].format(row[0])} {error}"
                raise damage_error(self.path, reason) from error

    def _all(
        self, table: str, make: Callable[..., Iterable[CachedRow]], known: dict[int, CachedRow]
    ) -> list[CachedRow]:
        """Return the values of a table with rows that never change. The call does not read rows in
        ``known`` again."""
        if self._count(table) != len(known):
            numbers = None
            if known:
                rowids = self._read(f"SELECT rowid FROM {table}")
                numbers = {rowid for (rowid,) in rowids} - known.keys()
            known |= _by_number(self._rows(table, make, numbers))
        return [known[number] for number in sorted(known)]

    def _count(self, rows: str) -> int:
        return int(self._read(f"SELECT count(*) FROM {rows}")[0][0])

    def _read(self, query: str) -> list[StoredRow]:
        with sqlite_errors(self.path):
            return self._connection.execute(query).fetchall()

    def _check_place(self) -> None:
        """Raise OSError if the study file is no longer at its path, because new results might then
        be lost.
        """
        with suppress(OSError):
            if os.path.samestat(self._absolute.stat(), self._file):
                return
        raise OSError(
            errno.ESTALE,
            f"study {str(self.path)!r} was removed, moved or replaced during its search. It holds "
            "all results that were finished before. If it was moved, move it back with the files "
            "next to it, and resume the search",
        )

    def _insert(self, table: str, rows: Iterable[StoredRow]) -> None:
        self._check_place()
        with transaction(self._connection, self.path):
            for row in rows:
                # Only the result of a stopped trial may be replaced.
                if table == "results":
                    stopped = "DELETE FROM results WHERE number = ? AND state = 'stopped'"
                    self._connection.execute(stopped, row[:1])
                try:
                    database.insert(self._connection, table, (*row, checksum(*row)))
                except sqlite3.IntegrityError as error:
                    raise self._conflict(table, row[0], error) from error

    def _conflict(self, table: str, number: int, error: sqlite3.IntegrityError) -> InputError:
        """Return the error for a trial or chunk that SQLite refuses to write."""
        kind = "chunk" if table == "plan" else "trial"
        reason = "exists already and is never replaced"
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
            reason = "was never added"
        return InputError(
            None,
            f"study {str(self.path)!r}: {kind} {number} {reason}, so nothing was written",
            remedy="Two processes may be working on one study, or the file holds another study.",
        )


def _by_number(rows: Iterable[CachedRow]) -> dict[int, CachedRow]:
    return {row.number: row for row in rows}


def state_folder(study: Path) -> Path:
    """Return the folder with the checkpoints of a study: ``study.db.state`` next to ``study.db``."""
    return Path(f"{study}.state")


def has_checkpoints(study: Path) -> bool:
    """Return whether a study has checkpoints, from which its trials can continue."""
    return any(state_folder(study).glob("*.safetensors"))
