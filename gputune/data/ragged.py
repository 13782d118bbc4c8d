"""Refuse inputs with rows of different lengths, and lists of images, texts or arrays.

The error shows how to pad, stack or convert the rows. Nested tensors have their own error message
about lengths. Lists and object arrays share another.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from gputune.ground.errors import InputError, Verbatim

_Shape = tuple[int, ...]
_FEW_INPUTS = 8


def refuse_ragged(value: object, label: str) -> None:
    """Raise InputError if the rows of X, y or another argument have different lengths.

    Rows of different lengths come as a nested tensor, a list, or an object array. The function
    checks each input of a tuple or a dict.

    Args:
        value: the object that the user passed. An object without such rows raises no error.
        label: the name of the argument in the error.
    """
    if isinstance(value, tuple | Mapping):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            if isinstance(part, Tensor | np.ndarray | list):
                refuse_ragged(part, f"{label}[{name!r}]")
        return
    if isinstance(value, Tensor):
        if value.is_nested:
            raise InputError(
                label,
                "is a nested tensor, whose rows have different lengths",
                remedy="Pad the rows to one length with torch.nested.to_padded_tensor, and pass the "
                "padded tensor.",
            )
        return
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1:
        value = list(value)
    if not isinstance(value, list):
        return
    if len(value) <= _FEW_INPUTS and any(len(shape) > 1 for shape in _shapes(value)):
        return  # inputs of a module in a list, which another error explains
    first: _Shape | None = None
    for row, shape in enumerate(_shapes(value)):
        if first is None:
            first = shape
        if shape != first:
            raise InputError(
                label,
                f"has rows of different shapes: row 0 has {first}, row {row} has {shape}",
                remedy=pad_remedy(label),
            )


TOKENIZED = ("input_ids", "attention_mask", "token_type_ids")
"""The entries that a tokenizer of transformers returns."""

PAD_TOKENS = 'Pad the rows: tokenizer(texts, padding=True, return_tensors="pt").'


def pad_remedy(label: str) -> str:
    """Return advice for an error message: how to pad rows of different lengths to one tensor."""
    if any(f"[{name!r}]" in label for name in TOKENIZED):
        return PAD_TOKENS
    rows = f"[torch.as_tensor(row) for row in {label}]"
    pad = f"torch.nn.utils.rnn.pad_sequence({rows}, batch_first=True)"
    return (
        f"Pad or crop the rows to one shape, for example {label} = {pad}. In a table, fill the "
        "shorter rows with None."
    )


def _shapes(rows: list[object]) -> Iterator[_Shape]:
    """Yield the shape of each row: its length or shape if the row is a list, array or tensor, else
    ()."""
    for row in rows:
        if isinstance(row, Tensor | np.ndarray):
            yield tuple(row.shape)
        elif isinstance(row, list | tuple):
            yield (len(row),)
        else:
            yield ()


def refuse_lists(X: object) -> None:
    """Raise InputError for lists of images, texts or arrays, and show how to convert them."""
    if is_image(X):
        raise InputError("X", "is one PIL image", remedy=f"Pass all images: {_STACK_IMAGES}")
    if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1:
        X = list(X)
    parts: Mapping[Any, object] = {}
    if isinstance(X, tuple):
        parts = dict(enumerate(X))
    elif isinstance(X, Mapping):
        parts = X
    # A few parts, some of which have rows with axes, are inputs. Otherwise the parts are rows or
    # columns of a table.
    if len(parts) <= 8 and any(len(_shape_of(part)) > 1 for part in parts.values()):
        for key, part in parts.items():
            if not isinstance(part, Tensor | np.ndarray):
                raise InputError(
                    f"X[{key!r}]",
                    "must be an array or a tensor",
                    got=Verbatim(f"a {type(part).__name__}"),
                    remedy=PAD_TOKENS if key in TOKENIZED else f"Pass numpy.asarray(X[{key!r}]).",
                )
    if not isinstance(X, list | tuple) or not X:
        return
    container = f"is a {type(X).__name__} of {len(X)}"
    if any(isinstance(item, str) for item in X):
        raise InputError(
            "X",
            f"{container} texts",
            remedy="Turn words into numbers, and pass a tensor of integers (rows, length), padded "
            "to one length.",
        )
    if any(map(is_image, X)):
        raise InputError("X", f"{container} PIL images", remedy=f"Pass {_STACK_IMAGES}")
    shapes = list(map(_shape_of, X))
    if max(map(len, shapes)) < 2:
        return  # rows of a table
    different = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if different is None:
        stack = "torch.stack(X)" if isinstance(X[0], Tensor) else "numpy.stack(X)"
        rule = f"{container} arrays of shape {shapes[0]}"
        remedy = f"Pass one array, {stack}."
    else:
        rule = (
            f"{container} arrays of different shapes: X[0] has {shapes[0]}, X[{different}] has "
            f"{shapes[different]}"
        )
        remedy = "Pad or crop the arrays to one shape and pass numpy.stack(X)."
    if len(X) < 9:
        remedy = f"{remedy} If the arrays are the inputs of the module, pass a tuple of arrays."
    raise InputError("X", rule, remedy=remedy)


def is_image(value: object) -> bool:
    """Return True if a value is a PIL image. The check does not import PIL."""
    return type(value).__module__.partition(".")[0] == "PIL" and hasattr(value, "getpixel")


_STACK_IMAGES = (
    "numpy.stack([numpy.asarray(image) for image in X]), with images of one size. The result has "
    "its channels last. For torch's layers, move them first with .transpose(0, 3, 1, 2)."
)


def _shape_of(item: object) -> tuple[int, ...]:
    if isinstance(item, list | tuple):
        row_shape = _shape_of(item[0]) if item else ()
        return (len(item), *row_shape)
    return tuple(item.shape) if isinstance(item, Tensor | np.ndarray) else ()
