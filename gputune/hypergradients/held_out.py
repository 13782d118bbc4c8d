"""Where the loss on held-out rows has no slope: they have a class that the training rows lack."""

from collections.abc import Iterable
from typing import Any

from gputune.errors import InputError


def check_classes(fold: int, valid: Iterable[Any], train: Iterable[Any], *, weighed: bool = False) -> None:
    """Raise InputError where the validation rows of a fold have a class of which it trains on no row.

    ``valid`` and ``train`` are labels; ``weighed``: the latter are those of training rows with a weight above 0.
    """
    if lacking := set(valid) - set(train):
        weighing = " with sample_weight above 0" if weighed else ""
        raise InputError(
            f"cv: the validation rows of fold {fold} have class {sorted(lacking)[0]!r}, of which it has no "
            f"training row{weighing}: its log loss is infinite at every point of a descent. Use stratified folds, "
            "fewer of them, or leave the class out."
        )
