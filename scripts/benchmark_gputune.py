"""gputune's side of the benchmark: one call of the public ``tune``, on the CPU or on a card."""

import numpy as np
from benchmark_work import Work

import gputune


def train_with_gputune(work: Work, device: str = "cpu", verbose: int = 0) -> np.ndarray:
    """Return the last-epoch accuracies (C, F)."""
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
    )
    return study.curves[:, -1]
