"""gputune's side of the benchmark: one call of the public ``tune``, on the CPU or on a GPU."""

import time
from typing import Any

import gputune
from benchmark.work import Event, Outcome, Work


class Times(gputune.callbacks.Callback):
    """Records the time when the search began to train, and the times when trials ended."""

    def __init__(self) -> None:
        self.called = self.began = time.monotonic()
        self.events: list[Event] = []

    def on_study_start(self, study: gputune.Study) -> None:
        """Called after all checks and the plan."""
        self.began = time.monotonic()

    def on_trials_end(self, trials: gputune.Study) -> None:
        """Called when trials are stopped at a rung, and at the end."""
        seconds = time.monotonic() - self.called
        self.events += [Event(seconds, trial.number, trial.score) for trial in trials.trials]


def train(work: Work, cores: int | None = None, **options: Any) -> Outcome:
    """Train the work; gputune's own plan decides how many of the cores it uses."""
    times = Times()
    study = _tune(work, times, **options)
    return Outcome(study.curves[:, -1], times.began - times.called)


def search(method: str, work: Work, cores: int) -> list[Event]:
    """Search; a candidate's score is recorded when it is stopped or has ended."""
    times = Times()
    _tune(work, times, method=method)
    return times.events


def _tune(work: Work, times: Times, device: str = "cpu", **options: Any) -> gputune.Study:
    return gputune.tune(
        "mlp",
        work.X,
        work.y,
        n_trials=0,
        include=work.trials,
        include_default=False,
        cv=work.folds,
        device=device,
        optimizer="adam",
        max_epochs=work.epochs,
        epoch="last",
        callbacks=[times],
        verbose=0,
        **options,
    )
