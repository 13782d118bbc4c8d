"""The callback protocol of ``tune(callbacks=...)``, and loggers that use it.

A search calls a callback at four moments. An error in a callback cannot lose finished results. The
loggers write to MLflow, TensorBoard, and Weights & Biases. Each logger records one run for the
search, and numeric and text values for each trial.
"""

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gputune.engine.stop import Stop
from gputune.errors import import_extra, warn
from gputune.spaces.distributions import label
from gputune.study.record import RECORD_FIELDS
from gputune.study.study import Study, Trial
from gputune.types import Json

__all__ = ["Callback", "MLflow", "StopSearch", "TensorBoard", "WandB"]


class StopSearch(Exception):
    """The exception that a callback raises to end the search after the running epoch. ``tune``
    catches the exception, keeps the finished results, and returns the study.

    Example:
        >>> from gputune.callbacks import Callback, StopSearch
        >>> class StopWhenGood(Callback):
        ...     def on_trials_end(self, trials):
        ...         if trials.best_score > 0.95:
        ...             raise StopSearch
    """


class Callback:
    """Base class of callbacks. Override the methods that you need.

    The search calls the methods in its own process. Each method does nothing by default. Trials are
    stored, in memory and in the study's file, before a callback receives them.

    ``StopSearch`` ends the search. Any other exception becomes a warning: gputune does not call
    this callback again, and the search continues. A KeyboardInterrupt stops the search as usual.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> class Count(gputune.callbacks.Callback):
        ...     finished = 0
        ...     def on_trials_end(self, trials):
        ...         self.finished += len(trials.trials)
        >>> count = Count()
        >>> study = gputune.tune(
        ...     "mlp", X, y, n_trials=4, max_epochs=2, callbacks=[count], verbose=0
        ... )
        >>> count.finished
        4
    """

    def on_study_start(self, study: Study) -> None:
        """The search calls this method once, before anything trains.

        Args:
            study: the study, with the options (``meta``) and the trials known so far.
        """

    def on_epoch(self, curves: np.ndarray) -> None:
        """The search calls this method when trials that train together (a chunk) have trained
        further.

        Training in this process reports one epoch at a time. A worker process reports all epochs of
        a chunk at once.

        Args:
            curves: scores (C, epochs, F) of the chunk's trials in the new epochs. With several
                metrics they are scores by the first metric.
        """

    def on_trials_end(self, trials: Study) -> None:
        """The search calls this method with each batch of trials that this process has finished.

        Args:
            trials: a study of these trials, with ``trials`` and ``curves``.
        """

    def on_study_end(self, study: Study) -> None:
        """The search calls this method once at its end, also after an error or Ctrl-C.

        Args:
            study: the study with all finished results.
        """


class Callbacks:
    """The callbacks of one search. A callback that raises an error is not called again."""

    def __init__(self, callbacks: Sequence[Callback], stop: Stop) -> None:
        self.active = list(callbacks)
        self.stop = stop

    def tell(self, moment: str, argument: object) -> None:
        """Call the method ``moment`` (such as "on_epoch") of every callback.

        A callback that raises an error is removed with a warning.
        """
        for callback in list(self.active):
            try:
                getattr(callback, moment)(argument)
            except StopSearch:
                self.stop.ask()
            except Exception as error:  # any error of the user's callback
                self.active.remove(callback)
                name = type(callback).__name__
                warn(
                    f"{name}.{moment} raised {type(error).__name__}: {error}. {name} is not called "
                    "again. The search continues without this callback, and loses no results."
                )


