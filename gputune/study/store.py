"""One SQLite file that keeps a study: options, drawn candidates, and each finished trial exactly once.

Tables: ``meta`` (option -> JSON), ``trials`` (the candidates, written before anything trains), ``results``
(at most one row a trial, never replaced). Every row carries a checksum of its key and content. Floats are
raw little-endian float64, because SQLite's REAL turns NaN into NULL and -0.0 into 0. Nothing is pickled.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gputune.errors import InputError
from gputune.study.database import create_file, damaged, open_file, transaction, translated
from gputune.study.score import State
from gputune.study.values import from_json, to_json

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A drawn configuration that waits for its training."""

    number: int
    params: dict[str, Any]
    origin: str | tuple[int, int]
    """"default", "include", "random", or "batch 3" where Optuna's sampler proposed it; a point of a descent has
    (trial number of its start, outer step from 1)."""


@dataclass(frozen=True, eq=False)
class Result:
    """What training one candidate gave. Scores follow scikit-learn: greater is better."""

    number: int
    state: State
    score: float
    fold_scores: Sequence[float]  # (F,)
    best_epoch: int
    seconds: float
    curve: Curve  # (epochs, F)
    detail: Mapping[str, Any] = field(default_factory=dict)  # what the search method keeps of it

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise InputError(f"Result(state=...) must be one of {get_args(State)}, got {self.state!r}.")
        folds = len(self.fold_scores)
        if folds < 1 or self.curve.ndim != 2 or self.curve.shape[1] != folds:
            raise InputError(
                f"Result(curve=...) must be (epochs, F) with a column for each of the fold_scores, got shape "
                f"{self.curve.shape} and {folds} fold_scores in trial {self.number}."
            )


