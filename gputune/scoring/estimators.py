"""The fitted estimator that gputune passes to a scikit-learn scorer.

The outputs of a member (one trial on one fold) on the validation rows are already computed. The
estimator returns these outputs instead of running the model again.

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

from gputune.ground.errors import InputError
from gputune.ground.types import Task


def fitted(
    output: Tensor,
    classes: np.ndarray | None,
    X: object,
    rows: object,
    others: Callable[[object], Tensor] | None = None,
) -> "_FittedEstimator":
    """Return an estimator for a scikit-learn scorer, with predictions from computed outputs.

    Args:
        output: The outputs (m, K) for the m rows ``X``, K values per row.
        classes: The class labels, a unit matrix (K, K) for several labels, or None for a
            regression.
        X: The rows that the scorer receives.
        rows: The rows without any change by the scorer. The estimator uses ``output`` only while
            ``X`` equals ``rows``.
        others: A function that returns the outputs for any other rows, or None.
    """
    kind = _Regressor if classes is None else _Labeller if classes.ndim == 2 else _Classifier
    return kind(output, classes, X, rows, others)


def takes_task(scorer: Callable[..., object], task: Task) -> bool:
    """Return True if a scikit-learn scorer accepts the predictions of a task.

    gputune calls the scorer on a few made-up rows. This check exists for regression and multiclass
    only. For other tasks the result is True.
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
    """An estimator for scikit-learn scorers that returns computed outputs instead of running a
    model.

    ``output`` holds the outputs for the rows ``X``. ``others`` computes the outputs for any other
    rows.
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
            None, "The estimator that a scorer receives is fitted and cannot be fitted again"
        )

    def close(self) -> None:
        """Make the estimator unusable after scoring, because further training overwrites its
        outputs."""
        self.X = object()
        self.others = None

    def outputs(self, X: Any) -> Tensor:
        """Return the outputs (m, K) for m rows X, K values per row.

        These are the computed outputs, or new outputs if X has other rows.
        """
        if X is self.X and (X is self.rows or X.equals(self.rows)):
            return self.output
        if self.others is None:
            raise InputError(
                None, "The estimator that a scorer receives can predict only while the scorer runs"
            )
        return self.others(X)


class _Classifier(ClassifierMixin, _FittedEstimator):  # type: ignore[misc]
    """A classifier for scikit-learn scorers: its predictions come from outputs computed before.

    The probabilities are the softmax of the outputs.
    """

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

    ``classes`` is the unit matrix (K, K) for K labels, from which scikit-learn recognizes several
    labels.
    """

    def predict_proba(self, X: object) -> np.ndarray:
        return self.outputs(X).sigmoid().numpy()

    def predict(self, X: object) -> np.ndarray:
        return (self.outputs(X) > 0).numpy().astype(np.int64)


class _Regressor(RegressorMixin, _FittedEstimator):  # type: ignore[misc]
    """A regressor for scikit-learn scorers: its predictions are outputs computed before."""

    def predict(self, X: object) -> np.ndarray:
        outputs = self.outputs(X)
        return (outputs.squeeze(-1) if outputs.shape[-1] == 1 else outputs).numpy()
