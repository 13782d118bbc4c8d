"""scripts/tabarena_method.py has the methods that TabArena's runner calls; the package is not
needed.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

RNG = np.random.default_rng(0)
X = pd.DataFrame(
    {"a": RNG.normal(size=120), "c": pd.Series(RNG.choice(["red", "blue"], 120), dtype="category")}
)
X.index = X.index[::-1]  # that of a task is any
NUMBERS = X.a + (X.c == "red") + 0.1 * RNG.normal(size=120)
CUTS = pd.Series(
    pd.cut(NUMBERS, [-np.inf, 0, 1, np.inf], labels=["low", "mid", "high"]), index=X.index
)
TRAIN = slice(0, 90)
TEST = slice(90, 120)
SEARCH = {"model": "mlp", "n_trials": 3, "max_epochs": 15, "cv": 3}
METRICS = {"binary": "roc_auc", "multiclass": "log_loss", "regression": "root_mean_squared_error"}


def run(script, problem_type, y, **more):
    """The calls of ``ExperimentRunner`` for a split: the method, its results, and its error on the
    test rows.
    """
    metric = SimpleNamespace(name=METRICS[problem_type])
    method = script("tabarena_method").TabArenaMethod(
        problem_type=problem_type, eval_metric=metric, **SEARCH, **more
    )
    rows = X.iloc[TRAIN], y.iloc[TRAIN], X.iloc[TEST]
    assert method.warmup_fn is None and not method.can_get_oof
    lazy = {"lazy_load_function": lambda: rows} if problem_type == "binary" else {}
    out = method.fit_custom(*((None,) * 3 if lazy else rows), split_seed=1, **lazy)
    assert (
        out["predictions"].index.equals(X.iloc[TEST].index)
        and out["time_train_s"] > out["time_infer_s"] > 0
    )
    method.cleanup()
    return method, out


@pytest.mark.parametrize("ensemble", [True, False])
def test_classes(script, ensemble):
    y = (NUMBERS > 0.5).map({True: "yes", False: "no"})
    method, out = run(
        script, "binary", y, ensemble=ensemble, fit_kwargs={"num_cpus": 1, "num_gpus": 0}
    )
    p = out["probabilities"]
    assert list(p.columns) == ["no", "yes"] and (p.sum(axis=1) - 1).abs().max() < 1e-9
    assert set(out["predictions"]) <= {"no", "yes"}
    error = 1 - roc_auc_score(y.iloc[TEST], p["yes"])
    assert error < 0.2 and 0 <= method.get_metric_error_val() < 0.2
    assert ("ensemble" in method.tuned.info) == ensemble


def test_several_classes_and_numbers(script):
    rows = SimpleNamespace(target_name="size", group_on=None, time_on=None, group_time_on=None)
    method, out = run(script, "multiclass", CUTS, validation_metadata=rows)
    loss = log_loss(CUTS.iloc[TEST].astype(str), out["probabilities"][["high", "low", "mid"]])
    assert loss < 1 and 0 < method.get_metric_error_val() < 1
    method, out = run(script, "regression", NUMBERS)
    assert out["probabilities"] is None
    rmse = float(np.sqrt(np.mean((out["predictions"] - NUMBERS.iloc[TEST]) ** 2)))
    assert rmse < 0.8 and 0 < method.get_metric_error_val() < 0.8


def test_what_it_cannot_do_is_said(script):
    method = script("tabarena_method").TabArenaMethod
    with pytest.raises(ValueError, match="eval_metric must be one of roc_auc, .*, got 'f1'"):
        method("binary", SimpleNamespace(name="f1"))
    metric = SimpleNamespace(name="log_loss")
    with pytest.raises(
        ValueError, match=r"rows in groups or in order of time have no folds here, .*'day'"
    ):
        method(
            "binary",
            metric,
            use_task_specific_validation=True,
            validation_metadata=SimpleNamespace(time_on="day"),
        )
