"""What a person sees while a search runs: one bar over trials x epochs, with the best score so far."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm.auto import tqdm

_LINE_SECONDS = 30  # between plain lines, where nobody watches a bar


class Progress:
    """A bar that counts trial-epochs, or plain lines where standard error is no terminal; silent with ``verbose=0``."""

    def __init__(self, verbose: int, on_epoch: Callable[[np.ndarray], None] | None = None) -> None:
        self.verbose, self.on_epoch = verbose, on_epoch
        self.bar: Any = None
        self.plain = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        self.next_line = time.monotonic() + _LINE_SECONDS
        self.best, self.trials_done, self.trials = float("-inf"), 0, 0

    def say(self, text: str, *, level: int = 1) -> None:
        """Print a line where ``verbose`` reaches ``level``."""
        if self.verbose >= level:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def bar_over(self, trials: int, epochs: int) -> Iterator[None]:
        """Show the bar inside, for so many trials more."""
        self.trials = self.trials_done + trials
        self.bar = tqdm(
            total=trials * epochs,
            unit=" trial-epochs",
            disable=self.verbose < 1 or self.plain,
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
        if self.on_epoch is not None:
            self.on_epoch(curves)

    def finished(self, trials: int) -> None:
        """So many more trials are done."""
        self.trials_done += trials
        self._show()

    def _show(self) -> None:
        best = "-" if self.best == float("-inf") else f"{self.best:.4f}"
        words = f"trials {self.trials_done}/{self.trials}, best {best}"
        self.bar.set_postfix_str(words, refresh=False)
        if self.plain and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + _LINE_SECONDS
            self.say(words)
