"""Compute sums of products of many tensors in few calls, for optimizers that adapt their learning
rate."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

GradientPair = tuple[Tensor, Tensor]


def parts_together(pairs: Sequence[GradientPair], foreach: bool | None) -> list[list[int]]:
    """Group tensors that one PyTorch call can process together, and return the indices of each
    group.

    A group has all tensors of one device and dtype. With ``foreach=False``, each tensor is a
    separate group.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    together = all(x.is_cuda for x, _ in pairs) if foreach is None else foreach
    for place, (x, y) in enumerate(pairs):
        key: Hashable = place
        if together:
            key = (x.device, x.dtype, y.dtype)
        groups[key].append(place)
    return list(groups.values())


def sums_of_products(products: list[list[GradientPair]], foreach: bool | None) -> list[float]:
    """Return the sum of the products of all entries, for each list of tensor pairs."""
    dots: list[Tensor] = []
    owners = []  # the position of each dot's list
    for number, pairs in enumerate(products):
        for part in parts_together(pairs, foreach):
            left = _flat([pairs[place][0] for place in part])
            right = _flat([pairs[place][1] for place in part])
            dots.append(torch.dot(left, right))
            owners.append(number)
    sums = [0.0] * len(products)
    if dots:
        # All sums are transferred in one synchronization with the GPU.
        device = dots[0].device
        values = torch.stack([dot.to(device) for dot in dots]).tolist()
        for number, value in zip(owners, values):
            sums[number] += value
    return sums


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Join the entries of several tensors into one vector, in float32 or a wider dtype."""
    if len(tensors) == 1:
        flat = tensors[0].reshape(-1)
    else:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    # Squares easily leave the range of half precision.
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def share(part: float, whole: float) -> float:
    """Return the quotient part / whole, or 0 if ``whole`` is zero or the quotient is not finite."""
    if not whole > 0:  # also for NaN
        return 0.0
    quotient = part / whole
    return quotient if math.isfinite(quotient) else 0.0
