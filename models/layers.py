"""What several models are made with: a check of their sizes, and a dropout whose rate may change
while they train."""

import torch
from torch import Tensor, nn


def check_size(name: str, value: int, low: int) -> None:
    """Raise ValueError where a size is below its lowest value."""
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {name}={value}.")


class Dropout(nn.Module):
    """``nn.Dropout`` with its rate in a buffer ``rate``, in [0, 1).

    A search sets it before every step: the key ``dropout`` is each member's own rate, by
    ``dropout_schedule``, and 0 where it is not named. Shape: any -> the same.
    """

    rate: Tensor
    is_off = False
    """Whether a search takes it for the identity, as the rate of none of its members ever differs
    from 0."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {p=}.")
        self.register_buffer("rate", torch.tensor(float(p)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.is_off:
            return x
        return torch.where(torch.rand_like(x) < self.rate, 0.0, x / (1 - self.rate))
