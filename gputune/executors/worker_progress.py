"""The progress of worker processes in the chunks that they train.

A chunk is a group of trials that train together. A worker returns the results of a chunk only at its
end. Until then it writes its progress to a file that the parent process reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gputune.engine.job import ProgressCallback
from gputune.within_epoch import Running, reported_to

_FIELDS = 3  # those of Running, as float64


class WorkerProgress:
    """A file with one row for each trial of a search, which several processes map into memory.

    The row of a chunk's first trial has the progress of the chunk.
    """

    def __init__(self, path: Path) -> None:
        self.rows = np.memmap(path, dtype=np.float64, mode="r+").reshape(-1, _FIELDS)

    @classmethod
    def create(cls, path: Path, n_trials: int) -> "WorkerProgress":
        """Create the file with empty rows for ``n_trials`` trials."""
        path.write_bytes(np.zeros((n_trials, _FIELDS)).tobytes())
        return cls(path)

    def running(self) -> Running:
        """Return the training of all workers that this process has not counted yet."""
        return Running(*self.rows.sum(0).tolist())

    def count(self, index: Sequence[int]) -> None:
        """Clear the rows of trials whose results the parent process has received.

        ``index`` has the positions of the trials.
        """
        self.rows[list(index)] = 0.0

    @contextmanager
    def written(self, index: Sequence[int]) -> Iterator[ProgressCallback]:
        """Write the progress of a chunk during a ``with`` block, in a worker process.

        ``index`` has the positions of its trials. The block receives the function to call after each
        epoch.
        """
        row = self.rows[index[0]]
        row[:] = 0.0

        def after_epoch(trial_epochs: int, _curves: np.ndarray) -> None:
            row[:] = (row[0] + trial_epochs, 0.0, 0.0)

        def within_epoch(share: float, trials: int) -> None:
            row[1:] = (share * trials, trials)

        with reported_to(within_epoch):
            yield after_epoch
