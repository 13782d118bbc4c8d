"""gputune as a method of TabArena, the benchmark of models for tables.

TabArena: https://tabarena.ai, arXiv:2506.16791.

    from tabarena.benchmark.experiment import Experiment
    from tabarena_method import TabArenaMethod

    arguments = {"model": "realmlp", "n_trials": 64, "max_epochs": 256}
    Experiment("gputune_RealMLP", TabArenaMethod, arguments)

This file imports nothing from the package. It has the methods that ``ExperimentRunner`` calls on an
``AbstractExecModel``. Source: tabarena 0.1.0, benchmark/exec_models/base.py and
benchmark/experiment/experiment_runner.py.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import pandas as pd

import gputune

SCORERS = {
    "roc_auc": "roc_auc",
    "log_loss": "neg_log_loss",
    "accuracy": "accuracy",
} | dict.fromkeys(("rmse", "root_mean_squared_error"), "neg_root_mean_squared_error")
"""scikit-learn's names of the metrics of TabArena, which has AutoGluon's."""

Rows = tuple[pd.DataFrame, pd.Series, pd.DataFrame]


class Metric(Protocol):
    """A metric of AutoGluon; only its name is read."""

    name: str


class TabArenaMethod:
    """One search on the rows of a split; it predicts with the ensemble of its trials or the best
    one.

    ``ensemble`` chooses between the two. ``arguments`` are passed to ``gputune.tune``. Raises
    ValueError for unsupported metrics. Also raises it for tasks with groups of rows or rows in
    order of time, because the folds here ignore both.
    """

    can_get_error_val = True
    can_get_oof = can_get_preprocessing = False
    can_get_per_child_oof = can_get_per_child_test = can_get_per_child_val_idx = False
    failure_artifact = warmup_fn = None

    def __init__(
        self,
        problem_type: str,
        eval_metric: Metric,
        *,
        model: object = "realmlp",
        ensemble: bool = True,
        fit_kwargs: dict[str, Any] | None = None,
        use_task_specific_validation: bool = False,
        validation_metadata: Any = None,
        **arguments: Any,
    ) -> None:
        if eval_metric.name not in SCORERS:
            raise ValueError(
                f"eval_metric must be one of {', '.join(SCORERS)}, got {eval_metric.name!r}."
            )
        ordered = {
            name: getattr(validation_metadata, name, None)
            for name in ("group_on", "time_on", "group_time_on")
        }
        if use_task_specific_validation and any(ordered.values()):
            raise ValueError(
                f"rows in groups or in order of time have no folds here, got {ordered}."
            )
        self.problem_type = problem_type
        self.scoring = SCORERS[eval_metric.name]
        self.model = model
        self.ensemble = ensemble
        self.arguments = arguments
        if (fit_kwargs or {}).get("num_cpus") is not None:
            self.arguments = {"workers": (fit_kwargs or {})["num_cpus"], **arguments}

    def fit_custom(
        self,
        X: pd.DataFrame | None,
        y: pd.Series | None,
        X_test: pd.DataFrame | None,
        *,
        split_seed: int | None = None,
        lazy_load_function: Callable[[], Rows] | None = None,
    ) -> dict[str, Any]:
        """Search and predict the test rows; return predictions, probabilities and the seconds of
        both.

        The probabilities are None for a regression.
        """
        if lazy_load_function is not None:
            X, y, X_test = lazy_load_function()
        begin = perf_counter()
        self.fit(X, y, seed=split_seed or 0)
        fitted = perf_counter()
        numbers = self.problem_type == "regression"
        probabilities = None if numbers else self.predict_proba(X_test)
        predictions = (
            self.predict(X_test) if probabilities is None else probabilities.idxmax(axis=1)
        )
        return {
            "predictions": predictions,
            "probabilities": probabilities,
            "time_train_s": fitted - begin,
            "time_infer_s": perf_counter() - fitted,
        }

    def fit(self, X: pd.DataFrame, y: pd.Series, *, seed: int = 0) -> None:
        """Search on these rows, and train the result on all of them."""
        numbers = self.problem_type == "regression"
        options = {
            "task": "regression" if numbers else "classification",
            "verbose": 0,
            "random_state": seed,
        }
        options |= {"scoring": self.scoring, **self.arguments}
        values = y.to_numpy(float) if numbers else y.astype(object).to_numpy()
        study = gputune.tune(self.model, X.reset_index(drop=True), values, **options)
        together = self.ensemble and len(study.trials) > 1
        self.tuned = study.ensemble(verbose=0) if together else study.best_model()

    def predict(self, X: pd.DataFrame) -> pd.Series:
        """Return labels, or numbers for a regression, with the index of the rows."""
        return pd.Series(self.tuned.predict(X), index=X.index)

    def predict_proba(self, X: pd.DataFrame) -> pd.DataFrame:
        """Return the probabilities, one column per class, with the index of the rows."""
        return pd.DataFrame(self.tuned.predict_proba(X), index=X.index, columns=self.tuned.classes)

    def get_metric_error_val(self) -> float:
        """Return the cross-validated score as AutoGluon's error: 0 is best."""
        score = float(self.tuned.info["score"])
        return 1 - score if self.scoring in ("roc_auc", "accuracy") else -score

    def cleanup(self) -> None:
        """Do nothing, because no files are left."""
