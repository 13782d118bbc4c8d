"""The target of a study: its task, and y as class codes or numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import narwhals as nw
import numpy as np
from torch import Tensor

from gputune.data.kinds import checked_labels, from_values, is_missing
from gputune.data.ragged import pad_remedy, refuse_ragged
from gputune.data.target_transform import (
    FittedTransform,
    TargetTransform,
    check_values,
    fit_transform,
)
from gputune.errors import InputError
from gputune.text import count, did_you_mean, is_number
from gputune.types import Task

MAX_CLASSES = 20
"""Whole numbers with more distinct values than this are predicted as numbers.

``task`` overrides this.
"""

TaskWord = Literal["classification", "binary", "multiclass", "regression", "multilabel", "custom"]
TASKS = get_args(TaskWord)


@dataclass(frozen=True, eq=False)
class Target:
    """A checked target.

    ``values`` depends on the task:

    - classes: (n,) int64 positions in ``classes`` (K,).
    - regression: (n,) float64, or (n, K) for several numbers.
    - several labels: (n, K) of 0 and 1.
    - custom target: numbers (n, ...) as the user gave them.

    ``classes`` are sorted and keep the type of the given values. They are None if the target has no
    classes.
    """

    task: Task
    values: np.ndarray
    classes: np.ndarray | None
    name: str = "y"
    column: bool = False
    """True if numbers (n,) were given as (n, 1). Custom losses and scores then read them as (n,
    1)."""
    transform: TargetTransform | None = None
    """The transformation of numbers before they are standardized."""
    standardise: bool = True
    """True if numbers are standardized by the training rows of each fold. False for a custom
    loss."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n_outputs(self) -> int:
        """The number of classes (2 for a binary task), of labels, or of numbers per row."""
        return int(np.prod(self.values.shape[1:])) if self.classes is None else len(self.classes)

    @property
    def in_words(self) -> str:
        """The prediction for a row, as text."""
        if self.classes is not None:
            return f"{len(self.classes)} classes"
        words = {"multilabel": "labels", "custom": "numbers, as they are"}.get(
            self.task, "numbers (regression)"
        )
        return words if self.values.ndim == 1 else f"{self.n_outputs} {words}"

    @property
    def override(self) -> str:
        """The option that switches whole numbers between classes and numbers, as text.

        "" if the target has no alternative.
        """
        labels = self.labels
        if (
            self.task == "custom"
            or labels.ndim > 1
            or labels.dtype.kind not in "iuf"
            or not _are_whole(labels)
        ):
            return ""
        if self.classes is None:
            return "if they are classes, say task='classification'"
        return "if they are numbers, say task='regression'"

    @property
    def labels(self) -> np.ndarray:
        """The target as it was given: class labels (n,), or numbers as float64."""
        return self.values if self.classes is None else self.classes[self.values]

    def select(self, rows: np.ndarray) -> "Target":
        """Return the given rows. All classes stay, even if no row has them."""
        return replace(self, values=self.values[rows])


