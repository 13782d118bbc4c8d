"""The ledger: the trials of a running search, its plan and its results.

It is kept in memory, and in a study file if the search has one.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gputune.data.source import table_size
from gputune.errors import InputError
from gputune.garbage import without_collector
from gputune.scratch import sweep
from gputune.study.claims import Claims
from gputune.study.database import DRAFTS, damage_error
from gputune.study.record import DIRECTIONS, IDENTITY, SearchRecord
from gputune.study.store import Candidate, PlannedChunk, Result, Store
from gputune.text import count
from gputune.types import Json, Outputs, drop_beyond_limit

_LOOK = 0.2
"""Seconds between two checks for results of another process."""

_PATIENCE = 2.0
"""Seconds of waiting for another process that adds trials, before the user is informed."""

Cut = Callable[[Sequence[Candidate]], Sequence[tuple[Sequence[int], int, int]]]
"""Function that cuts candidates into chunks.

For each chunk it returns the positions of its candidates in order, the number of threads, and the
number of chunks that may train at once.
"""


class Ledger:
    """The candidates of a search in the order of their numbers, their chunks, and the finished
    results.

    Other processes may work on the same study file: ``refresh`` reads their changes.
    """

    def __init__(self, store: Store | None, claims: Claims | None = None) -> None:
        self.store = store
        self.claims = claims
        self.candidates: list[Candidate] = []
        self.plan: list[PlannedChunk] = []
        self.results: dict[int, Result] = {}
        self.kept: list[int] = []
        """Numbers of the trials with results that ``finish`` has kept."""
        self.outputs: dict[int, Outputs] = {}
        """Outputs by trial number, if there is no file to hold them."""
        self.on_finish: Callable[[list[tuple[Candidate, Result | None]]], None] | None = None
        """Called after ``finish`` has kept results, with the kept trials."""
        self.on_wait: Callable[[str], None] | None = None
        """Called repeatedly while another process keeps this one from planning.

        It receives a message that names that process. It may raise an error to end the wait.
        """
        # Trials that an earlier call's deadline stopped train again. Until then their old results
        # count.
        self._stopped: dict[int, Result] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the study file again, if there is one."""
        if self.store is None:
            return
        with without_collector():
            self.candidates = self.store.candidates()
            self.plan = self.store.plan()
            results = self.store.results()
        self._stopped = {
            number: result for number, result in results.items() if result.state == "stopped"
        }
        self.results = {
            number: result for number, result in results.items() if result.state != "stopped"
        }

    def add(self, new: Sequence[Candidate]) -> None:
        """Add new candidates before anything trains."""
        if self.store is not None and new:
            self.store.add_trials(new)
        self.candidates += new

    def note(self, notes: Sequence[str]) -> None:
        """Add notes to the study file, if there is one."""
        if self.store is not None:
            self.store.note(notes)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from adding candidates or chunks within the block.

        The ledger is refreshed first, so it has everything that others have added.
        """
        if self.claims is None:
            yield
            return
        begin = time.monotonic()
        while (owner := self.claims.take_setup()) is not None:
            if self.on_wait is not None and time.monotonic() - begin > _PATIENCE:
                self.on_wait(
                    f"study {str(self.claims.path)!r}: {owner} has been adding trials to it, and "
                    f"others wait. {self.claims.remedy(owner)}"
                )
            time.sleep(_LOOK)
        try:
            self.refresh()
            yield
        finally:
            self.claims.leave_setup()

    def claim_search(self, method: str) -> None:
        """Claim the whole search.

        Raises:
            InputError: another process works on the search. The message names it.
        """
        if self.claims is not None:
            self.claims.take_search(method)
            self.refresh()

    def chunks(self, trials: Sequence[Candidate], stage: int, cut: Cut) -> list[PlannedChunk]:
        """Return the frozen chunks of a stage that hold these trials.

        Trials without a chunk are cut into new chunks first.
        """
        if self._without_plan(trials, stage):
            with self.alone():
                # Checked again: another process may just have planned these trials.
                if left := self._without_plan(trials, stage):
                    first = 1 + max((chunk.number for chunk in self.plan), default=-1)
                    new = [
                        PlannedChunk(
                            number,
                            stage,
                            tuple(left[position].number for position in part),
                            threads,
                            at_once,
                        )
                        for number, (part, threads, at_once) in enumerate(cut(left), first)
                    ]
                    if self.store is not None:
                        self.store.add_chunks(new)
                    self.plan += new
        numbers = {trial.number for trial in trials}
        return [
            chunk
            for chunk in self.plan
            if chunk.stage == stage and not numbers.isdisjoint(chunk.trials)
        ]

    def _without_plan(self, trials: Sequence[Candidate], stage: int) -> list[Candidate]:
        planned = {number for chunk in self.plan if chunk.stage == stage for number in chunk.trials}
        return [trial for trial in trials if trial.number not in planned]

    def show(self, progress: Json) -> None:
        """Report the progress of this process to other processes, if there is a file."""
        if self.claims is not None:
            self.claims.show(progress)

    def claim(self, chunk: PlannedChunk) -> bool:
        """Return True if this process may train a chunk.

        Then the chunk is not finished and no other process trains it.
        """
        return self.claims is None or self.claims.take(chunk)

    def owners_of(self, chunks: Sequence[PlannedChunk]) -> tuple[str, str]:
        """Return the other processes that have chunks, and the advice on one of them on another
        host.

        Both are text.
        """
        assert self.claims is not None
        owners = [owner for owner in map(self.claims.holder, chunks) if owner is not None]
        remedies = [self.claims.remedy(owner) for owner in owners if not owner.is_near]
        return ", ".join(sorted(set(map(str, owners)))) or "another process", next(
            iter(remedies), ""
        )

    def wait(self, chunks: Sequence[PlannedChunk], is_over: Callable[[], bool]) -> None:
        """Wait until another process has finished a result or a chunk's owner is gone, or until
        ``is_over``."""
        assert self.store is not None and self.claims is not None
        finished = self.store.finished()
        while (
            not is_over()
            and self.store.finished() == finished
            and all(map(self.claims.holder, chunks))
        ):
            time.sleep(_LOOK)
        self.refresh()

    def waiting(self) -> list[Candidate]:
        """Return the candidates without a result."""
        return [candidate for candidate in self.candidates if candidate.number not in self.results]

    def has_waiting(self) -> bool:
        """Return True if the file has a trial without a final result, of this or another
        process."""
        return self.store is not None and self.store.waiting() > 0

    def finish(
        self, results: Sequence[Result], outputs: Mapping[int, Outputs] = MappingProxyType({})
    ) -> None:
        """Keep the results of one chunk, all or none. Existing results stay unchanged.

        Args:
            results: the results of the chunk.
            outputs: outputs by trial number. They are kept if their trial is complete and they are
                from its best epoch.
        """
        new = {result.number: result for result in results if result.number not in self.results}
        best = {r.number: r.best_epoch for r in new.values() if r.state == "complete"}
        outputs = {n: one for n, one in outputs.items() if best.get(n) == one.epoch}
        if self.store is not None:
            self.store.finish(new.values(), outputs)
        self.results |= new
        self.kept += new
        if self.store is None:
            self.outputs |= outputs
            drop_beyond_limit(
                self.outputs, {number: self.results[number].score for number in self.outputs}
            )
        if self.on_finish is not None and new:
            self.on_finish([(c, new[c.number]) for c in self.candidates if c.number in new])

    def rows(self) -> list[tuple[Candidate, Result | None]]:
        """Return every candidate with its result."""
        known = {**self._stopped, **self.results}
        with without_collector():
            return [(candidate, known.get(candidate.number)) for candidate in self.candidates]


def differences(there: SearchRecord, here: SearchRecord) -> list[str]:
    """Return the differences between a call and the search in its file, as text."""
    values = {
        # Files without max_levels come from a version that always used 32.
        name: [
            getattr(r, name) if name not in r.absent or name == "max_levels" else None
            for r in (there, here)
        ]
        for name in IDENTITY
    }
    names = {
        name for name, pair in values.items() if _without_steps(pair[0]) != _without_steps(pair[1])
    }
    said = names - {"code"} - ({"scoring"} if "metrics" in names else set())
    held_out = [(record.source or {}).get("held_out") for record in (there, here)]
    others = ["the held-out rows"] if None not in held_out and held_out[0] != held_out[1] else []
    if "fingerprint" in names:
        # Different rows imply different folds and different held-out rows, so these are not
        # reported too.
        said -= {"splits", "fingerprint"}
        others = _other_rows(there, here, of_target="target" in names)
    # Files of an earlier version have no digests, and another objective has another name.
    of_code = "code" not in there.absent and "objective" not in names
    code = [
        name for name, digest in here.code.items() if of_code and there.code.get(name) != digest
    ]
    words = [_word(name, *values[name]) for name in values if name in said]
    return [*words, *(f"{name} (its code or its values have changed)" for name in code), *others]


def _word(name: str, there: Any, here: Any) -> str:
    """Return one difference, with both values if they are short."""
    # search() calls this option ``direction``.
    if name == "scoring" and DIRECTIONS.keys() >= {there, here}:
        return f"direction{_in_words(DIRECTIONS[there], DIRECTIONS[here])}"
    is_loop = name == "spec" and (here or {}).get("kind") == "objective"
    return f"{'objective' if is_loop else IDENTITY[name]}{_in_words(there, here)}"


def _without_steps(value: object) -> object:
    """Return a value without the option that may grow when a search continues.

    That is the number of outer steps of a hypergradient search.
    """
    return (
        {key: part for key, part in value.items() if key != "outer_steps"}
        if isinstance(value, dict)
        else value
    )


def _other_rows(there: SearchRecord, here: SearchRecord, *, of_target: bool) -> list[str]:
    """Return the reason for different rows: the option that chooses them, or otherwise their
    sizes."""
    sources = [record.source or {} for record in (there, here)]
    shares = [source.get("test_size") for source in sources]
    if shares[0] != shares[1]:
        return [f"test_size{_in_words(*shares)}"]
    # The seed chooses the held-out rows of a file, and it is reported separately.
    if of_target or sources[0].get("seed") != sources[1].get("seed"):
        return []
    sizes = [table_size(record.fingerprint, record.source) for record in (there, here)]
    if sizes[0] == sizes[1]:
        return ["data (as many rows and columns, with other values, names or order)"]
    words = [
        f"{count(size['rows'], 'row')} and {count(size['columns'], 'column')}" for size in sizes
    ]
    return [f"data ({words[0]} there, {words[1]} here)"]


def _in_words(there: object, here: object) -> str:
    """Return two different values as text if both are short, otherwise ""."""
    texts = [repr(there), repr(here)]
    if isinstance(there, list) and isinstance(here, list):
        texts = [
            ", ".join(metric["name"] for metric in metrics) or "one" for metrics in (there, here)
        ]
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        keys = [key for key in there if there[key] != here[key]]
        if keys == ["sha256"] and "kind" in there:
            return " (its code has changed)"
        texts = [", ".join(f"{key}={value[key]!r}" for key in keys) for value in (there, here)]
    return f" ({texts[0]} there, {texts[1]} here)" if max(map(len, texts)) < 60 else ""


@contextmanager
def open_ledger(
    path: str | Path | None, record: SearchRecord, store: Store | None = None
) -> Iterator[Ledger]:
    """Open the ledger of a new search, or of the search in the file ``path``.

    Args:
        path: the study file, or None to keep the search in memory.
        record: the record of the search.
        store: the open file, if it is open already.

    Raises:
        InputError: the file holds a different search. The message lists the differences.
        StudyCorruptError: at the end, another program has damaged the file.
    """
    if path is None:
        yield Ledger(None)
        return
    path = Path(path)
    sweep(path.parent, prefix=DRAFTS)
    if store is None and not path.exists():
        try:
            store = Store.create(path, record.to_json())
        except InputError:
            if not path.exists():  # else another process has just made it
                raise
    with store or Store.open(path) as store, Claims(path) as claims:
        # Files without a positive class used the last class.
        positive = None if record.positive is None or record.classes is None else record.classes[-1]
        there = SearchRecord.from_json({"positive": positive, "metrics": [], **store.meta})
        if not there.face and there.lost:
            lost = ", ".join(IDENTITY[name] for name in there.lost)
            raise InputError(
                f"study={str(path)!r} has lost options of its search ({lost}) and cannot go on. "
                "Its trials can be read with gputune.Study.open; give this search a path of its "
                "own."
            )
        if words := differences(there, record):
            raise InputError(
                f"study={str(path)!r} holds another search, which differs from this call in: "
                f"{', '.join(words)}. Give this search a path of its own, or repeat the first "
                "call's arguments."
            )
        arguments = there.arguments.updated(record.arguments)
        if arguments != there.arguments and "arguments" not in there.absent:
            store.replace_option("arguments", vars(arguments))
        ledger = Ledger(store, claims)
        yield ledger
    # A study never loses a finished result, so missing rows mean damage.
    final = sum(result.state != "stopped" for result in ledger.results.values())
    with Store.open(path) as store:
        if (
            not store.meta
            or store.finished() < final
            or not store.check(ledger.kept).issuperset(ledger.kept)
            or len(store.plan()) < len(ledger.plan)
        ):
            raise damage_error(path, "rows are gone that were written to it")
