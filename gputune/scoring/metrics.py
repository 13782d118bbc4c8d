"""The ``scoring`` argument of a search: one score or several scores. The first score ranks the
trials."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gputune.data.dataset import Dataset
from gputune.data.kinds import text_of
from gputune.errors import InputError
from gputune.scoring import scores
from gputune.scoring.label_scores import LABEL_SCORES
from gputune.scoring.losses import is_absolute
from gputune.scoring.objective import Objective, qualified_name
from gputune.scoring.scoring import Scorer, Scoring
from gputune.text import count, did_you_mean
from gputune.types import Task

OneScoring = str | Scorer
Scorings = OneScoring | list[OneScoring] | tuple[OneScoring, ...] | Mapping[str, OneScoring]


def make_scoring(
    scoring: Scorings | None,
    task: Task,
    classes: np.ndarray | None,
    positive: object = None,
    objective: Objective | None = None,
    n_labels: int = 0,
) -> Scoring:
    """Return the checked Scoring of a ``scoring`` argument.

    Args:
        scoring: A scikit-learn name, a callable ``scorer(estimator, X, y)`` or ``(outputs, y)``, or
            several of these. None means accuracy, for regression R2, the absolute error or the
            pinball loss (see ``default_scoring``), and for a custom target "neg_loss". That is
            minus the loss of the ``objective`` on the validation rows.
        task: The task of the search.
        classes: The class labels, or None.
        positive: The positive class of f1 and similar scores. Among several scores, only these
            receive it.
        objective: The objective that the models train on.
        n_labels: The number of labels of a multilabel target.

    Returns:
        The Scoring. For several scores, the Scoring of the first score, with the rest in
        ``others``.

    Raises:
        InputError: A score needs ``positive`` and it is missing, or ``positive`` is given for a
            score that has no positive class, or a score does not fit.
    """
    from sklearn.metrics import get_scorer

    if (scorers := scorers_of(scoring)) is not None:
        of_class = [_is_of_class(scorer, task) for scorer in scorers.values()]
        metrics = []
        for (label, scorer), own in zip(scorers.items(), of_class):
            # If no score takes the positive class, each score receives it, and the first raises.
            its_class = positive if own or not any(of_class) else None
            metric = make_scoring(scorer, task, classes, its_class, objective, n_labels)
            metrics.append(replace(metric, label=label))
        return replace(metrics[0], others=tuple(metrics[1:]))
    if scoring == "neg_loss" or (scoring is None and task == "custom"):
        return _neg_loss(objective, asked=scoring is not None)
    if scoring is None:
        scoring = default_scoring(task, objective)
    if scoring == scores.PINBALL and task == "regression":
        level = 0.5 if objective is None or objective.loss != "quantile" else objective.number
        return Scoring(scoring, partial(scores.neg_mean_pinball_loss, alpha=level), None, classes)
    if task == "multilabel":
        classes = np.eye(n_labels, dtype=np.int64)
    if not isinstance(scoring, str):
        if not callable(scoring):
            raise InputError(
                "scoring is a scikit-learn scorer name, a callable(estimator, X, y) or (outputs, "
                f"y), or a list or dict of them, got {scoring!r}."
            )
        scores.refuse_metric(scoring)
        name = qualified_name(scoring)
        if _takes_outputs(scoring):
            return Scoring(name, None, None, classes, of_outputs=scoring)
        return Scoring(
            name, None, scoring, classes, positive_code(positive, name, None, task, classes)
        )
    if (score := scores.OF_TASK[task].get(scoring)) is not None:
        positive_code(positive, scoring, None, task, classes)
        return Scoring(scoring, score, None, classes)
    _check_fits_task(scoring, task)
    codes = classes if classes is None or task == "multilabel" else np.arange(len(classes))
    scorer = get_scorer(scoring)
    code = positive_code(positive, scoring, scorer, task, classes)
    if (score := LABEL_SCORES.get(task, {}).get(scoring)) is not None:
        return Scoring(scoring, score, None, codes, code)
    return Scoring(scoring, None, scorer, codes, code)


def default_scoring(task: Task, objective: Objective | None) -> str:
    """Return the score that ranks trials if the user names none.

    A regression with an absolute-error loss or the Huber loss is ranked by the absolute error. A
    regression with a quantile loss is ranked by the pinball loss of its level. R2 would rank a
    model by the mean, which the model was not trained to predict.
    """
    if task != "regression":
        return "accuracy"
    loss = None if objective is None or objective.step is not None else objective.loss
    if loss == "quantile":
        return scores.PINBALL
    return "neg_mean_absolute_error" if is_absolute(loss) else "r2"


def scorers_of(scoring: object) -> dict[str, OneScoring] | None:
    """Return the scorers of a list, tuple or dict, keyed by name.

    Returns None for a single scorer and for None. Raises InputError for invalid or repeated
    entries.
    """
    if not isinstance(scoring, list | tuple | Mapping):
        return None
    if not scoring:
        remedy = "name one, or leave it out for the usual one"
        raise InputError(f"scoring needs at least one score, got {scoring!r}; {remedy}.")
    labels = [
        one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__)
        for one in scoring
    ]
    pairs = list(scoring.items() if isinstance(scoring, Mapping) else zip(labels, scoring))
    for label, scorer in pairs:
        if not (isinstance(scorer, str) or callable(scorer)):
            raise InputError(
                "scoring holds scikit-learn scorer names and callables, of (estimator, X, y) or "
                f"(outputs, y), got {scorer!r} in it; replace it."
            )
        if not isinstance(label, str) or not label:
            raise InputError(f"scoring, a dict, has texts as keys, got {label!r}; name each score.")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise InputError(
            f"scoring names {twice[0]!r} twice; leave one out, or give a dict that has a name for "
            "each."
        )
    return dict(pairs)


def has_function(scoring: object) -> bool:
    """Return True if a scoring argument is or contains a custom function."""
    scorers = scorers_of(scoring)
    return callable(scoring) if scorers is None else any(map(callable, scorers.values()))


def _is_of_class(scorer: OneScoring, task: Task) -> bool:
    """Return True if a scorer needs to know the positive class of two classes.

    The result is False for a custom function, which chooses the class itself.
    """
    from sklearn.metrics import get_scorer, get_scorer_names

    if callable(scorer) or task != "binary" or scorer in scores.OF_TASK[task]:
        return False
    return scorer in get_scorer_names() and has_positive_class(get_scorer(scorer))


def loss_scoring(task: Task, classes: np.ndarray | None, positive: object = None) -> Scoring:
    """Return the Scoring of minus the validation loss.

    Probabilities are not clipped as in scikit-learn's log loss. Raises InputError if ``positive``
    is given.
    """
    if task == "regression":
        return make_scoring("neg_mean_squared_error", task, classes, positive)
    positive_code(positive, "neg_log_loss", None, task, classes)
    return Scoring("neg_log_loss", scores.neg_cross_entropy, None, classes)


def check_folds(scoring: Scoring, data: Dataset) -> None:
    """Raise InputError if the score is undefined on a fold. This is called before any training."""
    for other in scoring.others:
        check_folds(other, data)
    needed = 2 if data.task in ("multilabel", "binary") else data.n_outputs
    for f, fold in enumerate(data.folds):
        rows = data.target[fold.valid]
        columns = rows.T if data.task == "multilabel" else rows[None]
        if scoring.name.startswith("roc_auc") and any(
            len(column.unique()) < needed for column in columns
        ):
            why = f"and fold {f} lacks one; {_remedy(scoring, data)}"
            raise InputError(
                f"scoring={scoring.name!r} needs every class among the validation rows, {why}."
            )
        if scoring.name == "r2" and len(rows) < 2:
            remedy = "choose fewer folds or scoring='neg_root_mean_squared_error'"
            raise InputError(
                f"scoring='r2' needs two validation rows a fold, and fold {f} has {len(rows)}; "
                f"{remedy}."
            )


def _remedy(scoring: Scoring, data: Dataset) -> str:
    """Return the advice for a fold that lacks a class.

    Other folds do not help if the class has only one row.
    """
    counts = [] if data.task == "multilabel" else data.target.long().flatten().bincount().tolist()
    rows = min(counts, default=len(data.folds))
    if rows >= len(data.folds) or scoring.classes is None:
        return "choose fewer or stratified folds, or another scoring"
    name = scoring.classes[counts.index(rows)].item()
    fewer = f"{rows} stratified folds, or " * (rows > 1)
    out = ", or leave that class out" * (data.task != "binary")
    return (
        f"class {name!r} has {count(rows, 'row')} for {len(data.folds)} folds: choose "
        f"{fewer}another scoring{out}"
    )


def _neg_loss(objective: Objective | None, *, asked: bool) -> Scoring:
    """Return the Scoring of minus the validation loss, with the same loss for all trials."""
    if objective is None or objective.step is not None:
        of_step = "a custom target that training_step trains on has no score of its own"
        what = "scoring='neg_loss' is of a module's loss of outputs and y" if asked else of_step
        raise InputError(f"{what}; give scoring=callable(outputs, y).")
    if lacking := [
        name for name, value in objective.varied.items() if value is inspect.Parameter.empty
    ]:
        raise InputError(
            f"scoring='neg_loss' ranks all trials by one loss, and {lacking[0]} has several "
            "values in the space and no default; give it one, or scoring=callable(outputs, y)."
        )
    return Scoring("neg_loss", None, None, None, of_outputs=objective.neg_loss, is_loss=True)


def _takes_outputs(scorer: Callable[..., object]) -> bool:
    """Return True if a scorer takes (outputs, y) rather than (estimator, X, y)."""
    try:
        parameters = inspect.signature(scorer).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(needed) == 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _check_fits_task(scoring: str, task: Task) -> None:
    """Raise InputError for an unknown scorer name, or for a scorer that does not fit the task."""
    from sklearn.metrics import get_scorer, get_scorer_names

    from gputune.scoring.estimators import takes_task

    if scoring not in get_scorer_names():
        got = f"got {scoring!r}.{did_you_mean(scoring, get_scorer_names())}"
        raise InputError(f"scoring must be one of scikit-learn's scorer names or a callable, {got}")
    if task == "custom":
        remedy = "give scoring=callable(outputs, y), or 'neg_loss'"
        raise InputError(f"scoring={scoring!r} does not fit a custom target; {remedy}.")
    if task == "multiclass" and scoring == "roc_auc":
        raise InputError(
            "scoring='roc_auc' needs two classes and the target has more; choose 'roc_auc_ovr'."
        )
    other = scores.CLASSIFICATION if task == "regression" else scores.REGRESSION
    if scoring in other or not takes_task(get_scorer(scoring), task):
        fitting = ", ".join(scores.OF_TASK[task])
        raise InputError(
            f"scoring={scoring!r} does not fit a {task} task; choose for example {fitting}."
        )


def positive_code(
    positive: Any, scoring: str, scorer: Scorer | None, task: Task, classes: np.ndarray | None
) -> int | None:
    """Return the code of a score's positive class, or None if the score has no positive class."""
    labels = [] if classes is None else classes.tolist()
    of_a_class = scorer is not None and task == "binary" and has_positive_class(scorer)
    if positive is None:
        if of_a_class and set(labels) not in ({0, 1}, {-1, 1}):  # {False, True} is {0, 1}
            remedy = f"say which of the two it is, positive={labels[0]!r} or positive={labels[1]!r}"
            raise InputError(f"scoring={scoring!r} is of one class, the positive one: {remedy}.")
        return 1 if of_a_class else None
    if task != "binary":
        raise InputError(
            f"positive={positive!r} needs a target of two classes, got a {task} task; leave it out."
        )
    if not of_a_class:
        same = ": it is the same for both" if scoring == "roc_auc" else ""
        why = f"and scoring={scoring!r} knows no positive class{same}; leave it out"
        raise InputError(
            f"positive={positive!r} is for scores of one class, such as f1 or average_precision, "
            f"{why}."
        )
    for code, label in enumerate(labels):
        # The command line passes every class as text.
        if isinstance(positive, str) and not isinstance(label, str):
            if positive.lower() in (str(label).lower(), text_of(label)):
                return code
        elif np.ndim(positive) == 0 and label == positive:
            return code
    got = f"got {positive!r}.{did_you_mean(positive, labels)}"
    raise InputError(f"positive must be one of the classes {labels[0]!r} and {labels[1]!r}, {got}")


def has_positive_class(scorer: Scorer) -> bool:
    """Return True if the result of a scorer changes when the two classes swap places.

    The scorer is called on a few made-up rows.
    """
    from sklearn.naive_bayes import GaussianNB

    x = np.array([[0.0], [1.0], [3.0], [5.0], [8.0], [11.0], [15.0]])
    y = np.array([0, 0, 1, 0, 0, 1, 1])
    with warnings.catch_warnings(action="ignore"):
        try:
            one, other = (scorer(GaussianNB().fit(x, labels), x, labels) for labels in (y, 1 - y))
        except ValueError:
            # The scorer is for another kind of target. Its error on the user's rows is clearer.
            return False
    return not math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
