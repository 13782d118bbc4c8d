"""Ray Tune with the plain PyTorch loop: every trial of the list is a Ray trial on one core, all folds in turn."""

import os
import sys
import tempfile
import time
from typing import Any
from unittest.mock import patch

import ray
import torch
from ray import tune

from benchmark.engines.torch import fit
from benchmark.work import Outcome, Work, longest_first, standardised

os.environ |= {
    # Files of logs, and a table on the screen, would be paid for and not read.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Ray's handler would stay after the search and take Ctrl-C from what runs next in this process.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def train(work: Work, cores: int) -> Outcome:
    """Train the work on a Ray of this machine that is started and ended in the call."""
    begin = time.monotonic()
    folds, trials, epochs = standardised(work), work.trials, work.epochs

    def train_one(config: dict[str, Any]) -> None:
        began = time.monotonic()
        torch.set_num_threads(1)
        rows = ray.get(shared)  # mapped
        scores = [fit([part.copy() for part in fold], trials[config["position"]], epochs) for fold in rows]
        tune.report({"scores": scores, "began": began, "process": os.getpid()})

    # The workers import what this process can.
    with (
        patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            ray.init(
                "local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="error"
            )
            shared = ray.put(folds)
            results = tune.Tuner(
                tune.with_resources(train_one, {"cpu": 1}),
                param_space={"position": tune.grid_search(longest_first(trials))},
                tune_config=tune.TuneConfig(reuse_actors=True),
                run_config=tune.RunConfig(storage_path=folder, verbose=0),
            ).fit()
        finally:
            ray.shutdown()
    return _outcome(results, work, begin)


def _outcome(results: Any, work: Work, begin: float) -> Outcome:
    scores = work.no_scores()
    began: dict[int, float] = {}
    for result in results:
        if result.error is not None:
            raise result.error
        found = result.metrics
        scores[found["config"]["position"]] = found["scores"]
        began[found["process"]] = min(found["began"], began.get(found["process"], found["began"]))
    return Outcome(scores, max(began.values()) - begin)
