"""Read arrays from files that NumPy and torch wrote.

gputune never unpickles objects, because unpickling may run code. gputune also refuses a file that
needs more memory than is free.
"""

import math
import os
import pickle
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from gputune.data.arrays import refuse_kind
from gputune.data.table import quoted, refuse_no_target
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.files import check_file, check_room, open_file
from gputune.ground.text import count

ARRAY_SUFFIXES = (".npz", ".npy", ".pt", ".pth")
_WRITE = (
    "Write the file with numpy.savez(path, image=X, label=y), or save a dict of tensors with "
    "torch.save."
)
_READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
"""The NumPy functions that read the header of a .npy file, by the version of the format.

Only arrays with named fields have version 3. gputune refuses such arrays.
"""


def read_array_file(path: Path) -> dict[str, Any]:
    """Return the arrays or tensors of a .npz, .npy or .pt file, as a dict from name to array.

    A .pt file must hold a dict of tensors. The array of a .npy file has the name "". Arrays of .npy
    files and tensors are memory-mapped: gputune reads a row from the file only when it needs that
    row.

    Args:
        path: the file, with one of the suffixes ``ARRAY_SUFFIXES``.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: the file may not be read.
        InputError: the file does not hold arrays, holds Python objects, or needs more memory than
            is free.
    """
    size = check_file(path)
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise InputError(
            None,
            f"Arrays are read from {', '.join(ARRAY_SUFFIXES)} files",
            got=str(path),
            remedy=_WRITE,
        )
    read = {".npy": _read_npy, ".npz": _read_npz}.get(suffix, _read_torch)
    try:
        return read(path)
    except (InputError, PermissionError):
        raise
    except Exception as error:  # a damaged file can raise anything in NumPy's and torch's readers
        writer = "torch.save" if read is _read_torch else "NumPy"
        reason = "is empty" if size == 0 else f"is damaged, or was not written by {writer}"
        raise _unreadable(path, f"the file {reason}") from error


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(None, f"{str(path)!r} cannot be read as arrays: {reason}", remedy=_WRITE)


def _read_npy(path: Path) -> dict[str, Any]:
    with open_file(path) as file:
        _check_array(path, file, os.fstat(file.fileno()).st_size)
    return {"": np.load(path, mmap_mode="r", allow_pickle=False)}


def _read_npz(path: Path) -> dict[str, Any]:
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        needed = 0
        for member in archive.infolist():
            with archive.open(member) as content:
                needed += _check_array(path, content, member.file_size, member.filename)
        check_room(path, needed)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _check_array(path: Path, file: IO[bytes], size: int, name: str = "") -> int:
    """Check the header of an array in a .npy or .npz file, and return the bytes that it needs.

    Raises:
        InputError: the array does not fit into ``size``, the bytes of the file, or does not hold
            numbers, booleans, dates or text.
    """
    shape, _, dtype = _READERS[npy_format.read_magic(file)](file)
    array = f"the array {name!r}" if name else "the array"
    if dtype.hasobject or dtype.kind == "V":
        values = "Python objects, which may run code" if dtype.hasobject else "named fields"
        raise _unreadable(path, f"{array} holds {values}")
    # A text type may have 0 bytes per value, and each value still becomes a Python object.
    needed = math.prod(shape) * max(1, dtype.itemsize)
    if min(shape, default=0) < 0 or needed > size - file.tell():
        raise _unreadable(
            path, f"{array} has the shape {shape!s:.60}, which does not fit into the file"
        )
    return needed


def _read_torch(path: Path) -> dict[str, Any]:
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        if any(member.compress_type for member in archive.infolist()):
            # torch maps the file into memory, so it would read compressed bytes as numbers.
            raise _unreadable(path, "the records are compressed, but torch.save never does that")
    try:
        arrays = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            None,
            f"{str(path)!r} holds more than tensors. gputune does not unpickle other objects, "
            "because unpickling may run code",
            remedy=_WRITE,
        ) from error
    is_dict = isinstance(arrays, dict)
    if not is_dict or not all(isinstance(value, Tensor) for value in arrays.values()):
        raise InputError(
            None,
            f"{str(path)!r} must hold a dict of tensors",
            got=Verbatim(type(arrays).__name__),
            remedy="Save a dict, for example torch.save({'image': X, 'label': y}, path).",
        )
    tensors = {str(name): value.detach() for name, value in arrays.items()}
    needed = 0
    for name, value in tensors.items():
        refuse_kind(value, f"{name!r:.100} in {str(path)!r}")
        # A tensor of stride 0 stores each number once. Gathering rows writes all of them out.
        if value.nbytes > value.untyped_storage().nbytes():
            needed += value.nbytes
    check_room(path, needed)
    return tensors


