"""The random numbers that a module draws when it is evaluated."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from gputune.seeding import keyed_draws


def drawing_rows(widest: int) -> int:
    """Return the number of rows to evaluate at a time if a forward draws random numbers.

    Each block of rows has its own draws. Therefore its size must not depend on the number of trials
    in a chunk or on the device. ``widest`` is the largest number of values that a layer has for one
    row.
    """
    return max(64, min(256, (1 << 18) // widest))


@dataclass(frozen=True)
class EvaluationDraws:
    """The random numbers that plain modules draw on the CPU during an evaluation.

    They are the same draws as when the members were scored in their search.

    Attributes:
        seed: The seed of the search.
        epoch: The number of epochs that the members have trained.
        rows: The number of rows that are evaluated at a time.
        host: If True, the modules also draw from the generators of Python and NumPy.
    """

    seed: int
    epoch: int
    rows: int
    host: bool

    def seeded(self, fold: int, start: int) -> AbstractContextManager[None]:
        """Seed the draws of a block of rows inside a ``with`` block.

        ``start`` is the position of the first row of the block among the validation rows of the
        fold.
        """
        key = self.epoch, fold, start
        return keyed_draws(torch.device("cpu"), self.seed, "evaluation", *key, host=self.host)
