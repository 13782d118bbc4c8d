"""Boosted trees for a table, at their defaults and tuned by Optuna.

The libraries are scikit-learn, LightGBM and CatBoost.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from time import process_time
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import get_scorer
from sklearn.model_selection import KFold, StratifiedKFold

# Rounds of boosting: the most, and the most without a better score on a fold's validation rows.
ROUNDS = 2_000
PATIENCE = 50
LIBRARIES = {"lightgbm": "LightGBM", "catboost": "CatBoost"}
SPACES: dict[str, dict[str, Any]] = {
    "lightgbm": {
        "learning_rate": (5e-3, 0.1, "log"),
        "num_leaves": (2, 200, "log"),
        "min_child_samples": (1, 64, "log"),
        "colsample_bytree": (0.4, 1.0),
        "subsample": (0.7, 1.0),
        "extra_trees": [False, True],
        "reg_alpha": (1e-5, 1.0, "log"),
        "reg_lambda": (1e-5, 2.0, "log"),
    },
    "catboost": {
        "learning_rate": (5e-3, 0.1, "log"),
        "depth": (4, 8),
        "l2_leaf_reg": (1e-4, 5.0, "log"),
        "subsample": (0.7, 1.0),
        "colsample_bylevel": (0.85, 1.0),
        "grow_policy": ["SymmetricTree", "Depthwise"],
        "leaf_estimation_iterations": (1, 20, "log"),
        "one_hot_max_size": (8, 100, "log"),
        "model_size_reg": (0.1, 1.5, "log"),
        "max_ctr_complexity": (2, 5),
    },
}
"""Those of AutoGluon's searches (TabArena's for CatBoost)."""


def versions() -> dict[str, str]:
    return {name: version(name) for name in (*LIBRARIES, "optuna") if find_spec(name)}


@dataclass(frozen=True)
class OfTable:
    """An estimator for rows of a table.

    Text becomes a category, and a date becomes three numbers.
    """

    estimator: Any
    levels: dict[str, pd.CategoricalDtype]
    as_text: bool = False

    def rows(self, X: pd.DataFrame) -> pd.DataFrame:
        """Return the rows in the form that the estimator accepts."""
        dates = [name for name in self.levels if name.startswith("date")]
        out = X.astype({name: kind for name, kind in self.levels.items() if name not in dates})
        for name in dates:
            when = pd.to_datetime(out.pop(name))
            out = out.assign(year=when.dt.year, month=when.dt.month, day=when.dt.day)
        if self.as_text:
            text = [name for name in self.levels if name not in dates]
            out = out.assign(
                **{name: out[name].astype(object).fillna("missing").astype(str) for name in text}
            )
        return out

    def fit(self, X: pd.DataFrame, y: pd.Series) -> "OfTable":
        self.estimator.fit(self.rows(X), y)
        return self

    def predict(self, X: pd.DataFrame) -> np.ndarray:
        return np.asarray(self.estimator.predict(self.rows(X)))

    def predict_proba(self, X: pd.DataFrame) -> np.ndarray:
        return np.asarray(self.estimator.predict_proba(self.rows(X)))


def levels_of(X: pd.DataFrame) -> dict[str, pd.CategoricalDtype]:
    text = [name for name in X.columns if X[name].dtype.kind not in "ifb"]
    return {name: pd.CategoricalDtype(sorted(X[name].dropna().unique())) for name in text}


def with_defaults(X: pd.DataFrame, y: pd.Series, task: str) -> Iterator[tuple[str, OfTable]]:
    """Yield the name of each installed library and its trees with their default settings."""
    histogram = (
        HistGradientBoostingRegressor if task == "regression" else HistGradientBoostingClassifier
    )
    levels = levels_of(X)
    yield (
        "HistGradientBoosting",
        OfTable(histogram(categorical_features="from_dtype", random_state=0), levels),
    )
    for library, name in LIBRARIES.items():
        if find_spec(library):
            yield name, _model(library, task, levels)


def _model(
    library: str, task: str, levels: dict[str, pd.CategoricalDtype], **chosen: Any
) -> OfTable:
    module = import_module(library)
    if library == "lightgbm":
        kind = module.LGBMRegressor if task == "regression" else module.LGBMClassifier
        return OfTable(kind(n_jobs=1, random_state=0, verbose=-1, **chosen), levels)
    kind = module.CatBoostRegressor if task == "regression" else module.CatBoostClassifier
    text = [name for name in levels if not name.startswith("date")]
    fixed = {
        "thread_count": 1,
        "random_seed": 0,
        "verbose": 0,
        "allow_writing_files": False,
        "cat_features": text,
    }
    return OfTable(kind(**fixed, **chosen), levels, as_text=True)


def _settings(library: str, task: str, scoring: str, rounds: int) -> dict[str, Any]:
    if library == "lightgbm":
        error = "binary_error" if task == "binary" else "multi_error"
        metric = {"roc_auc": "auc", "accuracy": error}.get(scoring, "rmse")
        return {"n_estimators": rounds, "metric": metric, "subsample_freq": 1}
    metric = {"roc_auc": "AUC", "accuracy": "Accuracy"}.get(scoring, "RMSE")
    return {"iterations": rounds, "eval_metric": metric, "bootstrap_type": "Bernoulli"}


def tuned(
    library: str,
    X: pd.DataFrame,
    y: pd.Series,
    task: str,
    scoring: str,
    *,
    folds: int,
    seconds: float,
) -> tuple[OfTable, int, int]:
    """Return a library's trees, tuned by Optuna's TPE for ``seconds`` of the processor.

    Also returns the number of trials and the best one. Each fold stops early. The best trial is
    fitted on all rows with the mean number of rounds over the folds.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    numbers = task == "regression"
    levels = levels_of(X)
    parts = (KFold if numbers else StratifiedKFold)(folds, shuffle=True, random_state=0)
    judge = get_scorer(scoring)

    def objective(trial: optuna.Trial) -> float:
        chosen = _drawn(trial, SPACES[library])
        scores = []
        rounds = []
        for train, valid in parts.split(X, None if numbers else y):
            one = _model(
                library, task, levels, **_settings(library, task, scoring, ROUNDS), **chosen
            )
            others = one.rows(X.iloc[valid]), y.iloc[valid]
            one.estimator.fit(one.rows(X.iloc[train]), y.iloc[train], **_stop(library, others))
            scores.append(judge(one.estimator, *others))
            rounds.append((one.estimator.best_iteration_ or ROUNDS) + (library == "catboost"))
        trial.set_user_attr("rounds", round(float(np.mean(rounds))))
        return float(np.mean(scores))

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    begin = process_time()
    while process_time() - begin < seconds:
        study.optimize(objective, n_trials=1)
    best = study.best_trial
    settings = _settings(library, task, scoring, best.user_attrs["rounds"])
    return (
        _model(library, task, levels, **settings, **best.params).fit(X, y),
        len(study.trials),
        best.number,
    )


def _drawn(trial: Any, space: dict[str, Any]) -> dict[str, Any]:
    """Draw a value of each distribution: an element of a list, or a number of the bounds' type."""
    drawn = {}
    for name, law in space.items():
        if isinstance(law, list):
            drawn[name] = trial.suggest_categorical(name, law)
        else:
            suggest = trial.suggest_int if isinstance(law[0], int) else trial.suggest_float
            drawn[name] = suggest(name, *law[:2], log="log" in law)
    return drawn


def _stop(library: str, others: tuple[pd.DataFrame, pd.Series]) -> dict[str, Any]:
    """Return the fit arguments that stop early if the score of other rows does not improve."""
    if library == "catboost":
        return {"eval_set": others, "early_stopping_rounds": PATIENCE}
    import lightgbm

    return {"eval_set": [others], "callbacks": [lightgbm.early_stopping(PATIENCE, verbose=False)]}
