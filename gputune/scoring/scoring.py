"""A scoring argument, checked once: a score on the device, or any scikit-learn scorer on its predictions."""

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.kinds import text_of
from gputune.errors import InputError
from gputune.population.population import call_module, class_logits, is_one_logit
from gputune.scoring import scores
from gputune.scoring.objective import Objective, pairs_all_rows, qualified_name
from gputune.text import did_you_mean
from gputune.types import Task

Scorer = Callable[[Any, Any, Any], float]

_SMALLEST = 1e-300
"""Probability in place of 0, whose logarithm would be taken for a divergence."""

Member = Callable[[int], nn.Module]
"""Returns the model of one trial, by its place among the outputs: a plain module on the CPU, in evaluation mode."""


@dataclass(frozen=True)
class Scoring:
    """How the models of one fold are scored: ``name``, and a device score or a scikit-learn scorer.

    ``others`` are the further metrics of a search, which rank nothing; ``label`` is what the user calls one of them.
    ``classes`` are the labels that a scorer sees, None for regression. One of scikit-learn's names sees class
    codes 0, 1, ..., so that scores of a positive class work on text labels. ``positive`` is the code of that class;
    None where the score is not of one class, and where a callable chooses it. ``of_outputs`` scores the outputs of one
    member as they are; where it ``is_loss``, in the units of training. With ``kept_bytes`` outputs are kept beside
    their scores, up to that.
    """

    name: str
    score: scores.Score | None
    scorer: Scorer | None
    classes: np.ndarray | None
    positive: int | None = None
    of_outputs: Callable[[Tensor, Tensor], Any] | None = None
    is_loss: bool = False
    label: str = ""
    others: "tuple[Scoring, ...]" = ()
    kept_bytes: int = 0

    @property
    def on_outputs(self) -> bool:
        """Whether all metrics are functions of outputs; scikit-learn's scorers may ask a model for others."""
        return all(one.score or one.of_outputs for one in (self, *self.others))

    def metrics(self, data: Dataset, fold: int, outputs: Tensor, member: Member | None = None) -> Tensor:
        """Return the scores (C,) as a call does, with other metrics (C, M), all of the same outputs."""
        scores = [one(data, fold, outputs, member) for one in (self, *self.others)]
        return torch.stack(scores, 1) if self.others else scores[0]

    def __call__(self, data: Dataset, fold: int, outputs: Tensor, member: Member | None = None) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K) on fold's validation rows; NaN where diverged.

        They are scored in double precision, in which a tuned model predicts. A scorer of the user's own may ask for
        predictions of other rows, which a ``member`` then makes.
        """
        absent = None if data.present is None or is_one_logit(outputs, data.task, 2) else ~data.present[fold]
        # A class that takes no part may have the logit -inf; that is no divergence.
        known = outputs if absent is None else outputs.masked_fill(absent, 0)
        finite = known.isfinite().flatten(1).all(-1)
        target = data.target[data.folds[fold].valid]
        if self.of_outputs is not None:
            result = self._of_outputs(data, fold, outputs, target, finite)
        else:
            outputs = _as_answers(data, fold, outputs)
            if data.transforms:  # an inverse may overflow
                finite &= outputs.isfinite().flatten(1).all(-1)
            ranks = self.score is None or self.score in scores.RANKING
            if ranks and (first := data.first_equal[fold]) is not None:
                outputs = outputs[:, first]
            if self.score is not None:
                result = self.score(outputs, target)
            else:
                result = self._through_sklearn(data, fold, *self.positive_last(outputs, target), finite, member)
        return torch.where(finite & result.isfinite(), result, torch.nan)

    def _of_outputs(self, data: Dataset, fold: int, outputs: Tensor, target: Tensor, finite: Tensor) -> Tensor:
        assert self.of_outputs is not None
        if self.is_loss:
            target = data.targets(fold)[data.folds[fold].valid]
        elif is_one_logit(outputs, data.task, 2):
            outputs = outputs.double().view(*outputs.shape[:2], 1)
        else:
            outputs = _as_answers(data, fold, outputs).view(outputs.shape)
            target = target[:, None] if data.column else target
        trials = finite.nonzero().flatten().tolist()
        if trials and not self.is_loss and pairs_all_rows(self.of_outputs, outputs[trials[0]], target):
            raise InputError(
                f"scoring={self.name!r} compares each output with the targets of all rows: outputs have shape "
                f"{tuple(outputs[0].shape)} and y {tuple(target.shape)}, which torch broadcasts; take outputs[:, 0]."
            )
        result = torch.full((len(outputs),), torch.nan, dtype=torch.float64)
        for trial in trials:
            try:
                result[trial] = float(self.of_outputs(outputs[trial], target))
            except Exception as error:
                raise InputError(
                    f"scoring={self.name!r} raised {type(error).__name__} on fold {fold}: {error}. It is called as "
                    f"scoring(outputs, y), with tensors {tuple(outputs[trial].shape)} and {tuple(target.shape)}, and "
                    "returns a number, greater is better."
                ) from error
        return result.to(finite.device)

    def positive_last(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (..., 2) and class codes (m,) in which a scorer finds the positive class: as code 1."""
        return (outputs.flip(-1), 1 - target) if self.positive == 0 else (outputs, target)

    def _through_sklearn(
        self, data: Dataset, fold: int, outputs: Tensor, target: Tensor, finite: Tensor, member: Member | None
    ) -> Tensor:
        from gputune.scoring.estimators import fitted

        assert self.scorer is not None
        y = target.cpu().numpy()
        y = y if self.classes is None or data.task == "multilabel" else self.classes[y]
        # The scorers that have names read nothing of the rows.
        rows = np.zeros((len(y), 1)) if data.scorer_rows is None else data.scorer_rows.rows(data.folds[fold])
        result = np.full(len(outputs), np.nan)
        try:
            for trial in np.flatnonzero(finite.cpu().numpy()).tolist():
                others = None if member is None else partial(_predict, data, fold, member, trial)
                # A frame can be written to.
                X = rows if isinstance(rows, np.ndarray | tuple | dict) else copy.deepcopy(rows)
                estimator = fitted(outputs[trial].cpu(), self.classes, X, rows, others)
                result[trial] = float(self.scorer(estimator, X, y))
                estimator.close()
        except Exception as error:
            remedy = "Choose a scoring that fits the task, for example accuracy or r2."
            if ":" in self.name:  # no name of scikit-learn's
                remedy = "It is called as scorer(estimator, X, y), with X as you gave it."
            reason = f"{type(error).__name__} on fold {fold}: {str(error).rstrip('.')}"
            raise InputError(f"scoring={self.name!r} raised {reason}. {remedy}") from error
        return torch.from_numpy(result).to(outputs.device)


