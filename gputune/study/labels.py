"""The right answers of rows that a model predicts, as codes of its classes or as numbers.

Numbers are read in the same way as by a search.
"""

import numpy as np
from numpy.typing import NDArray

from gputune.data.kinds import text_of
from gputune.data.table import as_table, quoted
from gputune.data.target import check_target, refuse_missing, target_array
from gputune.errors import InputError
from gputune.types import Task


def _without_column_axis(labels: np.ndarray) -> np.ndarray:
    """Return labels (n, 1) as labels (n,), and labels of any other shape as they are."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def class_codes(classes: np.ndarray, y: object) -> tuple[list[object], NDArray[np.int64]]:
    """Return the classes of a model and the codes of y, (n,).

    Classes that only y has follow the classes of the model.

    Raises:
        InputError: y is neither (n,) nor (n, 1).
    """
    answers = _without_column_axis(np.asarray(y))
    if answers.ndim != 1:
        raise InputError(
            f"the right answers have the shape {answers.shape}, and the model predicts one class "
            "for each row. Give one class for each row."
        )
    known = classes.tolist()
    labels = answers.tolist()
    if classes.dtype.kind == "U":
        labels = list(map(text_of, labels))
    else:  # one text among numbers makes the whole column text
        of_text = {text_of(label): label for label in known}
        labels = [
            of_text.get(label, label) if isinstance(label, str) else label for label in labels
        ]
    # by text, because labels of different types cannot be compared
    known += sorted({*labels} - {*known}, key=str)
    position = {label: code for code, label in enumerate(known)}
    return known, np.array([position[label] for label in labels], dtype=np.int64)


def refuse_unknown(classes: list[object], codes: NDArray[np.int64], K: int, name: str) -> None:
    """Raise InputError if every code is beyond the K classes of a model.

    These are the first K of ``classes``.
    """
    if (codes >= K).all():
        raise InputError(
            f"{name} has no class that the model knows: it holds {quoted(map(str, classes[K:]))}, "
            f"and the model's classes are {quoted(map(str, classes[:K]))}; write them as the "
            "model has them."
        )


def checked_codes(classes: np.ndarray, y: object, rows: int) -> NDArray[np.int64]:
    """Return the codes of labels y, (n,), one per row.

    Raises:
        InputError: the labels cannot be scored.
    """
    labels = _without_column_axis(target_array(y, "y"))
    if labels.shape != (rows,):
        raise InputError(
            f"y must have one label a row of X, got shape {labels.shape} and {rows} rows."
        )
    refuse_missing(labels, "y", "Leave those rows out.")
    known, codes = class_codes(classes, labels)
    refuse_unknown(known, codes, len(classes), "y")
    return codes


def checked_numbers(y: object, task: Task, rows: int) -> np.ndarray:
    """Return numbers y, (n,) or (n, K). Text is accepted if it reads as numbers.

    Raises:
        InputError: for the same reasons as in ``tune``.
    """
    values = target_array(y, "y")
    if (
        values.ndim == 1
        and values.dtype.kind in "OU"
        and any(isinstance(value, str) for value in values)
    ):
        table = as_table(values[:, None])
        y = table.columns[0] if table.kinds[0] == "number" else y
    return check_target(y, task=task, n_rows=rows).values
