"""Detects a custom loss or score that compares each output with all targets by mistake."""

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from gputune.ground.seeding import keyed_draws

_ORDERS = 12  # of the target, for which a score must be equal to count as one of all pairs of rows


def pairs_all_rows(
    function: Callable[[Tensor, Tensor], object], outputs: Tensor, y: Tensor
) -> bool:
    """Return True if a custom loss or score compares each output with all targets by mistake.

    The cause is that torch broadcasts (B, 1) and (B,) for B rows to (B, B). The result then does
    not change with the order of y. It also differs from the result for outputs and y of the same
    shape.
    """
    rows = len(y)
    shapes = {tuple(outputs.shape), tuple(y.shape)}
    if shapes != {(rows,), (rows, 1)} or rows < 2:
        return False
    # Rows that are all equal would pass for any order, so they are made different.
    steps = torch.arange(rows, device=y.device) % 2
    outputs = outputs.double()
    if bool((outputs == outputs[:1]).all()):
        outputs = outputs + 0.01 * steps.view(outputs.shape)
    if bool((y == y[:1]).all()):
        y = steps.view(y.shape).to(y.dtype)
    if y.is_floating_point():
        y = y.double()

    def mean(outputs: Tensor, y: Tensor) -> Tensor | None:
        with (
            contextlib.suppress(Exception),
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
            keyed_draws(torch.device("cpu"), 0, "check"),
        ):
            return torch.as_tensor(function(outputs.clone(), y.clone())).double().mean()
        return None  # the function does not accept these shapes

    def same(other: Tensor | None) -> bool:
        if paired is None or other is None:
            return False
        return torch.allclose(paired, other, rtol=1e-12, atol=1e-14)

    # Paired with all rows, the mean ignores the order of y and differs from both aligned shapes.
    paired = mean(outputs, y)
    aligned = [mean(outputs.view(shape), y.view(shape)) for shape in ((rows,), (rows, 1))]
    # An accuracy may be equal for one other order by chance.
    orders = (y.roll(shift, 0) for shift in range(1, min(rows, _ORDERS)))
    return all(same(mean(outputs, order)) for order in orders) and not any(map(same, aligned))