def check_target(
    y: object, *, task: TaskWord | None = None, n_rows: int, name: str = "y"
) -> Target:
    """Return y, (n, ...), as class codes or numbers.

    Without ``task``:

    - Text and booleans are classes. At most 20 distinct whole numbers (integers or floats) are
      classes too, if at least one of them repeats.
    - Other single columns are numbers.
    - Several columns are labels if they hold only 0 and 1, otherwise numbers.
    - A target with more axes is a custom target.

    Args:
        y: the target.
        task: the task, or None to choose it from the values.
        n_rows: the number of rows of X.
        name: the target's name in errors.

    Raises:
        InputError: y has missing or infinite values, another length than X, or does not fit
            ``task``.
    """
    if task is not None and task not in TASKS:
        raise InputError(
            f"task must be one of {', '.join(map(repr, TASKS))} or None, got "
            f"{task!r}.{did_you_mean(task, TASKS)}"
        )
    given = target_array(y, name)
    column = given.ndim == 2 and given.shape[1] == 1
    values = _values(given[:, 0] if column else given, name)
    if len(values) != n_rows:
        got = f"got {len(values)} values and {n_rows} rows; check that both come from the same rows"
        raise InputError(f"{name} must have one value a row of X, {got}.")
    if task == "custom" or values.ndim > 1:
        return _several(values[:, None] if column else values, task, name)
    if task == "multilabel":
        raise InputError(
            f"task='multilabel' needs several columns of 0 and 1 in {name}, got one; leave task "
            "out."
        )
    if task == "regression" or (task is None and not _are_classes(values)):
        _check_numbers(values, "regression", name)
        return Target("regression", values.astype(np.float64), None, name, column)
    if not _are_whole(values):
        odd = values[values != np.rint(values)][0]
        remedy = "use task='regression', or cut them into classes"
        raise InputError(
            f"task={task!r} needs classes in {name}, got continuous numbers such as {odd}; "
            f"{remedy}."
        )
    classes, codes = np.unique(values, return_inverse=True)
    if len(classes) < 2 and task is None and values.dtype.kind in "iuf":
        raise InputError(_ALL_EQUAL.format(name=name, value=classes[0].item()))
    if len(classes) < 2:
        remedy = "add rows of another class, or check the target's column"
        raise InputError(
            f"{name} must have at least two classes, got only {classes[0].item()!r:.100}; {remedy}."
        )
    fitting: Task = "binary" if len(classes) == 2 else "multiclass"
    if task in ("binary", "multiclass") and task != fitting:
        raise InputError(
            f"task={task!r} does not fit {name}, which has {len(classes)} classes; use "
            f"task={fitting!r}."
        )
    return Target(fitting, codes.astype(np.int64), classes, name)


def with_transform(target: Target, transform: TargetTransform | None) -> Target:
    """Return a target with its transformation.

    Raises:
        InputError: the target has classes, or values for which the transformation is undefined.
    """
    if transform is None:
        return target
    if target.task != "regression":
        why = f"and {target.name} is {target.in_words}: leave it out, or say task='regression'"
        raise InputError(f"target_transform={transform!r} is for numbers to be predicted, {why}.")
    check_values(transform, target.values, target.name)
    return replace(target, transform=transform)


_ALL_EQUAL = (
    "{name} is {value} in every row: there is nothing to predict; check the target's column."
)


def check_spread(target: Target) -> None:
    """Raise InputError if all numbers are equal, or seem equal because one of them is far away."""
    if target.task != "regression" or target.transform is not None:
        return
    values = target.values.reshape(len(target), -1)
    if (np.ptp(values, 0) == 0).all():
        raise InputError(_ALL_EQUAL.format(name=target.name, value=values[0, 0]))
    # scaled to at most 1, so that squares do not overflow
    values = values / np.maximum(np.abs(values).max(0), np.finfo(np.float64).tiny)
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    if len(
        lost := np.flatnonzero(
            (high > low) & (high - low < np.finfo(np.float32).eps * values.std(0))
        )
    ):
        row = int(np.abs(values - middle)[:, lost[0]].argmax())
        raise InputError(
            f"{target.name} has {target.values.reshape(values.shape)[row, lost[0]]:.4g} in row "
            f"{row}, beside which half of the other numbers are equal in single precision; "
            "correct it, leave that row out, or choose a target_transform."
        )


