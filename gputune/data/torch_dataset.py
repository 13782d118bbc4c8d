"""Read X and y from a map-style torch Dataset. gputune reads each item only once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from gputune.data.ragged import PAD_TOKENS, TOKENIZED, is_image, refuse_ragged
from gputune.ground.errors import InputError

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
