"""How many trials of one shape memory has held: what failed once in a search is not tried again at that size."""

import secrets
from typing import Any

from gputune.engine.population import Population, shape_of


class Fits:
    """The sizes of one search, by tensor shape, as far as memory has refused larger ones.

    Within a process all copies of it are one object, however often it is sent there with a job.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self.trials: dict[Any, int] = {}

    def most(self, chunk: Population) -> int:
        """Return how many trials of a chunk to train at once."""
        return min(len(chunk.index), self.trials.get(shape_of(chunk), len(chunk.index)))

    def refused(self, chunk: Population) -> None:
        """Remember that a chunk did not fit: the next of its shape begins with half of it."""
        self.trials[shape_of(chunk)] = -(-len(chunk.index) // 2)

    def __reduce__(self) -> tuple[Any, ...]:
        return _here, (self.token, self.trials)


_arrived: dict[str, Fits] = {}  # of the last search that this process had a job of


def _here(token: str, trials: dict[Any, int]) -> Fits:
    """Return what this process knows of a search, with what the sender knows."""
    if token not in _arrived:
        _arrived.clear()
        _arrived[token] = Fits()
    known = _arrived[token]
    known.token = token
    for shape, number in trials.items():
        known.trials[shape] = min(number, known.trials.get(shape, number))
    return known
