"""Objects that hold rows but are no table and no array: lists, nested tensors, loaders, datasets.

gputune reads map-style torch Datasets. For the other objects, the error shows how to convert them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from gputune.ground.errors import InputError, Verbatim, option, per_interface

TOKENIZED = ("input_ids", "attention_mask", "token_type_ids")
"""The entries that a tokenizer of transformers returns."""

PAD_TOKENS = 'Pad the rows: tokenizer(texts, padding=True, return_tensors="pt").'
_STACK_IMAGES = (
    "numpy.stack([numpy.asarray(image) for image in X]), with images of one size. The result has "
    "its channels last. For torch's layers, move them first with .transpose(0, 3, 1, 2)."
)
_FEW_INPUTS = 8
_CONTAINERS = (list, tuple)


def refuse_ragged(value: object, label: str) -> None:
    """Raise InputError if the rows of X, y or another argument have different lengths.

    Rows of different lengths come as a nested tensor, a list, or an object array. The function
    checks each input of a tuple or a dict.

    Args:
        value: the object that the user passed. An object without such rows raises no error.
        label: the name of the argument in the error.
    """
    if isinstance(value, tuple | Mapping):
        for name, part in _inputs(value).items():
            if isinstance(part, Tensor | np.ndarray | list):
                refuse_ragged(part, f"{label}[{name!r}]")
    elif isinstance(value, Tensor) and value.is_nested:
        raise InputError(
            label,
            "is a nested tensor, whose rows have different lengths",
            remedy="Pad the rows to one length with torch.nested.to_padded_tensor, and pass the "
            "padded tensor.",
        )
    rows = _rows_of(value)
    shapes = list(map(_shape_of, rows))
    if len(rows) <= _FEW_INPUTS and max(map(len, shapes), default=0) > 1:
        return  # inputs of a module in a list, which another error explains
    for row, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise InputError(
                label,
                f"has rows of different shapes: row 0 has {shapes[0]}, row {row} has {shape}",
                remedy=pad_remedy(label),
            )


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


def _inputs(X: object) -> Mapping[Any, object]:
    """Return the inputs in a tuple or a dict by position or name, and no inputs for another X."""
    if isinstance(X, Mapping):
        return X
    return dict(enumerate(X)) if isinstance(X, tuple) else {}


def _rows_of(X: object) -> list[object]:
    """Return the rows of a list or of an object array, and no rows for another X."""
    is_objects = isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1
    return list(X) if is_objects or isinstance(X, list) else []  # type: ignore[call-overload]


def _shape_of(row: Any) -> tuple[int, ...]:
    if isinstance(row, _CONTAINERS):
        return (len(row), *(_shape_of(row[0]) if row else ()))
    return tuple(row.shape) if isinstance(row, Tensor | np.ndarray) else ()


def refuse_lists(X: object) -> None:
    """Raise InputError for lists of images, texts or arrays, and show how to convert them."""
    if is_image(X):
        raise InputError("X", "is one PIL image", remedy=f"Pass all images: {_STACK_IMAGES}")
    # A few parts, some of which have rows with axes, are inputs. Otherwise the parts are rows or
    # columns of a table.
    parts = _inputs(X)
    if len(parts) <= _FEW_INPUTS and any(len(_shape_of(part)) > 1 for part in parts.values()):
        for key, part in parts.items():
            if not isinstance(part, Tensor | np.ndarray):
                raise InputError(
                    f"X[{key!r}]",
                    "must be an array or a tensor",
                    got=Verbatim(f"a {type(part).__name__}"),
                    remedy=PAD_TOKENS if key in TOKENIZED else f"Pass numpy.asarray(X[{key!r}]).",
                )
    rows = list(X) if isinstance(X, tuple) else _rows_of(X)
    container = f"is a list of {len(rows)}"
    if any(isinstance(row, str) for row in rows):
        raise InputError(
            "X",
            f"{container} texts",
            remedy="Turn words into numbers, and pass a tensor of integers (rows, length), padded "
            "to one length.",
        )
    if any(map(is_image, rows)):
        raise InputError("X", f"{container} PIL images", remedy=f"Pass {_STACK_IMAGES}")
    shapes = list(map(_shape_of, rows))
    if max(map(len, shapes), default=0) < 2:
        return  # rows of a table
    stack = "torch.stack(X)" if isinstance(rows[0], Tensor) else "numpy.stack(X)"
    form = f"shape {shapes[0]}"
    remedy = f"Pass one array, {stack}."
    different = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), 0)
    if different:
        first = f"X[0] has {shapes[0]}"
        form = f"different shapes: {first}, X[{different}] has {shapes[different]}"
        remedy = f"Pad or crop the arrays to one shape and pass {stack}."
    if len(rows) <= _FEW_INPUTS:
        remedy = f"{remedy} If the arrays are the inputs of the module, pass a tuple of arrays."
    raise InputError("X", f"{container} arrays of {form}", remedy=remedy)


def is_image(value: object) -> bool:
    """Return True if a value is a PIL image. The check does not import PIL."""
    return type(value).__module__.partition(".")[0] == "PIL" and hasattr(value, "getpixel")


def refuse_containers(X: object) -> None:
    """Raise InputError if X is a dict, a torch Dataset or another container that is not a table."""
    refuse_loader(X)
    name = type(X).__name__
    if isinstance(X, Dataset):
        remedy = "Pass all its rows as arrays or tensors X and y."
        if isinstance(X, TensorDataset):
            remedy = "Pass its tensors: X, y = dataset.tensors."
        raise InputError("X", f"is a {name}, a torch Dataset", remedy=remedy)
    if isinstance(X, Mapping):
        raise InputError(
            "X",
            per_interface(f"is a {name}", "holds several inputs"),
            remedy=per_interface(
                "Pass one table made from its columns, pandas.DataFrame(X), or from its inputs, "
                "numpy.hstack(list(X.values())). A module can split the table in its forward.",
                f"Only a module takes several inputs. Add {option('model', 'FILE.py:NAME')}.",
            ),
        )
    parts = X if isinstance(X, _CONTAINERS) else ()
    shapes = [tuple(getattr(part, "shape", ())) for part in parts]
    if max(map(len, shapes), default=0) > 1:
        inputs = f"{len(shapes)} inputs with the shapes {', '.join(map(str, shapes[:4]))}"
        raise InputError(
            "X",
            f"is a {name} of {inputs}",
            remedy="Pass one table, numpy.hstack(X). A module can split the table in its forward.",
        )


def refuse_loader(X: object) -> None:
    """Raise InputError if X is a DataLoader, a LightningDataModule, or a class of datasets.

    gputune draws minibatches itself, and reads rows from an object.
    """
    kind = X if isinstance(X, type) else type(X)
    name = kind.__name__
    is_data_module = any(base.__name__ == "LightningDataModule" for base in kind.__mro__)
    if not is_data_module and not issubclass(kind, Dataset | DataLoader):
        return
    if isinstance(X, type):
        remedy = f"Create an object: data = {name}(...)."
        if is_data_module:
            remedy = (
                f"Create an object, data = {name}(...), call its prepare_data() and "
                'setup("fit"), and pass the dataset: data.train_dataloader().dataset.'
            )
        raise InputError("X", f"is the class {name}, which holds no rows", remedy=remedy)
    if isinstance(X, Dataset):
        return
    remedy = "Pass its dataset, loader.dataset, or all rows as tensors X and y."
    container = "a DataLoader"
    if is_data_module:
        remedy = _data_module_remedy(X)
        container = f"the LightningDataModule {name}"
    raise InputError(
        "X",
        f"is {container}, but gputune draws minibatches itself (batch_size in the space)",
        remedy=remedy,
    )


def _data_module_remedy(module: object) -> str:
    """Return advice on the dataset of a LightningDataModule.

    If the module has split one dataset, such as by ``random_split``, the advice names its parts, so
    that the validation rows stay in the search.
    """
    parts = {key: part for key, part in vars(module).items() if isinstance(part, Subset)}
    datasets = {id(part.dataset) for part in parts.values()}
    if len(parts) > 1 and len(datasets) == 1:
        train, valid = list(parts)[:2]
        return (
            f"Its parts {', '.join(parts)} are of one dataset. Pass this dataset, "
            f"X.{train}.dataset, and the split, cv=(X.{train}.indices, X.{valid}.indices)."
        )
    return (
        'Call its prepare_data() and setup("fit"), and pass the dataset: '
        "X.train_dataloader().dataset. If setup has made its parts train and valid from one "
        "dataset, by random_split, pass X.train.dataset and cv=(X.train.indices, X.valid.indices)."
    )


LABELS = "labels"
"""The entry with the target in a dataset for a model of transformers."""

Bar = Callable[[Sequence[int]], Iterable[int]]


def read_dataset(dataset: "Dataset[object]", y: object, bar: Bar = iter) -> tuple[object, object]:
    """Read X and y from a map-style torch Dataset.

    The function reads each item once. For a TensorDataset it returns the tensors without a copy.

    Args:
        dataset: the dataset.
        y: the target, or None to read it from the items, which are pairs (inputs, target), or dicts
            of inputs with the target under "labels". If y is given, the whole item is used as
            inputs.
        bar: wraps the item indexes, for example in a progress bar.

    Raises:
        InputError: the dataset has no length or no items, or its items cannot be read or stacked.
    """
    name = type(dataset).__name__
    if type(dataset) is TensorDataset:  # it cannot count rows of different lengths
        for place, tensor in enumerate(dataset.tensors):
            refuse_ragged(tensor, f"X.tensors[{place}]")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InputError(
            "X",
            f"is a {name}, which has no length",
            remedy="Pass a map-style Dataset, with __len__ and __getitem__, or its tensors.",
        )
    if len(dataset) == 0:
        raise InputError("X", f"is a {name} without items", remedy="Check its files.")
    if type(dataset) is TensorDataset:
        return _split(list(dataset.tensors), y, name)
    items = []
    for place in bar(range(len(dataset))):
        try:
            item = dataset[place]
        except Exception as error:
            raise InputError(
                None,
                f"Item {place} of X, a {name}, raised {type(error).__name__}: {error}",
                remedy="Fix the item, or leave it out with torch.utils.data.Subset.",
            ) from error
        parts = item if isinstance(item, list | tuple) else [item]
        if any(map(is_image, parts)):
            raise InputError(
                None,
                f"Item {place} of X, a {name}, is a PIL image",
                remedy="Let the dataset return tensors of one size, for example with "
                "transform=torchvision.transforms.ToTensor().",
            )
        items.append(item)
    try:
        return _split(default_collate(items), y, name)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        is_tokenized = isinstance(items[0], dict) and not items[0].keys().isdisjoint(TOKENIZED)
        remedy = (
            PAD_TOKENS if is_tokenized else "Let the dataset return tensors, padded to one shape."
        )
        raise InputError(
            None,
            f"The items of X, a {name}, cannot be stacked: {reason}",
            remedy=remedy,
        ) from error


def read_inputs(dataset: "Dataset[object]", number: int) -> Any:
    """Read the inputs for predictions from a torch Dataset. The model has ``number`` inputs.

    The items are inputs, or pairs (inputs, target), where the target is ignored. The same holds for
    an entry "labels" of dicts.
    """
    inputs, _ = read_dataset(dataset, ())
    if isinstance(inputs, dict) and len(inputs) > number:
        inputs.pop(LABELS, None)
    # If the model has several inputs, a pair of tensors is two inputs.
    if (
        isinstance(inputs, tuple)
        and len(inputs) == 2
        and (number == 1 or not isinstance(inputs[0], Tensor))
    ):
        inputs = inputs[0]
    return tuple(inputs) if isinstance(inputs, list) else inputs


def _split(item: object, y: object, name: str) -> tuple[object, object]:
    """Split the stacked items of a dataset into inputs and target. Several inputs become a
    tuple."""
    if y is None and isinstance(item, dict) and LABELS in item:
        item = dict(item)
        y = item.pop(LABELS)
    elif y is None:
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise InputError(
                "y",
                f"is missing, and the items of X, a {name}, are not pairs (inputs, target) or "
                f"dicts with the entry {LABELS!r}",
                remedy="Pass y.",
            )
        item, y = item
    if isinstance(item, list):
        item = tuple(item) if len(item) > 1 else item[0]
    return item, y
