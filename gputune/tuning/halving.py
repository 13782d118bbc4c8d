"""Successive halving at work: at each rung the best fold means of a bracket go on, and the others leave."""

from collections.abc import Mapping

import numpy as np

from gputune.search.stopping import Halving, survivors
from gputune.study.ledger import Ledger
from gputune.tuning.context import Context
from gputune.tuning.rungs import check_trains, train_in_rungs


def check_halving(method: Halving, context: Context) -> None:
    """Raise InputError where this search cannot be halved, before anything is kept or trained."""
    check_trains("halving", context)
    method.rungs(context.epochs)


def halve(ledger: Ledger, method: Halving, context: Context) -> None:
    """Train all trials of the ledger from rung to rung; each is finished when it leaves, or at the end."""
    rungs = method.rungs(context.epochs)
    numbers = [candidate.number for candidate in ledger.candidates]
    # By number and not by place: a study that was repaired may lack some.
    bracket_of = method.brackets_of(1 + max(numbers, default=-1), context.epochs)

    def send_away(epoch: int, curves: Mapping[int, np.ndarray]) -> set[int]:
        away: set[int] = set()
        for bracket in (b for b, own in enumerate(rungs) if epoch in own):
            reached = [n for n in sorted(curves) if bracket_of[n] == bracket and len(curves[n]) >= epoch]
            means = np.array([float(curves[n][epoch - 1].mean()) for n in reached])
            stays = survivors(means, method.factor)
            away |= {number for number, stay in zip(reached, stays) if not stay}
        return away

    train_in_rungs(ledger, sorted({rung for own in rungs for rung in own}), send_away, context)
