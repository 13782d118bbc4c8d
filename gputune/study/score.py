"""The score of a trial, taken from its curve: the fold mean at the best epoch of the mean curve, or at the last."""

from typing import Literal

import numpy as np

EpochRule = Literal["best", "last"]
State = Literal["complete", "failed", "stopped", "pruned"]


def score_curve(
    curve: np.ndarray, *, epochs: int, rule: EpochRule
) -> tuple[State, float, tuple[float, ...], int]:
    """Return state, score, fold scores (F,) and best epoch (from 1) of a curve (epochs planned, F).

    ``epochs`` is how many were done. One NaN fold at any of them makes the trial "failed" with score NaN; the
    earliest epoch wins a tie. "stopped" is a trial that a deadline cut short, scored on what it had.
    """
    done = curve[:epochs]
    diverged = np.flatnonzero(np.isnan(done).any(1))
    if len(diverged) or epochs == 0:
        at = int(diverged[0]) if len(diverged) else 0
        folds = tuple(done[at].tolist()) if epochs else (np.nan,) * curve.shape[1]
        return "failed", float("nan"), folds, at
    mean = done.mean(1)
    at = int(mean.argmax()) if rule == "best" else epochs - 1
    state: State = "complete" if epochs == len(curve) else "stopped"
    return state, float(mean[at]), tuple(done[at].tolist()), at + 1
