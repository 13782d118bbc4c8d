"""The logger ``gputune.callbacks.MLflow``."""

import math
import re
import time
from collections.abc import Mapping
from typing import Any

from gputune.errors import import_extra
from gputune.integrations.logged_values import (
    best_score,
    plain_params,
    study_options,
    trial_numbers,
)
from gputune.study.study import Study
from gputune.tuning.callbacks import Callback

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
        self.best = best_score(study)
        self.done = sum(t.state != "waiting" for t in study.trials)
        client.log_batch(self.run_id, params=self._params(study_options(study)))

    def on_trials_end(self, trials: Study) -> None:
        now = int(time.time() * 1000)
        metrics = []

        def add(key: str, value: float, step: int) -> None:
            name = _REFUSED.sub("_", key)
            metrics.append(self.mlflow.entities.Metric(name, value, now, step))

        for trial in trials.trials:
            for key, value in trial_numbers(trial).items():
                add(key, value, trial.number)
        self.best = max(self.best, best_score(trials))
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
