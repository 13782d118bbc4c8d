"""Read arrays from files that NumPy and torch wrote.

gputune never unpickles objects, because unpickling may run code. gputune also refuses a file that
needs more memory than is free.
"""

import math
import os
import pickle
import zipfile
from collections.abc import Collection, Sequence
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
from gputune.ground.text import count, size_words

ARRAY_SUFFIXES = (".npz", ".npy", ".pt", ".pth")
_WRITE = (
    "Write the file with numpy.savez(path, image=X, label=y), or save a dict of tensors with "
    "torch.save."
)
_TEXT_BYTES = 64  # an estimate: the str that Python makes of one short text
_READERS = {1: npy_format.read_array_header_1_0, 2: npy_format.read_array_header_2_0}
"""The NumPy functions that read the header of a .npy file, by the major version of the format.

Only arrays with named fields have version 3. gputune refuses such arrays.
"""


class _Malformed(ValueError):
    """Error raised if a file cannot be read as arrays. The text of the error is the reason."""


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
        if size == 0:
            raise _Malformed("the file is empty")
        return read(path)
    except (InputError, PermissionError):
        raise
    except MemoryError as error:
        raise InputError(
            None,
            f"{str(path)!r} needs more memory than is free",
            remedy="Read the file on a machine with more memory.",
        ) from error
    except Exception as error:  # a damaged file can raise anything in NumPy's and torch's readers
        writer = "torch.save" if read is _read_torch else "NumPy"
        reason = f"the file is damaged, or was not written by {writer}"
        if isinstance(error, _Malformed):
            reason = str(error)
        raise InputError(
            None, f"{str(path)!r} cannot be read as arrays: {reason}", remedy=_WRITE
        ) from error


def _read_npy(path: Path) -> dict[str, Any]:
    with open_file(path) as file:
        _check_array(file, os.fstat(file.fileno()).st_size)
    return {"": np.load(path, mmap_mode="r", allow_pickle=False)}


def _read_npz(path: Path) -> dict[str, Any]:
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        needed = 0
        for member in archive.infolist():
            with archive.open(member) as content:
                name = f"the array {member.filename!r}"
                needed += _check_array(content, member.file_size, name)
        check_room(path, needed)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _check_array(file: IO[bytes], size: int, name: str = "the array") -> int:
    """Check an array in a .npy or .npz file, and return the bytes of memory that it needs.

    The shape and the dtype come from the array's header. The values are not read.

    Args:
        file: the open file, at the start of the array.
        size: the size of the file in bytes.
        name: the name of the array in error messages.

    Raises:
        _Malformed: the array does not fit into the file, or does not hold numbers, booleans, dates
            or text.
    """
    version, _ = npy_format.read_magic(file)
    if version not in _READERS:
        raise _Malformed(f"{name} has named fields, which gputune reads only from DataFrames")
    shape, _, dtype = _READERS[version](file)
    if dtype.hasobject:
        raise _Malformed(
            f"{name} holds Python objects, which may run code when they are read. Pad rows of "
            "different lengths to one length"
        )
    if dtype.kind == "V":
        raise _Malformed(f"{name} has named fields, which gputune reads only from DataFrames")
    shown_shape = f"{shape!s:.60}"  # a damaged header may hold a very long shape
    if any(length < 0 for length in shape):
        raise _Malformed(f"{name} has the shape {shown_shape}, but a length cannot be negative")
    n_values = math.prod(shape)
    # A text type may have 0 bytes per value, and each value still becomes a Python object.
    declared = n_values * max(1, dtype.itemsize)
    available = size - file.tell()
    if declared > available:
        raise _Malformed(
            f"{name} has the shape {shown_shape} and needs {size_words(declared)}, but only "
            f"{size_words(max(0, available))} remain in the file. The file may be truncated"
        )
    # Text (kinds "S" and "U") needs the array and one Python string per value.
    return declared + n_values * _TEXT_BYTES * (dtype.kind in "SU")


def _read_torch(path: Path) -> dict[str, Any]:
    sizes = _record_sizes(path)
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
        stored = value.untyped_storage().nbytes()
        if stored not in sizes and value.numel() > 0:
            raise _Malformed(f"the tensor {name!r:.100} does not match any record in the file")
        # A tensor of stride 0 stores each number once. Gathering rows writes all of them out.
        full = value.numel() * value.itemsize
        if full > stored:
            needed += full
    check_room(path, needed)
    return tensors


def _record_sizes(path: Path) -> set[int]:
    """Return the sizes in bytes of the records in a file written by torch.save, to check its
    tensors.

    Raises:
        _Malformed: the records are compressed. torch maps the file into memory, so it would read
            compressed bytes as numbers.
    """
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    sizes = set()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise _Malformed("the records are compressed, but torch.save never compresses them")
        sizes.add(member.file_size)
    return sizes


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
    if path.suffix.lower() == ".npy":
        target = _read_partner(path, "y", y)
        if groups is not None:
            groups = _read_partner(path, "groups", groups)
        return arrays[""], target, groups
    if y is None and arrays:
        refuse_no_target(str(path), "array", list(arrays))
    _check_name("target", y, arrays, path)
    if groups is not None:
        _check_name("groups", groups, arrays, path)
        if groups == y:
            raise InputError("groups", "must not be the array of the target", got=groups)
    target = arrays.pop(y)
    if groups is not None:
        groups = np.asarray(arrays.pop(groups))
    if not arrays:
        raise InputError(
            None,
            f"{str(path)!r} holds no array to predict from, only the target {y!r}",
            remedy="Write the inputs to the file too.",
        )
    X = arrays if len(arrays) > 1 else next(iter(arrays.values()))
    return X, target, groups


def _check_name(argument: str, name: object, arrays: Collection[str], path: Path) -> None:
    """Raise InputError unless a file holds an array called ``name``."""
    if isinstance(name, str) and name in arrays:
        return
    holds = f"which holds {quoted(arrays)}" if arrays else "which holds no array"
    raise InputError(
        argument,
        f"must be the name of an array in {str(path)!r}, {holds}",
        got=name if isinstance(name, str | None) else Verbatim(f"a {type(name).__name__}"),
    )


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
        holds = f"holds {quoted(arrays)}" if arrays else "holds no array"
        expected = " and ".join(str(("rows", *shape)).replace("'", "") for shape in shapes)
        raise InputError(
            None,
            f"{str(path)!r} {holds}, but the model takes {count(len(shapes), 'array')} of shape "
            f"{expected}",
            remedy="Write a file with the same inputs as in training. The file may also hold the target.",
        )
    return inputs if len(shapes) > 1 else inputs[0]


def pick_target(path: Path, name: str) -> np.ndarray:
    """Return the array with the target values, read from an array file by its name.

    For a .npy file, which holds only one array, ``name`` is the path of a second .npy file with the
    target.
    """
    if path.suffix.lower() == ".npy":
        return _read_partner(path, "target", name)
    arrays = read_array_file(path)
    _check_name("target", name, arrays, path)
    value = arrays[name]
    if isinstance(value, Tensor):  # NumPy has no bfloat16
        return (value.double() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _read_partner(path: Path, argument: str, name: object) -> np.ndarray:
    """Return the target or the groups for the rows of the .npy file ``path``.

    The function reads the values from a second .npy file, ``name``.
    """
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