def standardised(
    target: Target,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: Sequence[np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[FittedTransform, ...]]:
    """Return y, center (F, ...), scale (F, ...) and the transformation of each fold.

    Here, y is one of

    - (n,) class codes,
    - (F, n, ...) standardized numbers,
    - (1 or F, n, ...) numbers that are only transformed, or unchanged.

    The transformations are () if the target has none. The ``weights`` (n,) of each fold count in
    the means and deviations. The deviation is 1 if the numbers are constant.
    """
    zeros = np.zeros(len(folds))
    ones = np.ones(len(folds))
    transforms = tuple[FittedTransform, ...]()
    if target.classes is not None:
        return target.values, zeros, ones, ()
    values = target.values[None]
    if target.transform is not None:
        transforms = tuple(
            fit_transform(target.transform, target.values[train]) for train, _ in folds
        )
        values = np.stack([fitted.forward(target.values) for fitted in transforms])
    if target.task != "regression" or not target.standardise:
        return values[..., None] if target.column else values, zeros, ones, transforms
    moments = []
    for f, ((train, _), weight) in enumerate(zip(folds, weights)):
        # Rows of weight 0 must not decide whether the numbers are constant.
        train = train if weight is None else train[weight[train] > 0]
        y = values[f % len(values), train]
        counted = None if weight is None else weight[train]
        mean = np.average(y, 0, weights=counted)
        deviation = np.sqrt(np.average((y - mean) ** 2, 0, weights=counted))
        # The standard deviation of a constant may be a rounding error instead of 0.
        moments.append((mean, np.where((np.ptp(y, 0) > 0) & (deviation > 0), deviation, 1.0)))
    center, scale = (np.array(part) for part in zip(*moments))
    # (1 or F, n, ...) - (F, 1, ...) -> (F, n, ...)
    return (values - center[:, None]) / scale[:, None], center, scale, transforms


def _values(values: np.ndarray, name: str) -> np.ndarray:
    """Return an array (n, ...) as bool, integers, floats or text, without missing values."""
    if values.ndim == 0 or 0 in values.shape:
        raise InputError(
            f"{name} must be one value a row, got shape {values.shape}; pass an array of rows."
        )
    if values.ndim > 1 and values.dtype.kind in "OU":
        remedy = "tune one target at a time, or pass numbers"
        raise InputError(f"{name} holds text in several columns, shape {values.shape}; {remedy}.")
    if values.dtype.kind not in "biufUO":
        raise InputError(
            f"{name} must hold numbers, booleans or text, got {values.dtype}; convert it."
        )
    refuse_missing(values, name, "leave those rows out")
    if values.dtype.kind == "O":
        values = _from_objects(values, name)
    if values.dtype.kind == "f" and (bad := np.isinf(values)).any():
        raise InputError(
            f"{name} must be finite, got {values[bad][0]} in row {_first_row(bad)}; leave that "
            "row out."
        )
    return values


def refuse_missing(
    values: np.ndarray, name: str, remedy: str, place: Callable[[int], str] = "row {}".format
) -> None:
    """Raise InputError if one of the values (n,), of any type, is missing.

    ``place`` returns the place of a row as text.
    """
    lost = (
        np.isnan(values)
        if values.dtype.kind in "biuf"
        else np.array([*map(is_missing, values)], dtype=bool)
    )
    if lost.size and lost.all():
        raise InputError(f"{name} is missing in every row; check its values.")
    if lost.any():
        raise InputError(
            f"{name} has {count(int(lost.sum()), 'missing value')} (the first in "
            f"{place(_first_row(lost))}); {remedy}."
        )


def _first_row(bad: np.ndarray) -> int:
    return int(bad.reshape(len(bad), -1).any(1).argmax())


def target_array(y: object, name: str) -> np.ndarray:
    """Return y as an array in its own type.

    A list of text, or of values of different types, becomes an array of Python objects.
    """
    from scipy.sparse import issparse

    if issparse(y):
        raise InputError(
            f"{name} is a sparse matrix, and only dense targets are supported; pass y.toarray()."
        )
    if isinstance(y, Tensor):
        refuse_ragged(y, name)
        if y.is_meta:
            raise InputError(
                f"{name} lies on the device 'meta', which holds no values; pass one that has them."
            )
        values = y.detach().cpu()
        short = values.is_floating_point() and values.dtype.itemsize < 4  # which NumPy lacks
        return np.asarray((values.float() if short else values).numpy())
    data = nw.from_native(y, pass_through=True, allow_series=True)
    if isinstance(data, nw.DataFrame):
        return np.stack([*map(_series, data.iter_columns())], axis=1)
    if isinstance(data, nw.Series):
        return _series(data)
    refuse_ragged(y, name)
    try:
        array = np.asarray(y)
    except ValueError as error:  # of lists within the rows
        raise InputError(f"{name} has rows of different shapes. {pad_remedy(name)}") from error
    # Lists such as ["a", None] or [1, True] would silently become text or integers.
    return (
        np.asarray(y, dtype=object)
        if not isinstance(y, np.ndarray) and array.dtype.kind in "UO"
        else array
    )


def _series(series: "nw.Series[Any]") -> np.ndarray:
    """Return a column of a data frame: its numbers, or otherwise its Python values."""
    is_number = series.dtype.is_numeric() or series.dtype == nw.Boolean
    has_all = is_number and not series.is_null().any()
    return np.asarray(series.to_numpy()) if has_all else np.array(series.to_list(), dtype=object)


def _several(values: np.ndarray, task: TaskWord | None, name: str) -> Target:
    """Return the target of several columns, or a custom target.

    Without a task, columns that hold only 0 and 1 are labels, other columns are numbers.
    """
    are_flags = values.dtype.kind != "U" and bool(np.isin(values, (0, 1)).all())
    if task is None and values.ndim == 2 and are_flags and (values.sum(1) == 1).all():
        remedy = (
            f"pass {name}.argmax(1) for classes, or task='multilabel' where each column is a "
            "label of its own"
        )
        raise InputError(f"{name} is one-hot rows of shape {values.shape}: {remedy}.")
    task = task or ("custom" if values.ndim > 2 else "multilabel" if are_flags else "regression")
    _check_numbers(values, task, name)
    if task == "custom":
        return Target(
            task, values if values.dtype.kind in "iuf" else values.astype(np.float64), None, name
        )
    if values.ndim == 2 and (task == "regression" or (task == "multilabel" and are_flags)):
        return Target(task, values.astype(np.float64), None, name)
    needs = "columns of 0 and 1" if task == "multilabel" else "one or several columns"
    remedy = f"it needs {needs}; leave task out, or say task='custom' and give a loss of your own"
    raise InputError(
        f"task={task!r} does not fit {name}, an array of shape {values.shape}: {remedy}."
    )


def _from_objects(values: np.ndarray, name: str) -> np.ndarray:
    if all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
        try:
            return values.astype(np.int64)
        except OverflowError as error:
            odd = next(value for value in values if not -(2**63) <= value < 2**63)
            remedy = "pass classes as text, numbers as floats"
            raise InputError(
                f"{name} holds {odd}, which is beyond 64-bit integers; {remedy}."
            ) from error
    kind, read = from_values(list(checked_labels(values, name)), name=name, untyped=False)
    if kind == "date":
        raise InputError(
            f"{name} holds dates, which cannot be predicted; turn it into a number first."
        )
    return (
        read.astype(bool) if kind == "boolean" else read.astype(str) if kind == "category" else read
    )


def are_soft_labels(target: Target) -> bool:
    """Return True if a target (n, K) holds a probability for each class.

    Then all numbers are at least 0 and each row sums to 1.
    """
    values = target.values
    if target.task != "regression" or values.ndim != 2 or values.shape[1] < 2:
        return False
    return bool((values >= 0).all() and (np.abs(values.sum(1) - 1) < 1e-3).all())


def are_many_whole_numbers(target: Target) -> bool:
    """Return True for one whole number per row with more than ``MAX_CLASSES`` distinct values."""
    if target.task != "regression" or target.values.ndim > 1 or not _are_whole(target.values):
        return False
    return len(np.unique(target.values)) > MAX_CLASSES


def whole_numbers_words(target: Target) -> str:
    """Return the remark on whole numbers that are predicted as numbers.

    It names the option that changes this.
    """
    distinct = f"{len(np.unique(target.values))} distinct whole numbers in {len(target)} rows"
    why = (
        f"more than the {MAX_CLASSES} that are taken for classes, so a number is predicted "
        "(regression)"
    )
    return f"{target.name} has {distinct}, {why}. If they are classes, say task='classification'."


def _are_classes(values: np.ndarray) -> bool:
    if values.dtype.kind in "bU" or not _are_whole(values):
        return values.dtype.kind in "bU"
    distinct = len(np.unique(values))
    return distinct <= MAX_CLASSES and distinct < len(values)


def _are_whole(values: np.ndarray) -> bool:
    return values.dtype.kind != "f" or bool((values == np.rint(values)).all())


def _check_numbers(values: np.ndarray, task: str | None, name: str) -> None:
    if values.dtype.kind == "U":
        texts = values.ravel().tolist()
        odd = next((text for text in texts if not is_number(text)), texts[0])
        raise InputError(
            f"task={task!r} needs numbers in {name}, got text such as {odd!r:.100}; convert it."
        )
