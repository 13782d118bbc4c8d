"""Parts of the models: checks of sizes and shapes, and a dropout with a rate that can change."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_size(name: str, value: int, low: int) -> None:
    """Raise ValueError if the argument ``name`` has a value below ``low``."""
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {name}={value}.")


def _is_per_layer(value: object) -> bool:
    """Return whether an argument has one value for each hidden layer."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def shared_depth(arguments: Mapping[str, Any], depth: int) -> int:
    """Return the number of hidden layers: the length of the arguments with one value per layer, or
    ``depth`` if there are none."""
    lengths = {name: len(value) for name, value in arguments.items() if _is_per_layer(value)}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"All sequences must have one value for each hidden layer, but {counts}.")
    return next(iter(lengths.values()), depth)


def per_layer(value: Any, depth: int) -> list[Any]:
    """Return the value of an argument for each hidden layer."""
    return [*value] if _is_per_layer(value) else [value] * depth


def spatial_dims_of(input_shape: tuple[int, ...], spatial_dims: int | None) -> int:
    """Return the number of axes along which the convolutions slide: 1 or 2."""
    if spatial_dims not in (None, 1, 2):
        raise ValueError(f"spatial_dims must be 1, 2 or None, got {spatial_dims=}.")
    n_axes = len(input_shape)
    if n_axes not in (2, 3) or (n_axes, spatial_dims) == (3, 1):
        raise ValueError(
            "a CNN takes images, (channels, height, width) or (height, width), or sequences, "
            f"(channels, length), got rows of shape {input_shape} and {spatial_dims=}: reshape X, "
            "for example to (rows, 1, length), or choose a different model"
        )
    is_one_channel = n_axes == 2 and input_shape[0] == 1
    return spatial_dims or (1 if is_one_channel else 2)


def check_places(input_shape: tuple[int, ...], dims: int, depth: int) -> None:
    """Raise ValueError if rows are too small to be halved ``depth`` times along ``dims`` axes."""
    places = input_shape[-dims:]
    least = 2**depth
    if min(places) >= least:
        return
    axes = "the length" if dims == 1 else "height and width"
    rows = "sequences" if dims == 1 else "images"
    needed = " x ".join([str(least)] * dims)
    got = " x ".join(map(str, places))
    raise ValueError(
        f"depth={depth} halves {axes} {depth} times, which needs {rows} of {needed} or more, got "
        f"{got}: lower depth, or check the order of the axes. Sequences are (channels, length), "
        "and need spatial_dims=1 if they have several channels"
    )


class Dropout(nn.Module):
    """``nn.Dropout`` with its rate in a buffer, so that a search can change the rate in training.

    Use this layer instead of ``nn.Dropout`` to search the dropout rate. The key ``dropout`` then
    gives each member its own rate, and ``dropout_schedule`` changes the rate over time. The search
    sets the rate before every step. Without the key ``dropout`` the rate is 0.

    Shape: any shape, unchanged.

    Args:
        p: dropout rate in [0, 1), stored in the buffer ``rate`` [default: 0].

    Raises:
        ValueError: ``p`` is out of range.

    Example:
        >>> import gputune, torch
        >>> drop = gputune.models.Dropout(0.5)
        >>> drop.eval()(torch.ones(3))  # no dropout in evaluation mode
        tensor([1., 1., 1.])
        >>> sorted(set(drop.train()(torch.ones(1000)).tolist()))
        [0.0, 2.0]
    """

    rate: Tensor
    is_off = False
    """True if a search treats the module as the identity, because all rates are always 0."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {p=}.")
        self.register_buffer("rate", torch.tensor(float(p)))

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some entries set to 0 and the others scaled up.

        In evaluation mode, return x unchanged.
        """
        if not self.training or self.is_off:
            return x
        return torch.where(torch.rand_like(x) < self.rate, 0.0, x / (1 - self.rate))

    def extra_repr(self) -> str:
        """Return the rate as text, for the ``repr`` of the module."""
        # A stacked module has one rate for each member, and a module on "meta" has no value.
        has_value = self.rate.numel() == 1 and not self.rate.is_meta
        return f"p={self.rate.item():.4g}" if has_value else f"p={tuple(self.rate.shape)}"
