"""The estimator that a scikit-learn scorer receives, made from the outputs of one member.

A member is one trial on one fold. Its outputs on the validation rows are already computed, so the
estimator returns them instead of running the model again.

This is a separate file because importing scikit-learn takes as long as importing torch. A worker
process imports it only if a scorer needs it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.dummy import DummyClassifier, DummyRegressor
from torch import Tensor

from gputune.errors import InputError
from gputune.types import Task


def fitted(
    output: Tensor,
    classes: np.ndarray | None,
    X: object,
    rows: object,
    others: Callable[[object], Tensor] | None = None,
) -> "_FittedEstimator":
    """Return a fitted estimator with given outputs, for a scorer.

    Args:
        output: The outputs (m, K) for the rows ``X``.
        classes: The class labels, a unit matrix (K, K) for several labels, or None for a
            regression.
        X: The rows that the scorer receives.
        rows: The unchanged rows, with which X is compared. The given outputs count only while both
            are equal.
        others: Returns the outputs for any other rows, or None.
    """
    kind = _Regressor if classes is None else _Labeller if classes.ndim == 2 else _Classifier
    return kind(output, classes, X, rows, others)


def takes_task(scorer: Callable[..., object], task: Task) -> bool:
    """Return True if a scorer fits a task, regression or several classes.

    The scorer is called on a few made-up rows. The result is True for all other tasks.
    """
    if task not in ("regression", "multiclass"):
        return True
    x = np.zeros((6, 1))
    y = np.arange(6) + 0.5 if task == "regression" else np.arange(6) % 3
    model = (DummyRegressor() if task == "regression" else DummyClassifier()).fit(x, y)
    with warnings.catch_warnings(action="ignore"):
        try:
            scorer(model, x, y)
        except ValueError:
            return False
    return True


@dataclass(eq=False, repr=False)
class _FittedEstimator(BaseEstimator):  # type: ignore[misc]
    """A fitted estimator, with the methods that a scorer needs.

    It has outputs that are already computed, and a function for the outputs of other rows.
    """

    output: Tensor
    classes: np.ndarray | None
    X: Any
    rows: object
    others: Callable[[object], Tensor] | None

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, X: object, y: object = None) -> "_FittedEstimator":
        raise InputError(
            None, "The estimator that a scorer gets is fitted and cannot be fitted again"
        )

    def close(self) -> None:
        """End the use of the estimator, because its member trains on and overwrites the outputs."""
        self.X = object()
        self.others = None

    def outputs(self, X: Any) -> Tensor:
        """Return the outputs (m, K) for any rows X."""
        if X is self.X and (X is self.rows or X.equals(self.rows)):
            return self.output
        if self.others is None:
            raise InputError(None, "The estimator that a scorer gets predicts only while it runs")
        return self.others(X)


class _Classifier(ClassifierMixin, _FittedEstimator):  # type: ignore[misc]
    """A fitted classifier that returns computed outputs to a scorer."""

    @property
    def classes_(self) -> np.ndarray:
        assert self.classes is not None
        return self.classes

    def predict_proba(self, X: object) -> np.ndarray:
        return self.outputs(X).softmax(-1).numpy()

    def predict(self, X: object) -> np.ndarray:
        labels: np.ndarray = self.classes_[self.outputs(X).argmax(-1).numpy()]
        return labels


class _Labeller(_Classifier):
    """A fitted estimator for several labels per row (multilabel).

    ``classes`` is the unit matrix (K, K), from which scikit-learn recognizes several labels.
    """

    def predict_proba(self, X: object) -> np.ndarray:
        return self.outputs(X).sigmoid().numpy()

    def predict(self, X: object) -> np.ndarray:
        return (self.outputs(X) > 0).numpy().astype(np.int64)


class _Regressor(RegressorMixin, _FittedEstimator):  # type: ignore[misc]
    """A fitted regressor that returns computed outputs to a scorer."""

    def predict(self, X: object) -> np.ndarray:
        outputs = self.outputs(X)
        return (outputs.squeeze(-1) if outputs.shape[-1] == 1 else outputs).numpy()
