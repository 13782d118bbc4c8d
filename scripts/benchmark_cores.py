"""One training at a time on every core: trials x folds through joblib, one process a core, one thread each."""

import functools
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import joblib
import numpy as np
from benchmark_work import Fold, Trial, Work, standardised
from joblib.externals.loky import get_reusable_executor

Fit = Callable[[Fold, Trial, int], float]
"""Rows of one fold, one trial, epochs -> accuracy on the validation rows after the last epoch."""


def over_cores(fit: Fit, work: Work, cores: int) -> np.ndarray:
    """Return the accuracies (C, F). The rows are scaled and written once, and mapped by every worker."""
    scores = np.full((len(work.trials), len(work.folds)), np.nan)
    # Longest first, so that no worker begins a long training when the others have ended.
    jobs = sorted(
        product(range(len(work.trials)), range(len(work.folds))),
        key=lambda job: (work.trials[job[0]]["batch_size"], -work.trials[job[0]]["width"]),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "folds.joblib")
        joblib.dump(standardised(work), path)
        with joblib.parallel_config("loky", n_jobs=cores, inner_max_num_threads=1):
            results = joblib.Parallel(batch_size=1, pre_dispatch="all")(
                joblib.delayed(_fit_one)(fit, path, f, work.trials[c], work.epochs) for c, f in jobs
            )
    for job, result in zip(jobs, results):
        scores[job] = result
    return scores


def _fit_one(fit: Fit, path: str, fold: int, trial: Trial, epochs: int) -> float:
    return fit(_read(path)[fold], trial, epochs)


@functools.lru_cache(maxsize=1)
def _read(path: str) -> list[Fold]:
    # copy-on-write, because torch wants arrays that could be written
    folds: list[Fold] = joblib.load(path, mmap_mode="c")
    return folds


def stop_workers() -> None:
    """End the processes that joblib, and gputune with it, keep for the next call."""
    get_reusable_executor().shutdown(wait=True, kill_workers=True)
