"""The ledger: the trials of a running search, its plan and its results.

The ledger is kept in memory, and also in a study file if the search has a file. A candidate is a
configuration with its trial number. A chunk is a group of candidates that train together. Once
planned, a chunk is stored and never changes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gputune.data.source import table_size
from gputune.ground.errors import InputError, option, per_interface
from gputune.ground.files import sweep
from gputune.ground.memory import without_collector
from gputune.ground.text import count
from gputune.ground.types import Json, Outputs, drop_beyond_limit
from gputune.study.claims import Claims
from gputune.study.database import DRAFTS, damage_error
from gputune.study.record import DIRECTIONS, IDENTITY, Arguments, SearchRecord
from gputune.study.store import Candidate, PlannedChunk, Result, Store

_LOOK = 0.2
"""Seconds between two checks for results of another process."""

_PATIENCE = 2.0
"""Seconds to wait for another process that adds trials, before gputune informs the user."""

Cut = Callable[[Sequence[Candidate]], Sequence[tuple[Sequence[int], int, int]]]
"""Function that cuts candidates into chunks.

For each chunk it returns the positions of its candidates in order, the number of threads, and the
number of chunks that may train at once.
"""


class Ledger:
    """The candidates of a search in order of trial number, their chunks, and the finished results.

    Other processes may work on the same study file: ``refresh`` reads their changes.
    """

    def __init__(self, store: Store | None, claims: Claims | None = None) -> None:
        self.store = store
        self.claims = claims
        self.candidates: list[Candidate] = []
        self.plan: list[PlannedChunk] = []
        self.results: dict[int, Result] = {}
        self.finished: list[int] = []
        """Trial numbers of the results that ``finish`` has stored."""
        self.arguments: Arguments | None = None
        """The stored arguments of all calls of the search. None if the search has no file."""
        self.outputs: dict[int, Outputs] = {}
        """The outputs of trials by trial number, if the search has no file to store them."""
        self.on_finish: Callable[[list[tuple[Candidate, Result | None]]], None] | None = None
        """The function to call with the stored trials after ``finish`` has stored results."""
        self.on_wait: Callable[[str], None] | None = None
        """The function to call repeatedly while this process waits for another process to finish
        planning.

        The function receives a message that names the other process. The function may raise an
        error to end the wait.
        """
        # Trials that an earlier call's deadline stopped train again. Until then their old results
        # count.
        self._stopped: dict[int, Result] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the study file again, if the search has a file."""
        if self.store is None:
            return
        with without_collector():
            self.candidates = self.store.candidates()
            self.plan = self.store.plan()
            results = self.store.results()
        self._stopped = {}
        self.results = {}
        for number, result in results.items():
            is_final = result.state != "stopped"
            (self.results if is_final else self._stopped)[number] = result

    def add(self, new: Sequence[Candidate]) -> None:
        """Add new candidates (configurations with trial numbers) before they train."""
        if self.store is not None and new:
            self.store.add_trials(new)
        self.candidates += new

    def note(self, notes: Sequence[str]) -> None:
        """Add notes for the user to the study file, if the search has a file."""
        if self.store is not None:
            self.store.note(notes)

    @contextmanager
    def exclusive_setup(self) -> Iterator[None]:
        """Keep other processes from adding candidates or chunks within the block.

        The ledger is refreshed first, so it includes all candidates and chunks of other processes.
        """
        if self.claims is None:
            yield
            return
        begin = time.monotonic()
        while (owner := self.claims.take_setup()) is not None:
            if self.on_wait is not None and time.monotonic() - begin > _PATIENCE:
                self.on_wait(
                    f"{owner} is adding trials to the study {str(self.claims.path)!r}, and this "
                    f"process waits for it. {self.claims.remedy(owner)}"
                )
            time.sleep(_LOOK)
        try:
            self.refresh()
            yield
        finally:
            self.claims.leave_setup()

    def check_sharing(self) -> None:
        """Raise InputError if another process works on a study in a network file system."""
        if self.claims is not None:
            self.claims.check_sharing()

    def claim_search(self, method: str) -> None:
        """Claim the whole search.

        Raises:
            InputError: another process works on the search. The message names it.
        """
        if self.claims is not None:
            self.claims.take_search(method)
            self.refresh()

    def chunks(self, trials: Sequence[Candidate], stage: int, cut: Cut) -> list[PlannedChunk]:
        """Return the planned chunks (groups of trials) of a stage that contain the given trials.

        Trials without a chunk are first cut into new chunks.
        """
        if self._without_plan(trials, stage):
            with self.exclusive_setup():
                # Checked again: another process may just have planned these trials.
                unplanned = self._without_plan(trials, stage)
                if unplanned:
                    self._plan(unplanned, stage, cut)
        numbers = {trial.number for trial in trials}
        planned = self._planned(stage)
        return [chunk for chunk in planned if not numbers.isdisjoint(chunk.trials)]

    def _plan(self, trials: Sequence[Candidate], stage: int, cut: Cut) -> None:
        """Cut trials into new chunks (groups that train together), and freeze the chunks."""
        number = 1 + max((chunk.number for chunk in self.plan), default=-1)
        chunks = []
        for positions, threads, at_once in cut(trials):
            members = tuple(trials[position].number for position in positions)
            chunks.append(PlannedChunk(number, stage, members, threads, at_once))
            number += 1
        if self.store is not None:
            self.store.add_chunks(chunks)
        self.plan += chunks

    def _planned(self, stage: int) -> list[PlannedChunk]:
        return [chunk for chunk in self.plan if chunk.stage == stage]

    def _without_plan(self, trials: Sequence[Candidate], stage: int) -> list[Candidate]:
        planned = set(chain.from_iterable(chunk.trials for chunk in self._planned(stage)))
        return [trial for trial in trials if trial.number not in planned]

    def show(self, progress: Json) -> None:
        """Report this process's progress to other processes, if the search has a study file."""
        if self.claims is not None:
            self.claims.show(progress)

    def stop_requests(self) -> tuple[bool, set[int]]:
        """Return the requests of ``gputune stop`` to this process.

        Returns:
            Whether the search must end, and the numbers of the trials that must end.
        """
        return (False, set()) if self.claims is None else self.claims.stop_requests()

    def claim(self, chunk: PlannedChunk) -> bool:
        """Return True if this process may train a chunk, because it is not finished and no other
        process trains it.
        """
        return self.claims is None or self.claims.take(chunk)

    def release(self, chunk: PlannedChunk) -> None:
        """Allow other processes to train a chunk that this process has claimed."""
        if self.claims is not None:
            self.claims.release(chunk)

    def owners_of(self, chunks: Sequence[PlannedChunk]) -> tuple[str, str]:
        """Return the other processes that have claimed chunks, and advice if a process runs on
        another host.

        Both results are text.
        """
        assert self.claims is not None
        names = set()
        remedy = ""
        for owner in map(self.claims.holder, chunks):
            if owner is not None:
                names.add(str(owner))
                if not (remedy or owner.is_near):
                    remedy = self.claims.remedy(owner)
        return ", ".join(sorted(names)) or "another process", remedy

    def wait(self, chunks: Sequence[PlannedChunk], is_over: Callable[[], bool]) -> None:
        """Wait until another process has finished a result or has ended, or until ``is_over`` is
        true."""
        assert self.store is not None and self.claims is not None
        finished = self.store.n_finished()
        while (
            not is_over()
            and self.store.n_finished() == finished
            and all(map(self.claims.holder, chunks))
        ):
            time.sleep(_LOOK)
        self.refresh()

    def waiting(self) -> list[Candidate]:
        """Return the candidates (configurations with trial numbers) that have no result yet."""
        return [candidate for candidate in self.candidates if candidate.number not in self.results]

    def has_waiting(self) -> bool:
        """Return True if a trial in the file has no final result, from this or another process."""
        return self.store is not None and self.store.n_waiting() > 0

    def finish(
        self, results: Sequence[Result], outputs: Mapping[int, Outputs] = MappingProxyType({})
    ) -> None:
        """Store all results of one chunk, or none of them.

        Final results in the file stay unchanged. So does the result of a stopped trial that has
        trained for more epochs.

        Args:
            results: the results of the chunk.
            outputs: outputs by trial number. The outputs are kept if their trial was not pruned
                and they are from its best epoch.
        """
        new = {result.number: result for result in results if result.number not in self.results}
        if self.store is not None:
            # Another process may have stored results before this process claimed the chunk.
            for _, stored in self.store.trials(list(new)):
                if stored is not None and not new[stored.number].replaces(stored):
                    del new[stored.number]
                    self.results[stored.number] = stored
        best_outputs = {}
        for number, result in new.items():
            output = outputs.get(number)
            if (
                output is not None
                and result.state in ("complete", "stopped")
                and result.best_epoch == output.epoch
            ):
                best_outputs[number] = output
        if self.store is not None:
            self.store.finish(new.values(), best_outputs)
        self.results |= new
        self.finished += new
        if self.store is None:
            self.outputs |= best_outputs
            scores = {number: self.results[number].score for number in self.outputs}
            drop_beyond_limit(self.outputs, scores)
        if self.on_finish is not None and new:
            self.on_finish([(c, new[c.number]) for c in self.candidates if c.number in new])

    def rows(self) -> list[tuple[Candidate, Result | None]]:
        """Return every candidate with its result."""
        known = {**self._stopped, **self.results}
        with without_collector():
            return [(candidate, known.get(candidate.number)) for candidate in self.candidates]


