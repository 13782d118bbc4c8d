"""Refuse inputs with rows of different lengths, which cannot form one array.

The error shows how to pad the rows. Nested tensors have their own error message. Lists and object
arrays share another.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from gputune.errors import InputError

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
