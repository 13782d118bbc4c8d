"""The trials of a running search and their results: in memory, and in a study file where one is kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gputune.errors import InputError
from gputune.study.store import Candidate, Result, Store

# What must be the same for a search to go on in a file. Anything else (device, versions, n_trials) may differ.
_IDENTITY = {
    "spec": "model",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "space": "space",
    "method": "method",
    "task": "task",
    "fingerprint": "data",
    "numbers": "numbers",
    "class_weight": "class_weight",
    "sample_weight": "sample_weight",
    "splits": "folds (cv, groups)",
    "scoring": "scoring",
    "epoch": "epoch",
    "max_epochs": "max_epochs",
    "seed": "random_state",
    "dtype": "dtype",
}


class Ledger:
    """Candidates in the order of their numbers, and the results of those that are finished."""

    def __init__(self, store: Store | None) -> None:
        self.store = store
        self.on_finish: Callable[[list[tuple[Candidate, Result | None]]], None] | None = None
        known = [] if store is None else store.trials()
        self.candidates: list[Candidate] = [candidate for candidate, _ in known]
        found = {r.number: r for _, r in known if r is not None}
        self.results: dict[int, Result] = {n: r for n, r in found.items() if r.state != "stopped"}
        # What an earlier call's deadline cut short is trained again; until then its result counts.
        self._stopped = {n: r for n, r in found.items() if r.state == "stopped"}

    def add(self, new: Sequence[Candidate]) -> None:
        """Take in drawn candidates before anything trains."""
        if self.store is not None and new:
            self.store.add_trials(new)
        self.candidates += new

    def waiting(self) -> list[Candidate]:
        """Return the candidates without a result."""
        return [candidate for candidate in self.candidates if candidate.number not in self.results]

    def finish(self, results: Sequence[Result]) -> None:
        """Keep the results of one chunk, all or none."""
        if self.store is not None:
            self.store.finish(results)
        found = {result.number: result for result in results}
        self.results.update(found)
        if self.on_finish is not None:
            self.on_finish([(c, found[c.number]) for c in self.candidates if c.number in found])

    def rows(self) -> list[tuple[Candidate, Result | None]]:
        """Return every candidate with its result."""
        known = {**self._stopped, **self.results}
        return [(candidate, known.get(candidate.number)) for candidate in self.candidates]


def _same(value: Any) -> Any:
    """A value without what may grow when a search goes on: the steps of a descent."""
    if isinstance(value, dict) and "outer_steps" in value:
        return {key: part for key, part in value.items() if key != "outer_steps"}
    return value


def _values(held: Any, given: Any) -> str:
    """Two values that differ in words, where both are short."""
    texts = [repr(value) for value in (held, given)]
    if isinstance(held, dict) and isinstance(given, dict) and held.keys() == given.keys():
        keys = [key for key in held if held[key] != given[key]]
        texts = [", ".join(f"{key}={part[key]!r}" for key in keys) for part in (held, given)]
    return f" ({texts[0]} there, {texts[1]} here)" if max(map(len, texts)) < 60 else ""


@contextmanager
def open_ledger(path: str | Path | None, meta: Mapping[str, Any]) -> Iterator[Ledger]:
    """Open the ledger of a new search, or of the search that ``path`` holds.

    Raises InputError where the file holds another search, and says what differs.
    """
    if path is None:
        yield Ledger(None)
        return
    with Store.open(path) if Path(path).exists() else Store.create(path, meta) as store:
        held = store.meta
        differing = [
            f"{word}{_values(held.get(key), meta[key])}"
            for key, word in _IDENTITY.items()
            if _same(held.get(key)) != _same(meta[key])
        ]
        if differing:
            raise InputError(
                f"study={str(path)!r} holds another search, which differs from this call in: {', '.join(differing)}. "
                "Give this search a path of its own, or repeat the first call's arguments."
            )
        yield Ledger(store)
