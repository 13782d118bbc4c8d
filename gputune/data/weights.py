"""The weight of each row in the training loss: its sample weight times the weight of its class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from gputune.data.kinds import text_of
from gputune.data.ragged import refuse_ragged
from gputune.data.target import Target
from gputune.errors import InputError

ClassWeight = Literal["balanced"] | Mapping[Any, float] | None


@dataclass(frozen=True, eq=False)
class Weights:
    """Checked weights: ``rows`` (n,) and ``classes`` (K,), float64, each None if all are 1.

    With ``classes="balanced"`` all classes have the same total weight among the training rows of a
    fold. With ``of_target`` the weights also count when a target is standardized, and classes with
    zero weight are left out.
    """

    rows: np.ndarray | None
    classes: np.ndarray | Literal["balanced"] | None
    of_target: bool = False

    def for_fold(self, target: Target, train: np.ndarray) -> np.ndarray | None:
        """Return the weights of all rows in a fold, (n,) float64, or None if all are 1.

        Rows outside ``train`` have weights too.
        """
        weights = self.rows
        per_class = self.classes
        # n / (classes present * rows of the class). Source: scikit-learn's compute_class_weight.
        if isinstance(per_class, str):
            counts = np.bincount(
                target.values[train], None if weights is None else weights[train], target.n_outputs
            )
            per_class = np.where(
                counts > 0,
                counts.sum() / ((counts > 0).sum() * np.where(counts > 0, counts, 1)),
                1.0,
            )
        if per_class is not None:
            # (K,) -> (n,)
            weights = per_class[target.values] * (1.0 if weights is None else weights)
        if weights is None or (weights == 1.0).all():
            return None
        if weights[train].sum() <= 0:
            raise InputError(
                "the weights of a fold's training rows add up to 0; give some of them a positive "
                "weight."
            )
        return weights


def check_weights(sample_weight: object, class_weight: ClassWeight, target: Target) -> Weights:
    """Return the checked weights of a user. Classes that ``class_weight`` does not name weigh 1."""
    rows = None if sample_weight is None else _check_rows(sample_weight, target)
    return Weights(rows, None if class_weight is None else _check_classes(class_weight, target))


def _check_rows(sample_weight: object, target: Target) -> np.ndarray:
    refuse_ragged(sample_weight, "sample_weight")
    if isinstance(sample_weight, Tensor):
        sample_weight = sample_weight.double().numpy(force=True)
    try:
        weights = np.array(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"sample_weight must hold one number a row, got {sample_weight!r:.60}."
        ) from error
    if weights.shape != (len(target),):
        got = f"got shape {weights.shape}"
        raise InputError(
            f"sample_weight must have one number a row, shape ({len(target)},), {got}."
        )
    if (bad := ~(np.isfinite(weights) & (weights >= 0))).any():
        raise InputError(
            f"sample_weight must be finite and not negative, got {weights[bad][0]} in row "
            f"{int(bad.argmax())}; weight 0 takes a row out of the loss (leave it out of the data "
            "to ignore it in all else)."
        )
    return weights


def _check_classes(class_weight: ClassWeight, target: Target) -> np.ndarray | Literal["balanced"]:
    if target.classes is None:
        got = f"got class_weight={class_weight!r} for a regression; leave it out"
        raise InputError(f"class_weight needs classes, {got}.")
    if class_weight == "balanced":
        return "balanced"
    if not isinstance(class_weight, Mapping):
        raise InputError(
            "class_weight must be None, 'balanced' or a dict from class to weight, got "
            f"{class_weight!r}."
        )
    classes = target.classes.tolist()
    weights = np.ones(len(classes))
    texts = {text_of(one): one for one in classes}  # the command line has only texts
    for name, weight in class_weight.items():
        label = texts.get(name, name) if isinstance(name, str) else name
        if label not in classes:
            known = ", ".join(map(repr, classes[:8]))
            raise InputError(
                f"class_weight has the class {label!r}, which {target.name} has not: {known}."
            )
        if not isinstance(weight, int | float | np.number) or not (
            np.isfinite(weight) and weight >= 0
        ):
            raise InputError(
                f"class_weight must be finite and not negative, got {weight!r} for the class "
                f"{label!r}."
            )
        weights[classes.index(label)] = weight
    return weights