def shape_of_scores(scoring: Scoring | None, folds: int) -> tuple[int, ...]:
    """Return the shape of a trial's scores after an epoch: (F,), with several metrics (F, M)."""
    return (folds,) if scoring is None or not scoring.others else (folds, 1 + len(scoring.others))


def _as_answers(data: Dataset, fold: int, outputs: Tensor) -> Tensor:
    """Return outputs (C, m, K), float64: in the target's own units, or without the classes that take no part."""
    outputs = outputs.double()
    if is_one_logit(outputs, data.task, 2):
        return class_logits(outputs, data.task, 2)
    if outputs.dim() == 2 and data.task != "custom":
        outputs = outputs[..., None]  # one number a row
    if data.task == "regression":
        return data.in_units(fold, outputs)
    return outputs if data.present is None else outputs.masked_fill(~data.present[fold], -torch.inf)


def outputs_of(probabilities: Tensor, task: Task) -> Tensor:
    """Return the outputs of which classes (..., K), or labels (..., K), have these probabilities."""
    if task == "multilabel":
        return probabilities.logit(_SMALLEST)
    return probabilities.clamp_min(_SMALLEST).log()


def _predict(data: Dataset, fold: int, member: Member, trial: int, X: object) -> Tensor:
    """Return what a member answers for rows X of the user's own, (m, K), on the CPU."""
    if data.scorer_rows is None:
        raise InputError("a scorer that has a name asks for no other rows than those it scores.")
    inputs = data.scorer_rows.encoded(X, data.statistics[fold], data.dtype)
    with torch.no_grad():
        outputs = call_module(member(trial), inputs, data.names).view(1, len(inputs[0]), -1)
    return _as_answers(data, fold, outputs.to(data.device))[0].cpu()


def make_scoring(
    scoring: str | Scorer | None,
    task: Task,
    classes: np.ndarray | None,
    positive: object = None,
    objective: Objective | None = None,
    n_labels: int = 0,
) -> Scoring:
    """Return the checked Scoring of a name, a callable ``scorer(estimator, X, y)`` or ``(outputs, y)``, or None.

    None is accuracy, R2, or for a custom target "neg_loss": minus the loss of the ``objective`` on validation rows.
    ``positive`` is the class that f1 and its like are of. Raises InputError where they need it and it is missing, where
    another score is given it, and where it is no class.
    """
    from sklearn.metrics import get_scorer

    if scoring == "neg_loss" or (scoring is None and task == "custom"):
        return _neg_loss(objective, asked=scoring is not None)
    if scoring is None:
        scoring = "r2" if task == "regression" else "accuracy"
    if task == "multilabel":
        classes = np.eye(n_labels, dtype=np.int64)
    if not isinstance(scoring, str):
        if not callable(scoring):
            raise InputError(
                "scoring is a scikit-learn scorer name, a callable(estimator, X, y) or (outputs, y), or a list or dict "
                f"of them, got {scoring!r}."
            )
        scores.refuse_metric(scoring)
        name = qualified_name(scoring)
        if _takes_outputs(scoring):
            return Scoring(name, None, None, classes, of_outputs=cast(Any, scoring))
        return Scoring(name, None, scoring, classes, positive_code(positive, name, None, task, classes))
    if (score := scores.OF_TASK[task].get(scoring)) is not None:
        positive_code(positive, scoring, None, task, classes)
        return Scoring(scoring, score, None, classes)
    _check_fits_task(scoring, task)
    codes = classes if classes is None or task == "multilabel" else np.arange(len(classes))
    scorer = get_scorer(scoring)
    return Scoring(scoring, None, scorer, codes, positive_code(positive, scoring, scorer, task, classes))


