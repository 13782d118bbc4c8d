"""A scoring argument, checked once: a score on the device, or any scikit-learn scorer on its predictions."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import get_scorer, get_scorer_names
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.engine import scores
from gputune.errors import InputError
from gputune.types import Task

Scorer = Callable[[Any, Any, Any], float]


@dataclass(frozen=True)
class Scoring:
    """How the models of one fold are scored: ``name``, and a device score or a scikit-learn scorer.

    ``classes`` are the labels that a scorer sees, None for regression. One of scikit-learn's names sees class
    codes 0, 1, ..., so that scores of a positive class work on text labels: the last in sorted order is positive.
    """

    name: str
    score: scores.Score | None
    scorer: Scorer | None
    classes: np.ndarray | None

    def __call__(self, data: Dataset, fold: int, outputs: Tensor) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K) on fold's validation rows; NaN where diverged."""
        absent = None if data.present is None else ~data.present[fold]
        # A class that takes no part may have the logit -inf; that is no divergence.
        known = outputs if absent is None else outputs.masked_fill(absent, 0)
        finite = known.isfinite().flatten(1).all(-1)
        target = data.target[data.folds[fold].valid]
        if data.task == "regression":
            outputs = outputs.double() * data.scale[fold] + data.center[fold]
        elif absent is not None:
            outputs = outputs.masked_fill(absent, -torch.inf)
        if self.score is not None:
            result = self.score(outputs, target).double()
        else:
            result = self._through_sklearn(data, fold, outputs, target, finite)
        return torch.where(finite & result.isfinite(), result, torch.nan)

    def _through_sklearn(
        self, data: Dataset, fold: int, outputs: Tensor, target: Tensor, finite: Tensor
    ) -> Tensor:
        assert self.scorer is not None
        x = data.x[data.copies[fold], data.folds[fold].valid].cpu().numpy()
        y = target.cpu().numpy()
        y = y if self.classes is None else self.classes[y]
        try:
            result = [
                float(self.scorer(fitted(output, self.classes), x, y)) if ok else np.nan
                for output, ok in zip(outputs.cpu(), finite.tolist())
            ]
        except Exception as error:
            raise InputError(
                f"scoring={self.name!r} raised {type(error).__name__} on fold {fold}: {error}. "
                "Choose a scoring that fits the task, for example accuracy or r2; a callable is called as "
                "scorer(estimator, X, y)."
            ) from error
        return torch.tensor(result, dtype=torch.float64, device=outputs.device)


def make_scoring(scoring: str | Scorer | None, task: Task, classes: np.ndarray | None) -> Scoring:
    """Return the checked Scoring of a name, a callable ``scorer(estimator, X, y)``, or None (accuracy or R2)."""
    if scoring is None:
        scoring = "r2" if task == "regression" else "accuracy"
    if not isinstance(scoring, str):
        if not callable(scoring):
            raise InputError(
                f"scoring is a scikit-learn scorer name or a callable(estimator, X, y), got {scoring!r}."
            )
        return Scoring(_qualified_name(scoring), None, scoring, classes)
    table = dict(scores.REGRESSION if task == "regression" else scores.CLASSIFICATION)
    if task == "binary":
        table["roc_auc"] = scores.roc_auc
        del table["roc_auc_ovr"]  # scikit-learn's own answer for two classes
    if scoring in table:
        return Scoring(scoring, table[scoring], None, classes)
    _check_fits_task(scoring, task)
    codes = None if classes is None else np.arange(len(classes))
    return Scoring(scoring, None, get_scorer(scoring), codes)


def loss_scoring(task: Task, classes: np.ndarray | None) -> Scoring:
    """Return minus the validation loss as a score, under scikit-learn's name for it.

    Unlike scikit-learn's log loss, which holds chances to [eps, 1 - eps], it has no upper limit.
    """
    if task == "regression":
        return make_scoring("neg_mean_squared_error", task, classes)
    return Scoring("neg_log_loss", scores.neg_cross_entropy, None, classes)


def check_folds(scoring: Scoring, data: Dataset) -> None:
    """Raise InputError where the score is undefined on a fold, before anything trains."""
    for f, fold in enumerate(data.folds):
        rows = data.target[fold.valid]
        if scoring.name.startswith("roc_auc") and len(set(rows.tolist())) < data.n_outputs:
            raise InputError(
                f"scoring={scoring.name!r} needs every class among the validation rows, and fold {f} lacks one; "
                "choose fewer or stratified folds, or another scoring."
            )
        if scoring.name == "r2" and len(rows) < 2:
            raise InputError(
                f"scoring='r2' needs two validation rows a fold, and fold {f} has {len(rows)}; choose fewer folds or "
                "scoring='neg_root_mean_squared_error'."
            )


def _check_fits_task(scoring: str, task: Task) -> None:
    if scoring not in get_scorer_names():
        near = difflib.get_close_matches(scoring, get_scorer_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"scoring must be one of scikit-learn's scorer names or a callable, got {scoring!r}.{hint}"
        )
    other = scores.CLASSIFICATION if task == "regression" else scores.REGRESSION
    if scoring in other or (task == "regression" and scoring == "roc_auc"):
        fitting = ", ".join(scores.REGRESSION if task == "regression" else scores.CLASSIFICATION)
        raise InputError(f"scoring={scoring!r} does not fit a {task} task; choose for example {fitting}.")
    if task == "multiclass" and scoring == "roc_auc":
        raise InputError("scoring='roc_auc' needs two classes and the target has more; choose 'roc_auc_ovr'.")


def _qualified_name(scorer: Scorer) -> str:
    return f"{getattr(scorer, '__module__', '')}:{getattr(scorer, '__qualname__', type(scorer).__qualname__)}"


def fitted(output: Tensor, classes: np.ndarray | None) -> Any:
    """Return what a scorer takes for a fitted estimator, whose outputs (m, K) on the scored rows are given."""
    return _Regressor(output, None) if classes is None else _Classifier(output, classes)


class _Fitted(BaseEstimator):  # type: ignore[misc]
    """What a scikit-learn scorer asks of a fitted estimator, answered from outputs that are already there."""

    def __init__(self, output: Tensor, classes: np.ndarray | None) -> None:
        self.output = output
        self.classes = classes

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: Any, y: Any) -> "_Fitted":
        return self


class _Classifier(ClassifierMixin, _Fitted):  # type: ignore[misc]
    @property
    def classes_(self) -> np.ndarray:
        assert self.classes is not None
        return self.classes

    def predict_proba(self, X: Any) -> np.ndarray:
        probabilities: np.ndarray = self.output.softmax(-1).numpy()
        return probabilities

    def predict(self, X: Any) -> np.ndarray:
        labels: np.ndarray = self.classes_[self.output.argmax(-1).numpy()]
        return labels


class _Regressor(RegressorMixin, _Fitted):  # type: ignore[misc]
    def predict(self, X: Any) -> np.ndarray:
        values: np.ndarray = self.output.squeeze(-1).numpy()
        return values
