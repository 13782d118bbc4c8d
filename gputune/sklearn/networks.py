"""Estimators that are networks trained with minibatches: how they take over a fit, and how they predict."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gputune.data.arrays import ArrayLayout, Arrays
from gputune.population.network import call_module, first_output, two_logits
from gputune.sklearn.base import FLOATS, FusedEstimator
from gputune.sklearn.dataset import Rows, as_dense, as_tensor
from gputune.sklearn.fit import fit_members
from gputune.sklearn.member import Member

ROWS = 8192
"""Rows that a module is given at a time when it predicts, fewer where they are large."""

_NUMBERS = 1 << 20  # of those rows


class TrainedEstimator(FusedEstimator):
    """An estimator that is trained with minibatches; ``module_`` is its network."""

    _fit_recipes = staticmethod(fit_members)
    _epochs: ClassVar[str]
    """The parameter that says for how many epochs."""

    module_: nn.Module
    n_iter_: int

    def _set_fitted(self, fitted: Member, rows: Rows) -> None:
        self.module_ = fitted.module()
        self.n_iter_ = fitted.epochs
        self._layout = None if rows.is_table else ArrayLayout.of(rows.X)
        self._scaling = fitted.scaling

    def _outputs(self, X: object) -> Tensor:
        """Return the module's outputs (n, K), float64, on the CPU."""
        check_is_fitted(self)
        X = as_dense(X)
        if self._layout is not None:
            arrays = self._layout.raw(X)
        else:
            arrays = Arrays((as_tensor(validate_data(self, X, dtype=FLOATS, order="C", reset=False)),))
        self.module_.eval()  # the user may have trained it on
        weight = next(self.module_.parameters())
        rows = max(1, min(ROWS, _NUMBERS // sum(part[0].numel() for part in arrays.parts)))
        with torch.inference_mode():
            blocks = zip(*(torch.split(part, rows) for part in arrays.parts))
            outputs = torch.cat([self._forward(block, weight, arrays.names) for block in blocks])
        return outputs if outputs.dim() > 1 else outputs[:, None]

    def _forward(self, inputs: Sequence[Tensor], weight: Tensor, names: Sequence[str] | None) -> Tensor:
        """Return the outputs of some rows; floats are given in the precision of the module's weights."""
        scaled = [x if of is None else of(x[None], slice(0, 1))[0] for x, of in zip(inputs, self._scaling)]
        on_device = [x.to(weight.device, weight.dtype if x.is_floating_point() else None) for x in scaled]
        return first_output(call_module(self.module_, on_device, names)).double().cpu()


class TrainedClassifier(ClassifierMixin, TrainedEstimator):  # type: ignore[misc]
    """A classifier whose module returns a logit for each class, or for each label."""

    classes_: np.ndarray | list[np.ndarray]

    def predict(self, X: object) -> np.ndarray:
        """Return the most probable class of each row, (n,); of labels (n, K) those more probable than not."""
        outputs = self._logits(X)  # says first whether the estimator is fitted
        if isinstance(self.classes_, list):
            return (outputs > 0).numpy().astype(np.int64)
        labels: np.ndarray = self.classes_[outputs.argmax(1).numpy()]
        return labels

    def predict_proba(self, X: object) -> NDArray[np.float64]:
        """Return the probability of each class, (n, K) in the order of ``classes_``, or of each label, (n, K)."""
        outputs = self._logits(X)
        return (outputs.sigmoid() if isinstance(self.classes_, list) else outputs.softmax(1)).numpy()

    def predict_log_proba(self, X: object) -> NDArray[np.float64]:
        """Return the logarithms of what ``predict_proba`` returns."""
        outputs = self._logits(X)
        return (logsigmoid(outputs) if isinstance(self.classes_, list) else outputs.log_softmax(1)).numpy()

    def _set_fitted(self, fitted: Member, rows: Rows) -> None:
        super()._set_fitted(fitted, rows)
        self._present = fitted.present
        if rows.classes is None:  # as scikit-learn's forests say it of labels
            self.classes_ = [np.array([0, 1])] * rows.y.shape[1]
        else:
            self.classes_ = rows.classes[fitted.classes]

    def _logits(self, X: object) -> Tensor:
        outputs = self._outputs(X)
        if outputs.shape[1] == 1 and not isinstance(self.classes_, list):
            return two_logits(outputs)
        if self._present is None:
            return outputs
        # Classes whose training rows weighed nothing took no part.
        return outputs.masked_fill(torch.from_numpy(~self._present), -torch.inf)


class TrainedRegressor(RegressorMixin, TrainedEstimator):  # type: ignore[misc]
    """A regressor whose module returns ``(target - target_mean_) / target_scale_``."""

    target_mean_: float | NDArray[np.float64]
    target_scale_: float | NDArray[np.float64]

    def predict(self, X: object) -> NDArray[np.float64]:
        """Return the predicted target of each row, (n,) or (n, K) as y was, in the units of y."""
        values: NDArray[np.float64] = self._outputs(X).numpy() * self.target_scale_ + self.target_mean_
        return values if isinstance(self.target_mean_, np.ndarray) else values[:, 0]

    def _set_fitted(self, fitted: Member, rows: Rows) -> None:
        super()._set_fitted(fitted, rows)
        if rows.y.ndim == 1:
            self.target_mean_, self.target_scale_ = float(fitted.center), float(fitted.scale)
        else:
            zeros = np.zeros(rows.y.shape[1:])
            self.target_mean_, self.target_scale_ = fitted.center + zeros, fitted.scale + zeros
