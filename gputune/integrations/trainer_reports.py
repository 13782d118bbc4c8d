"""Reports the validation of a trainer of another library to ``gputune.search``.

The callbacks of Lightning and of transformers share this file.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import SupportsFloat

from gputune.executors.worker import SetupError, TrialEnd
from gputune.ground.text import did_you_mean


@cache
def with_bases(kind: type, *bases: type) -> type:
    """Return a subclass of ``kind`` that also has the bases of another library.

    A callback gets its bases when a program makes it, so that this library is only imported then.
    """
    return type(kind.__name__, (kind, *bases), {"__module__": kind.__module__})


class TrainerReports:
    """Reports one metric after each validation of a trainer, and notes when the search ends the
    trial.

    Args:
        report: The second argument of the objective, or any function of one number.
        monitor: The name under which the trainer logs the metric.
        library: The name of the trainer's library, for messages.

    Attributes:
        ended: Whether the search has ended the trial.
        number: The number of reports so far.
    """

    def __init__(self, report: Callable[[float], object], monitor: str, library: str) -> None:
        if not callable(report):
            rule = "must be the second argument of your objective, objective(params, report)"
            raise SetupError("report", rule, got=report)
        if not isinstance(monitor, str):
            raise SetupError("monitor", "must be the name of a logged metric", got=monitor)
        self.report = report
        self.monitor = monitor
        self.library = library
        self.ended = False
        self.number = 0

    def add(self, metrics: Mapping[str, SupportsFloat], how_to_log: str) -> bool:
        """Report the metric after a validation. Return whether the search ends the trial.

        Raises SetupError, with the names of the metrics, if the metric is not among them.

        Args:
            metrics: The metrics of this validation.
            how_to_log: An example of code that logs the metric.
        """
        if self.ended:
            return True
        if self.monitor not in metrics:
            names = ", ".join(map(repr, metrics)) or "no metric"
            similar = did_you_mean(self.monitor, metrics).strip()
            remedy = f"Pass one of the logged names, or log the metric: {how_to_log}."
            raise SetupError(
                f"monitor={self.monitor!r}",
                f"names a metric that the validation did not log. It logged {names}",
                remedy=f"{similar} {remedy}".lstrip(),
            )
        self.number += 1
        try:
            self.report(float(metrics[self.monitor]))
        except TrialEnd:
            self.ended = True
        return self.ended

    def check_devices(self, devices: int, remedy: str) -> None:
        """Raise InputError for a trainer with several devices or processes."""
        if devices > 1:
            raise SetupError(
                None,
                f"This {self.library} Trainer uses {devices} devices, but a trial of "
                "gputune.search uses one device, and other trials use the other devices",
                remedy=remedy,
            )

    def check_number(self, remedy: str) -> None:
        """Raise InputError after a training that has reported nothing."""
        if not self.number:
            raise SetupError(
                None,
                f"The {self.library} Trainer has trained without a validation, so there was "
                "nothing to report to the search",
                remedy=remedy,
            )

    def leave_if_ended(self) -> None:
        """Leave the objective if it still uses the trainer of a trial that has ended.

        Raises TrialEnd, which ``gputune.search`` catches.
        """
        if self.ended:
            raise TrialEnd