def differences(stored: SearchRecord, current: SearchRecord) -> list[str]:
    """Return the differences between the search in a file and the current call, as text for an
    error."""
    changed = {}
    for name in IDENTITY:
        pair = (getattr(stored, name), getattr(current, name))
        if _without_steps(pair[0]) != _without_steps(pair[1]):
            changed[name] = pair
    implied = {"code"}
    if "metrics" in changed:
        implied.add("scoring")
    if "fingerprint" in changed:
        # Different rows imply different folds and different held-out rows, so these are not
        # reported too.
        implied |= {"splits", "fingerprint"}
        of_rows = _row_differences(stored, current, target_differs="target" in changed)
    else:
        held_out = [(record.source or {}).get("held_out") for record in (stored, current)]
        is_known = None not in held_out
        of_rows = ["the held-out rows"] if is_known and held_out[0] != held_out[1] else []
    messages = [_difference(name, *pair) for name, pair in changed.items() if name not in implied]
    # Another objective has another name.
    if "objective" not in changed:
        for name, digest in current.code.items():
            if stored.code.get(name) != digest:
                messages.append(f"{option(name)} (its code or its values have changed)")
    return messages + of_rows


def _difference(name: str, stored: Any, current: Any) -> str:
    """Return a difference between two searches as text, with both values if these are short."""
    # search() calls this option ``direction``.
    if name == "scoring" and DIRECTIONS.keys() >= {stored, current}:
        return f"direction{_short_pair(DIRECTIONS[stored], DIRECTIONS[current])}"
    if name == "method":
        names = [_method_name(stored), _method_name(current)]
        if names[0] != names[1]:
            return f"method{_short_pair(*names)}"
    if name == "metrics":
        stored, current = (
            [metric["name"] for metric in metrics] or ["one"] for metrics in (stored, current)
        )
    is_loop = name == "spec" and (current or {}).get("kind") == "objective"
    label = "objective" if is_loop else IDENTITY[name]
    return f"{label}{_short_pair(stored, current)}"


