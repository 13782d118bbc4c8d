"""The target of a study: the task (such as "binary"), and y as class codes or numbers.

In shapes, n counts rows, F folds, and K classes, labels or target columns.
"""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import narwhals as nw
import numpy as np
from torch import Tensor

from gputune.data.containers import pad_remedy, refuse_ragged
from gputune.data.kinds import checked_labels, from_values, is_missing, may_be_numbers
from gputune.data.target_transform import (
    FittedTransform,
    TargetTransform,
    check_values,
    fit_transform,
)
from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.text import count, did_you_mean, is_number
from gputune.ground.types import Task

MAX_CLASSES = 20
"""The largest number of distinct whole numbers that a target of classes may have. A target with
more of them is a regression target, unless ``task`` is set."""

TaskWord = Literal["classification", "binary", "multiclass", "regression", "multilabel", "custom"]
TASKS = get_args(TaskWord)


@dataclass(frozen=True, eq=False)
class Target:
    """The target y of a study after all checks, with its task.

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
    """True if the user passed a numeric target (n,) as (n, 1). Then custom losses and scores
    receive the target as (n, 1)."""
    transform: TargetTransform | None = None
    """The transformation of a numeric target before standardization, or None."""
    standardize: bool = True
    """True if each fold standardizes a numeric target by its training rows, False for a custom
    loss."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n_outputs(self) -> int:
        """The number of values that a model predicts per row: classes (2 for a binary task), labels
        or numbers."""
        return int(np.prod(self.values.shape[1:])) if self.classes is None else len(self.classes)

    @property
    def in_words(self) -> str:
        """A description of the target for messages, such as "3 classes" or "numbers
        (regression)"."""
        if self.classes is not None:
            return f"{len(self.classes)} classes"
        nouns = {"multilabel": "labels", "custom": "numbers, unchanged"}
        noun = nouns.get(self.task, "numbers (regression)")
        return noun if self.values.ndim == 1 else f"{self.n_outputs} {noun}"

    @property
    def override(self) -> str:
        """A hint for messages: the option that makes whole numbers classes, or classes numbers.

        The hint is "" for other targets, and for classes that are hardly numbers.
        """
        labels = self.labels
        is_numeric = labels.ndim == 1 and labels.dtype.kind in "iuf"
        if self.task == "custom" or not is_numeric or not _are_whole(labels):
            return ""
        if self.classes is None:
            return f"if they are classes, set {option('task', 'classification')}"
        hint = f"if they are numbers, set {option('task', 'regression')}"
        return hint if may_be_numbers(self.classes, len(self)) else ""

    @property
    def labels(self) -> np.ndarray:
        """The target in the user's own values: class labels (n,), or numbers as float64."""
        return self.values if self.classes is None else self.classes[self.values]

    def select(self, rows: np.ndarray) -> "Target":
        """Return the target of the rows ``rows``. All classes stay, even if no row has them."""
        return replace(self, values=self.values[rows])


