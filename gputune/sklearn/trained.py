"""What trained estimators have in common: from a recipe to a plain module, and from the module to predictions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from gputune.sklearn.dataset import Rows, as_tensor
from gputune.sklearn.fitting import Member, Members, fit_members
from gputune.sklearn.fused import FusedEstimator
from gputune.sklearn.words import Recipe

ROWS = 8192
"""Rows that a module is given at a time when it predicts."""


class TrainedEstimator(FusedEstimator):
    """An estimator that is trained with minibatches; ``module_`` is its network."""

    module_: nn.Module
    n_iter_: int

    @staticmethod
    def _fit_recipes(
        recipes: Sequence[Recipe],
        rows: Rows,
        folds: Sequence[NDArray[np.int64]],
        *,
        workers: int | None,
        deadline: float | None,
    ) -> Members:
        return fit_members(recipes, rows, folds, workers=workers, deadline=deadline)

    def _settle(self, fitted: Member, rows: Rows) -> None:
        self.module_ = fitted.module()
        self.n_iter_ = fitted.epochs

    def _outputs(self, X: Any) -> Tensor:
        """Return the module's outputs (n, K), float64, on the CPU."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=(np.float64, np.float32), order="C", reset=False)
        self.module_.eval()  # the user may have trained it on
        weight = next(self.module_.parameters())
        with torch.inference_mode():
            parts = torch.split(as_tensor(X), ROWS)
            outputs = torch.cat([self.module_(part.to(weight)).double().cpu() for part in parts])
        return outputs if outputs.dim() == 2 else outputs[:, None]


class TrainedClassifier(ClassifierMixin, TrainedEstimator):  # type: ignore[misc]
    """A classifier whose module returns a logit for each class."""

    classes_: NDArray[Any]

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each row, (n,)."""
        outputs = self._logits(X)  # says first whether the estimator is fitted
        labels: NDArray[Any] = self.classes_[outputs.argmax(1).numpy()]
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class, (n, K) in the order of ``classes_``."""
        return self._logits(X).softmax(1).numpy()

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the logarithm of the probability of each class, (n, K) in the order of ``classes_``."""
        return self._logits(X).log_softmax(1).numpy()

    def _settle(self, fitted: Member, rows: Rows) -> None:
        super()._settle(fitted, rows)
        assert rows.classes is not None and fitted.classes is not None
        self.classes_ = rows.classes[fitted.classes]
        self._present = fitted.present

    def _logits(self, X: Any) -> Tensor:
        outputs = self._outputs(X)
        if self._present is None:
            return outputs
        # Classes whose training rows weighed nothing took no part.
        return outputs.masked_fill(torch.from_numpy(~self._present), -torch.inf)


class TrainedRegressor(RegressorMixin, TrainedEstimator):  # type: ignore[misc]
    """A regressor whose module returns ``(target - target_mean_) / target_scale_``."""

    target_mean_: float
    target_scale_: float

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return the predicted target of each row, (n,), in the units of y."""
        outputs = self._outputs(X)
        return (outputs[:, 0] * self.target_scale_ + self.target_mean_).numpy()

    def _settle(self, fitted: Member, rows: Rows) -> None:
        super()._settle(fitted, rows)
        self.target_mean_, self.target_scale_ = fitted.center, fitted.scale