def _method_name(method: Any) -> str:
    """Return the name of a search method from its form in a study file."""
    return str(method["name"] if isinstance(method, dict) else method)


def _without_steps(value: object) -> object:
    """Return an option of a search without the part that may grow when the search continues.

    This part is the number of outer steps of a hypergradient search.
    """
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key != "outer_steps"}


def _row_differences(
    stored: SearchRecord, current: SearchRecord, *, target_differs: bool
) -> list[str]:
    """Return the reason for different data rows: the option that selects the rows, otherwise their
    sizes."""
    sources = [record.source or {} for record in (stored, current)]
    shares = [source.get("test_size") for source in sources]
    if shares[0] != shares[1]:
        return [f"{option('test_size')}{_short_pair(*shares)}"]
    # The seed chooses the held-out rows of a file, and it is reported separately.
    if target_differs or sources[0].get("seed") != sources[1].get("seed"):
        return []
    sizes = []
    for record in (stored, current):
        size = table_size(record.fingerprint, record.source)
        sizes.append(f"{count(size['rows'], 'row')} and {count(size['columns'], 'column')}")
    if sizes[0] == sizes[1]:
        return ["data (the same size, but different values, column names or order)"]
    return [f"data{_both(*sizes)}"]


def _short_pair(stored: object, current: object) -> str:
    """Return two different values as text if both are short, otherwise ""."""
    texts = [repr(stored), repr(current)]
    if isinstance(stored, list) and isinstance(current, list):
        texts = [", ".join(items) or "none" for items in (stored, current)]
    if isinstance(stored, dict) and isinstance(current, dict) and stored.keys() == current.keys():
        keys = [key for key in stored if stored[key] != current[key]]
        if keys == ["sha256"] and "kind" in stored:
            return " (its code has changed)"
        texts = [", ".join(f"{key}={value[key]!r}" for key in keys) for value in (stored, current)]
    return _both(*texts) if max(map(len, texts)) < 60 else ""


