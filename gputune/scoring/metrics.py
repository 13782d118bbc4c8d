"""Check the ``scoring`` argument of a search: one or several scores, such as "accuracy".

The first score ranks the trials.
"""

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
from gputune.data.target import Target
from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.text import count, did_you_mean, nearest
from gputune.ground.types import Task
from gputune.scoring import scores
from gputune.scoring.losses import (
    is_absolute,
    name_of_loss,
    only_classifies,
    other_units,
    remedy_for_units,
)
from gputune.scoring.objective import Objective, loss_arguments, qualified_name
from gputune.scoring.scoring import Scorer, Scoring

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
    """Check the ``scoring`` argument of a search, and return it as an object that computes scores.

    Args:
        scoring: A scikit-learn name, a callable ``scorer(estimator, X, y)`` or ``(outputs, y)``, or
            several of these. None means accuracy for classes and labels, and for a custom target
            "neg_loss". For regression None means R2, the absolute error or the pinball loss (see
            ``default_scoring``). "neg_loss" is minus the loss of the ``objective`` on the
            validation rows.
        task: The task of the search.
        classes: The class labels, or None.
        positive: The positive class of f1 and similar scores. Among several scores, only scores
            with a positive class receive it.
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
        needs_class = {key: _has_positive_class(one, task) for key, one in scorers.items()}
        metrics = []
        for label, scorer in scorers.items():
            # If no score takes the positive class, each score receives it, and the first raises.
            gets_class = needs_class[label] or not any(needs_class.values())
            score_class = positive if gets_class else None
            metric = make_scoring(scorer, task, classes, score_class, objective, n_labels)
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
                "scoring",
                "must be a scikit-learn scorer name, a callable(estimator, X, y) or (outputs, y), "
                "or a list or dict of these",
                got=scoring,
            )
        scores.refuse_metric(scoring)
        name = qualified_name(scoring)
        if _takes_outputs(scoring):
            return Scoring(name, None, None, classes, of_outputs=scoring)
        code = positive_code(positive, name, None, task, classes)
        return Scoring(name, None, scoring, classes, code)
    if (score := scores.OF_TASK[task].get(scoring)) is not None:
        positive_code(positive, scoring, None, task, classes)
        return Scoring(scoring, score, None, classes)
    _check_fits_task(scoring, task)
    codes = classes if classes is None or task == "multilabel" else np.arange(len(classes))
    scorer = get_scorer(scoring)
    code = positive_code(positive, scoring, scorer, task, classes)
    if task != "multilabel" and scoring in scores.LABEL_SCORES:
        return Scoring(scoring, scores.LABEL_SCORES[scoring], None, codes, code)
    return Scoring(scoring, None, scorer, codes, code)


def default_scoring(task: Task, objective: Objective | None) -> str:
    """Return the name of the score that ranks trials if the user does not choose a score.

    The absolute error ranks a regression with an absolute-error loss or the Huber loss. The pinball
    loss of the same level ranks a regression with a quantile loss. R2 would rank a model by the
    mean, which the model was not trained to predict.
    """
    if task != "regression":
        return "accuracy"
    loss = None if objective is None or objective.step is not None else objective.loss
    if loss == "quantile":
        return scores.PINBALL
    return "neg_mean_absolute_error" if is_absolute(loss) else "r2"


def scorers_of(scoring: object) -> dict[str, OneScoring] | None:
    """Return the scorers of a ``scoring`` argument with several scorers, as a dict by name.

    Returns None for a single scorer and for None. Raises InputError for invalid or repeated
    entries.
    """
    if not isinstance(scoring, list | tuple | Mapping):
        return None
    if not scoring:
        raise InputError(
            "scoring",
            "needs at least one score",
            got=scoring,
            remedy="Name a score, or leave out this argument for the default score.",
        )
    if isinstance(scoring, Mapping):
        labels = list(scoring)
        scorers = list(scoring.values())
    else:
        scorers = list(scoring)
        labels = list(map(_label, scorers))
    for label, scorer in zip(labels, scorers):
        if not (isinstance(scorer, str) or callable(scorer)):
            raise InputError(
                "scoring",
                "must hold scikit-learn scorer names and callables of (estimator, X, y) or "
                "(outputs, y)",
                got=scorer,
                remedy="Replace it.",
            )
        if not isinstance(label, str) or not label:
            raise InputError(
                "scoring", "must have strings as keys", got=label, remedy="Name each score."
            )
        if labels.count(label) > 1:
            remedy = "Leave one out."
            by_name = "Leave one out, or pass a dict with a name for each score."
            remedy = per_interface(by_name, remedy)
            raise InputError("scoring", f"names {label!r} twice", remedy=remedy)
    return dict(zip(labels, scorers))


def _label(scorer: object) -> str:
    """Return the name of one of several scorers in the results of a search."""
    if isinstance(scorer, str):
        return scorer
    return str(getattr(scorer, "__name__", type(scorer).__name__))


def has_function(scoring: object) -> bool:
    """Return True if the ``scoring`` argument is a custom function, or contains one."""
    scorers = scorers_of(scoring)
    return callable(scoring) if scorers is None else any(map(callable, scorers.values()))


def _has_positive_class(scorer: OneScoring, task: Task) -> bool:
    """Return True if a scorer, such as "f1", needs to know the positive class of a binary target.

    The result is False for a custom function, which chooses the class itself.
    """
    from sklearn.metrics import get_scorer, get_scorer_names

    if callable(scorer) or task != "binary" or scorer in scores.OF_TASK[task]:
        return False
    return scorer in get_scorer_names() and has_positive_class(get_scorer(scorer))


def loss_scoring(task: Task, classes: np.ndarray | None, positive: object = None) -> Scoring:
    """Return the default score of a hypergradient search: minus the validation loss.

    The loss is the squared error for regression, and the log loss for classes.

    Probabilities are not clipped as in scikit-learn's log loss. Raises InputError if ``positive``
    is given.
    """
    if task == "regression":
        return make_scoring("neg_mean_squared_error", task, classes, positive)
    positive_code(positive, "neg_log_loss", None, task, classes)
    return Scoring("neg_log_loss", scores.neg_cross_entropy, None, classes)


def check_folds(scoring: Scoring, data: Dataset) -> None:
    """Before training, raise InputError if a score is undefined on a fold, for example for lack of
    a class."""
    for other in scoring.others:
        check_folds(other, data)
    needed = 2 if data.task in ("multilabel", "binary") else data.n_outputs
    for f, fold in enumerate(data.folds):
        rows = data.target[fold.valid]
        columns = rows.T if data.task == "multilabel" else rows[None]
        lacks_class = any(len(column.unique()) < needed for column in columns)
        if scoring.name.startswith("roc_auc") and lacks_class:
            raise InputError(
                f"scoring={scoring.name!r}",
                f"needs every class among the validation rows, but fold {f} lacks one",
                remedy=_remedy(scoring, data),
            )
        if scoring.name == "r2" and len(rows) < 2:
            alternative = option("scoring", "neg_root_mean_squared_error")
            raise InputError(
                "scoring='r2'",
                f"needs two validation rows per fold, but fold {f} has {len(rows)}",
                remedy=f"Choose fewer folds or {alternative}.",
            )


def _remedy(scoring: Scoring, data: Dataset) -> str:
    """Return advice for the error that a fold has no validation row of a class.

    Other folds do not help if the class has only one row.
    """
    counts = [] if data.task == "multilabel" else data.target.long().flatten().bincount().tolist()
    rows = min(counts, default=len(data.folds))
    if rows >= len(data.folds) or scoring.classes is None:
        return "Choose fewer or stratified folds, or a different score."
    name = scoring.classes[counts.index(rows)].item()
    choices = "another scoring"
    if rows > 1:
        choices = f"{rows} stratified folds, or {choices}"
    if data.task != "binary":
        choices = f"{choices}, or leave that class out"
    rows_of_class = f"Class {name!r} has {count(rows, 'row')} for {len(data.folds)} folds"
    return f"{rows_of_class}. Choose {choices}."


def _neg_loss(objective: Objective | None, *, asked: bool) -> Scoring:
    """Return the score "neg_loss": minus the validation loss, with the same loss for all trials."""
    if objective is None or objective.step is not None:
        remedy = per_interface(
            "Pass a function of the outputs and y that returns a number, greater is better, such "
            "as scoring=lambda outputs, y: -torch.nn.functional.mse_loss(outputs, y).item().",
            "Choose another --scoring.",
        )
        if asked:
            rule = "needs a module that trains with a loss of outputs and y"
            raise InputError("scoring='neg_loss'", rule, remedy=remedy)
        rule = (
            "is required for a custom target if a training_step or the module itself computes the "
            "loss, because gputune cannot compute this loss from the outputs"
        )
        raise InputError("scoring", rule, remedy=remedy)
    for name, value in objective.varied.items():
        if value is inspect.Parameter.empty:
            raise InputError(
                "scoring='neg_loss'",
                f"ranks all trials by the same loss, but {option(name)} has several values in the "
                "space and no default",
                remedy=per_interface(
                    "Give the argument a default, or pass scoring=callable(outputs, y).",
                    "Give the argument a default, or choose another --scoring.",
                ),
            )
    return Scoring("neg_loss", None, None, None, of_outputs=objective.neg_loss, is_loss=True)


def _takes_outputs(scorer: Callable[..., object]) -> bool:
    """Return True if a custom score has the signature (outputs, y), and not (estimator, X, y)."""
    try:
        parameters = inspect.signature(scorer).parameters.values()
    except (TypeError, ValueError):
        return False
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    n_needed = 0
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return False
        n_needed += parameter.default is parameter.empty and parameter.kind in by_position
    return n_needed == 2


_OTHER_NAMES: Mapping[str, str] = {
    "mae": "neg_mean_absolute_error",
    "mse": "neg_mean_squared_error",
    "rmse": "neg_root_mean_squared_error",
    "mape": "neg_mean_absolute_percentage_error",
    "msle": "neg_mean_squared_log_error",
    "rmsle": "neg_root_mean_squared_log_error",
    "auc": "roc_auc",
    "auroc": "roc_auc",
    "ap": "average_precision",
    "auprc": "average_precision",
    "mcc": "matthews_corrcoef",
    "brier": "neg_brier_score",
    **dict.fromkeys(("logloss", "nll", "cross_entropy", "crossentropy"), "neg_log_loss"),
}
"""Common abbreviations of scores and scikit-learn's names for them. A search for similar spellings
would not find these pairs."""


_LOSS_SCORES: Mapping[Task, str] = {
    "binary": "neg_log_loss",
    "multiclass": "neg_log_loss",
    "regression": "neg_mean_squared_error",
    "multilabel": "neg_loss",
    "custom": "neg_loss",
}
"""The score that means the validation loss, by task."""


def _name_remedy(scoring: str, task: Task) -> str:
    """Return advice for an unknown scorer name: a similar name, or the scorer for the metric of a
    trainer, such as "val_loss"."""
    from sklearn.metrics import get_scorer_names

    prefix, _, metric = scoring.rpartition("_")
    is_of_trainer = prefix in ("val", "valid", "eval", "test", "train")
    names = {**_OTHER_NAMES, "loss": _LOSS_SCORES[task], "acc": "accuracy"}
    similar = nearest(metric if is_of_trainer else scoring, get_scorer_names(), others=names)
    if not is_of_trainer:
        return "" if similar is None else f"Did you mean {similar!r}?"
    example = option("scoring", similar or default_scoring(task, None))
    return (
        f"A trainer logs metrics such as {scoring!r}, but gputune computes the score from the "
        f"predictions of the validation rows. For example {example}."
    )


def _check_fits_task(scoring: str, task: Task) -> None:
    """Raise InputError for an unknown scorer name, or for a scorer that does not fit the task."""
    from sklearn.metrics import get_scorer, get_scorer_names

    from gputune.scoring.estimators import takes_task

    if scoring not in get_scorer_names():
        raise InputError(
            "scoring",
            f"must be one of scikit-learn's scorer names{per_interface(' or a callable', '')}",
            got=scoring,
            remedy=_name_remedy(scoring, task),
        )
    argument = f"scoring={scoring!r}"
    if task == "custom":
        raise InputError(
            argument,
            "does not fit a custom target",
            remedy=per_interface(
                "Give scoring=callable(outputs, y), or 'neg_loss'.",
                f"Use {option('scoring', 'neg_loss')}.",
            ),
        )
    if task == "multiclass" and scoring == "roc_auc":
        raise InputError(
            argument, "needs two classes, but the target has more", remedy="Choose 'roc_auc_ovr'."
        )
    other = scores.CLASSIFICATION if task == "regression" else scores.REGRESSION
    if scoring in other or not takes_task(get_scorer(scoring), task):
        fitting = ", ".join(scores.OF_TASK[task])
        raise InputError(
            argument, f"does not fit a {task} task", remedy=f"Choose for example {fitting}."
        )


def positive_code(
    positive: Any, scoring: str, scorer: Scorer | None, task: Task, classes: np.ndarray | None
) -> int | None:
    """Check the user's ``positive`` class, and return its index in ``classes``.

    The result is None for a score without a positive class.
    """
    labels = [] if classes is None else classes.tolist()
    needs_class = scorer is not None and task == "binary" and has_positive_class(scorer)
    if positive is None:
        if needs_class and set(labels) not in ({0, 1}, {-1, 1}):  # {False, True} is {0, 1}
            choices = f"{option('positive', labels[0])} or {option('positive', labels[1])}"
            raise InputError(
                f"scoring={scoring!r}",
                "is a score of one class, the positive class",
                remedy=f"Choose the positive class: {choices}.",
            )
        return 1 if needs_class else None
    if task != "binary":
        raise InputError(
            f"positive={positive!r}",
            "needs a target of two classes",
            got=Verbatim(f"a {task} task"),
            remedy="Leave it out.",
        )
    if not needs_class:
        reason = ", because the score is the same for both classes" if scoring == "roc_auc" else ""
        raise InputError(
            f"positive={positive!r}",
            "is for scores of one class, such as f1 or average_precision, but "
            f"{option('scoring', scoring)} has no positive class{reason}",
            remedy="Leave it out.",
        )
    for code, label in enumerate(labels):
        # The command line passes every class as text.
        if isinstance(positive, str) and not isinstance(label, str):
            if positive.lower() in (str(label).lower(), text_of(label)):
                return code
        elif np.ndim(positive) == 0 and label == positive:
            return code
    raise InputError(
        "positive",
        f"must be one of the classes {labels[0]!r} and {labels[1]!r}",
        got=positive,
        remedy=did_you_mean(positive, labels).strip(),
    )


def has_positive_class(scorer: Scorer) -> bool:
    """Return True if a scorer, such as f1, gives one of two classes a special role (positive).

    gputune calls the scorer on a few made-up rows, with the classes in both orders, and compares
    the two results.
    """
    from sklearn.naive_bayes import GaussianNB

    x = np.array([[0.0], [1.0], [3.0], [5.0], [8.0], [11.0], [15.0]])
    y = np.array([0, 0, 1, 0, 0, 1, 1])
    with warnings.catch_warnings(action="ignore"):
        try:
            score = scorer(GaussianNB().fit(x, y), x, y)
            swapped = scorer(GaussianNB().fit(x, 1 - y), x, 1 - y)
        except ValueError:
            # The scorer is for another kind of target. Its error on the user's rows is clearer.
            return False
    return not math.isclose(score, swapped, rel_tol=1e-6, abs_tol=1e-6)


def _scorers(scoring: Scorings | None) -> list[OneScoring | None]:
    """Return the scorers of a ``scoring`` argument as a list. None stands for the default score."""
    if scoring is None:
        return [None]
    several = scorers_of(scoring)
    return [scoring] if several is None else list(several.values())  # type: ignore[list-item]


def soft_label_scoring(scoring: Scorings | None) -> Scorings:
    """Return the ``scoring`` for a target of class probabilities (soft labels). The default is
    "neg_loss".

    Raises InputError for scores that would compare the probabilities with logits.
    """
    for scorer in _scorers(scoring):
        if isinstance(scorer, str) and scorer != "neg_loss":
            raise InputError(
                f"scoring={scorer!r}",
                "would compare the module's logits with the probabilities in y",
                remedy=f"Leave {option('scoring')} out to rank by the loss, or give "
                "scoring=callable(outputs, y).",
            )
    return "neg_loss" if scoring is None else scoring


def output_units(objective: Objective, n_outputs: int) -> str:
    """Return the unit of a module's outputs if its loss fixes a unit other than y's, such as "log
    rates".

    The result is "" if the outputs have the unit of y.
    """
    if objective.step is not None:
        return ""
    if n_outputs == 1 and only_classifies(objective.loss):
        return ""  # it is refused together with its target
    return other_units(objective.loss, loss_arguments(objective.fixed))


def refuse_other_units(scoring: Scorings | None, objective: Objective, target: Target) -> None:
    """Raise InputError if a score would compare the target with outputs in another unit, such as
    logits."""
    named = [one for one in _scorers(scoring) if not callable(one) and one != "neg_loss"]
    if not named:
        return
    units = output_units(objective, target.n_outputs)
    score = named[0] or default_scoring("regression", objective)
    other = remedy_for_units(objective.loss)
    by_loss = option("scoring", "neg_loss")
    remedy = f"{other}, or say {by_loss}" if other else f"Say {by_loss}"
    raise InputError(
        f"loss={name_of_loss(objective.loss)}",
        f"makes the outputs {units}, and {option('scoring', score)} would compare these with "
        f"{target.name}",
        remedy=f"{remedy}: then the loss ranks the trials, and predict returns {units}.",
    )
