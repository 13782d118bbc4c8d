"""Weights & Biases: one run for the search, offline unless it is asked to be online."""

import math
import os
from typing import Any, Literal

from gputune.callbacks.callback import Callback, best_score, plain_params, study_options, trial_numbers
from gputune.extras import import_extra
from gputune.study.study import Study


class WandB(Callback):
    """Logs a search as one run: the options as its config, a row of its history for each trial, the best as summary.

    mode     "offline" writes into ``folder`` only (``wandb sync`` sends it later), "online" sends it as it comes
    folder   where "wandb/" is made; None: the current folder

    Rows are written to a file and sent by a process of W&B's own, so no trial waits for the network. Raises
    MissingExtraError without wandb.
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
        self.project, self.name, self.mode, self.folder = project, name, mode, folder
        self.run: Any = None
        self.best = -math.inf

    def on_study_start(self, study: Study) -> None:
        self.best = best_score(study)
        self.run = self.wandb.init(
            project=self.project,
            name=self.name,
            mode=self.mode,
            dir=None if self.folder is None else os.fspath(self.folder),
            config=study_options(study),
            settings=self.wandb.Settings(silent=True, console="off"),
        )

    def on_trials_end(self, trials: Study) -> None:
        self.best = max(self.best, best_score(trials))
        for trial in trials.trials:
            numbers = trial_numbers(trial)
            words = {f"params/{key}": value for key, value in plain_params(trial.params).items()}
            row = {"trial": trial.number, "state": trial.state, **words, **numbers}
            self.run.log(row | ({"best_score": self.best} if math.isfinite(self.best) else {}))

    def on_study_end(self, study: Study) -> None:
        if math.isfinite(self.best):
            best = study.best_trial
            self.run.summary.update({"best_trial": best.number, "best_params": plain_params(best.params)})
        self.run.finish()
