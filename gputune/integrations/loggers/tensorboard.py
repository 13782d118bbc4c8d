"""The logger ``gputune.callbacks.TensorBoard``."""

import math
import os
from pathlib import Path

import numpy as np

from gputune.ground.entry_points import import_extra
from gputune.integrations.logged_values import epochs_by_trial, plain_params, study_options
from gputune.study.study import Study
from gputune.tuning.callbacks import Callback


class TensorBoard(Callback):
    """Write TensorBoard event files: "search" for the whole search, "trial-00007" for a trial.

    The search has the scalar "best score" by the number of trained trial-epochs. A trial has the
    scalars "score" (the mean validation score) and "std_error" by epoch. With several metrics it
    has "metrics/..." too. Its hyperparameters are on the HPARAMS page, together with "final score"
    and "final metrics/...".

    Args:
        folder: the folder for the event files. It is created if it does not exist.
        per_trial: whether each trial is a run of its own. False writes only the run "search".

    Raises:
        MissingExtraError: tensorboard is not installed.

    Example:
        >>> import gputune, os
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> logger = gputune.callbacks.TensorBoard("runs")
        >>> study = gputune.tune(
        ...     "mlp", X, y, n_trials=2, max_epochs=2, callbacks=[logger], verbose=0
        ... )
        >>> sorted(os.listdir("runs"))
        ['search', 'trial-00000', 'trial-00001']
    """

    def __init__(self, folder: str | os.PathLike[str], *, per_trial: bool = True) -> None:
        import_extra("tensorboard", extra="tensorboard", used_by="TensorBoard")
        self.folder = Path(folder)
        self.per_trial = per_trial
        self.trial_epochs = 0
        self.best = -math.inf

    def on_study_start(self, study: Study) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.trial_epochs = 0
        self.best = -math.inf
        self.search = SummaryWriter(self.folder / "search")
        known = study_options(study)
        described = [
            f"{key}: {known[key]}"
            for key in ("model", "scoring", "positive", "space")
            if key in known
        ]
        self.search.add_text("study", "  \n".join(described))

    def on_epoch(self, curves: np.ndarray) -> None:
        means = curves.mean(2)
        self.trial_epochs += means.size
        finite = means[np.isfinite(means)]
        if finite.size:
            self.best = max(self.best, float(finite.max()))
            self.search.add_scalar("best score", self.best, self.trial_epochs)

    def on_trials_end(self, trials: Study) -> None:
        if self.per_trial:
            self._write_trials(trials)
        self.search.flush()

    def _write_trials(self, trials: Study) -> None:
        """Write one run for each trial, with its learning curve and its hyperparameters."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for trial, epochs in epochs_by_trial(trials):
            with SummaryWriter(self.folder / f"trial-{trial.number:05d}") as run:
                for epoch, values in enumerate(epochs, 1):
                    for name, value in values.items():
                        run.add_scalar(name, value, epoch)
                # SummaryWriter.add_hparams would open a second file in a separate folder for every
                # trial.
                final = {"final score": trial.score}
                final |= {f"final metrics/{name}": score for name, score in trial.scores.items()}
                for part in hparams(plain_params(trial.params), final):  # type: ignore[no-untyped-call]
                    run._get_file_writer().add_summary(part)
                for name, score in final.items():
                    run.add_scalar(name, score)

    def on_study_end(self, study: Study) -> None:
        self.search.close()
