"""The logger ``gputune.callbacks.WandB``."""

import math
import os
from typing import Any, Literal

from gputune.errors import import_extra
from gputune.integrations.logged_values import (
    best_score,
    plain_params,
    study_options,
    trial_numbers,
)
from gputune.study.study import Study
from gputune.tuning.callbacks import Callback


class WandB(Callback):
    """Log a search as one Weights & Biases run, offline by default.

    The options of the search are the config of the run. Each trial is a row of its history, with
    the same values as the metrics of ``MLflow`` and the text values of hyperparameters. The best
    trial is the summary. A process of W&B writes the rows to a file and sends them, so no trial
    waits for the network.

    Args:
        project: name of the project.
        name: name of the run. None: W&B makes a name.
        mode: "offline" only writes into ``folder`` (``wandb sync`` sends it later). "online" sends
            the data during the search.
        folder: the folder in which "wandb/" is made. None: the current folder.

    Raises:
        MissingExtraError: wandb is not installed.

    Example:
        >>> import gputune
        >>> logger = gputune.callbacks.WandB("iris", mode="offline")
        >>> logger.project  # pass it as gputune.tune(..., callbacks=[logger])
        'iris'
    """

    def __init__(
        self,
        project: str = "gputune",
        *,
        name: str | None = None,
        mode: Literal["offline", "online"] = "offline",
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.wandb = import_extra("wandb", extra="wandb", used_by="WandB")
        self.project = project
        self.name = name
        self.mode = mode
        self.folder = folder
        self.run: Any = None
        self.best = -math.inf

    def on_study_start(self, study: Study) -> None:
        self.best = best_score(study)
        folder = None if self.folder is None else os.fspath(self.folder)
        self.run = self.wandb.init(
            project=self.project,
            name=self.name,
            mode=self.mode,
            dir=folder,
            config=study_options(study),
            settings=self.wandb.Settings(silent=True, console="off"),
        )

    def on_trials_end(self, trials: Study) -> None:
        self.best = max(self.best, best_score(trials))
        best = {"best_score": self.best} if math.isfinite(self.best) else {}
        for trial in trials.trials:
            words = {f"params/{key}": value for key, value in plain_params(trial.params).items()}
            self.run.log(
                {
                    "trial": trial.number,
                    "state": trial.state,
                    **words,
                    **trial_numbers(trial),
                    **best,
                }
            )

    def on_study_end(self, study: Study) -> None:
        if math.isfinite(self.best):
            best = {
                "best_trial": study.best_trial.number,
                "best_params": plain_params(study.best_params),
            }
            self.run.summary.update(best)
        self.run.finish()
