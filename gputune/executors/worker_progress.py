"""The progress of workers in the chunks that they train.

A chunk is a group of trials that train together. A worker returns the results of a chunk only at its
end. Until then it writes its progress to an array that the process of the search reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gputune.engine.job import ProgressCallback
from gputune.ground.within_epoch import Running, reported_to

_FIELDS = 3  # those of Running, as float64


class WorkerProgress:
    """An array with one row for each trial of a search, which all workers write.

    The row of a chunk's first trial has the progress of the chunk. Worker processes map the array
    from a file.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    @classmethod
    def of(cls, n_trials: int) -> "WorkerProgress":
        """Return empty rows for ``n_trials`` trials, for threads of this process."""
        return cls(np.zeros((n_trials, _FIELDS)))

    @classmethod
    def open(cls, path: Path) -> "WorkerProgress":
        """Map the rows from a file."""
        return cls(np.memmap(path, dtype=np.float64, mode="r+").reshape(-1, _FIELDS))

    @classmethod
    def create(cls, path: Path, n_trials: int) -> "WorkerProgress":
        """Create a file with empty rows for ``n_trials`` trials."""
        path.write_bytes(np.zeros((n_trials, _FIELDS)).tobytes())
        return cls.open(path)

    def running(self) -> Running:
        """Return the training of all workers that the search has not counted yet."""
        return Running(*self.rows.sum(0).tolist())

    def count(self, index: Sequence[int]) -> None:
        """Clear the rows of trials whose results the search has received.

        ``index`` has the positions of the trials.
        """
        self.rows[list(index)] = 0.0

    @contextmanager
    def written(self, index: Sequence[int]) -> Iterator[ProgressCallback]:
        """Write the progress of a chunk during a ``with`` block, in a worker.

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
