"""The learning curves of all trials, side by side where somebody asks for them; what the best does on its folds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gputune.errors import InputError
from gputune.study.rows import Curve
from gputune.text import size_words

Value = TypeVar("Value")

_LARGE, _PADDING = 2**30, 64
"""Bytes that the curves of all trials may take side by side in any case, and for each byte of them."""


class Lazy(Generic[Value]):
    """A field of a study: a value, or a function that makes it when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, study: object, owner: type | None = None) -> Value:
        if study is None:
            raise AttributeError(self.name)  # by which a dataclass knows that there is no default
        return cast(Value, self.value(study, self.name))

    @staticmethod
    def value(study: object, name: str) -> object:
        """Return the field of that name, which is made now where it is a function."""
        value = vars(study)[name]
        if callable(value):
            value = vars(study)[name] = value()
        return value

    def __set__(self, study: object, value: object) -> None:
        vars(study)[self.name] = value


class Curves(Lazy[Curve]):
    """The field ``curves``. Of several metrics the study keeps all, and the field is those by the one that ranks."""

    def __get__(self, study: object, owner: type | None = None) -> Curve:
        curves = super().__get__(study, owner)
        return curves if curves.ndim == 3 else curves[..., 0]

    @staticmethod
    def of_all(study: object) -> Curve:
        """Return the curves (C, epochs, F, M) of a study by all metrics; (C, epochs, F) where there is one."""
        return cast(Curve, Lazy.value(study, "curves"))


def stack_curves(rows: Sequence[Curve | None]) -> Curve:
    """Curves of unlike length as one array (C, epochs, F) or (C, epochs, F, M), NaN beyond their end.

    Raises InputError where it is huge.
    """
    known = [row for row in rows if row is not None]
    epochs, folds, *metrics = map(int, np.max([row.shape for row in known], axis=0)) if known else (0, 0)
    size = sum(row.nbytes for row in known)
    whole = 8 * len(rows) * epochs * folds * math.prod(metrics)
    if whole > max(_LARGE, _PADDING * size):
        raise InputError(
            f"the learning curves of {len(rows)} trials, {epochs} epochs and {folds} folds take {size_words(whole)} "
            f"side by side, and hold {size_words(size)}, since few are as long: a page or plot of them cannot be made."
        )
    curves = np.full((len(rows), epochs, folds, *metrics), np.nan)
    for place, row in zip(curves, rows):
        if row is not None:
            place[: len(row), : row.shape[1]] = row
    curves.flags.writeable = False
    return curves


@dataclass(frozen=True, eq=False)
class FoldReport:
    """Of one trial; what was not asked for is empty.

    confusion   (K, K) rows of the true class (first axis) that are predicted as each class
    columns     names of the columns of X, most important first
    drops       (n,) how much worse the score is, on average, when one column is shuffled among the rows of a fold
    errors      (n,) standard deviation of that over shuffles and folds
    """

    trial: int
    confusion: NDArray[np.int64]
    columns: tuple[str, ...]
    drops: NDArray[np.float64]
    errors: NDArray[np.float64]
