"""What is whole in a damaged study file, saved into a new one."""

import os
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gputune.errors import StudyCorruptError
from gputune.study.carving import carve
from gputune.study.new_file import create_file
from gputune.study.rows import HOW_MANY, Chunk, Row, candidate_of, chunk_of, result_of
from gputune.study.values import from_json

Rows = dict[int, Row]


@dataclass(frozen=True)
class Repaired:
    """How many rows were saved, and out of how many that the file is known to have held.

    Whether a trial without a result had one cannot be known; ``finished`` is the number of those that have one.
    """

    options: tuple[int, int]
    trials: tuple[int, int]
    chunks: tuple[int, int]
    finished: int

    @property
    def is_whole_search(self) -> bool:
        """Whether the search can go on in the new file."""
        return self.options[0] >= self.options[1]

    def __str__(self) -> str:
        trials = self.trials[0]
        lines = [
            f"options  {self.options[0]} of {self.options[1]}",
            f"trials   {trials} of {self.trials[1]}",
            f"chunks   {self.chunks[0]} of {self.chunks[1]} of the frozen plan",
            f"results  of {self.finished} of the {trials} trials; what has none is trained when the search goes on",
        ]
        if not self.is_whole_search:
            lines.append(
                "Options are lost: the trials can be read, and the search cannot go on in this file."
            )
        return "\n".join(lines)


def repair(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Repaired:
    """Save every whole row of the study at ``path`` into a new file ``out``; the old one is only read.

    Whole is a row whose checksum fits, so no value is ever a guess. Raises FileNotFoundError; StudyCorruptError where
    no option and no trial is whole; InputError where ``out`` exists already, or its folder does not.
    """
    options: dict[str, tuple[int, Row]] = {}  # a page that was freed may hold a row once more
    trials: Rows = {}
    plan: Rows = {}
    chunks: dict[int, Chunk] = {}
    results: Rows = {}
    for rowid, row in carve(Path(path)):
        with suppress(ValueError, LookupError, TypeError):  # its checksum fits, and nobody can read it
            match row:
                case (str(), str(), _):
                    from_json(row[1])
                    options[row[0]] = (rowid, row)
                case (int(), str(), str(), _):
                    candidate_of(*row[:-1])
                    trials[rowid] = row
                case (int(), int(), str(), str(), _):
                    plan[rowid], chunks[rowid] = row, chunk_of(*row[:-1])
                case (int(), str(), bytes(), bytes(), int(), bytes(), bytes(), str(), _):
                    result_of(*row[:-1])
                    if (
                        row[1] != "stopped" or rowid not in results
                    ):  # one that was stopped may have been replaced
                        results[rowid] = row
    known = from_json(options[HOW_MANY][1][1]) if HOW_MANY in options else 0
    named = options.keys() - {HOW_MANY}
    if not named and not trials:
        raise StudyCorruptError(f"{str(path)!r} holds no whole row of a study; check the path.")
    numbers = {*trials, *results, *(number for chunk in chunks.values() for number in chunk.trials)}
    whole = {n: plan[n] for n, chunk in chunks.items() if trials.keys() >= set(chunk.trials)}
    kept = {n: row for n, row in results.items() if n in trials}

    def fill(connection: sqlite3.Connection) -> None:
        for table, rows in (
            ("meta", dict(options.values())),
            ("trials", trials),
            ("plan", whole),
            ("results", kept),
        ):
            for _, row in sorted(rows.items()):
                places = ", ".join("?" * len(row))
                connection.execute(f"INSERT INTO {table} VALUES ({places})", row)

    create_file(Path(out), fill)
    return Repaired(
        options=(len(named), known or max((rowid for rowid, _ in options.values()), default=1) - 1),
        trials=(len(trials), 1 + max(numbers, default=-1)),
        chunks=(len(whole), 1 + max(plan, default=-1)),
        finished=sum(row[1] != "stopped" for row in kept.values()),
    )
