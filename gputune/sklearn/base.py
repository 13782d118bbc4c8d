"""The base class of gputune's scikit-learn estimators.

``fit`` trains one configuration on one fold. A search trains many configurations in many folds with
the same code.

A recipe is the description of one training run (see recipe.py). A member is one trial (candidate)
on one fold.
"""

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
from gputune.data.containers import refuse_ragged
from gputune.data.target import check_target
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.text import did_you_mean
from gputune.ground.types import Task
from gputune.sklearn.dataset import CheckedRows, FoldGroup, as_dense, as_tensor
from gputune.sklearn.recipe import DrawSeed, FitOptions, FoldTrial, MemberSlope


def constructor(theirs: type, defaults: Mapping[str, object]) -> Callable[..., None]:
    """Return an ``__init__`` method with the parameters of scikit-learn's class and with additional
    parameters.

    Args:
        theirs: scikit-learn's class.
        defaults: gputune's parameters and their defaults. These defaults replace the defaults of
            scikit-learn's parameters.
    """
    # scikit-learn's parameters change between releases, so they are read from the installed class.
    signature = inspect.signature(theirs.__init__)  # type: ignore[misc]
    parameters = dict(signature.parameters)
    for name, default in defaults.items():
        new = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        parameters[name] = parameters.get(name, new).replace(default=default)
    signature = signature.replace(parameters=list(parameters.values()))

    def __init__(self: object, *values: object, **params: object) -> None:
        bound = signature.bind(self, *values, **params)
        bound.apply_defaults()
        del bound.arguments["self"]
        vars(self).update(bound.arguments)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


class FusedEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Base class of estimators that can train many configurations and folds together.

    A subclass describes a training run by its parameters (``_recipe``), trains such recipes on the
    rows of folds (``_fit_recipes``), and sets its fitted attributes from a result
    (``_set_fitted``).
    """

    _refused: ClassVar[Mapping[str, str]] = {}
    """Maps parameter names of other libraries to a sentence with advice for users of that name."""
    _takes_any_target: ClassVar[bool] = False
    """True if y can be any numeric array (n, ...). The estimator uses such a target unchanged."""
    _takes_arrays: ClassVar[bool] = False
    """True if X can have other shapes than a table, and y can have several columns."""
    _differentiable: ClassVar[Mapping[str, str]] = {}
    """Maps parameters that a hypergradient search can move to the engine's names of these
    hyperparameters.

    The default parameter comes first.
    """
    _fit_recipes: ClassVar[Callable[..., Mapping[FoldTrial, object]]]
    """The function that trains recipes (training runs) on folds.

    Its arguments are (recipes by trial, folds, training). The result maps each (fold, trial) to the
    argument of ``_set_fitted``, or to an error.
    """
    _slopes: ClassVar[Callable[..., Mapping[FoldTrial, MemberSlope]]]
    """The function that computes the slopes (derivatives of the validation loss) of all members.

    Its arguments are (recipes by trial, folds, hyperparameters, mode, training).

    A member whose slope could not be computed is missing from the result.
    """

    def __new__(cls, *_: object, **params: object) -> Self:
        """Create the estimator, and raise an error with a suggestion for unknown parameters."""
        cls._check_names(params)
        parameters = inspect.signature(cls.__init__).parameters
        unknown = [name for name in params if name not in parameters]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            hint = did_you_mean(unknown[0], [name for name in parameters if name != "self"])
            raise TypeError(f"{cls.__name__} has no parameter {unknown[0]!r}.{hint}")
        estimator: Self = super().__new__(cls)
        return estimator

    def set_params(self, **params: object) -> Self:
        """Set parameters of the estimator, and return the estimator.

        Raises:
            InputError: a parameter of another library has no counterpart here.
            ValueError: the estimator has no such parameter, as in scikit-learn.
        """
        self._check_names(params)
        known = self.get_params(deep=False)
        for name in params:
            if name.partition("__")[0] not in known and (hint := self._hint_for(name)):
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}. {hint}")
        super().set_params(**params)
        return self

    def _hint_for(self, name: str) -> str:
        """Return the suggestion of a parameter for an unknown name, or "" without a suggestion."""
        return did_you_mean(name, inspect.signature(type(self)).parameters).strip()

    @classmethod
    def _check_names(cls, names: Iterable[str]) -> None:
        """Raise InputError with a remedy for parameter names of other libraries, such as "lr".

        A name is valid if a subclass has a parameter of this name.
        """
        parameters = inspect.signature(cls.__init__).parameters
        for name in names:
            if name in cls._refused and name not in parameters:
                raise InputError(
                    None, f"{cls.__name__} has no parameter {name!r}", remedy=cls._refused[name]
                )

    def fit(self, X: object, y: object, sample_weight: object = None) -> Self:
        """Fit the estimator on rows X with targets y.

        Args:
            X: the rows.
            y: the targets.
            sample_weight: (n,) weight of each row in the loss. None: all weights are 1.

        Returns:
            The estimator.

        Raises:
            ValueError: the input is bad.
            DivergedError: the training diverges.
        """
        # In a search the hook records this fit, or fills in its trained result.
        hook = fit_hook.get()
        if hook is not None and hook.fit(self, X, y, sample_weight):
            return self
        in_search = hasattr(self, "_parent_callback_ctx")
        has_callbacks = hasattr(self, "_skl_callbacks") and not in_search
        # An estimator with its own callbacks (since scikit-learn 1.9) is fitted by scikit-learn's
        # ``fit``, which calls them.
        if has_callbacks or self._left_to_scikit_learn(y) is not None:
            weights = {} if sample_weight is None else {"sample_weight": sample_weight}
            fitted: Self = super().fit(X, y, **weights)
            return fitted
        rows = check_rows(self, X, y, sample_weight)
        # one fold that trains on all rows
        folds = FoldGroup((0,), rows, (np.arange(len(rows.X)),))
        return self._become(fit_together({0: self}, folds, FitOptions())[0, 0], rows)

    def _become(self, fitted: object, rows: CheckedRows) -> Self:
        """Set the fitted attributes of this estimator from a training result, and return the
        estimator.

        If the result is an exception, raise the exception.
        """
        if isinstance(fitted, Exception):
            raise fitted
        if rows.is_table:
            self.n_features_in_ = rows.X.parts[0].shape[1]
        if rows.names is not None:
            self.feature_names_in_ = rows.names
        self._set_fitted(fitted, rows)
        return self

    def _left_to_scikit_learn(self, y: object) -> str | None:
        """Return a setting such as "solver='lbfgs'" that only scikit-learn's own class can train,
        or None."""
        del y
        return None

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _recipe(self, draw: DrawSeed) -> Any:
        """Return the recipe (description of a training run) for the estimator's parameters.

        ``draw`` returns the seed for random_state=None.
        """
        raise NotImplementedError

    def _set_fitted(self, fitted: Any, rows: CheckedRows) -> None:
        """Set the fitted attributes of the estimator, such as ``module_``, from a training
        result."""
        raise NotImplementedError


class FitHook(Protocol):
    """An object that replaces the ``fit`` calls of estimators while scikit-learn's search calls
    them one by one."""

    def fit(self, estimator: FusedEstimator, X: object, y: object, sample_weight: object) -> bool:
        """Replace the estimator's ``fit`` and return True, or return False to let ``fit``
        continue."""

    def transform(self, function: Callable[..., object], *args: Any, **options: Any) -> object:
        """Return the result of ``function``, which fits a pipeline's transformer and transforms
        rows.

        The hook may store the result or reuse a stored result.
        """


fit_hook: ContextVar[FitHook | None] = ContextVar("fit_hook", default=None)


@contextmanager
def hooked(hook: FitHook | None) -> Iterator[None]:
    """Use an object in place of the estimators' ``fit`` calls inside a ``with`` block.

    With None, ``fit`` calls work as usual.
    """
    token = fit_hook.set(hook)
    try:
        yield
    finally:
        fit_hook.reset(token)


# A table keeps these dtypes. Another dtype becomes the first one.
FLOATS = (np.float64, np.float32)


def check_rows(
    estimator: FusedEstimator, X: object, y: Any, sample_weight: object = None
) -> CheckedRows:
    """Check the rows X and y of a ``fit`` call like scikit-learn does, and return ``CheckedRows``.

    The function also sets the estimator's feature names. Only some estimators accept inputs that
    are not tables, or targets with several columns.

    Raises:
        InputError: a dict or a target has a form that the estimator does not support.
        ValueError: scikit-learn refuses the rows.
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
        types = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in X.items())
        raise InputError(
            "X",
            "must hold only arrays and tensors if it is a dict",
            got=Verbatim(f"{{{types}}}"),
            remedy="Convert its values.",
        )
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
    task: Task = "regression"
    if any_target:
        task = "custom"
    elif several or numeric:
        if several:
            _check_columns(estimator, y)
        if not numeric:
            task = "multilabel"
        y = np.asarray(y, dtype=np.float64)
    else:
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        y = codes.astype(np.int64)
    return CheckedRows(arrays, y, weights, classes, names, task)


