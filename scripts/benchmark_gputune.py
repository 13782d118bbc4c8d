"""gputune's side of the benchmark: one call of the public ``tune``, on the CPU or on a card."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark_work import Outcome, Work

import gputune
from gputune.native import library


class Begin(gputune.callbacks.Callback):
    """Remembers when the search began to train."""

    def __init__(self) -> None:
        self.at = time.monotonic()

    def on_study_start(self, study: gputune.Study) -> None:
        """Called when everything is checked and planned."""
        self.at = time.monotonic()


def train_with_gputune(
    work: Work, cores: int | None = None, *, device: str = "cpu", verbose: int = 0
) -> Outcome:
    """Train the work; how many of the cores are used is gputune's own plan."""
    begin, began = time.monotonic(), Begin()
    with built_again() as compiled:
        study = gputune.tune(
            "mlp",
            work.X,
            work.y,
            n_trials=0,
            include=work.trials,
            include_default=False,
            cv=work.folds,
            optimizer="adam",
            max_epochs=work.epochs,
            epoch="last",
            device=device,
            verbose=verbose,
            callbacks=[began],
        )
    spent = sum(compiled)
    return Outcome(study.curves[:, -1], began.at - begin - spent, spent)


@contextmanager
def built_again() -> Iterator[list[float]]:
    """Let gputune's compiled library be built anew in the block, as on a machine that it never ran on.

    Yields the seconds of each build.
    """
    spent: list[float] = []
    build, before = library._build, os.environ.get("XDG_CACHE_HOME")

    def timed(*arguments: Any, **named: Any) -> Path:
        begin = time.monotonic()
        try:
            return build(*arguments, **named)
        finally:
            spent.append(time.monotonic() - begin)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        library.library.cache_clear()
        library._build = timed
        try:
            yield spent
        finally:
            library._build = build
            library.library.cache_clear()
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before
