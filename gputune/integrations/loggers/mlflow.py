"""The logger ``gputune.callbacks.MLflow``."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gputune.ground.entry_points import import_extra
from gputune.integrations.logged_values import (
    best_score,
    epochs_by_trial,
    plain_params,
    study_options,
    trial_numbers,
)
from gputune.study.study import Study
from gputune.tuning.callbacks import Callback

_MOST = 1000  # MLflow's limit of metrics in one log_batch
_LONGEST = 500  # characters of a parameter value that are logged at most
_PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows a run below its parent
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
        tags: tags of the run, a dict of texts. The runs of single trials have them too.
        per_trial: whether each trial is also a run of its own, a child of the search's run. It has
            the hyperparameters as parameters, and "score", "std_error" and "metrics/..." with the
            epoch as step.

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
        tags: Mapping[str, str] | None = None,
        per_trial: bool = False,
    ) -> None:
        self.mlflow = import_extra("mlflow", extra="mlflow", used_by="MLflow")
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.run_name = run_name
        self.tags = dict(tags or {})
        self.per_trial = per_trial
        self.experiment_id = ""
        self.run_id: str | None = None
        self.best = -math.inf
        self.done = 0

    def on_study_start(self, study: Study) -> None:
        client = self._client()
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            self.experiment_id = client.create_experiment(self.experiment)
        else:
            self.experiment_id = experiment.experiment_id
        run = client.create_run(self.experiment_id, run_name=self.run_name, tags=self.tags)
        self.run_id = run.info.run_id
        self.best = best_score(study)
        self.done = sum(t.state != "waiting" for t in study.trials)
        client.log_batch(self.run_id, params=self._params(study_options(study)))

    def on_trials_end(self, trials: Study) -> None:
        metrics = []
        for trial in trials.trials:
            for key, value in trial_numbers(trial).items():
                metrics.append(self._metric(key, value, trial.number))
        self.best = max(self.best, best_score(trials))
        self.done += len(trials.trials)
        if math.isfinite(self.best):
            metrics.append(self._metric("best_score", self.best, self.done))
        self._send(self.run_id, metrics)
        if self.per_trial:
            self._log_trials(trials)

    def _log_trials(self, trials: Study) -> None:
        """Log one run for each trial, with its learning curve and its hyperparameters."""
        client = self._client()
        for trial, epochs in epochs_by_trial(trials):
            run = client.create_run(
                self.experiment_id,
                run_name=f"trial-{trial.number:05d}",
                tags={**self.tags, _PARENT: str(self.run_id)},
            )
            client.log_batch(run.info.run_id, params=self._params(plain_params(trial.params)))
            metrics = []
            for epoch, values in enumerate(epochs, 1):
                for name, value in values.items():
                    metrics.append(self._metric(name, value, epoch))
            self._send(run.info.run_id, metrics)
            status = "FAILED" if trial.state == "failed" else "FINISHED"
            client.set_terminated(run.info.run_id, status)

    def _metric(self, key: str, value: float, step: int) -> Any:
        """Return a metric of MLflow with a name that MLflow accepts."""
        now = int(time.time() * 1000)
        return self.mlflow.entities.Metric(_REFUSED.sub("_", key), value, now, step)

    def _send(self, run_id: str | None, metrics: Sequence[Any]) -> None:
        """Send metrics in requests of at most 1000 metrics."""
        for begin in range(0, len(metrics), _MOST):
            self._client().log_batch(run_id, metrics=metrics[begin : begin + _MOST])

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