class Store:
    """An open study file. Made by ``Store.create`` or ``Store.open``; a context manager that closes it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def create(cls, path: str | os.PathLike[str], meta: Mapping[str, Any]) -> "Store":
        """Make a new study file that holds ``meta`` and no trials, and open it.

        The file appears whole or not at all. Raises InputError where something lies at ``path`` already,
        where its folder does not exist, or where a value of ``meta`` cannot be written (see ``to_json``).
        """
        path = Path(path)
        texts = [(key, to_json(value, name=f"meta[{key!r}]")) for key, value in meta.items()]
        rows = [(*row, _checksum(*row)) for row in texts]
        create_file(path, lambda draft: draft.executemany("INSERT INTO meta VALUES (?, ?, ?)", rows))
        return cls(path, open_file(path))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Store":
        """Open an existing study file, for reading only where it may not be written.

        Raises FileNotFoundError, StudyCorruptError for a damaged or foreign file, StudyVersionError for one of a
        newer gputune.
        """
        path = Path(path)
        return cls(path, open_file(path))

    @property
    def meta(self) -> dict[str, Any]:
        """The options that the study was created with."""
        rows = self._read("SELECT key, value, checksum FROM meta ORDER BY rowid")
        return {
            key: self._value(f"option {key!r}", checksum, value, key, value) for key, value, checksum in rows
        }

    def add_trials(self, rows: Iterable[Candidate]) -> None:
        """Write candidates, all or none. Raises InputError for a number that is taken."""
        texts = [
            (int(row.number), to_json(row.params, name=f"trial {row.number}"), _origin_text(row.origin))
            for row in rows
        ]
        self._insert("INSERT INTO trials VALUES (?, ?, ?, ?)", texts)

    def finish(self, results: Iterable[Result]) -> None:
        """Write the results of one chunk, all or none; when this returns they are on the disk.

        A trial that a deadline had stopped gets its new result in place of the old one. Raises InputError for one
        that has any other result already (which is never replaced) or that was never added; the file is then as before.
        """
        rows = [
            (
                int(result.number),
                str(result.state),
                _pack([result.score]),
                _pack(result.fold_scores),
                int(result.best_epoch),
                _pack([result.seconds]),
                _pack(result.curve),
                to_json(result.detail, name=f"detail of trial {result.number}"),
            )
            for result in results
        ]
        self._insert(
            "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
            first="DELETE FROM results WHERE number = ? AND state = 'stopped'",
        )

    def trials(self) -> list[tuple[Candidate, Result | None]]:
        """Return every candidate in order of its number, with its result or None where it still waits.

        Raises StudyCorruptError where a row does not fit its checksum; a changed value is never returned.
        """
        query = (
            "SELECT t.number, t.params, t.origin, t.checksum, r.number, r.state, r.score, r.fold_scores,"
            " r.best_epoch, r.seconds, r.curve, r.detail, r.checksum"
            " FROM trials t LEFT JOIN results r ON r.number = t.number ORDER BY t.number"
        )
        return [(self._candidate(*row[:4]), self._result(*row[4:])) for row in self._read(query)]

    def close(self) -> None:
        """Close the file. Everything was on the disk before; closing twice does nothing."""
        self._connection.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _candidate(self, number: int, params: str, origin: str, checksum: str) -> Candidate:
        value = self._value(f"trial {number}", checksum, params, number, params, origin)
        return Candidate(number, value, _origin(origin))

    def _result(self, number: int | None, *row: Any) -> Result | None:
        if number is None:
            return None
        what = f"the result of trial {number}"
        *values, checksum = row
        self._verify(what, checksum, number, *values)
        state, score, fold_scores, best_epoch, seconds, curve, detail = values
        folds = _unpack(fold_scores)
        try:
            return Result(
                number=number,
                state=state,
                score=_unpack(score).item(),
                fold_scores=tuple(folds.tolist()),
                best_epoch=best_epoch,
                seconds=_unpack(seconds).item(),
                curve=_unpack(curve).reshape(-1, len(folds)),
                detail=from_json(detail),
            )
        except ValueError as error:
            raise damaged(self.path, f"{what} cannot be read ({error})") from error

    def _verify(self, what: str, checksum: str, *row: object) -> None:
        if checksum != _checksum(*row):
            raise damaged(self.path, f"{what} does not fit its checksum")

    def _value(self, what: str, checksum: str, text: str, *row: object) -> Any:
        self._verify(what, checksum, *row)
        try:
            return from_json(text)
        except ValueError as error:
            raise damaged(self.path, f"{what} cannot be read ({error})") from error

    def _read(self, query: str) -> list[tuple[Any, ...]]:
        with translated(self.path):
            return self._connection.execute(query).fetchall()

    def _insert(self, statement: str, rows: Sequence[tuple[Any, ...]], *, first: str | None = None) -> None:
        with transaction(self._connection, self.path):
            for row in rows:
                try:
                    if first is not None:
                        self._connection.execute(first, row[:1])
                    self._connection.execute(statement, (*row, _checksum(*row)))
                except sqlite3.IntegrityError as error:
                    never_added = error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
                    raise InputError(
                        f"study {str(self.path)!r}: trial {row[0]} "
                        f"{'was never added' if never_added else 'is there already and is never replaced'}; "
                        "nothing was written. Two processes may be at work on one study, or it is another one."
                    ) from error


def _origin_text(origin: str | tuple[int, int]) -> str:
    return origin if isinstance(origin, str) else "{}:{}".format(*origin)


def _origin(text: str) -> str | tuple[int, int]:
    start, colon, step = text.partition(":")
    return (int(start), int(step)) if colon and start.isdigit() and step.isdigit() else text


def _pack(values: Sequence[float] | Curve) -> bytes:
    return np.ascontiguousarray(values, dtype="<f8").tobytes()


def _unpack(raw: bytes) -> Curve:
    return np.frombuffer(raw, dtype="<f8").astype(np.float64)


def _checksum(*values: object) -> str:
    """64 bits of SHA-256 over the values, each led by its type and length so that no two rows read alike."""
    digest = hashlib.sha256()
    for value in values:
        raw = value if isinstance(value, bytes) else str(value).encode()
        digest.update(f"{type(value).__name__}:{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()[:16]
