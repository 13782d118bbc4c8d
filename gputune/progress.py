"""What a person sees while a search runs: one bar over trials x epochs, with the best score so far."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm.auto import tqdm


class Progress:
    """A bar that counts trial-epochs; silent with ``verbose=0``. Lines of text go to standard error, above it."""

    def __init__(self, verbose: int) -> None:
        self.verbose = verbose
        self.bar: Any = None
        self.best, self.trials_done, self.trials = float("-inf"), 0, 0

    def say(self, text: str, *, level: int = 1) -> None:
        """Print a line where ``verbose`` reaches ``level``."""
        if self.verbose >= level:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def bar_over(self, trials: int, epochs: int) -> Iterator[None]:
        """Show the bar inside."""
        self.trials = trials
        self.bar = tqdm(
            total=trials * epochs,
            unit=" trial-epochs",
            disable=self.verbose < 1,
            dynamic_ncols=True,
            leave=False,
        )
        self._show()
        try:
            yield
        finally:
            self.bar.close()

    def advance(self, trial_epochs: int, curves: np.ndarray) -> None:
        """So many more trial-epochs are done; their scores are ``curves`` (C, epochs, F)."""
        self.bar.update(trial_epochs)
        mean = curves.mean(-1)
        if np.isfinite(mean).any():
            self.best = max(self.best, float(np.nanmax(mean)))
        self._show()

    def finished(self, trials: int) -> None:
        """So many more trials are done."""
        self.trials_done += trials
        self._show()

    def _show(self) -> None:
        best = "-" if self.best == float("-inf") else f"{self.best:.4f}"
        self.bar.set_postfix_str(f"trials {self.trials_done}/{self.trials}, best {best}", refresh=False)
