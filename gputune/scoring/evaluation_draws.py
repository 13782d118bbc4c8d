"""Seed the random numbers that a module draws during evaluation.

Some modules draw random numbers in their forward pass, in evaluation mode too. gputune seeds these
random numbers. So a second evaluation of a trained model repeats the scores of its search.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from gputune.ground.seeding import keyed_draws


def drawing_rows(widest: int) -> int:
    """Return the number of rows to evaluate at a time if a forward pass draws random numbers.

    Each block of rows has its own random numbers. Therefore the size of a block must not depend on
    the device, or on the number of trials that train together. ``widest`` is the largest number of
    values that a layer has for one row.
    """
    return max(64, min(256, (1 << 18) // widest))


@dataclass(frozen=True)
class EvaluationDraws:
    """Seeds for evaluating plain modules on the CPU with the same random numbers as during their
    search.

    So an evaluation repeats the scores that the search computed for its members (one trial on one
    fold each).

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
        """Seed the random number generators for one block of rows, inside a ``with`` block.

        ``start`` is the position of the first row of the block among the validation rows of the
        fold.
        """
        key = self.epoch, fold, start
        return keyed_draws(torch.device("cpu"), self.seed, "evaluation", *key, host=self.host)
