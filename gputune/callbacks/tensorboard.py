"""TensorBoard: a run for each trial with its curve and hyperparameters, and the best score as it rises."""

import math
import os
from pathlib import Path

import numpy as np

from gputune.callbacks.callback import Callback, plain_params, study_options
from gputune.extras import import_extra
from gputune.study.study import Study


class TensorBoard(Callback):
    """Writes event files below ``folder``: "search" for the whole, "trial-00007" for a trial.

    The search has the scalar "best score" by trial-epochs trained. A trial has "score", the fold mean, and "std_error"
    by epoch, and its hyperparameters for the HPARAMS page beside its "final score". Raises MissingExtraError without
    tensorboard.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        import_extra("tensorboard", extra="tensorboard", used_by="TensorBoard")
        self.folder = Path(folder)
        self.trial_epochs, self.best = 0, -math.inf

    def on_study_start(self, study: Study) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.trial_epochs, self.best = 0, -math.inf
        self.search = SummaryWriter(self.folder / "search")
        known = study_options(study)
        described = [
            f"{key}: {known[key]}" for key in ("model", "scoring", "positive", "space") if key in known
        ]
        self.search.add_text("study", "  \n".join(described))

    def on_epoch(self, curves: np.ndarray) -> None:
        means = curves.mean(2)
        self.trial_epochs += means.size
        if np.isfinite(means).any():
            self.best = max(self.best, float(np.nanmax(np.where(np.isfinite(means), means, np.nan))))
            self.search.add_scalar("best score", self.best, self.trial_epochs)

    def on_trials_end(self, trials: Study) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for trial, curve in zip(trials.trials, trials.curves):
            with SummaryWriter(self.folder / f"trial-{trial.number:05d}") as run:
                errors = curve.std(1, ddof=1) / math.sqrt(curve.shape[1]) if curve.shape[1] > 1 else None
                for epoch, score in enumerate(curve.mean(1), 1):
                    if math.isfinite(score):
                        run.add_scalar("score", score, epoch)
                        if errors is not None:
                            run.add_scalar("std_error", errors[epoch - 1], epoch)
                # add_hparams would open a second file in a folder of its own for every trial.
                metrics = {"final score": trial.score}
                for part in hparams(plain_params(trial.params), metrics):  # type: ignore[no-untyped-call]
                    run._get_file_writer().add_summary(part)
                run.add_scalar("final score", trial.score)
        self.search.flush()

    def on_study_end(self, study: Study) -> None:
        self.search.close()
