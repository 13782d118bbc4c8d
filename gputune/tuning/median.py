"""The median rule at work: trials train together, and those below the median leave."""

from collections.abc import Mapping

import numpy as np

from gputune.search.stopping import Median, below_the_median
from gputune.study.ledger import Ledger
from gputune.tuning.context import Context
from gputune.tuning.rungs import check_trains, train_in_rungs


def check_median(method: Median, context: Context) -> None:
    """Raise InputError where no trial could be stopped, before anything is kept or trained."""
    check_trains("median", context)
    method.stops(context.epochs)


def stop_below_median(ledger: Ledger, method: Median, context: Context) -> None:
    """Train all trials of the ledger; at the epochs of the method those below the median leave."""

    def send_away(epoch: int, curves: Mapping[int, np.ndarray]) -> set[int]:
        means = {number: curves[number].mean(1) for number in sorted(curves)}
        return below_the_median(epoch, means, method.min_trials)

    train_in_rungs(ledger, method.stops(context.epochs), send_away, context)
