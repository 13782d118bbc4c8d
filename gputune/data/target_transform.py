"""Train on a transformed numeric target, such as its logarithm, and predict in original units.

gputune fits the transformation on the training rows of each fold, and inverts it in predictions.

Source: sklearn.compose.TransformedTargetRegressor. Its transformer reads columns (n, K) and must be
invertible. Departure: some predictions have no inverse, for example extreme values of a
PowerTransformer. gputune returns the inverse of the nearest training target for them instead of
NaN.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, cast, get_args

import numpy as np
import torch
from torch import Tensor

from gputune.ground.errors import InputError, InputWarning, option, per_interface, warn
from gputune.ground.text import did_you_mean
from gputune.ground.types import Json

TransformWord = Literal["log", "log1p"]
TRANSFORMS: tuple[TransformWord, ...] = get_args(TransformWord)
_CHOICES = per_interface("'log', 'log1p' or a scikit-learn transformer", "'log' or 'log1p'")


class Transformer(Protocol):
    """The methods of a scikit-learn transformer such as PowerTransformer, for n rows and K
    columns."""

    def fit(self, X: np.ndarray) -> Self: ...
    def transform(self, X: np.ndarray) -> np.ndarray: ...
    def inverse_transform(self, X: np.ndarray) -> np.ndarray: ...


TargetTransform = TransformWord | Transformer

_WORDS: Mapping[object, tuple[Callable[..., np.ndarray], Callable[[Tensor], Tensor], float]] = {
    "log": (np.log, torch.exp, 0.0),
    "log1p": (np.log1p, torch.expm1, -1.0),
}
"""Named transformations: the function, its inverse, and the bound above which the function is
defined."""


@dataclass(frozen=True)
class FittedTransform:
    """A target transformation that is ready to use: a name such as "log", or a fitted transformer.

    ``limits`` (2, K) has the smallest and the largest transformed training value of K columns. A
    named transformation needs no limits.
    """

    transform: TargetTransform
    limits: np.ndarray | None = None

    def forward(self, values: np.ndarray) -> np.ndarray:
        """Transform target values (n rows,) or (n, K columns), and return float64 values in the
        same shape."""
        if isinstance(self.transform, str):
            return _WORDS[self.transform][0](values)
        columns = np.asarray(self.transform.transform(values.reshape(len(values), -1)), np.float64)
        if columns.size != values.size or not np.isfinite(columns).all():
            raise ValueError(
                f"it turned values of shape {values.shape} into shape {columns.shape}, or into "
                "numbers that are not finite"
            )
        return columns.reshape(values.shape)

    def inverse(self, values: Tensor) -> Tensor:
        """Convert transformed values (..., K columns) back to the units of the target, float64.

        A transformer returns NaN for values that are not finite.
        """
        if isinstance(self.transform, str):
            return _WORDS[self.transform][1](values.double())
        assert self.limits is not None
        numbers = values.double().cpu().numpy().reshape(-1, values.shape[-1])
        finite = np.isfinite(numbers)
        with warnings.catch_warnings(action="ignore"):  # warnings about values without an inverse
            inverted = self.transform.inverse_transform(np.where(finite, numbers, self.limits[0]))
            if not np.isfinite(inverted).all():
                nearest = self.transform.inverse_transform(np.clip(numbers, *self.limits))
                inverted = np.where(np.isfinite(inverted), inverted, nearest)
        restored = torch.from_numpy(np.where(finite, inverted, np.nan))
        return restored.view(values.shape).to(values.device)

    def to_json(self) -> Json | str:
        """Return a JSON value for a model file: the name, or the transformer's class and fitted
        state.

        Raises:
            InputError: the transformer is not from sklearn.preprocessing.
        """
        try:
            if isinstance(self.transform, str):
                return self.transform
            return {"transformer": _plain(self.transform, fitted=True), "ends": self.limits}
        except TypeError as error:
            raise InputError(
                None,
                f"save() cannot write {option('target_transform', self.transform)}, because it "
                f"{error}",
                remedy=f"Choose {_CHOICES}, or use the model without saving it.",
            ) from None

    @staticmethod
    def from_json(value: Json | str) -> "FittedTransform":
        """Return the fitted target transformation from the JSON value that ``to_json`` wrote.

        Raises:
            ValueError: ``to_json`` cannot have written this value.
        """
        if isinstance(value, str):
            return FittedTransform(transform_from_json(value))
        limits = np.asarray(value["ends"], np.float64)
        if limits.ndim != 2 or len(limits) != 2:
            raise ValueError("its target_transform lacks the limits of its training values")
        fitted = FittedTransform(transform_from_json(value["transformer"]), limits)
        try:
            fitted.inverse(torch.from_numpy(limits))
            fitted.to_json()
        except Exception as error:  # a transformer in an odd state may raise anything
            raise ValueError(
                f"its target_transform does not work ({type(error).__name__}: {error})"
            ) from error
        return fitted


def fit_transform(transform: TargetTransform, values: np.ndarray) -> FittedTransform:
    """Fit a target transformation on the training values (n, ...) of a fold, and return it.

    Warns if the inverse transformation does not restore the values.

    Raises:
        InputError: the transformer raised an error.
    """
    if isinstance(transform, str):
        return FittedTransform(transform)
    from sklearn.base import clone

    transformer = cast(Transformer, clone(transform))
    try:
        transformer.fit(values.reshape(len(values), -1))
        transformed = FittedTransform(transformer).forward(values).reshape(len(values), -1)
        limits = np.stack([transformed.min(0), transformed.max(0)])
        fitted = FittedTransform(transformer, limits)
        restored = fitted.inverse(torch.from_numpy(transformed)).numpy().reshape(values.shape)
    except Exception as error:  # a transformer may raise anything
        raise InputError(
            option("target_transform", transform),
            f"raised {type(error).__name__} on the training rows of a fold: {error}",
            remedy=f"Choose a different transformer, or leave out {option('target_transform')}.",
        ) from error
    if not np.allclose(restored, values):
        warn(
            f"The inverse_transform of {option('target_transform', transform)} does not restore "
            "the target, so no model can predict the target well. Choose a different transformer.",
            InputWarning,
        )
    return fitted


def check_values(transform: TargetTransform, values: np.ndarray, name: str) -> None:
    """Raise InputError if a target value is too small for the logarithm "log" or "log1p"."""
    lowest = _WORDS[transform][2] if isinstance(transform, str) else -np.inf
    is_bad = values <= lowest
    if not is_bad.any():
        return
    if lowest == 0 and (values > -1).all():
        remedy = "Choose 'log1p' (for numbers above -1), or leave it out."
    else:
        remedy = per_interface("Choose a PowerTransformer, or leave it out.", "Leave it out.")
    raise InputError(
        option("target_transform", transform),
        f"needs numbers above {lowest:g} in {name}, but {is_bad.sum()} of {is_bad.size} are not "
        f"(the smallest is {values.min():g})",
        remedy=remedy,
    )


def check_transform(name: str, value: object) -> "TargetTransform | None":
    """Check a value of ``target_transform`` and return it: "log", "log1p", a transformer or None.

    Raises:
        InputError: ``value`` is anything else.
    """
    if value is None or (isinstance(value, str) and value in TRANSFORMS) or _is_transformer(value):
        return cast("TargetTransform | None", value)
    near = did_you_mean(value, TRANSFORMS) if isinstance(value, str) else ""
    with_inverse = per_interface(" with an inverse_transform, or None", "")
    raise InputError(name, f"must be {_CHOICES}{with_inverse}", got=value, remedy=near.strip())


def _is_transformer(value: object) -> bool:
    methods = ("fit", "transform", "inverse_transform")
    return not isinstance(value, type) and all(hasattr(value, method) for method in methods)


def transform_to_json(transform: TargetTransform | None) -> Json | str | None:
    """Return a target transformation, not fitted, as a JSON value for a study file.

    For an object that is not from sklearn.preprocessing, the value holds only the object's repr.
    """
    if transform is None or isinstance(transform, str):
        return transform
    try:
        return _plain(transform, fitted=False)
    except TypeError:
        return {"object": repr(transform)}


def is_known(recorded: Json | str | None) -> bool:
    """Return True if gputune can create the target transformation that a study file records."""
    return not isinstance(recorded, Mapping) or "object" not in recorded


def transform_from_json(value: Json | str) -> TargetTransform:
    """Return the target transformation recorded in a study file (not fitted) or in a model file
    (fitted).

    Raises:
        ValueError: the value does not describe a transformation.
    """
    if isinstance(value, str) and value in TRANSFORMS:
        return value
    transformer = _from_plain(value)
    if not _is_transformer(transformer):
        raise ValueError(f"its target_transform is not a transformation: {value!r:.60}")
    return cast(Transformer, transformer)


def _plain(value: object, *, fitted: bool) -> Json:
    """Return a dict that describes an object of sklearn.preprocessing: its class and its
    parameters.

    With ``fitted``, the dict has the object's fitted state instead of the parameters.

    Raises:
        TypeError: the object is not from sklearn.preprocessing.
    """
    import sklearn.preprocessing

    kind = type(value)
    if getattr(sklearn.preprocessing, kind.__name__, None) is not kind:
        raise TypeError(f"is a {kind.__name__}, not a transformer of sklearn.preprocessing")
    assert isinstance(value, sklearn.base.BaseEstimator)  # all of them are
    parts: dict[str, object] = value.__getstate__() if fitted else value.get_params(deep=False)
    plain = {name: _part(part) for name, part in parts.items()}
    return {"class": kind.__name__, "state" if fitted else "params": plain}


def _part(value: object) -> object:
    if value is None or isinstance(
        value, bool | int | float | str | tuple | np.generic | np.ndarray
    ):
        return value
    if isinstance(value, dict):
        return {"dict": {name: _part(part) for name, part in value.items()}}
    if isinstance(value, np.ufunc):
        return {"ufunc": value.__name__}
    return _plain(value, fitted=hasattr(value, "n_features_in_"))


def _from_plain(value: object) -> object:
    """Create the object that a plain value describes, such as a fitted PowerTransformer.

    A dict describes an object of scikit-learn, a NumPy ufunc, or another dict. Other values are
    returned unchanged. For safety, the function creates only objects of sklearn.preprocessing, and
    returns only ufuncs of NumPy.
    """
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {name: _from_plain(part) for name, part in value["dict"].items()}
    if "ufunc" in value:
        # vars() skips the __getattr__ of the package, which imports modules for some names.
        ufunc = vars(np).get(str(value["ufunc"]))
        if isinstance(ufunc, np.ufunc):
            return ufunc
        raise ValueError(f"NumPy has no ufunc {value['ufunc']!r}")
    import sklearn.preprocessing

    name = str(value["class"])
    kind = vars(sklearn.preprocessing)[name] if name in sklearn.preprocessing.__all__ else None
    if not isinstance(kind, type):
        raise ValueError(f"sklearn.preprocessing has no {name!r}")
    is_fitted = "params" not in value
    plain = value["state" if is_fitted else "params"]
    parts = {name: _from_plain(part) for name, part in plain.items()}
    if not is_fitted:
        return kind(**parts)
    transformer: Any = object.__new__(kind)
    transformer.__setstate__(parts)
    return transformer
