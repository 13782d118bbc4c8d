"""Compare the best trial of a search with the trial of the default configuration."""

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from gputune.ground.text import count
from gputune.ground.types import Json
from gputune.study.study import Study, Trial, best_trial
from gputune.views.scores import score_view

NO_IMPROVEMENT = "The search did not improve on the default."


@dataclass(frozen=True, kw_only=True)
class DefaultTrial(Trial):
    """The trial of the default configuration, compared with the best trial of its study.

    ``gputune.Study.default_trial`` returns it. It has the attributes of ``gputune.Trial``, and these:

    Attributes:
        best_score: score of the best trial.
        improvement: ``best_score - score``. Scores follow scikit-learn (greater is better), so a
            positive value means that the best trial is better, for losses too. Like ``best_score``,
            the improvement is optimistic, because the same folds chose the best trial.
        improvement_std_error: paired standard error of ``improvement``. It is computed from the
            differences fold by fold, as ``std(ddof=1) / sqrt(F)``. NaN for fewer than two folds.
        text: sentences that say whether tuning helped. "" if no other trial has been trained.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> study = gputune.tune("mlp", X, y, n_trials=4, max_epochs=5, verbose=0)
        >>> default = study.default_trial
        >>> default.number, default.improvement == study.best_score - default.score
        (0, True)
    """

    best_score: float
    improvement: float
    improvement_std_error: float
    text: str = ""


def default_trial(study: Study) -> DefaultTrial | None:
    """Return the trial of the default configuration, with its comparison to the best trial.

    Returns:
        The comparison. None if no trial is the default configuration or if that trial has no finite
        score. None also for the points of a hypergradient search, for ``gputune.search`` and for
        searches of scikit-learn's estimators, which do not run gputune's defaults.
    """
    best = best_trial(study)
    default = next((trial for trial in study.trials if trial.origin == "default"), None)
    if best is None or default is None or not math.isfinite(default.score):
        return None
    if len(default.schedule) > 1 or len(default.lineage) > 1:
        return None  # population based training has changed it
    values = {field.name: getattr(default, field.name) for field in fields(Trial)}
    compared = DefaultTrial(
        **values,
        best_score=best.score,
        improvement=best.score - default.score,
        improvement_std_error=_paired_std_error(best, default),
    )
    return replace(compared, text=_text(study, compared))


def _paired_std_error(best: Trial, default: Trial) -> float:
    """Return the paired standard error of the improvement, from the score differences fold by
    fold."""
    n_folds = len(best.fold_scores)
    if n_folds < 2 or n_folds != len(default.fold_scores):
        return math.nan
    if not np.isfinite([best.fold_scores, default.fold_scores]).all():
        return math.nan  # possible in a damaged file
    differences = np.subtract(best.fold_scores, default.fold_scores)
    return float(np.std(differences, ddof=1)) / math.sqrt(n_folds)


def improvement_text(study: Study) -> str:
    """Return sentences that say whether tuning improved the score, or "" without a default
    trial."""
    default = default_trial(study)
    return "" if default is None else default.text


def _text(study: Study, default: DefaultTrial) -> str:
    trained = [trial for trial in study.trials if trial.state != "waiting"]
    if len(trained) < 2:  # only the default configuration
        return ""
    if default.improvement <= 0:
        return NO_IMPROVEMENT
    measure = score_view(study).measure
    scored_on = "on the same folds" if len(default.fold_scores) > 1 else "on the same rows"
    gain = measure.size(default.improvement)
    if math.isfinite(default.improvement_std_error):
        error = measure.size(default.improvement_std_error)
        n_folds = count(len(default.fold_scores), "fold")
        gain = f"{gain} ± {error} (paired standard error over {n_folds})"
    sentences = [
        f"The default configuration (trial {default.number}) scores {measure.text(default.score)} "
        f"{scored_on},",
        f"the best trial {measure.text(default.best_score)}: an improvement of {gain}.",
    ]
    sentences.append(shorter_training(default))
    return " ".join(filter(None, sentences))


def shorter_training(default: DefaultTrial) -> str:
    """Return a remark if the default trial was pruned or cut short, else ""."""
    states = {"pruned": "pruned", "stopped": "cut short"}
    if default.state not in states:
        return ""
    return f"The default was {states[default.state]}, so its score is from a shorter training."


def improvement_json(study: Study) -> Json | None:
    """Return the comparison with the default trial as a JSON value, or None without a default
    trial.

    A standard error of NaN becomes None.
    """
    default = default_trial(study)
    if default is None:
        return None
    error = default.improvement_std_error
    return {
        "number": default.number,
        "state": default.state,
        "score": default.score,
        "best_score": default.best_score,
        "improvement": default.improvement,
        "improvement_std_error": error if math.isfinite(error) else None,
    }
