"""Inputs that are not tables: images, sequences, token ids, or several inputs at once.

They stay unchanged or are scaled per channel. Nothing is copied: rows of memory-mapped arrays are
read when they are gathered.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gputune.data.ragged import refuse_ragged
from gputune.errors import InputError
from gputune.types import TENSOR_NUMBERS, Json

_BLOCK = 1 << 21  # numbers per block when all values are checked or summed
# torch has few operations for these integer types, so they become wider ones.
_TAKEN_AS = {torch.uint16: torch.int32, torch.uint32: torch.int64}


@dataclass(frozen=True, eq=False)
class Arrays:
    """Inputs of a module: the tensors ``parts``, each (N, ...).

    The module receives them in order, or as the keywords ``names``. ``places`` (n,) holds the
    positions of the selected rows, or None if all rows are selected. Nothing is copied until the
    rows are gathered.
    """

    parts: tuple[Tensor, ...]
    names: tuple[str, ...] | None = None
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.parts[0] if self.places is None else self.places)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the inputs in messages."""
        return input_labels(len(self.parts), self.names)

    def select(self, rows: np.ndarray) -> "Arrays":
        """Return the inputs with only the given rows, which are not gathered yet."""
        positions = np.asarray(rows, dtype=np.int64)
        return replace(self, places=positions if self.places is None else self.places[positions])

    def gathered(self) -> tuple[Tensor, ...]:
        """Return the selected rows of all inputs, each (n, ...)."""
        return tuple(self._rows(x, slice(None)) for x in self.parts)

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        return (
            x[rows]
            if self.places is None
            else x.index_select(0, torch.from_numpy(self.places[rows]).to(x.device))
        )

    def as_given(self) -> object:
        """Return the rows in the form that a scorer reads: an array, a tuple, or a dict of
        arrays."""
        arrays = tuple(x.cpu().numpy() for x in self.gathered())
        alone = arrays if len(arrays) > 1 else arrays[0]
        return alone if self.names is None else dict(zip(self.names, arrays))

    def blocks(self, part: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows of an input block by block, each with the number of its first row."""
        x = self.parts[part]
        rows = max(1, _BLOCK // max(1, x[0].numel()))
        for start in range(0, len(self), rows):
            yield start, self._rows(x, slice(start, start + rows))


def input_labels(number: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of ``number`` inputs in messages: X, X[0] or X['image']."""
    return (
        ("X",)
        if number == 1 and names is None
        else tuple(f"X[{name!r}]" for name in names or range(number))
    )


def as_arrays(X: object) -> Arrays | None:
    """Return X as inputs of a module, or None if X is a table.

    X is taken as inputs if it is

    - an array or tensor with at least three axes,
    - a tensor of integers with two axes, or
    - a tuple or dict of arrays and tensors.

    A table is a data frame, or has two axes and holds floats.
    """
    if isinstance(X, Mapping) and all(
        isinstance(value, Tensor | np.ndarray) for value in X.values()
    ):
        return _check_arrays(tuple(X.values()), tuple(map(str, X)))
    if isinstance(X, tuple) and all(isinstance(value, Tensor | np.ndarray) for value in X):
        return _check_arrays(X)
    if not isinstance(X, Tensor | np.ndarray) or np.ma.isMaskedArray(X):
        return None
    of_ids = isinstance(X, Tensor) and X.dim() == 2 and not X.is_floating_point() | X.is_complex()
    return _check_arrays((X,)) if X.ndim > 2 or of_ids else None


def _check_arrays(
    values: Sequence[np.ndarray | Tensor], names: tuple[str, ...] | None = None
) -> Arrays:
    if not values:
        raise InputError("X is empty; pass at least one array or tensor of rows.")
    labels = input_labels(len(values), names)
    arrays = Arrays(tuple(map(_tensor, values, labels)), names)
    if len({len(x) for x in arrays.parts}) > 1:
        words = ", ".join(f"{label} {len(x)}" for label, x in zip(labels, arrays.parts))
        raise InputError(
            f"the inputs of X must have one row for each of the same cases, got lengths {words}."
        )
    for number, label in enumerate(labels):
        for start, block in (
            arrays.blocks(number) if arrays.parts[number].is_floating_point() else ()
        ):
            if (bad := ~block.isfinite().reshape(len(block), -1).all(1)).any():
                got = f"got NaN or an infinite value in row {start + int(bad.int().argmax())}"
                raise InputError(f"{label} must be finite, {got}; fill it, or leave that row out.")
    return arrays


_OBJECTS = "its rows may be of unlike shapes: pad or crop them to one, then numpy.stack them"
_NUMBERS_OF = {
    "O": _OBJECTS,
    **dict.fromkeys("SUT", "give each text a number, for example its place in a vocabulary"),
}


def _tensor(value: np.ndarray | Tensor, label: str) -> Tensor:
    """Return a checked tensor that shares the memory of an array or a tensor."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            remedy = _NUMBERS_OF.get(value.dtype.kind, "convert it")
            raise InputError(f"{label} must hold numbers or booleans, got {value.dtype}; {remedy}.")
        # torch has no long double, no foreign byte order and no negative strides.
        native = value.astype(
            np.float64 if value.itemsize > 8 else value.dtype.newbyteorder("="), copy=False
        )
        native = (
            np.ascontiguousarray(native) if any(stride < 0 for stride in native.strides) else native
        )
        # torch warns about read-only memory, such as a mapped file. gputune never writes to it, but
        # torch has no option to say so.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            value = torch.from_numpy(native)
    refuse_kind(value, label)
    if value.dim() == 0 or 0 in value.shape:
        raise InputError(
            f"{label} must have rows, and none of its axes may be empty, got shape "
            f"{tuple(value.shape)}."
        )
    return value.detach().to(_TAKEN_AS.get(value.dtype, value.dtype))


def refuse_kind(value: Tensor, label: str) -> None:
    """Raise InputError unless a tensor is dense, real, not quantized and in memory.

    Floats must have at least 16 bits.
    """
    refuse_ragged(value, label)
    for is_bad, words in (
        (
            value.layout is not torch.strided,
            f"is a sparse tensor, and only dense input is supported; pass {label}.to_dense()",
        ),
        (value.is_meta, "lies on the device 'meta', which holds no values; pass one that has them"),
        (
            value.is_complex(),
            f"must hold real numbers, got {value.dtype}; pass real and imaginary parts",
        ),
        (
            value.is_quantized,
            f"is quantized, {value.dtype}; pass {label}.dequantize() or .int_repr()",
        ),
        (
            value.is_floating_point() and value.dtype.itemsize < 2,
            f"must hold floats of 16 bits or more, got {value.dtype}; pass {label}.half()",
        ),
    ):
        if is_bad:
            raise InputError(f"{label} {words}.")


@dataclass(frozen=True)
class ArrayLayout:
    """The ``shapes`` of a row of each input of a module, their ``dtypes``, and their ``names``
    if any."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(arrays: Arrays) -> "ArrayLayout":
        shapes = tuple(tuple(x.shape[1:]) for x in arrays.parts)
        return ArrayLayout(
            shapes, tuple(str(x.dtype).removeprefix("torch.") for x in arrays.parts), arrays.names
        )

    def raw(self, X: object) -> Arrays:
        """Return X as checked arrays in the order of the training inputs.

        Raises:
            InputError: names, shapes or kinds of numbers differ from the training data.
        """
        refuse_ragged(X, "X")
        arrays = X if isinstance(X, Arrays) else as_arrays(X)
        if arrays is None:
            try:
                array = X if isinstance(X, Tensor) else np.asarray(X)
            except ValueError as error:
                got = f"got a {type(X).__name__}; pass such arrays"
                raise InputError(f"X must be what was seen in training, {self}, {got}.") from error
            arrays = _check_arrays((array,))
        if self.names is not None and arrays.names is not None:
            by_name = dict(zip(arrays.names, arrays.parts))
            if missing := [name for name in self.names if name not in by_name]:
                known = ", ".join(map(repr, self.names))
                raise InputError(
                    f"X has no input {missing[0]!r}; those seen in training are {known}."
                )
            arrays = replace(
                arrays, parts=tuple(by_name[name] for name in self.names), names=self.names
            )
        layout = ArrayLayout.of(arrays)
        are_floats = [getattr(torch, dtype).is_floating_point for dtype in self.dtypes]
        same = are_floats == [x.is_floating_point() for x in arrays.parts]
        if (layout.shapes, layout.names, same) != (self.shapes, self.names, True):
            raise InputError(f"X must be what was seen in training, {self}, got {layout}.")
        return arrays

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the inputs in messages and files."""
        return self.names or tuple(f"input{i}" for i in range(len(self.shapes)))

    @property
    def n_features(self) -> int:
        """The number of features with which a module is built.

        It is the size of the last axis of the first input, or 1 if a row is one number.
        """
        return self.shapes[0][-1] if self.shapes[0] else 1

    @property
    def row_numbers(self) -> int:
        """The count of numbers in a row, summed over all inputs."""
        return sum(math.prod(shape) for shape in self.shapes)

    def in_words(self) -> str:
        """Return the contents of a row as text: name, dtype and shape of each input."""
        parts = zip(self.names or [""] * len(self.shapes), self.dtypes, self.shapes)
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
        """Return the layout that ``to_json`` wrote.

        Raises:
            ValueError: ``to_json`` cannot have written this value.
        """
        names = None if value["names"] is None else tuple(value["names"])
        layout = ArrayLayout(tuple(map(tuple, value["shapes"])), tuple(value["dtypes"]), names)
        sizes = [size for shape in layout.shapes for size in shape]
        if not {int}.issuperset(map(type, sizes)) or min(sizes, default=1) < 1:
            raise ValueError("the shapes of its inputs are no sizes")
        # vars() and not getattr, because getattr may import a part of torch.
        if not all(isinstance(vars(torch).get(dtype), torch.dtype) for dtype in layout.dtypes):
            raise ValueError("the dtypes of its inputs are none of torch's")
        if names is not None and not {str}.issuperset(map(type, names)):
            raise ValueError("the names of its inputs are no texts")
        if (
            not {len(layout.dtypes), len(names or layout.dtypes)} == {len(layout.shapes)}
            or not layout.shapes
        ):
            raise ValueError("its inputs have other numbers of shapes, dtypes and names")
        return layout


@dataclass(frozen=True, eq=False)
class ArrayStatistics:
    """The mean and the scale of each channel of each input, float64.

    An entry of ``channels`` is None for an input that stays unchanged.
    """

    channels: tuple[tuple[np.ndarray, np.ndarray] | None, ...]

    def to_json(self) -> Json:
        return {
            "channels": [
                None if c is None else [part.tolist() for part in c] for c in self.channels
            ]
        }

    @staticmethod
    def from_json(value: Json) -> "ArrayStatistics":
        parts = (None if c is None else (np.array(c[0]), np.array(c[1])) for c in value["channels"])
        return ArrayStatistics(tuple(parts))

    def check(self, layout: ArrayLayout) -> None:
        """Raise ValueError unless the statistics fit the inputs of a layout."""
        if len(self.channels) != len(layout.shapes):
            raise ValueError("its statistics are of another number of inputs")
        for channels, shape in zip(self.channels, layout.shapes):
            for part in channels or ():
                if part.dtype.kind not in "fi" or np.broadcast_shapes(part.shape, shape) != shape:
                    raise ValueError("its statistics are of inputs of another shape")


def fit_channels(
    arrays: Arrays, folds: Sequence[np.ndarray], numbers: str
) -> tuple[ArrayStatistics, ...]:
    """Return the channel statistics of each fold's training rows.

    With ``numbers="none"`` all inputs stay unchanged. With ``numbers="standard"`` the channels of
    floats and of bytes (uint8) get mean 0 and variance 1. The channels are

    - the first axis of a row with three axes or more,
    - each column of a row with one axis,
    - all numbers together of a row with two axes.

    A constant channel has scale 1.
    """
    if numbers not in TENSOR_NUMBERS:
        raise InputError(
            f"numbers={numbers!r} is for tables; images and sequences take 'standard' or 'none'."
        )
    scaled = (
        numbers == "standard" and (x.is_floating_point() or x.dtype == torch.uint8)
        for x in arrays.parts
    )
    fitted = [
        _fit(arrays, part, folds) if scale else [None] * len(folds)
        for part, scale in enumerate(scaled)
    ]
    return tuple(map(ArrayStatistics, zip(*fitted)))


def _fit(
    arrays: Arrays, part: int, folds: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (mean, scale) of an input's channels for each fold.

    The sums of each row are computed once and shared by all folds.
    """
    x = arrays.parts[part]
    row = tuple(x.shape[1:])
    shape = tuple(
        size if len(row) == 1 or (len(row) > 2 and axis == 0) else 1
        for axis, size in enumerate(row)
    )
    # axis + 1, because axis 0 of a block counts its rows
    summed = [axis + 1 for axis, size in enumerate(shape) if size == 1]
    each = x[0].numel() / math.prod(shape)
    # Subtracting a rough mean first avoids cancellation in E[x^2] - E[x]^2.
    shift = next(arrays.blocks(part))[1].double().mean([0, *summed], keepdim=True)
    # sums of x and of x^2 of each row, (n, *channels)
    first, second = (np.empty((len(arrays), *shape)) for _ in range(2))
    for start, block in arrays.blocks(part):
        gap = block.double() - shift
        for sums, values in ((first, gap), (second, gap.square())):
            sums[start : start + len(block)] = (
                (values.sum(summed, keepdim=True) if summed else values).cpu().numpy()
            )
    moments = []
    for train in folds:
        mean, square = (sums[train].mean(0) / each for sums in (first, second))
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        constant = deviation <= 1e-9 * np.sqrt(np.maximum(square, 1e-300))
        moments.append((mean + shift[0].cpu().numpy(), np.where(constant, 1.0, deviation)))
    return moments
