"""What holds rows in a form that is neither arrays nor a table, and is refused with the way to make one of it."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gputune.errors import InputError

_CONTAINERS = (
    (TensorDataset, "; pass its tensors: X, y = dataset.tensors"),
    (Dataset, ", a torch Dataset; pass all its rows as arrays or tensors X and y"),
    (
        Mapping,
        "; pass one table of its columns, pandas.DataFrame(X), or of its inputs, numpy.hstack(list(X.values())), "
        "which the forward of a module takes apart",
    ),
)


def refuse_containers(X: object) -> None:
    """Raise InputError for what holds several inputs, or rows in a form of torch's that is no table."""
    refuse_loader(X)
    name = type(X).__name__
    for container, remedy in _CONTAINERS:
        if isinstance(X, container):
            raise InputError(f"X is a {name}{remedy}.")
    shapes = [tuple(getattr(part, "shape", ())) for part in X] if isinstance(X, list | tuple) else []
    if any(len(shape) > 1 for shape in shapes):
        raise InputError(
            f"X is a {name} of {len(shapes)} inputs, of shapes {', '.join(map(str, shapes[:4]))}; pass one table, "
            "numpy.hstack(X), which the forward of a module takes apart."
        )


def refuse_loader(X: object) -> None:
    """Raise InputError for what draws minibatches itself."""
    if isinstance(X, DataLoader):
        raise InputError(
            "X is a DataLoader, and minibatches are drawn here (batch_size is a key of space): pass its dataset, "
            "loader.dataset, or all rows as tensors X and y."
        )


def refuse_lists(X: object) -> None:
    """Raise InputError for what looks like inputs of a module but is neither arrays nor a table: lists, images, texts.

    The message says which part of X is none, and how it becomes one.
    """
    if is_image(X):
        raise InputError(f"X is one PIL image; pass all of them: {_STACK_IMAGES}.")
    if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1:
        X = list(X)
    if isinstance(X, Mapping):
        _refuse_part((f"X[{name!r}]", part) for name, part in X.items())
    if isinstance(X, tuple):
        _refuse_part((f"X[{i}]", part) for i, part in enumerate(X))
    if isinstance(X, list | tuple) and X:
        _refuse_items(X)


def _refuse_part(parts: Iterable[tuple[str, object]]) -> None:
    """Raise InputError where some of a few inputs have rows of their own and one is no array."""
    parts = list(parts)
    if len(parts) > 8 or not any(len(_shape_of(part)) > 1 for _, part in parts):
        return  # rows or columns of a table
    for label, part in parts:
        if not isinstance(part, Tensor | np.ndarray):
            raise InputError(
                f"{label} must be an array or a tensor, one for each input, got {type(part).__name__}; pass "
                f"numpy.asarray({label})."
            )


def _refuse_items(X: Sequence[object]) -> None:
    kind = f"X is a {type(X).__name__} of {len(X)}"
    if any(isinstance(item, str) for item in X):
        raise InputError(
            f"{kind} texts; give the words numbers, and pass a tensor of integers (rows, length), padded to one length."
        )
    if any(is_image(item) for item in X):
        raise InputError(f"{kind} PIL images; pass {_STACK_IMAGES}.")
    shapes = [_shape_of(item) for item in X]
    if all(len(shape) < 2 for shape in shapes):
        return  # rows of a table
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    several = "; where they are inputs of the module, pass a tuple of them" if len(X) < 9 else ""
    if other is None:
        stack = "torch.stack(X)" if isinstance(X[0], Tensor) else "numpy.stack(X)"
        raise InputError(f"{kind} arrays of shape {shapes[0]}; pass one array, {stack}{several}.")
    raise InputError(
        f"{kind} arrays of unlike shapes: X[0] has {shapes[0]}, X[{other}] {shapes[other]}; pad or crop them to one "
        f"shape and pass numpy.stack(X){several}."
    )


def is_image(value: object) -> bool:
    """Whether a value is an image of PIL's, which need not be installed."""
    return type(value).__module__.partition(".")[0] == "PIL" and hasattr(value, "getpixel")


_STACK_IMAGES = (
    "numpy.stack([numpy.asarray(image) for image in X]), images of one size, which has the channels last: "
    ".transpose(0, 3, 1, 2) puts them first, as torch's layers want them"
)


def _shape_of(item: object) -> tuple[int, ...]:
    if isinstance(item, Tensor | np.ndarray):
        return tuple(item.shape)
    if isinstance(item, list | tuple):
        return (len(item), *(_shape_of(item[0]) if item else ()))
    return ()