def _both(stored: str, current: str) -> str:
    return f" ({stored} in the study, {current} now)"


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
        arguments = _check_same_search(store, path, record)
        ledger = Ledger(store, claims)
        ledger.arguments = arguments
        yield ledger
    # A study never loses a finished result, so missing rows mean damage.
    final = sum(result.state != "stopped" for result in ledger.results.values())
    with Store.open(path) as store:
        if (
            not store.meta
            or store.n_finished() < final
            or not store.results().keys() >= {*ledger.finished}
            or len(store.plan()) < len(ledger.plan)
        ):
            raise damage_error(path, "it has lost rows that were written to it")


def _check_same_search(store: Store, path: Path, record: SearchRecord) -> Arguments:
    """Check that an open file holds the search of a record, and store its newest arguments.

    Returns the arguments of all calls of the search.

    Raises:
        InputError: the file holds a different search, or has lost its options.
    """
    stored = SearchRecord.from_json(store.meta)
    if not stored.face and stored.lost:
        labels = ", ".join(IDENTITY[name] for name in stored.lost)
        raise InputError(
            f"study={str(path)!r}",
            f"has lost options of its search ({labels}) and cannot continue",
            remedy=per_interface(
                python="Its trials can be read with gputune.Study.open. Pass another path for this "
                "search.",
                command="Its trials can be read with gputune trials. Use another folder for this "
                "search, --out OTHER.",
            ),
        )
    changes = differences(stored, record)
    if changes:
        this_call = per_interface(python="this call", command="this command")
        raise InputError(
            f"study={str(path)!r}",
            f"holds a different search. It differs from {this_call} in: {', '.join(changes)}",
            remedy=per_interface(
                python="Pass another path for this search, or repeat the arguments of the first "
                "call.",
                command="Use another folder for this search, --out OTHER, or repeat the options "
                "of the first command.",
            ),
        )
    arguments = stored.arguments.updated(record.arguments)
    if arguments != stored.arguments:
        options = replace(stored, arguments=arguments).to_json()
        store.replace_option("arguments", options["arguments"])
    return arguments
