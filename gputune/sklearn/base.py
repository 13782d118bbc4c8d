"""The base of every estimator: ``fit`` is the case of one configuration and one fold of fitting all
at once."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import (
    _check_sample_weight,
    _check_y,
    check_consistent_length,
    validate_data,
)
from torch import Tensor

from gputune.data.arrays import Arrays, as_arrays
from gputune.data.ragged import refuse_ragged
from gputune.data.target import check_target
from gputune.errors import InputError
from gputune.sklearn.dataset import FoldGroup, Rows, as_dense, as_tensor
from gputune.sklearn.recipe import DrawSeed, MemberSlope, Place, Training
from gputune.text import did_you_mean
from gputune.types import Task


def constructor(theirs: type, defaults: Mapping[str, object]) -> Callable[..., None]:
    """Return the constructor of a class with the parameters of scikit-learn's installed one, and
    those of ``defaults``.

    What both have takes its default from these.
    """
    own = inspect.signature(theirs.__init__)  # type: ignore[misc]
    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY)
        for n in defaults
        if n not in own.parameters
    ]
    parameters = [
        p.replace(default=defaults.get(p.name, p.default))
        for p in (*own.parameters.values(), *added)
    ]
    signature = own.replace(parameters=parameters)

    def __init__(self: object, *values: object, **params: object) -> None:
        bound = signature.bind(self, *values, **params)
        bound.apply_defaults()
        vars(self).update(
            {name: value for name, value in bound.arguments.items() if name != "self"}
        )

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


class FusedEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """An estimator whose configurations and folds can be fitted together.

    A subclass says what its parameters mean (``_recipe``), how recipes are fitted on the rows of
    folds (``_fit_recipes``), and what a fitted one takes over (``_set_fitted``).
    """

    _refused: ClassVar[Mapping[str, str]] = {}
    """Words of other libraries that are no parameters -> what to do instead."""
    _takes_any_target: ClassVar[bool] = False
    """Whether y is taken as it is, numbers (n, ...)."""
    _takes_arrays: ClassVar[bool] = False
    """Whether X may be what is no table, and y have several columns."""
    _differentiable: ClassVar[Mapping[str, str]] = {}
    """The parameters that a descent may move, the usual one first -> what the engine calls them."""
    _fit_recipes: ClassVar[Callable[..., Mapping[Place, object]]]
    """Of recipes by trial, folds and training: for each (fold, trial) what ``_set_fitted`` takes,
    or an error."""
    _slopes: ClassVar[Callable[..., Iterable[tuple[Place, MemberSlope]]]]
    """Of recipes by trial, folds, hyperparameters, how, and training: the slope of each member that
    has one."""

    def __new__(cls, *_: object, **params: object) -> Self:
        """Refuse what the constructor does not know in words that help."""
        cls._check_names(params)
        parameters = inspect.signature(cls.__init__).parameters
        unknown = [name for name in params if name not in parameters]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            hint = did_you_mean(unknown[0], [name for name in parameters if name != "self"])
            raise TypeError(f"{cls.__name__} has no parameter {unknown[0]!r}.{hint}")
        estimator: Self = super().__new__(cls)
        return estimator

    def set_params(self, **params: object) -> Self:
        """Set parameters and return the estimator; raises InputError for one that has no
        counterpart here."""
        self._check_names(params)
        super().set_params(**params)
        return self

    @classmethod
    def _check_names(cls, names: Iterable[str]) -> None:
        """Raise InputError for a refused word, unless a subclass has made a parameter of it."""
        parameters = inspect.signature(cls.__init__).parameters
        for name in names:
            if name in cls._refused and name not in parameters:
                raise InputError(f"{cls.__name__} has no parameter {name!r}: {cls._refused[name]}.")

    def fit(self, X: object, y: object, sample_weight: object = None) -> Self:
        """Fit on rows X with their targets y; ``sample_weight`` (n,) is each row's weight in the
        loss.

        Returns the estimator. Raises ValueError for bad input, DivergedError where the training
        diverges.
        """
        hook = fit_hook.get()
        if hook is not None and hook.fit(self, X, y, sample_weight):
            return self
        own_callbacks = hasattr(self, "_skl_callbacks") and not hasattr(
            self, "_parent_callback_ctx"
        )
        # callbacks, since scikit-learn 1.9
        if own_callbacks or self._left_to_scikit_learn(y) is not None:
            weights = {} if sample_weight is None else {"sample_weight": sample_weight}
            fitted: Self = super().fit(X, y, **weights)
            return fitted
        rows = check_rows(self, X, y, sample_weight)
        folds = FoldGroup((0,), rows, (np.arange(len(rows.X)),))
        return self._become(fit_together({0: self}, folds, Training())[0, 0], rows)

    def _become(self, fitted: object, rows: Rows) -> Self:
        """Become a fitted estimator and return it; raises the exception of a fit that failed."""
        if isinstance(fitted, Exception):
            raise fitted
        if rows.is_table:
            self.n_features_in_ = rows.X.parts[0].shape[1]
        if rows.names is not None:
            self.feature_names_in_ = rows.names
        self._set_fitted(fitted, rows)
        return self

    def _left_to_scikit_learn(self, y: object) -> str | None:
        """Return what of the parameters, or of y, scikit-learn's class of this name fits itself;
        None where nothing."""
        del y
        return None

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _recipe(self, draw: DrawSeed) -> Any:
        """Return what the parameters mean; ``draw`` is where random_state=None has its seed
        from."""
        raise NotImplementedError

    def _set_fitted(self, fitted: Any, rows: Rows) -> None:
        """Take over what one of the fits gave."""
        raise NotImplementedError


class FitHook(Protocol):
    """What stands in for fits while scikit-learn calls them one by one."""

    def fit(self, estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> bool:
        """Do what ``fit`` would do and return True, or leave it to ``fit``."""

    def transform(self, function: Callable[..., object], *args: Any, **options: Any) -> object:
        """Return what ``function`` does, which fits a transformer of a pipeline and transforms with
        it."""


fit_hook: ContextVar[FitHook | None] = ContextVar("fit_hook", default=None)


@contextmanager
def hooked(hook: FitHook | None) -> Iterator[None]:
    """Let a hook, or none, stand in for fits inside."""
    token = fit_hook.set(hook)
    try:
        yield
    finally:
        fit_hook.reset(token)


# in which a table is taken as it is; another precision becomes the first
FLOATS = (np.float64, np.float32)


def check_rows(estimator: FusedEstimator, X: object, y: Any, sample_weight: object = None) -> Rows:
    """Return the rows of a fit as scikit-learn checks them for ``estimator``, which takes its
    feature names over.

    Inputs that are no table, and targets of several columns, are for an estimator that takes them.
    Raises InputError or scikit-learn's ValueError for anything else.
    """
    numeric = is_regressor(estimator)
    any_target = estimator._takes_any_target
    if estimator._takes_arrays:
        refuse_ragged(X, "X")
        refuse_ragged(y, "y")
    X = as_dense(X)
    y = y.detach().cpu().numpy() if isinstance(y, Tensor) else y
    several = estimator._takes_arrays and has_columns(y)
    arrays = as_arrays(X) if estimator._takes_arrays else None
    names = None
    if estimator._takes_arrays and arrays is None and isinstance(X, Mapping):
        kinds = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in X.items())
        raise InputError(f"X as a dict must hold arrays or tensors, got {{{kinds}}}; convert them.")
    if any_target:
        y = check_target(y, task="custom", n_rows=len(y) if arrays is None else len(arrays)).values
    elif arrays is not None:
        y = _check_y(y, multi_output=several, y_numeric=numeric, estimator=estimator)
    if arrays is None:
        target = {} if any_target else {"y": y, "y_numeric": numeric, "multi_output": several}
        checked = validate_data(estimator, X, dtype=FLOATS, order="C", **target)
        table, y = (checked, y) if any_target else checked
        arrays = Arrays((as_tensor(table),))
        names = getattr(estimator, "feature_names_in_", None)
    check_consistent_length(arrays.parts[0], y)
    weights = None
    classes = None
    if sample_weight is not None:
        weights = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
    task: Task = (
        "custom" if any_target else "multilabel" if several and not numeric else "regression"
    )
    if several and not any_target:
        _check_columns(estimator, y)
    if not any_target and (several or numeric):
        y = np.asarray(y, dtype=np.float64)
    elif not any_target:
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        y = codes.astype(np.int64)
    return Rows(arrays, y, weights, classes, names, task)


def has_columns(y: Any) -> bool:
    """Whether a target has several columns, or more axes."""
    shape = y.shape if issparse(y) else np.asarray(y).shape
    return len(shape) > 1 and shape[1:] != (1,)


def _check_columns(estimator: FusedEstimator, y: object) -> None:
    """Raise InputError for a target that is a sparse matrix, and for classes in several columns."""
    if issparse(y):
        raise InputError(
            "y is a sparse matrix, and only dense targets are supported; pass y.toarray()."
        )
    if not is_regressor(estimator) and type_of_target(y) != "multilabel-indicator":
        shape = np.asarray(y).shape
        raise InputError(
            f"{type(estimator).__name__} takes labels in several columns, 0 or 1 each, got y of "
            f"shape {shape}; fit one estimator for each column of classes, or a "
            "NeuralNetRegressor on numbers."
        )


def fit_together(
    candidates: Mapping[int, FusedEstimator], folds: FoldGroup, training: Training
) -> dict[Place, object]:
    """Fit all candidates, of one class and by trial, on the training rows of all folds at once.

    Returns for each (fold, trial) what ``_become`` takes. ``random_state=None`` is one fresh draw
    for all of them. A candidate whose parameters are refused fails in every fold, as its own
    ``fit`` would.
    """

    @functools.cache
    def draw() -> int:  # from numpy's global state, as in scikit-learn
        return int(check_random_state(None).randint(2**31 - 1))

    results: dict[Place, object] = {}
    recipes = {}
    trained = []
    for trial, candidate in candidates.items():
        try:
            recipes[trial] = candidate._recipe(draw)
        except (TypeError, ValueError) as error:
            results |= {(fold, trial): error for fold in folds.numbers}
    for i, (fold, train) in enumerate(zip(folds.numbers, folds.trains)):
        if (refusal := folds.rows.refusal(train)) is None:
            trained.append(i)
        else:
            results |= {(fold, trial): refusal for trial in recipes}
    if recipes and trained:
        results |= next(iter(candidates.values()))._fit_recipes(
            recipes, folds.part(trained), training
        )
    return results


def last_step(estimator: object) -> tuple[str, BaseEstimator]:
    """Return the prefix of the parameters of what is trained, and that itself: a pipeline's last
    step, or all of it."""
    if isinstance(estimator, Pipeline) and estimator.steps:
        name, last = estimator.steps[-1]
        return f"{name}__", last
    return "", estimator
