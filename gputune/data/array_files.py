"""Arrays that are read: files of NumPy's and torch's, and the items of a Dataset; nothing is unpickled."""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from gputune.data.table import is_image, quoted
from gputune.errors import InputError

ARRAY_SUFFIXES = (".npz", ".npy", ".pt", ".pth")
_WRITE = "write it with numpy.savez(path, image=X, label=y), or torch.save of a dict of tensors"

Bar = Callable[[Sequence[int]], Iterable[int]]
"""Goes through numbers, and shows how far it is."""


def read_array_file(path: Path) -> dict[str, object]:
    """Return the arrays of a file by their names: of .npz, of a .pt that holds a dict of tensors; of .npy one, "".

    That of .npy is mapped, so that its rows are read where they are gathered. Raises InputError for other contents,
    FileNotFoundError for a file that is not there.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; give the file in it.")
    try:
        if path.suffix == ".npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        arrays = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{str(path)!r} holds more than tensors, which is not unpickled since that may run code; {_WRITE}."
        ) from error
    except (FileNotFoundError, PermissionError):
        raise
    except (ValueError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        writer = "torch.save" if path.suffix in (".pt", ".pth") else "NumPy"
        reason = f"it is damaged, or was not written by {writer}"
        if str(error).startswith("Object arrays"):
            reason = "it holds Python objects, such as rows of unlike shapes, which are not unpickled"
        elif path.stat().st_size == 0:
            reason = "it is empty"
        raise InputError(f"{str(path)!r} cannot be read as arrays: {reason}; {_WRITE}.") from error
    if not isinstance(arrays, dict) or not all(isinstance(value, Tensor) for value in arrays.values()):
        raise InputError(
            f"{str(path)!r} must hold a dict of tensors, got {type(arrays).__name__}; save one, for example "
            "torch.save({'image': X, 'label': y}, path)."
        )
    return {str(name): value for name, value in arrays.items()}


def pick_arrays(path: Path, y: Any, groups: Any) -> tuple[object, object, object]:
    """Return X, y and groups of a file; ``y`` and ``groups`` name arrays in it, or beside a .npy are files of it.

    X is a dict where more than one array is left. Raises InputError for other names, and where nothing is left.
    """
    values = read_array_file(path)
    if path.suffix == ".npy":
        return values[""], _beside(path, "y", y), None if groups is None else _beside(path, "groups", groups)
    for argument, name in (("target", y), ("groups", groups)):
        if not (isinstance(name, str) and name in values) and not (argument == "groups" and name is None):
            known = f"which are {quoted(values)}" if values else "and it holds none"
            got = repr(name) if isinstance(name, str | None) else f"an object of type {type(name).__name__}"
            raise InputError(f"{argument}={got} is none of the arrays of {str(path)!r}, {known}; name one of them.")
    target, of_groups = values.pop(y), None if groups is None else np.asarray(values.pop(groups))
    if not values:
        raise InputError(f"{str(path)!r} holds no array but the target {y!r}; there is nothing to predict it from.")
    return values if len(values) > 1 else next(iter(values.values())), target, of_groups


def _beside(path: Path, option: str, name: object) -> np.ndarray:
    """Return the array of the .npy file ``name``."""
    if not isinstance(name, str | Path) or Path(name).suffix != ".npy":
        raise InputError(
            f"{option} must be a .npy file too, with one value a row of {str(path)!r}, got {name!r:.60}; or write both "
            "into one file, numpy.savez(path, image=X, label=y)."
        )
    if not Path(name).exists():
        raise InputError(f"{option}: there is no file {str(name)!r}; give the .npy file of {option}.")
    return np.array(read_array_file(Path(name))[""])


def read_dataset(dataset: "TorchDataset[object]", y: object, bar: Bar = iter) -> tuple[object, object]:
    """Return X and y of a map-style dataset of torch's, whose items are (inputs, target), read once.

    With ``y`` given, or None and items that are no pair, all of an item is inputs. A TensorDataset gives its tensors as
    they are. Raises InputError for one without a length or rows, with items that fail or of unlike shapes.
    """
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            f"X is a {name}, which has no length; pass a map-style Dataset, with __len__ and __getitem__, or its "
            "tensors."
        )
    if len(dataset) == 0:
        raise InputError(f"X is a {name} without items (its length is 0); check its files.")
    if type(dataset) is TensorDataset:
        return _split(list(dataset.tensors), y, name)
    items = [_item(dataset, i, name) for i in bar(range(len(dataset)))]
    try:
        return _split(default_collate(items), y, name)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(
            f"the items of X, a {name}, cannot be stacked: {reason}. All must have one shape; pad them, or let the "
            "dataset give tensors."
        ) from error


def read_inputs(dataset: "TorchDataset[object]", number: int) -> Any:
    """Return the ``number`` of inputs of a dataset whose items are inputs, or pairs (inputs, target); see above."""
    inputs, _ = read_dataset(dataset, ())
    if isinstance(inputs, tuple) and len(inputs) == 2 and (number == 1 or not isinstance(inputs[0], Tensor)):
        inputs = inputs[0]
    return tuple(inputs) if isinstance(inputs, list) else inputs


def _item(dataset: "TorchDataset[object]", place: int, name: str) -> object:
    try:
        item = dataset[place]
    except Exception as error:
        raise InputError(
            f"item {place} of X, a {name}, raised {type(error).__name__}: {error}. Mend it, or leave it out: "
            "torch.utils.data.Subset."
        ) from error
    if any(is_image(part) for part in (item if isinstance(item, list | tuple) else [item])):
        raise InputError(
            f"item {place} of X, a {name}, is a PIL image; let the dataset give tensors, of one size, for example "
            "transform=torchvision.transforms.ToTensor()."
        )
    return item


def _split(item: object, y: object, name: str) -> tuple[object, object]:
    """Return inputs and target of what the items are when they are stacked; several inputs are a tuple."""
    if y is None:
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise InputError(f"y is missing: the items of X, a {name}, are no pairs (inputs, target); pass y.")
        item, y = item
    if isinstance(item, list):
        item = tuple(item) if len(item) > 1 else item[0]
    return item, y
