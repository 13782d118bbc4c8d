"""MLflow: one run for the search, one request for each batch of trials."""

import math
import time
from collections.abc import Mapping
from typing import Any

from gputune.callbacks.callback import Callback, best_score, plain_params, study_options, trial_numbers
from gputune.extras import import_extra
from gputune.study.study import Study

_MOST = 1000  # metrics that a server takes in one log_batch
_LONGEST = 500  # characters of a parameter


class MLflow(Callback):
    """Logs a search as one run of an MLflow experiment.

    The run's parameters are the options of the search and, at its end, "best/..." of the best trial. Its metrics have
    the trial's number as step: score, std_error, best_epoch, seconds, "params/..."; and, with the number of finished
    trials as step, best_score, the best so far.
    Every batch of trials is one ``log_batch`` (of at most 1000 metrics), however many trials it has.

    tracking_uri: None takes MLflow's own (its environment variable, or the default). Raises MissingExtraError
    without MLflow.
    """

    def __init__(
        self, experiment: str = "gputune", *, tracking_uri: str | None = None, run_name: str | None = None
    ) -> None:
        self.mlflow = import_extra("mlflow", extra="mlflow", used_by="MLflow")
        self.experiment, self.tracking_uri, self.run_name = experiment, tracking_uri, run_name
        self.run_id: str | None = None
        self.best, self.done = -math.inf, 0

    def on_study_start(self, study: Study) -> None:
        client = self._client()
        experiment = client.get_experiment_by_name(self.experiment)
        number = client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
        self.run_id = client.create_run(number, run_name=self.run_name).info.run_id
        self.best, self.done = best_score(study), sum(t.state != "waiting" for t in study.trials)
        client.log_batch(self.run_id, params=self._params(study_options(study)))

    def on_trials_end(self, trials: Study) -> None:
        now = int(time.time() * 1000)
        values = [
            (key, v, trial.number) for trial in trials.trials for key, v in trial_numbers(trial).items()
        ]
        self.best, self.done = max(self.best, best_score(trials)), self.done + len(trials.trials)
        if math.isfinite(self.best):
            values.append(("best_score", self.best, self.done))
        metrics = [self.mlflow.entities.Metric(key, value, now, step) for key, value, step in values]
        for begin in range(0, len(metrics), _MOST):
            self._client().log_batch(self.run_id, metrics=metrics[begin : begin + _MOST])

    def on_study_end(self, study: Study) -> None:
        client = self._client()
        if math.isfinite(self.best):
            best = study.best_trial
            known = {"trial": best.number, **plain_params(best.params)}
            client.log_batch(
                self.run_id, params=self._params({f"best/{key}": value for key, value in known.items()})
            )
        unfinished = any(trial.state in ("waiting", "stopped") for trial in study.trials)
        client.set_terminated(self.run_id, "KILLED" if unfinished else "FINISHED")

    def _client(self) -> Any:
        return self.mlflow.MlflowClient(tracking_uri=self.tracking_uri)

    def _params(self, values: Mapping[str, object]) -> list[Any]:
        return [self.mlflow.entities.Param(key, str(value)[:_LONGEST]) for key, value in values.items()]
