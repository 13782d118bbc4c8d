"""The weight of each row in the training loss: its sample weight times the weight of its class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from gputune.data.containers import refuse_ragged
from gputune.data.kinds import text_of
from gputune.data.target import Target
from gputune.ground.errors import InputError, Verbatim

ClassWeight = Literal["balanced"] | Mapping[Any, float] | None


@dataclass(frozen=True, eq=False)
class Weights:
    """The user's sample weights ``rows`` (n,) and class weights ``classes`` (K,), checked, float64.

    A field is None if all its weights are 1.

    With ``classes="balanced"`` all classes have the same total weight among the training rows of a
    fold. With ``of_target`` the mean and deviation of a numeric target are weighted too, and a
    class with zero weight counts as absent.
    """

    rows: np.ndarray | None
    classes: np.ndarray | Literal["balanced"] | None
    of_target: bool = False

    def for_fold(self, target: Target, train: np.ndarray) -> np.ndarray | None:
        """Return the weight (n,) of each row in the training loss of a fold, or None if all weights
        are 1.

        The weights are float64. Rows outside ``train`` have weights too.
        """
        weights = self.rows
        per_class = self.classes
        # n / (classes present * rows of the class). Source: scikit-learn's compute_class_weight.
        if isinstance(per_class, str):
            counts = np.bincount(
                target.values[train], None if weights is None else weights[train], target.n_outputs
            )
            is_present = counts > 0
            divisors = is_present.sum() * np.where(is_present, counts, 1)
            per_class = np.where(is_present, counts.sum() / divisors, 1.0)
        if per_class is not None:
            # (K,) -> (n,)
            weights = per_class[target.values] * (1.0 if weights is None else weights)
        if weights is None or (weights == 1.0).all():
            return None
        if weights[train].sum() <= 0:
            raise InputError(
                None,
                "The weights of the training rows of a fold add up to 0",
                remedy="Give some of these rows a positive weight.",
            )
        return weights


def check_weights(sample_weight: object, class_weight: ClassWeight, target: Target) -> Weights:
    """Check the user's sample weights and class weights, and return them.

    Classes that ``class_weight`` does not name have weight 1.
    """
    rows = None if sample_weight is None else _check_rows(sample_weight, target)
    classes = None if class_weight is None else _check_classes(class_weight, target)
    return Weights(rows, classes)


def class_weight_text(class_weight: ClassWeight, target: Target) -> str | None:
    """Return the text of class weights in a study file, or None without class weights.

    The text is "'balanced'", or a dict with the weight of each class in the order of the classes.
    Equal weights therefore have equal texts.
    """
    if class_weight is None:
        return None
    weights = _check_classes(class_weight, target)
    if target.classes is None or isinstance(weights, str):
        return repr(weights)
    return repr(dict(zip(target.classes.tolist(), weights.tolist())))


def _check_rows(sample_weight: object, target: Target) -> np.ndarray:
    refuse_ragged(sample_weight, "sample_weight")
    if isinstance(sample_weight, Tensor):
        sample_weight = sample_weight.double().numpy(force=True)
    try:
        weights = np.array(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("sample_weight", "must hold numbers", got=sample_weight) from error
    if weights.shape != (len(target),):
        raise InputError(
            "sample_weight",
            f"must have one number per row, shape ({len(target)},)",
            got=Verbatim(f"shape {weights.shape}"),
        )
    is_bad = ~(np.isfinite(weights) & (weights >= 0))
    if is_bad.any():
        row = int(is_bad.argmax())
        raise InputError(
            "sample_weight",
            "must be finite and not negative",
            got=Verbatim(f"{weights[row]} in row {row}"),
            remedy="Weight 0 removes a row only from the loss. To ignore a row completely, remove "
            "the row from the data.",
        )
    return weights


def _check_classes(class_weight: ClassWeight, target: Target) -> np.ndarray | Literal["balanced"]:
    if target.classes is None:
        raise InputError(
            "class_weight",
            f"is only for classes, but {target.name} holds numbers",
            got=class_weight,
            remedy="Leave it out.",
        )
    if class_weight == "balanced":
        return "balanced"
    if not isinstance(class_weight, Mapping):
        raise InputError(
            "class_weight",
            "must be None, 'balanced' or a dict from class to weight",
            got=class_weight,
        )
    classes = target.classes.tolist()
    weights = np.ones(len(classes))
    labels_by_text = {text_of(label): label for label in classes}  # the command line has only texts
    for name, weight in class_weight.items():
        label = labels_by_text.get(name, name) if isinstance(name, str) else name
        if label not in classes:
            rule = f"names the class {label!r}, but the classes of {target.name} are"
            raise InputError("class_weight", f"{rule} {', '.join(map(repr, classes[:8]))}")
        is_number = isinstance(weight, int | float | np.number)
        if not is_number or not np.isfinite(weight) or weight < 0:
            raise InputError(
                "class_weight",
                "must be finite and not negative",
                got=Verbatim(f"{weight!r} for the class {label!r}"),
            )
        weights[classes.index(label)] = weight
    return weights