def has_columns(y: Any) -> bool:
    """Return True if a target has several columns, or more than two axes."""
    shape = y.shape if issparse(y) else np.asarray(y).shape
    return len(shape) > 1 and shape[1:] != (1,)


def _check_columns(estimator: FusedEstimator, y: object) -> None:
    """Raise InputError if a target is a sparse matrix, or has classes in several columns."""
    if issparse(y):
        raise InputError(
            "y", "must be dense", got=Verbatim("a sparse matrix"), remedy="Pass y.toarray()."
        )
    if not is_regressor(estimator) and type_of_target(y) != "multilabel-indicator":
        raise InputError(
            "y",
            f"must be labels of 0 and 1 if {type(estimator).__name__} gets several columns",
            got=Verbatim(f"other values of shape {np.asarray(y).shape}"),
            remedy="Fit one estimator for each column of classes, or a NeuralNetRegressor on "
            "numbers.",
        )


def fit_together(
    candidates: Mapping[int, FusedEstimator], folds: FoldGroup, training: FitOptions
) -> dict[FoldTrial, object]:
    """Train all candidates of a search on the training rows of all folds together.

    A candidate with invalid parameters gets an error in every fold, as its own ``fit`` would raise.

    Args:
        candidates: unfitted estimators of one class, by trial.
        folds: the rows and the folds.
        training: the options of the training: workers, deadline and states to continue from.

    Returns:
        For each (fold, trial) the argument of ``_become``. With ``random_state=None``, all
        candidates share one new random seed.
    """

    @functools.cache
    def draw() -> int:  # from numpy's global state, as in scikit-learn
        return int(check_random_state(None).randint(2**31 - 1))

    results: dict[FoldTrial, object] = {}
    recipes = {}
    trained = []
    for trial, candidate in candidates.items():
        try:
            recipes[trial] = candidate._recipe(draw)
        except (TypeError, ValueError) as error:
            results |= {(fold, trial): error for fold in folds.numbers}
    # A fold with unusable training rows (no rows, one class) fails for every recipe.
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
    """Return the last step of a pipeline, and the prefix of its parameters, such as "clf__".

    An estimator that is no pipeline is returned with the prefix "".
    """
    if isinstance(estimator, Pipeline) and estimator.steps:
        name, last = estimator.steps[-1]
        return f"{name}__", last
    return "", estimator
