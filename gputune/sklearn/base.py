"""The base of every estimator: ``fit`` is the case of one configuration and one fold of fitting all at once.

What trained estimators have in common: from a recipe to a plain module, and from the module to predictions.
"""

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone, is_regressor
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from gputune.sklearn.dataset import Rows, as_tensor
from gputune.sklearn.fit import Member, Members, Place, fit_members
from gputune.sklearn.foreign import Foreign, check_constructor
from gputune.sklearn.words import Fresh, Recipe, fresh_seed


class FusedEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """An estimator whose configurations and folds can be fitted together.

    A subclass says what its parameters mean (``_recipe``), how recipes are fitted on the rows of folds
    (``_fit_recipes``), and what a fitted one takes over (``_settle``).
    """

    _foreign: ClassVar[Foreign] = Foreign()

    def __new__(cls, *args: Any, **params: Any) -> Self:
        """Refuse what the constructor does not know in words that help."""
        del args
        check_constructor(cls, params, cls._foreign)
        made: Self = super().__new__(cls)
        return made

    def set_params(self, **params: Any) -> Self:
        """Set parameters and return the estimator; raises InputError for one that has no counterpart here."""
        self._foreign.check_names(type(self), params)
        super().set_params(**params)
        return self

    def _ours(self) -> dict[str, Any]:
        """Return the parameters that mean something; raises InputError for a value that has no counterpart here."""
        return self._foreign.ours(self.get_params(deep=False), type(self).__name__)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit on the rows X (n, D) with targets y (n,); ``sample_weight`` (n,) is each row's weight in the loss.

        Returns the estimator. Raises ValueError for bad input, DivergedError where the training diverges.
        """
        search = conductor.get()
        if search is not None and search.fit(self, X, y, sample_weight):
            return self
        rows = check_rows(self, X, y, sample_weight)
        return fit_together([self], rows, [np.arange(len(rows.X))]).settle(self, 0, 0)

    def _recipe(self, fresh: Fresh) -> Any:
        """Return what the parameters mean; ``fresh`` draws the seed of random_state=None."""
        raise NotImplementedError

    @staticmethod
    def _fit_recipes(
        recipes: Sequence[Any],
        rows: Rows,
        folds: Sequence[NDArray[np.int64]],
        *,
        workers: int | None,
        deadline: float | None,
    ) -> dict[Place, Any]:
        """Return for each (fold, trial) what ``_settle`` takes, or an exception."""
        raise NotImplementedError

    def _settle(self, fitted: Any, rows: Rows) -> None:
        """Take over what one of the fits gave."""
        raise NotImplementedError


class Conductor(Protocol):
    """A search that trains many estimators together, while it lets scikit-learn call their ``fit`` one by one."""

    def fit(self, estimator: FusedEstimator, X: Any, y: Any, sample_weight: Any) -> bool:
        """Do what ``fit`` would do and return True, or leave it to ``fit``."""

    def transform(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Return what ``function`` does, which fits a transformer of a pipeline and transforms with it."""


conductor: ContextVar[Conductor | None] = ContextVar("conductor", default=None)

E = TypeVar("E", bound=FusedEstimator)


@dataclass(frozen=True, eq=False)
class Fits:
    """The fits of all candidates in all folds: each one fitted, or the exception that its own ``fit`` would raise."""

    candidates: tuple[FusedEstimator, ...]
    rows: Rows
    found: dict[Place, Any]

    def error(self, fold: int, trial: int) -> Exception | None:
        """Return the exception of a fit that failed, None for one that did not."""
        fitted = self.found[fold, trial]
        return fitted if isinstance(fitted, Exception) else None

    def estimator(self, fold: int, trial: int) -> FusedEstimator:
        """Return a fitted clone of a candidate, as ``clone(candidate).fit`` on the fold's training rows is.

        Raises the exception of a fit that failed.
        """
        copy: FusedEstimator = clone(self.candidates[trial])
        return self.settle(copy, fold, trial)

    def settle(self, estimator: E, fold: int, trial: int) -> E:
        """Make ``estimator`` a fitted one and return it; raises the exception of a fit that failed."""
        error = self.error(fold, trial)
        if error is not None:
            raise error
        estimator.n_features_in_ = self.rows.X.shape[1]
        if self.rows.names is not None:
            estimator.feature_names_in_ = self.rows.names
        estimator._settle(self.found[fold, trial], self.rows)
        return estimator


def check_rows(estimator: FusedEstimator, X: Any, y: Any, sample_weight: Any = None) -> Rows:
    """Return the rows of a fit as scikit-learn checks them for ``estimator``, which takes its feature names over."""
    regression = is_regressor(estimator)
    X, y = validate_data(estimator, X, y, dtype=(np.float64, np.float32), order="C", y_numeric=regression)
    weights = None
    if sample_weight is not None:
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    names = getattr(estimator, "feature_names_in_", None)
    if regression:
        return Rows(X, np.asarray(y, dtype=np.float64), weights, None, names)
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    return Rows(X, codes.astype(np.int64), weights, classes, names)


def fit_together(
    candidates: Sequence[FusedEstimator],
    rows: Rows,
    folds: Sequence[NDArray[np.int64]],
    *,
    workers: int | None = 1,
    deadline: float | None = None,
    begun: Sequence[Any] | None = None,
) -> Fits:
    """Fit all candidates, of one class, on the training rows of all folds at once.

    ``random_state=None`` is one fresh draw for all of them. A candidate whose parameters are refused fails in every
    fold, as its own ``fit`` would. ``workers`` None lets an estimate decide about processes; ``deadline``
    (``time.monotonic()``) ends training, and fits that have not ended by then fail with TimeoutError. ``begun`` says
    for each candidate where its training goes on from.
    """
    fresh = functools.cache(fresh_seed)
    found: dict[Place, Any] = {}
    recipes, index = [], []
    for i, candidate in enumerate(candidates):
        try:
            recipe = candidate._recipe(fresh)
            recipes.append(recipe if begun is None else recipe.going_on(begun[i]))
            index.append(i)
        except (TypeError, ValueError) as error:
            found |= {(fold, i): error for fold in range(len(folds))}
    if recipes:
        fits = candidates[0]._fit_recipes(recipes, rows, folds, workers=workers, deadline=deadline)
        found |= {(fold, index[trial]): fitted for (fold, trial), fitted in fits.items()}
    return Fits(tuple(candidates), rows, found)


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
