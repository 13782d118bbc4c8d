"""Several inputs of a module as one X that scikit-learn can split: a dict whose values are sliced together."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from gputune.errors import InputError


class SliceDict(dict[str, Any]):
    """Inputs of a module by the names of its forward's arguments, arrays or tensors (n, ...), split by their rows.

        X = SliceDict(image=images, age=ages)
        cross_validate(net, X, y)

    Its length and shape are those of rows, n and (n,). A name gives that input, any other index a SliceDict of those
    rows. Raises InputError for what is no array, and for unequal lengths.
    """

    def __init__(
        self, inputs: Mapping[str, object] | Iterable[tuple[str, object]] = (), **more: object
    ) -> None:
        super().__init__(inputs, **more)
        for name, value in self.items():
            if not isinstance(value, np.ndarray | Tensor) or value.ndim == 0:
                raise InputError(
                    f"SliceDict: {name!r} must be an array or tensor with a row for each case, got {value!r:.60}."
                )
        lengths = {name: len(value) for name, value in self.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"SliceDict needs inputs of one length, got {lengths or 'none'}.")

    def __len__(self) -> int:
        return len(next(iter(self.values())))

    @property
    def shape(self) -> tuple[int]:
        """(n,), by which scikit-learn counts rows."""
        return (len(self),)

    def __getitem__(self, key: object) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        return SliceDict({name: value[key] for name, value in self.items()})


def as_sliced(X: object) -> object:
    """Return a dict of inputs as a SliceDict, anything else as it is. Raises InputError for a tuple of inputs."""
    if isinstance(X, tuple) and X and all(isinstance(value, np.ndarray | Tensor) for value in X):
        raise InputError(
            f"X is a tuple of {len(X)} inputs, which scikit-learn cannot split by rows; name them after the arguments "
            "of the module's forward: X=gputune.sklearn.SliceDict(image=..., age=...)."
        )
    return SliceDict(X) if type(X) is dict else X
