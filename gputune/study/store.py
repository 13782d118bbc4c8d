"""One SQLite file that keeps a study: options, drawn candidates, the plan, and each finished trial exactly once.

Tables: ``meta`` (option -> JSON), ``trials`` (the candidates, written before anything trains), ``plan`` (the chunks
in which they train, frozen when they are planned), ``results`` (at most one row a trial, never replaced) and ``claims``
(which process trains which chunk; see ``claims.py``).
"""

import errno
import gc
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from gputune.errors import InputError
from gputune.study.database import copy_file, create_file, damaged, insert, open_file, transaction, translated
from gputune.study.record import lost_option
from gputune.study.rows import (
    HOW_MANY,
    Candidate,
    Chunk,
    Curve,
    Option,
    Result,
    Row,
    TrialState,
    Value,
    checksum,
    read_detail,
    read_row,
)
from gputune.types import Json

_TRIAL = "number", "params", "origin", "checksum"
_RESULT = "number", "state", "score", "fold_scores", "best_epoch", "seconds", "curve", "detail", "checksum"
_TABLES = "FROM trials LEFT JOIN results ON results.number = trials.number"

__all__ = ["Candidate", "Chunk", "Curve", "Result", "Store"]


OtherValue = TypeVar("OtherValue")
States = list[tuple[TrialState, Json, int]]
"""How many trials there are of each state and detail."""


