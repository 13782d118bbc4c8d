"""The callback protocol of ``tune(callbacks=...)``.

A search calls a callback at four moments. An error in a callback cannot lose finished results.
"""

from collections.abc import Sequence

import numpy as np

from gputune.engine.stop import Stop
from gputune.ground.errors import warn
from gputune.study.study import Study


class StopSearch(Exception):
    """The exception that a callback raises to end the search after the running epoch. ``tune``
    catches the exception, keeps the finished results, and returns the study.

    Example:
        >>> from gputune.callbacks import Callback, StopSearch
        >>> class StopWhenGood(Callback):
        ...     def on_trials_end(self, trials):
        ...         if trials.best_score > 0.95:
        ...             raise StopSearch
    """


class Callback:
    """Base class of callbacks. Override the methods that you need.

    The search calls the methods in its own process. Each method does nothing by default. Trials are
    stored, in memory and in the study's file, before a callback receives them.

    ``StopSearch`` ends the search. Any other exception becomes a warning: gputune does not call
    this callback again, and the search continues. A KeyboardInterrupt stops the search as usual.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> class Count(gputune.callbacks.Callback):
        ...     finished = 0
        ...     def on_trials_end(self, trials):
        ...         self.finished += len(trials.trials)
        >>> count = Count()
        >>> study = gputune.tune(
        ...     "mlp", X, y, n_trials=4, max_epochs=2, callbacks=[count], verbose=0
        ... )
        >>> count.finished
        4
    """

    def on_study_start(self, study: Study) -> None:
        """The search calls this method once, before anything trains.

        Args:
            study: the study, with the options (``meta``) and the trials known so far.
        """

    def on_epoch(self, curves: np.ndarray) -> None:
        """The search calls this method when trials that train together (a chunk) have trained
        further.

        Training in this process reports one epoch at a time. A worker process reports all epochs of
        a chunk at once.

        Args:
            curves: scores (C, epochs, F) of the chunk's trials in the new epochs. With several
                metrics they are scores by the first metric.
        """

    def on_trials_end(self, trials: Study) -> None:
        """The search calls this method with each batch of trials that this process has finished.

        Args:
            trials: a study of these trials, with ``trials`` and ``curves``.
        """

    def on_study_end(self, study: Study) -> None:
        """The search calls this method once at its end, also after an error or Ctrl-C.

        Args:
            study: the study with all finished results.
        """


class Callbacks:
    """The callbacks of one search. A callback that raises an error is not called again."""

    def __init__(self, callbacks: Sequence[Callback], stop: Stop) -> None:
        self.active = list(callbacks)
        self.stop = stop

    def tell(self, moment: str, argument: object) -> None:
        """Call the method ``moment`` (such as "on_epoch") of every callback.

        A callback that raises an error is removed with a warning.
        """
        for callback in list(self.active):
            try:
                getattr(callback, moment)(argument)
            except StopSearch:
                self.stop.ask()
            except Exception as error:  # any error of the user's callback
                self.active.remove(callback)
                name = type(callback).__name__
                warn(
                    f"{name}.{moment} raised {type(error).__name__}: {error}. {name} is not called "
                    "again. The search continues without this callback, and loses no results."
                )
