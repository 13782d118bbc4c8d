"""Read the true targets of rows as codes of a model's classes or as numbers.

Numeric targets are read in the same way as in a search.
"""

import numpy as np

from gputune.annotations import IntArray
from gputune.data.kinds import text_of
from gputune.data.source import read_source
from gputune.data.table import as_table, quoted
from gputune.data.target import check_target, refuse_missing, target_array
from gputune.errors import InputError
from gputune.types import Task
from gputune.wording import Verbatim, option


def targets_of(X: object, y: object, *, module: bool) -> object:
    """Return the targets y. If y is text, it names their column or array in X, as in ``tune``.

    ``module`` is True if X has arrays for a module, and not a table.
    """
    return read_source(X, y, module=module).y if isinstance(y, str) else y


def _without_column_axis(labels: np.ndarray) -> np.ndarray:
    """Return labels (n, 1) as labels (n,), and labels of any other shape unchanged."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def class_codes(classes: np.ndarray, y: object) -> tuple[list[object], IntArray]:
    """Return the classes of a model and y as class codes, (n,).

    Classes that occur only in y follow the classes of the model.

    Raises:
        InputError: y is neither (n,) nor (n, 1).
    """
    array = _without_column_axis(np.asarray(y))
    if array.ndim != 1:
        raise InputError(
            None,
            f"the true labels have the shape {array.shape}, but the model predicts one class for "
            "each row",
            remedy="Give one class for each row.",
        )
    known = classes.tolist()
    labels = array.tolist()
    if classes.dtype.kind == "U":
        labels = list(map(text_of, labels))
    else:  # one text among numbers makes the whole column text
        of_text = {text_of(label): label for label in known}
        labels = [
            of_text.get(label, label) if isinstance(label, str) else label for label in labels
        ]
    # by text, because labels of different types cannot be compared
    known += sorted({*labels} - {*known}, key=str)
    codes = {label: code for code, label in enumerate(known)}
    return known, np.array([codes[label] for label in labels], dtype=np.int64)


def refuse_unknown(classes: list[object], codes: IntArray, K: int, name: str) -> None:
    """Raise InputError if no label is one of a model's K classes, the first K of ``classes``."""
    if (codes >= K).all():
        raise InputError(
            None,
            f"{name} has no class of the model: it holds {quoted(map(str, classes[K:]))}, but the "
            f"model's classes are {quoted(map(str, classes[:K]))}",
            remedy="Write them as in the training data.",
        )


def checked_codes(classes: np.ndarray, y: object, rows: int) -> IntArray:
    """Return labels y as class codes, (n,), with one code per row.

    Raises:
        InputError: the labels cannot be scored.
    """
    labels = _without_column_axis(target_array(y, "y"))
    if labels.shape != (rows,):
        shape = Verbatim(f"shape {labels.shape} and {rows} rows")
        raise InputError("y", f"must have one label per row of {option('X')}", got=shape)
    refuse_missing(labels, "y", "Leave those rows out.")
    known, codes = class_codes(classes, labels)
    refuse_unknown(known, codes, len(classes), "y")
    return codes


def checked_numbers(y: object, task: Task, rows: int) -> np.ndarray:
    """Return the numeric targets y, (n,) or (n, K). Text is accepted if it spells numbers.

    Raises:
        InputError: for the same reasons as in ``tune``.
    """
    values = target_array(y, "y")
    is_object_column = values.ndim == 1 and values.dtype.kind in "OU"
    if is_object_column and any(isinstance(value, str) for value in values):
        table = as_table(values[:, None])
        y = table.columns[0] if table.kinds[0] == "number" else y
    return check_target(y, task=task, n_rows=rows).values