def plain_params(params: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """Return hyperparameters in a form that loggers accept: numbers, booleans and strings.

    Other values, and None, become strings.
    """
    plain = {}
    for key, value in params.items():
        text = label(value)
        plain[key] = "None" if text is None else text
    return plain


def trial_numbers(trial: Trial) -> dict[str, float]:
    """Return the numeric results and hyperparameters of a trial as a dict, for loggers.

    Values that are not finite are left out. The keys are score, std_error, best_epoch, seconds and
    ``params/...`` for numeric hyperparameters. With several metrics there is also ``metrics/NAME``,
    the mean of each metric over the folds.
    """
    numbers: dict[str, float] = {
        "score": trial.score,
        "std_error": trial.std_error,
        "best_epoch": trial.best_epoch,
        "seconds": trial.seconds,
    }
    numbers |= {f"metrics/{name}": score for name, score in trial.scores.items()}
    for name, value in trial.params.items():
        if isinstance(value, bool | int | float):
            numbers[f"params/{name}"] = value
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _best_score(study: Study) -> float:
    """Return the best finite score of a study.

    Pruned trials do not count. Without a finite score, return -inf.
    """
    scores = [trial.score for trial in study.trials if trial.state != "pruned"]
    return max(filter(math.isfinite, scores), default=-math.inf)


def _study_options(study: Study) -> Json:
    """Return the options of a search that loggers record, so that users can compare searches."""
    record = study.record
    options = {}
    for name, part in RECORD_FIELDS.items():
        if part.logged and name not in record.absent:
            value = getattr(record, name)
            if value is not None:
                options[name] = value
    return options


_MOST = 1000  # MLflow's limit of metrics in one log_batch
_LONGEST = 500  # characters of a parameter value that are logged at most
_REFUSED = re.compile(r"[^\w./ -]")  # characters that MLflow refuses in a metric name


class MLflow(Callback):
    """Log a search as one run of an MLflow experiment.

    The parameters of the run are the options of the search and, at its end, "best/..." with the
    best trial. The metrics score, std_error, best_epoch, seconds and "params/..." have the trial's
    number as step. With several metrics there is "metrics/..." too. The metric best_score has the
    number of finished trials as step.

    Every batch of trials is sent in one ``log_batch``, or in several if it has more than 1000
    metrics.

    Args:
        experiment: name of the experiment. It is created if it does not exist.
        tracking_uri: the tracking server. None: MLflow's own setting (its environment variable, or
            its default).
        run_name: name of the run. None: MLflow makes a name.

    Raises:
        MissingExtraError: MLflow is not installed.

    Example:
        >>> import gputune
        >>> logger = gputune.callbacks.MLflow("iris", tracking_uri="sqlite:///mlflow.db")
        >>> logger.experiment  # pass it as gputune.tune(..., callbacks=[logger])
        'iris'
    """

    def __init__(
        self,
        experiment: str = "gputune",
        *,
        tracking_uri: str | None = None,
        run_name: str | None = None,
    ) -> None:
        self.mlflow = import_extra("mlflow", extra="mlflow", used_by="MLflow")
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.run_name = run_name
        self.run_id: str | None = None
        self.best = -math.inf
        self.done = 0

    def on_study_start(self, study: Study) -> None:
        client = self._client()
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            experiment_id = client.create_experiment(self.experiment)
        else:
            experiment_id = experiment.experiment_id
        self.run_id = client.create_run(experiment_id, run_name=self.run_name).info.run_id
        self.best = _best_score(study)
        self.done = sum(t.state != "waiting" for t in study.trials)
        client.log_batch(self.run_id, params=self._params(_study_options(study)))

    def on_trials_end(self, trials: Study) -> None:
        now = int(time.time() * 1000)
        metrics = []

        def add(key: str, value: float, step: int) -> None:
            name = _REFUSED.sub("_", key)
            metrics.append(self.mlflow.entities.Metric(name, value, now, step))

        for trial in trials.trials:
            for key, value in trial_numbers(trial).items():
                add(key, value, trial.number)
        self.best = max(self.best, _best_score(trials))
        self.done += len(trials.trials)
        if math.isfinite(self.best):
            add("best_score", self.best, self.done)
        for begin in range(0, len(metrics), _MOST):
            self._client().log_batch(self.run_id, metrics=metrics[begin : begin + _MOST])

    def on_study_end(self, study: Study) -> None:
        client = self._client()
        if math.isfinite(self.best):
            best: dict[str, object] = {"best/trial": study.best_trial.number}
            for key, value in plain_params(study.best_params).items():
                best[f"best/{key}"] = value
            client.log_batch(self.run_id, params=self._params(best))
        unfinished = any(trial.state in ("waiting", "stopped") for trial in study.trials)
        client.set_terminated(self.run_id, "KILLED" if unfinished else "FINISHED")

    def _client(self) -> Any:
        return self.mlflow.MlflowClient(tracking_uri=self.tracking_uri)

    def _params(self, values: Mapping[str, object]) -> list[object]:
        return [
            self.mlflow.entities.Param(key, str(value)[:_LONGEST]) for key, value in values.items()
        ]


class TensorBoard(Callback):
    """Write TensorBoard event files: "search" for the whole search, "trial-00007" for a trial.

    The search has the scalar "best score" by the number of trained trial-epochs. A trial has the
    scalars "score" (the mean validation score) and "std_error" by epoch. With several metrics it
    has "metrics/..." too. Its hyperparameters are on the HPARAMS page, together with "final score"
    and "final metrics/...".

    Args:
        folder: the folder for the event files. It is created if it does not exist.

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

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        import_extra("tensorboard", extra="tensorboard", used_by="TensorBoard")
        self.folder = Path(folder)
        self.trial_epochs = 0
        self.best = -math.inf

    def on_study_start(self, study: Study) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.trial_epochs = 0
        self.best = -math.inf
        self.search = SummaryWriter(self.folder / "search")
        known = _study_options(study)
        described = [
            f"{key}: {known[key]}"
            for key in ("model", "scoring", "positive", "space")
            if key in known
        ]
        self.search.add_text("study", "  \n".join(described))

    def on_epoch(self, curves: np.ndarray) -> None:
        means = curves.mean(2)
        self.trial_epochs += means.size
        if np.isfinite(means).any():
            self.best = max(
                self.best, float(np.nanmax(np.where(np.isfinite(means), means, np.nan)))
            )
            self.search.add_scalar("best score", self.best, self.trial_epochs)

    def on_trials_end(self, trials: Study) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        by_epoch = {"score": trials.curves.mean(2)}
        folds = trials.curves.shape[2]
        if folds > 1:
            by_epoch["std_error"] = trials.curves.std(2, ddof=1) / math.sqrt(folds)
        by_epoch |= {f"metrics/{name}": trials.curves_of(name).mean(2) for name in trials.metrics}
        for row, trial in enumerate(trials.trials):
            with SummaryWriter(self.folder / f"trial-{trial.number:05d}") as run:
                for name, values in by_epoch.items():
                    for epoch in np.flatnonzero(np.isfinite(values[row])).tolist():
                        run.add_scalar(name, values[row, epoch], epoch + 1)
                # SummaryWriter.add_hparams would open a second file in a separate folder for every
                # trial.
                final = {"final score": trial.score}
                final |= {f"final metrics/{name}": score for name, score in trial.scores.items()}
                for part in hparams(plain_params(trial.params), final):  # type: ignore[no-untyped-call]
                    run._get_file_writer().add_summary(part)
                for name, score in final.items():
                    run.add_scalar(name, score)
        self.search.flush()

    def on_study_end(self, study: Study) -> None:
        self.search.close()


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
        self.best = _best_score(study)
        folder = None if self.folder is None else os.fspath(self.folder)
        self.run = self.wandb.init(
            project=self.project,
            name=self.name,
            mode=self.mode,
            dir=folder,
            config=_study_options(study),
            settings=self.wandb.Settings(silent=True, console="off"),
        )

    def on_trials_end(self, trials: Study) -> None:
        self.best = max(self.best, _best_score(trials))
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
