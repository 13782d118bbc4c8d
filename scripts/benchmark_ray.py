"""Ray Tune with the plain PyTorch loop: every trial of the list is a Ray trial on one core, all folds in turn."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from benchmark_cores import longest_first
from benchmark_torch import fit
from benchmark_work import Outcome, Work, standardised
from ray import tune

os.environ |= {
    # Files of logs, and a table on the screen, would be paid for and not read.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray's handler would stay after the search and take Ctrl-C from what runs next in this process.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def train_with_ray(work: Work, cores: int) -> Outcome:
    """Train the work on a Ray of this machine that is started and ended in the call."""
    begin = time.monotonic()
    folds, trials, epochs = standardised(work), work.trials, work.epochs

    def train(config: dict[str, Any]) -> None:
        began = time.monotonic()
        torch.set_num_threads(1)
        rows = ray.get(shared)  # mapped
        scores = [fit([part.copy() for part in fold], trials[config["position"]], epochs) for fold in rows]
        tune.report({"scores": scores, "began": began, "process": os.getpid()})

    with local_ray(cores), tempfile.TemporaryDirectory() as folder:
        shared = ray.put(folds)
        results = tune.Tuner(
            tune.with_resources(train, {"cpu": 1}),
            param_space={"position": tune.grid_search(longest_first(trials))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    return _outcome(results, work, begin)


@contextmanager
def local_ray(cores: int) -> Iterator[None]:
    """Start a Ray of this machine, whose workers import what this process can, and end it."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield
    finally:
        ray.shutdown()
        del os.environ["PYTHONPATH"]
        os.environ |= {} if before is None else {"PYTHONPATH": before}


def _outcome(results: Any, work: Work, begin: float) -> Outcome:
    scores = np.full((len(work.trials), len(work.folds)), np.nan)
    began: dict[int, float] = {}
    for result in results:
        if result.error is not None:
            raise result.error
        found = result.metrics
        scores[found["config"]["position"]] = found["scores"]
        began[found["process"]] = min(found["began"], began.get(found["process"], found["began"]))
    return Outcome(scores, max(began.values()) - begin)