def pick_arrays(path: Path, y: Any, groups: Any) -> tuple[object, object, object]:
    """Read X, y and groups from an array file and return them.

    X holds all arrays except y and groups. If several arrays are left, X is a dict from name to
    array.

    Args:
        path: the file of arrays.
        y: the name of the target array in the file. For a .npy file, the path of another .npy file.
        groups: the name of the groups array, a path as for ``y``, or None.

    Raises:
        InputError: a name is not in the file, the names are equal, or no array is left for X.
    """
    arrays = read_array_file(path)
    if y is None and arrays and path.suffix.lower() != ".npy":
        refuse_no_target(str(path), "array", list(arrays))
    target = _named(path, arrays, "target", y)
    group_values = None
    if groups is not None:
        if groups == y:
            raise InputError("groups", "must not be the array of the target", got=groups)
        group_values = np.asarray(_named(path, arrays, "groups", groups))
    inputs = {name: array for name, array in arrays.items() if name not in (y, groups)}
    if not inputs:
        raise InputError(
            None,
            f"{str(path)!r} holds no array to predict from, only the target {y!r}",
            remedy="Write the inputs to the file too.",
        )
    X = inputs if len(inputs) > 1 else next(iter(inputs.values()))
    return X, target, group_values


def pick_inputs(
    path: Path,
    names: Sequence[str] | None,
    shapes: Sequence[tuple[int, ...]],
    unread: Collection[str] = (),
) -> Any:
    """Return the inputs of a model from a file that may also hold the target and other arrays.

    Args:
        path: the file of arrays.
        names: the names of the inputs at training, None if they had no names.
        shapes: the shape of a row of each input.
        unread: the names of arrays that are not inputs, such as the target.

    Returns:
        If ``names`` is given, a dict of the named inputs. Otherwise one array, or a tuple of
        several arrays in the order of the file.

    Raises:
        InputError: no array is left, or it is not clear which arrays are the inputs.
    """
    arrays = read_array_file(path)
    if names is not None:
        return {name: arrays[name] for name in names if name in arrays}
    inputs = tuple(array for name, array in arrays.items() if name not in unread)
    if len(inputs) > len(shapes):
        inputs = tuple(array for array in inputs if tuple(array.shape[1:]) in shapes)
    if len(inputs) != len(shapes):
        expected = " and ".join(str(("rows", *shape)).replace("'", "") for shape in shapes)
        raise InputError(
            None,
            f"{str(path)!r} holds {quoted(arrays) or 'no array'}, but the model takes "
            f"{count(len(shapes), 'array')} of shape {expected}",
            remedy="Write a file with the same inputs as in training. The file may also hold the target.",
        )
    return inputs if len(shapes) > 1 else inputs[0]


def pick_target(path: Path, name: str) -> np.ndarray:
    """Return the array with the target values, read from an array file by its name.

    For a .npy file, which holds only one array, ``name`` is the path of a second .npy file with the
    target.
    """
    arrays = {} if path.suffix.lower() == ".npy" else read_array_file(path)
    value = _named(path, arrays, "target", name)
    if isinstance(value, Tensor):  # NumPy has no bfloat16
        return (value.double() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _named(path: Path, arrays: Mapping[str, Any], argument: str, name: Any) -> Any:
    """Return the target or the groups for the rows of a file, by their name in ``arrays``.

    For a .npy file, the values are in a second .npy file, ``name``.
    """
    if path.suffix.lower() != ".npy":
        if isinstance(name, str) and name in arrays:
            return arrays[name]
        raise InputError(
            argument,
            f"must be the name of an array in {str(path)!r}, which holds "
            f"{quoted(arrays) or 'no array'}",
            got=name if isinstance(name, str | None) else Verbatim(f"a {type(name).__name__}"),
        )
    argument = "y" if argument == "target" else argument
    if not isinstance(name, str | Path) or Path(name).suffix.lower() != ".npy":
        raise InputError(
            argument,
            f"must be the path of a .npy file with one value per row of {str(path)!r}",
            got=name,
            remedy="Pass such a path, or write both arrays into one file: "
            "numpy.savez(path, image=X, label=y).",
        )
    partner = Path(name)
    if not os.path.exists(partner):
        raise InputError(
            argument,
            f"must be the path of a .npy file, but there is no file {str(name)!r}",
            remedy="Check the path.",
        )
    array = read_array_file(partner)[""]
    check_room(partner, array.nbytes)
    return np.array(array)
