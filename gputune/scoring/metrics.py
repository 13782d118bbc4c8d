"""The scoring argument of a search: one score, or several, of which the first ranks; the loss of a descent."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from gputune.data.dataset import Dataset
from gputune.errors import InputError
from gputune.scoring import scores
from gputune.scoring.objective import Objective
from gputune.scoring.scoring import Scorer, Scoring, has_positive_class, make_scoring, positive_code
from gputune.text import count
from gputune.types import Task

OneScoring = str | Scorer
Scorings = OneScoring | list[OneScoring] | tuple[OneScoring, ...] | Mapping[str, OneScoring]


def make_metrics(
    scoring: Scorings | None,
    task: Task,
    classes: np.ndarray | None,
    positive: object = None,
    objective: Objective | None = None,
    n_labels: int = 0,
) -> Scoring:
    """Return the checked Scoring of a scorer, or of several the first one, with the ``others``.

    It is as ``make_scoring`` has it, and ``positive`` goes to those that are of a class. Raises InputError also for a
    list without scorers, one that is twice in it, and what is no scorer.
    """
    scorers = scorers_of(scoring)
    if scorers is None:
        return make_scoring(cast(OneScoring | None, scoring), task, classes, positive, objective, n_labels)
    of_class = [_is_of_class(scorer, task) for scorer in scorers.values()]
    metrics = []
    for (label, scorer), own in zip(scorers.items(), of_class):
        its_class = positive if own or not any(of_class) else None  # what none of them takes is refused with the first
        metric = make_scoring(scorer, task, classes, its_class, objective, n_labels)
        metrics.append(replace(metric, label=label))
    return replace(metrics[0], others=tuple(metrics[1:]))


def scorers_of(scoring: object) -> dict[str, OneScoring] | None:
    """Return the scorers of a list, tuple or dict by name or key; None for one scorer, or none. Raises InputError."""
    if not isinstance(scoring, list | tuple | Mapping):
        return None
    if not scoring:
        raise InputError(
            f"scoring needs at least one score, got {scoring!r}; name one, or leave it out for the usual one."
        )
    labels = [one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__) for one in scoring]
    pairs = list(scoring.items() if isinstance(scoring, Mapping) else zip(labels, scoring))
    for label, scorer in pairs:
        if not (isinstance(scorer, str) or callable(scorer)):
            raise InputError(
                "scoring holds scikit-learn scorer names and callables, of (estimator, X, y) or (outputs, y), got "
                f"{scorer!r} in it; replace it."
            )
        if not isinstance(label, str) or not label:
            raise InputError(f"scoring, a dict, has texts as keys, got {label!r}; name each score.")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"scoring names {twice[0]!r} twice; leave one out, or give a dict that has a name for each.")
    return dict(pairs)


def has_function(scoring: object) -> bool:
    """Whether a scoring argument is, or holds, a function of the user's own."""
    scorers = scorers_of(scoring)
    return callable(scoring) if scorers is None else any(map(callable, scorers.values()))


def _is_of_class(scorer: OneScoring, task: Task) -> bool:
    """Whether a scorer of two classes is given one of them; a function of the user's chooses it."""
    from sklearn.metrics import get_scorer, get_scorer_names

    if callable(scorer) or task != "binary" or scorer in scores.OF_TASK[task]:
        return False
    return scorer in get_scorer_names() and has_positive_class(get_scorer(scorer))


def loss_scoring(task: Task, classes: np.ndarray | None, positive: object = None) -> Scoring:
    """Return minus the validation loss, without the limits of scikit-learn's log loss; InputError for ``positive``."""
    if task == "regression":
        return make_scoring("neg_mean_squared_error", task, classes, positive)
    positive_code(positive, "neg_log_loss", None, task, classes)
    return Scoring("neg_log_loss", scores.neg_cross_entropy, None, classes)


def _remedy(scoring: Scoring, data: Dataset) -> str:
    """Return what helps where a fold lacks a class: other folds do not where the class has one row."""
    counts = [] if data.task == "multilabel" else data.target.long().flatten().bincount().tolist()
    rows = min(counts, default=len(data.folds))
    if rows >= len(data.folds) or scoring.classes is None:
        return "choose fewer or stratified folds, or another scoring"
    name, fewer = scoring.classes[counts.index(rows)].item(), f"{rows} stratified folds, or " * (rows > 1)
    out = ", or leave that class out" * (data.task != "binary")
    return f"class {name!r} has {count(rows, 'row')} for {len(data.folds)} folds: choose {fewer}another scoring{out}"


def check_folds(scoring: Scoring, data: Dataset) -> None:
    """Raise InputError where the score is undefined on a fold, before anything trains."""
    for other in scoring.others:
        check_folds(other, data)
    for f, fold in enumerate(data.folds):
        rows = data.target[fold.valid]
        columns = rows.T if data.task == "multilabel" else rows[None]
        needed = 2 if data.task in ("multilabel", "binary") else data.n_outputs
        if scoring.name.startswith("roc_auc") and any(len(column.unique()) < needed for column in columns):
            raise InputError(
                f"scoring={scoring.name!r} needs every class among the validation rows, and fold {f} lacks one; "
                f"{_remedy(scoring, data)}."
            )
        if scoring.name == "r2" and len(rows) < 2:
            raise InputError(
                f"scoring='r2' needs two validation rows a fold, and fold {f} has {len(rows)}; choose fewer folds or "
                "scoring='neg_root_mean_squared_error'."
            )