class Meta(dict[str, Any]):
    """The options of a study file; one that a repair could not save says so where it is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, key: str) -> object:
        raise lost_option(self.path, key)


class Store:
    """An open study file. Made by ``Store.create`` or ``Store.open``; a context manager that closes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._whole = path.absolute()  # wherever this process goes meanwhile
        self._file = path.stat()

    @classmethod
    def create(cls, path: str | os.PathLike[str], meta: Mapping[str, object]) -> Self:
        """Make a new study file that holds ``meta`` and no trials, and open it.

        The file appears whole or not at all. Raises InputError where something lies at ``path`` already,
        where its folder does not exist, or where a value of ``meta`` cannot be written (see ``to_json``).
        """
        rows = [Option(key, value).to_row() for key, value in {HOW_MANY: len(meta), **meta}.items()]

        def fill(draft: sqlite3.Connection) -> None:
            for row in rows:
                insert(draft, "meta", (*row, checksum(*row)))

        create_file(Path(path), fill)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open an existing study file, for reading only where it may not be written.

        Raises FileNotFoundError, StudyCorruptError for a damaged or foreign file, StudyVersionError for one of another
        format.
        """
        path = Path(path)
        return cls(path, open_file(path))

    @property
    def meta(self) -> Meta:
        """The options that the study was created with."""
        options = Meta(self.path)
        for row in self._read("SELECT key, value, checksum FROM meta ORDER BY rowid"):
            option = self._checked(f"option {row[0]!r}", Option.from_row, row)
            options[option.key] = option.value
        options.pop(HOW_MANY, None)
        if "numbers" in options:  # a search from before the option did this
            options.setdefault("columns", "drop-constant")
        return options

    def note(self, notes: Iterable[str]) -> None:
        """Add notes, those that are not there yet, to the option of that name."""
        key, value = Option("notes", list(dict.fromkeys([*self.meta["notes"], *notes]))).to_row()
        self._check_place()
        with transaction(self._connection, self.path):
            change = "UPDATE meta SET value = ?, checksum = ? WHERE key = ?"
            self._connection.execute(change, (value, checksum(key, value), key))

    def add_trials(self, candidates: Iterable[Candidate]) -> None:
        """Write candidates, all or none. Raises InputError for a number that is taken."""
        self._insert("trials", [candidate.to_row() for candidate in candidates])

    def add_chunks(self, chunks: Iterable[Chunk]) -> None:
        """Freeze chunks of the plan, all or none. Raises InputError for a number that is taken."""
        self._insert("plan", [chunk.to_row() for chunk in chunks])

    def finish(self, results: Iterable[Result]) -> None:
        """Write the results of one chunk, all or none; when this returns they are on the disk.

        A trial that a deadline had stopped gets its new result in place of the old one. Raises InputError for one
        that has any other result already (which is never replaced) or that was never added; the file is then as before.
        """
        self._insert("results", [result.to_row() for result in results])

    def trials(self, number: int | None = None) -> list[tuple[Candidate, Result | None]]:
        """Return every candidate, or that of a number, in their order, each with its result or None where it waits.

        Raises StudyCorruptError where a row does not fit its checksum; a changed value is never returned.
        """
        return self._trials(Candidate.from_row, Result.from_row, number)

    def check(self) -> set[int]:
        """Hold each trial and result against its checksum; return the numbers of the results."""
        return {result[0] for _, result in self._trials(_values, _values) if result is not None}

    def candidates(self) -> list[Candidate]:
        """Return every candidate in order of its number. Raises StudyCorruptError."""
        rows = self._read(f"SELECT {', '.join(_TRIAL)} FROM trials ORDER BY number")
        with no_collecting():
            return [self._checked(f"trial {row[0]}", Candidate.from_row, row) for row in rows]

    def states(self) -> States:
        """Return how many trials there are of each state and detail. Nothing is held against a checksum."""
        groups = self._read("SELECT state, detail, count(*) FROM results GROUP BY state, detail")
        try:
            known = [(state, read_detail(detail), number) for state, detail, number in groups]
        except (ValueError, TypeError) as error:
            raise damaged(self.path, f"a result cannot be read ({error})") from error
        ((trials,),) = self._read("SELECT count(*) FROM trials")
        waiting = trials - sum(number for *_, number in known)
        return [*known, ("waiting", {}, waiting)] if waiting else known

    def best(self) -> int | None:
        """Return the number of the trial that is best by ``rank``, None where no score is finite."""
        rows = self._read("SELECT number, state = 'pruned', substr(score, 1, 8) FROM results ORDER BY number")
        try:
            scores = np.frombuffer(b"".join(score for *_, score in rows), dtype="<f8", count=len(rows))
        except (ValueError, TypeError) as error:
            raise damaged(self.path, f"the score of a result cannot be read ({error})") from error
        pruned = np.array([is_pruned for _, is_pruned, _ in rows], dtype=bool)
        best = int(np.lexsort((-scores, pruned, ~np.isfinite(scores)))[0]) if rows else 0
        return rows[best][0] if rows and np.isfinite(scores[best]) else None

    def finished(self) -> int:
        """Return how many trials have a result that stays."""
        return int(self._read("SELECT count(*) FROM results WHERE state != 'stopped'")[0][0])

    def waiting(self) -> int:
        """Return how many trials have no result that stays."""
        (rows,) = self._read("SELECT count(*) FROM trials")
        return int(rows[0]) - self.finished()

    def plan(self) -> list[Chunk]:
        """Return the chunks that were frozen, in order of their numbers. Raises StudyCorruptError."""
        rows = self._read("SELECT chunk, stage, trials, facts, checksum FROM plan ORDER BY chunk")
        return [self._checked(f"chunk {row[0]} of the plan", Chunk.from_row, row) for row in rows]

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write the study as it is now into a new file, whole or not at all, whoever writes meanwhile.

        Raises InputError where something lies at ``path`` already, or where its folder does not exist.
        """
        copy_file(self._connection, Path(path))

    def close(self) -> None:
        """Close the file. Everything was on the disk before; closing twice does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, what: str, make: Callable[..., Value], row: Row) -> Value:
        """Return what a row says; raises StudyCorruptError where it is damaged."""
        try:
            return read_row(make, row)
        except ValueError as error:
            raise damaged(self.path, f"{what} {error}") from error

    def _trials(
        self,
        of_trial: Callable[..., Value],
        of_result: Callable[..., OtherValue],
        number: int | None = None,
    ) -> list[tuple[Value, OtherValue | None]]:
        names = [
            f"{table}.{name}" for table, names in (("trials", _TRIAL), ("results", _RESULT)) for name in names
        ]
        one = "" if number is None else f"WHERE trials.number = {number:d}"
        values: list[tuple[Value, OtherValue | None]] = []
        with no_collecting():
            for row in self._read(f"SELECT {', '.join(names)} {_TABLES} {one} ORDER BY trials.number"):
                result = None
                trial = self._checked(f"trial {row[0]}", of_trial, row[:4])
                if row[4] is not None:
                    result = self._checked(f"the result of trial {row[4]}", of_result, row[4:])
                values.append((trial, result))
        return values

    def _read(self, query: str) -> list[Row]:
        with translated(self.path):
            return self._connection.execute(query).fetchall()

    def _check_place(self) -> None:
        """Raise OSError where the file is not at its path any more: what is written to it then may be in none."""
        try:
            there = os.path.samestat(self._whole.stat(), self._file)
        except OSError:
            there = False
        if not there:
            raise OSError(
                errno.ESTALE,
                f"study {str(self.path)!r} was removed, moved or replaced while it was at work; where it was moved, "
                "put it back, with the files beside it, and go on: what was finished before is in it",
            )

    def _insert(self, table: str, rows: Iterable[Row]) -> None:
        self._check_place()
        with transaction(self._connection, self.path):
            for row in rows:
                try:
                    if table == "results":
                        self._connection.execute(
                            "DELETE FROM results WHERE number = ? AND state = 'stopped'", row[:1]
                        )
                    insert(self._connection, table, (*row, checksum(*row)))
                except sqlite3.IntegrityError as error:
                    never_added = error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
                    raise InputError(
                        f"study {str(self.path)!r}: {'chunk' if table == 'plan' else 'trial'} {row[0]} "
                        f"{'was never added' if never_added else 'is there already and is never replaced'}; "
                        "nothing was written. Two processes may be at work on one study, or it is another one."
                    ) from error


def _values(*values: object) -> Row:
    return values


@contextmanager
def no_collecting() -> Iterator[None]:
    """Hold the garbage collector back: of a million new objects none is garbage, and it took a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
