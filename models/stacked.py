"""One linear layer for P members: a batched matrix product, of which a single member is the special case."""

import math

import torch
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """P independent linear layers with their parameters stacked along a leading member axis.

    Shape: input ``(P, B, D)``, or ``(B, D)`` when all members read the same rows; output ``(P, B, K)``.
    Every member starts from the law of ``torch.nn.Linear``: uniform in +-1/sqrt(D), weight and bias.
    """

    def __init__(self, members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, in_features, out_features))  # (P, D, K)
        self.bias = nn.Parameter(torch.empty(members, 1, out_features))  # (P, 1, K)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.expand(len(self.weight), *x.shape[-2:]), self.weight)

    def member(self, p: int) -> nn.Linear:
        """Return member p as a plain ``nn.Linear`` that holds copies of its parameters."""
        linear = nn.Linear(
            *self.weight.shape[1:],  # (D, K)
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight[p].T)
            linear.bias.copy_(self.bias[p, 0])
        return linear


def linear(in_features: int, out_features: int, members: int | None) -> nn.Module:
    """Return an ``nn.Linear``, or its stacked form for a number of members."""
    if members is None:
        return nn.Linear(in_features, out_features)
    return StackedLinear(members, in_features, out_features)


def plain_member(layer: nn.Module, p: int) -> nn.Linear:
    """Return member p of a stacked layer; ValueError where the module was not built with ``members=P``."""
    if not isinstance(layer, StackedLinear):
        raise ValueError(f"member({p}) needs a stacked module, got a plain one: build it with members=P.")
    return layer.member(p)


def check_size(name: str, value: int, low: int) -> None:
    """Raise ValueError where a size is below its lowest value."""
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {name}={value}.")
