"""Studies whose numbers have 17 digits, and a search for numbers with more than four digits."""

import re
from dataclasses import replace

import numpy as np

from gputune.study.rows import FoldReport
from made_studies import study_of

# The second part of a version, such as 0.1.0, is no number of its own.
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\d)")


def long_numbers(text):
    """Return the numbers of a text that have more than four significant digits."""
    found = []
    for number in NUMBER.findall(text):
        mantissa = number.partition("e")[0]
        digits = mantissa.replace(".", "").lstrip("0")
        # zeros at the end of a whole number are places, not digits
        digits = digits if "." in mantissa else digits.rstrip("0")
        if len(digits) > 4:
            found.append(number)
    return found


def study_of_long_numbers(first_score, step, *, scoring="neg_log_loss"):
    """Return a study of 16 trials in which every number has 17 digits."""
    rng = np.random.default_rng(0)
    listed = [0.00012345678901234567, 0.12345678901234567, 0.2345678901234567]
    params = []
    for number in range(16):
        params.append(
            {
                "lr": listed[number % 3],
                "near": [0.12345678901234567, 0.12345698901234567][number % 2],
                "C": 123456.78901234567 * (1 + rng.random()),
                "tiny": 1.2345678901234567e-9 * (1 + rng.random()),
                "huge": 12345678901.234567 * (1 + rng.random()),
                "schedule": [0.12345678901234567, 0.1 * rng.random()],
                "module__pair": (0.12345678901234567, ("relu", rng.random() + number % 2)),
                "module__table": {"p": 1.2345678901234567 + number % 2},
            }
        )
    scores = [first_score + step * rng.random() for _ in params]
    study = study_of(
        params,
        scores,
        epochs=3,
        scoring=scoring,
        metrics=[
            {"name": "first", "scorer": scoring, "positive": None},
            {"name": "rmse", "scorer": "neg_root_mean_squared_error", "positive": None},
        ],
        space="lr=[0.00012345678901234567, 0.12345678901234567], "
        "C=loguniform(a=123456.78901234567, b=234567.8901234567), tiny=['1.23456 in quotes']",
        distributions={
            "lr": {"kind": "choices", "choices": listed},
            "C": {"kind": "float", "low": 1.2345678901234567e5, "high": 3e5, "log": True},
        },
        objective="quantile(0.12345678901234567)",
        method={"name": "random", "share": 0.12345678901234567},
        target_transform={"class": "PowerTransformer", "params": {"p": 0.12345678901234567}},
        baseline={"answer": "the mean", "score": -123.45678901234567},
        notes=[
            "Trial 0 is the default configuration, moved into the space: "
            "lr=0.00012345678901234567 in place of 0.0012345678901234567."
        ],
    )
    trials = []
    for trial, score in zip(study.trials, scores):
        folds = (score, score + 0.012345678901234567)
        change = {
            "fold_scores": folds,
            "score": float(np.mean(folds)),
            "seconds": 12345.678901234567,
            "metrics": {"first": folds, "rmse": tuple(-1234.5678901234567 * rng.random(2))},
        }
        trials.append(replace(trial, **change))
    first, *others = trials
    failed = replace(others.pop(), score=float("nan"), state="failed")
    trials = [replace(first, origin="default"), *others, failed]
    curves = np.array([[trial.fold_scores] * 3 for trial in trials])[..., None]
    curves = np.concatenate([curves, curves * 123.45678901234567], axis=-1)
    return replace(study, trials=tuple(trials), curves=curves)


def model_of_long_numbers(study):
    """Return the info of a tuned model of the study, as its folder holds it."""
    best = study.best_trial
    return {
        "params": best.params,
        "score": best.score,
        "held_out_score": -1.2345678901234567,
        "held_out_rows": 36,
        "held_out_baseline": {"answer": "the mean", "score": -123.45678901234567},
    }


def folds_of_long_numbers(study):
    """Return the importances of three columns on the folds of the study's best trial."""
    drops = np.array([12.345678901234567, 0.12345678901234567, 1.2345678901234567e-5])
    confusion = np.array([[12, 1, 0], [0, 14, 2], [1, 0, 9]])
    return FoldReport(study.best_trial.number, confusion, ("a", "b", "c"), drops, drops / 3)
