"""The protocol of ``tune(callbacks=...)``: four moments of a search, none of which can lose what is finished.

A trial, a search and its best score in the plain numbers and words that loggers take.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from gputune.errors import InputError
from gputune.search.distributions import label
from gputune.study.record import PARTS
from gputune.study.study import Study, Trial
from gputune.types import Json


class Callback:
    """A search calls these in its own process; override those that matter. Each does nothing here.

    What one raises is a warning: it is not called again in this search, which goes on. (KeyboardInterrupt stops the
    search, as ever.) Trials are kept, in memory and in the study's file, before a callback hears of them.
    """

    def on_study_start(self, study: Study) -> None:
        """Called before anything trains; ``study`` has the options (``meta``), and the trials known so far."""

    def on_epoch(self, curves: np.ndarray) -> None:
        """Called when the trials of a chunk have trained on; their scores (C, epochs, F) in the epochs just done.

        One epoch at a time in this process, all epochs of a chunk at once from a worker process.
        """

    def on_trials_end(self, trials: Study) -> None:
        """Called with each batch of trials that this process has finished, as a study: ``trials``, ``curves``."""

    def on_study_end(self, study: Study) -> None:
        """Called once at the end, also after an error or Ctrl-C; ``study`` has everything that is finished."""


class Callbacks:
    """Several callbacks; one that raises is left out from then on."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.active = list(callbacks)

    def tell(self, moment: str, argument: object) -> None:
        """Call the method of this name of all of them."""
        for callback in list(self.active):
            try:
                getattr(callback, moment)(argument)
            except Exception as error:  # whatever a user's callback raises
                self.active.remove(callback)
                warnings.warn(
                    f"{type(callback).__name__}.{moment} raised {type(error).__name__}: {error}. It is not called "
                    "again; the search goes on, and nothing of it is lost.",
                    UserWarning,
                    stacklevel=3,
                )


def check_callbacks(callbacks: object) -> tuple[Callback, ...]:
    """Return the callbacks; InputError for anything that is no ``Callback``."""
    if not isinstance(callbacks, list | tuple) or not all(isinstance(one, Callback) for one in callbacks):
        raise InputError(
            "callbacks must be a list of objects of a gputune.callbacks.Callback class, for example "
            f"[gputune.callbacks.TensorBoard('runs')], got {callbacks!r}."
        )
    return tuple(callbacks)


def plain_params(params: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """Return hyperparameters as numbers and words; other values, and None, as text."""
    return {key: "None" if (short := label(value)) is None else short for key, value in params.items()}


def trial_numbers(trial: Trial) -> dict[str, float]:
    """Return what is a finite number of a trial: score, std_error, best_epoch, seconds, numeric ``params/...``."""
    numbers = {name: getattr(trial, name) for name in ("score", "std_error", "best_epoch", "seconds")}
    params = {f"params/{k}": v for k, v in trial.params.items() if isinstance(v, bool | int | float)}
    return {name: float(value) for name, value in (numbers | params).items() if math.isfinite(value)}


def best_score(study: Study) -> float:
    """Return the best finite score of trials that no rung sent away, -inf where there is none."""
    return max(
        (t.score for t in study.trials if math.isfinite(t.score) and t.state != "pruned"), default=-math.inf
    )


def study_options(study: Study) -> Json:
    """Return the options of a search that a person compares searches by."""
    record = study.record
    values = {
        name: getattr(record, name)
        for name, part in PARTS.items()
        if part.logged and name not in record.absent
    }
    return {name: value for name, value in values.items() if value is not None}
