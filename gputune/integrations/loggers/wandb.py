"""The logger ``gputune.callbacks.WandB``."""

import math
import os
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from gputune.ground.entry_points import import_extra
from gputune.ground.types import Json
from gputune.integrations.logged_values import (
    best_score,
    epochs_by_trial,
    plain_params,
    study_options,
    trial_numbers,
)
from gputune.study.study import Study
from gputune.tuning.callbacks import Callback


class WandB(Callback):
    """Log a search as one Weights & Biases run, offline by default. Trials can have own runs too.

    The options of the search are the config of the run. Each trial is a row of its history, with
    the same values as the metrics of ``MLflow`` and the text values of hyperparameters. The best
    trial is the summary. A process of W&B writes the rows to a file and sends them, so no trial
    waits for the network.

    Args:
        project: name of the project.
        name: name of the run. None: W&B makes a name.
        mode: "offline" only writes into ``folder`` (``wandb sync`` sends it later). "online" sends
            the data during the search. "disabled" logs nothing. None: the environment variable
            WANDB_MODE, or "offline" without this variable.
        folder: the folder in which "wandb/" is made. None: the current folder.
        entity: user or team that owns the run. None: the default of your W&B account.
        group: name of the group of the run.
        tags: tags of the run.
        per_trial: whether each trial is also a run of its own, with the job type "trial". Its
            config is the configuration. Its history has "score", "std_error" and "metrics/..." of
            each epoch. All runs are in one group, which gputune names if ``group`` is None.

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
        mode: Literal["offline", "online", "disabled"] | None = None,
        folder: str | os.PathLike[str] | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        per_trial: bool = False,
    ) -> None:
        self.wandb = import_extra("wandb", extra="wandb", used_by="WandB")
        self.project = project
        self.name = name
        self.mode = mode
        self.folder = folder
        self.entity = entity
        self.group = group
        self.tags = tuple(tags)
        self.per_trial = per_trial
        self.run: Any = None
        self.best = -math.inf

    def on_study_start(self, study: Study) -> None:
        self.best = best_score(study)
        if self.per_trial and self.group is None:
            self.group = self.name or f"search-{secrets.token_hex(4)}"
        job_type = "search" if self.per_trial else None
        self.run = self._begin_run(self.name, study_options(study), job_type=job_type)

    def _begin_run(self, name: str | None, config: Json, **options: Any) -> Any:
        """Begin a run, and return it."""
        mode = self.mode
        if mode is None and "WANDB_MODE" not in os.environ:
            mode = "offline"
        return self.wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags or None,
            name=name,
            mode=mode,
            dir=None if self.folder is None else os.fspath(self.folder),
            config=config,
            settings=self.wandb.Settings(silent=True, console="off"),
            **options,
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

        if self.per_trial:
            self._log_trials(trials)

    def _log_trials(self, trials: Study) -> None:
        """Log one run for each trial, with its learning curve and its hyperparameters."""
        for trial, epochs in epochs_by_trial(trials):
            run = self._begin_run(
                f"trial-{trial.number:05d}",
                plain_params(trial.params),
                job_type="trial",
                reinit="create_new",  # the run of the search stays open
            )
            for epoch, values in enumerate(epochs, 1):
                run.log(values, step=epoch)
            run.summary.update({"trial": trial.number, "state": trial.state})
            run.summary.update({"final score": trial.score, "best_epoch": trial.best_epoch})
            run.finish()

    def on_study_end(self, study: Study) -> None:
        if math.isfinite(self.best):
            best = {
                "best_trial": study.best_trial.number,
                "best_params": plain_params(study.best_params),
            }
            self.run.summary.update(best)
        self.run.finish()