def check_target(
    y: object, *, task: TaskWord | None = None, n_rows: int, name: str = "y"
) -> Target:
    """Check the target y (n, ...) of a search, and return it as class codes or numbers.

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
            "task",
            f"must be one of {', '.join(map(repr, TASKS))}{per_interface(' or None', '')}",
            got=task,
            remedy=did_you_mean(task, TASKS).strip(),
        )
    array = target_array(y, name)
    column = array.ndim == 2 and array.shape[1] == 1
    values = _values(array[:, 0] if column else array, name)
    if len(values) != n_rows:
        raise InputError(
            None,
            f"{name} must have one value per row of X",
            got=Verbatim(f"{len(values)} values and {n_rows} rows"),
            remedy=f"Check that X and {name} come from the same rows.",
        )
    if task == "custom" or values.ndim > 1:
        return _several(values[:, None] if column else values, task, name)
    if task == "multilabel":
        raise InputError(
            option("task", task),
            f"needs several columns of 0 and 1 in {name}",
            got=Verbatim("one column"),
            remedy=f"Leave out {option('task')}.",
        )
    if task == "regression" or (task is None and not _are_classes(values)):
        _check_numbers(values, "regression", name)
        return Target("regression", values.astype(np.float64), None, name, column)
    if not _are_whole(values):
        raise InputError(
            option("task", task),
            f"needs classes in {name}",
            got=Verbatim(f"continuous numbers such as {values[values != np.rint(values)][0]}"),
            remedy=f"Use {option('task', 'regression')}, or divide the numbers into classes.",
        )
    classes, codes = np.unique(values, return_inverse=True)
    if len(classes) < 2 and task is None and values.dtype.kind in "iuf":
        raise _all_equal(name, classes[0].item())
    if len(classes) < 2:
        raise InputError(
            None,
            f"{name} must have at least two classes",
            got=Verbatim(f"only {classes[0].item()!r:.100}"),
            remedy="Add rows of a second class, or check the column of the target.",
        )
    fitting: Task = "binary" if len(classes) == 2 else "multiclass"
    if task in ("binary", "multiclass") and task != fitting:
        raise InputError(
            option("task", task),
            f"does not fit {name}, which has {len(classes)} classes",
            remedy=f"Use {option('task', fitting)}.",
        )
    return Target(fitting, codes.astype(np.int64), classes, name)


def with_transform(target: Target, transform: TargetTransform | None) -> Target:
    """Return a copy of a target that will be transformed, for example to its logarithm.

    Raises:
        InputError: the target has classes, or values for which the transformation is undefined.
    """
    if transform is None:
        return target
    if target.task != "regression":
        raise InputError(
            option("target_transform", transform),
            f"is only for a numeric target, but {target.name} is {target.in_words}",
            remedy=f"Leave it out, or set {option('task', 'regression')}.",
        )
    check_values(transform, target.values, target.name)
    return replace(target, transform=transform)


def _all_equal(name: str, value: object) -> InputError:
    rule = f"{name} is {value} in every row, so there is nothing to predict"
    return InputError(None, rule, remedy="Check the column of the target.")


def check_spread(target: Target) -> None:
    """Raise InputError if all target values are equal, or nearly equal next to one extreme value."""
    if target.task != "regression" or target.transform is not None:
        return
    values = target.values.reshape(len(target), -1)
    if (np.ptp(values, 0) == 0).all():
        raise _all_equal(target.name, values[0, 0])
    # scaled to at most 1, so that squares do not overflow
    scaled = values / np.maximum(np.abs(values).max(0), np.finfo(np.float64).tiny)
    low, middle, high = np.quantile(scaled, (0.25, 0.5, 0.75), axis=0)
    # After standardization, the middle half of the numbers would round to one number in float32.
    is_lost = (high > low) & (high - low < np.finfo(np.float32).eps * scaled.std(0))
    if is_lost.any():
        column = int(is_lost.argmax())
        row = int(np.abs(scaled - middle)[:, column].argmax())
        raise InputError(
            None,
            f"{target.name} has {values[row, column]:.4g} in row {row}, which is so extreme that "
            "half of the other numbers become equal in single precision",
            remedy=f"Correct the value, leave out the row, or choose a {option('target_transform')}.",
        )


def standardized(
    target: Target,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    weights: Sequence[np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[FittedTransform, ...]]:
    """Return y standardized for each fold, with the center, scale and transformation of each fold.

    ``center`` and ``scale`` are (F folds, ...). For n rows, the returned y is one of

    - (n,) class codes,
    - (F, n, ...) standardized numbers,
    - (1 or F, n, ...) numbers that are only transformed, or unchanged.

    The transformations are () if the target has none. The ``weights`` (n,) of each fold count in
    the means and deviations. The deviation is 1 if the numbers are constant.
    """
    zeros = np.zeros(len(folds))
    ones = np.ones(len(folds))
    if target.classes is not None:
        return target.values, zeros, ones, ()
    values = target.values[None]
    transforms = tuple[FittedTransform, ...]()
    if target.transform is not None:
        transform = target.transform
        transforms = tuple(fit_transform(transform, target.values[train]) for train, _ in folds)
        values = np.stack([fitted.forward(target.values) for fitted in transforms])
    if target.task != "regression" or not target.standardize:
        return values[..., None] if target.column else values, zeros, ones, transforms
    centers = []
    scales = []
    for f, (train, _) in enumerate(folds):
        row_weights = weights[f]
        train_weights = None
        if row_weights is not None:
            # Rows of weight 0 must not decide whether the numbers are constant.
            train = train[row_weights[train] > 0]
            train_weights = row_weights[train]
        y = values[f % len(values), train]
        mean = np.average(y, 0, weights=train_weights)
        deviation = np.sqrt(np.average((y - mean) ** 2, 0, weights=train_weights))
        # The standard deviation of a constant may be a rounding error instead of 0.
        varies = (np.ptp(y, 0) > 0) & (deviation > 0)
        centers.append(mean)
        scales.append(np.where(varies, deviation, 1.0))
    center = np.array(centers)
    scale = np.array(scales)
    # (1 or F, n, ...) - (F, 1, ...) -> (F, n, ...)
    return (values - center[:, None]) / scale[:, None], center, scale, transforms


def _values(values: np.ndarray, name: str) -> np.ndarray:
    """Check that target values (n, ...) are present and finite. Return them as bool, numbers or
    text."""
    if values.ndim == 0 or 0 in values.shape:
        raise InputError(
            None, f"{name} must have one value per row", got=Verbatim(f"shape {values.shape}")
        )
    if values.ndim > 1 and values.dtype.kind in "OU":
        raise InputError(
            None,
            f"{name} holds text in several columns, shape {values.shape}",
            remedy="Run one search for each column, or convert the text to numbers.",
        )
    if values.dtype.kind not in "biufUO":
        raise InputError(
            None,
            f"{name} must hold numbers, booleans or text",
            got=Verbatim(values.dtype),
            remedy="Convert it.",
        )
    refuse_missing(values, name, "Leave those rows out.")
    if values.dtype.kind == "O":
        values = _from_objects(values, name)
    if values.dtype.kind == "f" and np.isinf(values).any():
        is_infinite = np.isinf(values)
        raise InputError(
            None,
            f"{name} must be finite",
            got=Verbatim(f"{values[is_infinite][0]} in row {_first_row(is_infinite)}"),
            remedy="Leave that row out.",
        )
    return values


def refuse_missing(
    values: np.ndarray, name: str, remedy: str, place: Callable[[int], str] = "row {}".format
) -> None:
    """Raise InputError if a value (n,) of the target or the groups is missing.

    ``place`` returns the place of a row as text.
    """
    if values.dtype.kind in "biuf":
        missing = np.isnan(values)
    else:
        missing = np.array(list(map(is_missing, values)), dtype=bool)
    if missing.size and missing.all():
        raise InputError(None, f"{name} is missing in every row", remedy="Check its values.")
    if missing.any():
        number = count(int(missing.sum()), "missing value")
        first = place(_first_row(missing))
        raise InputError(None, f"{name} has {number} (the first in {first})", remedy=remedy)


def _first_row(mask: np.ndarray) -> int:
    return int(mask.reshape(len(mask), -1).any(1).argmax())


def target_array(y: object, name: str) -> np.ndarray:
    """Convert y, such as a tensor or a Series, to a NumPy array of the same type.

    A list of text, or of mixed types, becomes an array of Python objects.
    """
    from scipy.sparse import issparse

    if issparse(y):
        raise InputError(
            None,
            f"{name} is a sparse matrix, but gputune supports only dense targets",
            remedy="Pass y.toarray().",
        )
    if isinstance(y, Tensor):
        refuse_ragged(y, name)
        if y.is_meta:
            raise InputError(
                None,
                f"{name} is on the device 'meta', which holds no values",
                remedy="Pass a tensor with values.",
            )
        values = y.detach().cpu()
        if values.is_floating_point() and values.dtype.itemsize < 4:  # NumPy has no bfloat16
            values = values.float()
        return np.asarray(values.numpy())
    data = nw.from_native(y, pass_through=True, allow_series=True)
    if isinstance(data, nw.DataFrame):
        return np.stack([*map(_series, data.iter_columns())], axis=1)
    if isinstance(data, nw.Series):
        return _series(data)
    refuse_ragged(y, name)
    try:
        array = np.asarray(y)
    except ValueError as error:  # lists of different lengths within the rows
        raise InputError(
            None, f"{name} has rows of different shapes", remedy=pad_remedy(name)
        ) from error
    if isinstance(y, np.ndarray) or array.dtype.kind not in "UO":
        return array
    # A list such as ["a", None] would silently become text.
    return np.asarray(y, dtype=object)


def _series(series: "nw.Series[Any]") -> np.ndarray:
    """Return a column of a data frame as an array: numbers, or Python objects for other types."""
    is_number = series.dtype.is_numeric() or series.dtype == nw.Boolean
    has_all = is_number and not series.is_null().any()
    return np.asarray(series.to_numpy()) if has_all else np.array(series.to_list(), dtype=object)


def _several(values: np.ndarray, task: TaskWord | None, name: str) -> Target:
    """Return the checked target for y with several columns, or for a custom target.

    Without a task, columns that hold only 0 and 1 are labels. Other columns are numbers.
    """
    are_flags = values.dtype.kind != "U" and bool(np.isin(values, (0, 1)).all())
    if task is None and values.ndim == 2 and are_flags and (values.sum(1) == 1).all():
        raise InputError(
            None,
            f"{name} holds one-hot rows of shape {values.shape}",
            remedy=f"Pass {name}.argmax(1) for classes, or set {option('task', 'multilabel')} if "
            "each column is a separate label.",
        )
    if task is None and values.ndim > 2:
        task = "custom"
    elif task is None:
        task = "multilabel" if are_flags else "regression"
    _check_numbers(values, task, name)
    if task == "custom":
        if values.dtype.kind not in "iuf":
            values = values.astype(np.float64)
        return Target(task, values, None, name)
    if values.ndim == 2 and (task == "regression" or (task == "multilabel" and are_flags)):
        return Target(task, values.astype(np.float64), None, name)
    expected = "columns of 0 and 1" if task == "multilabel" else "one or several columns"
    raise InputError(
        option("task", task),
        f"needs {expected} in {name}",
        got=Verbatim(f"an array of shape {values.shape}"),
        remedy=f"Leave out {option('task')}, or set {option('task', 'custom')} with a custom loss.",
    )


def _from_objects(values: np.ndarray, name: str) -> np.ndarray:
    if all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
        try:
            return values.astype(np.int64)
        except OverflowError as error:
            too_large = next(value for value in values if not -(2**63) <= value < 2**63)
            raise InputError(
                None,
                f"{name} holds {too_large}, which does not fit into a 64-bit integer",
                remedy="Pass classes as text, and numbers as floats.",
            ) from error
    kind, read = from_values(list(checked_labels(values, name)), name=name, untyped=False)
    if kind == "date":
        raise InputError(
            None,
            f"{name} holds dates, but gputune cannot predict dates",
            remedy="Convert them to numbers first.",
        )
    if kind == "number":
        return read
    return read.astype(bool if kind == "boolean" else str)


def are_soft_labels(target: Target) -> bool:
    """Return True if a target (n rows, K classes) holds class probabilities (soft labels).

    All values must be at least 0, and each row must sum to 1.
    """
    values = target.values
    if target.task != "regression" or values.ndim != 2 or values.shape[1] < 2:
        return False
    return bool((values >= 0).all() and (np.abs(values.sum(1) - 1) < 1e-3).all())


def are_many_whole_numbers(target: Target) -> bool:
    """Return True for a target of whole numbers with more than ``MAX_CLASSES`` distinct values.

    The target has one value per row.
    """
    if target.task != "regression" or target.values.ndim > 1 or not _are_whole(target.values):
        return False
    return len(np.unique(target.values)) > MAX_CLASSES


def whole_numbers_words(target: Target) -> str:
    """Return a remark that many whole numbers are a regression, and how to make them classes."""
    return (
        f"{target.name} has {len(np.unique(target.values))} distinct whole numbers in "
        f"{len(target)} rows. Because these are more than {MAX_CLASSES}, gputune predicts a number "
        f"(regression). If they are classes, set {option('task', 'classification')}."
    )


def _are_classes(values: np.ndarray) -> bool:
    if values.dtype.kind in "bU":
        return True
    if not _are_whole(values):
        return False
    n_distinct = len(np.unique(values))
    return n_distinct <= MAX_CLASSES and n_distinct < len(values)


def _are_whole(values: np.ndarray) -> bool:
    return values.dtype.kind != "f" or bool((values == np.rint(values)).all())


def _check_numbers(values: np.ndarray, task: str | None, name: str) -> None:
    if values.dtype.kind == "U":
        texts = values.ravel().tolist()
        example = next((text for text in texts if not is_number(text)), texts[0])
        raise InputError(
            option("task", task),
            f"needs numbers in {name}",
            got=Verbatim(f"text such as {example!r:.100}"),
            remedy="Convert it.",
        )


MissingTarget = Literal["error", "drop"]

_REMEDY = f"Fill it, or set {option('missing_target', 'drop')} to leave those rows out."


def rows_with_target(
    y: object,
    name: str,
    missing_target: MissingTarget,
    place: Callable[[int], str],
    remark: str = "",
) -> np.ndarray | None:
    """Return the positions of the rows that have a target, or None if no target is missing.

    Args:
        y: targets (n,) or (n, ...), as ``tune`` takes them.
        name: the target's name in errors.
        missing_target: "drop", or "error" to refuse missing targets.
        place: returns the place of a row as text, for errors.
        remark: a remark on text of the target that is read as a missing value, for errors, or "".

    Raises:
        InputError: a target is missing and ``missing_target`` is "error", or every target is
            missing.
    """
    missing = _missing_rows(target_array(y, name))
    if not missing.any():
        return None
    if missing_target == "error" or missing.all():
        remedy = f"{remark}. {_REMEDY}" if remark else _REMEDY
        refuse_missing(np.where(missing, np.nan, 0.0), name, remedy, place)
    return np.flatnonzero(~missing)


def select_targets(y: Any, positions: np.ndarray, *, is_column: bool) -> np.ndarray | Tensor:
    """Return the targets at ``positions``, which are the rows that have a target.

    ``is_column`` means that y is a column of a table. A column with missing values holds floats, so
    its whole numbers become integers again.
    """
    if isinstance(y, Tensor):
        selected: Tensor = y[positions]
        return selected
    values: np.ndarray = target_array(y, "y")[positions]
    if not is_column or values.dtype.kind != "f":
        return values
    # Below 2**53, floats hold integers exactly.
    are_whole = (values == np.rint(values)) & (abs(values) < 2**53)
    return values.astype(np.int64) if are_whole.all() else values


def check_row_options(n_given: int, cv: object, sample_weight: object) -> None:
    """Raise InputError for options that are invalid once rows with missing targets are dropped.

    Folds as row positions are invalid, because the positions change. Sample weights must have the
    length ``n_given``, as X before the rows were dropped.
    """
    if not isinstance(cv, int | np.integer | str) and not hasattr(cv, "split"):
        raise InputError(
            "cv",
            f"holds row positions, but {option('missing_target', 'drop')} changes the positions",
            remedy="Leave the rows without a target out of X and y yourself, or pass a number of "
            "folds or a splitter.",
        )
    if isinstance(sample_weight, Sized) and len(sample_weight) != n_given:
        raise InputError(
            "sample_weight",
            f"must have one number per row, shape ({n_given},)",
            got=Verbatim(f"{len(sample_weight)} numbers"),
        )


def select_values(values: Any, positions: np.ndarray) -> Any:
    """Return the values, such as groups or weights, of the rows at ``positions``. None stays
    None."""
    if values is None:
        return None
    return (values if isinstance(values, Tensor) else np.asarray(values))[positions]


def dropped_words(n_dropped: int, name: str) -> str:
    """Return a remark such as "2 rows without a value of 'price' were left out"."""
    verb = "was" if n_dropped == 1 else "were"
    return f"{count(n_dropped, 'row')} without a value of {name!r} {verb} left out"


def _missing_rows(values: np.ndarray) -> np.ndarray:
    """Return a mask (n,) of the rows of values (n, ...) that have a missing value."""
    if values.size == 0 or values.ndim == 0 or values.dtype.kind in "biuU":
        return np.zeros(values.shape[:1], dtype=bool)
    rows = values.reshape(len(values), -1)
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(rows).any(1))
    return np.array([any(map(is_missing, row)) for row in rows], dtype=bool)


# A text target is numbers with wrong values if fewer of its different values are not numbers.
_WRONG_SHARE = 0.1


def refuse_identifier(target: Target) -> None:
    """Raise InputError for a text target that looks like an identifier, or like numbers with a few
    wrong values.

    The target looks like an identifier if it has more than ``MAX_CLASSES`` different values and
    more than half as many values as rows.
    """
    assert target.classes is not None
    n_classes = len(target.classes)
    is_text = target.classes.dtype.kind == "U"
    if is_text and n_classes > MAX_CLASSES and 2 * n_classes > len(target):
        words = [text for text in target.classes.tolist() if not is_number(text)]
        if 0 < len(words) < _WRONG_SHARE * n_classes:
            raise InputError(
                None,
                f"The target {target.name!r} has numbers, but also {count(len(words), 'other value')} "
                f"such as {words[0]!r}",
                remedy="Correct these values, or leave out their rows.",
            )
        raise InputError(
            None,
            f"The target {target.name!r} looks like an identifier: it has {n_classes} different "
            f"values in {len(target)} rows",
            remedy="Choose a different target column, or leave out the rows of rare classes.",
        )