def _neg_loss(objective: Objective | None, *, asked: bool) -> Scoring:
    """Return minus the loss on validation rows, the same one for all trials."""
    if objective is None or objective.step is not None:
        of_step = "a custom target that training_step trains on has no score of its own"
        what = "scoring='neg_loss' is of a module's loss of outputs and y" if asked else of_step
        raise InputError(f"{what}; give scoring=callable(outputs, y).")
    if lacking := [name for name, value in objective.varied.items() if value is inspect.Parameter.empty]:
        raise InputError(
            f"scoring='neg_loss' ranks all trials by one loss, and {lacking[0]} has several values in the space and no "
            "default; give it one, or scoring=callable(outputs, y)."
        )
    return Scoring("neg_loss", None, None, None, of_outputs=objective.neg_loss, is_loss=True)


def _takes_outputs(scorer: Callable[..., object]) -> bool:
    """Whether a scorer is of (outputs, y) rather than of (estimator, X, y)."""
    try:
        parameters = inspect.signature(scorer).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _check_fits_task(scoring: str, task: Task) -> None:
    from sklearn.metrics import get_scorer, get_scorer_names

    from gputune.scoring.estimators import takes_task

    if scoring not in get_scorer_names():
        raise InputError(
            f"scoring must be one of scikit-learn's scorer names or a callable, got {scoring!r}."
            f"{did_you_mean(scoring, get_scorer_names())}"
        )
    if task == "custom":
        raise InputError(
            f"scoring={scoring!r} does not fit a custom target; give scoring=callable(outputs, y), or 'neg_loss'."
        )
    if task == "multiclass" and scoring == "roc_auc":
        raise InputError("scoring='roc_auc' needs two classes and the target has more; choose 'roc_auc_ovr'.")
    other = scores.CLASSIFICATION if task == "regression" else scores.REGRESSION
    if scoring in other or not takes_task(get_scorer(scoring), task):
        fitting = ", ".join(scores.OF_TASK[task])
        raise InputError(f"scoring={scoring!r} does not fit a {task} task; choose for example {fitting}.")


def positive_code(
    positive: Any, scoring: str, scorer: Scorer | None, task: Task, classes: np.ndarray | None
) -> int | None:
    """Return the code of the class that a score is of, None where it is of none."""
    labels = [] if classes is None else classes.tolist()
    of_a_class = scorer is not None and task == "binary" and has_positive_class(scorer)
    if positive is None:
        if of_a_class and set(labels) not in ({0, 1}, {-1, 1}):  # {False, True} is {0, 1}
            raise InputError(
                f"scoring={scoring!r} is of one class, the positive one: say which of the two it is, "
                f"positive={labels[0]!r} or positive={labels[1]!r}."
            )
        return 1 if of_a_class else None
    if task != "binary":
        raise InputError(f"positive={positive!r} needs a target of two classes, got a {task} task; leave it out.")
    if not of_a_class:
        same = ": it is the same for both" if scoring == "roc_auc" else ""
        raise InputError(
            f"positive={positive!r} is for scores of one class, such as f1 or average_precision, and "
            f"scoring={scoring!r} knows no positive class{same}; leave it out."
        )
    for code, label in enumerate(labels):
        if isinstance(positive, str) and not isinstance(label, str):  # a command line has text alone
            if positive.lower() in (str(label).lower(), text_of(label)):
                return code
        elif np.ndim(positive) == 0 and label == positive:
            return code
    near = did_you_mean(positive, labels)
    raise InputError(f"positive must be one of the classes {labels[0]!r} and {labels[1]!r}, got {positive!r}.{near}")


def has_positive_class(scorer: Scorer) -> bool:
    """Whether a scorer of two classes gives another score where they change places, tried on a few rows."""
    from sklearn.naive_bayes import GaussianNB

    x, y = np.array([[0.0], [1.0], [3.0], [5.0], [8.0], [11.0], [15.0]]), np.array([0, 0, 1, 0, 0, 1, 1])
    with warnings.catch_warnings(action="ignore"):
        try:
            one, other = (scorer(GaussianNB().fit(x, labels), x, labels) for labels in (y, 1 - y))
        except ValueError:  # it is for another kind of target, which it says better of the user's rows
            return False
    return not math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
