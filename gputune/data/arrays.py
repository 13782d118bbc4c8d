"""Inputs of a module that are not tables: images, sequences, token ids, or several inputs at once.

gputune leaves the inputs unchanged or scales each channel. gputune does not copy the inputs. It
reads a row of a memory-mapped array from the file only when it needs that row.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gputune.data.containers import refuse_ragged
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.types import TENSOR_NUMBERS, Json

_BLOCK = 1 << 21  # numbers per block when all values are checked or summed
# torch has few operations for these integer types, so they become wider ones.
_TAKEN_AS = {torch.uint16: torch.int32, torch.uint32: torch.int64}


@dataclass(frozen=True, eq=False)
class Arrays:
    """The inputs of a module that are not tables, as tensors ``parts`` of shape (N, ...).

    The module receives the tensors in order, or as the keyword arguments ``names``. ``places`` (n,)
    holds the positions of the selected rows, or None if all rows are selected. Selecting rows
    copies no data. ``gathered`` copies the selected rows.
    """

    parts: tuple[Tensor, ...]
    names: tuple[str, ...] | None = None
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.parts[0] if self.places is None else self.places)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the module's inputs in error messages, such as X['image']."""
        return input_labels(len(self.parts), self.names)

    def select(self, rows: np.ndarray) -> "Arrays":
        """Return the inputs with only the selected rows, without copying data."""
        positions = np.asarray(rows, dtype=np.int64)
        return replace(self, places=positions if self.places is None else self.places[positions])

    def gathered(self) -> tuple[Tensor, ...]:
        """Copy the selected rows of all inputs, and return one tensor (n, ...) per input."""
        return tuple(self._rows(x, slice(None)) for x in self.parts)

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        if self.places is None:
            return x[rows]
        return x.index_select(0, torch.from_numpy(self.places[rows]).to(x.device))

    def as_given(self) -> object:
        """Return the selected rows as the NumPy X of a custom scorer: an array, a tuple, or a dict
        of arrays."""
        arrays = tuple(x.cpu().numpy() for x in self.gathered())
        if self.names is not None:
            return dict(zip(self.names, arrays))
        return arrays if len(arrays) > 1 else arrays[0]

    def blocks(self, part: int) -> Iterator[tuple[int, Tensor]]:
        """Yield one input's selected rows in blocks, with the position of each block's first
        row."""
        x = self.parts[part]
        rows = max(1, _BLOCK // max(1, x[0].numel()))
        for start in range(0, len(self), rows):
            yield start, self._rows(x, slice(start, start + rows))


def input_labels(number: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names that messages use for ``number`` inputs of a module: X, X[0] or
    X['image']."""
    if number == 1 and names is None:
        return ("X",)
    return tuple(f"X[{name!r}]" for name in names or range(number))


def as_arrays(X: object) -> Arrays | None:
    """Return X as checked inputs of a module, or None if X is a table.

    X counts as inputs of a module if it is

    - an array or tensor with at least three axes,
    - a tensor of integers with two axes, or
    - a tuple or dict of arrays and tensors.

    A table is a data frame, or has two axes and holds floats.
    """
    if isinstance(X, Mapping | tuple):
        names = tuple(map(str, X)) if isinstance(X, Mapping) else None
        values = X if isinstance(X, tuple) else tuple(X.values())
        are_arrays = all(isinstance(value, Tensor | np.ndarray) for value in values)
        return _check_arrays(values, names) if are_arrays else None
    if not isinstance(X, Tensor | np.ndarray) or np.ma.isMaskedArray(X):
        return None
    is_float = isinstance(X, np.ndarray) or X.is_floating_point() or X.is_complex()
    return _check_arrays((X,)) if X.ndim > 2 or (X.ndim == 2 and not is_float) else None


def _check_arrays(
    values: Sequence[np.ndarray | Tensor], names: tuple[str, ...] | None = None
) -> Arrays:
    if not values:
        raise InputError("X", "is empty", remedy="Pass at least one array or tensor of rows.")
    labels = input_labels(len(values), names)
    arrays = Arrays(tuple(map(_tensor, values, labels)), names)
    lengths = list(map(len, arrays.parts))
    if len(set(lengths)) > 1:
        got = ", ".join(f"{length} in {label}" for label, length in zip(labels, lengths))
        raise InputError("X", "must have the same number of rows in all inputs", got=Verbatim(got))
    for number, label in enumerate(labels):
        if not arrays.parts[number].is_floating_point():
            continue
        for start, block in arrays.blocks(number):
            is_bad = ~block.isfinite().reshape(len(block), -1).all(1)
            if is_bad.any():
                row = start + int(is_bad.int().argmax())
                raise InputError(
                    label,
                    "must be finite",
                    got=Verbatim(f"NaN or an infinite value in row {row}"),
                    remedy="Replace the value, or leave that row out.",
                )
    return arrays


_REMEDIES = {
    "O": "If the rows have different shapes, pad or crop the rows to one shape. Then use numpy.stack.",
    **dict.fromkeys(
        "SUT", "Replace each text by an integer, for example its position in a vocabulary."
    ),
}
"""Advice on how to make a NumPy array numeric, keyed by the kind of its dtype."""


def _tensor(value: np.ndarray | Tensor, label: str) -> Tensor:
    """Check an array or a tensor, and return it as a tensor without copying its memory.

    Values that torch cannot represent, such as long double, are copied.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise InputError(
                label,
                "must hold numbers or booleans",
                got=Verbatim(value.dtype),
                remedy=_REMEDIES.get(value.dtype.kind, "Convert it."),
            )
        # torch has no long double, no foreign byte order and no negative strides.
        dtype = np.float64 if value.itemsize > 8 else value.dtype.newbyteorder("=")
        native = value.astype(dtype, copy=False)
        if min(native.strides, default=0) < 0:
            native = np.ascontiguousarray(native)
        # torch warns about read-only memory, such as a mapped file. gputune never writes to it, but
        # torch has no option to say so.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            value = torch.from_numpy(native)
    refuse_kind(value, label)
    if value.dim() == 0 or 0 in value.shape:
        raise InputError(
            label,
            "must have at least one row, and no axis of length 0",
            got=Verbatim(f"shape {tuple(value.shape)}"),
        )
    return value.detach().to(_TAKEN_AS.get(value.dtype, value.dtype))


def refuse_kind(value: Tensor, label: str) -> None:
    """Raise InputError unless a tensor is dense, real, not quantized and in memory.

    Floats must have at least 16 bits.
    """
    refuse_ragged(value, label)
    if value.layout is not torch.strided:
        raise InputError(
            label,
            "is a sparse tensor, but gputune supports only dense input",
            remedy=f"Pass {label}.to_dense().",
        )
    if value.is_meta:
        raise InputError(
            label,
            "is on the device 'meta', which holds no values",
            remedy="Pass a tensor with values.",
        )
    got = Verbatim(value.dtype)
    if value.is_complex():
        raise InputError(
            label,
            "must hold real numbers",
            got=got,
            remedy="Pass the real part and the imaginary part as two real numbers.",
        )
    if value.is_quantized:
        raise InputError(
            label,
            "must not be quantized",
            got=got,
            remedy=f"Pass {label}.dequantize() or {label}.int_repr().",
        )
    if value.is_floating_point() and value.dtype.itemsize < 2:
        raise InputError(
            label, "must hold floats of 16 bits or more", got=got, remedy=f"Pass {label}.half()."
        )


@dataclass(frozen=True)
class ArrayLayout:
    """The shapes, dtypes and names of a module's inputs, to check later inputs against.

    ``shapes`` are the shapes of one row. ``names`` is None if the inputs have no names.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(arrays: Arrays) -> "ArrayLayout":
        shapes = tuple(tuple(x.shape[1:]) for x in arrays.parts)
        dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in arrays.parts)
        return ArrayLayout(shapes, dtypes, arrays.names)

    def raw(self, X: object) -> Arrays:
        """Check new inputs X against the training inputs, and return them in the same order.

        Raises:
            InputError: names, shapes or kinds of numbers differ from the training data.
        """
        refuse_ragged(X, "X")
        arrays = X if isinstance(X, Arrays) else as_arrays(X)
        if arrays is None:
            try:
                array = X if isinstance(X, Tensor) else np.asarray(X)
            except ValueError as error:
                raise InputError(
                    "X", f"must be as in training, {self}", got=Verbatim(f"a {type(X).__name__}")
                ) from error
            arrays = _check_arrays((array,))
        if self.names is not None and arrays.names is not None:
            by_name = dict(zip(arrays.names, arrays.parts))
            for name in self.names:
                if name not in by_name:
                    raise InputError(
                        "X",
                        f"has no input {name!r}",
                        got=Verbatim(f"the inputs {', '.join(map(repr, arrays.names))}"),
                        remedy=f"The inputs in training were {', '.join(map(repr, self.names))}.",
                    )
            parts = tuple(by_name[name] for name in self.names)
            arrays = replace(arrays, parts=parts, names=self.names)
        layout = ArrayLayout.of(arrays)
        is_same = (layout.shapes, layout.names) == (self.shapes, self.names)
        # Floats of another precision are converted later, other numbers are not.
        are_floats = [getattr(torch, dtype).is_floating_point for dtype in self.dtypes]
        if not is_same or are_floats != [x.is_floating_point() for x in arrays.parts]:
            raise InputError(
                "X",
                f"must be as in training, {self}",
                got=Verbatim(layout),
                remedy=self._remedy_for_names(layout),
            )
        return arrays

    def _remedy_for_names(self, layout: "ArrayLayout") -> str:
        """Return advice for inputs that have no names, although the training inputs have names, or
        the reverse."""
        if self.names is not None and layout.names is None:
            names = ", ".join(f"{name!r}: ..." for name in self.names)
            return f"Pass a dict, {{{names}}}, because the module takes its inputs by name."
        if self.names is None and layout.names is not None:
            form = "a tuple of the arrays" if len(self.shapes) > 1 else "the array itself"
            return f"Pass {form} instead of a dict."
        return ""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the module's inputs in messages and files. The default is input0, input1,
        ..."""
        return self.names or tuple(f"input{i}" for i in range(len(self.shapes)))

    @property
    def n_features(self) -> int:
        """The number of input features for which gputune builds a module.

        The number is the size of the first input's last axis, or 1 if a row is a single value.
        """
        return self.shapes[0][-1] if self.shapes[0] else 1

    @property
    def row_numbers(self) -> int:
        """The number of values in one row, summed over all inputs."""
        return sum(math.prod(shape) for shape in self.shapes)

    def in_words(self) -> str:
        """Return a description of the inputs for messages: the name, dtype and shape of each
        input."""
        names = self.names or [""] * len(self.shapes)
        parts = zip(names, self.dtypes, self.shapes)
        return " and ".join(
            f"{name} {dtype} {('rows', *row)}".replace("'", "").strip()
            for name, dtype, row in parts
        )

    __str__ = in_words

    def to_json(self) -> Json:
        names = None if self.names is None else list(self.names)
        return {"shapes": [*map(list, self.shapes)], "dtypes": list(self.dtypes), "names": names}

    @staticmethod
    def from_json(value: Json) -> "ArrayLayout":
        """Return the layout of the inputs from the JSON value that ``to_json`` wrote.

        Raises:
            ValueError: ``to_json`` cannot have written this value.
        """
        names = None if value["names"] is None else tuple(value["names"])
        layout = ArrayLayout(tuple(map(tuple, value["shapes"])), tuple(value["dtypes"]), names)
        sizes = list(chain(*layout.shapes))
        if not {int}.issuperset(map(type, sizes)) or min(sizes, default=1) < 1:
            raise ValueError("the shapes of its inputs are not positive integers")
        # vars() and not getattr, because getattr may import a part of torch.
        if not all(isinstance(vars(torch).get(dtype), torch.dtype) for dtype in layout.dtypes):
            raise ValueError("the dtypes of its inputs are not dtypes of torch")
        if names is not None and not {str}.issuperset(map(type, names)):
            raise ValueError("the names of its inputs are not text")
        counts = {len(layout.shapes), len(layout.dtypes), len(names or layout.dtypes)}
        if len(counts) > 1 or not layout.shapes:
            raise ValueError("its inputs have different counts of shapes, dtypes and names")
        return layout


@dataclass(frozen=True, eq=False)
class ArrayStatistics:
    """The mean and the scale (float64) by which gputune standardizes each channel of a module's
    inputs.

    ``channels`` has a (mean, scale) for each input, or None for an input that stays unchanged.
    """

    channels: tuple[tuple[np.ndarray, np.ndarray] | None, ...]

    def to_json(self) -> Json:
        # [mean, scale] of each input as lists
        channels = [c and [c[0].tolist(), c[1].tolist()] for c in self.channels]
        return {"channels": channels}

    @staticmethod
    def from_json(value: Json) -> "ArrayStatistics":
        parts = (None if c is None else (np.array(c[0]), np.array(c[1])) for c in value["channels"])
        return ArrayStatistics(tuple(parts))

    def check(self, layout: ArrayLayout) -> None:
        """Raise ValueError unless the means and scales fit the shapes of the inputs in
        ``layout``."""
        if len(self.channels) != len(layout.shapes):
            raise ValueError("its statistics belong to a different number of inputs")
        for channels, shape in zip(self.channels, layout.shapes):
            for part in channels or ():
                if part.dtype.kind not in "fi" or np.broadcast_shapes(part.shape, shape) != shape:
                    raise ValueError("its statistics belong to inputs of a different shape")


def fit_channels(
    arrays: Arrays, folds: Sequence[np.ndarray], numbers: str
) -> tuple[ArrayStatistics, ...]:
    """Return the mean and the scale of each input channel, fitted on each fold's training rows.

    With ``numbers="none"`` all inputs stay unchanged. With ``numbers="standard"`` each channel of
    floats or of bytes (uint8) gets mean 0 and variance 1. The channels are

    - the first axis of a row with three axes or more,
    - each column of a row with one axis,
    - all values of a row with two axes together.

    A constant channel has scale 1.
    """
    if numbers not in TENSOR_NUMBERS:
        raise InputError(
            "numbers",
            "must be 'standard' or 'none' for images, sequences and other arrays",
            got=numbers,
        )
    fitted: list[Sequence[tuple[np.ndarray, np.ndarray] | None]] = []
    for part, x in enumerate(arrays.parts):
        if numbers == "standard" and (x.is_floating_point() or x.dtype == torch.uint8):
            fitted.append(_fit(arrays, part, folds))
        else:
            fitted.append([None] * len(folds))
    return tuple(map(ArrayStatistics, zip(*fitted)))


def _fit(
    arrays: Arrays, part: int, folds: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the mean and the scale of one input's channels, for each fold.

    All folds share the sums of each row, which are computed only once.
    """
    x = arrays.parts[part]
    row = tuple(x.shape[1:])
    n_channel_axes = 0 if len(row) in (0, 2) else 1
    shape = row[:n_channel_axes] + (1,) * (len(row) - n_channel_axes)
    # axis + 1, because axis 0 of a block counts its rows
    summed = [axis + 1 for axis, size in enumerate(shape) if size == 1]
    n_summed = x[0].numel() / math.prod(shape)
    # Subtracting a rough mean first avoids cancellation in E[x^2] - E[x]^2.
    shift = next(arrays.blocks(part))[1].double().mean([0, *summed], keepdim=True)
    # sums of x and of x^2 of each row, (n, *channels)
    sums = np.empty((len(arrays), *shape))
    square_sums = np.empty_like(sums)
    for start, block in arrays.blocks(part):
        rows = slice(start, start + len(block))
        values = block.double() - shift
        squares = values.square()
        if summed:
            values = values.sum(summed, keepdim=True)
            squares = squares.sum(summed, keepdim=True)
        sums[rows] = values.cpu().numpy()
        square_sums[rows] = squares.cpu().numpy()
    moments = []
    for train in folds:
        mean = sums[train].mean(0) / n_summed
        square = square_sums[train].mean(0) / n_summed
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        constant = deviation <= 1e-9 * np.sqrt(np.maximum(square, 1e-300))
        moments.append((mean + shift[0].cpu().numpy(), np.where(constant, 1.0, deviation)))
    return moments
