"""A number with its d derivatives, which forward mode carries through an update rule.

The rules of engine/optim.py work entry by entry, with the few operations that are here. The number goes through once
whatever d is, and what has no derivative costs nothing; torch's own dual numbers have one derivative each, and
compute with those that are zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

Operand = Union["Dual", Tensor, float]


@dataclass(frozen=True, eq=False)
class Dual:
    """``value`` (P, N) and its derivatives ``tangents`` (d, P, N); N may be 1 in both. Stands where a tensor would."""

    value: Tensor
    tangents: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """``torch.where(condition, a, b)`` of two duals; no other function of torch."""
        if function is not torch.where:
            return NotImplemented
        condition, a, b = args
        return cls(torch.where(condition, a.value, b.value), torch.where(condition, a.tangents, b.tangents))

    @property
    def dtype(self) -> torch.dtype:
        """That of both."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """That of both."""
        return self.value.device

    def dim(self) -> int:
        """Dimensions of the value."""
        return self.value.dim()

    def to(self, *, device: torch.device, dtype: torch.dtype) -> "Dual":
        """As ``Tensor.to``."""
        return Dual(self.value.to(device, dtype), self.tangents.to(device, dtype))

    def __add__(self, other: Operand) -> "Dual":
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangents + other.tangents)
        return Dual(self.value + other, self.tangents)

    def __sub__(self, other: Operand) -> "Dual":
        if isinstance(other, Dual):
            return Dual(self.value - other.value, self.tangents - other.tangents)
        return Dual(self.value - other, self.tangents)

    def __rsub__(self, other: Tensor | float) -> "Dual":
        return Dual(other - self.value, -self.tangents)

    def __mul__(self, other: Operand) -> "Dual":
        if isinstance(other, Dual):
            tangents = (self.tangents * other.value).addcmul_(self.value, other.tangents)
            return Dual(self.value * other.value, tangents)
        return Dual(self.value * other, self.tangents * other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Operand) -> "Dual":
        if isinstance(other, Dual):
            ratio = self.value / other.value
            tangents = torch.addcmul(self.tangents, ratio, other.tangents, value=-1).div_(other.value)
            return Dual(ratio, tangents)
        return Dual(self.value / other, self.tangents / other)

    def __pow__(self, power: Tensor) -> "Dual":
        return Dual(self.value**power, self.tangents * (power * self.value ** (power - 1)))

    def clamp_min(self, least: float) -> "Dual":
        """As ``Tensor.clamp_min``: no derivative below ``least``."""
        # PyTorch's own kernel for it: a comparison and a choice would be two passes.
        tangents: Tensor = torch.ops.aten.threshold_backward(self.tangents, self.value, least)
        return Dual(self.value.clamp_min(least), tangents)

    def sqrt(self) -> "Dual":
        """As ``Tensor.sqrt``."""
        root = self.value.sqrt()
        return Dual(root, torch.addcdiv(root.new_zeros(()), self.tangents, root, value=0.5))
